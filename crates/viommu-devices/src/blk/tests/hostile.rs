//! A driver that breaks every rule.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{AVAIL, PAGE, Piece, TABLE, USED};

const WRITE: u16 = 2;
const NEXT: u16 = 1;

fn piece(at: u64, len: u32, write: bool) -> Piece {
    Piece { at, len, write }
}

impl Rig {
    /// A header for a read of sector 0, somewhere.
    fn header(&mut self) -> u64 {
        let at = self.driver.room(16, 16);
        self.driver.write(at, &request(kind::IN, 0, &[]));
        at
    }

    /// Not given back.
    fn is_unanswered(&mut self, pieces: &[Piece]) {
        let before = self.blk.metrics().unanswered;
        self.driver.offer(pieces);
        assert_eq!(self.run(), [], "{pieces:?}");
        assert_eq!(self.blk.metrics().unanswered, before + 1, "{pieces:?}");
    }
}

#[test]
fn chain_when_there_is_no_status_byte_is_not_given_back() {
    let mut rig = Rig::new();
    let at = rig.header();
    rig.is_unanswered(&[piece(at, 16, false)]);
    rig.is_unanswered(&[piece(at, 16, false), piece(at + 64, 0, true)]);
    rig.is_unanswered(&[piece(at, 0, false)]);
    assert!(rig.disk.log().is_empty());
    // The status, and nothing else, is at the end of memory and behind it.
    rig.is_unanswered(&[piece(at, 16, false), piece(1 << 20, 1, true)]);
    rig.is_unanswered(&[piece(at, 16, false), piece(u64::MAX, 1, true)]);
    rig.is_unanswered(&[piece(at, 16, false), piece(u64::MAX, 0xffff, true)]);
    assert_eq!(rig.status(kind::IN, 0, &[], 512), OK);
}

#[test]
fn chain_when_a_readable_piece_is_behind_a_writable_one_is_not_given_back() {
    let mut rig = Rig::new();
    let at = rig.header();
    rig.is_unanswered(&[piece(at, 16, false), piece(at + 64, 513, true), piece(at, 16, false)]);
    rig.is_unanswered(&[piece(at + 64, 1, true), piece(at, 16, false), piece(at + 64, 1, true)]);
    assert!(rig.disk.log().is_empty());
}

#[test]
fn chain_when_it_runs_in_a_circle_or_nowhere_is_not_given_back() {
    let mut rig = Rig::new();
    let at = rig.header();
    rig.driver.descriptor(TABLE, 100, at, 16, NEXT, 101);
    rig.driver.descriptor(TABLE, 101, at + 64, 1, NEXT | WRITE, 101);
    rig.driver.make_available(100);
    assert_eq!(rig.run(), []);
    rig.driver.descriptor(TABLE, 101, at + 64, 1, NEXT | WRITE, 128);
    rig.driver.make_available(100);
    assert_eq!(rig.run(), []);
    assert_eq!(rig.blk.metrics().unanswered, 2);
}

#[test]
fn header_when_it_is_short_or_not_in_memory_fails() {
    let mut rig = Rig::new();
    let at = rig.header();
    for header in [piece(at, 15, false), piece(u64::MAX - 3, 16, false), piece((1 << 20) - 8, 16, false)] {
        let status = rig.driver.room(1, 1);
        let head = rig.driver.offer(&[header, piece(status, 1, true)]);
        assert_eq!(rig.run(), [(u32::from(head), 1)]);
        assert_eq!(rig.driver.read(status, 1), [IOERR]);
    }
    // No header at all.
    let status = rig.driver.room(1, 1);
    rig.driver.offer(&[piece(status, 1, true)]);
    rig.run();
    assert_eq!(rig.driver.read(status, 1), [IOERR]);
    assert_eq!(rig.blk.metrics().others.ioerr, 4);
}

#[test]
fn data_when_they_are_not_in_memory_fail() {
    let mut rig = Rig::new();
    let (read, write, status) = (rig.header(), rig.driver.room(16, 16), rig.driver.room(1, 1));
    rig.driver.write(write, &request(kind::OUT, 0, &[]));
    let outside = (1 << 20) - 256;
    rig.driver.offer(&[piece(read, 16, false), piece(outside, 512, true), piece(status, 1, true)]);
    assert_eq!(rig.run()[0].1, 0);
    assert_eq!(rig.driver.read(status, 1), [IOERR]);
    rig.disk.log();
    rig.driver.write(status, &[UNTOUCHED]);
    rig.driver.offer(&[piece(write, 16, false), piece(outside, 512, false), piece(status, 1, true)]);
    assert_eq!(rig.run()[0].1, 1);
    assert_eq!(rig.driver.read(status, 1), [IOERR]);
    assert!(rig.disk.log().is_empty());
}

