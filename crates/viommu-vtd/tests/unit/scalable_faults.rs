//! Every way in which a request is blocked in scalable mode, with its reason.

use viommu::Access;
use viommu_vtd::{Config, Stage};

use crate::rig::*;

/// Sets something wrong up.
type Setup = fn(&mut Rig);

/// What a case is, its set-up, the reasons of a read and of a write (0: it passes).
type Case = (&'static str, Setup, u8, u8);

fn good(rig: &mut Rig) -> u64 {
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, FIRST_RW);
    rig.attach(DEVICE, 1, root);
    root
}

fn context(rig: &mut Rig, word: u64, change: impl Fn(u64) -> u64) {
    good(rig);
    let at = rig.context_at(DEVICE) + word * 8;
    rig.poke(at, change(rig.peek(at)));
}

fn directory(rig: &mut Rig, change: impl Fn(u64) -> u64) {
    good(rig);
    let at = rig.context_at(DEVICE);
    let at = rig.peek(at) & !0xfff;
    rig.poke(at, change(rig.peek(at)));
}

fn pasid(rig: &mut Rig, word: u64, change: impl Fn(u64) -> u64) {
    good(rig);
    let at = rig.pasid_at(DEVICE, 0) + word * 8;
    rig.poke(at, change(rig.peek(at)));
}

fn page(rig: &mut Rig, level: u32, change: impl Fn(u64) -> u64) {
    let root = good(rig);
    let at = rig.entry(root, 0x1000, level);
    rig.poke(at, change(rig.peek(at)));
}

const BOTH: &[Case] = &[
    ("good", |rig| page(rig, 1, |word| word), 0, 0),
    ("root not present", |_| {}, 0x39, 0x39),
    ("the other half of the root", |rig| rig.poke(ROOT + 8, 0x20_0001), 0x39, 0x39),
    ("root with reserved bits", |rig| rig.poke(ROOT, 0x20_0003), 0x3a, 0x3a),
    ("context table nowhere", |rig| rig.poke(ROOT, RAM | 1), 0x40, 0x40),
    ("context not present", |rig| context(rig, 0, |_| 0), 0x41, 0x41),
    ("context with reserved bits", |rig| context(rig, 0, |word| word | 1 << 5), 0x42, 0x42),
    ("context with device TLBs", |rig| context(rig, 0, |word| word | 1 << 2), 0x42, 0x42),
    ("context with page requests", |rig| context(rig, 0, |word| word | 1 << 4), 0x42, 0x42),
    ("context with reserved bits in word 1", |rig| context(rig, 1, |_| 1 << 21), 0x42, 0x42),
    ("context with reserved bits in word 2", |rig| context(rig, 2, |_| 1), 0x42, 0x42),
    ("context with reserved bits in word 3", |rig| context(rig, 3, |_| 1), 0x42, 0x42),
    ("RID_PASID beyond the directory", |rig| context(rig, 1, |_| 1 << 13), 0x43, 0x43),
    ("directory nowhere", |rig| context(rig, 0, |word| word & 0xfff | RAM), 0x50, 0x50),
    ("directory entry not present", |rig| directory(rig, |_| 0), 0x51, 0x51),
    ("directory entry with reserved bits", |rig| directory(rig, |word| word | 1 << 2), 0x52, 0x52),
    ("PASID table nowhere", |rig| directory(rig, |_| RAM | 1), 0x58, 0x58),
    ("PASID entry not present", |rig| pasid(rig, 0, |word| word & !1), 0x59, 0x59),
    ("PASID entry with reserved bits", |rig| pasid(rig, 0, |word| word | 1 << 10), 0x5a, 0x5a),
    ("PASID entry with accessed bits of the second stage", |rig| pasid(rig, 0, |w| w | 1 << 9), 0x5a, 0x5a),
    ("PASID entry with reserved bits in word 1", |rig| pasid(rig, 1, |word| word | 1 << 16), 0x5a, 0x5a),
    ("PASID entry with reserved bits in word 2", |rig| pasid(rig, 2, |word| word | 1 << 8), 0x5a, 0x5a),
    ("PASID entry with reserved bits in word 3", |rig| pasid(rig, 3, |_| 1), 0x5a, 0x5a),
    ("PASID entry with reserved bits in word 7", |rig| pasid(rig, 7, |_| 1), 0x5a, 0x5a),
    ("nested", |rig| pasid(rig, 0, |word| word & !(7 << 6) | 3 << 6), 0x5b, 0x5b),
    ("type that is none", |rig| pasid(rig, 0, |word| word & !(7 << 6)), 0x5b, 0x5b),
];

