use proptest::prelude::*;

use super::*;

const PAGE: u64 = 0x1000;

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn container() -> Container {
    Container::new(Config::x86_host()).unwrap()
}

fn rw(iova: u64, size: u64, vaddr: u64) -> MapDma {
    MapDma { flags: MapFlags::READ | MapFlags::WRITE, vaddr, iova, size }
}

fn plain(iova: u64, size: u64) -> UnmapDma {
    UnmapDma { flags: UnmapFlags::empty(), iova, size }
}

fn unmap(c: &mut Container, iova: u64, size: u64) -> Result<u64, Errno> {
    c.unmap_dma(plain(iova, size), None)
}

/// `call` fails with `errno` and leaves everything as it was.
#[track_caller]
fn refused<T: std::fmt::Debug>(
    c: &mut Container,
    errno: Errno,
    call: impl FnOnce(&mut Container) -> Result<T, Errno>,
) {
    let (before, avail) = (c.iter().collect::<Vec<_>>(), c.dma_avail());
    assert_eq!(call(c).unwrap_err(), errno);
    assert_eq!((c.iter().collect::<Vec<_>>(), c.dma_avail()), (before, avail));
}

#[test]
fn map_with_an_unknown_flag_is_einval() {
    let flags = MapFlags::READ | MapFlags::from_bits_retain(8);
    refused(&mut container(), Errno::EINVAL, |c| c.map_dma(MapDma { flags, ..rw(0, PAGE, 0) }));
}

#[test]
fn map_with_vaddr_and_access_or_with_neither_is_einval() {
    for flags in [MapFlags::VADDR | MapFlags::READ, MapFlags::VADDR | MapFlags::WRITE, MapFlags::empty()] {
        refused(&mut container(), Errno::EINVAL, |c| c.map_dma(MapDma { flags, ..rw(0, PAGE, 0) }));
    }
}

#[test]
fn map_of_nothing_or_off_the_smallest_page_is_einval() {
    for map in [rw(0, 0, 0), rw(0, PAGE - 1, 0), rw(1, PAGE, 0), rw(0, PAGE, 0x800)] {
        refused(&mut container(), Errno::EINVAL, |c| c.map_dma(map));
    }
    let mut big = Container::new(Config { pgsizes: 1 << 16, ..Config::default() }).unwrap();
    refused(&mut big, Errno::EINVAL, |c| c.map_dma(rw(0, PAGE, 0)));
    assert_eq!(big.map_dma(rw(0, 1 << 16, 0)), Ok(()));
}

#[test]
fn map_that_wraps_is_einval() {
    let mut c = Container::new(Config::default()).unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.map_dma(rw(0u64.wrapping_sub(PAGE), 2 * PAGE, 0)));
    refused(&mut c, Errno::EINVAL, |c| c.map_dma(rw(0, 2 * PAGE, 0u64.wrapping_sub(PAGE))));
    assert_eq!(c.map_dma(rw(0u64.wrapping_sub(PAGE), PAGE, 0u64.wrapping_sub(PAGE))), Ok(()));
}

#[test]
fn wrap_is_eoverflow_in_newer_kernels_before_other_tests_of_a_map() {
    let mut c = Container::new(Config { release: Release::Linux7_3, ..Config::default() }).unwrap();
    let last = 0u64.wrapping_sub(PAGE);
    for map in [rw(last, 2 * PAGE, 0), rw(last + 1, 2 * PAGE, 0), rw(0, 2 * PAGE, last)] {
        refused(&mut c, Errno::EOVERFLOW, |c| c.map_dma(map));
        refused(&mut c, Errno::EOVERFLOW, |c| c.map_dma(MapDma { flags: MapFlags::empty(), ..map }));
        refused(&mut c, Errno::EINVAL, |c| c.map_dma(MapDma { flags: MapFlags::from_bits_retain(8), ..map }));
    }
    refused(&mut c, Errno::EOVERFLOW, |c| unmap(c, last, 2 * PAGE));
    refused(&mut c, Errno::EINVAL, |c| unmap(c, last + 1, 2 * PAGE));
    c.dirty_start().unwrap();
    let mut bitmap = Bitmap::new(PAGE, 2 * PAGE).unwrap();
    refused(&mut c, Errno::EOVERFLOW, |c| c.dirty_bitmap(last + 1, 2 * PAGE, &mut bitmap));
    assert_eq!(c.dirty_bitmap(last, PAGE, &mut bitmap), Ok(()), "6.12 refuses that");
}

