//! The published client as a peer.

use std::os::fd::AsRawFd;

use vfio_user::Client;
use viommu_vfio_user::memory::Window;
use viommu_vfio_user::spec::{IrqAction, irq, region};

use crate::common::*;

#[test]
fn published_client_when_it_uses_the_function_finds_all_of_it() {
    let server = Running::new();
    let mut client = Client::new(&server.path).unwrap();
    let sizes: Vec<_> = (0..9).map(|index| client.region(index).unwrap().size).collect();
    assert_eq!(sizes, [0x4000, 0x1000, 0, 0, 0, 0, 0, 256, 0]);
    assert!(
        client.region(0).unwrap().file_offset.is_none() && client.region(0).unwrap().sparse_areas.is_empty()
    );
    let pin = client.get_irq_info(irq::INTX).unwrap();
    assert_eq!((pin.index, pin.flags, pin.count), (irq::INTX, 7, 1));
    let msix = client.get_irq_info(irq::MSIX).unwrap();
    assert_eq!((msix.index, msix.flags, msix.count), (irq::MSIX, 1, 3));

    let mut id = [0; 4];
    client.region_read(region::CONFIG, 0, &mut id).unwrap();
    assert_eq!(id, [0xf4, 0x1a, 0x6a, 0x10]);
    client.region_write(region::CONFIG, 0x3c, &[7]).unwrap();
    let mut line = [0];
    client.region_read(region::CONFIG, 0x3c, &mut line).unwrap();
    assert_eq!(line, [7]);

    let file = memory("peer", 8);
    client.dma_map(4 * PAGE, 0x10_0000, 4 * PAGE, file.as_raw_fd()).unwrap();
    assert_eq!(
        server.windows.list(),
        [Window { address: 0x10_0000, size: 4 * PAGE, memory: true, read_only: false }]
    );
    let set = (IrqAction::DATA_EVENTFD | IrqAction::TRIGGER).bits();
    let events = [event(), event(), event()];
    let fds: Vec<_> = events.iter().map(AsRawFd::as_raw_fd).collect();
    client.set_irqs(irq::MSIX, set, 0, 3, &fds).unwrap();

    drive(&mut client, 0x10_0000);
    // What lies at 0x10_0000 for the device starts at the fifth page of the file.
    offer_at(&file, 4 * PAGE, 0x10_0000, b"published");
    client.region_write(0, 0x3000, &[0, 0]).unwrap();
    assert_eq!(raised(&events[1]), 1);
    assert_eq!(answered(&file, 6 * PAGE, 9), b"published");

    client.reset().unwrap();
    client.region_read(region::CONFIG, 0x3c, &mut line).unwrap();
    assert_eq!(line, [0]);
    client.dma_unmap(0x10_0000, 4 * PAGE).unwrap();
    assert_eq!(server.windows.list(), []);
    client.shutdown().unwrap();
    server.cleaned();
    Client::new(&server.path).unwrap();
}

/// As [`crate::common::Client::drive`] does.
fn drive(client: &mut Client, rings: u64) {
    client.region_write(0, 0x14, &[3]).unwrap();
    client.region_write(0, 0x08, &[1, 0, 0, 0]).unwrap();
    client.region_write(0, 0x0c, &[1, 0, 0, 0]).unwrap();
    client.region_write(0, 0x14, &[11]).unwrap();
    for (register, address) in [(0x20, rings), (0x28, rings + 0x400), (0x30, rings + 0x800)] {
        client.region_write(0, register, &address.to_le_bytes()).unwrap();
    }
    client.region_write(0, 0x1a, &[1, 0]).unwrap();
    client.region_write(0, 0x1c, &[1, 0]).unwrap();
    client.region_write(0, 0x14, &[15]).unwrap();
    let mut status = [0];
    client.region_read(0, 0x14, &mut status).unwrap();
    assert_eq!(status, [15]);
}
