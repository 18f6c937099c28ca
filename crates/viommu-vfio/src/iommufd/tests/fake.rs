//! An iommufd in software: the kernel's rules for IOASes, tables and devices, with errors put in.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use viommu::{Access, Iova, IovaRange};

use crate::errno::Errno;
use crate::iommufd::device::Device;
use crate::iommufd::kernel::{Kernel, Limits, Place};
use crate::software::Bitmap;

/// A call that came to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Alloc,
    Destroy,
    Map(Place, u64),
    MapFile(Place, u64),
    Unmap(u64, u64),
    Hwpt { device: u32, tracks: bool },
    Attach { device: u32, table: u32 },
    Detach(u32),
    Track(u32, bool),
    Dirty(u64, u64),
}

/// Which kind of call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Alloc,
    Map,
    Unmap,
    Hwpt,
    Attach,
    Detach,
    Track,
    Dirty,
}

impl Call {
    fn kind(self) -> Option<Kind> {
        Some(match self {
            Call::Alloc => Kind::Alloc,
            Call::Destroy => return None,
            Call::Map(..) | Call::MapFile(..) => Kind::Map,
            Call::Unmap(..) => Kind::Unmap,
            Call::Hwpt { .. } => Kind::Hwpt,
            Call::Attach { .. } => Kind::Attach,
            Call::Detach(_) => Kind::Detach,
            Call::Track(..) => Kind::Track,
            Call::Dirty(..) => Kind::Dirty,
        })
    }
}

/// What a mapping is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Address(u64),
    File(u64),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) range: IovaRange,
    pub(super) source: Source,
    pub(super) access: Access,
}

#[derive(Debug)]
struct Table {
    ioas: u32,
    /// The kind of IOMMU that it was made for.
    kind: u32,
    tracks: bool,
    tracking: bool,
    written: Vec<u64>,
}

#[derive(Debug)]
struct Behind {
    kind: u32,
    tracks: bool,
    at: Option<u32>,
}

#[derive(Default)]
pub(super) struct State {
    next: u32,
    ioases: BTreeMap<u32, BTreeMap<u64, Area>>,
    tables: BTreeMap<u32, Table>,
    devices: BTreeMap<u32, Behind>,
    pub(super) calls: Vec<Call>,
    /// Calls of this kind fail, after so many that do not.
    pub(super) faults: Vec<(Kind, usize, Errno)>,
    /// Just one call of each kind then: later ones succeed.
    pub(super) once: bool,
    /// Whether the kernel knows IOAS_MAP_FILE.
    pub(super) files: bool,
    /// IOVA ranges, where no device takes any away.
    pub(super) apertures: Vec<IovaRange>,
}

#[derive(Clone)]
pub(super) struct Fake(Arc<Mutex<State>>);

/// As of an x86 machine.
fn apertures() -> Vec<IovaRange> {
    let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
    vec![range(0, 0xfedf_ffff), range(0xfef0_0000, (1 << 48) - 1)]
}

impl Fake {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(State { next: 1, apertures: apertures(), files: true, ..State::default() })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A device behind an IOMMU of this kind.
    pub(super) fn device(&self, kind: u32, tracks: bool, group: Option<u32>) -> Box<FakeDevice> {
        let mut state = self.lock();
        let id = state.number();
        state.devices.insert(id, Behind { kind, tracks, at: None });
        drop(state);
        Box::new(FakeDevice { kernel: self.clone(), id, group })
    }

    pub(super) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    /// Calls of `kind` fail from the one after `good` on, until [`Fake::heal`].
    pub(super) fn fail(&self, kind: Kind, good: usize, errno: Errno) {
        self.lock().faults.push((kind, good, errno));
    }

    pub(super) fn heal(&self) {
        let mut state = self.lock();
        state.faults.clear();
        state.once = false;
    }

    /// IOASes and tables.
    pub(super) fn objects(&self) -> (usize, usize) {
        let state = self.lock();
        (state.ioases.len(), state.tables.len())
    }

    /// All that the device reaches.
    pub(super) fn reached(&self, device: u32) -> Vec<Area> {
        let state = self.lock();
        let Some(at) = state.devices[&device].at else { return Vec::new() };
        let ioas = state.tables.get(&at).map_or(at, |table| table.ioas);
        state.ioases[&ioas].values().copied().collect()
    }

    /// The device writes to a page.
    pub(super) fn write(&self, device: u32, iova: u64) -> bool {
        let mut state = self.lock();
        let Some(at) = state.devices[&device].at else { return false };
        let state = &mut *state;
        let Some(table) = state.tables.get_mut(&at) else { return false };
        let areas = &state.ioases[&table.ioas];
        let hit = areas.values().any(|a| a.range.contains(Iova(iova)) && a.access.contains(Access::WRITE));
        if hit && table.tracking {
            table.written.push(iova);
        }
        hit
    }

    /// Somebody removes a mapping behind the binding's back.
    pub(super) fn betray(&self, iova: u64) {
        let mut state = self.lock();
        assert!(state.ioases.values_mut().any(|areas| areas.remove(&iova).is_some()));
    }
}

