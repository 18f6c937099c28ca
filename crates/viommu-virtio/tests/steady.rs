//! What requests cost in memory: none each in the steady state, and never more than the caps allow.

use std::sync::Arc;

use viommu::Iommu;
use viommu_virtio::driver::{Driver, Request};
use viommu_virtio::spec::request::{AttachFlags, MapFlags, Status};
use viommu_virtio::{Config, EndpointPlan, RequestQueue, VirtioIommu};
use vm_memory::{GuestAddress, GuestMemoryMmap};

type Memory = Arc<GuestMemoryMmap>;

const PAGE: u64 = 4096;

struct Guest {
    device: VirtioIommu,
    driver: Driver<Memory>,
    requests: RequestQueue<Memory>,
}

fn guest(table_bytes: u64) -> Guest {
    let bytes = usize::try_from(Driver::<Memory>::bytes(256, 512)).unwrap().next_multiple_of(4096);
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap());
    let builder = Iommu::builder().ram(0, 1 << 30).table_bytes(table_bytes);
    let device = VirtioIommu::new(builder, Config::default()).unwrap();
    device.add_endpoint(8, EndpointPlan::default()).unwrap();
    let driver = Driver::new(memory.clone(), 0, 256, 512).unwrap();
    let requests = device.request_queue(driver.request_queue().unwrap(), memory, || {});
    let mut guest = Guest { device, driver, requests };
    guest.ask(&Request::Attach { domain: 1, endpoint: 8, flags: AttachFlags::empty() });
    assert_eq!(guest.kick(), [Status::OK]);
    guest
}

impl Guest {
    fn ask(&mut self, request: &Request) {
        self.driver.push(request).unwrap();
    }

    fn kick(&mut self) -> Vec<Status> {
        self.requests.process().unwrap();
        self.driver.complete().unwrap().iter().map(|answer| answer.status().unwrap()).collect()
    }

    fn map(&mut self, page: u64) {
        let flags = MapFlags::READ | MapFlags::WRITE;
        let (virt_start, phys_start) = (page * PAGE, (page % 1000) * PAGE);
        let virt_end = virt_start + (PAGE - 1);
        self.ask(&Request::Map { domain: 1, virt_start, virt_end, phys_start, flags });
    }

    fn unmap(&mut self, page: u64) {
        let virt_start = page * PAGE;
        self.ask(&Request::Unmap { domain: 1, virt_start, virt_end: virt_start + (PAGE - 1) });
    }
}

/// Requests, and the allocations they make, in kicks of so many pairs once all buffers have their size.
fn allocations(pairs: u64) -> (u64, u64) {
    let mut guest = guest(8 << 20);
    let (mut requests, mut allocations) = (0, 0);
    for round in 0..60 {
        for page in 0..pairs {
            guest.map(page);
            guest.unmap(page);
        }
        let info = allocation_counter::measure(|| {
            guest.requests.process().unwrap();
        });
        let answers = guest.driver.complete().unwrap().len() as u64;
        assert_eq!(answers, pairs * 2);
        if round >= 10 {
            requests += answers;
            allocations += info.count_total;
        }
    }
    (requests, allocations)
}

#[test]
fn requests_when_the_buffers_have_their_size_allocate_nothing_each() {
    for pairs in [1, 4, 60] {
        let (requests, allocations) = allocations(pairs);
        // The table gives emptied nodes back in batches, each with a list of its own.
        assert!(allocations * 50 <= requests, "{allocations} allocations for {requests} requests");
    }
}

#[test]
fn map_when_a_guest_fills_memory_is_nomem_at_the_cap() {
    const CAP: u64 = 1 << 20;
    let mut guest = guest(CAP);
    // One page in each GiB: the layout that costs most below 2^48.
    let (mut mapped, mut page) = (0_u64, 0_u64);
    let before = allocation_counter::measure(|| {
        loop {
            guest.map(page);
            page += 1 << 18;
            match guest.kick()[..] {
                [Status::OK] => mapped += 1,
                [Status::NOMEM] => break,
                ref other => panic!("{other:?}"),
            }
        }
    });
    let tables = guest.device.iommu().table_bytes();
    assert!(tables <= CAP && mapped > CAP / 400, "{mapped} mappings in {tables} bytes");
    assert!(tables / mapped <= 400, "{} bytes a mapping", tables / mapped);
    // Besides the tables nothing grows with the mappings.
    assert!(before.bytes_current.unsigned_abs() < 64 << 10, "{} bytes are held", before.bytes_current);
    // Nothing is lost: what is mapped can go, and then there is room again.
    guest.ask(&Request::Unmap { domain: 1, virt_start: 0, virt_end: u64::MAX });
    assert_eq!(guest.kick(), [Status::OK]);
    guest.map(7);
    assert_eq!(guest.kick(), [Status::OK]);
}
