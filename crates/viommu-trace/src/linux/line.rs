//! One line of trace text: `TASK-PID [CPU] FLAGS TIME: NAME: FIELDS`.

use viommu::addr::{Iova, IovaRange};
use viommu::mapping::{Access, Target};

use crate::parse::{Bad, Fields, seconds};

/// Who runs: the process, and for the idle tasks, which share a number, the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Task {
    pid: u64,
    cpu: u64,
}

/// A line taken apart.
pub(super) struct Line<'a> {
    pub(super) task: Task,
    pub(super) time: Option<u64>,
    pub(super) name: &'a [u8],
    pub(super) said: Result<Said<'a>, Bad>,
}

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said<'a> {
    Map {
        range: IovaRange,
        phys: u64,
    },
    Unmap {
        range: IovaRange,
    },
    AddToGroup {
        group: u64,
        device: &'a [u8],
    },
    Attach {
        device: &'a [u8],
    },
    /// The domain that this task attaches next has this id on this IOMMU.
    Assign {
        unit: &'a [u8],
        did: u64,
    },
    /// What was mapped or unmapped just now is of this domain id.
    Flush {
        unit: &'a [u8],
        did: u64,
        range: IovaRange,
        mapped: bool,
    },
    /// What was mapped just now is of this device.
    DmaMap {
        device: &'a [u8],
        range: IovaRange,
        access: Access,
        target: Target,
    },
    /// What was unmapped just now is of this device.
    DmaUnmap {
        device: &'a [u8],
        range: IovaRange,
    },
    /// What is unmapped next is of this device.
    DmaFree {
        device: &'a [u8],
        range: IovaRange,
    },
    Mark(&'a [u8]),
    Other,
}

/// Whether a line shows that this is trace text.
pub(crate) fn recognises(text: &[u8]) -> bool {
    text.starts_with(b"# tracer:") || parse(text).is_some()
}

/// Takes a line apart; `None` for what is no event.
pub(super) fn parse(text: &[u8]) -> Option<Line<'_>> {
    let text = text.trim_ascii_start();
    if text.first().is_none_or(|&b| b == b'#') {
        return None;
    }
    let mut from = 0;
    // A task's name may hold a bracket: the one of the CPU has only digits inside.
    let (before, cpu, mut f) = loop {
        let open = from + memchr::memchr(b'[', text.get(from..)?)?;
        let mut f = Fields(text.get(open + 1..)?);
        if let Ok(cpu) = f.dec("")
            && f.literal("] ").is_ok()
        {
            break (text.get(..open)?, cpu, f);
        }
        from = open + 1;
    };
    let pid = pid(before)?;
    let mut time = None;
    for _ in 0..3 {
        f.spaces();
        let word = f.word();
        if let Some(stamp) = word.strip_suffix(b":") {
            let mut fields = Fields(stamp);
            // Some clocks count without a unit: then there is no time, but a line it is.
            let at = seconds(&mut fields);
            if !stamp.first()?.is_ascii_digit() {
                return None;
            }
            time = Some(at.filter(|_| fields.0.is_empty() && stamp.contains(&b'.')));
            break;
        }
    }
    let time = time?;
    f.spaces();
    let name = f.word().strip_suffix(b":")?;
    // perf script and trace-cmd put the event's group before its name.
    let name = match memchr::memchr(b':', name) {
        Some(at) => name.get(at + 1..)?,
        None => name,
    };
    if name.is_empty() || !name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_') {
        return None;
    }
    f.spaces();
    let task = Task { pid, cpu: if pid == 0 { cpu } else { 0 } };
    Some(Line { task, time, name, said: said(name, f) })
}

/// The number behind the last `-` or space of `TASK-PID (TGID)`.
fn pid(before: &[u8]) -> Option<u64> {
    let mut before = before.trim_ascii_end();
    if before.ends_with(b")") {
        before = before.get(..memchr::memrchr(b'(', before)?)?.trim_ascii_end();
    }
    let at = memchr::memrchr2(b'-', b' ', before)?;
    let mut digits = Fields(before.get(at + 1..)?);
    let pid = digits.dec("").ok()?;
    digits.0.is_empty().then_some(pid)
}

