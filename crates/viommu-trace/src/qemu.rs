//! QEMU's `-trace` log.
//!
//! A line is an optional prefix, the event's name, a space and the fields. The prefix is nothing, an ISO 8601 time
//! in UTC and a space (`-msg timestamp=on`), or `PID@SECONDS.MICROSECONDS:` (older releases); both may come together.

use viommu::addr::{Gpa, Iova, IovaRange};
use viommu::mapping::Access;

use crate::error::Stop;
use crate::event::{Entry, Event, Region, Reserved, Reset, from_map_flags};
use crate::input::Input;
use crate::parse::{Bad, Fields, fraction, seconds};
use crate::passed_over::PassedOver;

/// The most regions whose requester id is remembered.
const REGIONS: usize = 65_536;

const DAY: u64 = 86_400;
const SECOND: u64 = 1_000_000_000;

/// Reads QEMU log lines.
#[derive(Default)]
pub(crate) struct QemuReader {
    /// By region index: requester id and 1, or 0 while it is not known.
    rids: Vec<u32>,
}

impl QemuReader {
    pub(crate) fn next(&mut self, input: &mut Input, passed: &mut PassedOver) -> Result<Option<Entry>, Stop> {
        while let Some((line, text)) = input.line()? {
            let Some((time, name, fields)) = split(text) else {
                passed.chat();
                continue;
            };
            let Some(known) = name.strip_prefix(b"virtio_iommu_") else {
                passed.event(name);
                continue;
            };
            match self.event(known, fields) {
                Ok(Some(event)) => return Ok(Some(Entry { line, time, event })),
                Ok(None) => passed.event(name),
                Err(bad) => {
                    return Err(Stop::line(line, format!("{}: {bad}", String::from_utf8_lossy(name))));
                }
            }
        }
        Ok(None)
    }

