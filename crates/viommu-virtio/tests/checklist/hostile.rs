//! Rings as no honest driver lays them: nothing is executed, nothing is written, and what follows is served.

use viommu_virtio::QueueError;
use viommu_virtio::driver::RawDescriptor;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use crate::rig::*;

const NEXT: u16 = RawDescriptor::NEXT;
const WRITE: u16 = RawDescriptor::WRITE;
const INDIRECT: u16 = RawDescriptor::INDIRECT;
/// No memory is there.
const NOWHERE: u64 = 1 << 40;

/// A rig with a domain, and a MAP that is ready at the scratch area: 36 bytes, and 4 for the tail at 64.
struct Hostile {
    rig: Rig,
    request: u64,
    tail: u64,
    end: u64,
}

fn d(addr: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor { addr, len, flags, next }
}

fn hostile() -> Hostile {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    let scratch = rig.driver.scratch();
    rig.memory.write_slice(&map(1, 4, 4, 4).to_bytes(), scratch).unwrap();
    let end = 0x1000 + viommu_virtio::driver::Driver::<Memory>::bytes(QUEUE, 512);
    let mut hostile = Hostile { rig, request: scratch.0, tail: scratch.0 + 64, end };
    hostile.clear();
    hostile
}

impl Hostile {
    fn clear(&mut self) {
        self.rig.memory.write_slice(&[0xa5; 1024], GuestAddress(self.tail)).unwrap();
    }

    /// The chain as it should be.
    fn honest(&self) -> [RawDescriptor; 2] {
        [d(self.request, 36, NEXT, 1), d(self.tail, 4, WRITE, 0)]
    }

    fn used(&mut self, chain: &[RawDescriptor]) -> u32 {
        self.clear();
        self.rig.driver.push_raw(chain).unwrap();
        self.rig.serve();
        self.rig.driver.next_answer().unwrap().unwrap().used_len
    }

    /// Not answered, not executed, not written; an honest one behind it is.
    #[track_caller]
    fn refused(&mut self, chain: &[RawDescriptor]) {
        assert_eq!(self.used(chain), 0, "{chain:x?}");
        assert_eq!(self.rig.pages(1), [], "executed");
        let mut there = [0; 1024];
        self.rig.memory.read_slice(&mut there, GuestAddress(self.tail)).unwrap();
        assert_eq!(there, [0xa5; 1024], "written");
        self.accepted(&self.honest());
    }

    #[track_caller]
    fn accepted(&mut self, chain: &[RawDescriptor]) {
        assert_eq!(self.used(chain), 4, "{chain:x?}");
        let status: u8 = self.rig.memory.read_obj(GuestAddress(self.tail)).unwrap();
        assert_eq!((status, self.rig.pages(1)), (0, vec![(4, 4)]));
        self.rig.ok(&unmap(1, 4, 4));
    }

    /// Writes an indirect table behind the tail, and gives the descriptor that names it.
    fn table(&self, entries: &[RawDescriptor]) -> RawDescriptor {
        let at = self.tail + 1024;
        for (n, entry) in entries.iter().enumerate() {
            let mut bytes = Vec::new();
            bytes.extend(entry.addr.to_le_bytes());
            bytes.extend(entry.len.to_le_bytes());
            bytes.extend(entry.flags.to_le_bytes());
            bytes.extend(entry.next.to_le_bytes());
            self.rig.memory.write_slice(&bytes, GuestAddress(at + 16 * n as u64)).unwrap();
        }
        d(at, u32::try_from(16 * entries.len()).unwrap(), INDIRECT, 0)
    }
}

#[test]
fn chains_that_go_in_a_circle() {
    let mut h = hostile();
    let (request, tail) = (h.request, h.tail);
    h.refused(&[d(request, 36, NEXT, 0)]);
    h.refused(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, 1)]);
    h.refused(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, 0)]);
    h.refused(&[d(request, 18, NEXT, 1), d(request + 18, 18, NEXT, 0)]);
    h.refused(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, 2), d(tail + 4, 4, WRITE | NEXT, 1)]);
    h.refused(&[d(request, 0, NEXT, 0)]);
    h.refused(&[d(tail, 4, WRITE | NEXT, 0)]);
}

