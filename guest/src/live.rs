//! What a guest has mapped, replayed from its own tracepoints, and held against what viommu has.
//!
//! The events `iommu:map` and `iommu:unmap` tell addresses but no device, and each device's addresses begin at the
//! same end. The event of `dma:*` by the same task names the device: it comes after the maps and unmaps that it
//! causes, except `dma_free`, which comes before.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use anyhow::{Context as _, bail, ensure};

const PAGE: u64 = 4096;

/// What a device may do in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Access {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.read { "r" } else { "-" }, if self.write { "w" } else { "-" })
    }
}

/// A range that a device can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    /// Inclusive.
    pub(crate) end: u64,
    /// What `start` leads to.
    pub(crate) gpa: u64,
    pub(crate) access: Access,
}

/// What is mapped for each device, by its PCI address without the domain: 00:02.0.
pub(crate) type Live = BTreeMap<String, Vec<Mapping>>;

/// What a trace tells.
#[derive(Debug, Default)]
pub(crate) struct Replayed {
    /// What was mapped when the guest wrote the mark.
    pub(crate) at_mark: HashMap<String, Live>,
    /// What was mapped at the end.
    pub(crate) at_end: Live,
    /// Events of the whole trace.
    pub(crate) maps: u64,
    pub(crate) unmaps: u64,
    /// 4 KiB pages of them.
    pub(crate) mapped_pages: u64,
    pub(crate) unmapped_pages: u64,
}

/// Replays a trace, as the guest hands it out.
///
/// # Errors
///
/// If events were lost, or one cannot be read or belongs to no device.
pub(crate) fn replay(trace: &str) -> anyhow::Result<Replayed> {
    let mut state = State::default();
    let mut lost = None;
    for line in trace.lines() {
        if let Some(count) = line.strip_prefix("lost ") {
            lost = Some(count.trim().parse::<u64>()?);
        } else if !line.starts_with('#') && !line.trim().is_empty() {
            state.line(line).with_context(|| format!("the guest's trace: {line:?}"))?;
        }
    }
    match lost {
        Some(0) => {}
        Some(count) => bail!("the guest's trace lacks {count} events"),
        None => bail!("the guest's trace has no end"),
    }
    state.whole()?;
    Ok(Replayed { at_mark: state.marks, at_end: listed(&state.live), ..state.counts })
}

/// How two lists differ, page by page, in lines for a reader; nothing, if they are the same.
pub(crate) fn differences(guest: &[Mapping], ours: &[Mapping]) -> Vec<String> {
    let (guest, ours) = (pages(guest), pages(ours));
    let line = |who: &str, (iova, gpa, access): &(u64, u64, Access)| {
        format!("{iova:#x} -> {gpa:#x} {access}: only {who} has it")
    };
    let only_guest = guest.difference(&ours).map(|page| line("the guest", page));
    only_guest.chain(ours.difference(&guest).map(|page| line("viommu", page))).collect()
}

fn pages(mappings: &[Mapping]) -> BTreeSet<(u64, u64, Access)> {
    let mut pages = BTreeSet::new();
    for mapping in mappings {
        let count = (mapping.end - mapping.start) / PAGE + 1;
        pages.extend((0..count).map(|page| {
            (mapping.start + page * PAGE, mapping.gpa.wrapping_add(page * PAGE), mapping.access)
        }));
    }
    pages
}

/// One `iommu:map` or `iommu:unmap` that no device has claimed yet; the end is exclusive.
#[derive(Debug)]
struct Event {
    start: u64,
    end: u64,
    /// Of a map.
    gpa: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    /// Of each device, by first address: (exclusive end, gpa, access).
    live: HashMap<String, BTreeMap<u64, (u64, u64, Access)>>,
    /// Of each task, oldest first: an interrupt's events are claimed before those it came amid.
    unclaimed: HashMap<String, Vec<Event>>,
    /// Frees of each task whose unmap is yet to come: device and address.
    freed: HashMap<String, Vec<(String, u64)>>,
    marks: HashMap<String, Live>,
    /// Without lists.
    counts: Replayed,
}

