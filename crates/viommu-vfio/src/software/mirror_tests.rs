use viommu::Access;
use viommu::subscribe::DirtyBitmap;

use super::*;
use crate::software::container::{Config, Reached};
use crate::software::dirty::DirtyScope;

fn mirror(config: Config) -> (SoftwareMirror, Arc<Mutex<Container>>) {
    let container = Arc::new(Mutex::new(Container::new(config).unwrap()));
    (SoftwareMirror::new(container.clone()), container)
}

fn extent(iova: u64, bytes: u64, gpa: u64) -> Mapping {
    Mapping::new(Iova(iova), bytes, Gpa(gpa), Access::RW).unwrap()
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn done(ack: Result<Ack, Refused>) {
    assert!(matches!(ack, Ok(Ack::Done)), "{ack:?}");
}

#[test]
fn reach_is_the_hosts() {
    let (mirror, _) = mirror(Config { dma_entry_limit: 7, ..Config::x86_host() });
    let reach = mirror.reach();
    assert_eq!(reach.apertures, [range(0, 0xfedf_ffff), range(0xfef0_0000, (1 << 48) - 1)]);
    assert_eq!((reach.granule(), reach.entries), (0x1000, Some(7)));
    assert_eq!((reach.replace, reach.wide_unmap, reach.mmio), (false, true, false));
    let (mirror, _) = self::mirror(Config::default());
    assert_eq!(mirror.reach().apertures, [IovaRange::ALL]);
}

#[test]
fn held_is_what_was_mapped() {
    let (mut m, container) = mirror(Config::default());
    m = m.hva_offset(0x7f00_0000_0000).mmio(true);
    let extents = [
        extent(0x1000, 0x2000, 0x8000),
        Mapping { access: Access::READ, ..extent(0x3000, 0x1000, 0xa000) },
        extent(0x9000, 0x1000, 0xfe00_0000).mmio(),
    ];
    for e in &extents {
        done(m.map(e));
    }
    assert_eq!(m.held(), extents);
    let reached = lock(&container).lookup(Iova(0x1004), Access::READ);
    assert_eq!(reached, Reached::Host(0x7f00_0000_8004));
    assert_eq!(m.unmap(range(0x9000, 0x9fff)).unwrap().bytes, 0x1000);
    done(m.map(&extent(0x9000, 0x1000, 0xfe00_0000)));
    assert_eq!(m.held()[2].target, Target::Ram, "what was registers is forgotten with the mapping");
}

#[test]
fn refusals_have_their_kind_and_leave_nothing() {
    let (mut m, container) = mirror(Config { dma_entry_limit: 1, ..Config::x86_host() });
    let kind = |r: Result<Ack, Refused>| r.unwrap_err().kind;
    assert_eq!(kind(m.map(&extent(0xfee0_0000, 0x1000, 0))), RefusalKind::Range);
    assert_eq!(kind(m.map(&extent(0x1000, 0x1000, 0).mmio())), RefusalKind::Unsupported);
    let whole = Mapping::over(IovaRange::ALL, Gpa(0), Access::RW).unwrap();
    assert_eq!(kind(m.map(&whole)), RefusalKind::Range);
    assert_eq!(kind(m.map(&extent(0x1001, 0x1000, 0))), RefusalKind::Range);
    assert!(lock(&container).is_empty());
    done(m.map(&extent(0x1000, 0x1000, 0)));
    assert_eq!(kind(m.map(&extent(0x1000, 0x1000, 0))), RefusalKind::Device);
    assert_eq!(kind(m.map(&extent(0x2000, 0x1000, 0))), RefusalKind::Resources);
    assert_eq!(m.held().len(), 1);
}

#[test]
fn unmap_of_every_address_is_one_call() {
    for dirty in [false, true] {
        let (mut m, container) = mirror(Config::default());
        for at in [0, 1 << 63, u64::MAX - 0xfff] {
            done(m.map(&extent(at, 0x1000, 0)));
        }
        if dirty {
            lock(&container).dirty_start().unwrap();
        }
        let unmapped = m.unmap(IovaRange::ALL).unwrap();
        assert_eq!((unmapped.bytes, unmapped.dirty.is_some()), (0x3000, dirty));
        assert!(m.held().is_empty());
    }
}

#[test]
fn unmap_of_every_byte_counts_past_64_bits() {
    let (mut m, _) = mirror(Config::default());
    done(m.map(&extent(0, 1 << 63, 0)));
    done(m.map(&extent(1 << 63, 1 << 63, 0)));
    assert_eq!(m.unmap(IovaRange::ALL).unwrap().bytes, 1 << 64);
}

#[test]
fn unmap_of_odd_ranges_takes_the_pages_inside() {
    let (mut m, container) = mirror(Config { pgsizes: 1 << 16, ..Config::default() });
    done(m.map(&extent(0x1_0000, 0x1_0000, 0)));
    assert_eq!(m.unmap(range(0x1000, 0xffff)).unwrap().bytes, 0);
    assert_eq!(m.unmap(range(u64::MAX - 0xfff, u64::MAX)).unwrap().bytes, 0);
    assert_eq!(m.held().len(), 1);
    assert_eq!(m.unmap(range(0xf000, u64::MAX)).unwrap().bytes, 0x1_0000);
    done(m.map(&extent(0, 0x1_0000, 0)));
    assert_eq!(m.unmap(range(0, 0x1_0fff)).unwrap().bytes, 0x1_0000);
    lock(&container).detach();
    assert_eq!(m.unmap(range(0x1000, 0x1fff)).unwrap_err().kind, RefusalKind::Device);
}

#[test]
fn unmap_that_cuts_is_refused_and_removes_nothing() {
    for dirty in [false, true] {
        let (mut m, container) = mirror(Config::default());
        done(m.map(&extent(0, 0x2000, 0)));
        done(m.map(&extent(0x2000, 0x2000, 0)));
        if dirty {
            lock(&container).dirty_start().unwrap();
        }
        assert_eq!(m.unmap(range(0, 0x2fff)).unwrap_err().kind, RefusalKind::Range);
        assert_eq!(m.held().len(), 2);
    }
}

#[test]
fn unmap_while_tracking_tells_the_dirty_pages_of_what_goes() {
    let (mut m, container) = mirror(Config { dirty: DirtyScope::Written, ..Config::default() });
    done(m.map(&extent(0x2000, 0x3000, 0)));
    done(m.map(&extent(0x8000, 0x1000, 0)));
    lock(&container).dirty_start().unwrap();
    assert!(lock(&container).device_wrote(0x3000, 1));
    assert!(lock(&container).device_wrote(0x8fff, 1));
    let unmapped = m.unmap(range(0, 0xffff)).unwrap();
    let dirty = DirtyBitmap { start: Iova(0x2000), page_size: 0x1000, words: vec![1 << 1 | 1 << 6] };
    assert_eq!((unmapped.bytes, unmapped.dirty), (0x4000, Some(dirty)));
    assert_eq!(m.unmap(range(0, 0xffff)).unwrap().dirty, None);
}

#[test]
fn dirty_pages_of_a_wide_unmap_share_bits() {
    let (mut m, container) = mirror(Config { dirty: DirtyScope::Written, ..Config::default() });
    done(m.map(&extent(0x1000, 0x1000, 0)));
    done(m.map(&extent(u64::MAX - 0xfff, 0x1000, 0)));
    lock(&container).dirty_start().unwrap();
    assert!(lock(&container).device_wrote(u64::MAX, 1));
    let dirty = m.unmap(IovaRange::ALL).unwrap().dirty.unwrap();
    assert_eq!((dirty.start, dirty.page_size, dirty.words.len()), (Iova(0), 1 << 40, 1 << 18));
    assert!(dirty.words[..(1 << 18) - 1].iter().all(|w| *w == 0));
    assert_eq!(dirty.words[(1 << 18) - 1], 1 << 63);
}

#[test]
fn fence_detaches_the_container() {
    let (mut m, container) = mirror(Config::default());
    done(m.map(&extent(0, 0x1000, 0)));
    m.fence().unwrap();
    assert!(lock(&container).is_detached());
    assert!(m.held().is_empty());
    assert_eq!(lock(&container).lookup(Iova(0), Access::READ), Reached::Nothing);
    assert_eq!(m.map(&extent(0, 0x1000, 0)).unwrap_err().reason, "MAP_DMA: EBADFD");
    m.fence().unwrap();
}
