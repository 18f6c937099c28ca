//! What is mapped, in which calls.

use viommu::subscribe::{RefusalKind, Unreachable};
use viommu::{StepErrorKind, SubscribeError};

use super::*;

#[test]
fn reach_is_what_the_container_says() {
    let container = container_over(&Fake::new(Config { dma_entry_limit: 9, ..Config::x86_host() }));
    assert_eq!(container.info().page_size(), PAGE);
    let (mirror, _) = container.mirror(memory_of(&REGIONS));
    let reach = subscribe::Mirror::reach(&mirror);
    let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
    assert_eq!(reach.apertures, [range(0, 0xfedf_ffff), range(0xfef0_0000, (1 << 48) - 1)]);
    assert_eq!((reach.granule(), reach.entries), (PAGE, Some(9)));
    assert!(!reach.replace && reach.wide_unmap && !reach.batches);
}

#[test]
fn extent_over_two_regions_is_two_entries_and_one_unmap() {
    let rig = Rig::new();
    over(rig.domain.map(rw(100, 109, 12)).unwrap());
    let calls = rig.fake.take_calls();
    assert!(matches!(calls[..], [Call::Map(a), Call::Map(b)] if a.size == 4 * PAGE && b.size == 6 * PAGE));
    assert_eq!((rig.handle.entries(), rig.subscription.counts().held), (2, 1));
    rig.check();
    over(rig.domain.unmap(pages(100, 109)).unwrap());
    assert_eq!(rig.fake.take_calls(), [plain_unmap(pages(100, 109))]);
    assert_eq!(rig.handle.entries(), 0);
    rig.check();
}

#[test]
fn refusal_of_a_later_piece_leaves_none() {
    let rig = Rig::new();
    rig.fake.fail(Kind::Map, 1, Errno::ENOMEM);
    let error = rig.domain.map(rw(100, 109, 12)).unwrap_err();
    assert!(matches!(
        error.kind,
        StepErrorKind::Refused { refused: Refused { kind: RefusalKind::Resources, .. }, .. }
    ));
    assert_eq!((rig.fake.maps(), rig.handle.entries()), (0, 0));
    assert_eq!(rig.record(), []);
    rig.fake.heal();
    over(rig.domain.map(rw(100, 109, 12)).unwrap());
    rig.check();
}

#[test]
fn piece_that_cannot_be_taken_back_cuts_the_device_off() {
    let rig = Rig::new();
    rig.fake.fail(Kind::Map, 1, Errno::ENOMEM);
    rig.fake.fail(Kind::Unmap, 0, Errno::EIO);
    over(rig.domain.map(rw(100, 109, 12)).unwrap());
    assert_eq!(rig.record(), [rw(100, 109, 12)], "the others have it");
    rig.check_fenced();
}

#[test]
fn entries_are_counted_by_pieces() {
    let rig = Rig::with(|config| Config { dma_entry_limit: 3, ..config }, |c| c);
    over(rig.domain.map(rw(100, 109, 12)).unwrap());
    rig.fake.take_calls();
    // The record has room for two more extents; the container for one entry.
    let error = rig.domain.map(rw(120, 129, 12)).unwrap_err();
    let StepErrorKind::Refused { refused, .. } = error.kind else { panic!("{error}") };
    assert_eq!(
        (refused.kind, refused.reason.as_str()),
        (RefusalKind::Resources, "2 entries are wanted beside 2 of 3")
    );
    assert_eq!(rig.fake.take_calls(), [], "the kernel is not asked");
    over(rig.domain.map(rw(120, 120, 0)).unwrap());
    let error = rig.domain.map(rw(121, 121, 0)).unwrap_err();
    assert!(matches!(error.kind, StepErrorKind::Refused { .. }), "{error}");
    rig.check();
}

#[test]
fn out_of_reach_is_refused_before_the_kernel_is_asked() {
    let rig = Rig::new();
    let error = rig.domain.map(rw(0xfee00, 0xfee00, 0)).unwrap_err();
    assert!(matches!(error.kind, StepErrorKind::Unreachable { why: Unreachable::Aperture, .. }));
    assert_eq!(rig.fake.take_calls(), []);
    rig.check();
}

#[test]
fn read_only_memory_is_mapped_read_only_and_write_only_not_at_all() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 15, 64)).unwrap());
    over(rig.domain.map(map_of(20, 23, ROM.0, Access::WRITE)).unwrap());
    over(rig.domain.map(map_of(30, 30, 0, Access::WRITE)).unwrap());
    rig.check();
    let flags: Vec<_> = rig
        .fake
        .take_calls()
        .iter()
        .map(|call| matches!(call, Call::Map(m) if m.flags.bits() == 1))
        .collect();
    assert_eq!(flags, [false, true, false]);
}

