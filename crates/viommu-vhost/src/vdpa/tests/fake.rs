//! A vhost-vDPA device in software: the kernel's rules for its messages, with errors put in. It takes whole tables: what is
//! mapped and unmapped amid a batch reaches it at the batch's end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;
use viommu::{Iova, IovaRange};
use zerocopy::IntoBytes as _;

use crate::spec::{Message, VERSION_2, kind};
use crate::vdpa::Info;
use crate::vdpa::wire::Kernel;

/// An entry: first and last address, address in this process, permission.
pub(super) type Entry = (u64, u64, u64, u8);

#[derive(Default)]
pub(super) struct State {
    info: Option<Info>,
    limit: usize,
    /// The kernel's entries, by address space and first address.
    tables: BTreeMap<u32, BTreeMap<u64, Entry>>,
    /// What the device has of them.
    device: BTreeMap<u32, BTreeMap<u64, Entry>>,
    batch: Option<u32>,
    running: bool,
    /// Kinds of messages that have come, with the address space.
    pub(super) calls: Vec<(u32, u8)>,
    /// Messages of this kind fail, after so many that do not; 0 is a reset.
    pub(super) faults: Vec<(u8, usize, Errno)>,
    /// Just one of each kind then.
    pub(super) once: bool,
    /// What the status is after a reset.
    pub(super) status: u8,
}

#[derive(Clone)]
pub(super) struct Fake(Arc<Mutex<State>>);

/// The kind of a fault at a reset.
pub(super) const RESET: u8 = 0;

impl Fake {
    pub(super) fn new(info: Info, limit: usize) -> Self {
        Self(Arc::new(Mutex::new(State { info: Some(info), limit, running: true, ..State::default() })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn take_calls(&self) -> Vec<(u32, u8)> {
        std::mem::take(&mut self.lock().calls)
    }

    pub(super) fn fail(&self, kind: u8, good: usize, errno: Errno) {
        self.lock().faults.push((kind, good, errno));
    }

    pub(super) fn heal(&self) {
        let mut state = self.lock();
        state.faults.clear();
        state.once = false;
    }

    /// What the device reaches in an address space.
    pub(super) fn reached(&self, asid: u32) -> Vec<Entry> {
        let state = self.lock();
        let table = state.device.get(&asid).filter(|_| state.running);
        table.map_or_else(Vec::new, |table| table.values().copied().collect())
    }
}

impl State {
    fn note(&mut self, kind: u8) -> Result<(), Errno> {
        let Some(at) = self.faults.iter().position(|(which, ..)| *which == kind) else { return Ok(()) };
        let (_, good, errno) = &mut self.faults[at];
        if let Some(left) = good.checked_sub(1) {
            *good = left;
            return Ok(());
        }
        let errno = *errno;
        if self.once {
            self.faults.remove(at);
        }
        Err(errno)
    }

    fn told(&mut self, asid: u32) {
        self.device.insert(asid, self.tables[&asid].clone());
    }
}

impl Kernel for Fake {
    fn write(&mut self, message: &Message) -> Result<(), Errno> {
        let mut state = self.lock();
        let state = &mut *state;
        assert_eq!((message.as_bytes().len(), message.version), (72, VERSION_2));
        let (asid, iotlb) = (message.asid, message.iotlb);
        state.calls.push((asid, iotlb.kind));
        state.note(iotlb.kind)?;
        let info = state.info.unwrap();
        if matches!(iotlb.kind, kind::UPDATE | kind::BATCH_BEGIN) && asid < info.address_spaces {
            state.tables.entry(asid).or_default();
        }
        // Whatever the reason is.
        let table = state.tables.get_mut(&asid).ok_or(Errno::FAULT)?;
        if state.batch.is_some_and(|batch| batch != asid) {
            return Err(Errno::FAULT);
        }
        match iotlb.kind {
            kind::UPDATE => {
                let range = IovaRange::from_len(Iova(iotlb.iova), iotlb.size).ok_or(Errno::FAULT)?;
                let (first, last) = (range.start().0, range.last().0);
                let overlaps = table.values().any(|entry| entry.0 <= last && first <= entry.1);
                let full = table.len() == state.limit;
                if !info.range.covers(range) || overlaps || full || !(1..4).contains(&iotlb.perm) {
                    return Err(Errno::FAULT);
                }
                table.insert(first, (first, last, iotlb.uaddr, iotlb.perm));
            }
            kind::INVALIDATE => {
                let last = iotlb.iova + (iotlb.size - 1);
                table.retain(|_, entry| entry.0 > last || entry.1 < iotlb.iova);
            }
            kind::BATCH_BEGIN => state.batch = Some(asid),
            kind::BATCH_END => state.batch = None,
            _ => return Err(Errno::FAULT),
        }
        if state.batch.is_none() {
            state.told(asid);
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<u8, Errno> {
        let mut state = self.lock();
        state.note(RESET)?;
        state.running = state.status != 0;
        Ok(state.status)
    }
}