impl State {
    fn line(&mut self, line: &str) -> anyhow::Result<()> {
        // TASK-PID [CPU] FLAGS TIME: EVENT: WORDS
        let (task, rest) = line.split_once("] ").context("no processor")?;
        let mut parts = rest.splitn(3, ": ");
        let (_, event) = (parts.next(), parts.next().context("no event")?);
        let words = parts.next().unwrap_or("");
        let task = task.trim();
        match event.trim() {
            "map" => {
                let (start, end) = range(words)?;
                self.counts.maps += 1;
                self.counts.mapped_pages += (end - start) / PAGE;
                let gpa = Some(number(words, "paddr=")?);
                self.unclaimed.entry(task.to_owned()).or_default().push(Event { start, end, gpa });
            }
            "unmap" => {
                let (start, end) = range(words)?;
                self.counts.unmaps += 1;
                self.counts.unmapped_pages += (end - start) / PAGE;
                let freed = self.freed.get_mut(task);
                let claim = freed.and_then(|freed| {
                    let at = freed.iter().position(|(_, address)| (start..end).contains(address))?;
                    Some(freed.remove(at).0)
                });
                match claim {
                    Some(device) => self.unmap(&device, start, end)?,
                    None => {
                        let event = Event { start, end, gpa: None };
                        self.unclaimed.entry(task.to_owned()).or_default().push(event);
                    }
                }
            }
            "dma_free" | "dma_free_pages" => {
                let (device, address) = (device(words)?, number(words, "dma_addr=")?);
                self.freed.entry(task.to_owned()).or_default().push((device.to_owned(), address));
            }
            "dma_map_page" | "dma_map_phys" | "dma_map_resource" | "dma_alloc" | "dma_alloc_pages"
            | "dma_unmap_page" | "dma_unmap_phys" | "dma_unmap_resource" => {
                self.claim(task, words)?;
            }
            "tracing_mark_write" | "print" => {
                self.marks.insert(words.trim().to_owned(), listed(&self.live));
            }
            "add_device_to_group"
            | "remove_device_from_group"
            | "attach_device_to_domain"
            | "detach_device_from_domain"
            | "dma_alloc_err"
            | "dma_map_err" => {}
            other => bail!("the event {other} is not known here"),
        }
        Ok(())
    }

    /// A device has mapped or unmapped: the task's latest event there was its own.
    fn claim(&mut self, task: &str, words: &str) -> anyhow::Result<()> {
        let (device, address) = (device(words)?, number(words, "dma_addr=")?);
        let access = access(words)?;
        let (_, size) = words.split_once(" size=").context("no size")?;
        let size: u64 = size.split_whitespace().next().unwrap_or("").parse().context("the size")?;
        // Memory in several pieces is mapped piece by piece.
        let mut at = address;
        while at < address + size {
            // A device that is not behind the IOMMU maps too.
            let Some(events) = self.unclaimed.get_mut(task) else { return Ok(()) };
            let Some(last) = events.iter().rposition(|event| (event.start..event.end).contains(&at)) else {
                return Ok(());
            };
            let event = events.remove(last);
            at = event.end;
            match event.gpa {
                Some(gpa) => {
                    let live = self.live.entry(device.to_owned()).or_default();
                    let old = live.insert(event.start, (event.end, gpa, access));
                    ensure!(old.is_none(), "mapped twice");
                }
                None => self.unmap(device, event.start, event.end)?,
            }
        }
        Ok(())
    }

    fn unmap(&mut self, device: &str, start: u64, end: u64) -> anyhow::Result<()> {
        let live = self.live.entry(device.to_owned()).or_default();
        let starts: Vec<u64> = live.range(start..end).map(|(start, _)| *start).collect();
        ensure!(!starts.is_empty(), "{device} has nothing mapped there");
        for at in starts {
            let (mapped_end, ..) = live.remove(&at).context("just seen")?;
            ensure!(mapped_end <= end, "cut in the middle");
        }
        Ok(())
    }

    fn whole(&self) -> anyhow::Result<()> {
        let left: Vec<&Event> = self.unclaimed.values().flatten().collect();
        ensure!(left.is_empty(), "the guest's trace has maps or unmaps of no device: {left:x?}");
        Ok(())
    }
}

fn listed(live: &HashMap<String, BTreeMap<u64, (u64, u64, Access)>>) -> Live {
    let mapping = |(start, (end, gpa, access)): (&u64, &(u64, u64, Access))| Mapping {
        start: *start,
        end: end - 1,
        gpa: *gpa,
        access: *access,
    };
    live.iter().map(|(device, live)| (device.clone(), live.iter().map(mapping).collect())).collect()
}

/// `iova=START - END`, the end exclusive.
fn range(words: &str) -> anyhow::Result<(u64, u64)> {
    let (_, rest) = words.split_once("iova=").context("no iova")?;
    let (start, rest) = rest.split_once(" - ").context("no end")?;
    Ok((hexadecimal(start)?, hexadecimal(rest.split_whitespace().next().context("no end")?)?))
}

fn number(words: &str, key: &str) -> anyhow::Result<u64> {
    let (_, rest) = words.split_once(key).with_context(|| format!("no {key}"))?;
    hexadecimal(rest.split_whitespace().next().unwrap_or(""))
}

fn hexadecimal(text: &str) -> anyhow::Result<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).with_context(|| format!("{text:?} is no number"))
}

/// 0000:00:02.0 without its domain.
fn device(words: &str) -> anyhow::Result<&str> {
    let name = words.split_whitespace().next().context("no device")?;
    Ok(name.strip_prefix("0000:").unwrap_or(name))
}

