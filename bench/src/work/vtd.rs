//! A VT-d unit: invalidations with a mirror, and translations that it has or has to walk.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use viommu::{Endpoint, Interest, Iommu, Reader};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Progress, Vtd, Width};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::clock::{Cpu, per_call};
use crate::load::{Effort, HIGH_RAM, LOW_RAM, PAGE, Random, gpa, iova};
use crate::ours::{BATCH, Idle, look};
use crate::work::Figures;

/// Memory for tables, the queue and the driver's status word.
const MEMORY: usize = 64 << 20;
const QUEUE: u64 = 0x1000;
const STATUS: u64 = 0x2000;
const ROOT: u64 = 0x3000;
const CONTEXTS: u64 = 0x4000;
const TABLES: u64 = 0x5000;
/// Pages that the unit's IOTLB has room for.
const HOT: u64 = 256;

struct Unit {
    memory: Arc<GuestMemoryMmap<()>>,
    vtd: Vtd,
    endpoint: Endpoint,
    reader: Reader,
    tail: u64,
}

impl Unit {
    /// One that translates through tables with so many pages.
    fn new(width: Width, pages: u64) -> anyhow::Result<Self> {
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?);
        let builder = Iommu::builder().ram(LOW_RAM.0, LOW_RAM.1).ram(HIGH_RAM.0, HIGH_RAM.1);
        let vtd = Vtd::new(builder, memory.clone(), Config { width, ..Config::default() })?;
        let endpoint = vtd.add_endpoint(16).map_err(|kind| anyhow::anyhow!("{kind}"))?;
        let reader = endpoint.reader("bench").context("it has just come")?;
        let unit = Self { memory, vtd, endpoint, reader, tail: 0 };
        let levels = if width == Width::Bits39 { 3 } else { 4 };
        let mut free = TABLES + PAGE;
        for page in 0..pages {
            let mut table = TABLES;
            for level in (2..=levels).rev() {
                let at = table + (iova(page) >> (3 + 9 * level) & 0x1ff) * 8;
                if unit.peek(at)? == 0 {
                    unit.poke(at, free | 3)?;
                    free += PAGE;
                }
                table = unit.peek(at)? & !0xfff;
            }
            unit.poke(table + (iova(page) >> 12 & 0x1ff) * 8, gpa(page, pages) | 3)?;
        }
        unit.poke(ROOT, CONTEXTS | 1)?;
        unit.poke(CONTEXTS + 16 * 16 + 8, 1 << 8 | (levels - 2))?;
        unit.poke(CONTEXTS + 16 * 16, TABLES | 1)?;
        unit.vtd.write(r::QUEUE_ADDRESS, &QUEUE.to_le_bytes());
        unit.vtd.write(r::ROOT_TABLE, &ROOT.to_le_bytes());
        for command in [1_u32 << 26, 1 << 26 | 1 << 30, 1 << 26 | 1 << 31] {
            unit.vtd.write(r::GLOBAL_COMMAND, &command.to_le_bytes());
            unit.settle();
        }
        Ok(unit)
    }

    fn peek(&self, at: u64) -> anyhow::Result<u64> {
        Ok(self.memory.read_obj(GuestAddress(at))?)
    }

    fn poke(&self, at: u64, value: u64) -> anyhow::Result<()> {
        Ok(self.memory.write_obj(value, GuestAddress(at))?)
    }

    fn settle(&self) {
        while self.vtd.process() == Progress::More {}
    }

    /// A descriptor and one that waits, as a driver sends them.
    fn invalidate(&mut self, low: u64, high: u64) {
        for [low, high] in [[low, high], [5 | 1 << 5 | 1 << 32, STATUS]] {
            let at = QUEUE + self.tail;
            self.poke(at, low).and_then(|()| self.poke(at + 8, high)).expect("memory");
            self.tail = (self.tail + 16) % PAGE;
        }
        self.vtd.write(r::QUEUE_TAIL, &self.tail.to_le_bytes());
        self.settle();
    }
}

/// Nanoseconds of an invalidation of one page that has changed, with a mirror; of one of everything, for each live page;
/// and of a translation.
pub(crate) fn ours(effort: Effort) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    let few = 1024;
    for (name, width, pages) in [
        ("39 few", Width::Bits39, few),
        ("48 few", Width::Bits48, few),
        ("39 many", Width::Bits39, effort.big()),
        ("48 many", Width::Bits48, effort.big()),
    ] {
        let mut unit = Unit::new(width, pages)?;
        let subscription = unit.endpoint.subscribe_mirror(Box::new(Idle), Interest::MIRROR)?;
        unit.settle();
        ensure!(subscription.counts().held == pages, "{} of {pages} pages", subscription.counts().held);
        for _ in 0..effort.rounds() {
            let start = Cpu::start();
            unit.invalidate(2 | 1 << 4, 0);
            figures.entry(format!("global {name}")).or_default().push(start.each(pages));
        }
        if name != "48 few" {
            continue;
        }
        // The leaf of the first page, in its table.
        let mut table = TABLES;
        for level in [4, 3, 2] {
            table = unit.peek(table + (iova(0) >> (3 + 9 * level) & 0x1ff) * 8)? & !0xfff;
        }
        let (leaf, mapped) = (table + (iova(0) >> 12 & 0x1ff) * 8, gpa(0, pages) | 3);
        for _ in 0..effort.rounds() {
            let mut is_mapped = true;
            let page = per_call(effort.budget(), || {
                is_mapped = !is_mapped;
                unit.poke(leaf, if is_mapped { mapped } else { 0 }).expect("memory");
                unit.invalidate(2 | 3 << 4 | 1 << 16, iova(0));
            });
            figures.entry("page".to_owned()).or_default().push(page);
            unit.poke(leaf, mapped)?;
        }
    }
    let count = effort.small();
    let mut unit = Unit::new(Width::Bits48, count)?;
    let mut owned = crate::ours::Ours::new()?;
    for page in 0..HOT {
        let done = crate::ours::map(&owned.domain, iova(page), PAGE, gpa(page, count));
        ensure!(done, "a map");
    }
    let mut random = Random(5);
    for _ in 0..effort.rounds() {
        for (name, pages) in [("hit", HOT), ("miss", count)] {
            let time = per_call(effort.budget(), || {
                let guard = unit.reader.enter();
                for _ in 0..BATCH {
                    black_box(look(&guard, random.page(pages)));
                }
            });
            figures.entry(name.to_owned()).or_default().push(time / BATCH as f64);
        }
        let time = per_call(effort.budget(), || {
            let guard = owned.reader.enter();
            for _ in 0..BATCH {
                black_box(look(&guard, random.page(HOT)));
            }
        });
        figures.entry("owned".to_owned()).or_default().push(time / BATCH as f64);
    }
    Ok(figures)
}
