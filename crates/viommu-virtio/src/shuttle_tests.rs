//! The device among its threads, in many random schedules: a driver and the worker of the request queue, devices that do
//! DMA under guards, a reset, and an endpoint that is unplugged.
//!
//! Pages of guest memory are never used twice, so that the oracle is simple: a page is let go when the driver has the
//! answer to its UNMAP, or when the reset is over, and whoever uses it after that has failed.

use std::sync::Arc;
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::thread;
use viommu::{Access, Iommu, Iova, Reader};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::driver::{Driver, Request};
use crate::spec::request::{AttachFlags, MapFlags, Status};
use crate::{Config, EndpointPlan, RequestQueue, VirtioIommu};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
const PLACES: u64 = 2;
const ENDPOINTS: [u32; 2] = [8, 9];

type Ram = Arc<GuestMemoryMmap>;

fn check(model: fn()) {
    run(RandomScheduler::new(400), model);
    run(PctScheduler::new(3, 300), model);
}

fn run(scheduler: impl Scheduler + 'static, model: fn()) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 18;
    shuttle::Runner::new(scheduler, config).run(model);
}

/// Guest memory: which pages are let go.
struct Pages {
    next: AtomicU64,
    gone: Vec<AtomicBool>,
}

impl Pages {
    fn page(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn of(&self, page: u64) -> &AtomicBool {
        &self.gone[usize::try_from(page).unwrap()]
    }

    fn access(&self, page: u64) {
        assert!(!self.of(page).load(Ordering::SeqCst), "an access to page {page} after it was let go");
    }
}

struct Machine {
    device: VirtioIommu,
    pages: Pages,
    /// The guest and the worker of its queue: whoever has it is the one vCPU, or the transport at a reset.
    guest: Mutex<Guest>,
}

struct Guest {
    driver: Driver<Ram>,
    requests: RequestQueue<Ram>,
    places: [Option<u64>; PLACES as usize],
}

fn machine() -> (Arc<Machine>, Vec<Reader>) {
    let bytes = usize::try_from(Driver::<Ram>::bytes(8, 64)).unwrap().next_multiple_of(4096);
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap());
    let builder = Iommu::builder().ram(0, PAGES * PAGE).table_bytes(1 << 15);
    let config = Config { bypass: false, probe_size: 64, ..Config::default() };
    let device = VirtioIommu::new(builder, config).unwrap();
    let readers = ENDPOINTS.iter().map(|id| {
        let added = device.add_endpoint(*id, EndpointPlan::default()).unwrap();
        added.endpoint.reader("worker").unwrap()
    });
    let readers = readers.collect();
    let driver = Driver::new(memory.clone(), 0, 8, 64).unwrap();
    let requests = device.request_queue(driver.request_queue().unwrap(), memory, || {});
    let mut guest = Guest { driver, requests, places: [None; PLACES as usize] };
    guest.attach();
    let gone = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
    let pages = Pages { next: AtomicU64::new(0), gone };
    (Arc::new(Machine { device, pages, guest: Mutex::new(guest) }), readers)
}

impl Guest {
    /// Kicks and waits, as Linux does: for all that is out.
    fn statuses(&mut self) -> Vec<Status> {
        self.requests.process().unwrap();
        self.requests.wait(Duration::from_secs(3600)).unwrap();
        self.driver.complete().unwrap().iter().map(|answer| answer.status().unwrap()).collect()
    }

    fn attach(&mut self) {
        for endpoint in ENDPOINTS {
            let flags = AttachFlags::empty();
            self.driver.push(&Request::Attach { domain: 1, endpoint, flags }).unwrap();
        }
        // One may have been unplugged.
        assert!(self.statuses().contains(&Status::OK));
    }

    fn map(&mut self, at: u64, page: u64) {
        let flags = MapFlags::READ | MapFlags::WRITE;
        let (virt_start, phys_start) = (at * PAGE, page * PAGE);
        let request =
            Request::Map { domain: 1, virt_start, virt_end: virt_start + PAGE - 1, phys_start, flags };
        self.driver.push(&request).unwrap();
        self.places[usize::try_from(at).unwrap()] = Some(page);
    }