const SECOND: &[Case] = &[
    ("the other stage", |rig| pasid(rig, 0, |word| word & !(7 << 6) | 1 << 6), 0x5b, 0x5b),
    ("width not supported", |rig| pasid(rig, 0, |word| word & !0x1c | 3 << 2), 0x5b, 0x5b),
    ("tables nowhere", |rig| rig.attach(DEVICE, 1, RAM), 0x7b, 0x7b),
    ("a lower table nowhere", |rig| page(rig, 2, |_| RAM | RW), 0x78, 0x78),
    ("not present", |rig| page(rig, 1, |_| 0x8000), 0x79, 0x79),
    ("not present above", |rig| page(rig, 3, |_| 0), 0x79, 0x79),
    ("read only", |rig| page(rig, 1, |_| 0x8000 | READ), 0, 0x85),
    ("write only", |rig| page(rig, 1, |_| 0x8000 | WRITE), 0x86, 0),
    ("read only above", |rig| page(rig, 3, |word| word & !WRITE), 0, 0x85),
    ("beyond the host's width", |rig| page(rig, 1, |word| word | 1 << 48), 0x7a, 0x7a),
    ("snoop in a table's entry", |rig| page(rig, 2, |word| word | 1 << 11), 0x7a, 0x7a),
    ("target among the interrupts", |rig| page(rig, 1, |_| 0xfee0_0000 | RW), 0x87, 0x87),
];

const FIRST: &[Case] = &[
    ("the other stage", |rig| pasid(rig, 0, |word| word & !(7 << 6) | 2 << 6 | 2 << 2), 0x5b, 0x5b),
    ("five levels where there are four", |rig| pasid(rig, 2, |word| word | 1 << 2), 0x5b, 0x5b),
    ("tables beyond the host's width", |rig| pasid(rig, 2, |word| word | 1 << 50), 0x5a, 0x5a),
    ("tables nowhere", |rig| rig.attach(DEVICE, 1, RAM), 0x73, 0x73),
    ("a lower table nowhere", |rig| page(rig, 2, |_| RAM | FIRST_RW), 0x70, 0x70),
    ("not present", |rig| page(rig, 1, |word| word & !1), 0x71, 0x71),
    ("not present above", |rig| page(rig, 3, |_| 0), 0x71, 0x71),
    ("read only", |rig| page(rig, 1, |_| 0x8000 | FIRST_READ), 0, 0x85),
    ("read only above", |rig| page(rig, 3, |word| word & !2), 0, 0x85),
    ("for supervisors", |rig| page(rig, 1, |word| word & !4), 0x81, 0x81),
    ("for supervisors above", |rig| page(rig, 4, |word| word & !4), 0x81, 0x81),
    ("beyond the host's width", |rig| page(rig, 1, |word| word | 1 << 48), 0x72, 0x72),
    ("large page with an odd target", |rig| page(rig, 2, |_| 0x2000 | LARGE | FIRST_RW), 0x72, 0x72),
    ("large page where there is none", |rig| page(rig, 4, |word| word | LARGE), 0x72, 0x72),
    ("target among the interrupts", |rig| page(rig, 1, |_| 0xfeef_f000 | FIRST_RW), 0x87, 0x87),
    ("bits that are the driver's", |rig| page(rig, 1, |word| word | 7 << 9 | 0xfff << 52), 0, 0),
];

