//! Requests through a ring in memory, over a disk in memory.

mod endpoint;
mod file;
mod hostile;
mod model;
mod requests;

use super::recording::Recording;
use super::spec::{Header, SEGMENT_BYTES, Segment, feature, kind};
use super::{Blk, BlkOptions};
use crate::ring::{Processed, QueueError};
use crate::testing::{Driver, Request};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the test's buffers are filled with: nothing was written.
const UNTOUCHED: u8 = 0xaa;

/// A device, its disk, and a driver.
struct Rig {
    blk: Blk,
    disk: Recording,
    driver: Driver,
    features: u64,
}

impl Rig {
    /// A disk of 64 sectors, and all features negotiated.
    fn new() -> Self {
        Self::with(64 * 512, 1 << 20, &BlkOptions::default())
    }

    fn with(disk: usize, memory: u64, options: &BlkOptions) -> Self {
        let driver = Driver::new(memory, 128);
        let (disk, blk) = Recording::new(disk, options, &driver.space.guards);
        let features = blk.features();
        Self { blk, disk, driver, features }
    }

    fn process(&mut self) -> Result<Processed, QueueError> {
        self.blk.process(self.features, &mut self.driver.queue, &self.driver.space)
    }

    /// Processes until there is no more; the used ring.
    fn run(&mut self) -> Vec<(u32, u32)> {
        while self.process().unwrap().more {}
        self.driver.used()
    }

    fn offer(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> Request {
        self.driver.request(&request(kind, sector, data), room + 1, &[16], false)
    }

    /// One request alone: data that the device wrote, status, used length.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (Vec<u8>, u8, u32) {
        let request = self.offer(kind, sector, data, room);
        let used = self.run();
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, u32::from(request.head));
        let mut answer = self.driver.answer(&request);
        let status = answer.pop().unwrap();
        self.driver.free();
        (answer, status, used[0].1)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> u8 {
        self.ask(kind, sector, data, room).1
    }
}

fn request(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let header = Header { kind: U32::new(kind), reserved: U32::new(7), sector: U64::new(sector) };
    [header.as_bytes(), data].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; SEGMENT_BYTES] {
    let segment = Segment { sector: U64::new(sector), sectors: U32::new(sectors), flags: U32::new(flags) };
    segment.as_bytes().try_into().unwrap()
}
