//! The limit: a plain table of four levels with 512 entries each, as a page-table walker has it, without a lock, checks
//! or any memory of where mappings begin. Nobody can do better with a tree, and nobody could use it so.

use std::time::Duration;

use crate::load::PAGE;
use crate::table::Table;

type Level<T> = [Option<Box<T>>; 512];

struct Node<T>(Level<T>);

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| None))
    }
}

struct Page([u64; 512]);

impl Default for Page {
    fn default() -> Self {
        Self([0; 512])
    }
}

#[derive(Default)]
pub(crate) struct Radix(Box<Node<Node<Node<Page>>>>);

#[inline(always)]
fn slot(iova: u64, level: u32) -> usize {
    ((iova >> (12 + 9 * level)) & 511) as usize
}

impl Radix {
    #[inline(always)]
    fn page(&self, iova: u64) -> Option<&Page> {
        let third = self.0.0[slot(iova, 3)].as_deref()?;
        let second = third.0[slot(iova, 2)].as_deref()?;
        second.0[slot(iova, 1)].as_deref()
    }

    #[inline(always)]
    fn page_mut(&mut self, iova: u64) -> &mut Page {
        let third = self.0.0[slot(iova, 3)].get_or_insert_default();
        let second = third.0[slot(iova, 2)].get_or_insert_default();
        second.0[slot(iova, 1)].get_or_insert_default()
    }
}

impl Table for Radix {
    fn new() -> anyhow::Result<Self> {
        Ok(Self::default())
    }

    fn map(&mut self, iova: u64, bytes: u64, gpa: u64) -> bool {
        for offset in (0..bytes).step_by(4096) {
            let at = iova + offset;
            self.page_mut(at).0[slot(at, 0)] = (gpa + offset) | 1;
        }
        true
    }

    fn unmap(&mut self, iova: u64, bytes: u64) {
        for offset in (0..bytes).step_by(4096) {
            let at = iova + offset;
            self.page_mut(at).0[slot(at, 0)] = 0;
        }
    }

    #[inline]
    fn translate(&mut self, iova: u64) -> Option<u64> {
        let entry = self.page(iova)?.0[slot(iova, 0)];
        (entry & 1 != 0).then_some((entry & !(PAGE - 1)) | (iova & (PAGE - 1)))
    }

    /// It does not know where mappings begin.
    fn replay(&mut self) -> Option<(Duration, u64)> {
        None
    }
}
