//! One mapping: a linear piece of a domain.

use crate::addr::{Gpa, Iova, IovaRange};

bitflags::bitflags! {
    /// What a device may do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
    pub struct Access: u8 {
        /// The device may read.
        const READ = 1;
        /// The device may write.
        const WRITE = 2;
        /// The device may read and write.
        const RW = 3;
    }
}

/// What lies behind a mapping, as the guest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Target {
    /// Memory.
    #[default]
    Ram,
    /// Device registers (virtio-iommu's MMIO flag): another device's BAR, a doorbell.
    Mmio,
}

/// One extent of a domain: an inclusive IOVA range, linear inside.
///
/// A mapping without access occupies its range and means "not mapped" to every consumer. Its boundaries are
/// remembered: two neighbours that happen to be linear stay two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Mapping {
    /// Where the device sees it.
    pub range: IovaRange,
    /// What the first byte of `range` translates to.
    pub gpa: Gpa,
    /// What the device may do there.
    pub access: Access,
    /// Memory or device registers.
    pub target: Target,
}

impl Mapping {
    /// `bytes` bytes of memory from `iova` on at `gpa`; `None` for no bytes, or where either side would pass 2^64-1.
    #[must_use]
    pub fn new(iova: Iova, bytes: u64, gpa: Gpa, access: Access) -> Option<Self> {
        let range = IovaRange::from_len(iova, bytes)?;
        Self::over(range, gpa, access)
    }

    /// All of `range` at `gpa`, as memory; `None` where the target would pass 2^64-1.
    #[must_use]
    pub fn over(range: IovaRange, gpa: Gpa, access: Access) -> Option<Self> {
        gpa.checked_add(range.last().0 - range.start().0)?;
        Some(Self { range, gpa, access, target: Target::Ram })
    }

    /// The same, aimed at device registers.
    #[must_use]
    pub fn mmio(self) -> Self {
        Self { target: Target::Mmio, ..self }
    }

    /// The target of `iova`, which must lie inside.
    #[inline]
    #[must_use]
    pub fn translate(&self, iova: Iova) -> Gpa {
        debug_assert!(self.range.contains(iova));
        Gpa(self.gpa.0.wrapping_add(iova.0.wrapping_sub(self.range.start().0)))
    }

    /// The part inside `window`: the target moves with the start. `None` when nothing is left.
    #[inline]
    #[must_use]
    pub fn clip(&self, window: IovaRange) -> Option<Self> {
        let range = self.range.intersect(window)?;
        Some(Self { range, gpa: self.translate(range.start()), ..*self })
    }

    /// The last byte of the target.
    #[inline]
    #[must_use]
    pub fn gpa_last(&self) -> Gpa {
        self.translate(self.range.last())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clip_moves_the_target_with_the_start() {
        let m = Mapping::new(Iova(0x1000), 0x3000, Gpa(0x9000), Access::RW).unwrap();
        let c = m.clip(IovaRange::new(Iova(0x2000), Iova(u64::MAX)).unwrap()).unwrap();
        assert_eq!(c.range, IovaRange::new(Iova(0x2000), Iova(0x3fff)).unwrap());
        assert_eq!(c.gpa, Gpa(0xa000));
        assert_eq!(m.clip(IovaRange::new(Iova(0x4000), Iova(0x4fff)).unwrap()), None);
    }

    #[test]
    fn a_target_past_the_end_is_refused() {
        assert_eq!(Mapping::new(Iova(0), 0x2000, Gpa(u64::MAX - 0xfff), Access::READ), None);
        assert!(Mapping::over(IovaRange::ALL, Gpa(0), Access::RW).is_some());
        assert!(Mapping::over(IovaRange::ALL, Gpa(1), Access::RW).is_none());
    }
}
