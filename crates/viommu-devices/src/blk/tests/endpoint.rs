//! Behind an IOMMU: memory is an endpoint's view.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use viommu::{Access, Domain, Endpoint, EndpointConfig, Gpa, Iommu, Iova, Mapping, Tables};
use viommu_memory::{EndpointSpace, ram_extents};
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::testing::PAGE;

const MEMORY: u64 = 1 << 20;

struct Behind {
    rig: Rig,
    _iommu: Iommu,
    domain: Domain,
    _endpoint: Endpoint,
    space: EndpointSpace<Arc<GuestMemoryMmap>>,
}

fn page(at: u64) -> Mapping {
    let at = at / PAGE * PAGE;
    Mapping::new(Iova(at), PAGE, Gpa(at), Access::RW).unwrap()
}

impl Behind {
    /// All memory mapped to itself, page by page.
    fn new() -> Self {
        let rig = Rig::with(64 * 512, MEMORY, &BlkOptions::default());
        let memory = Arc::clone(&rig.driver.space.memory);
        let extents = ram_extents(&*memory).unwrap();
        let builder = extents.into_iter().fold(Iommu::builder(), |builder, extent| builder.backing(extent));
        let iommu = builder.build().unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        endpoint.attach(1).unwrap().wait().unwrap();
        for at in (0..MEMORY).step_by(4096) {
            domain.map(page(at)).unwrap().wait().unwrap();
        }
        let space = EndpointSpace::new(endpoint.reader("disk").unwrap(), memory);
        Self { rig, _iommu: iommu, domain, _endpoint: endpoint, space }
    }

    fn process(&mut self) -> Result<Processed, QueueError> {
        self.rig.blk.process(self.rig.features, &mut self.rig.driver.queue, &self.space)
    }
}

#[test]
fn unmap_between_two_batches_is_complete_at_once_and_the_next_request_fails() {
    let mut behind = Behind::new();
    let write = behind.rig.offer(kind::OUT, 0, &[1; 512], 0);
    behind.process().unwrap();
    assert_eq!(behind.rig.driver.answer(&write), [OK]);

    // Its own page for the data; nothing holds it between two calls.
    let data = behind.rig.driver.room(512, PAGE);
    behind.rig.driver.room(1, PAGE);
    let mut done = behind.domain.unmap(page(data).range).unwrap();
    assert!(done.is_complete());
    let header = behind.rig.driver.room(16, 1);
    behind.rig.driver.write(header, &request(kind::IN, 0, &[]));
    let status = behind.rig.driver.room(1, 1);
    let piece = |at, len, write| crate::testing::Piece { at, len, write };
    behind.rig.driver.offer(&[piece(header, 16, false), piece(data, 512, true), piece(status, 1, true)]);
    behind.process().unwrap();
    assert_eq!(behind.rig.driver.read(status, 1), [IOERR]);
    assert_eq!(behind.rig.driver.read(data, 512), [0; 512]);

    // Without its ring, it needs a reset.
    let mut done = behind.domain.unmap(page(crate::testing::AVAIL).range).unwrap();
    assert!(done.is_complete());
    assert!(matches!(behind.process(), Err(QueueError::Ring(_))));
}

#[test]
fn unmap_while_the_disk_is_slow_does_not_wait_for_it() {
    let mut behind = Behind::new();
    let in_disk = Arc::new(AtomicBool::new(false));
    let go_on = Arc::new(AtomicBool::new(false));
    let (entered, released) = (Arc::clone(&in_disk), Arc::clone(&go_on));
    behind.rig.disk.judge(move |_| {
        entered.store(true, Ordering::SeqCst);
        while !released.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Ok(())
    });
    let read = behind.rig.offer(kind::IN, 0, &[], 512);
    let data = read.pieces.iter().find(|piece| piece.write).unwrap().at;
    let domain = behind.domain.clone();
    let unmapped = std::thread::spawn(move || {
        while !in_disk.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let mut done = domain.unmap(page(data).range).unwrap();
        let outcome = done.wait_timeout(Duration::from_secs(20));
        go_on.store(true, Ordering::SeqCst);
        outcome.is_ok()
    });
    behind.process().unwrap();
    assert!(unmapped.join().unwrap(), "the unmap waited for the disk");
    // Nothing was written after it: neither the data nor the status, which lies on the same page.
    assert_eq!(behind.rig.driver.answer(&read), [UNTOUCHED; 513]);
    // So the driver does not get it back, to read an old status there.
    assert_eq!(behind.rig.driver.used(), []);
}