#[test]
fn registers_are_mapped_where_this_process_has_them_and_else_left_out_and_known() {
    let rig = Rig::new();
    let near = rw(0, 3, BAR.0).mmio();
    let far = rw(8, 11, FAR_BAR.0).mmio();
    over(rig.domain.map(near).unwrap());
    over(rig.domain.map(far).unwrap());
    assert_eq!(rig.handle.left_out(), [far]);
    assert_eq!(rig.handle.entries(), 1);
    rig.check();
    rig.fake.take_calls();
    over(rig.domain.unmap(pages(8, 11)).unwrap());
    assert_eq!(rig.fake.take_calls(), [], "there is nothing to unmap");
    over(rig.domain.map(rw(4, 4, 0)).unwrap());
    over(rig.domain.map(far).unwrap());
    over(rig.domain.unmap(pages(0, 11)).unwrap());
    assert!(rig.handle.left_out().is_empty() && !rig.subscription.is_fenced());
    rig.check();
}

#[test]
fn registers_without_any_mapped_are_all_left_out() {
    let rig = Rig::with(|c| c, |container| Container { registers: None, ..container });
    let near = rw(0, 3, BAR.0).mmio();
    over(rig.domain.map(near).unwrap());
    assert_eq!((rig.handle.left_out(), rig.fake.maps()), (vec![near], 0));
}

#[test]
fn change_of_target_or_access_is_unmap_and_map() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    for new in [rw(0, 3, 8), map_of(0, 3, 8, Access::READ), rw(1, 2, 20)] {
        rig.fake.take_calls();
        over(rig.domain.replace(new).unwrap());
        let calls = rig.fake.take_calls();
        assert_eq!(calls[0], plain_unmap(pages(0, 3)));
        assert!(calls[1..].iter().all(|call| matches!(call, Call::Map(_))), "{calls:?}");
        rig.check();
    }
    rig.fake.take_calls();
    over(rig.domain.replace(rw(1, 2, 20)).unwrap());
    assert_eq!(rig.fake.take_calls(), [], "the same again is nothing");
}

#[test]
fn unmap_is_of_exactly_what_was_mapped() {
    let rig = Rig::new();
    over(rig.domain.map(rw(100, 103, 0)).unwrap());
    over(rig.domain.map(rw(110, 113, 4)).unwrap());
    // Something of the embedder's, below and above.
    for iova in [0x5_0000, 0x90_0000] {
        let vaddr = host_address(&rig.memory, 0).unwrap();
        let map = MapDma { flags: software::MapFlags::READ, vaddr, iova, size: PAGE };
        rig.fake.lock().container.map_dma(map).unwrap();
    }
    rig.fake.take_calls();
    over(rig.domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!(rig.fake.take_calls(), [plain_unmap(pages(100, 113))]);
    assert_eq!(rig.fake.maps(), 2);
    assert!(!rig.subscription.is_fenced());
}

#[test]
fn whole_address_space_is_in_reach_but_for_the_last_page() {
    let memory = memory_of(&REGIONS);
    let fake = Fake::new(Config { memory: Some(host_memory(&[&memory])), ..Config::default() });
    let iommu = backed(Iommu::builder()).build().unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let (mirror, handle) = container_over(&fake).mirror(memory);
    let subscription = iommu.subscribe_mirror(domain.space(), Box::new(mirror), Interest::MIRROR).unwrap();
    let last = u64::MAX / PAGE;
    let error = domain.map(rw(last, last, 5)).unwrap_err();
    assert!(matches!(error.kind, StepErrorKind::Unreachable { why: Unreachable::Aperture, .. }), "{error}");
    let ends = [rw(0, 0, 0), rw(last / 2, last / 2 + 3, 14), rw(last - 1, last - 1, 5)];
    ends.iter().for_each(|mapping| over(domain.map(*mapping).unwrap()));
    assert_eq!(handle.entries(), 4);
    fake.take_calls();
    over(domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!(fake.take_calls(), [plain_unmap(pages(0, last - 1))]);
    assert_eq!((fake.maps(), handle.entries()), (0, 0));
    assert!(!subscription.is_fenced());
}

#[test]
fn whole_address_space_to_the_last_page_is_one_call() {
    let fake = Fake::new(Config::default());
    let (mut mirror, handle) = container_over(&fake).mirror(memory_of(&REGIONS));
    let mirror: &mut dyn subscribe::Mirror = &mut mirror;
    let last = u64::MAX / PAGE;
    for extent in [rw(0, 0, 0), rw(last, last, 5)] {
        assert!(matches!(mirror.map(&extent), Ok(Ack::Done)));
    }
    fake.take_calls();
    assert_eq!(mirror.unmap(IovaRange::ALL).unwrap().bytes, u128::from(2 * PAGE));
    let all = UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 };
    assert_eq!(fake.take_calls(), [Call::Unmap(all)]);
    assert_eq!((fake.maps(), handle.entries(), mirror.held().len()), (0, 0, 0));
}

#[test]
fn identity_maps_the_regions_inside_the_apertures() {
    let memory = memory_of(&REGIONS);
    let fake = Fake::new(Config { memory: Some(host_memory(&[&memory])), ..Config::x86_host() });
    let iommu = backed(Iommu::builder().bypass(true)).build().unwrap();
    let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
    let (mirror, handle) = container_over(&fake).mirror(memory.clone());
    let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap();
    assert_eq!(handle.entries(), 4, "two regions of one extent, memory and read-only memory of one region");
    for page in (0..32).chain(64..80) {
        let reached = fake.lock().container.lookup(Iova(page * PAGE), Access::READ);
        assert_eq!(reached, Reached::Host(host_address(&memory, page * PAGE).unwrap()));
    }
    assert_eq!(fake.lock().container.lookup(Iova(ROM.0 * PAGE), Access::WRITE), Reached::Denied);
    assert_eq!(handle.left_out().len(), 2);
    // From bypass into a domain and back.
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(rw(0, 3, 8)).unwrap());
    over(endpoint.attach(1).unwrap());
    assert_eq!(fake.maps(), 1);
    over(endpoint.detach().unwrap());
    assert_eq!(fake.maps(), 4);
    assert!(subscription.audit().unwrap().is_clean());
}