#[test]
fn map_over_a_mapping_is_eexist_even_the_same_one() {
    let mut c = container();
    c.map_dma(rw(0x4000, 0x2000, 0)).unwrap();
    for map in [
        rw(0x4000, 0x2000, 0),
        rw(0x5000, PAGE, 0),
        rw(0x3000, 0x2000, 0),
        rw(0x5000, 0x9000, 0),
        rw(0, 0x10000, 0),
    ] {
        refused(&mut c, Errno::EEXIST, |c| c.map_dma(map));
    }
    assert_eq!(c.map_dma(rw(0x3000, PAGE, 0)), Ok(()));
    assert_eq!(c.map_dma(rw(0x6000, PAGE, 0)), Ok(()));
}

#[test]
fn map_past_the_entry_budget_is_enospc() {
    let mut c = container();
    for n in 0..65535 {
        c.map_dma(rw(n * 2 * PAGE, PAGE, n * PAGE)).unwrap();
    }
    assert_eq!(c.info().unwrap().dma_avail, 0);
    refused(&mut c, Errno::ENOSPC, |c| c.map_dma(rw(PAGE, PAGE, 0)));
    assert_eq!(unmap(&mut c, 0, PAGE), Ok(PAGE));
    assert_eq!(c.dma_avail(), 1);
    assert_eq!(c.map_dma(rw(PAGE, PAGE, 0)), Ok(()));
    assert_eq!(c.dma_avail(), 0);
}

#[test]
fn map_outside_one_iova_range_is_einval() {
    let mut c = container();
    for map in [
        rw(0xfee0_0000, PAGE, 0),
        rw(0xfedf_f000, 2 * PAGE, 0),
        rw(0xfede_0000, 0x20_0000, 0),
        rw(1 << 48, PAGE, 0),
    ] {
        refused(&mut c, Errno::EINVAL, |c| c.map_dma(map));
    }
    assert_eq!(c.map_dma(rw(0xfedf_f000, PAGE, 0)), Ok(()));
    assert_eq!(c.map_dma(rw((1 << 48) - PAGE, PAGE, 0)), Ok(()));
}

#[test]
fn map_tests_eexist_before_enospc_before_the_window() {
    let mut c = Container::new(Config { dma_entry_limit: 1, ..Config::x86_host() }).unwrap();
    c.map_dma(rw(0xfedf_f000, PAGE, 0)).unwrap();
    refused(&mut c, Errno::EEXIST, |c| c.map_dma(rw(0xfedf_f000, 2 * PAGE, 0)));
    refused(&mut c, Errno::ENOSPC, |c| c.map_dma(rw(0xfee0_0000, PAGE, 0)));
    unmap(&mut c, 0xfedf_f000, PAGE).unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.map_dma(rw(0xfee0_0000, PAGE, 0)));
}

#[test]
fn map_of_missing_or_read_only_memory_is_efault() {
    let memory = Some(vec![
        HostRange { start: 0, last: 0x3fff, writable: true },
        HostRange { start: 0x4000, last: 0x7fff, writable: false },
    ]);
    let mut c = Container::new(Config { memory, ..Config::default() }).unwrap();
    refused(&mut c, Errno::EFAULT, |c| c.map_dma(rw(0, PAGE, 0x8000)));
    refused(&mut c, Errno::EFAULT, |c| c.map_dma(rw(0, 0x5000, 0)));
    assert_eq!(c.map_dma(MapDma { flags: MapFlags::READ, ..rw(0, 0x8000, 0) }), Ok(()));
    assert_eq!(c.map_dma(rw(0x10000, 0x4000, 0)), Ok(()));
}

