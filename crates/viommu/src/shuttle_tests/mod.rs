//! Whole steps among concurrent readers, fills, subscribers and leaves, in many random schedules.
//!
//! Pages of guest memory are never used twice, so that the oracle is simple: a page is let go when the completion of
//! what took it away has resolved, and whoever uses it after that has failed.

mod endings;
mod moves;
mod nodes;
mod peers;
mod steps;
mod subscribers;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::sync::{Arc, Mutex};

use crate::addr::{Gpa, Iova, IovaRange};
use crate::domain::{Domain, Tables};
use crate::iommu::{Endpoint, EndpointConfig, Iommu};
use crate::mapping::{Access, Mapping};
use crate::reader::Reader;

/// Runs a model in many schedules of either kind: four thousand in all.
fn check(model: fn()) {
    run(RandomScheduler::new(2500), model);
    run(PctScheduler::new(3, 1500), model);
}

fn run(scheduler: impl Scheduler + 'static, model: fn()) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 18;
    shuttle::Runner::new(scheduler, config).run(model);
}

fn roll(sides: u64) -> u64 {
    thread_rng().gen_range(0..sides)
}

const PAGE: u64 = 4096;
const PAGES: u64 = 256;

/// Guest memory.
struct Memory {
    next: AtomicU64,
    gone: Vec<AtomicBool>,
}

impl Memory {
    fn new() -> Arc<Self> {
        let gone = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
        Arc::new(Self { next: AtomicU64::new(0), gone })
    }

    /// A page that nobody has used.
    fn page(&self) -> Gpa {
        Gpa(self.next.fetch_add(1, Ordering::Relaxed) * PAGE)
    }

    fn of(&self, gpa: Gpa) -> &AtomicBool {
        &self.gone[usize::try_from(gpa.0 / PAGE).unwrap()]
    }

    fn let_go(&self, gpa: Gpa) {
        self.of(gpa).store(true, Ordering::SeqCst);
    }

    /// It may be used again: where a page comes back with its endpoint.
    fn take_back(&self, gpa: Gpa) {
        self.of(gpa).store(false, Ordering::SeqCst);
    }

    fn access(&self, gpa: Gpa) {
        assert!(!self.of(gpa).load(Ordering::SeqCst), "an access to {gpa} after it was let go");
    }
}

fn unit() -> Iommu {
    // A small arena: a model checker's words are no plain memory, and each schedule makes them anew.
    Iommu::builder().ram(0, PAGES * PAGE).table_bytes(1 << 15).build().unwrap()
}

/// A unit with a domain of number 1 and an endpoint in it.
fn domain_and_endpoint() -> (Iommu, Domain, Endpoint) {
    let iommu = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let endpoint = iommu.add_endpoint(1, EndpointConfig::default()).unwrap();
    endpoint.attach(1).unwrap().wait().unwrap();
    (iommu, domain, endpoint)
}

/// The page at place `at` of a domain.
fn place(at: usize) -> IovaRange {
    IovaRange::from_len(Iova(at as u64 * PAGE), PAGE).unwrap()
}

fn page_at(at: usize, gpa: Gpa) -> Mapping {
    Mapping::over(place(at), gpa, Access::RW).unwrap()
}

/// One batch of a device: translates some places, and uses what it got until the end.
fn batch(reader: &mut Reader, memory: &Memory, places: usize) {
    let guard = reader.enter();
    let mut pages = Vec::new();
    for at in 0..places {
        if let Ok(hit) = guard.translate(place(at).start(), Access::READ) {
            memory.access(hit.gpa);
            pages.push(hit.gpa);
        }
    }
    pages.into_iter().for_each(|gpa| memory.access(gpa));
}

/// A guest's driver: it knows what it has mapped where.
struct Driver<const N: usize> {
    domain: Domain,
    memory: Arc<Memory>,
    places: [Option<Gpa>; N],
}

impl<const N: usize> Driver<N> {
    fn new(domain: &Domain, memory: &Arc<Memory>) -> Self {
        Self { domain: domain.clone(), memory: memory.clone(), places: [None; N] }
    }

    fn map_all(&mut self) {
        for at in 0..N {
            self.map(at);
        }
    }

    fn map(&mut self, at: usize) {
        let page = self.memory.page();
        self.domain.map(page_at(at, page)).unwrap().wait().unwrap();
        self.places[at] = Some(page);
    }

    /// Unmaps one place; gives the page that may go now.
    fn unmap(&mut self, at: usize) -> Option<Gpa> {
        self.domain.unmap(place(at)).unwrap().wait().unwrap();
        self.places[at].take()
    }

    fn replace(&mut self, at: usize) -> Option<Gpa> {
        let page = self.memory.page();
        self.domain.replace(page_at(at, page)).unwrap().wait().unwrap();
        self.places[at].replace(page)
    }

    /// All places become others, in one step. Descending pages: no two neighbours are linear, unless steps are mixed.
    fn replace_all(&mut self) -> Vec<Gpa> {
        let mut pages: [Gpa; N] = core::array::from_fn(|_| self.memory.page());
        pages.reverse();
        let mut changes = self.domain.batch();
        for (at, page) in pages.iter().enumerate() {
            changes = changes.replace(page_at(at, *page));
        }
        changes.commit().unwrap().wait().unwrap();
        self.places.iter_mut().zip(pages).filter_map(|(place, page)| place.replace(page)).collect()
    }

    /// Unmaps all in a burst.
    fn unmap_all(&mut self) -> Vec<Gpa> {
        let mut burst = self.domain.burst().unwrap();
        for at in 0..N {
            burst.unmap(place(at)).unwrap();
        }
        burst.finish().wait().unwrap();
        self.places.iter_mut().filter_map(Option::take).collect()
    }

    /// Any step; gives the pages that it has taken away for good.
    fn any_step(&mut self) -> Vec<Gpa> {
        let at = usize::try_from(roll(N as u64)).unwrap();
        match (roll(5), self.places[at]) {
            (0, _) => self.replace_all(),
            (1, _) => self.unmap_all(),
            (2, Some(_)) => self.replace(at).into_iter().collect(),
            (_, Some(_)) => self.unmap(at).into_iter().collect(),
            (_, None) => {
                self.map(at);
                Vec::new()
            }
        }
    }

    fn let_go(&self, pages: Vec<Gpa>) {
        pages.into_iter().for_each(|gpa| self.memory.let_go(gpa));
    }

    fn mappings(&self) -> Vec<Mapping> {
        self.places.iter().enumerate().filter_map(|(at, page)| Some(page_at(at, (*page)?))).collect()
    }
}
