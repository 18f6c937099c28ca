//! The fuzzer's bytes, as numbers.

use crate::memory::PAGE;

/// Bytes to take from.
pub(super) struct Input<'d>(pub(super) &'d [u8]);

impl Input<'_> {
    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub(super) fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(super) fn bytes(&mut self, count: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A number that is small, or at one of the ends that matter.
    pub(super) fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..0xe0 => u64::from(small),
            0xe0..0xf0 => u64::from(self.word()),
            0xf0 => u64::MAX,
            0xf1 => 1 << 63,
            0xf2 => u64::from(u32::MAX),
            0xf3 => 1 << 32,
            0xf4 => 1 << 20,
            _ => u64::MAX - u64::from(self.byte()),
        }
    }

    pub(super) fn small(&mut self) -> u32 {
        u32::try_from(self.number() & 0xffff_ffff).expect("32 bits")
    }

    /// An address or a size in pages; rarely one that is not whole.
    pub(super) fn pages(&mut self) -> u64 {
        let odd = u64::from(self.byte()).saturating_sub(0xf8);
        self.number().wrapping_mul(PAGE).wrapping_add(odd)
    }
}