#[test]
fn map_past_the_locked_limit_is_enomem_unless_memory_ends_first() {
    let memory = Some(vec![HostRange { start: 0, last: 0x3fff, writable: true }]);
    let config = Config { memory, locked_limit: Some(0x5000), ..Config::default() };
    let mut c = Container::new(config).unwrap();
    c.map_dma(rw(0, 0x2000, 0)).unwrap();
    refused(&mut c, Errno::ENOMEM, |c| c.map_dma(rw(0x10000, 0x4000, 0)));
    refused(&mut c, Errno::EFAULT, |c| c.map_dma(rw(0x10000, 0x4000, 0x1000)));
    assert_eq!(c.map_dma(rw(0x10000, 0x3000, 0)), Ok(()));
    unmap(&mut c, 0, 0x2000).unwrap();
    assert_eq!(c.map_dma(rw(0, 0x2000, 0)), Ok(()));
}

#[test]
fn map_write_only_is_accepted() {
    let mut c = container();
    c.map_dma(MapDma { flags: MapFlags::WRITE, ..rw(0, PAGE, 0x9000) }).unwrap();
    assert_eq!(c.lookup(Iova(8), Access::WRITE), Reached::Host(0x9008));
    assert_eq!(c.lookup(Iova(8), Access::READ), Reached::Denied);
}

#[test]
fn lookup_ends_with_the_mapping() {
    let mut c = container();
    c.map_dma(rw(0x4000, 0x2000, 0x8000)).unwrap();
    assert_eq!(c.lookup(Iova(0x3fff), Access::READ), Reached::Nothing);
    assert_eq!(c.lookup(Iova(0x4000), Access::RW), Reached::Host(0x8000));
    assert_eq!(c.lookup(Iova(0x5fff), Access::RW), Reached::Host(0x9fff));
    assert_eq!(c.lookup(Iova(0x6000), Access::READ), Reached::Nothing);
}

/// The seven examples of the virtio-iommu specification, which are also type1 v2's rules: mappings, what is unmapped,
/// what goes (`None`: refused). In pages, ends inclusive.
#[test]
fn unmap_in_the_seven_cases_removes_whole_mappings_or_nothing() {
    type Case = (&'static [(u64, u64)], (u64, u64), Option<u64>);
    let cases: [Case; 7] = [
        (&[], (0, 4), Some(0)),
        (&[(0, 9)], (0, 9), Some(10)),
        (&[(0, 4), (5, 9)], (0, 9), Some(10)),
        (&[(0, 9)], (0, 4), None),
        (&[(0, 4), (5, 9)], (0, 4), Some(5)),
        (&[(0, 4)], (0, 9), Some(5)),
        (&[(0, 4), (10, 14)], (0, 14), Some(10)),
    ];
    for (maps, (start, last), gone) in cases {
        let mut c = container();
        for &(start, last) in maps {
            c.map_dma(rw(start * PAGE, (last - start + 1) * PAGE, 0)).unwrap();
        }
        let call = |c: &mut Container| unmap(c, start * PAGE, (last - start + 1) * PAGE);
        match gone {
            None => refused(&mut c, Errno::EINVAL, call),
            Some(pages) => {
                let held = |c: &Container| c.iter().map(|d| d.range.bytes()).sum::<u128>();
                let before = held(&c);
                assert_eq!(call(&mut c), Ok(pages * PAGE));
                assert_eq!(before - held(&c), u128::from(pages * PAGE));
            }
        }
    }
}

#[test]
fn unmap_that_cuts_either_end_is_einval_and_removes_nothing() {
    let mut c = container();
    for n in 0..3 {
        c.map_dma(rw(n * 0x4000, 0x4000, 0)).unwrap();
    }
    for (iova, size) in [(0x1000, 0xb000), (0, 0xb000), (0x5000, 0x1000), (0, 0x5000)] {
        refused(&mut c, Errno::EINVAL, |c| unmap(c, iova, size));
    }
    assert_eq!(unmap(&mut c, 0, 0xc000), Ok(0xc000));
}

#[test]
fn unmap_with_bad_arguments_is_einval() {
    let mut c = container();
    for (iova, size) in [(0, 0), (1, PAGE), (0, 1), (0u64.wrapping_sub(PAGE), 2 * PAGE)] {
        refused(&mut c, Errno::EINVAL, |c| unmap(c, iova, size));
    }
    let flags = UnmapFlags::from_bits_retain(8);
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(UnmapDma { flags, ..plain(0, PAGE) }, None));
}