#[test]
fn request_when_it_is_larger_than_the_limit_fails_at_once() {
    let mut rig = Rig::with(1 << 12, 1 << 16, &BlkOptions::default());
    let (at, status) = (rig.header(), rig.driver.room(1, 1));
    for len in [257 << 20, u32::MAX - 511] {
        rig.driver.offer(&[piece(at, 16, false), piece(0x8000, len, true), piece(status, 1, true)]);
        assert_eq!(rig.run()[0].1, 0);
        assert_eq!(rig.driver.read(status, 1), [IOERR]);
    }
    assert!(rig.disk.log().is_empty());
}

#[test]
fn indirect_table_when_well_formed_works_and_when_wrong_is_not_given_back() {
    let mut rig = Rig::new();
    let data = [3; 1024];
    let good = rig.driver.request(&request(kind::OUT, 2, &data), 1, &[5, 16, 17, 800], true);
    rig.run();
    assert_eq!(rig.driver.answer(&good), [OK]);
    assert_eq!(&rig.disk.bytes()[1024..2048], data);
    rig.disk.log();
    // No whole number of descriptors; a table outside memory; a table in a table; an empty one.
    let table = rig.driver.room(64, 16);
    rig.driver.descriptor(table, 0, table, 32, 4, 0);
    for (at, len) in [(table, 17), (1 << 30, 32), (table, 32), (table, 0)] {
        rig.driver.descriptor(TABLE, 90, at, len, 4, 0);
        rig.driver.make_available(90);
        assert_eq!(rig.run(), []);
    }
    assert!(rig.disk.log().is_empty());
}

#[test]
fn ring_when_the_index_is_nonsense_is_broken() {
    let mut rig = Rig::new();
    rig.driver.write(AVAIL + 2, &129_u16.to_le_bytes());
    assert!(matches!(rig.process(), Err(QueueError::Ring(_))));
}

#[test]
fn ring_when_a_head_is_outside_the_table_is_broken() {
    let mut rig = Rig::new();
    rig.driver.make_available(128);
    assert!(matches!(rig.process(), Err(QueueError::Ring(_))));
}

#[test]
fn ring_when_it_is_not_in_memory_is_broken() {
    for (page, after) in [(AVAIL, 0), (USED, 0), (USED, 1)] {
        let mut rig = Rig::new();
        rig.offer(kind::OUT, 0, &[1; 512], 0);
        rig.driver.space.vanish(page, after);
        assert!(matches!(rig.process(), Err(QueueError::Ring(_))), "{page:#x} after {after}");
    }
}

#[test]
fn ring_when_an_entry_cannot_be_read_is_broken() {
    // A ring whose entries lie on another page than its index.
    let mut rig = Rig::new();
    let low = u32::try_from(AVAIL + PAGE - 4).unwrap();
    use virtio_queue::QueueT;
    rig.driver.queue.set_avail_ring_address(Some(low), Some(0));
    rig.driver.queue.set_used_ring_address(Some(0x7000), Some(0));
    rig.driver.write(u64::from(low) + 2, &1_u16.to_le_bytes());
    rig.driver.space.vanish(AVAIL + PAGE, 0);
    assert!(matches!(rig.process(), Err(QueueError::Unreadable)));
}

#[test]
fn ring_when_the_queue_is_not_ready_is_broken() {
    use virtio_queue::QueueT;
    let mut rig = Rig::new();
    rig.driver.queue.reset();
    assert!(matches!(rig.process(), Err(QueueError::Ring(virtio_queue::Error::QueueNotReady))));
}

#[test]
fn descriptors_when_they_change_between_the_looks_are_not_looked_at_again() {
    // The same head twice: each is answered, as if they were two.
    let mut rig = Rig::new();
    let request = rig.offer(kind::IN, 0, &[], 512);
    rig.driver.make_available(request.head);
    assert_eq!(rig.run().len(), 2);
    assert_eq!(rig.blk.metrics().reads.ok, 2);
}

#[test]
fn interrupt_when_the_driver_does_not_want_it_is_not_asked_for() {
    let mut rig = Rig::new();
    rig.offer(kind::IN, 0, &[], 512);
    rig.driver.write(AVAIL, &1_u16.to_le_bytes());
    assert!(!rig.process().unwrap().interrupt);
    rig.offer(kind::IN, 0, &[], 512);
    rig.driver.write(AVAIL, &0_u16.to_le_bytes());
    assert!(rig.process().unwrap().interrupt);
    // With nothing in the ring there is nothing to tell.
    assert!(!rig.process().unwrap().interrupt);
}

