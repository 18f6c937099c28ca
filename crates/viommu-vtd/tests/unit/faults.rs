//! Every way in which a request is blocked, with its reason.

use viommu::Access;
use viommu_vtd::{Config, Width};

use crate::rig::*;

/// Sets something wrong up; gives the address to read, the address to write.
type Setup = fn(&mut Rig);

fn good(rig: &mut Rig) -> u64 {
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    root
}

const CASES: &[(&str, Setup, u8, u8)] = &[
    ("root not present", |_| {}, 1, 1),
    ("context not present", |rig| rig.context(DEVICE, 0, 0), 2, 2),
    ("width not supported", |rig| rig.context(DEVICE, 0x20_0001, 3 | 1 << 8), 3, 3),
    ("type that is none", |rig| rig.context(DEVICE, 0x20_0001 | 3 << 2, 2), 3, 3),
    ("type without device TLBs", |rig| rig.context(DEVICE, 0x20_0001 | 1 << 2, 2), 3, 3),
    ("root with reserved bits", |rig| rig.poke(ROOT, 0x20_0001 | 2), 0xa, 0xa),
    (
        "root with an upper half",
        |rig| {
            rig.poke(ROOT, 0x20_0001);
            rig.poke(ROOT + 8, 1);
        },
        0xa,
        0xa,
    ),
    ("context table nowhere", |rig| rig.poke(ROOT, RAM | 1), 9, 9),
    ("context with reserved bits", |rig| rig.context(DEVICE, 0x20_0011, 2), 0xb, 0xb),
    ("context with reserved bits in its upper half", |rig| rig.context(DEVICE, 0x20_0001, 0x82), 0xb, 0xb),
    ("tables nowhere", |rig| rig.attach(DEVICE, 1, RAM), 3, 3),
    (
        "not present",
        |rig| {
            let root = good(rig);
            rig.unmap(root, 0x1000);
        },
        6,
        5,
    ),
    (
        "read only",
        |rig| {
            let root = good(rig);
            rig.map(root, 0x1000, 0x8000, READ);
        },
        0,
        5,
    ),
    (
        "write only",
        |rig| {
            let root = good(rig);
            rig.map(root, 0x1000, 0x8000, WRITE);
        },
        6,
        0,
    ),
    (
        "read only above",
        |rig| {
            let root = good(rig);
            let at = rig.entry(root, 0x1000, 3);
            rig.poke(at, rig.peek(at) & !WRITE);
        },
        0,
        5,
    ),
    (
        "reserved bits beyond the host's width",
        |rig| {
            let root = good(rig);
            rig.map(root, 0x1000, 1 << 48 | 0x8000, RW);
        },
        0xc,
        0xc,
    ),
    (
        "large page with an odd target",
        |rig| {
            let root = good(rig);
            rig.map_large(root, 0, 2, 0x8000, RW);
        },
        0xc,
        0xc,
    ),
    (
        "large page where there is none",
        |rig| {
            let root = good(rig);
            rig.map_large(root, 0, 4, 0, RW);
        },
        0xc,
        0xc,
    ),
    (
        "snoop in a table's entry",
        |rig| {
            let root = good(rig);
            let at = rig.entry(root, 0x1000, 2);
            rig.poke(at, rig.peek(at) | 1 << 11);
        },
        0xc,
        0xc,
    ),
    (
        "table nowhere",
        |rig| {
            let root = good(rig);
            let at = rig.entry(root, 0x1000, 2);
            rig.poke(at, RAM | RW);
        },
        7,
        7,
    ),
    (
        "good",
        |rig| {
            good(rig);
        },
        0,
        0,
    ),
];

#[test]
fn each_wrong_entry_gives_its_reason() {
    for caching_mode in [true, false] {
        for (what, setup, reads, writes) in CASES {
            let (mut rig, endpoint) = Rig::started(Config { caching_mode, ..Config::default() });
            setup(&mut rig);
            rig.global_invalidation();
            let mut reader = reader(&endpoint);
            for (kind, reason) in [(Access::READ, *reads), (Access::WRITE, *writes)] {
                let is_read = kind == Access::READ;
                let outcome = access(&mut reader, 0x1234, kind);
                let expected = (reason != 0).then_some((DEVICE, reason, 0x1000, is_read));
                assert_eq!(rig.fault(), expected, "{what}, {kind:?}, caching mode {caching_mode}");
                assert_eq!(outcome.is_ok(), reason == 0, "{what}");
                if reason == 0 {
                    assert_eq!(outcome, Ok(0x8234), "{what}");
                }
            }
            assert_eq!(rig.fault(), None);
        }
    }
}

