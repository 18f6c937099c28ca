//! What is mapped, and how.

use std::fs::File;

use proptest::prelude::*;
use vm_memory::FileOffset;

use super::*;
use crate::iommufd::kernel::Place;

fn calls_of(rig: &Rig, step: impl FnOnce(&Domain)) -> Vec<Call> {
    rig.fake.take_calls();
    step(&rig.domains[0]);
    rig.check();
    rig.fake.take_calls()
}

#[test]
fn a_mapping_over_two_regions_is_two_maps_and_one_unmap() {
    let rig = Rig::new();
    let calls = calls_of(&rig, |domain| over(domain.map(rw(100, 103, 14)).unwrap()));
    let maps: Vec<(u64, u64)> = (calls.iter())
        .map(|call| match call {
            Call::Map(Place { iova, .. }, vaddr) => (*iova, *vaddr),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(maps, [(100 * PAGE, rig.host(14)), (102 * PAGE, rig.host(16))]);
    assert_eq!(rig.handle.entries(), 2);
    let calls = calls_of(&rig, |domain| over(domain.unmap(pages(0, 200)).unwrap()));
    assert_eq!(calls, [Call::Unmap(100 * PAGE, 4 * PAGE)], "exactly what was mapped");
}

#[test]
fn an_unmap_of_nothing_asks_the_kernel_nothing() {
    let rig = Rig::new();
    assert_eq!(calls_of(&rig, |domain| over(domain.unmap(IovaRange::ALL).unwrap())), []);
}

#[test]
fn registers_and_what_has_no_backing_are_not_mapped() {
    let rig = Rig::new();
    assert_eq!(calls_of(&rig, |domain| over(domain.map(rw(0, 1, 256)).unwrap())), []);
    assert_eq!(calls_of(&rig, |domain| over(domain.map(rw(8, 9, 1000)).unwrap())), []);
    // Neither is in the way of a removal.
    assert_eq!(calls_of(&rig, |domain| over(domain.unmap(pages(0, 9)).unwrap())), []);
}

#[test]
fn read_only_memory_is_mapped_read_only() {
    let rig = Rig::new();
    let calls = calls_of(&rig, |domain| over(domain.map(rw(0, 15, 64)).unwrap()));
    let accesses: Vec<Access> = (calls.iter())
        .map(|call| match call {
            Call::Map(place, _) => place.access,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(accesses, [Access::RW, Access::READ]);
}

#[test]
fn memory_that_goes_and_comes_back_is_unmapped_and_mapped() {
    let rig = Rig::new();
    over(rig.domains[0].map(rw(0, 7, 64)).unwrap());
    let calls = calls_of(&rig, |_| over(rig.iommu.remove_backing(gpas(64, 71)).unwrap()));
    assert_eq!(calls, [Call::Unmap(0, 8 * PAGE)]);
    let extent = Extent { range: gpas(64, 71), medium: Medium::Ram };
    let calls = calls_of(&rig, |_| over(rig.iommu.add_backing(extent).unwrap()));
    assert!(matches!(calls[..], [Call::Map(..)]), "{calls:?}");
    assert_eq!(rig.handle.stale(), []);
}

/// A unit whose memory is a file's from the third page on, mapped by files; what the kernel got for two pages.
fn mapped_by_files(kernel_can: bool, refuses: Option<Errno>) -> (Vec<Call>, Vec<Area>) {
    let file = tempfile();
    file.set_len(16 * PAGE).unwrap();
    let region = (GuestAddress(0), usize::try_from(8 * PAGE).unwrap(), Some(FileOffset::new(file, 2 * PAGE)));
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges_with_files([region]).unwrap());
    let fake = Fake::new();
    fake.lock().files = kernel_can;
    let iommu = Iommu::builder().ram(0, 8 * PAGE).build().unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
    let (binding, handle) = Iommufd::over(Arc::new(fake.clone())).by_files().binding(memory);
    let binding = iommu.add_binding(Box::new(binding));
    let device = fake.device(0, false, None);
    let number = device.id();
    handle.add(endpoint.id(), device).unwrap();
    over(endpoint.bind_with(&binding).unwrap());
    over(endpoint.attach(1).unwrap());
    if let Some(errno) = refuses {
        let mut fake = fake.lock();
        fake.once = true;
        fake.faults.push((Kind::Map, 0, errno));
    }
    fake.take_calls();
    over(domain.map(rw(50, 51, 3)).unwrap());
    (fake.take_calls(), fake.reached(number))
}

fn tempfile() -> File {
    let path = std::env::temp_dir().join(format!("viommu-iommufd-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

#[test]
fn memory_of_files_is_mapped_by_them_where_the_kernel_can() {
    // One after the other: the file's name is the same.
    let (calls, reached) = mapped_by_files(true, None);
    assert!(matches!(calls[..], [Call::MapFile(_, start)] if start == 5 * PAGE), "{calls:?}");
    assert_eq!(reached[0].source, Source::File(5 * PAGE));
    // An older kernel, and a file that is no memfd: by its address.
    for (can, refuses) in [(false, None), (true, Some(Errno::EINVAL))] {
        let (calls, reached) = mapped_by_files(can, refuses);
        assert!(matches!(calls.last(), Some(Call::Map(..))), "{calls:?}");
        assert!(matches!(reached[0].source, Source::Address(_)));
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map(Mapping),
    Replace(Mapping),
    Unmap(u64, u64),
    Batch(u64, u64, Mapping),
    /// Where one endpoint goes: a domain, identity, or nothing.
    Move(usize, u32),
    Backing(bool),
    /// The next call of a kind but so many is refused.
    Refuse(Kind, usize, Errno),
}

fn mapping() -> impl Strategy<Value = Mapping> {
    // A window's border and all kinds of backing are among them.
    let starts = prop_oneof![0..24_u64, 0xfedfc..0xfee04_u64, (1 << 36) - 4..(1_u64 << 36) + 1];
    let targets = prop_oneof![0..40_u64, 62..82_u64, 254..266_u64, 510..522_u64];
    (starts, 0..12_u64, targets, 0..4_u8).prop_map(|(first, more, gpa, access)| {
        map_of(first, first + more, gpa, Access::from_bits_truncate(access))
    })
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![Just(Kind::Map), Just(Kind::Attach), Just(Kind::Hwpt), Just(Kind::Alloc)];
    let errno = prop_oneof![Just(Errno::ENOMEM), Just(Errno::EFAULT), Just(Errno::EINVAL)];
    prop_oneof![
        6 => mapping().prop_map(Op::Map),
        4 => mapping().prop_map(Op::Replace),
        4 => (0..24_u64, 0..24_u64).prop_map(|(first, more)| Op::Unmap(first, first + more)),
        1 => Just(Op::Unmap(0, u64::MAX / PAGE)),
        2 => (0..24_u64, 0..24_u64, mapping()).prop_map(|(first, more, m)| Op::Batch(first, first + more, m)),
        4 => (0..2_usize, 0..4_u32).prop_map(|(which, to)| Op::Move(which, to)),
        1 => any::<bool>().prop_map(Op::Backing),
        2 => (kind, 0..3_usize, errno).prop_map(|(kind, good, errno)| Op::Refuse(kind, good, errno)),
    ]
}

fn run(rig: &Rig, op: &Op) {
    // What is refused is for the model; that all is right afterwards is what is looked at.
    let settled = |outcome: Result<Completion, viommu::StepError>| {
        over(outcome.unwrap_or_else(|error| error.completion));
    };
    let domain = &rig.domains[0];
    match op {
        Op::Map(m) => settled(domain.map(*m)),
        Op::Replace(m) => settled(domain.replace(*m)),
        Op::Unmap(first, last) => settled(domain.unmap(pages(*first, *last))),
        Op::Batch(first, last, m) => settled(domain.batch().unmap(pages(*first, *last)).map(*m).commit()),
        Op::Move(which, to) => {
            let endpoint = &rig.endpoints[*which];
            let outcome = match to {
                0 => endpoint.block(),
                3 => endpoint.attach_identity(),
                domain => endpoint.attach(*domain),
            };
            over(outcome.unwrap_or_else(|error| error.completion));
        }
        Op::Backing(there) => {
            let extent = Extent { range: gpas(64, 71), medium: Medium::Ram };
            settled(if *there {
                rig.iommu.add_backing(extent)
            } else {
                rig.iommu.remove_backing(extent.range)
            });
        }
        Op::Refuse(kind, good, errno) => {
            let mut fake = rig.fake.lock();
            fake.once = true;
            fake.faults.push((*kind, *good, *errno));
        }
    }
}

proptest! {
    #[test]
    fn after_any_step_devices_reach_what_the_record_says(ops in prop::collection::vec(op(), 1..40)) {
        let rig = Rig::new();
        over(rig.domains[1].map(rw(3, 9, 20)).unwrap());
        for op in &ops {
            run(&rig, op);
            rig.check();
        }
        rig.fake.heal();
        for endpoint in &rig.endpoints {
            let _ = endpoint.block().map(over);
        }
        let (ioases, tables) = rig.fake.objects();
        prop_assert_eq!((ioases, tables), (0, 0), "something is left behind");
    }
}
