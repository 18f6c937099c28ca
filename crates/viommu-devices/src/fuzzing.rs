//! Any bytes, read as what a hostile guest does to a disk and an entropy device: descriptors, ring memory, requests, pages
//! that vanish, a disk that fails. The disk panics when it is reached outside its bounds, written though it is read only,
//! or reached while memory is held. For fuzzing and tests alone; nothing here is stable.

use std::io;
use std::sync::atomic::Ordering;

use crate::blk::recording::{Op, Recording};
use crate::ring::{BATCH, Processed, QueueError};
use crate::testing::{Driver, PAGE, Piece, TABLE};
use crate::{Blk, BlkOptions, Rng};

const MEMORY: u64 = 1 << 18;
/// From here on, buffers are free again: the longest request fits behind.
const FULL: u64 = MEMORY - (1 << 15);
const DISK: usize = 1 << 15;
const ENTRIES: u16 = 16;
const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, 0xffff];

/// Bytes to take from.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// A sector: on the disk, close to its end, or far away.
    fn sector(&mut self) -> u64 {
        let byte = self.byte();
        match byte {
            0..=250 => u64::from(byte) % 70,
            251 => u64::from(self.long()),
            252 => 1 << 55,
            _ => u64::MAX - u64::from(self.byte()),
        }
    }
}

struct World {
    driver: Driver,
    disk: Recording,
    blk: Blk,
    rng: Rng,
    /// Requests that the disk gave back, and whether a ring was broken meanwhile.
    given: usize,
    broken: bool,
}

impl World {
    fn new(read_only: bool) -> Self {
        let driver = Driver::new(MEMORY, ENTRIES);
        let options = BlkOptions { read_only, ..BlkOptions::default() };
        let (disk, blk) = Recording::new(DISK, &options, &driver.space.guards);
        Self { driver, disk, blk, rng: Rng::new(), given: 0, broken: false }
    }

    /// A piece of a request: `bytes` of it are written where it lies.
    fn piece(&mut self, len: u32, write: bool, bytes: &[u8]) -> Piece {
        let at = self.driver.room(u64::from(len).max(u64::try_from(bytes.len()).expect("few")), 1);
        if at > FULL {
            self.driver.free();
        }
        self.driver.write(at, bytes);
        Piece { at, len, write }
    }

    /// A request of a known kind with small numbers, over some descriptors.
    fn request(&mut self, input: &mut Input<'_>) {
        let shape = input.byte();
        let kind = KINDS[usize::from(input.byte() & 7)];
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(input.sector().to_le_bytes());
        let cut = usize::from(input.byte()) % 17;
        let (first, second) = header.split_at(cut);
        let mut pieces = Vec::new();
        for part in [first, second] {
            if !part.is_empty() {
                let len = u32::try_from(part.len()).expect("few");
                pieces.push(self.piece(len, false, part));
            }
        }
        let parts = shape & 3;
        for _ in 0..parts {
            let len = match input.byte() {
                byte @ 0..=200 => u32::from(byte & 7) * 512,
                byte => u32::from(byte) - 200,
            };
            pieces.push(self.piece(len, kind == 0 || kind == 8, &[]));
        }
        if shape & 4 != 0 {
            let mut segment = input.sector().to_le_bytes().to_vec();
            segment.extend(input.word().to_le_bytes());
            segment.extend([0, 0, input.byte() & 3, 0, 0, 0]);
            pieces.push(self.piece(16, false, &segment));
        }
        if shape & 8 == 0 {
            pieces.push(self.piece(1, true, &[0xff]));
        }
        if pieces.is_empty() {
            return;
        }
        if shape & 16 == 0 {
            self.driver.offer(&pieces);
        } else {
            self.driver.offer_indirect(&pieces);
        }
    }

    fn settle(&mut self, outcome: Result<Processed, QueueError>, blk: bool) {
        assert_eq!(self.driver.space.guards.load(Ordering::Relaxed), 0, "a guard is left");
        match outcome {
            Ok(processed) => {
                assert!(processed.requests <= BATCH, "{processed:?}");
                assert!(processed.requests > 0 || !processed.interrupt, "{processed:?}");
                self.given += if blk { processed.requests } else { 0 };
            }
            Err(_) => {
                self.broken |= blk;
                self.driver.space.restore();
                self.driver.set_up();
            }
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 10 {
            0..=2 => self.request(input),
            3 => {
                let index = input.word() % ENTRIES;
                let at = u64::from(input.long() % (1 << 19));
                let len = input.long() >> (input.byte() % 32);
                self.driver.descriptor(TABLE, index, at, len, input.word() & 7, input.word() % 20);
            }
            4 => self.driver.make_available(u16::from(input.byte()) % (ENTRIES + 1)),
            5 => {
                let at = u64::from(input.long()) % (MEMORY - 2);
                let bytes = input.word().to_le_bytes();
                self.driver.write(at, &bytes);
            }
            6 => {
                let page = u64::from(input.byte()) % (MEMORY / PAGE);
                self.driver.space.vanish(page * PAGE, usize::from(input.byte() & 3));
            }
            7 => {
                if input.byte() & 1 == 0 {
                    self.driver.space.restore();
                }
                let mode = input.byte();
                self.disk.judge(move |op| match (op, mode % 6) {
                    (_, 1) | (Op::Sync, 2) | (Op::Write(..), 3) => Err(io::ErrorKind::StorageFull.into()),
                    (Op::Punch(..) | Op::Zero(..), 4) => Err(io::ErrorKind::Unsupported.into()),
                    _ => Ok(()),
                });
            }
            8 => {
                let outcome = self.rng.process(&mut self.driver.queue, &self.driver.space);
                self.settle(outcome, false);
            }
            _ => {
                let features = self.blk.features() & !(u64::from(input.byte()) << 9);
                let outcome = self.blk.process(features, &mut self.driver.queue, &self.driver.space);
                self.settle(outcome, true);
            }
        }
    }
}

/// Does what the bytes say.
///
/// # Panics
/// When a device does what it must never do.
pub fn fuzz_blk(data: &[u8]) {
    let mut input = Input(data);
    let mut world = World::new(input.byte() & 3 == 0);
    while !input.0.is_empty() {
        world.step(&mut input);
    }
    let metrics = world.blk.metrics();
    let rows = [
        metrics.reads,
        metrics.writes,
        metrics.flushes,
        metrics.discards,
        metrics.write_zeroes,
        metrics.ids,
        metrics.others,
    ];
    let answered: u64 = rows.iter().map(|row| row.ok + row.ioerr + row.unsupp).sum();
    let given = u64::try_from(world.given).expect("64 bits");
    assert!(answered == given || world.broken && answered > given, "{answered} of {given}: {metrics:?}");
}