#[test]
fn unmap_of_all_64_bits_takes_two_calls_or_all() {
    let half = 1 << 63;
    let mut c = Container::new(Config::default()).unwrap();
    let fill = |c: &mut Container| {
        for at in [0, half, 0u64.wrapping_sub(PAGE)] {
            c.map_dma(rw(at, PAGE, 0)).unwrap();
        }
    };
    fill(&mut c);
    assert_eq!(unmap(&mut c, 0, half), Ok(PAGE));
    assert_eq!(unmap(&mut c, half, half), Ok(2 * PAGE));
    fill(&mut c);
    let all = |iova, size| UnmapDma { flags: UnmapFlags::ALL, iova, size };
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(all(0, PAGE), None));
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(all(PAGE, 0), None));
    assert_eq!(c.unmap_dma(all(0, 0), None), Ok(3 * PAGE));
    assert!(c.is_empty());
    assert_eq!(c.unmap_dma(all(0, 0), None), Ok(0));
}

#[test]
fn unmap_counts_bytes_modulo_2_64() {
    let half = 1 << 63;
    let mut c = Container::new(Config::default()).unwrap();
    c.map_dma(rw(0, half, 0)).unwrap();
    c.map_dma(rw(half, half, 0)).unwrap();
    refused(&mut c, Errno::EINVAL, |c| unmap(c, PAGE, 0u64.wrapping_sub(PAGE)));
    assert_eq!(c.unmap_dma(UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 }, None), Ok(0));
    assert!(c.is_empty());
}

#[test]
fn vaddr_is_invalidated_and_given_anew() {
    let invalidate = |iova, size| UnmapDma { flags: UnmapFlags::VADDR, iova, size };
    let set = |iova, size, vaddr| MapDma { flags: MapFlags::VADDR, vaddr, iova, size };
    let mut c = container();
    c.map_dma(rw(0x1000, 0x2000, 0x8000)).unwrap();
    c.map_dma(rw(0x3000, PAGE, 0xa000)).unwrap();
    refused(&mut c, Errno::ENOENT, |c| c.map_dma(set(0x8000, PAGE, 0)));
    refused(&mut c, Errno::EINVAL, |c| c.map_dma(set(0x1000, 0x2000, 0)));
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(invalidate(0x2000, PAGE), None));

    assert_eq!(c.unmap_dma(invalidate(0x3000, PAGE), None), Ok(PAGE));
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(invalidate(0x1000, 0x3000), None));
    assert_eq!(c.iter().map(|d| d.vaddr_invalid).collect::<Vec<_>>(), [false, true]);
    refused(&mut c, Errno::EEXIST, |c| c.map_dma(rw(0x3000, PAGE, 0)));
    refused(&mut c, Errno::EINVAL, |c| c.map_dma(set(0x2000, 0x2000, 0)));
    assert_eq!(c.map_dma(set(0x3000, PAGE, 0xc000)), Ok(()));
    assert_eq!(c.lookup(Iova(0x3000), Access::RW), Reached::Host(0xc000));

    let all = UnmapDma { flags: UnmapFlags::VADDR | UnmapFlags::ALL, iova: 0, size: 0 };
    assert_eq!(c.unmap_dma(all, None), Ok(0x3000));
    assert_eq!(c.len(), 2);
    assert_eq!(c.lookup(Iova(0x1000), Access::RW), Reached::Host(0x8000), "pinned pages stay in reach");
    assert_eq!(unmap(&mut c, 0x1000, 0x3000), Ok(0x3000));
}

