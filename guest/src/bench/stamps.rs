//! How long QEMU's own virtio-iommu takes for a kick, by the stamps of its trace.
//!
//! Lines are `2026-01-31T12:00:00.123456Z EVENT WORDS`. A kick begins when QEMU's handler of the queue is called
//! (`virtio_queue_notify`). A request is done when its answer is about to be given back (`virtqueue_fill`), and almost
//! nothing happens from there to `virtqueue_flush`: what lies between those two is what writing a line takes.

use anyhow::{Context as _, ensure};

use super::stats;

/// QEMU's options that make it trace what is read here; with `more`, each request writes one line more on its way.
pub(super) fn options(more: bool) -> Vec<String> {
    let mut options = vec!["-msg".to_owned(), "timestamp=on".to_owned()];
    let events = ["virtio_iommu_attach", "virtio_queue_notify", "virtqueue_fill", "virtqueue_flush"];
    let further = ["virtio_iommu_map", "virtio_iommu_unmap"];
    for event in events.iter().chain(further.iter().filter(|_| more)) {
        options.extend(["-trace".to_owned(), (*event).to_owned()]);
    }
    options
}

/// What a trace tells of the IOMMU's request queue.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Kicks {
    /// Requests that were answered.
    pub(super) requests: u64,
    /// Kicks of one request: the microseconds from its stamp to the answer's, and those that a line took right after.
    pub(super) single: Vec<(f64, f64)>,
    /// Kicks of more.
    pub(super) several: u64,
    /// Lines of MAPs and of UNMAPs, if they were traced.
    pub(super) maps: u64,
    pub(super) unmaps: u64,
}

/// The middle of many kicks, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Times {
    /// From the kick to its answer, the trace's lines between them included: an upper bound.
    pub(super) traced: f64,
    /// A line.
    pub(super) line: f64,
    /// Without the lines: an estimate, which may come out below zero if lines differ.
    pub(super) left: f64,
}

impl Kicks {
    /// The times of kicks with so many lines between their stamps, the kick's own among them.
    pub(super) fn times(&self, lines: f64) -> Option<Times> {
        let middle = |of: &dyn Fn(f64, f64) -> f64| {
            let values: Vec<f64> = self.single.iter().map(|(traced, line)| of(*traced, *line)).collect();
            stats::middle_mean(&values)
        };
        Some(Times {
            traced: middle(&|traced, _| traced)?,
            line: middle(&|_, line| line)?,
            left: middle(&|traced, line| traced - lines * line)?,
        })
    }
}

/// A kick whose end has not been read.
#[derive(Clone, Copy, Debug)]
struct Open {
    begun: u64,
    filled: Option<u64>,
    flushed: u64,
    requests: u64,
}

/// Reads the kicks in `trace` from byte `from` to byte `to`; what is before tells which queue is the IOMMU's.
///
/// # Errors
///
/// If the queue cannot be told, or a line has no stamp.
pub(super) fn kicks(trace: &str, from: usize, to: usize) -> anyhow::Result<Kicks> {
    let queue = queue_of(trace.get(..from).context("the trace ends too early")?)?;
    let mut kicks = Kicks::default();
    let mut open: Option<Open> = None;
    for line in trace.get(from..to).context("the trace ends too early")?.lines() {
        let mut words = line.split_whitespace();
        let (Some(stamp), Some(event)) = (words.next(), words.next()) else {
            continue;
        };
        let ours = || word_after(line, "vq") == Some(queue);
        match event {
            "virtio_queue_notify" if ours() => {
                kicks.close(open.take());
                let begun = micros(stamp)?;
                open = Some(Open { begun, filled: None, flushed: begun, requests: 0 });
            }
            "virtqueue_fill" if ours() => {
                if let Some(open) = &mut open {
                    open.filled = Some(micros(stamp)?);
                }
            }
            "virtqueue_flush" if ours() => {
                if let Some(open) = &mut open {
                    open.flushed = micros(stamp)?;
                    open.requests += 1;
                }
            }
            "virtio_iommu_map" => kicks.maps += 1,
            "virtio_iommu_unmap" => kicks.unmaps += 1,
            _ => {}
        }
    }
    kicks.close(open);
    ensure!(kicks.requests > 0, "the trace has no answer in the IOMMU's queue {queue}");
    Ok(kicks)
}

impl Kicks {
    fn close(&mut self, kick: Option<Open>) {
        let Some(kick) = kick else { return };
        self.requests += kick.requests;
        self.several += u64::from(kick.requests > 1);
        // Stamps begin anew at midnight.
        if kick.requests == 1
            && let Some(filled) = kick.filled
            && let (Some(traced), Some(line)) =
                (filled.checked_sub(kick.begun), kick.flushed.checked_sub(filled))
        {
            self.single.push((traced as f64, line as f64));
        }
    }
}