#[test]
fn each_wrong_entry_gives_its_reason() {
    for (stage, own) in [(Stage::Second, SECOND), (Stage::First, FIRST)] {
        for caching_mode in [true, false] {
            for (what, setup, reads, writes) in BOTH.iter().chain(own) {
                let config = Config { caching_mode, scalable: Some(stage), ..Config::default() };
                let (mut rig, endpoint) = Rig::started(config);
                setup(&mut rig);
                rig.global_invalidation();
                let mut reader = reader(&endpoint);
                for (kind, reason) in [(Access::READ, *reads), (Access::WRITE, *writes)] {
                    let outcome = access(&mut reader, 0x1234, kind);
                    let expected = (reason != 0).then_some((DEVICE, reason, 0x1000, kind == Access::READ));
                    assert_eq!(rig.fault(), expected, "{what}, {kind:?}, {stage:?}");
                    assert_eq!(outcome.ok(), (reason == 0).then_some(0x8234), "{what}, {kind:?}, {stage:?}");
                }
                assert_eq!(rig.fault(), None);
            }
        }
    }
}

#[test]
fn requests_with_a_pasid_have_reasons_of_their_own() {
    for stage in [Stage::Second, Stage::First] {
        let (mut rig, _endpoint) = Rig::started(Config { scalable: Some(stage), ..Config::default() });
        let inside = rig.vtd.add_pasid(DEVICE, 8191).unwrap();
        let beyond = rig.vtd.add_pasid(DEVICE, 8192).unwrap();
        good(&mut rig);
        rig.global_invalidation();
        let (mut inside, mut beyond) = (reader(&inside), reader(&beyond));
        assert!(access(&mut inside, 0x1000, Access::READ).is_err());
        assert_eq!(rig.fault_with_pasid(), Some((Some(8191), 0x51)));
        assert!(access(&mut beyond, 0x1000, Access::READ).is_err());
        assert_eq!(rig.fault_with_pasid(), Some((Some(8192), 0x46)));
        let at = rig.context_at(DEVICE);
        rig.poke(at, rig.peek(at) & !(1 << 3));
        rig.submit(&[device_context(DEVICE)]);
        assert!(access(&mut inside, 0x1000, Access::READ).is_err());
        assert_eq!(rig.fault_with_pasid(), Some((Some(8191), 0x45)));
    }
}

#[test]
fn the_root_table_can_be_unreadable_or_of_a_mode_that_is_none() {
    for (root, reason) in [(RAM | 1 << 10, 0x38), (ROOT | 2 << 10, 0x30), (ROOT | 3 << 10, 0x30)] {
        let (mut rig, endpoint) = Rig::started(Config { scalable: Some(Stage::Second), ..Config::default() });
        rig.write64(viommu_vtd::spec::register::ROOT_TABLE, root);
        rig.command(1 << 31 | 1 << 30 | 1 << 26);
        rig.global_invalidation();
        assert!(access(&mut reader(&endpoint), 0, Access::READ).is_err());
        assert_eq!(rig.fault(), Some((DEVICE, reason, 0, true)));
    }
}

#[test]
fn faults_are_not_recorded_where_an_entry_of_any_kind_says_so() {
    let quiet: [Setup; 3] = [
        |rig| context(rig, 0, |word| word | 2),
        |rig| directory(rig, |word| word | 2),
        |rig| pasid(rig, 0, |word| word | 2),
    ];
    for stage in [Stage::Second, Stage::First] {
        for setup in quiet {
            let (mut rig, endpoint) = Rig::started(Config { scalable: Some(stage), ..Config::default() });
            setup(&mut rig);
            rig.global_invalidation();
            let mut reader = reader(&endpoint);
            assert!(access(&mut reader, 0x1000, Access::READ).is_ok());
            assert!(access(&mut reader, 0x5000, Access::READ).is_err());
            assert_eq!((rig.fault(), rig.vtd.metrics().faults_quiet), (None, 1));
        }
    }
}