#[test]
fn vaddr_with_mediated_devices_is_ebusy() {
    let mut c = Container::new(Config { mediated: true, ..Config::default() }).unwrap();
    c.map_dma(rw(0, PAGE, 0)).unwrap();
    let unmap = UnmapDma { flags: UnmapFlags::VADDR, ..plain(0, PAGE) };
    refused(&mut c, Errno::EBUSY, |c| c.unmap_dma(unmap, None));
}

#[test]
fn unmap_with_dirty_bitmap_needs_tracking_and_a_bitmap_that_fits() {
    let get = |iova, size| UnmapDma { flags: UnmapFlags::GET_DIRTY_BITMAP, iova, size };
    let mut c = container();
    c.map_dma(rw(0x1000, 0x3000, 0)).unwrap();
    let bitmap = || Bitmap::new(PAGE, 0x5000).unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(get(0, 0x5000), Some(&mut bitmap())));
    c.dirty_start().unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(get(0, 0x5000), None));
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(get(0, 65 * PAGE), Some(&mut bitmap())));
    let wide = || Bitmap { pgsize: 0x2000, ..bitmap() };
    refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(get(0, 0x5000), Some(&mut wide())));
    for other in [UnmapFlags::ALL, UnmapFlags::VADDR] {
        let flags = UnmapFlags::GET_DIRTY_BITMAP | other;
        let unmap = UnmapDma { flags, ..plain(0, 0x5000) };
        refused(&mut c, Errno::EINVAL, |c| c.unmap_dma(unmap, Some(&mut bitmap())));
    }
    let mut dirty = bitmap();
    assert_eq!(c.unmap_dma(get(0, 0x5000), Some(&mut dirty)), Ok(0x3000));
    assert_eq!(dirty.dirty().collect::<Vec<_>>(), [1, 2, 3]);
    assert!(c.is_empty());
}

#[test]
fn dirty_bitmap_with_bad_arguments_is_einval() {
    let mut c = container();
    c.map_dma(rw(0x1000, 0x3000, 0)).unwrap();
    let bitmap = || Bitmap::new(PAGE, 0x5000).unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.dirty_bitmap(0, 0x5000, &mut bitmap()));
    c.dirty_start().unwrap();
    for (iova, size) in
        [(0, 0), (1, PAGE), (0, 0x800), (0x2000, PAGE), (0, 65 * PAGE), (0u64.wrapping_sub(PAGE), PAGE)]
    {
        refused(&mut c, Errno::EINVAL, |c| c.dirty_bitmap(iova, size, &mut bitmap()));
    }
    refused(&mut c, Errno::EINVAL, |c| c.dirty_bitmap(0, 0x5000, &mut Bitmap { pgsize: 0x2000, ..bitmap() }));
    refused(&mut c, Errno::EINVAL, |c| c.dirty_bitmap(0, 0x5000, &mut Bitmap { pgsize: 0, ..bitmap() }));
    assert_eq!(c.dirty_bitmap(0, 0x5000, &mut bitmap()), Ok(()));
    c.dirty_stop().unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.dirty_bitmap(0, 0x5000, &mut bitmap()));
}

#[test]
fn dirty_pages_of_an_ordinary_device_are_all_each_time() {
    let mut c = container();
    c.map_dma(rw(0, 0x3000, 0)).unwrap();
    c.map_dma(MapDma { flags: MapFlags::READ, ..rw(63 * PAGE, 0x3000, 0) }).unwrap();
    c.dirty_start().unwrap();
    for _ in 0..2 {
        let mut dirty = Bitmap::new(PAGE, 70 * PAGE).unwrap();
        c.dirty_bitmap(0, 70 * PAGE, &mut dirty).unwrap();
        assert_eq!(dirty.dirty().collect::<Vec<_>>(), [0, 1, 2, 63, 64, 65]);
    }
}