impl State {
    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn note(&mut self, call: Call) -> Result<(), Errno> {
        self.calls.push(call);
        let Some(at) = self.faults.iter().position(|(which, ..)| Some(*which) == call.kind()) else {
            return Ok(());
        };
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

    fn insert(&mut self, place: Place, source: Source, from: u64) -> Result<(), Errno> {
        let Place { ioas, iova, length, access } = place;
        let range = IovaRange::from_len(Iova(iova), length).ok_or(Errno::EOVERFLOW)?;
        if access.is_empty() || !range.is_aligned(0x1000) || from & 0xfff != 0 {
            return Err(Errno::EINVAL);
        }
        if !self.apertures.iter().any(|aperture| aperture.covers(range)) {
            return Err(Errno::EINVAL);
        }
        let areas = self.ioases.get_mut(&ioas).ok_or(Errno::ENOENT)?;
        if areas.values().any(|area| area.range.overlaps(range)) {
            return Err(Errno::EEXIST);
        }
        areas.insert(iova, Area { range, source, access });
        Ok(())
    }
}

impl Kernel for Fake {
    fn ioas_alloc(&self) -> Result<u32, Errno> {
        let mut state = self.lock();
        state.note(Call::Alloc)?;
        let id = state.number();
        state.ioases.insert(id, BTreeMap::new());
        Ok(id)
    }

    fn destroy(&self, id: u32) -> Result<(), Errno> {
        let mut state = self.lock();
        state.note(Call::Destroy)?;
        let used = state.devices.values().any(|device| device.at == Some(id))
            || state.tables.values().any(|table| table.ioas == id);
        if used {
            return Err(Errno::EBUSY);
        }
        let gone = state.ioases.remove(&id).is_some() || state.tables.remove(&id).is_some();
        if gone { Ok(()) } else { Err(Errno::ENOENT) }
    }

    fn limits(&self, ioas: u32) -> Result<Limits, Errno> {
        let state = self.lock();
        let used = state.devices.values().any(|device| device.at == Some(ioas));
        let apertures = if used { state.apertures.clone() } else { vec![IovaRange::ALL] };
        Ok(Limits { apertures, page_size: 0x1000 })
    }

    fn map(&self, place: Place, vaddr: u64) -> Result<(), Errno> {
        let mut state = self.lock();
        state.note(Call::Map(place, vaddr))?;
        state.insert(place, Source::Address(vaddr), vaddr)
    }

    fn map_file(&self, place: Place, file: BorrowedFd<'_>, start: u64) -> Result<(), Errno> {
        let mut state = self.lock();
        if !state.files {
            return Err(Errno::ENOTTY);
        }
        assert!(file.as_raw_fd() > 2);
        state.note(Call::MapFile(place, start))?;
        state.insert(place, Source::File(start), start)
    }

    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> Result<u64, Errno> {
        let mut state = self.lock();
        state.note(Call::Unmap(iova, length))?;
        let range = IovaRange::from_len(Iova(iova), length).ok_or(Errno::EOVERFLOW)?;
        let areas = state.ioases.get_mut(&ioas).ok_or(Errno::ENOENT)?;
        let met: Vec<Area> = areas.values().filter(|area| area.range.overlaps(range)).copied().collect();
        let mut removed = 0;
        for area in met {
            // Those before it are gone.
            if !range.covers(area.range) {
                return Err(Errno::ENOENT);
            }
            areas.remove(&area.range.start().0);
            removed += u64::try_from(area.range.bytes()).unwrap();
        }
        if removed == 0 { Err(Errno::ENOENT) } else { Ok(removed) }
    }

    fn hwpt_alloc(&self, device: u32, ioas: u32, tracks: bool) -> Result<u32, Errno> {
        let mut state = self.lock();
        state.note(Call::Hwpt { device, tracks })?;
        let behind = state.devices.get(&device).ok_or(Errno::ENOENT)?;
        let (kind, can) = (behind.kind, behind.tracks);
        if tracks && !can {
            return Err(Errno::EOPNOTSUPP);
        }
        if !state.ioases.contains_key(&ioas) {
            return Err(Errno::ENOENT);
        }
        let id = state.number();
        state.tables.insert(id, Table { ioas, kind, tracks, tracking: false, written: Vec::new() });
        Ok(id)
    }

    fn can_track(&self, device: u32) -> Result<bool, Errno> {
        Ok(self.lock().devices.get(&device).ok_or(Errno::ENOENT)?.tracks)
    }

    fn track(&self, hwpt: u32, on: bool) -> Result<(), Errno> {
        let mut state = self.lock();
        state.note(Call::Track(hwpt, on))?;
        let table = state.tables.get_mut(&hwpt).ok_or(Errno::ENOENT)?;
        if !table.tracks {
            return Err(Errno::EOPNOTSUPP);
        }
        table.tracking = on;
        table.written.clear();
        Ok(())
    }

    fn dirty(&self, hwpt: u32, iova: u64, length: u64, bitmap: &mut Bitmap) -> Result<(), Errno> {
        let mut state = self.lock();
        state.note(Call::Dirty(iova, length))?;
        let table = state.tables.get_mut(&hwpt).filter(|table| table.tracking).ok_or(Errno::EINVAL)?;
        let inside = |at: &u64| (iova..iova + length).contains(at);
        for at in table.written.iter().filter(|at| inside(at)) {
            let bit = (at - iova) / bitmap.pgsize;
            bitmap.words[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
        }
        table.written.retain(|at| !inside(at));
        Ok(())
    }
}

pub(super) struct FakeDevice {
    kernel: Fake,
    id: u32,
    group: Option<u32>,
}

impl Device for FakeDevice {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&mut self, table: u32) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.note(Call::Attach { device: self.id, table })?;
        let kind = state.devices[&self.id].kind;
        match state.tables.get(&table) {
            Some(there) if there.kind != kind => return Err(Errno::EINVAL),
            Some(_) => {}
            None if state.ioases.contains_key(&table) => {}
            None => return Err(Errno::ENOENT),
        }
        state.devices.get_mut(&self.id).unwrap().at = Some(table);
        Ok(())
    }

    fn detach(&mut self) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.note(Call::Detach(self.id))?;
        state.devices.get_mut(&self.id).unwrap().at = None;
        Ok(())
    }

    fn group(&self) -> Option<u32> {
        self.group
    }
}
