//! A machine with a unit, and a driver's part of it: tables in memory, descriptors in the queue.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use viommu::fuzzing::recording::{Event, Handle, RecordingMirror};
use viommu::subscribe::{Interest, Reach};
use viommu::{Access, Endpoint, Fault, Iommu, Iova, Mapping, Reader, Subscription};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Msi, Progress, Stage, Vtd};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Memory that knows what has been written.
pub(crate) type Ram = GuestMemoryMmap<AtomicBitmap>;

pub(crate) const RAM: u64 = 64 << 20;
pub(crate) const ROOT: u64 = 0x10_0000;
pub(crate) const QUEUE: u64 = 0x11_0000;
pub(crate) const STATUS: u64 = 0x12_0000;
/// Tables are made from here on.
const TABLES: u64 = 0x20_0000;
/// The device that most tests are about: 00:02.0.
pub(crate) const DEVICE: u16 = 0x10;

pub(crate) const READ: u64 = 1;
pub(crate) const WRITE: u64 = 2;
pub(crate) const RW: u64 = 3;
pub(crate) const LARGE: u64 = 1 << 7;
/// Present, writable, a user's; and not writable: entries of a first stage.
pub(crate) const FIRST_RW: u64 = 7;
pub(crate) const FIRST_READ: u64 = 5;

pub(crate) struct Rig {
    pub(crate) memory: Arc<Ram>,
    pub(crate) vtd: Vtd,
    pub(crate) interrupts: Arc<Mutex<Vec<Msi>>>,
    next: u64,
    waits: u32,
    levels: u32,
    /// The mode that the driver uses.
    stage: Option<Stage>,
}

impl Rig {
    pub(crate) fn new(config: Config) -> Self {
        Self::with(config, Iommu::builder().ram(0, RAM))
    }

    pub(crate) fn with(config: Config, builder: viommu::Builder) -> Self {
        let ranges = [(GuestAddress(0), RAM as usize)];
        Self::on(Arc::new(Ram::from_ranges(&ranges).unwrap()), config, builder)
    }

    /// A unit that has not been started, in memory that is there.
    pub(crate) fn on(memory: Arc<Ram>, config: Config, builder: viommu::Builder) -> Self {
        let vtd = Vtd::new(builder, memory.clone(), config).unwrap();
        let interrupts = Arc::new(Mutex::new(Vec::new()));
        let sent = interrupts.clone();
        vtd.on_interrupt(move |msi| sent.lock().unwrap().push(msi));
        let levels = match config.width {
            viommu_vtd::Width::Bits39 => 3,
            viommu_vtd::Width::Bits48 => 4,
            viommu_vtd::Width::Bits57 => 5,
        };
        Self { memory, vtd, interrupts, next: TABLES, waits: 0, levels, stage: config.scalable }
    }

    /// Another unit, with nothing behind it, for the driver that has used this one, in the same memory.
    pub(crate) fn successor(&self, builder: viommu::Builder) -> Self {
        let mut rig = Self::on(self.memory.clone(), *self.vtd.config(), builder);
        (rig.next, rig.waits, rig.stage) = (self.next, self.waits, self.stage);
        rig
    }

    /// A unit that translates, with `DEVICE` behind it and no context entries.
    pub(crate) fn started(config: Config) -> (Self, Endpoint) {
        let mut rig = Self::new(config);
        let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
        rig.start();
        (rig, endpoint)
    }

    /// As the last, but the driver uses legacy mode whatever else there is.
    pub(crate) fn started_in_legacy_mode(config: Config) -> (Self, Endpoint) {
        let mut rig = Self::new(config);
        rig.stage = None;
        let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
        rig.start();
        (rig, endpoint)
    }

    pub(crate) fn start(&mut self) {
        let (mode, wide) = if self.stage.is_some() { (1 << 10, 1 << 11) } else { (0, 0) };
        self.write32(r::FAULT_DATA, 0x41);
        self.write32(r::FAULT_ADDRESS, 0xfee0_0000);
        self.write32(r::FAULT_CONTROL, 0);
        self.write64(r::QUEUE_TAIL, 0);
        self.write64(r::QUEUE_ADDRESS, QUEUE | wide);
        self.command(1 << 26);
        self.write64(r::ROOT_TABLE, ROOT | mode);
        self.command(1 << 26 | 1 << 30);
        self.global_invalidation();
        self.command(1 << 26 | 1 << 31);
        assert_eq!(self.read32(r::GLOBAL_STATUS), 1 << 26 | 1 << 30 | 1 << 31);
    }

    pub(crate) fn settle(&self) {
        self.vtd.wait(Duration::from_secs(5)).unwrap();
    }

    pub(crate) fn process(&self) -> Progress {
        loop {
            match self.vtd.process() {
                Progress::More => {}
                other => return other,
            }
        }
    }

    pub(crate) fn command(&self, value: u32) {
        self.write32(r::GLOBAL_COMMAND, value);
        self.settle();
    }

