//! Stock virtio queues: rings and buffers at I/O virtual addresses.

use std::io::{Read, Write};
use std::ops::Deref;

use viommu::Access;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory};

use crate::{Memory, Rig};

const RINGS: u64 = 0x8000_0000;
const AVAIL: u64 = 0x800;
const USED: u64 = 0x900;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The guest's side of the queue: by guest physical address, as a driver sees it.
struct Driver<'m> {
    memory: &'m Memory,
    rings: u64,
    posted: u16,
}

impl Driver<'_> {
    fn descriptor(&self, table: u64, index: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let at = table + 16 * index;
        self.memory.write_obj(addr, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn post(&mut self, chain: &[(u64, u32, u16)]) {
        for (index, (addr, len, flags)) in (0u16..).zip(chain) {
            let more = usize::from(index) + 1 < chain.len();
            let flags = if more { flags | NEXT } else { *flags };
            self.descriptor(self.rings, index.into(), (*addr, *len, flags, index + 1));
        }
        let slot = self.rings + AVAIL + 4 + 2 * u64::from(self.posted % 16);
        self.memory.write_obj(0u16, GuestAddress(slot)).unwrap();
        self.posted += 1;
        self.memory.write_obj(self.posted, GuestAddress(self.rings + AVAIL + 2)).unwrap();
    }

    fn used(&self) -> (u16, u32, u32) {
        let at = |offset| GuestAddress(self.rings + USED + offset);
        let index: u16 = self.memory.read_obj(at(2)).unwrap();
        let slot = 4 + 8 * u64::from(index.wrapping_sub(1) % 16);
        (index, self.memory.read_obj(at(slot)).unwrap(), self.memory.read_obj(at(slot + 4)).unwrap())
    }
}

fn queue() -> Queue {
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_desc_table_address(GuestAddress(RINGS)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(RINGS + AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(RINGS + USED)).unwrap();
    queue.set_ready(true);
    queue
}

/// Rings in one page; a read-only buffer over two pages that lie apart; a writable one likewise, the wrong way round.
fn rig() -> Rig {
    let rig = Rig::new();
    rig.map(RINGS, 1, 0x3000, Access::RW);
    rig.map(0x10_0000, 1, 0x7000, Access::READ);
    rig.map(0x10_1000, 1, 0x1_4000, Access::READ);
    rig.map(0x20_0000, 1, 0x9000, Access::RW);
    rig.map(0x20_1000, 1, 0x5000, Access::WRITE);
    rig
}

fn driver(rig: &Rig) -> Driver<'_> {
    Driver { memory: &rig.memory, rings: 0x3000, posted: 0 }
}

/// A device that sends back what it was sent, upper case; `None`: the chain cannot be used.
fn echo<M>(queue: &mut Queue, memory: M) -> Option<usize>
where
    M: Deref + Clone,
    M::Target: GuestMemory + Sized,
{
    let chain = queue.iter(memory.clone()).unwrap().next()?;
    let head = chain.head_index();
    let mut text = Vec::new();
    chain.clone().reader(&*memory).ok()?.read_to_end(&mut text).unwrap();
    text.make_ascii_uppercase();
    let mut writer = chain.writer(&*memory).ok()?;
    writer.write_all(&text).unwrap();
    queue.add_used(&*memory, head, u32::try_from(text.len()).unwrap()).unwrap();
    Some(text.len())
}

#[test]
fn chain_with_buffers_over_several_mappings_works_over_a_guard() {
    let rig = rig();
    rig.memory.write_slice(b"spans tw", GuestAddress(0x7ff8)).unwrap();
    rig.memory.write_slice(b"o mappings", GuestAddress(0x1_4000)).unwrap();
    let mut driver = driver(&rig);
    driver.post(&[(0x10_0ff8, 18, 0), (0x20_0ffc, 32, WRITE)]);
    let (mut queue, mut worker) = (queue(), rig.worker());
    let guard = worker.enter();
    assert!(queue.is_valid(&guard));
    assert_eq!(echo(&mut queue, &guard), Some(18));
    let mut text = [0; 18];
    rig.memory.read_slice(&mut text[..4], GuestAddress(0x9ffc)).unwrap();
    rig.memory.read_slice(&mut text[4..], GuestAddress(0x5000)).unwrap();
    assert_eq!(&text, b"SPANS TWO MAPPINGS");
    assert_eq!(driver.used(), (1, 0, 18));
}

#[test]
fn chain_from_an_indirect_table_works_over_a_shared_guard() {
    let rig = rig();
    rig.memory.write_slice(b"indirect", GuestAddress(0x7000)).unwrap();
    let mut driver = driver(&rig);
    // The table crosses the border of two mappings, which lie apart.
    driver.descriptor(0x7ff0, 0, (0x10_0000, 8, NEXT, 1));
    driver.descriptor(0x1_4000, 0, (0x20_0000, 8, WRITE, 0));
    driver.post(&[(0x10_0ff0, 32, INDIRECT)]);
    assert_eq!(echo(&mut queue(), rig.space().memory()), Some(8));
    let mut text = [0; 8];
    rig.memory.read_slice(&mut text, GuestAddress(0x9000)).unwrap();
    assert_eq!(&text, b"INDIRECT");
    assert_eq!(driver.used(), (1, 0, 8));
}

#[test]
fn chain_whose_second_buffer_is_not_permitted_is_refused_and_writes_nothing() {
    let rig = rig();
    rig.memory.write_slice(b"abcdefgh", GuestAddress(0x7000)).unwrap();
    let (mut queue, space) = (queue(), rig.space());
    let mut driver = driver(&rig);
    // Writing to what is read-only, behind what is writable.
    driver.post(&[(0x10_0000, 8, 0), (0x20_0000, 4, WRITE), (0x10_0100, 4, WRITE)]);
    assert_eq!(echo(&mut queue, space.memory()), None);
    // Reading what is write-only, behind what is readable.
    driver.post(&[(0x10_0000, 4, 0), (0x20_1000, 4, 0), (0x20_0000, 8, WRITE)]);
    assert_eq!(echo(&mut queue, space.memory()), None);
    // One buffer whose tail lies over the end of what is mapped.
    driver.post(&[(0x10_0000, 8, 0), (0x20_1ff0, 0x20, WRITE)]);
    assert_eq!(echo(&mut queue, space.memory()), None);
    assert_eq!(rig.memory.read_obj::<u64>(GuestAddress(0x9000)).unwrap(), 0);
    assert_eq!(rig.memory.read_obj::<u64>(GuestAddress(0x5ff0)).unwrap(), 0);
    assert_eq!(driver.used().0, 0);
    // The device is none the worse for it.
    driver.post(&[(0x10_0000, 8, 0), (0x20_0000, 8, WRITE)]);
    assert_eq!(echo(&mut queue, space.memory()), Some(8));
}

#[test]
fn ring_that_is_unmapped_under_a_guard_is_gone_and_the_unmap_waits_for_the_last_chain() {
    let rig = rig();
    let mut driver = driver(&rig);
    driver.post(&[(0x10_0000, 8, 0), (0x20_0000, 8, WRITE)]);
    let (mut queue, space) = (queue(), rig.space());
    let memory = space.memory();
    let chain = queue.iter(memory.clone()).unwrap().next().unwrap();
    let mut writer = chain.clone().writer(&*memory).unwrap();

    let rings = rig.domain.next_mapping(viommu::Iova(RINGS)).unwrap();
    let buffers = rig.domain.next_mapping(viommu::Iova(0x20_0000)).unwrap();
    let mut done = rig.domain.unmap(rings.range).unwrap();
    done.merge(rig.domain.unmap(buffers.range).unwrap());
    assert!(!done.is_complete());
    // What it translated before it may still use; nothing new is translated.
    writer.write_all(&[7; 8]).unwrap();
    assert!(queue.add_used(&*memory, 0, 8).is_err());
    assert!(!queue.is_valid(&*memory));
    assert_eq!(driver.used().0, 0);
    drop(writer);
    drop(memory);
    assert!(!done.is_complete(), "the chain still has a clone of the guard");
    assert_eq!(done.blockers()[0].label, "space");
    drop(chain);
    done.wait().unwrap();
    assert_eq!(rig.memory.read_obj::<u64>(GuestAddress(0x9000)).unwrap(), 0x0707_0707_0707_0707);
}
