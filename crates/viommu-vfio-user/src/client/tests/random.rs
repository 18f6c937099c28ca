//! Random steps, with a server that refuses now and then: after each, it has what the record says.

use proptest::prelude::*;

use super::*;
use crate::spec::Command;

#[derive(Clone, Debug)]
enum Op {
    Map(Mapping),
    Replace(Mapping),
    Unmap(u64, u64),
    Batch(u64, u64, Mapping),
    Attach(bool),
    Backing(bool),
    /// The next call but so many of DMA_MAP is refused.
    Refuse(usize, u32),
    /// An unmap is refused: the mirror is fenced.
    Break,
}

fn mapping() -> impl Strategy<Value = Mapping> {
    let starts = prop_oneof![0..24_u64, (1 << 36) - 4..(1_u64 << 36) + 1];
    let targets = prop_oneof![0..34_u64, 62..82_u64];
    (starts, 0..12_u64, targets, 0..4_u8).prop_map(|(first, more, gpa, access)| {
        map_of(first, first + more, gpa, Access::from_bits_truncate(access))
    })
}

fn op() -> impl Strategy<Value = Op> {
    let errno = prop_oneof![Just(12), Just(22), Just(28), Just(17)];
    prop_oneof![
        12 => mapping().prop_map(Op::Map),
        8 => mapping().prop_map(Op::Replace),
        8 => (0..24_u64, 0..24_u64).prop_map(|(first, more)| Op::Unmap(first, first + more)),
        2 => Just(Op::Unmap(0, u64::MAX / PAGE)),
        4 => (0..24_u64, 0..24_u64, mapping()).prop_map(|(first, more, m)| Op::Batch(first, first + more, m)),
        2 => any::<bool>().prop_map(Op::Attach),
        2 => any::<bool>().prop_map(Op::Backing),
        4 => (0..3_usize, errno).prop_map(|(good, errno)| Op::Refuse(good, errno)),
        1 => Just(Op::Break),
    ]
}

fn run(rig: &Rig, op: &Op) {
    // What is refused is for the model; that all is right afterwards is what is looked at.
    let settled = |outcome: Result<Completion, viommu::StepError>| {
        over(outcome.unwrap_or_else(|error| error.completion));
    };
    match op {
        Op::Map(m) => settled(rig.domain.map(*m)),
        Op::Replace(m) => settled(rig.domain.replace(*m)),
        Op::Unmap(first, last) => settled(rig.domain.unmap(pages(*first, *last))),
        Op::Batch(first, last, m) => settled(rig.domain.batch().unmap(pages(*first, *last)).map(*m).commit()),
        Op::Attach(on) => {
            let outcome = if *on { rig.endpoint.attach(1) } else { rig.endpoint.block() };
            over(outcome.unwrap_or_else(|error| error.completion));
        }
        Op::Backing(there) => {
            let extent = Extent { range: gpas(64, 79), medium: Medium::Ram };
            settled(if *there {
                rig.iommu.add_backing(extent)
            } else {
                rig.iommu.remove_backing(extent.range)
            });
        }
        Op::Refuse(good, errno) => rig.server.fail_once(Command::DMA_MAP, *good, Fault::Errno(*errno)),
        Op::Break => rig.server.fail_once(Command::DMA_UNMAP, 0, Fault::Errno(2)),
    }
}

fn steps(ops: &[Op], limit: u32) {
    let rig = Rig::with(limit, SOON, MirrorOptions::default());
    for op in ops {
        run(&rig, op);
        if rig.subscription.is_fenced() {
            return rig.check_fenced();
        }
        if rig.endpoint.attached().is_some_and(|view| view == viommu::View::Domain(1)) {
            rig.check();
        } else {
            assert_eq!(rig.server.windows(), [], "a blocked device reaches nothing");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn server_has_what_the_record_says(ops in prop::collection::vec(op(), 1..60), limit in 2..20_u32) {
        steps(&ops, limit);
    }
}
