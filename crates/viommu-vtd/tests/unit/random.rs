//! Random tables and invalidations against a naive reading of the tables.

use std::collections::BTreeMap;

use proptest::prelude::*;
use viommu::Access;
use viommu_vtd::{Config, Width};

use crate::rig::*;

/// Pages by number: target page and access.
type Pages = BTreeMap<u64, (u64, u8)>;

const CAN: u64 = 0x000f_ffff_ffff_f000;

/// All pages that a table of three levels maps, read one by one.
fn pages_of(rig: &Rig, root: u64) -> Pages {
    let mut found = Pages::new();
    for top in 0..512 {
        let one = rig.peek(root + top * 8);
        if one & 3 == 0 {
            continue;
        }
        if one & LARGE != 0 {
            for page in 0..512 * 512 {
                found.insert(top << 18 | page, ((one & CAN) / 4096 + page, (one & 3) as u8));
            }
            continue;
        }
        for middle in 0..512 {
            let two = rig.peek((one & CAN) + middle * 8);
            if two & 3 & one == 0 {
                continue;
            }
            for last in 0..512 {
                let number = top << 18 | middle << 9 | last;
                let (access, target) = match two & LARGE {
                    0 => {
                        let three = rig.peek((two & CAN) + last * 8);
                        if three >> 45 & 0x7f != 0 {
                            continue;
                        }
                        (three & two & one & 3, (three & CAN) / 4096)
                    }
                    _ => (two & one & 3, (two & CAN) / 4096 + last),
                };
                if access != 0 {
                    found.insert(number, (target, access as u8));
                }
            }
        }
    }
    found
}

fn held(handle: &viommu::fuzzing::recording::Handle) -> Pages {
    let mut pages = Pages::new();
    for m in handle.held() {
        let count = (m.range.bytes() / 4096) as u64;
        for page in 0..count {
            let entry = (m.gpa.0 / 4096 + page, m.access.bits());
            assert_eq!(pages.insert(m.range.start().0 / 4096 + page, entry), None, "two over one page");
        }
    }
    pages
}

#[derive(Clone, Debug)]
enum Step {
    Set { page: u64, target: u64, access: u64 },
    Clear { page: u64 },
    Large { slot: u64, target: u64, access: u64 },
    Split { slot: u64 },
    Spoil { page: u64 },
    Above { slot: u64, access: u64 },
    Invalidate { page: u64, order: u64 },
    Domain,
    Context { tables: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let page = || (0_u64..3, 0_u64..12).prop_map(|(slot, page)| slot << 9 | page);
    prop_oneof![
        4 => (page(), 0_u64..1024, 1_u64..4).prop_map(|(page, target, access)| Step::Set { page, target, access }),
        2 => page().prop_map(|page| Step::Clear { page }),
        1 => (0_u64..3, 0_u64..4, 1_u64..4).prop_map(|(slot, target, access)| Step::Large { slot, target, access }),
        1 => (0_u64..3).prop_map(|slot| Step::Split { slot }),
        1 => page().prop_map(|page| Step::Spoil { page }),
        1 => (0_u64..3, 0_u64..4).prop_map(|(slot, access)| Step::Above { slot, access }),
        4 => (page(), 0_u64..6).prop_map(|(page, order)| Step::Invalidate { page, order }),
        1 => Just(Step::Domain),
        1 => (0_usize..3).prop_map(|tables| Step::Context { tables }),
    ]
}

fn play(steps: &[Step]) {
    let (mut rig, endpoint) =
        Rig::started(Config { width: Width::Bits39, host_bits: 45, ..Config::default() });
    let (subscription, handle) = mirror(&endpoint);
    let mut reader = reader(&endpoint);
    let tables = [rig.table(), rig.table()];
    let mut root = tables[0];
    let mut is_attached = false;
    // What the driver was last told is over, and so holds: the mirror's pages.
    for step in steps {
        let before = held(&handle);
        match *step {
            Step::Set { page, target, access } => {
                let above = rig.entry(root, page << 12, 2);
                if rig.peek(above) & LARGE == 0 {
                    rig.map(root, page << 12, target << 12, access);
                }
            }
            Step::Clear { page } | Step::Spoil { page } => {
                let above = rig.entry(root, page << 12, 2);
                if rig.peek(above) & 3 != 0 && rig.peek(above) & LARGE == 0 {
                    let at = rig.entry(root, page << 12, 1);
                    let spoiled = matches!(step, Step::Spoil { .. });
                    rig.poke(at, if spoiled { 1 << 47 | RW } else { 0 });
                }
            }
            Step::Large { slot, target, access } => {
                rig.map_large(root, slot << 21, 2, target << 21, access);
            }
            Step::Split { slot } => {
                let at = rig.entry(root, slot << 21, 2);
                let new = rig.table();
                rig.poke(at, new | RW);
            }
            Step::Above { slot, access } => {
                let at = rig.entry(root, slot << 21, 2);
                rig.poke(at, rig.peek(at) & !3 | access);
            }
            Step::Invalidate { page, order } => rig.submit(&[pages(1, page << 12, order)]),
            Step::Domain => rig.submit(&[domain(1)]),
            Step::Context { tables: which } => {
                is_attached = which < 2;
                match tables.get(which) {
                    Some(table) => {
                        root = *table;
                        rig.attach(DEVICE, 1, root);
                    }
                    None => rig.context(DEVICE, 0, 0),
                }
                rig.submit(&[device_context(DEVICE), domain(1)]);
            }
        }
        let now = held(&handle);
        let wanted = if is_attached { pages_of(&rig, root) } else { Pages::new() };
        match *step {
            Step::Invalidate { page, order } => {
                let first = page >> order << order;
                let inside = |pages: &Pages| {
                    let range = pages.range(first..first + (1 << order));
                    range.map(|(page, entry)| (*page, *entry)).collect::<Vec<_>>()
                };
                assert_eq!(inside(&now), inside(&wanted));
                // Elsewhere it is as it was, or as the tables say by now.
                let all = now.keys().chain(before.keys()).chain(wanted.keys());
                for page in all {
                    let is = now.get(page);
                    assert!(is == before.get(page) || is == wanted.get(page), "{page:#x}");
                }
            }
            Step::Domain | Step::Context { .. } => assert_eq!(now, wanted),
            _ => assert_eq!(now, before),
        }
        // Devices see what was announced, or what is in the tables: never anything else.
        for page in [0, 1, 5, 0x200, 0x203, 0x400] {
            if let Ok(gpa) = access(&mut reader, page << 12, Access::READ) {
                let is = |pages: &Pages| pages.get(&page).is_some_and(|(to, _)| to << 12 == gpa);
                let was_cached = !matches!(step, Step::Domain | Step::Context { .. });
                assert!(is(&wanted) || was_cached, "{page:#x} reaches {gpa:#x}");
            } else if matches!(step, Step::Domain | Step::Context { .. }) {
                assert!(wanted.get(&page).is_none_or(|(_, access)| access & 1 == 0), "{page:#x}");
            }
        }
    }
    assert!(!subscription.is_fenced());
    assert!(subscription.audit().unwrap().is_clean());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn mirrors_hold_what_the_tables_said_at_the_last_invalidation(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        play(&steps);
    }
}
