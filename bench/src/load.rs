//! What is mapped and asked for: the same for every structure.

/// Bytes of the smallest page.
pub(crate) const PAGE: u64 = 4096;
/// The first address that is mapped.
const FIRST: u64 = 1 << 32;
/// Guest memory: below the hole for devices, and above it.
pub(crate) const LOW_RAM: (u64, u64) = (0, 3 << 30);
pub(crate) const HIGH_RAM: (u64, u64) = (4 << 30, 80 << 30);

/// A small generator of its own, so that it costs the same everywhere: about a nanosecond.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    #[inline(always)]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The address of a random one of `count` (a power of two) adjacent pages.
    #[inline(always)]
    pub(crate) fn page(&mut self, count: u64) -> u64 {
        iova((self.next() >> 20) & (count - 1))
    }

    /// An address inside one of `count` (a power of two) adjacent pages.
    #[inline(always)]
    pub(crate) fn address(&mut self, count: u64) -> u64 {
        let random = self.next();
        iova((random >> 20) & (count - 1)) + (random & 0xfc0)
    }
}

/// The address of page `index`.
#[inline(always)]
pub(crate) fn iova(index: u64) -> u64 {
    FIRST + index * PAGE
}

/// Where page `index` of `count` (a power of two) lies in guest memory: scattered, so that no two mappings merge.
#[inline(always)]
pub(crate) fn gpa(index: u64, count: u64) -> u64 {
    HIGH_RAM.0 + ((index.wrapping_mul(0x9e37_79b1).wrapping_add(77) & (count - 1)) * PAGE)
}

/// `0..count` (a power of two) in an order that is not sorted, each once.
pub(crate) fn shuffled(count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |k| k.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(0x1234) & (count - 1))
}

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Effort {
    /// As the goals are stated.
    Full,
    /// Fewer rounds, and the large tables are smaller.
    Quick,
    /// Hardly anything: that every goal gives a row.
    Smoke,
}

impl Effort {
    fn pick<T>(self, full: T, quick: T, smoke: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
            Self::Smoke => smoke,
        }
    }

    /// Mappings of the table that is called 64k.
    pub(crate) fn small(self) -> u64 {
        self.pick(1 << 16, 1 << 16, 1 << 9)
    }

    /// Mappings of the table that is called 1M.
    pub(crate) fn big(self) -> u64 {
        self.pick(1 << 20, 1 << 18, 1 << 10)
    }

    /// How often all that is short is measured, each time in other seconds.
    pub(crate) fn passes(self) -> usize {
        self.pick(2, 1, 1)
    }

    /// Rounds of a figure of one thread.
    pub(crate) fn rounds(self) -> usize {
        self.pick(7, 3, 1)
    }

    /// Rounds of a figure for which the table is made anew.
    pub(crate) fn rebuilds(self) -> usize {
        self.pick(3, 2, 1)
    }

    /// Lookups in a round.
    pub(crate) fn lookups(self) -> u64 {
        self.pick(1 << 20, 1 << 18, 1 << 8)
    }

    /// Milliseconds of a round that counts what it can do.
    pub(crate) fn budget(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.pick(60, 20, 1))
    }

    /// Milliseconds of a round of two threads.
    pub(crate) fn contended(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.pick(500, 100, 10))
    }

    /// Pairs at fresh random addresses.
    pub(crate) fn fresh_pairs(self) -> u64 {
        self.pick(20_000_000, 1_000_000, 4_000)
    }

    /// Mappings of a sparse table.
    pub(crate) fn sparse(self) -> u64 {
        self.pick(1 << 16, 1 << 15, 1 << 9)
    }

    /// Domains made to see what one takes.
    pub(crate) fn domains(self) -> u32 {
        self.pick(4096, 1024, 64)
    }
}
