//! QEMU's unit and ours side by side: the same bytes in memory, the same writes of registers, the same accesses.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use viommu::{Access, Iommu, Iova, Reader};
use viommu_vtd::{Config, Vtd, spec::register as r};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    model::{Request, Words},
    qtest::{Qtest, number},
};
use crate::setup::Qemu;

/// Bytes of memory, from 0 on.
pub(super) const RAM: u64 = 256 << 20;
/// Devices: QEMU's `iommu-testdev` only writes, the two `edu` read as well.
pub(super) const SOURCES: [u16; 3] = [4 << 3, 5 << 3, 5 << 3 | 4];
/// Of QEMU's unit.
const UNIT: u64 = 0xfed9_0000;
/// Where the devices' registers are put.
const BARS: [u64; 3] = [0xe000_0000, 0xe010_0000, 0xe020_0000];
/// What devices write: as an entry of a table it is not present.
pub(super) const PATTERN: u64 = 0x1234_5678_1234_5678;
/// The buffer of an `edu`, as it numbers it, and where the pattern is in it.
const BUFFER: u64 = 0x4_0000;
const BUFFER_PATTERN: u64 = 0xff8;
/// Memory that nothing else uses, for the ways in and out of those buffers.
const SCRATCH: u64 = 0xf0_0000;

/// A fault that was recorded: source, reason, page, whether it was a read.
pub(super) type Record = (u16, u8, u64, bool);

/// What is seen of an access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) record: Option<Record>,
    /// Which of the places that it may reach a write has reached; where ours has read.
    pub(super) reached: Vec<u64>,
    /// Fault status, without the index.
    pub(super) status: u32,
}

/// Both units.
pub(super) struct Machine {
    qemu: Qtest,
    pub(super) memory: Arc<GuestMemoryMmap<()>>,
    vtd: Vtd,
    readers: Vec<Reader>,
    /// Where QEMU's unit has its fault record and the registers IVA and IOTLB.
    record_at: u64,
    invalidate_at: u64,
}

impl Words for GuestMemoryMmap<()> {
    fn word(&self, at: u64) -> Option<u64> {
        self.read_obj(GuestAddress(at)).ok()
    }
}

fn unit(memory: &Arc<GuestMemoryMmap<()>>, caching_mode: bool) -> anyhow::Result<(Vtd, Vec<Reader>)> {
    let config = Config { caching_mode, ..Config::default() };
    let vtd = Vtd::new(Iommu::builder().ram(0, RAM), memory.clone(), config)?;
    let reader = |source: &u16| {
        let endpoint = vtd.add_endpoint(*source).map_err(|kind| anyhow::anyhow!("{kind}"))?;
        endpoint.reader("device").context("it has just come")
    };
    let readers = SOURCES.iter().map(reader).collect::<anyhow::Result<_>>()?;
    Ok((vtd, readers))
}

