//! Any bytes as tables, descriptors and register writes: nothing breaks, and mirrors hold what the record says.

use proptest::prelude::*;
use viommu::Access;
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Progress};

use crate::rig::*;

const PAGES: u64 = 6;
const BASE: u64 = 0x20_0000;

#[derive(Clone, Debug)]
enum Step {
    /// An entry of one of a few tables, which refer to each other and to themselves.
    Entry {
        table: u64,
        index: u64,
        value: u64,
    },
    Descriptor {
        low: u64,
        high: u64,
    },
    Register {
        at: u64,
        value: u32,
    },
    Access {
        iova: u64,
        write: bool,
    },
    Mirror {
        come: bool,
    },
    Reset,
}

fn entry() -> impl Strategy<Value = u64> {
    let address = (0..PAGES).prop_map(|page| BASE + page * 0x1000);
    prop_oneof![
        6 => (address.clone(), 0_u64..4).prop_map(|(address, bits)| address | bits),
        2 => (address, any::<u16>()).prop_map(|(address, bits)| address | u64::from(bits) & 0xfff),
        1 => any::<u64>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let iova = prop_oneof![0_u64..0x8000, any::<u64>(), (0_u64..8).prop_map(|i| i << 30)];
    let low = prop_oneof![
        (0_u64..9, 0_u64..4, 0_u64..4)
            .prop_map(|(kind, gran, did)| kind | gran << 4 | did << 16 | 0x10 << 32),
        any::<u64>(),
    ];
    let at = prop_oneof![(0_u64..0x2c0).prop_map(|at| at & !3), Just(r::GLOBAL_COMMAND), Just(r::QUEUE_TAIL)];
    prop_oneof![
        6 => (0..PAGES, prop_oneof![0_u64..8, 0_u64..512], entry())
            .prop_map(|(table, index, value)| Step::Entry { table, index, value }),
        4 => (low, prop_oneof![Just(0), 0_u64..0x10000, any::<u64>()])
            .prop_map(|(low, high)| Step::Descriptor { low, high }),
        2 => (at, prop_oneof![any::<u32>(), (0_u32..32).prop_map(|bit| 1 << bit), Just(0xc400_0000)])
            .prop_map(|(at, value)| Step::Register { at, value }),
        4 => (iova, any::<bool>()).prop_map(|(iova, write)| Step::Access { iova, write }),
        1 => any::<bool>().prop_map(|come| Step::Mirror { come }),
        1 => Just(Step::Reset),
    ]
}

fn play(caching_mode: bool, steps: &[Step]) {
    let config = Config { caching_mode, walk_entries: 1 << 13, device_tlb: true, ..Config::default() };
    let builder = viommu::Iommu::builder().ram(0, RAM).domain_mappings(3000);
    let mut rig = Rig::with(config, builder);
    let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
    rig.start();
    rig.poke(ROOT, BASE | 1);
    let mut reader = reader(&endpoint);
    let mut mirrors = Vec::new();
    for step in steps {
        match *step {
            Step::Entry { table, index, value } => rig.poke(BASE + table * 0x1000 + index * 8, value),
            Step::Descriptor { low, high } => {
                let tail = rig.read64(r::QUEUE_TAIL) % 4096;
                rig.poke(QUEUE + tail, low);
                rig.poke(QUEUE + tail + 8, high);
                rig.write64(r::QUEUE_TAIL, (tail + 16) % 4096);
            }
            Step::Register { at, value } => rig.write32(at, value),
            Step::Access { iova, write } => {
                let kind = if write { Access::WRITE } else { Access::READ };
                let _ = access(&mut reader, iova, kind);
            }
            Step::Mirror { come } if caching_mode => match come {
                true if mirrors.len() < 3 => mirrors.push(mirror(&endpoint)),
                _ => drop(mirrors.pop()),
            },
            Step::Mirror { .. } => {}
            Step::Reset => rig.vtd.reset().completion.wait().unwrap(),
        }
        // Nobody is inside a guard, so all ends by itself.
        let mut calls = 0;
        while rig.vtd.process() != Progress::Idle {
            calls += 1;
            assert!(calls < 10_000, "it does not end");
        }
        for (subscription, handle) in &mirrors {
            assert!(!subscription.is_fenced());
            assert!(subscription.audit().unwrap().is_clean());
            let over_interrupts =
                |m: &viommu::Mapping| m.range.start().0 <= 0xfeef_ffff && m.range.last().0 >= 0xfee0_0000;
            let translating = rig.vtd.is_translating();
            assert!(
                !translating
                    || endpoint.view() == Some(viommu::View::Identity)
                    || !handle.held().iter().any(over_interrupts)
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_leave_mirrors_as_the_record_is(
        caching_mode in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        play(caching_mode, &steps);
    }
}
