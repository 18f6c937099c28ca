//! What is written to a disk under test: every sector tells which write it is of, and where to.

/// Bytes of one write.
pub const BLOCK: usize = 4096;

/// Bytes that a disk writes as a whole or not at all.
pub const SECTOR: usize = 512;

/// Writes that follow from a seed: where the first goes, the second, and so on.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    seed: u64,
    blocks: u64,
}

impl Pattern {
    /// Writes to the first `blocks` blocks, of which there must be one.
    ///
    /// # Panics
    ///
    /// If `blocks` is zero.
    #[must_use]
    pub fn new(seed: u64, blocks: u64) -> Pattern {
        assert!(blocks > 0, "no block to write to");
        Pattern { seed, blocks }
    }

    /// How many blocks are written to.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The block that write number `write` goes to; the first is number 1.
    #[must_use]
    pub fn block_of(&self, write: u64) -> u64 {
        mixed(self.seed ^ mixed(write)) % self.blocks
    }

    /// Fills a block with what write number `write` writes.
    pub fn fill(&self, block: &mut [u8], write: u64) {
        let number = self.block_of(write);
        for (index, sector) in block.chunks_exact_mut(SECTOR).enumerate() {
            let mut state = self.key(number, index) ^ write;
            for (word, bytes) in sector.chunks_exact_mut(8).enumerate() {
                let value = if word == 0 {
                    write
                } else {
                    state = mixed(state);
                    state
                };
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// The write that a sector of a block is of: zero, if it was never written; none, if it is of no write to there.
    #[must_use]
    pub fn write_of(&self, block: u64, index: usize, sector: &[u8]) -> Option<u64> {
        if sector.iter().all(|byte| *byte == 0) {
            return Some(0);
        }
        let (first, rest) = sector.split_first_chunk::<8>()?;
        let write = u64::from_le_bytes(*first);
        let mut state = self.key(block, index) ^ write;
        let whole = rest.chunks_exact(8).all(|bytes| {
            state = mixed(state);
            bytes == state.to_le_bytes()
        });
        (whole && write != 0 && self.block_of(write) == block).then_some(write)
    }

    fn key(&self, block: u64, index: usize) -> u64 {
        mixed(self.seed ^ mixed(block.wrapping_mul(8).wrapping_add(index as u64)))
    }
}

/// The finalizer of SplitMix64: each bit of the result depends on all of the input.
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_of_knows_what_fill_wrote_and_nothing_else() {
        let pattern = Pattern::new(7, 100);
        let mut block = vec![0; BLOCK];
        pattern.fill(&mut block, 5);
        let number = pattern.block_of(5);
        for (index, sector) in block.chunks_exact(SECTOR).enumerate() {
            assert_eq!(pattern.write_of(number, index, sector), Some(5));
            assert_eq!(pattern.write_of(number, index ^ 1, sector), None, "another sector's");
            assert_eq!(pattern.write_of(number + 1, index, sector), None, "another block's");
            assert_eq!(Pattern::new(8, 100).write_of(number, index, sector), None, "another disk's");
        }
        block[SECTOR + 100] ^= 1;
        assert_eq!(pattern.write_of(number, 1, &block[SECTOR..2 * SECTOR]), None);
        assert_eq!(pattern.write_of(number, 0, &[0; SECTOR]), Some(0));
    }

    #[test]
    fn block_of_stays_below_the_number_of_blocks() {
        let pattern = Pattern::new(1, 3);
        assert!((1..1000).all(|write| pattern.block_of(write) < 3));
        assert!((0..3).all(|block| (1..1000).any(|write| pattern.block_of(write) == block)));
    }
}