impl Machine {
    /// Starts QEMU and puts the devices in place.
    ///
    /// # Errors
    ///
    /// If it does not start, or has other devices than these tests need.
    pub(super) fn start(qemu: &Qemu, log: &Path) -> anyhow::Result<Self> {
        let edu = |address: &str| format!("edu,addr={address},dma_mask=0xffffffffffffffff,multifunction=on");
        let (first, second) = (edu("5.0"), edu("5.4"));
        let arguments = [
            "-m",
            "256",
            "-device",
            "intel-iommu,caching-mode=on,aw-bits=48,snoop-control=on,intremap=off",
            "-device",
            "iommu-testdev,addr=4",
            "-device",
            &first,
            "-device",
            &second,
        ];
        let qemu = Qtest::start(qemu, &arguments, log)?;
        let memory =
            Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), usize::try_from(RAM)?)])?);
        let (vtd, readers) = unit(&memory, true)?;
        let mut machine = Self { qemu, memory, vtd, readers, record_at: 0, invalidate_at: 0 };
        for (source, bar) in SOURCES.iter().zip(BARS) {
            let config = |offset: u64| 1 << 31 | u64::from(*source) << 8 | offset;
            for (offset, value) in [(0x10, bar), (4, 6)] {
                machine.qemu.tell(format_args!("outl 0xcf8 {:#x}", config(offset)));
                machine.qemu.tell(format_args!("outl 0xcfc {value:#x}"));
            }
        }
        let capability = machine.qemu.tell(format_args!("readq {:#x}", UNIT + r::CAPABILITY));
        let extended = machine.qemu.tell(format_args!("readq {:#x}", UNIT + r::EXTENDED_CAPABILITY));
        let answers = machine.qemu.answers()?;
        machine.record_at = (number(&answers, capability)? >> 24 & 0x3ff) * 16;
        machine.invalidate_at = (number(&answers, extended)? >> 8 & 0x3ff) * 16;
        // The pattern goes into the buffers while nothing is translated.
        machine.poke(SCRATCH, PATTERN)?;
        for device in [1, 2] {
            machine.buffer(device, SCRATCH, BUFFER_PATTERN, 8, false);
        }
        Ok(machine)
    }

    /// Begins again: translation off, no faults, our unit as new, zeroes in `ranges`.
    pub(super) fn reset(&mut self, caching_mode: bool, ranges: &[(u64, u64)]) -> anyhow::Result<()> {
        self.readers.clear();
        (self.vtd, self.readers) = unit(&self.memory, caching_mode)?;
        for (at, bytes) in ranges {
            self.memory.write_slice(&vec![0; usize::try_from(*bytes)?], GuestAddress(*at))?;
            self.qemu.tell(format_args!("memset {at:#x} {bytes:#x} 0"));
        }
        Ok(())
    }

    /// Writes a word in both memories.
    pub(super) fn poke(&mut self, at: u64, value: u64) -> anyhow::Result<()> {
        self.memory.write_obj(value, GuestAddress(at)).with_context(|| format!("{at:#x}"))?;
        self.qemu.tell(format_args!("writeq {at:#x} {value:#x}"));
        Ok(())
    }

    /// Writes a register of both units, of which ours has IVA and IOTLB elsewhere.
    pub(super) fn write32(&mut self, at: u64, value: u32) -> anyhow::Result<()> {
        self.qemu.tell(format_args!("writel {:#x} {value:#x}", UNIT + at));
        self.vtd.write(at, &value.to_le_bytes());
        Ok(self.vtd.wait(Duration::from_secs(5))?)
    }

    pub(super) fn write64(&mut self, at: u64, value: u64) -> anyhow::Result<()> {
        let theirs =
            if at >= r::INVALIDATE_ADDRESS { at - r::INVALIDATE_ADDRESS + self.invalidate_at } else { at };
        self.qemu.tell(format_args!("writeq {:#x} {value:#x}", UNIT + theirs));
        self.vtd.write(at, &value.to_le_bytes());
        Ok(self.vtd.wait(Duration::from_secs(5))?)
    }

    /// Reads a register of both: QEMU's first.
    pub(super) fn read64(&mut self, at: u64) -> anyhow::Result<(u64, u64)> {
        let theirs =
            if at >= r::INVALIDATE_ADDRESS { at - r::INVALIDATE_ADDRESS + self.invalidate_at } else { at };
        let answer = self.qemu.tell(format_args!("readq {:#x}", UNIT + theirs));
        let theirs = number(&self.qemu.answers()?, answer)?;
        Ok((theirs, self.ours(at)))
    }

    pub(super) fn read32(&mut self, at: u64) -> anyhow::Result<(u32, u32)> {
        let answer = self.qemu.tell(format_args!("readl {:#x}", UNIT + at));
        let theirs = number(&self.qemu.answers()?, answer)?;
        let mut data = [0; 4];
        self.vtd.read(at, &mut data);
        Ok((u32::try_from(theirs)?, u32::from_le_bytes(data)))
    }

    fn ours(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.vtd.read(at, &mut data);
        u64::from_le_bytes(data)
    }

    /// Reads words of both memories; QEMU's come first.
    pub(super) fn peek(&mut self, places: &[u64]) -> anyhow::Result<Vec<(u64, u64)>> {
        let asked: Vec<usize> =
            places.iter().map(|at| self.qemu.tell(format_args!("readq {at:#x}"))).collect();
        let answers = self.qemu.answers()?;
        let both = places.iter().zip(asked).map(|(at, asked)| {
            let ours = self.memory.word(*at).with_context(|| format!("{at:#x} is no memory"))?;
            Ok((number(&answers, asked)?, ours))
        });
        both.collect()
    }

    /// One access of 8 bytes by both devices. `places` is where it may lead, if there is memory: of writes all that have
    /// the pattern afterwards are seen. What a read of QEMU's device has got is in its `slot`, for
    /// [`Machine::read_back`]. Gives what is seen of QEMU and of ours.
    pub(super) fn access(
        &mut self,
        device: usize,
        request: Request,
        places: &[u64],
        slot: u64,
        keeps_record: bool,
    ) -> anyhow::Result<(Seen, Seen)> {
        let Request { iova, is_write, .. } = request;
        // Theirs.
        if device == 0 {
            ensure!(is_write, "iommu-testdev reads nothing");
            let bar = BARS[0];
            let halves = [(4, iova & 0xffff_ffff), (8, iova >> 32), (0xc, 8), (0x1c, SCRATCH), (0x20, 0)];
            for (register, value) in halves.into_iter().chain([(0x14, 1)]) {
                self.qemu.tell(format_args!("writel {:#x} {value:#x}", bar + register));
            }
            self.qemu.tell(format_args!("readl {bar:#x}"));
        } else if is_write {
            self.buffer(device, iova, BUFFER_PATTERN, 8, true);
        } else {
            self.buffer(device, iova, slot * 8, 8, false);
        }
        let status = self.qemu.tell(format_args!("readl {:#x}", UNIT + r::FAULT_STATUS));
        let record = UNIT + self.record_at;
        let [low, high] = [0, 8].map(|half| self.qemu.tell(format_args!("readq {:#x}", record + half)));
        if !keeps_record {
            self.qemu.tell(format_args!("writel {:#x} 0x80000000", record + 12));
        }
        let asked: Vec<usize> =
            places.iter().map(|at| self.qemu.tell(format_args!("readq {at:#x}"))).collect();
        let answers = self.qemu.answers()?;
        let [status, low, high] = [status, low, high].map(|at| number(&answers, at));
        let theirs = asked.iter().map(|at| number(&answers, *at)).collect::<anyhow::Result<Vec<_>>>()?;
        let is_there = |(_, word): &(&u64, u64)| is_write && *word == PATTERN;
        let reached = places.iter().zip(theirs).filter(is_there).map(|(at, _)| *at).collect();
        let status = u32::try_from(status?)? & 0xff;
        let theirs = Seen { record: decoded(low?, high?), reached, status };

        // Ours.
        let access = if is_write { Access::WRITE } else { Access::READ };
        let reader = self.readers.get_mut(device).context("no such device")?;
        let reached = reader.enter().translate(Iova(iova), access).ok().map(|hit| hit.gpa.0);
        if let Some(gpa) = reached.filter(|_| is_write) {
            self.memory.write_obj(PATTERN, GuestAddress(gpa))?;
        }
        let mut data = [0; 4];
        self.vtd.read(r::FAULT_STATUS, &mut data);
        let status = u32::from_le_bytes(data);
        let at = r::FAULT_RECORDS + u64::from(status >> 8 & 0xff) * 16;
        let record = if status & 2 == 0 { None } else { decoded(self.ours(at), self.ours(at + 8)) };
        if !keeps_record && record.is_some() {
            self.vtd.write(at + 12, &0x8000_0000_u32.to_le_bytes());
        }
        let ours = Seen { record, reached: reached.into_iter().collect(), status: status & 0xff };
        Ok((theirs, ours))
    }

    /// Has an `edu` copy between memory and its buffer.
    fn buffer(&mut self, device: usize, memory: u64, place: u64, bytes: u64, to_memory: bool) {
        let (bar, place) = (BARS[device], BUFFER + place);
        let (from, to) = if to_memory { (place, memory) } else { (memory, place) };
        let run = 1 | u64::from(to_memory) << 1;
        for (register, value) in [(0x80, from), (0x88, to), (0x90, bytes), (0x98, run)] {
            self.qemu.tell(format_args!("writeq {:#x} {value:#x}", bar + register));
        }
        // It takes a tenth of a second, of QEMU's clock.
        self.qemu.tell(format_args!("clock_step 100000000"));
    }

    /// Clears all fault records, and what else is in the fault status.
    pub(super) fn clear_records(&mut self) -> anyhow::Result<()> {
        self.qemu.tell(format_args!("writel {:#x} 0x80000000", UNIT + self.record_at + 12));
        for record in 0..8 {
            self.vtd.write(r::FAULT_RECORDS + record * 16 + 12, &0x8000_0000_u32.to_le_bytes());
        }
        self.write32(r::FAULT_STATUS, 0x71)
    }

    /// What an `edu` has read into the slots of its buffer; translation must be off.
    pub(super) fn read_back(&mut self, device: usize, slots: u64) -> anyhow::Result<Vec<u64>> {
        self.buffer(device, SCRATCH, 0, slots * 8, true);
        let asked: Vec<usize> =
            (0..slots).map(|at| self.qemu.tell(format_args!("readq {:#x}", SCRATCH + at * 8))).collect();
        let answers = self.qemu.answers()?;
        asked.into_iter().map(|at| number(&answers, at)).collect()
    }
}

/// A fault record, if it is pending.
fn decoded(low: u64, high: u64) -> Option<Record> {
    let source = u16::try_from(high & 0xffff).unwrap_or(0);
    let reason = u8::try_from(high >> 32 & 0xff).unwrap_or(0);
    (high >> 63 == 1).then_some((source, reason, low, high >> 62 & 1 == 1))
}