fn said<'a>(name: &[u8], mut f: Fields<'a>) -> Result<Said<'a>, Bad> {
    match name {
        b"map" | b"unmap" if f.0.starts_with(b"IOMMU: iova=") => {
            let start = f.hex("IOMMU: iova=0x")?;
            let end = f.hex(" - 0x")?;
            if name == b"map" {
                let phys = f.hex(" paddr=0x")?;
                let size = f.dec(" size=")?;
                f.end()?;
                Ok(match extent(start, end, size)? {
                    Some(range) => Said::Map { range, phys },
                    None => Said::Other,
                })
            } else {
                let size = f.dec(" size=")?;
                let gone = f.dec(" unmapped_size=")?;
                f.end()?;
                Ok(match extent(start, end, size)? {
                    Some(range) if gone > 0 => Said::Unmap { range },
                    _ => Said::Other,
                })
            }
        }
        b"add_device_to_group" => {
            let group = f.dec("IOMMU: groupID=")?;
            f.literal(" device=")?;
            Ok(Said::AddToGroup { group, device: device(&mut f)? })
        }
        b"attach_device_to_domain" => {
            f.literal("IOMMU: device=")?;
            Ok(Said::Attach { device: device(&mut f)? })
        }
        b"cache_tag_assign" => {
            let (unit, did) = tag(&mut f)?;
            Ok(Said::Assign { unit, did })
        }
        b"cache_tag_flush_range" | b"cache_tag_flush_range_np" => {
            let (unit, did) = tag(&mut f)?;
            let range = f.range(" [0x", "-0x")?;
            f.literal("]")?;
            Ok(Said::Flush { unit, did, range, mapped: name.ends_with(b"_np") })
        }
        b"tracing_mark_write" | b"print" => Ok(Said::Mark(f.0)),
        _ if name.starts_with(b"dma_map_") || name.starts_with(b"dma_alloc") => {
            let Some((device, range)) = dma(&mut f)? else { return Ok(Said::Other) };
            let access = direction(f.0);
            let mmio = name == b"dma_map_resource" || attribute(f.0, b"MMIO");
            let target = if mmio { Target::Mmio } else { Target::Ram };
            Ok(Said::DmaMap { device, range, access, target })
        }
        _ if name.starts_with(b"dma_unmap_") || name.starts_with(b"dma_free") => {
            let Some((device, range)) = dma(&mut f)? else { return Ok(Said::Other) };
            Ok(if name.starts_with(b"dma_free") {
                Said::DmaFree { device, range }
            } else {
                Said::DmaUnmap { device, range }
            })
        }
        _ => Ok(Said::Other),
    }
}

/// `[start, end)` of `size` bytes; `None` for no bytes. An end of 2^64 is printed as 0.
fn extent(start: u64, end: u64, size: u64) -> Result<Option<IovaRange>, Bad> {
    if start.wrapping_add(size) != end {
        return Err(Bad::Other("iova and size do not agree"));
    }
    if size == 0 {
        return Ok(None);
    }
    IovaRange::from_len(Iova(start), size).map(Some).ok_or(Bad::Backwards)
}

fn device<'a>(f: &mut Fields<'a>) -> Result<&'a [u8], Bad> {
    let device = f.word();
    if device.is_empty() { Err(Bad::Missing("device")) } else { Ok(device) }
}

/// `UNIT/DEVICE type T did N` or `UNIT DEVICE[N] type T did N`.
fn tag<'a>(f: &mut Fields<'a>) -> Result<(&'a [u8], u64), Bad> {
    let at = memchr::memchr2(b'/', b' ', f.0).ok_or(Bad::Missing("type"))?;
    let unit = f.0.get(..at).unwrap_or_default();
    let at = memchr::memmem::find(f.0, b" did ").ok_or(Bad::Missing("did"))?;
    f.0 = f.0.get(at..).unwrap_or_default();
    Ok((unit, f.dec(" did ")?))
}

/// Device and bus addresses of a `dma` event: `dma_addr=` with `size=`, or the lists of a scatter-gather map, of
/// which the hull is taken. `None` where the event has no address. `f` keeps the fields behind the device.
fn dma<'a>(f: &mut Fields<'a>) -> Result<Option<(&'a [u8], IovaRange)>, Bad> {
    let device = device(f)?;
    if let Some(at) = memchr::memmem::find(f.0, b"dma_addr=") {
        let mut g = Fields(f.0.get(at..).unwrap_or_default());
        let start = g.hex("dma_addr=")?;
        let size = g.dec(" size=")?;
        return Ok(IovaRange::from_len(Iova(start), size).map(|range| (device, range)));
    }
    let (Some(addresses), Some(sizes)) =
        (memchr::memmem::find(f.0, b"dma_addrs={"), memchr::memmem::find(f.0, b"sizes={"))
    else {
        return Ok(None);
    };
    let mut a = Fields(f.0.get(addresses..).unwrap_or_default());
    let mut s = Fields(f.0.get(sizes..).unwrap_or_default());
    a.literal("dma_addrs={")?;
    s.literal("sizes={")?;
    let mut hull: Option<IovaRange> = None;
    while a.0.starts_with(b"0x") && s.0.starts_with(b"0x") {
        if let Some(part) = IovaRange::from_len(Iova(a.hex("0x")?), s.hex("0x")?) {
            hull = Some(hull.map_or(part, |hull| hull.hull(part)));
        }
        a.0 = a.0.strip_prefix(b",").unwrap_or(a.0);
        s.0 = s.0.strip_prefix(b",").unwrap_or(s.0);
    }
    Ok(hull.map(|hull| (device, hull)))
}