#[test]
fn an_address_beyond_the_tables_has_its_own_reason() {
    for (width, last) in [(Width::Bits39, 39), (Width::Bits48, 48), (Width::Bits57, 57)] {
        let config = Config { width, host_bits: 39, ..Config::default() };
        let (mut rig, endpoint) = Rig::started(config);
        let root = rig.table();
        let iova = (1_u64 << last) - 0x1000;
        rig.map(root, iova, 0x8000, RW);
        rig.attach(DEVICE, 1, root);
        rig.announce(DEVICE, 1);
        let mut reader = reader(&endpoint);
        assert_eq!(access(&mut reader, iova + 0xfff, Access::READ), Ok(0x8fff));
        assert!(access(&mut reader, 1 << last, Access::READ).is_err());
        assert_eq!(rig.fault(), Some((DEVICE, 4, 1 << last, true)));
        assert!(access(&mut reader, u64::MAX, Access::WRITE).is_err());
        assert_eq!(rig.fault(), Some((DEVICE, 4, !0xfff, false)));
    }
}

#[test]
fn the_root_table_itself_can_be_unreadable_or_of_another_mode() {
    for (root, reason) in [(RAM, 8), (ROOT | 1 << 10, 0x30)] {
        let (mut rig, endpoint) = Rig::started(Config::default());
        rig.write64(viommu_vtd::spec::register::ROOT_TABLE, root);
        rig.command(1 << 31 | 1 << 30 | 1 << 26);
        rig.global_invalidation();
        assert!(access(&mut reader(&endpoint), 0, Access::READ).is_err());
        assert_eq!(rig.fault(), Some((DEVICE, reason, 0, true)));
    }
}

#[test]
fn faults_are_not_recorded_where_the_context_entry_says_so() {
    for caching_mode in [true, false] {
        let (mut rig, endpoint) = Rig::started(Config { caching_mode, ..Config::default() });
        let root = rig.table();
        rig.context(DEVICE, root | 1 | 2, 2 | 1 << 8);
        rig.announce(DEVICE, 1);
        assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
        assert_eq!(rig.fault(), None);
        rig.context(DEVICE, 2, 0);
        rig.announce(DEVICE, 1);
        assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
        assert_eq!((rig.fault(), rig.vtd.metrics().faults_quiet), (None, 2));
    }
}

#[test]
fn reserved_bits_in_a_context_entry_are_recorded_whatever_it_says() {
    for caching_mode in [true, false] {
        let (mut rig, endpoint) = Rig::started(Config { caching_mode, ..Config::default() });
        let root = rig.table();
        rig.context(DEVICE, root | 1 | 2 | 1 << 4, 2 | 1 << 8);
        rig.announce(DEVICE, 1);
        assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
        assert_eq!(rig.fault(), Some((DEVICE, 0xb, 0x1000, true)));
    }
}

#[test]
fn an_address_where_nothing_is_faults_in_translation_alone() {
    for caching_mode in [true, false] {
        let (mut rig, endpoint) = Rig::started(Config { caching_mode, ..Config::default() });
        let root = rig.table();
        rig.attach(DEVICE, 1, root);
        rig.announce(DEVICE, 1);
        let mut reader = reader(&endpoint);
        for (translates, faults) in [(true, true), (false, false), (true, true)] {
            rig.command(1 << 26 | if translates { 1 << 31 } else { 0 });
            assert!(access(&mut reader, 0xff80_0000_0000, Access::READ).is_err());
            assert_eq!(rig.fault().is_some(), faults);
        }
        let _ = rig.vtd.reset();
        assert!(access(&mut reader, 0xff80_0000_0000, Access::READ).is_err());
        assert_eq!(rig.fault(), None);
    }
}

#[test]
fn a_fault_comes_with_an_interrupt() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    good(&mut rig);
    rig.announce(DEVICE, 1);
    let mut reader = reader(&endpoint);
    for _ in 0..3 {
        assert!(access(&mut reader, 0x5000, Access::WRITE).is_err());
    }
    let sent = rig.interrupts.lock().unwrap().clone();
    assert_eq!(sent, [viommu_vtd::Msi { address: 0xfee0_0000, data: 0x41 }]);
    let metrics = rig.vtd.metrics();
    assert_eq!((metrics.faults, metrics.faults_collapsed), (1, 2));
}

#[test]
fn interrupts_are_never_translated() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let root = rig.table();
    rig.map_large(root, 0xc000_0000, 3, 0, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let mut reader = reader(&endpoint);
    assert_eq!(access(&mut reader, 0xfee0_0020, Access::WRITE), Ok(0xfee0_0020));
    assert_eq!(access(&mut reader, 0xc100_0000, Access::WRITE), Ok(0x100_0000));
    let guard = reader.enter();
    let below = guard.translate(viommu::Iova(0xc000_0000), Access::READ).unwrap();
    assert!(below.last < viommu::Iova(0xfee0_0000));
}