#[test]
fn dirty_pages_of_a_device_that_tells_are_those_written_and_then_clean() {
    let mut c = Container::new(Config { dirty: DirtyScope::Written, ..Config::x86_host() }).unwrap();
    c.map_dma(rw(0, 0x3000, 0)).unwrap();
    c.map_dma(rw(0x3000, 0x3000, 0x8000)).unwrap();
    c.map_dma(MapDma { flags: MapFlags::READ, ..rw(0x6000, PAGE, 0) }).unwrap();
    assert!(c.device_wrote(0, PAGE), "not tracked yet");
    c.dirty_start().unwrap();
    assert!(c.device_wrote(0x2fff, 2));
    assert!(!c.device_wrote(0x5000, 0x1001), "ends in a read-only page");
    assert!(!c.device_wrote(0x8000, 1));
    c.dirty_start().unwrap();
    let get = |c: &mut Container| {
        let mut dirty = Bitmap::new(PAGE, 0x7000).unwrap();
        c.dirty_bitmap(0, 0x7000, &mut dirty).unwrap();
        dirty.dirty().collect::<Vec<_>>()
    };
    assert_eq!(get(&mut c), [2, 3, 5]);
    assert_eq!(get(&mut c), [0_u64; 0]);
    assert!(c.device_wrote(0x4000, 1));
    c.dirty_stop().unwrap();
    c.dirty_start().unwrap();
    assert_eq!(get(&mut c), [0_u64; 0], "stopping forgets");
}

#[test]
fn dirty_tracking_refuses_more_pages_than_a_bitmap_has() {
    let most = MAX_DIRTY_BITMAP_BYTES * 8 * PAGE;
    let mut c = Container::new(Config::default()).unwrap();
    c.map_dma(rw(0, most, 0)).unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.dirty_start());
    assert!(!c.is_tracking());
    unmap(&mut c, 0, most).unwrap();
    c.dirty_start().unwrap();
    refused(&mut c, Errno::EINVAL, |c| c.map_dma(rw(0, most, 0)));
    assert_eq!(c.map_dma(rw(0, most - PAGE, 0)), Ok(()));
    assert_eq!(MAX_DIRTY_BITMAP_BYTES, 256 << 20);
}

#[test]
fn detached_container_reaches_nothing_and_answers_ebadfd() {
    let mut c = container();
    c.map_dma(rw(0, PAGE, 0)).unwrap();
    c.detach();
    assert_eq!(c.lookup(Iova(0), Access::READ), Reached::Nothing);
    assert_eq!(c.map_dma(rw(0, PAGE, 0)), Err(Errno::EBADFD));
    assert_eq!(unmap(&mut c, 0, PAGE), Err(Errno::EBADFD));
    assert_eq!(c.dirty_start(), Err(Errno::EBADFD));
    assert_eq!(c.info(), Err(Errno::EBADFD));
    c.reset();
    assert_eq!(c.map_dma(rw(0, PAGE, 0)), Ok(()));
}

#[test]
fn config_without_pages_or_with_overlapping_ranges_is_einval() {
    let new = |config| Container::new(config).map(|_| ());
    assert_eq!(new(Config { pgsizes: 0, ..Config::default() }), Err(Errno::EINVAL));
    let overlapping = vec![range(0, 9), range(9, 20)];
    assert_eq!(new(Config { iova_ranges: overlapping, ..Config::default() }), Err(Errno::EINVAL));
    let small = Container::new(Config { pgsizes: 0x200, ..Config::default() }).unwrap();
    assert_eq!(small.info().unwrap().pgsizes, 0x1000);
}

#[test]
fn overlapping_gives_mappings_that_stick_out_too() {
    let mut c = container();
    for n in 0..4 {
        c.map_dma(rw(n * 0x2000, 0x2000, 0)).unwrap();
    }
    let found: Vec<_> = c.overlapping(range(0x3000, 0x4000)).map(|d| d.range).collect();
    assert_eq!(found, [range(0x2000, 0x3fff), range(0x4000, 0x5fff)]);
}

/// The same rules, a page at a time.
struct Naive {
    pages: [Option<(u32, u64, Access)>; 24],
    next_id: u32,
    limit: usize,
}

const WINDOWS: [(usize, usize); 2] = [(0, 9), (12, 21)];