#[test]
fn chains_that_end_outside_the_table() {
    let mut h = hostile();
    let (request, tail) = (h.request, h.tail);
    for next in [QUEUE, QUEUE + 1, u16::MAX] {
        h.refused(&[d(request, 36, NEXT, next)]);
        h.refused(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, next)]);
    }
}

#[test]
fn writable_before_readable() {
    let mut h = hostile();
    let (request, tail) = (h.request, h.tail);
    h.refused(&[d(tail, 4, WRITE | NEXT, 1), d(request, 36, 0, 0)]);
    h.refused(&[d(request, 20, NEXT, 1), d(tail, 4, WRITE | NEXT, 2), d(request + 20, 16, 0, 0)]);
    h.refused(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, 2), d(request, 1, 0, 0)]);
    h.refused(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, 2), d(request, 0, 0, 0)]);
}

#[test]
fn one_kind_of_descriptor_alone() {
    let mut h = hostile();
    let (request, tail) = (h.request, h.tail);
    h.refused(&[d(request, 36, 0, 0)]);
    h.refused(&[d(request, 40, 0, 0)]);
    h.refused(&[d(tail, 4, WRITE, 0)]);
    h.refused(&[d(request, 36, WRITE, 0)]);
    h.refused(&[d(0, 0, 0, 0)]);
}

#[test]
fn addresses_outside_memory() {
    let mut h = hostile();
    let (request, tail, end) = (h.request, h.tail, h.end);
    for addr in [NOWHERE, u64::MAX, u64::MAX - 35, 0, end, end - 35] {
        h.refused(&[d(addr, 36, NEXT, 1), d(tail, 4, WRITE, 0)]);
    }
    for addr in [NOWHERE, u64::MAX, u64::MAX - 3, u64::MAX - 2, 0, end, end - 3, end - 1, 0xfff] {
        h.refused(&[d(request, 36, NEXT, 1), d(addr, 4, WRITE, 0)]);
    }
    // The tail in two parts, of which one is nowhere: it is not written half.
    h.refused(&[d(request, 36, NEXT, 1), d(tail, 2, WRITE | NEXT, 2), d(NOWHERE, 2, WRITE, 0)]);
    h.refused(&[d(request, 36, NEXT, 1), d(NOWHERE, 1, WRITE | NEXT, 2), d(tail, 3, WRITE, 0)]);
    // What is not needed is not looked at.
    h.accepted(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, 2), d(NOWHERE, 9, WRITE, 0)]);
}

#[test]
fn lengths_that_make_no_sense() {
    let mut h = hostile();
    let (request, tail) = (h.request, h.tail);
    h.refused(&[d(request, 35, NEXT, 1), d(tail, 4, WRITE, 0)]);
    h.refused(&[d(request, 36, NEXT, 1), d(tail, 3, WRITE, 0)]);
    h.refused(&[d(request, 0, NEXT, 1), d(tail, 0, WRITE, 0)]);
    // A chain of more than 2^32 bytes is none.
    h.refused(&[d(request, u32::MAX, NEXT, 1), d(tail, 4, WRITE, 0)]);
    h.refused(&[d(request, 36, NEXT, 1), d(tail, u32::MAX, WRITE, 0)]);
    // Empty pieces are pieces.
    h.accepted(&[
        d(NOWHERE, 0, NEXT, 1),
        d(request, 36, NEXT, 2),
        d(NOWHERE, 0, NEXT, 3),
        d(NOWHERE, 0, WRITE | NEXT, 4),
        d(tail, 4, WRITE, 0),
    ]);
}

#[test]
fn indirect_tables_of_every_wrong_sort() {
    let mut h = hostile();
    let (request, tail) = (h.request, h.tail);
    let honest = h.honest();
    let table = h.table(&honest);
    h.accepted(&[table]);
    h.refused(&[RawDescriptor { addr: NOWHERE, ..table }]);
    h.refused(&[RawDescriptor { addr: u64::MAX - 15, ..table }]);
    h.refused(&[RawDescriptor { len: 0, ..table }]);
    h.refused(&[RawDescriptor { len: 16, ..table }]);
    h.refused(&[RawDescriptor { len: 33, ..table }]);
    h.refused(&[RawDescriptor { len: u32::MAX, ..table }]);
    // A circle in it, a table in a table, a way out of it.
    let circle = h.table(&[d(request, 36, NEXT, 1), d(tail, 4, WRITE | NEXT, 1)]);
    h.refused(&[circle]);
    let nested = h.table(&[RawDescriptor { addr: tail + 2048, len: 32, flags: INDIRECT, next: 0 }]);
    h.refused(&[nested]);
    let itself = h.table(&[table]);
    h.refused(&[itself]);
    let out = h.table(&[d(request, 36, NEXT, 7), d(tail, 4, WRITE, 0)]);
    h.refused(&[out]);
    let backwards = h.table(&[d(tail, 4, WRITE | NEXT, 1), d(request, 36, 0, 0)]);
    h.refused(&[backwards]);
    // Behind a descriptor of the ring, as the specification allows it.
    let rest = h.table(&[d(request + 20, 16, NEXT, 1), d(tail, 4, WRITE, 0)]);
    h.accepted(&[d(request, 20, NEXT, 1), rest]);
}

