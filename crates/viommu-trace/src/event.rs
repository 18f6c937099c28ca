//! What a history says: one [`Event`] after another, each in an [`Entry`] with its place and time.

use core::fmt;

use viommu::addr::{Gpa, Iova, IovaRange};
use viommu::mapping::{Access, Target};

/// One event with its place in the source and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Line of the uncompressed source, first is 1. In viommu's own format: the line of the original source where
    /// the file keeps it, else the number of the record.
    pub line: u64,
    /// Nanoseconds on the source's own clock (QEMU: since 1970, Linux: the trace clock); `None` where the source
    /// gives no time.
    pub time: Option<u64>,
    /// What happened.
    pub event: Event,
}

/// One thing that happened to an IOMMU.
///
/// Ranges are inclusive at both ends. Endpoints are requester ids (`bus << 8 | device << 3 | function`) where the
/// source knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Everything the guest had set up is gone.
    Reset(Reset),
    /// The guest asks for an endpoint to be in a domain.
    Attach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
        /// The domain is an identity domain. QEMU's log does not say so: always `false` there.
        bypass: bool,
    },
    /// The guest asks for an endpoint to leave a domain.
    Detach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
    },
    /// An endpoint left its domain, for whatever reason: a detach, another attach, a reset.
    Detached {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
    },
    /// The guest mapped a range.
    Map {
        /// The domain.
        domain: u32,
        /// Where devices see it.
        range: IovaRange,
        /// What the first byte of `range` translates to. The recorded target may pass 2^64-1.
        gpa: Gpa,
        /// What devices may do there.
        access: Access,
        /// Memory or device registers.
        target: Target,
    },
    /// The guest asks for a range to be unmapped.
    Unmap {
        /// The domain.
        domain: u32,
        /// What is to go; it need not be mapped.
        range: IovaRange,
    },
    /// An unmap removed one mapping.
    Unmapped {
        /// The domain.
        domain: u32,
        /// The mapping that is gone.
        range: IovaRange,
    },
    /// A device accesses memory: the question.
    Access {
        /// The endpoint.
        endpoint: u32,
        /// Where.
        iova: Iova,
        /// How; empty for a question about all rights.
        access: Access,
    },
    /// A device accesses memory: the answer. There is none for a fault or where the address was not translated.
    Translated {
        /// The endpoint.
        endpoint: u32,
        /// Where.
        iova: Iova,
        /// What it translates to.
        gpa: Gpa,
    },
    /// The recorded VMM told its subscribers of a mapping.
    NotifyMap {
        /// The device's region.
        region: Region,
        /// Where the device sees it.
        range: IovaRange,
        /// What the first byte of `range` translates to.
        gpa: Gpa,
        /// What the device may do there.
        access: Access,
        /// Memory or device registers.
        target: Target,
    },
    /// The recorded VMM told its subscribers that a range is gone.
    NotifyUnmap {
        /// The device's region.
        region: Region,
        /// What is gone.
        range: IovaRange,
    },
    /// The recorded VMM told a new subscriber of a mapping that was there (replay).
    Remap {
        /// The device's region.
        region: Region,
        /// Where the device sees it.
        range: IovaRange,
        /// What the first byte of `range` translates to.
        gpa: Gpa,
    },
    /// A device's accesses start or stop going through the IOMMU.
    SwitchAddressSpace {
        /// The bus, as numbered at that moment: 0 before the guest numbered its buses.
        bus: u8,
        /// Device and function.
        devfn: u8,
        /// Whether they go through the IOMMU from here on.
        enabled: bool,
    },
    /// A fault was reported to the guest.
    Fault {
        /// virtio-iommu's reason: 0 unknown, 1 no domain, 2 no mapping.
        reason: u32,
        /// virtio-iommu's fault flags: 1 read, 2 write, 4 execute, 256 the address is valid.
        flags: u32,
        /// The endpoint.
        endpoint: u32,
        /// Where.
        address: Iova,
    },
    /// Endpoints without a domain pass untranslated, or stop to.
    Bypass {
        /// Whether they pass.
        on: bool,
    },
    /// The device's configuration as the guest read it.
    Config {
        /// One bit for each page size.
        page_sizes: u64,
        /// What can be mapped.
        input: IovaRange,
        /// Endpoints without a domain pass untranslated.
        bypass: bool,
    },
    /// An endpoint's range that no mapping governs.
    ReservedRegion {
        /// The endpoint.
        endpoint: u32,
        /// What for.
        kind: Reserved,
        /// Where.
        range: IovaRange,
    },
    /// A device's region came into being.
    RegionAdded {
        /// The region.
        region: Region,
    },
    /// A domain came into being.
    DomainAdded {
        /// The domain.
        domain: u32,
    },
    /// A domain is gone with all its mappings.
    DomainRemoved {
        /// The domain.
        domain: u32,
    },
    /// An endpoint became known to the IOMMU.
    EndpointAdded {
        /// The endpoint.
        endpoint: u32,
    },
    /// An endpoint is gone.
    EndpointRemoved {
        /// The endpoint.
        endpoint: u32,
    },
    /// A remark, such as the start of a workload.
    Mark(Label),
}