    pub(crate) fn read32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.vtd.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn read64(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.vtd.read(at, &mut data);
        u64::from_le_bytes(data)
    }

    pub(crate) fn write32(&self, at: u64, value: u32) {
        self.vtd.write(at, &value.to_le_bytes());
    }

    pub(crate) fn write64(&self, at: u64, value: u64) {
        self.vtd.write(at, &value.to_le_bytes());
    }

    pub(crate) fn poke(&self, at: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(crate) fn peek(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Pages that have been written since this was asked last.
    pub(crate) fn written(&self) -> Vec<u64> {
        let region = self.memory.find_region(GuestAddress(0)).unwrap();
        let bitmap: &AtomicBitmap = std::ops::Deref::deref(region).bitmap();
        let pages = (0..RAM).step_by(4096).filter(|at| bitmap.is_addr_set(*at as usize)).collect();
        bitmap.reset();
        pages
    }

    /// A fresh, empty table.
    pub(crate) fn table(&mut self) -> u64 {
        let at = self.next;
        self.next += 0x1000;
        assert!(self.next < RAM / 2);
        self.memory.write_slice(&[0; 4096], GuestAddress(at)).unwrap();
        at
    }

    pub(crate) fn context_at(&mut self, requester: u16) -> u64 {
        let (mut root, function) = (ROOT + u64::from(requester >> 8) * 16, u64::from(requester & 0xff));
        if self.stage.is_some() {
            root += function / 128 * 8;
        }
        if self.peek(root) & 1 == 0 {
            let table = self.table();
            self.poke(root, table | 1);
        }
        let place = if self.stage.is_some() { function % 128 * 32 } else { function * 16 };
        (self.peek(root) & !0xfff) + place
    }

    /// Where a PASID's entry is, with what leads to it made: a directory of 128 entries, and requests with PASIDs allowed.
    pub(crate) fn pasid_at(&mut self, requester: u16, pasid: u64) -> u64 {
        let context = self.context_at(requester);
        if self.peek(context) & 1 == 0 {
            let directory = self.table();
            self.poke(context, directory | 1 << 3 | 1);
        }
        let entry = (self.peek(context) & !0xfff) + pasid / 64 * 8;
        if self.peek(entry) & 1 == 0 {
            let table = self.table();
            self.poke(entry, table | 1);
        }
        (self.peek(entry) & !0xfff) + pasid % 64 * 64
    }

    /// Gives a PASID the tables at `root`.
    pub(crate) fn attach_pasid(&mut self, requester: u16, pasid: u64, did: u64, root: u64) {
        let at = self.pasid_at(requester, pasid);
        self.poke(at, 0);
        self.poke(at + 8, did);
        match self.stage.unwrap() {
            Stage::Second => self.poke(at, root | 2 << 6 | u64::from(self.levels - 2) << 2 | 1),
            Stage::First => {
                self.poke(at + 16, root | u64::from(self.levels - 4) << 2);
                self.poke(at, 1 << 6 | 1);
            }
        }
    }

    /// Writes a context entry, raw.
    pub(crate) fn context(&mut self, requester: u16, low: u64, high: u64) {
        let at = self.context_at(requester);
        self.poke(at + 8, high);
        self.poke(at, low);
    }

    /// Gives a requester the tables at `root`.
    pub(crate) fn attach(&mut self, requester: u16, did: u64, root: u64) {
        match self.stage {
            None => self.context(requester, root | 1, did << 8 | u64::from(self.levels - 2)),
            Some(_) => self.attach_pasid(requester, 0, did, root),
        }
    }

    /// Where the entry of `iova` at `level` is, with the tables above made.
    pub(crate) fn entry(&mut self, root: u64, iova: u64, level: u32) -> u64 {
        let mut table = root;
        for above in (level + 1..=self.levels).rev() {
            let at = table + (iova >> (3 + 9 * above) & 0x1ff) * 8;
            let allowed = if self.stage == Some(Stage::First) { FIRST_RW } else { RW };
            if self.peek(at) & allowed == 0 {
                let new = self.table();
                self.poke(at, new | allowed);
            }
            table = self.peek(at) & 0x000f_ffff_ffff_f000;
        }
        table + (iova >> (3 + 9 * level) & 0x1ff) * 8
    }

    pub(crate) fn map(&mut self, root: u64, iova: u64, gpa: u64, access: u64) {
        let at = self.entry(root, iova, 1);
        self.poke(at, gpa | access);
    }

    pub(crate) fn map_large(&mut self, root: u64, iova: u64, level: u32, gpa: u64, access: u64) {
        let at = self.entry(root, iova, level);
        self.poke(at, gpa | access | LARGE);
    }

    pub(crate) fn unmap(&mut self, root: u64, iova: u64) {
        let at = self.entry(root, iova, 1);
        self.poke(at, 0);
    }

    /// Puts descriptors into the queue, and one that waits; gives the status that it writes.
    pub(crate) fn push(&mut self, descriptors: &[(u64, u64)]) -> u32 {
        self.waits += 1;
        let wait = (5 | 1 << 5 | u64::from(self.waits) << 32, STATUS);
        let mut tail = self.read64(r::QUEUE_TAIL);
        for (low, high) in descriptors.iter().chain([&wait]) {
            self.poke(QUEUE + tail, *low);
            self.poke(QUEUE + tail + 8, *high);
            tail += 16;
            if self.stage.is_some() {
                self.poke(QUEUE + tail, 0);
                self.poke(QUEUE + tail + 8, 0);
                tail += 16;
            }
            tail %= 4096;
        }
        self.write64(r::QUEUE_TAIL, tail);
        self.waits
    }

    pub(crate) fn submit(&mut self, descriptors: &[(u64, u64)]) {
        let status = self.push(descriptors);
        self.settle();
        assert_eq!(self.status(), status);
    }

    pub(crate) fn status(&self) -> u32 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    pub(crate) fn global_invalidation(&mut self) {
        self.submit(&[(1 | 1 << 4, 0), (2 | 1 << 4, 0)]);
    }

    /// As Linux announces a fresh PASID entry.
    pub(crate) fn announce_pasid(&mut self, pasid: u64, did: u64) {
        self.submit(&[pasid_entry(pasid, did), whole_pasid(pasid, did)]);
    }

    /// As Linux announces a fresh context entry: with domain id 0, then the translations of the new one.
    pub(crate) fn announce(&mut self, requester: u16, did: u64) {
        if self.stage.is_some() {
            return self.announce_pasid(0, did);
        }
        let source = u64::from(requester) << 32;
        self.submit(&[(1 | 3 << 4 | source, 0), domain(did)]);
    }

    /// The unit's oldest fault, taken: source, reason, address, whether it was a read.
    pub(crate) fn fault(&self) -> Option<(u16, u8, u64, bool)> {
        let (low, high) = self.fault_record()?;
        assert_eq!(high >> 31 & 1, 0, "no PASID");
        Some((high as u16, (high >> 32) as u8, low, high >> 62 & 1 == 1))
    }

    /// The unit's oldest fault, taken: PASID, reason.
    pub(crate) fn fault_with_pasid(&self) -> Option<(Option<u64>, u8)> {
        let (_, high) = self.fault_record()?;
        Some(((high >> 31 & 1 == 1).then_some(high >> 40 & 0xf_ffff), (high >> 32) as u8))
    }

    fn fault_record(&self) -> Option<(u64, u64)> {
        let status = self.read32(r::FAULT_STATUS);
        if status & 2 == 0 {
            return None;
        }
        let at = r::FAULT_RECORDS + u64::from(status >> 8 & 0xff) * 16;
        let (low, high) = (self.read64(at), self.read64(at + 8));
        assert_eq!(high >> 63, 1);
        self.write32(at + 12, 1 << 31);
        Some((low, high))
    }
}

pub(crate) fn domain(did: u64) -> (u64, u64) {
    (2 | 2 << 4 | did << 16, 0)
}

pub(crate) fn pages(did: u64, iova: u64, order: u64) -> (u64, u64) {
    (2 | 3 << 4 | did << 16, iova | order)
}

/// The PASID cache, of one PASID of a domain id.
pub(crate) fn pasid_entry(pasid: u64, did: u64) -> (u64, u64) {
    (7 | 1 << 4 | did << 16 | pasid << 32, 0)
}

/// All translations of a PASID of a domain id.
pub(crate) fn whole_pasid(pasid: u64, did: u64) -> (u64, u64) {
    (6 | 2 << 4 | did << 16 | pasid << 32, 0)
}

/// Some translations of a PASID of a domain id.
pub(crate) fn pasid_pages(pasid: u64, did: u64, iova: u64, order: u64) -> (u64, u64) {
    (6 | 3 << 4 | did << 16 | pasid << 32, iova | order)
}

pub(crate) fn device_context(requester: u16) -> (u64, u64) {
    (1 | 3 << 4 | u64::from(requester) << 32, 0)
}

pub(crate) fn mirror(endpoint: &Endpoint) -> (Subscription, Handle) {
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    (endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap(), handle)
}

pub(crate) fn reader(endpoint: &Endpoint) -> Reader {
    endpoint.reader("test").unwrap()
}

/// What an access reaches.
pub(crate) fn access(reader: &mut Reader, iova: u64, access: Access) -> Result<u64, Fault> {
    Ok(reader.enter().translate(Iova(iova), access)?.gpa.0)
}

pub(crate) fn extent(iova: u64, bytes: u64, gpa: u64) -> Mapping {
    Mapping::new(Iova(iova), bytes, viommu::Gpa(gpa), Access::RW).unwrap()
}

pub(crate) fn mapped(iova: u64, bytes: u64, gpa: u64) -> Event {
    Event::Map(extent(iova, bytes, gpa))
}

pub(crate) fn unmapped(iova: u64, bytes: u64) -> Event {
    Event::Unmap(extent(iova, bytes, 0).range)
}