#[test]
fn a_probe_with_properties_outside_memory_is_not_answered() {
    let mut h = hostile();
    let bytes = viommu_virtio::driver::Request::Probe { endpoint: B }.to_bytes();
    h.rig.memory.write_slice(&bytes, GuestAddress(h.tail + 2048)).unwrap();
    let (from, tail) = (h.tail + 2048, h.tail);
    let chain = [d(from, 72, NEXT, 1), d(NOWHERE, 512, WRITE | NEXT, 2), d(tail, 4, WRITE, 0)];
    h.refused(&chain);
    let chain = [d(from, 72, NEXT, 1), d(tail, 512, WRITE | NEXT, 2), d(NOWHERE, 4, WRITE, 0)];
    h.refused(&chain);
}

#[test]
fn heads_outside_the_table_are_survived() {
    let mut h = hostile();
    let (avail, next) = (h.rig.queue.queue_mut().avail_ring(), h.rig.queue.queue_mut().next_avail());
    for (at, head) in [QUEUE, u16::MAX].into_iter().enumerate() {
        let at = next.wrapping_add(u16::try_from(at).unwrap());
        let slot = u64::from(at % QUEUE);
        h.rig.memory.write_obj(head.to_le(), GuestAddress(avail + 4 + 2 * slot)).unwrap();
        h.rig.memory.write_obj(at.wrapping_add(1).to_le(), GuestAddress(avail + 2)).unwrap();
        // An error of the ring, or passed over; never a request.
        let _outcome = h.rig.queue.process();
        assert_eq!(h.rig.pages(1), []);
    }
}

#[test]
fn an_index_that_is_too_far_ahead_is_an_error_of_the_ring() {
    let mut h = hostile();
    let (avail, next) = (h.rig.queue.queue_mut().avail_ring(), h.rig.queue.queue_mut().next_avail());
    for ahead in [QUEUE + 1, u16::MAX] {
        let index = next.wrapping_add(ahead);
        h.rig.memory.write_obj(index.to_le(), GuestAddress(avail + 2)).unwrap();
        assert!(matches!(h.rig.queue.process(), Err(QueueError::Ring(_))), "{ahead} ahead");
    }
    assert_eq!(h.rig.pages(1), []);
}

#[test]
fn rings_outside_memory_are_an_error() {
    let mut h = hostile();
    h.rig.driver.push_raw(&h.honest()).unwrap();
    h.rig.queue.queue_mut().set_avail_ring_address(Some(0), Some(0x100));
    assert!(matches!(h.rig.queue.process(), Err(QueueError::Ring(_))));
    assert_eq!(h.rig.pages(1), []);
}

#[test]
fn events_with_hostile_buffers_are_not_lost() {
    let mut h = hostile();
    h.rig.reads(B, 0x1000).unwrap_err();
    let table = h.rig.events.queue_mut().desc_table();
    h.rig.driver.post_event(24).unwrap();
    let mut saved = [0; 16];
    h.rig.memory.read_slice(&mut saved, GuestAddress(table)).unwrap();
    // The buffer is nowhere: the driver gets it back with nothing in it.
    h.rig.memory.write_obj(NOWHERE.to_le(), GuestAddress(table)).unwrap();
    h.rig.events.process().unwrap();
    assert_eq!(h.rig.driver.next_event().unwrap(), Some(vec![]));
    h.rig.memory.write_slice(&saved, GuestAddress(table)).unwrap();
    h.rig.driver.post_event(24).unwrap();
    h.rig.events.process().unwrap();
    assert_eq!(h.rig.driver.events().unwrap().len(), 1);
}