#[test]
fn memory_that_comes_and_goes_is_looked_up_anew() {
    use vm_memory::{GuestAddressSpace as _, GuestMemoryAtomic};
    let first = memory_of(&[(0, 16)]);
    let space = GuestMemoryAtomic::new((*first).clone());
    let fake = Fake::new(Config::x86_host());
    let iommu = Iommu::builder().ram(0, 16 * PAGE).build().unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let (mirror, handle) = container_over(&fake).mirror(space.clone());
    let subscription = iommu.subscribe_mirror(domain.space(), Box::new(mirror), Interest::MIRROR).unwrap();
    over(domain.map(rw(100, 131, 0)).unwrap());
    assert_eq!(handle.entries(), 1);
    let at = |page| fake.lock().container.lookup(Iova(page * PAGE), Access::WRITE);

    // Plugged: the memory first, then the backing.
    let both = memory_of(&[(0, 16), (16, 16)]);
    space.lock().unwrap().replace((*both).clone());
    assert_eq!(handle.stale(), [rw(100, 115, 0)], "it lies elsewhere now");
    over(subscription.replay().unwrap());
    assert!(handle.stale().is_empty());
    over(iommu.add_backing(Extent { range: gpas(16, 31), medium: Medium::Ram }).unwrap());
    assert_eq!(at(116), Reached::Host(host_address(&space.memory(), 16 * PAGE).unwrap()));
    assert_eq!(at(100), Reached::Host(host_address(&space.memory(), 0).unwrap()));

    // Unplugged: the backing first, then the memory.
    over(iommu.remove_backing(gpas(0, 15)).unwrap());
    assert_eq!((at(100), handle.entries()), (Reached::Nothing, 1));
    assert!(subscription.audit().unwrap().is_clean());
}

#[test]
fn memory_that_this_process_does_not_have_is_refused() {
    let memory = memory_of(&[(0, 16)]);
    let fake = Fake::new(Config::x86_host());
    let iommu = Iommu::builder().ram(0, 32 * PAGE).build().unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let (mirror, _) = container_over(&fake).mirror(memory);
    let _subscription = iommu.subscribe_mirror(domain.space(), Box::new(mirror), Interest::MIRROR).unwrap();
    let error = domain.map(rw(0, 31, 0)).unwrap_err();
    assert!(error.to_string().contains("no memory at"), "{error}");
    assert_eq!(fake.maps(), 0);
}

#[test]
fn one_container_is_one_isolation_set() {
    let rig = Rig::new();
    let second = rig.iommu.add_endpoint(16, EndpointConfig::default()).unwrap();
    over(second.attach(1).unwrap());
    rig.iommu.isolate_together(&[rig.endpoint.id(), second.id()]).unwrap();
    rig.iommu.create_domain(2, Tables::Owned).unwrap();
    let error = second.attach(2).unwrap_err();
    assert!(matches!(error.kind, viommu::AttachErrorKind::SplitsSet { .. }), "{error}");
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fake.fail(Kind::Unmap, 0, Errno::EIO);
    over(rig.domain.unmap(pages(0, 3)).unwrap());
    assert!(rig.endpoint.is_fenced() && second.is_fenced(), "cut off together");
}

#[test]
fn reach_is_read_again_when_a_group_has_joined() {
    let rig = Rig::with(|config| Config { dma_entry_limit: 100, ..config }, |c| c);
    over(rig.domain.map(rw(0, 9, 12)).unwrap());
    let reach = rig.handle.refresh().unwrap();
    assert_eq!(reach.entries, Some(100), "those that are held count too");
    over(rig.subscription.reach_changed(reach).unwrap());
    rig.check();
}

#[test]
fn subscription_to_what_does_not_fit_leaves_nothing() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 9, 12)).unwrap());
    let fake = Fake::new(Config { dma_entry_limit: 1, ..Config::x86_host() });
    let (mirror, handle) = container_over(&fake).mirror(rig.memory.clone());
    let refused = rig.iommu.subscribe_mirror(rig.domain.space(), Box::new(mirror), Interest::MIRROR);
    assert!(matches!(refused, Err(SubscribeError::Refused(_))), "{refused:?}");
    assert_eq!((fake.maps(), handle.entries()), (0, 0));
    assert_eq!(handle.dirty_start(), Err(Errno::EBADF), "the descriptor is closed with the mirror");
}