    #[inline]
    fn event(&mut self, name: &[u8], mut f: Fields<'_>) -> Result<Option<Event>, Bad> {
        let event = match name {
            b"translate" => {
                let region = region(&mut f, "mr=")?;
                let endpoint = f.dec32(" rid=")?;
                let iova = Iova(f.hex(" addr=0x")?);
                let flag = f.dec32(" flag=")?;
                self.learn(region, endpoint);
                // Higher bits (execute, privileged) only come with PCI ATS; virtio-iommu has no right for them.
                let access = Access::from_bits_truncate(u8::try_from(flag & 3).unwrap_or(0));
                Event::Access { endpoint, iova, access }
            }
            b"translate_out" => {
                let iova = Iova(f.hex("0x")?);
                let gpa = Gpa(f.hex(" -> 0x")?);
                Event::Translated { endpoint: f.dec32(" for sid=")?, iova, gpa }
            }
            b"map" => {
                let domain = f.dec32("domain=")?;
                let range = virt(&mut f, " virt_start=0x")?;
                let gpa = Gpa(f.hex(" phys_start=0x")?);
                let (access, target) = from_map_flags(f.dec32(" flags=")?).ok_or(UNDEFINED)?;
                Event::Map { domain, range, gpa, access, target }
            }
            b"unmap" => Event::Unmap { domain: f.dec32("domain=")?, range: virt(&mut f, " virt_start=0x")? },
            b"unmap_done" => {
                Event::Unmapped { domain: f.dec32("domain=")?, range: virt(&mut f, " virt_start=0x")? }
            }
            b"notify_map" => {
                let region = self.known(region(&mut f, "mr=")?);
                let range = virt(&mut f, " virt_start=0x")?;
                let gpa = Gpa(f.hex(" phys_start=0x")?);
                let (access, target) = from_map_flags(f.dec32(" flags=")?).ok_or(UNDEFINED)?;
                Event::NotifyMap { region, range, gpa, access, target }
            }
            b"notify_unmap" => {
                let region = self.known(region(&mut f, "mr=")?);
                Event::NotifyUnmap { region, range: virt(&mut f, " virt_start=0x")? }
            }
            b"remap" => {
                let region = self.known(region(&mut f, "mr=")?);
                let range = virt(&mut f, " virt_start=0x")?;
                Event::Remap { region, range, gpa: Gpa(f.hex(" phys_start=0x")?) }
            }
            b"attach" => {
                Event::Attach { domain: f.dec32("domain=")?, endpoint: f.dec32(" endpoint=")?, bypass: false }
            }
            b"detach" => Event::Detach { domain: f.dec32("domain=")?, endpoint: f.dec32(" endpoint=")? },
            b"detach_endpoint_from_domain" => {
                Event::Detached { domain: f.dec32("domain=")?, endpoint: f.dec32(" endpoint=")? }
            }
            b"get_domain" => Event::DomainAdded { domain: f.dec32("Alloc domain=")? },
            b"put_domain" => Event::DomainRemoved { domain: f.dec32("Free domain=")? },
            b"get_endpoint" => Event::EndpointAdded { endpoint: f.dec32("Alloc endpoint=")? },
            b"put_endpoint" => Event::EndpointRemoved { endpoint: f.dec32("Free endpoint=")? },
            b"device_reset" | b"device_reset_exit" => {
                f.literal("reset!")?;
                Event::Reset(Reset::Device)
            }
            b"system_reset" => {
                f.literal("system reset!")?;
                Event::Reset(Reset::System)
            }
            b"switch_address_space" => {
                let bus = f.hex8("Device ")?;
                let device = f.hex8(":")?;
                let function = f.hex8(".")?;
                if device > 31 || function > 7 {
                    return Err(Bad::Number("Device "));
                }
                let enabled = f.dec(" switching address space (iommu enabled=")?;
                f.literal(")")?;
                Event::SwitchAddressSpace { bus, devfn: device << 3 | function, enabled: enabled != 0 }
            }
            b"report_fault" => Event::Fault {
                reason: f.dec32("FAULT reason=")?,
                flags: f.dec32(" flags=")?,
                endpoint: f.dec32(" endpoint=")?,
                address: Iova(f.hex(" address =0x")?),
            },
            b"set_config" => Event::Bypass { on: f.hex("bypass=0x")? != 0 },
            b"get_config" => match config(&mut f) {
                Ok(event) => event,
                // Before 7.0 the line had other fields and there was no bypass to tell.
                Err(_) if memchr::memmem::find(f.0, b" bypass=").is_none() => return Ok(None),
                Err(bad) => return Err(bad),
            },
            b"fill_resv_property" => {
                let endpoint = f.dec32("dev= ")?;
                let kind = match f.dec(", type=")? {
                    1 => Reserved::Msi,
                    // A type that is not known is reserved, says the standard.
                    _ => Reserved::Reserved,
                };
                Event::ReservedRegion { endpoint, kind, range: f.range(" start=0x", " end=0x")? }
            }
            b"init_iommu_mr" => Event::RegionAdded { region: region(&mut f, "init ")? },
            _ => return Ok(None),
        };
        f.end()?;
        Ok(Some(event))
    }

    fn learn(&mut self, region: Region, endpoint: u32) {
        let (Ok(index), Ok(rid)) = (usize::try_from(region.index), u16::try_from(endpoint)) else { return };
        if index >= REGIONS {
            return;
        }
        if index >= self.rids.len() {
            self.rids.resize(index + 1, 0);
        }
        if let Some(slot) = self.rids.get_mut(index) {
            *slot = u32::from(rid) + 1;
        }
    }

    fn known(&self, region: Region) -> Region {
        let index = usize::try_from(region.index).ok();
        let rid = index.and_then(|index| self.rids.get(index)?.checked_sub(1));
        Region { rid: rid.and_then(|rid| u16::try_from(rid).ok()), ..region }
    }
}

const UNDEFINED: Bad = Bad::Other("flags that virtio-iommu does not define");

fn virt(f: &mut Fields<'_>, start: &'static str) -> Result<IovaRange, Bad> {
    f.range(start, " virt_end=0x")
}

fn region(f: &mut Fields<'_>, before: &'static str) -> Result<Region, Bad> {
    f.literal(before)?;
    let index = f.dec32("virtio-iommu-memory-region-")?;
    let devfn = u8::try_from(f.dec("-")?).map_err(|_| Bad::Number("virtio-iommu-memory-region-"))?;
    Ok(Region { index, devfn, rid: None })
}

fn config(f: &mut Fields<'_>) -> Result<Event, Bad> {
    let page_sizes = f.hex("page_size_mask=0x")?;
    let input = f.range(" input range start=0x", " input range end=0x")?;
    f.dec32(" domain range start=")?;
    f.dec32(" domain range end=")?;
    f.hex(" probe_size=0x")?;
    Ok(Event::Config { page_sizes, input, bypass: f.hex(" bypass=0x")? != 0 })
}