/// The IOMMU's queue is the one that was kicked last before an endpoint was attached.
fn queue_of(trace: &str) -> anyhow::Result<&str> {
    let mut kicked = None;
    for line in trace.lines() {
        match line.split_whitespace().nth(1) {
            Some("virtio_queue_notify") => kicked = word_after(line, "vq"),
            Some("virtio_iommu_attach") => return kicked.context("an attach without a kick in QEMU's trace"),
            _ => {}
        }
    }
    anyhow::bail!("QEMU's trace tells no attach: it does not offer these events")
}

fn word_after<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_whitespace().skip_while(|word| *word != key).nth(1)
}

/// Microseconds since midnight.
fn micros(stamp: &str) -> anyhow::Result<u64> {
    let read = || {
        let time = stamp.split_once('T')?.1.strip_suffix('Z')?;
        // A whole second is written without its zeroes.
        let (clock, fraction) = time.split_once('.').unwrap_or((time, "000000"));
        let seconds = clock
            .split(':')
            .try_fold(0_u64, |sum, part| sum.checked_mul(60)?.checked_add(part.parse::<u64>().ok()?))?;
        let fraction = (fraction.len() == 6).then(|| fraction.parse::<u64>().ok())??;
        seconds.checked_mul(1_000_000)?.checked_add(fraction)
    };
    read().with_context(|| format!("{stamp:?} is no stamp with microseconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "\
2026-11-22T10:00:00.000001Z virtio_queue_notify vdev 0xd n 0 vq 0xdd
2026-11-22T10:00:00.000005Z virtio_queue_notify vdev 0xa n 0 vq 0xaa
2026-11-22T10:00:00.000006Z virtio_iommu_attach domain=1 endpoint=16
2026-11-22T10:00:00.000007Z virtqueue_flush vq 0xaa count 1
";
    const KICKS: &str = "\
2026-11-22T10:59:59.999998Z virtio_queue_notify vdev 0xa n 0 vq 0xaa
2026-11-22T10:59:59.999999Z virtio_iommu_map domain=1 virt_start=0x0
2026-11-22T11:00:00.000003Z virtqueue_fill vq 0xaa elem 0xe len 4 idx 0
2026-11-22T11:00:00.000005Z virtqueue_flush vq 0xaa count 1
2026-11-22T11:00:00.000010Z virtio_queue_notify vdev 0xd n 0 vq 0xdd
2026-11-22T11:00:00.000018Z virtqueue_fill vq 0xdd elem 0xe len 4 idx 0
2026-11-22T11:00:00.000019Z virtqueue_flush vq 0xdd count 1
2026-11-22T11:00:00.000020Z virtio_queue_notify vdev 0xa n 0 vq 0xaa
2026-11-22T11:00:00.000030Z virtio_queue_notify vdev 0xa n 0 vq 0xaa
2026-11-22T11:00:00.000031Z virtqueue_fill vq 0xaa elem 0xe len 4 idx 0
2026-11-22T11:00:00.000032Z virtqueue_flush vq 0xaa count 1
2026-11-22T11:00:00.000033Z virtqueue_fill vq 0xaa elem 0xe len 4 idx 0
2026-11-22T11:00:00.000034Z virtqueue_flush vq 0xaa count 1
";

    #[test]
    fn kicks_are_of_the_queue_of_the_iommu_alone() {
        let trace = format!("{BEFORE}{KICKS}");
        let kicks = kicks(&trace, BEFORE.len(), trace.len()).expect("a good trace");
        let single = vec![(5.0, 2.0)];
        assert_eq!(kicks, Kicks { requests: 3, single, several: 1, maps: 1, unmaps: 0 });
        assert_eq!(kicks.times(2.0), Some(Times { traced: 5.0, line: 2.0, left: 1.0 }));
        assert_eq!(kicks.times(3.0).map(|times| times.left), Some(-1.0));
        assert_eq!(Kicks::default().times(1.0), None);
    }

    #[test]
    fn micros_of_a_whole_second_has_no_fraction() {
        assert_eq!(micros("2026-11-22T01:00:02Z").expect("a stamp"), 3_602_000_000);
        assert_eq!(micros("2026-11-22T01:00:02.000003Z").expect("a stamp"), 3_602_000_003);
        assert!(micros("2026-11-22T01:00:02.003Z").is_err(), "milliseconds");
    }

    #[test]
    fn kicks_of_a_trace_that_tells_no_queue_or_no_time_are_an_error() {
        assert!(kicks(KICKS, 0, KICKS.len()).is_err(), "no attach");
        assert!(kicks(BEFORE, BEFORE.len(), BEFORE.len()).is_err(), "no kick");
        let trace = format!("{BEFORE}7@1.5 virtio_queue_notify vdev 0xa n 0 vq 0xaa\n");
        assert!(kicks(&trace, BEFORE.len(), trace.len()).is_err(), "no stamp");
    }
}