#[test]
fn interrupt_when_event_idx_is_negotiated_comes_at_the_index() {
    use virtio_queue::QueueT;
    let mut rig = Rig::new();
    rig.driver.queue.set_event_idx(true);
    let used_event = AVAIL + 4 + 2 * 128;
    rig.driver.write(used_event, &1_u16.to_le_bytes());
    rig.offer(kind::IN, 0, &[], 512);
    assert!(!rig.process().unwrap().interrupt);
    rig.offer(kind::IN, 0, &[], 512);
    assert!(rig.process().unwrap().interrupt);
    // The driver kicks for the third.
    let avail_event: u16 = rig.driver.space.memory.read_obj(GuestAddress(USED + 4 + 8 * 128)).unwrap();
    assert_eq!(avail_event, 2);
}

#[test]
fn answer_when_its_memory_has_vanished_meanwhile_is_given_as_far_as_can_be() {
    let mut rig = Rig::new();
    let (at, data, status) = (rig.header(), rig.driver.room(512, PAGE), rig.driver.room(1, PAGE));
    let pieces = [piece(at, 16, false), piece(data, 512, true), piece(status, 1, true)];
    rig.driver.write(data, &[UNTOUCHED; 512]);
    // The data's page goes while the disk is read.
    rig.driver.space.vanish(data, 1);
    rig.driver.offer(&pieces);
    assert_eq!(rig.run()[0].1, 0);
    assert_eq!((rig.driver.read(status, 1), rig.driver.read(data, 1)), (vec![IOERR], vec![UNTOUCHED]));
    // The status's page goes.
    rig.driver.space.restore();
    rig.driver.space.vanish(status, 1);
    rig.driver.write(status, &[UNTOUCHED]);
    rig.driver.offer(&pieces);
    // Given back, the driver would read what it finds there: a request that was done, perhaps.
    assert_eq!(rig.run(), []);
    assert_eq!((rig.driver.read(status, 1), rig.driver.read(data, 1)), (vec![UNTOUCHED], vec![0]));
    assert_eq!(rig.blk.metrics().unanswered, 1);
    // The ring goes on.
    rig.driver.space.restore();
    rig.driver.offer(&pieces);
    assert_eq!(rig.run()[0].1, 513);
}

#[test]
fn long_request_when_its_memory_vanishes_in_the_middle_fails_there() {
    let mut rig = Rig::with(4 << 20, 16 << 20, &BlkOptions::default());
    let data = vec![5; 3 << 20];
    let request = rig.offer(kind::OUT, 0, &data, 0);
    // Taken, one piece, and no more.
    rig.driver.space.vanish(request.pieces[1].at + (3 << 19), 2);
    rig.run();
    assert_eq!(rig.driver.answer(&request), [IOERR]);
    assert!(rig.disk.bytes().iter().enumerate().all(|(at, byte)| (*byte == 5) == (at < 1 << 20)));
}

#[test]
fn batch_when_chains_are_long_or_data_many_ends_early() {
    let mut rig = Rig::new();
    let at = rig.header();
    // A circle through the whole table: no chain, and as much work as there can be.
    for index in 0..128 {
        rig.driver.descriptor(TABLE, index, at, 16, NEXT, (index + 1) % 128);
    }
    (0..64).for_each(|_| rig.driver.make_available(5));
    let processed = rig.process().unwrap();
    assert_eq!((processed.requests, processed.more), (0, true));
    assert_eq!(rig.blk.metrics().unanswered, 32);
    assert_eq!(rig.run(), []);
    assert_eq!(rig.blk.metrics().unanswered, 64);

    // Data that cannot be read count too: half of each lies behind the end of memory.
    let mut rig = Rig::new();
    let (at, status) = (rig.header(), rig.driver.room(1, 1));
    rig.driver.write(at, &request(kind::OUT, 0, &[]));
    let data = piece((1 << 20) - (16 << 10), 32 << 10, false);
    for _ in 0..40 {
        rig.driver.offer(&[piece(at, 16, false), data, piece(status, 1, true)]);
    }
    assert_eq!(rig.process().unwrap().requests, 32);
    assert_eq!(rig.run().len(), 40);
    assert_eq!(rig.blk.metrics().writes.ioerr, 40);
}