/// Time, name and fields of a line; `None` for what is no trace line.
fn split(text: &[u8]) -> Option<(Option<u64>, &[u8], Fields<'_>)> {
    let mut rest = Fields(text);
    let mut time = None;
    if text.first()?.is_ascii_digit() {
        let mut iso = rest;
        if let Some(at) = iso_time(&mut iso) {
            rest = iso;
            time = Some(at);
        }
        let mut pid = rest;
        if let Some(at) = pid_time(&mut pid) {
            rest = pid;
            time = time.or(Some(at));
        }
        time?;
    }
    let name = rest.word();
    is_name(name).then_some((time, name, rest))
}

fn is_name(name: &[u8]) -> bool {
    name.first().is_some_and(u8::is_ascii_lowercase)
        && name.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'_')
}

/// Whether a line shows that this is a QEMU log: a name in a known family, or any event's name behind a time.
pub(crate) fn recognises(text: &[u8]) -> bool {
    let families: [&[u8]; 14] = [
        b"virtio_",
        b"vhost_",
        b"vtd_",
        b"vfio_",
        b"amdvi_",
        b"smmu",
        b"iommufd_",
        b"spapr_",
        b"riscv_iommu_",
        b"pci_",
        b"memory_region_",
        b"x86_iommu_",
        b"s390_pci_",
        b"vdpa_",
    ];
    match split(text) {
        Some((Some(_), name, _)) => name.contains(&b'_'),
        Some((None, name, _)) => families.iter().any(|family| name.starts_with(family)),
        None => false,
    }
}

/// `YYYY-MM-DDTHH:MM:SS[.FRACTION]Z ` as nanoseconds since 1970.
fn iso_time(f: &mut Fields<'_>) -> Option<u64> {
    let year = f.dec("").ok()?;
    let month = f.dec("-").ok()?;
    let day = f.dec("-").ok()?;
    let hour = f.dec("T").ok()?;
    let minute = f.dec(":").ok()?;
    let second = f.dec(":").ok()?;
    let nanos = fraction(f)?;
    f.literal("Z ").ok()?;
    if !(1970..=2500).contains(&year)
        || !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    // Years that begin in March have their leap day last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = y * 365 + y / 4 - y / 100 + y / 400 + (m * 153 + 2) / 5 + day - 1;
    let days = days.checked_sub(719_468)?;
    Some((days * DAY + hour * 3600 + minute * 60 + second) * SECOND + nanos)
}

/// `PID@SECONDS.MICROSECONDS:` as nanoseconds since 1970.
fn pid_time(f: &mut Fields<'_>) -> Option<u64> {
    f.dec("").ok()?;
    f.literal("@").ok()?;
    let time = seconds(f)?;
    f.literal(":").ok()?;
    Some(time)
}

#[cfg(test)]
mod tests {
    use viommu::mapping::Target;

    use super::*;
    use crate::input::Progress;

    fn read(text: &str) -> (Vec<Entry>, Option<Stop>, PassedOver) {
        let mut input =
            Input::new(Box::new(std::io::Cursor::new(text.as_bytes().to_vec())), Progress::default());
        let (mut reader, mut passed, mut entries) =
            (QemuReader::default(), PassedOver::default(), Vec::new());
        loop {
            match reader.next(&mut input, &mut passed) {
                Ok(Some(entry)) => entries.push(entry),
                Ok(None) => return (entries, None, passed),
                Err(stop) => return (entries, Some(stop), passed),
            }
        }
    }

    fn one(text: &str) -> Event {
        let (entries, stop, _) = read(&format!("{text}\n"));
        assert!(stop.is_none(), "{text}: {stop:?}");
        assert_eq!(entries.len(), 1, "{text}");
        entries[0].event
    }

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn every_prefix_gives_the_same_event() {
        let line = "virtio_iommu_detach domain=1 endpoint=8";
        let prefixes = [
            ("", None),
            ("2026-11-22T06:37:19.882540Z ", Some(1_795_329_439_882_540_000)),
            ("2026-11-22T06:37:19Z ", Some(1_795_329_439_000_000_000)),
            ("1234@1795329439.882540:", Some(1_795_329_439_882_540_000)),
            ("2024-02-29T00:00:00.000001Z 77@1.5:", Some(1_709_164_800_000_001_000)),
        ];
        for (prefix, time) in prefixes {
            let (entries, stop, _) = read(&format!("{prefix}{line}\n"));
            assert!(stop.is_none());
            assert_eq!(entries, [Entry { line: 1, time, event: Event::Detach { domain: 1, endpoint: 8 } }]);
        }
    }