    fn unmap(&mut self, at: u64) -> Option<u64> {
        let virt_start = at * PAGE;
        self.driver.push(&Request::Unmap { domain: 1, virt_start, virt_end: virt_start + PAGE - 1 }).unwrap();
        self.places[usize::try_from(at).unwrap()].take()
    }
}

/// Maps and unmaps pages in batches of one kick.
fn drive(machine: &Machine, rounds: u64) {
    for _ in 0..rounds {
        let mut guest = machine.guest.lock().unwrap();
        let mut gone = Vec::new();
        for at in 0..PLACES {
            if thread_rng().gen_bool(0.7) {
                gone.extend(guest.unmap(at));
                guest.map(at, machine.pages.page());
            }
        }
        assert!(guest.statuses().iter().all(|status| *status == Status::OK));
        gone.into_iter().for_each(|page| machine.pages.of(page).store(true, Ordering::SeqCst));
    }
}

/// A device's batches: translates all places, and uses what it got until the end of the batch.
fn dma(machine: &Machine, reader: &mut Reader, batches: u64) {
    for _ in 0..batches {
        let guard = reader.enter();
        let hits = (0..PLACES).filter_map(|at| guard.translate(Iova(at * PAGE), Access::WRITE).ok());
        let pages: Vec<u64> = hits.map(|hit| hit.gpa.0 / PAGE).collect();
        pages.iter().for_each(|page| machine.pages.access(*page));
        thread::yield_now();
        pages.iter().for_each(|page| machine.pages.access(*page));
    }
}

fn devices(machine: &Arc<Machine>, readers: Vec<Reader>) -> Vec<thread::JoinHandle<()>> {
    let spawn = |reader: Reader| {
        let machine = machine.clone();
        let mut reader = reader;
        thread::spawn(move || dma(&machine, &mut reader, 2))
    };
    readers.into_iter().map(spawn).collect()
}

#[test]
fn answers_when_devices_are_inside_come_after_them() {
    check(|| {
        let (machine, readers) = machine();
        let threads = devices(&machine, readers);
        drive(&machine, 3);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn reset_when_answers_are_pending_lets_nothing_through() {
    check(|| {
        let (machine, readers) = machine();
        let threads = devices(&machine, readers);
        drive(&machine, 1);
        {
            // A kick without the wait: the answers of this one may be pending when the reset comes.
            let mut guest = machine.guest.lock().unwrap();
            let gone = guest.unmap(0);
            guest.requests.process().unwrap();
            let answered = !guest.driver.complete().unwrap().is_empty();
            let mut reset = machine.device.reset();
            reset.completion.merge(guest.requests.reset());
            if !answered {
                assert!(guest.driver.complete().unwrap().is_empty(), "an answer after the reset began");
            }
            reset.completion.wait().unwrap();
            let all = guest.places.iter_mut().filter_map(Option::take).chain(gone);
            all.for_each(|page| machine.pages.of(page).store(true, Ordering::SeqCst));
            // The driver starts anew.
            guest.driver.reset().unwrap();
            *guest.requests.queue_mut() = guest.driver.request_queue().unwrap();
            guest.attach();
        }
        drive(&machine, 1);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn unplug_when_the_guest_goes_on_lets_go_of_the_endpoint_alone() {
    check(|| {
        let (machine, readers) = machine();
        let threads = devices(&machine, readers);
        let other = {
            let machine = machine.clone();
            thread::spawn(move || {
                let done = machine.device.remove_endpoint(ENDPOINTS[1]).unwrap();
                done.wait().unwrap();
                assert!(machine.device.endpoint(ENDPOINTS[1]).is_none());
            })
        };
        drive(&machine, 2);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        other.join().unwrap();
        assert_eq!(machine.device.iommu().endpoints_in(1).len(), 1);
    });
}
