//! What happened at a device.

/// Counted since the cache was made. Nothing is ever reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counts {
    /// MISS messages read.
    pub misses: u64,
    /// UPDATE messages that the device took.
    pub updates: u64,
    /// INVALIDATE messages that the device took.
    pub invalidations: u64,
    /// Removals for which nothing was written, since nothing of them was ever told to the device.
    pub unheard: u64,
    /// Misses without an answer: the record has nothing for such an access. The device's ring waits.
    pub denied: u64,
    /// Misses without an answer: the record has something, and this process no memory for it.
    pub no_memory: u64,
    /// ACCESS_FAIL messages read.
    pub access_fails: u64,
    /// Messages read that say nothing: of another version, address space, kind or permission.
    pub odd: u64,
    /// Entries dropped to keep within [`Device::entries`](super::Device::entries).
    pub evicted: u64,
    /// Entries dropped since a new one lies over them.
    pub displaced: u64,
    /// Times that a message had to wait.
    pub stalls: u64,
    /// Messages that the device refused.
    pub refused: u64,
}