    #[test]
    fn mappings_are_read_with_inclusive_ends_and_all_flags() {
        assert_eq!(
            one(
                "virtio_iommu_map domain=2 virt_start=0x0 virt_end=0xffffffffffffffff phys_start=0x8f58000 flags=7"
            ),
            Event::Map {
                domain: 2,
                range: IovaRange::ALL,
                gpa: Gpa(0x8f5_8000),
                access: Access::RW,
                target: Target::Mmio
            }
        );
        assert_eq!(
            one("virtio_iommu_unmap domain=-1 virt_start=0x1000 virt_end=0x1fff"),
            Event::Unmap { domain: u32::MAX, range: range(0x1000, 0x1fff) }
        );
        assert_eq!(
            one("virtio_iommu_unmap_done domain=5 virt_start=0x1000 virt_end=0x1fff added=later"),
            Event::Unmapped { domain: 5, range: range(0x1000, 0x1fff) }
        );
    }

    #[test]
    fn a_region_gets_its_requester_id_from_the_first_access_through_it() {
        let (entries, stop, _) = read(concat!(
            "virtio_iommu_notify_unmap mr=virtio-iommu-memory-region-2-16 virt_start=0x0 virt_end=0xfff\n",
            "virtio_iommu_translate mr=virtio-iommu-memory-region-2-16 rid=272 addr=0xfee00000 flag=2\n",
            "virtio_iommu_notify_unmap mr=virtio-iommu-memory-region-2-16 virt_start=0x0 virt_end=0xfff\n",
        ));
        assert!(stop.is_none());
        let endpoints: Vec<_> = entries
            .iter()
            .filter_map(|e| match e.event {
                Event::NotifyUnmap { region, .. } => Some(region.endpoint()),
                _ => None,
            })
            .collect();
        assert_eq!(endpoints, [16, 272]);
        assert_eq!(
            entries[1].event,
            Event::Access { endpoint: 272, iova: Iova(0xfee0_0000), access: Access::WRITE }
        );
    }

    #[test]
    fn the_other_events_are_read() {
        let region = Region { index: 6, devfn: 48, rid: None };
        for (line, event) in [
            ("system_reset system reset!", Event::Reset(Reset::System)),
            ("device_reset_exit reset!", Event::Reset(Reset::Device)),
            ("device_reset reset!", Event::Reset(Reset::Device)),
            ("attach domain=1 endpoint=0", Event::Attach { domain: 1, endpoint: 0, bypass: false }),
            ("detach_endpoint_from_domain domain=1 endpoint=2", Event::Detached { domain: 1, endpoint: 2 }),
            ("get_domain Alloc domain=3", Event::DomainAdded { domain: 3 }),
            ("put_domain Free domain=3", Event::DomainRemoved { domain: 3 }),
            ("get_endpoint Alloc endpoint=3", Event::EndpointAdded { endpoint: 3 }),
            ("put_endpoint Free endpoint=3", Event::EndpointRemoved { endpoint: 3 }),
            ("set_config bypass=0x0", Event::Bypass { on: false }),
            ("init_iommu_mr init virtio-iommu-memory-region-6-48", Event::RegionAdded { region }),
            (
                "translate_out 0xfffff002 -> 0x8f59002 for sid=16",
                Event::Translated { endpoint: 16, iova: Iova(0xffff_f002), gpa: Gpa(0x8f5_9002) },
            ),
            (
                "report_fault FAULT reason=2 flags=257 endpoint=16 address =0x1000",
                Event::Fault { reason: 2, flags: 257, endpoint: 16, address: Iova(0x1000) },
            ),
            (
                "fill_resv_property dev= 24, type=1 start=0xfee00000 end=0xfeefffff",
                Event::ReservedRegion {
                    endpoint: 24,
                    kind: Reserved::Msi,
                    range: range(0xfee0_0000, 0xfeef_ffff),
                },
            ),
            (
                "switch_address_space Device 01:1f.2 switching address space (iommu enabled=1)",
                Event::SwitchAddressSpace { bus: 1, devfn: 0xfa, enabled: true },
            ),
            (
                "remap mr=virtio-iommu-memory-region-6-48 virt_start=0x0 virt_end=0xfff phys_start=0x5000",
                Event::Remap { region, range: range(0, 0xfff), gpa: Gpa(0x5000) },
            ),
            (
                "notify_map mr=virtio-iommu-memory-region-6-48 virt_start=0x0 virt_end=0xfff phys_start=0x1 flags=1",
                Event::NotifyMap {
                    region,
                    range: range(0, 0xfff),
                    gpa: Gpa(1),
                    access: Access::READ,
                    target: Target::Ram,
                },
            ),
            (
                concat!(
                    "get_config page_size_mask=0xfffffffffffff000 input range start=0x0 input range end=0x7fffffffff ",
                    "domain range start=0 domain range end=4294967295 probe_size=0x200 bypass=0x1"
                ),
                Event::Config { page_sizes: !0xfff, input: range(0, 0x7f_ffff_ffff), bypass: true },
            ),
        ] {
            assert_eq!(one(&format!("virtio_iommu_{line}")), event, "{line}");
        }
    }

