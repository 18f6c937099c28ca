//! A disk in memory, which says what was done to it, fails when it is told to, and panics when it is reached under a
//! guard or outside its bounds.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::disk::Disk;
use super::spec::SECTOR;
use super::{Blk, BlkOptions, id_of};

/// One access: offset and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read(u64, u64),
    Write(u64, u64),
    Sync,
    Punch(u64, u64),
    Zero(u64, u64),
}

type Verdict = Box<dyn Fn(Op) -> io::Result<()> + Send>;

struct State {
    bytes: Vec<u8>,
    /// As the sectors were at the last sync.
    safe: Vec<u8>,
    log: Vec<Op>,
    verdict: Verdict,
}

/// A handle: the disk belongs to the device.
#[derive(Clone)]
pub(crate) struct Recording {
    state: Arc<Mutex<State>>,
    guards: Arc<AtomicUsize>,
    read_only: bool,
}

impl Recording {
    /// A disk of zeroes, and a device over it. `guards` counts those that are live.
    pub(crate) fn new(bytes: usize, options: &BlkOptions, guards: &Arc<AtomicUsize>) -> (Self, Blk) {
        let state = State {
            bytes: vec![0; bytes],
            safe: vec![0; bytes],
            log: Vec::new(),
            verdict: Box::new(|_| Ok(())),
        };
        let disk = Self {
            state: Arc::new(Mutex::new(state)),
            guards: Arc::clone(guards),
            read_only: options.read_only,
        };
        let id = id_of(options).expect("a test's options");
        let size = u64::try_from(bytes).expect("64 bits");
        let blk = Blk::over(Box::new(disk.clone()), size, 4096, options, id);
        (disk, blk)
    }

    /// From now on an access does what `verdict` says.
    pub(crate) fn judge(&self, verdict: impl Fn(Op) -> io::Result<()> + Send + 'static) {
        self.state.lock().expect("no panic").verdict = Box::new(verdict);
    }

    fn access(&self, op: Op, act: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        assert_eq!(self.guards.load(Ordering::Relaxed), 0, "{op:?} under a guard");
        let mut state = self.state.lock().expect("no panic");
        match op {
            Op::Sync => {}
            Op::Read(at, len) | Op::Write(at, len) | Op::Punch(at, len) | Op::Zero(at, len) => {
                let size = u64::try_from(state.bytes.len()).expect("64 bits");
                assert!(at.checked_add(len).is_some_and(|end| end <= size), "{op:?} of {size}");
                assert!(at.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR), "{op:?}");
            }
        }
        assert!(
            !self.read_only || matches!(op, Op::Read(..) | Op::Sync),
            "{op:?} of a disk that is read only"
        );
        if state.log.len() < 10_000 {
            state.log.push(op);
        }
        (state.verdict)(op)?;
        act(&mut state.bytes);
        if op == Op::Sync {
            state.safe = state.bytes.clone();
        }
        Ok(())
    }
}

#[cfg(test)]
impl Recording {
    /// What was done since the last time.
    pub(crate) fn log(&self) -> Vec<Op> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    /// What a crash would leave.
    pub(crate) fn safe(&self) -> Vec<u8> {
        self.state.lock().unwrap().safe.clone()
    }

    pub(crate) fn fill(&self, byte: impl Fn(usize) -> u8) {
        let mut state = self.state.lock().unwrap();
        state.bytes.iter_mut().enumerate().for_each(|(at, place)| *place = byte(at));
        state.safe = state.bytes.clone();
    }
}

fn range(at: u64, len: u64) -> core::ops::Range<usize> {
    let at = usize::try_from(at).expect("in memory");
    at..at + usize::try_from(len).expect("in memory")
}

fn long(len: usize) -> u64 {
    u64::try_from(len).expect("64 bits")
}

impl Disk for Recording {
    fn read(&self, at: u64, data: &mut [u8]) -> io::Result<()> {
        let len = long(data.len());
        self.access(Op::Read(at, len), |bytes| data.copy_from_slice(&bytes[range(at, len)]))
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let len = long(data.len());
        self.access(Op::Write(at, len), |bytes| bytes[range(at, len)].copy_from_slice(data))
    }

    fn sync(&self) -> io::Result<()> {
        self.access(Op::Sync, |_| {})
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.access(Op::Punch(at, len), |bytes| bytes[range(at, len)].fill(0))
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        self.access(Op::Zero(at, len), |bytes| bytes[range(at, len)].fill(0))
    }
}
