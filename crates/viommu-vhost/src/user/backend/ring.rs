//! What a batch of a split ring reaches.

use core::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::memory::{DeviceGuard, DeviceMemory};
use super::misses::MissError;

const INDIRECT: u16 = 4;
const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// A descriptor (VIRTIO 1.2, 2.7.5).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Descriptor {
    address: U64,
    len: U32,
    flags: U16,
    next: U16,
}

const DESCRIPTOR: u64 = 16;
const _: () = assert!(size_of::<Descriptor>() == 16);

/// A split ring, as SET_VRING_NUM, SET_VRING_ADDR and the device's progress say.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring.
    pub used: GuestAddress,
    /// Descriptors: a power of two.
    pub size: u16,
    /// The next entry of the available ring that the device takes.
    pub next: u16,
}

impl DeviceMemory {
    /// Has in the IOTLB all that a batch of at most `chains` chains of `ring` reaches: the ring, indirect tables, buffers.
    /// What the driver has written wrongly is left for the device to find. As [`DeviceMemory::prepare`] otherwise.
    ///
    /// # Errors
    /// As [`DeviceMemory::prepare`]: the front end has not given all that the chains say they reach.
    pub fn prepare_ring(&self, ring: &Ring, chains: u16) -> Result<(), MissError> {
        self.prepare(|memory| {
            // Whatever cannot be read has been noted as missed, or is an error that the device meets as well.
            let _seen = look(memory, ring, chains);
        })
    }
}

fn look(memory: &DeviceGuard, ring: &Ring, chains: u16) -> Option<()> {
    let size = u64::from(ring.size);
    let has = |at: GuestAddress, bytes: u64, access| {
        usize::try_from(bytes).is_ok_and(|bytes| memory.check_range(at, bytes, access))
    };
    // With the two bytes of EVENT_IDX, which lie in the same pages where they are not used.
    let rings = [
        has(ring.descriptors, size.checked_mul(DESCRIPTOR)?, Permissions::Read),
        has(ring.available, size.checked_mul(2)?.checked_add(6)?, Permissions::Read),
        has(ring.used, size.checked_mul(8)?.checked_add(6)?, Permissions::Write),
        has(ring.used, 4, Permissions::Read),
    ];
    if rings.contains(&false) {
        return None;
    }
    let index: u16 = memory.load(offset(ring.available, 2)?, Ordering::Acquire).ok()?;
    let there = u16::from_le(index).wrapping_sub(ring.next).min(ring.size).min(chains);
    for at in 0..there {
        let slot = u64::from(ring.next.wrapping_add(at)).checked_rem(size)?;
        let head: u16 =
            memory.read_obj(offset(ring.available, slot.checked_mul(2)?.checked_add(4)?)?).ok()?;
        // A chain that cannot be read to its end hides no other.
        let _seen = chain(memory, ring.descriptors, ring.size, u16::from_le(head), &has, true);
    }
    Some(())
}

fn chain(
    memory: &DeviceGuard,
    table: GuestAddress,
    size: u16,
    head: u16,
    has: &impl Fn(GuestAddress, u64, Permissions) -> bool,
    outer: bool,
) -> Option<()> {
    let mut at = head;
    for _ in 0..size {
        if at >= size {
            return None;
        }
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, offset(table, u64::from(at).checked_mul(DESCRIPTOR)?)?).ok()?;
        let descriptor = Descriptor::read_from_bytes(&bytes).ok()?;
        let (address, len) = (GuestAddress(descriptor.address.get()), descriptor.len.get());
        let flags = descriptor.flags.get();
        if flags & INDIRECT != 0 {
            let inner = u16::try_from(u64::from(len).checked_div(DESCRIPTOR)?).ok()?;
            if outer && has(address, u64::from(len), Permissions::Read) {
                let _seen = chain(memory, address, inner, 0, has, false);
            }
            return Some(()); // nothing follows it
        }
        let access = if flags & WRITE != 0 { Permissions::Write } else { Permissions::Read };
        let _noted = has(address, u64::from(len), access);
        if flags & NEXT == 0 {
            return Some(());
        }
        at = descriptor.next.get();
    }
    None
}

fn offset(at: GuestAddress, bytes: u64) -> Option<GuestAddress> {
    at.0.checked_add(bytes).map(GuestAddress)
}