    #[test]
    fn malformed_lines_of_known_events_name_their_line() {
        for line in [
            "virtio_iommu_map domain=2 virt_start=0x2000 virt_end=0x1fff phys_start=0x0 flags=3",
            "virtio_iommu_map domain=2 virt_start=0x2000 virt_end=0x2fff phys_start=0x0",
            "virtio_iommu_map domain=2 virt_start=0x2000 virt_end=0x2fff phys_start=0x0 flags=8",
            "virtio_iommu_map domain=2 virt_start=0x2000 virt_end=0x2fffzz phys_start=0x0 flags=3",
            "virtio_iommu_unmap domain=x virt_start=0x2000 virt_end=0x2fff",
            "virtio_iommu_unmap domain=1 virt_start=0x20000000000000000 virt_end=0x2fff",
            "virtio_iommu_translate mr=virtio-iommu-memory-region-2-256 rid=16 addr=0x0 flag=2",
            "virtio_iommu_translate_out 0x1 -> 0x2 for sid=",
            "virtio_iommu_attach domain=1",
            "virtio_iommu_attach",
            "virtio_iommu_attach domain=1 endpoint=1junk",
            "virtio_iommu_switch_address_space Device 00:20.0 switching address space (iommu enabled=1)",
            "virtio_iommu_get_config page_size_mask=0x bypass=0x1",
        ] {
            let (entries, stop, _) =
                read(&format!("chatter\nvirtio_iommu_system_reset system reset!\n{line}\n"));
            assert_eq!(entries.len(), 1, "{line}");
            assert!(matches!(stop, Some(Stop::Corrupt(crate::Place::Line(3), _))), "{line}: {stop:?}");
        }
    }

    #[test]
    fn other_lines_are_passed_over_and_counted() {
        let (entries, stop, passed) = read(concat!(
            "qemu-system-x86_64: warning: something\n",
            "\n",
            "2026-11-22T06:37:19.882540Z qemu-system-x86_64: error\n",
            "2026-11-22T06:37:19.882540Z virtio_iommu_freeze_granule granule set to 0x1000\n",
            "vtd_context_cache_reset \n",
            "vtd_context_cache_reset\n",
            "virtio_iommu_get_config page_size_mask=0x1000 start=0x0 end=0xfff domain_range=32 probe_size=0x200\n",
        ));
        assert!(entries.is_empty() && stop.is_none());
        assert_eq!(passed.total(), 7);
        assert_eq!(passed.chatter(), 3);
        assert_eq!(passed.names()[0], ("vtd_context_cache_reset".to_owned(), 2));
    }

    #[test]
    fn logs_are_told_from_other_text() {
        assert!(recognises(b"virtio_iommu_device_status driver status = 0"));
        assert!(recognises(b"2026-11-22T06:37:19.882540Z some_other_event"));
        assert!(recognises(b"1@2.000003:kvm_run_exit cpu_index 0"));
        assert!(!recognises(b"hello world"));
        assert!(!recognises(b"some_word in a text"));
        assert!(!recognises(b"2026-11-22T06:37:19.882540Z hello"));
        assert!(!recognises(b"2026-11-22 06:37 vtd_x"));
    }
}
