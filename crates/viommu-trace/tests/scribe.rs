//! A unit whose endpoints are followed: its history is what was done, and nothing else.

use std::io::Cursor;
use std::sync::Arc;

use viommu::endpoint::{Region, RegionKind};
use viommu::{Access, EndpointConfig, EndpointId, Gpa, Iommu, Iova, IovaRange, Mapping, Tables, Target};
use viommu_trace::{Event, History, Recorder, Reserved, Scribe};

const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

#[test]
fn history_of_followed_endpoints_is_what_was_done() {
    let recorder = Arc::new(Recorder::new(Vec::new()).unwrap());
    let scribe = recorder.scribe();
    let iommu = Iommu::builder().ram(0, 0x10_0000).build().unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let msi = Region { range: range(MSI.0, MSI.1), kind: RegionKind::Msi };
    let config = || EndpointConfig { regions: vec![msi] };
    let [first, second] = [8, 16].map(|id| iommu.add_endpoint(id, config()).unwrap());
    let followed = [scribe.follow(&first).unwrap(), scribe.follow(&second).unwrap()];

    let page = |iova, gpa, access| Mapping::new(Iova(iova), 0x1000, Gpa(gpa), access).unwrap();
    drop(first.attach(1).unwrap());
    drop(second.attach(1).unwrap());
    drop(domain.map(page(0x1000, 0x8000, Access::READ)).unwrap());
    drop(domain.replace(page(0x1000, 0x9000, Access::RW)).unwrap());
    drop(first.block().unwrap());
    // The other one tells of the domain now.
    drop(domain.unmap(range(0, 0xffff)).unwrap());
    drop(second.attach_identity().unwrap());
    drop(followed);
    scribe.forget(EndpointId::new(16));
    drop(scribe);

    let bytes = Arc::into_inner(recorder).unwrap().finish().unwrap();
    let mut history = History::from_reader(Cursor::new(bytes), "recorded").unwrap();
    let events: Vec<Event> =
        core::iter::from_fn(|| history.next().unwrap()).map(|entry| entry.event).collect();
    let added = |endpoint| {
        let range = range(MSI.0, MSI.1);
        [Event::EndpointAdded { endpoint }, Event::ReservedRegion { endpoint, kind: Reserved::Msi, range }]
    };
    let attach = |endpoint| Event::Attach { domain: 1, endpoint, bypass: false };
    let at = range(0x1000, 0x1fff);
    let map = |gpa, access| Event::Map { domain: 1, range: at, gpa: Gpa(gpa), access, target: Target::Ram };
    let unmap = Event::Unmap { domain: 1, range: at };
    let mut expected = vec![Event::Config { page_sizes: !0xfff, input: IovaRange::ALL, bypass: false }];
    expected.extend([added(8), added(16)].concat());
    expected.extend([attach(8), attach(16), map(0x8000, Access::READ), unmap, map(0x9000, Access::RW)]);
    expected.extend([Event::Detach { domain: 1, endpoint: 8 }, unmap]);
    expected.push(Event::Attach { domain: Scribe::PASS, endpoint: 16, bypass: true });
    expected.push(Event::EndpointRemoved { endpoint: 16 });
    assert_eq!(events, expected);
}
