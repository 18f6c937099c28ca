//! How long QEMU's own virtio-iommu takes for a kick, by the stamps of its trace.
//!
//! Lines are `2026-01-31T12:00:00.123456Z EVENT WORDS`. A kick begins when QEMU's handler of the queue is called
//! (`virtio_queue_notify`); each request ends just before its used ring's index is written (`virtqueue_flush`).

use anyhow::{Context as _, ensure};

/// QEMU's options that make it trace what is read here. Each line costs time: with `more`, each request has one more.
pub(super) fn options(more: bool) -> Vec<String> {
    let mut options = vec!["-msg".to_owned(), "timestamp=on".to_owned()];
    let events = ["virtio_iommu_attach", "virtio_queue_notify", "virtqueue_flush"];
    let further = ["virtio_iommu_map", "virtio_iommu_unmap"];
    for event in events.iter().chain(further.iter().filter(|_| more)) {
        options.extend(["-trace".to_owned(), (*event).to_owned()]);
    }
    options
}

/// What a trace tells of the IOMMU's request queue.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Kicks {
    /// Of each kick that led to anything: requests that were answered.
    pub(super) requests: Vec<u32>,
    /// Of each of those: microseconds from the kick to its last answer.
    pub(super) micros: Vec<f64>,
    /// Lines of MAPs and of UNMAPs, if they were traced.
    pub(super) maps: u64,
    pub(super) unmaps: u64,
}

impl Kicks {
    /// All requests.
    pub(super) fn all(&self) -> u64 {
        self.requests.iter().map(|count| u64::from(*count)).sum()
    }
}

/// Reads the kicks in `trace` from byte `from` to byte `to`; what is before tells which queue is the IOMMU's.
///
/// # Errors
///
/// If the queue cannot be told, or a line has no stamp.
pub(super) fn kicks(trace: &str, from: usize, to: usize) -> anyhow::Result<Kicks> {
    let queue = queue_of(trace.get(..from).context("the trace ends too early")?)?;
    let mut kicks = Kicks::default();
    let mut open: Option<(u64, u64, u32)> = None;
    for line in trace.get(from..to).context("the trace ends too early")?.lines() {
        let mut words = line.split_whitespace();
        let (Some(stamp), Some(event)) = (words.next(), words.next()) else {
            continue;
        };
        match event {
            "virtio_queue_notify" if word_after(line, "vq") == Some(queue) => {
                kicks.close(open.take());
                let at = micros(stamp)?;
                open = Some((at, at, 0));
            }
            "virtqueue_flush" if word_after(line, "vq") == Some(queue) => {
                if let Some((_, last, count)) = &mut open {
                    *last = micros(stamp)?;
                    *count += 1;
                }
            }
            "virtio_iommu_map" => kicks.maps += 1,
            "virtio_iommu_unmap" => kicks.unmaps += 1,
            _ => {}
        }
    }
    kicks.close(open);
    ensure!(!kicks.requests.is_empty(), "the trace has no kick of the IOMMU's queue {queue}");
    Ok(kicks)
}

impl Kicks {
    fn close(&mut self, kick: Option<(u64, u64, u32)>) {
        // Midnight comes between the two stamps of one kick at most.
        if let Some((begun, last, count)) = kick
            && count > 0
            && let Some(micros) = last.checked_sub(begun)
        {
            self.requests.push(count);
            self.micros.push(micros as f64);
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
        let (clock, fraction) = time.split_once('.')?;
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
2026-11-22T11:00:00.000001Z virtqueue_flush vq 0xaa count 1
2026-11-22T11:00:00.000003Z virtqueue_flush vq 0xaa count 1
2026-11-22T11:00:00.000010Z virtio_queue_notify vdev 0xd n 0 vq 0xdd
2026-11-22T11:00:00.000019Z virtqueue_flush vq 0xdd count 1
2026-11-22T11:00:00.000020Z virtio_queue_notify vdev 0xa n 0 vq 0xaa
2026-11-22T11:00:00.000030Z virtio_queue_notify vdev 0xa n 0 vq 0xaa
2026-11-22T11:00:00.000032Z virtqueue_flush vq 0xaa count 1
";

    #[test]
    fn kicks_are_of_the_queue_of_the_iommu_alone() {
        let trace = format!("{BEFORE}{KICKS}");
        let kicks = kicks(&trace, BEFORE.len(), trace.len()).expect("a good trace");
        assert_eq!((&kicks.requests[..], &kicks.micros[..]), (&[2, 1][..], &[5.0, 2.0][..]));
        assert_eq!((kicks.all(), kicks.maps, kicks.unmaps), (3, 1, 0));
    }

    #[test]
    fn kicks_of_a_trace_that_tells_no_queue_or_no_time_are_an_error() {
        assert!(kicks(KICKS, 0, KICKS.len()).is_err(), "no attach");
        assert!(kicks(BEFORE, BEFORE.len(), BEFORE.len()).is_err(), "no kick");
        let trace = format!("{BEFORE}7@1.5 virtio_queue_notify vdev 0xa n 0 vq 0xaa\n");
        assert!(kicks(&trace, BEFORE.len(), trace.len()).is_err(), "no stamp");
    }
}
