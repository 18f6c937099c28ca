use viommu::{Access, Gpa, Iova};

use super::*;
use crate::software::{Config, Container, SoftwareMirror};

fn failing(plan: Plan) -> (Failing<SoftwareMirror>, Faults) {
    let container = Container::new(Config::default()).unwrap();
    Failing::new(SoftwareMirror::new(Arc::new(Mutex::new(container))), plan)
}

fn extent(n: u64) -> Mapping {
    Mapping::new(Iova(n * 0x1000), 0x1000, Gpa(0), Access::RW).unwrap()
}

/// Each of `n` maps in a step of its own: which were refused, by number from 1.
fn steps(mirror: &mut impl Mirror, n: u64) -> Vec<u64> {
    let mut refused = Vec::new();
    for i in 1..=n {
        mirror.begin();
        if let Err(r) = mirror.map(&extent(i)) {
            assert_eq!(r.kind, RefusalKind::Resources);
            refused.push(i);
        }
        let _ = mirror.commit();
    }
    refused
}

#[test]
fn every_nth_map_is_refused_and_told() {
    let (mut mirror, faults) = failing(Plan { map: When::every(3), ..Plan::default() });
    assert_eq!(steps(&mut mirror, 7), [3, 6]);
    assert_eq!(mirror.held().len(), 5);
    let told = faults.take();
    assert_eq!(
        told.iter().map(|f| (f.call, f.number)).collect::<Vec<_>>(),
        [(Call::Map(extent(3)), 3), (Call::Map(extent(6)), 6)]
    );
    assert!(faults.take().is_empty());
    assert_eq!(faults.counts(), Counts { maps: 7, refused_maps: 2, ..Counts::default() });
}

#[test]
fn exactly_one_map_is_refused_or_all_from_it_on() {
    let (mut mirror, _) = failing(Plan { map: When::At(2), ..Plan::default() });
    assert_eq!(steps(&mut mirror, 5), [2]);
    let (mut mirror, _) = failing(Plan { map: When::From(4), ..Plan::default() });
    assert_eq!(steps(&mut mirror, 5), [4, 5]);
    let (mut mirror, _) = failing(Plan { map: When::every(0), ..Plan::default() });
    assert_eq!(steps(&mut mirror, 5), [0_u64; 0]);
}

#[test]
fn what_a_step_takes_back_is_neither_counted_nor_refused() {
    let plan = Plan { map: When::At(2), unmap: When::every(1), ..Plan::default() };
    let (mut mirror, faults) = failing(plan);
    mirror.begin();
    assert!(mirror.map(&extent(1)).is_ok());
    assert!(mirror.map(&extent(2)).is_err());
    assert_eq!(mirror.unmap(extent(1).range).unwrap().bytes, 0x1000);
    assert!(mirror.map(&extent(9)).is_ok(), "what was there comes back");
    mirror.begin();
    assert_eq!(mirror.unmap(extent(9).range).unwrap_err().kind, RefusalKind::Device);
    assert_eq!(mirror.held(), [extent(9)]);
    assert_eq!(faults.counts(), Counts { maps: 2, unmaps: 1, refused_maps: 1, failed_unmaps: 1 });
}

#[test]
fn disarmed_calls_are_not_counted() {
    let (mut mirror, faults) = failing(Plan { map: When::every(2), ..Plan::default() });
    faults.arm(false);
    assert_eq!(steps(&mut mirror, 4), [0_u64; 0]);
    faults.arm(true);
    assert_eq!(mirror.unmap(IovaRange::ALL).unwrap().bytes, 0x4000);
    assert_eq!(steps(&mut mirror, 4), [2, 4]);
    faults.plan(Plan::default());
    assert!(mirror.map(&extent(4)).is_ok());
}

#[test]
fn refused_replace_leaves_the_old_extent() {
    let (mut mirror, faults) = failing(Plan { map: When::At(2), ..Plan::default() });
    mirror.begin();
    assert!(mirror.map(&extent(1)).is_ok());
    let new = Mapping { gpa: Gpa(0x5000), ..extent(1) };
    assert!(mirror.replace(&extent(1), &new).is_err());
    assert_eq!(mirror.held(), [extent(1)]);
    assert_eq!(faults.take()[0].call, Call::Replace { old: extent(1), new });
    mirror.begin();
    assert!(mirror.replace(&extent(1), &new).is_ok());
    assert_eq!(mirror.held(), [new]);
}

#[test]
fn fence_fails_when_planned() {
    let (mut mirror, faults) = failing(Plan { fence_fails: true, ..Plan::default() });
    mirror.begin();
    assert!(mirror.map(&extent(1)).is_ok());
    assert!(mirror.fence().is_err());
    assert_eq!(mirror.held().len(), 1);
    faults.plan(Plan::default());
    assert!(mirror.fence().is_ok());
    assert!(mirror.held().is_empty());
}

#[test]
fn successor_goes_on_counting() {
    let (mut mirror, faults) = failing(Plan { map: When::every(3), ..Plan::default() });
    assert_eq!(steps(&mut mirror, 4), [3]);
    let container = Container::new(Config::default()).unwrap();
    let inner = SoftwareMirror::new(Arc::new(Mutex::new(container)));
    assert_eq!(steps(&mut Failing::succeeding(inner, &faults), 4), [2], "the sixth of all");
}

#[test]
fn only_the_last_refusals_are_kept() {
    let (mut mirror, faults) = failing(Plan { map: When::every(1), ..Plan::default() });
    let calls = MAX_KEPT_FAULTS as u64 + 3;
    assert_eq!(steps(&mut mirror, calls).len() as u64, calls);
    let kept = faults.take();
    assert_eq!((kept.len(), kept[0].number), (MAX_KEPT_FAULTS, 4));
    assert_eq!(faults.counts().refused_maps, calls);
}