/// What was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reset {
    /// The IOMMU device, by its driver or by a system reset.
    Device,
    /// The whole machine.
    System,
}

/// Why a range is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reserved {
    /// Not to be used.
    Reserved,
    /// Writes are message-signalled interrupts and pass untranslated.
    Msi,
}

/// QEMU's name for one device's IOMMU memory region, `virtio-iommu-memory-region-INDEX-DEVFN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Which region: numbers in order of creation, *not* the bus.
    pub index: u32,
    /// Device and function.
    pub devfn: u8,
    /// The requester id, once an access through the region has named it.
    pub rid: Option<u16>,
}

impl Region {
    /// The endpoint: the requester id where it is known, else device and function on bus 0.
    #[must_use]
    pub fn endpoint(self) -> u32 {
        self.rid.map_or_else(|| u32::from(self.devfn), u32::from)
    }
}

/// Up to 31 bytes of text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Label {
    len: u8,
    bytes: [u8; Label::MAX],
}

impl Label {
    /// The most bytes that a label holds.
    pub const MAX: usize = 31;

    /// The first [`Label::MAX`] bytes of `text`, cut between characters.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut bytes = [0; Self::MAX];
        let mut len = 0;
        for c in text.chars() {
            let end = len + c.len_utf8();
            let Some(slot) = bytes.get_mut(len..end) else { break };
            c.encode_utf8(slot);
            len = end;
        }
        Self { len: u8::try_from(len).unwrap_or(0), bytes }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.bytes.get(..usize::from(self.len)).and_then(|b| core::str::from_utf8(b).ok()).unwrap_or("")
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// virtio-iommu's map flags: bit 0 read, bit 1 write, bit 2 MMIO.
pub(crate) const MAP_FLAGS: u32 = 7;

/// Access and target from virtio-iommu's map flags; `None` for a flag that is not defined.
pub(crate) fn from_map_flags(flags: u32) -> Option<(Access, Target)> {
    if flags & !MAP_FLAGS != 0 {
        return None;
    }
    let access = Access::from_bits(u8::try_from(flags & 3).ok()?)?;
    Some((access, if flags & 4 == 0 { Target::Ram } else { Target::Mmio }))
}

/// The opposite of [`from_map_flags`].
pub(crate) fn to_map_flags(access: Access, target: Target) -> u8 {
    access.bits() | if target == Target::Mmio { 4 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_label_is_cut_between_characters() {
        let text = format!("{}\u{20ac}", "x".repeat(30));
        assert_eq!(Label::new(&text).as_str(), "x".repeat(30));
        assert_eq!(Label::new("wl: mount").as_str(), "wl: mount");
        assert_eq!(Label::new("").as_str(), "");
    }

    #[test]
    fn an_undefined_map_flag_is_refused() {
        assert_eq!(from_map_flags(8), None);
        for flags in 0..8 {
            let (access, target) = from_map_flags(flags).unwrap();
            assert_eq!(u32::from(to_map_flags(access, target)), flags);
        }
    }

    #[test]
    fn an_entry_stays_within_two_cache_lines() {
        assert!(size_of::<Entry>() <= 72, "{}", size_of::<Entry>());
    }
}