fn direction(fields: &[u8]) -> Access {
    if fields.starts_with(b"dir=TO_DEVICE") {
        Access::READ
    } else if fields.starts_with(b"dir=FROM_DEVICE") {
        Access::WRITE
    } else {
        Access::RW
    }
}

fn attribute(fields: &[u8], name: &[u8]) -> bool {
    memchr::memmem::find(fields, b"attrs=")
        .and_then(|at| fields.get(at + 6..))
        .is_some_and(|attrs| attrs.split(|&b| b == b'|' || b == b' ').any(|attr| attr == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn task_names_with_brackets_and_dashes_and_tgids_are_understood() {
        for (text, pid) in [
            ("    kworker/0:0H-10      [000] d..1.     3.307526: foo: bar", 10),
            ("my [task]-a-77 (  70) [001] .....     3.307526: foo: bar", 77),
            ("my task-78 (-----) [001]     3.307526: foo: bar", 78),
            ("task  79 [001]     3.307526:  iommu:foo: bar", 79),
        ] {
            let line = parse(text.as_bytes()).unwrap();
            assert_eq!(line.task.pid, pid, "{text}");
            assert_eq!(line.time, Some(3_307_526_000), "{text}");
            assert_eq!(line.name, b"foo", "{text}");
        }
        assert!(parse(b"# TASK-PID [000] ..... 1.0: foo: bar").is_none());
        assert!(parse(b"CPU:0 [LOST 12 EVENTS]").is_none());
        assert!(parse(b"<idle>-0 [000] d..2. 123456: foo: bar").unwrap().time.is_none());
    }

    #[test]
    fn maps_have_exclusive_ends_which_may_be_2_to_the_64() {
        let f = Fields(b"IOMMU: iova=0xfffffffffffff000 - 0x0000000000000000 paddr=0x1000 size=4096");
        assert_eq!(said(b"map", f), Ok(Said::Map { range: range(u64::MAX - 0xfff, u64::MAX), phys: 0x1000 }));
        let f = Fields(b"IOMMU: iova=0x1000 - 0x2000 paddr=0x1000 size=8192");
        assert!(said(b"map", f).is_err());
        let f = Fields(b"IOMMU: iova=0x1000 - 0x2000 size=4096 unmapped_size=0");
        assert_eq!(said(b"unmap", f), Ok(Said::Other));
        assert_eq!(said(b"map", Fields(b"of another group")), Ok(Said::Other));
    }

    #[test]
    fn scatter_gather_lists_give_their_hull() {
        let f = Fields(
            b"0000:00:02.0 dir=FROM_DEVICE dma_addrs={0x1000,0x2000} sizes={0x1000,0x800} phys_addrs={0x0,0x0} attrs=",
        );
        assert_eq!(
            said(b"dma_map_sg", f),
            Ok(Said::DmaMap {
                device: b"0000:00:02.0",
                range: range(0x1000, 0x27ff),
                access: Access::WRITE,
                target: Target::Ram
            })
        );
        assert_eq!(
            said(b"dma_unmap_sg", Fields(b"0000:00:02.0 dir=NONE phys_addrs={0x0} attrs=")),
            Ok(Said::Other)
        );
    }

    #[test]
    fn domain_ids_and_ranges_of_flushes_are_read() {
        let f = Fields(b"dmar0 dmar0[0] type iotlb did 3 [0x100000-0x100fff] addr 0x100000 mask 0x0");
        assert_eq!(
            said(b"cache_tag_flush_range_np", f),
            Ok(Said::Flush { unit: b"dmar0", did: 3, range: range(0x10_0000, 0x10_0fff), mapped: true })
        );
        let f = Fields(b"dmar0/dmar0 type iotlb did 2 pasid 0 ref 1");
        assert_eq!(said(b"cache_tag_assign", f), Ok(Said::Assign { unit: b"dmar0", did: 2 }));
    }
}