impl Naive {
    fn entries(&self) -> usize {
        let mut ids: Vec<_> = self.pages.iter().flatten().map(|p| p.0).collect();
        ids.dedup();
        ids.len()
    }

    fn map(&mut self, first: usize, count: usize, vaddr: u64, access: Access) -> Result<(), Errno> {
        if count == 0 || access.is_empty() {
            return Err(Errno::EINVAL);
        }
        let wanted = first..first + count;
        if self.pages[wanted.clone()].iter().any(Option::is_some) {
            return Err(Errno::EEXIST);
        }
        if self.entries() == self.limit {
            return Err(Errno::ENOSPC);
        }
        if !WINDOWS.iter().any(|&(a, b)| wanted.clone().all(|p| (a..=b).contains(&p))) {
            return Err(Errno::EINVAL);
        }
        self.next_id += 1;
        for page in wanted {
            self.pages[page] = Some((self.next_id, vaddr + (page - first) as u64, access));
        }
        Ok(())
    }

    fn unmap(&mut self, first: usize, count: usize) -> Result<u64, Errno> {
        if count == 0 {
            return Err(Errno::EINVAL);
        }
        let end = first + count;
        let id = |page: usize| self.pages.get(page).copied().flatten().map(|p| p.0);
        let cut = |at: usize| at > 0 && id(at).is_some() && id(at) == id(at - 1);
        if cut(first) || cut(end) {
            return Err(Errno::EINVAL);
        }
        let gone = self.pages[first..end].iter_mut().filter_map(Option::take).count();
        Ok(gone as u64 * PAGE)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map(usize, usize, u64, u8),
    Unmap(usize, usize),
    All,
}

fn op() -> impl Strategy<Value = Op> {
    let span = (0_usize..24).prop_flat_map(|first| (Just(first), 0..=(24 - first).min(6)));
    let wide = (0_usize..24).prop_flat_map(|first| (Just(first), 0..=(24 - first)));
    prop_oneof![
        6 => (span, 0_u64..64, 0_u8..4).prop_map(|((p, n), v, a)| Op::Map(p, n, v, a)),
        4 => wide.prop_map(|(p, n)| Op::Unmap(p, n)),
        1 => Just(Op::All),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn container_agrees_with_a_map_of_pages(ops in prop::collection::vec(op(), 1..60)) {
        let iova_ranges =
            WINDOWS.iter().map(|&(a, b)| range(a as u64 * PAGE, b as u64 * PAGE + PAGE - 1)).collect();
        let mut c =
            Container::new(Config { iova_ranges, dma_entry_limit: 5, ..Config::default() }).unwrap();
        let mut naive = Naive { pages: [None; 24], next_id: 0, limit: 5 };
        for op in ops {
            match op {
                Op::Map(first, count, vaddr, access) => {
                    let access = Access::from_bits_truncate(access);
                    let map = MapDma {
                        flags: access.into(),
                        vaddr: vaddr * PAGE,
                        iova: first as u64 * PAGE,
                        size: count as u64 * PAGE,
                    };
                    prop_assert_eq!(c.map_dma(map), naive.map(first, count, vaddr, access));
                }
                Op::Unmap(first, count) => {
                    let call = unmap(&mut c, first as u64 * PAGE, count as u64 * PAGE);
                    prop_assert_eq!(call, naive.unmap(first, count));
                }
                Op::All => {
                    let all = UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 };
                    prop_assert_eq!(c.unmap_dma(all, None), naive.unmap(0, 24));
                }
            }
            prop_assert_eq!(c.len(), naive.entries());
            prop_assert_eq!(c.dma_avail() as usize, 5 - naive.entries());
            for (n, page) in naive.pages.iter().enumerate() {
                for access in [Access::READ, Access::WRITE, Access::RW] {
                    let expected = match page {
                        None => Reached::Nothing,
                        Some((_, vaddr, may)) if may.contains(access) => Reached::Host(vaddr * PAGE + 5),
                        Some(_) => Reached::Denied,
                    };
                    prop_assert_eq!(c.lookup(Iova(n as u64 * PAGE + 5), access), expected);
                }
            }
        }
    }
}
