//! The structures that we are measured beside.
//!
//! Two are the crates themselves. The others are modelled: the same containers, locks and steps, written anew. What a
//! model leaves out (tracing, address space dispatch, reserved regions) makes it faster than the original.

mod crosvm;
mod glib;
mod list;
mod qemu;
mod radix;
mod rangemap;
mod vm_memory;

pub(crate) use crosvm::Crosvm;
pub(crate) use list::List;
pub(crate) use qemu::Qemu;
pub(crate) use radix::Radix;
pub(crate) use rangemap::Ranges;
pub(crate) use vm_memory::VmMemory;

use std::time::Duration;

use crate::clock::Cpu;

/// Times a walk over all mappings that hands each to `see`.
fn walk(walk: impl FnOnce(&mut dyn FnMut(u64, u64, u64))) -> (Duration, u64) {
    let (mut count, mut sum) = (0u64, 0u64);
    let start = Cpu::start();
    walk(&mut |iova, bytes, gpa| {
        count += 1;
        sum = sum.wrapping_add(iova ^ bytes ^ gpa);
    });
    let time = start.elapsed();
    std::hint::black_box(sum);
    (time, count)
}