fn access(words: &str) -> anyhow::Result<Access> {
    let (_, rest) = words.split_once("dir=").context("no direction")?;
    match rest.split_whitespace().next() {
        Some("BIDIRECTIONAL") => Ok(Access { read: true, write: true }),
        Some("TO_DEVICE") => Ok(Access { read: true, write: false }),
        Some("FROM_DEVICE") => Ok(Access { read: false, write: true }),
        other => bail!("the direction {other:?} is not known here"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Access = Access { read: true, write: true };
    const READ: Access = Access { read: true, write: false };

    /// Lines of a real trace, cut short.
    const TRACE: &str = "\
# tracer: nop
 insmod-99   [000] .....  3.593: map: IOMMU: iova=0x00000000ffffe000 - 0x0000000100000000 paddr=0x0000000005ee4000 size=8192
 insmod-99   [000] .....  3.594: dma_alloc: 0000:00:02.0 dir=BIDIRECTIONAL dma_addr=ffffe000 size=6726 virt_addr=00000000cf flags=GFP_KERNEL attrs=NO_WARN
 kworker/0:0H-10 [000] d..1. 3.6: map: IOMMU: iova=0x00000000ffffe000 - 0x00000000fffff000 paddr=0x00000000080fe000 size=4096
 kworker/0:0H-10 [000] d..1. 3.7: dma_map_phys: 0000:00:03.0 dir=TO_DEVICE dma_addr=ffffe110 size=16 phys_addr=80fe110 attrs=
 init-1      [000] ...1.  5.3: tracing_mark_write: quiet
 <idle>-0    [000] d.h..  5.4: unmap: IOMMU: iova=0x00000000ffffe000 - 0x00000000fffff000 size=4096 unmapped_size=4096
 <idle>-0    [000] d.h..  5.4: dma_unmap_phys: 0000:00:03.0 dir=TO_DEVICE dma_addr=ffffe110 size=16 attrs=
 init-1      [000] .....  5.5: dma_free: 0000:00:02.0 dir=BIDIRECTIONAL dma_addr=ffffe000 size=6726 virt_addr=00 attrs=
 init-1      [000] .....  5.6: unmap: IOMMU: iova=0x00000000ffffe000 - 0x0000000100000000 size=8192 unmapped_size=8192
";

    #[test]
    fn replay_gives_each_device_its_own() {
        let replayed = replay(&format!("{TRACE}lost 0\n")).expect("a good trace");
        assert_eq!((replayed.maps, replayed.unmaps), (2, 2));
        assert_eq!((replayed.mapped_pages, replayed.unmapped_pages), (3, 3));
        let quiet = &replayed.at_mark["quiet"];
        let ring = Mapping { start: 0xffff_e000, end: 0xffff_ffff, gpa: 0x5ee_4000, access: BOTH };
        let buffer = Mapping { start: 0xffff_e000, end: 0xffff_efff, gpa: 0x80f_e000, access: READ };
        assert_eq!(quiet["00:02.0"], [ring]);
        assert_eq!(quiet["00:03.0"], [buffer]);
        assert!(replayed.at_end.values().all(Vec::is_empty), "{:?}", replayed.at_end);
    }

    #[test]
    fn replay_takes_memory_in_pieces_for_one_mapping_of_the_device() {
        let pieces = "\
 insmod-9 [000] ..... 1.0: map: IOMMU: iova=0x00000000ffffe000 - 0x00000000fffff000 paddr=0x0000000007e9d000 size=4096
 insmod-9 [000] ..... 1.1: map: IOMMU: iova=0x00000000fffff000 - 0x0000000100000000 paddr=0x0000000007e9c000 size=4096
 insmod-9 [000] ..... 1.2: dma_alloc: 0000:00:02.0 dir=BIDIRECTIONAL dma_addr=ffffe000 size=6726 virt_addr=0 flags=0 attrs=
lost 0
";
        let replayed = replay(pieces).expect("a good trace");
        assert_eq!(replayed.at_end["00:02.0"].len(), 2);
    }

    #[test]
    fn replay_refuses_a_trace_that_is_not_whole() {
        assert!(replay(TRACE).is_err(), "no end");
        assert!(replay(&format!("{TRACE}lost 3\n")).is_err(), "lost events");
        let unclaimed = TRACE.lines().nth(1).expect("the first map");
        assert!(replay(&format!("{unclaimed}\nlost 0\n")).is_err(), "a map of no device");
        let unmap = TRACE.lines().skip(6).take(2).collect::<Vec<_>>().join("\n");
        assert!(replay(&format!("{unmap}\nlost 0\n")).is_err(), "an unmap of nothing");
    }

    #[test]
    fn differences_are_of_pages_and_not_of_how_they_are_cut() {
        let whole = Mapping { start: 0x1000, end: 0x2fff, gpa: 0x7000, access: BOTH };
        let first = Mapping { start: 0x1000, end: 0x1fff, gpa: 0x7000, access: BOTH };
        let second = Mapping { start: 0x2000, end: 0x2fff, gpa: 0x8000, access: BOTH };
        assert_eq!(differences(&[whole], &[first, second]), [""; 0]);
        assert_eq!(differences(&[whole], &[first]).len(), 1);
        let elsewhere = Mapping { gpa: 0x9000, ..second };
        assert_eq!(differences(&[whole], &[first, elsewhere]).len(), 2);
        let less = Mapping { access: READ, ..second };
        assert_eq!(differences(&[whole], &[first, less]).len(), 2);
    }
}
