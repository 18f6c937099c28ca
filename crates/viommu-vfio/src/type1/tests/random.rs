//! Random steps, with a kernel that refuses now and then: after each, the container has what the record says.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Map(Mapping),
    Replace(Mapping),
    Unmap(u64, u64),
    Batch(u64, u64, Mapping),
    Attach(bool),
    Backing(bool),
    /// The next call but so many of `MAP_DMA` is refused.
    Refuse(usize, Errno),
}

fn mapping() -> impl Strategy<Value = Mapping> {
    // The windows' border and all kinds of backing are among them.
    let starts = prop_oneof![0..24_u64, 0xfedfc..0xfee04_u64, (1 << 36) - 4..(1_u64 << 36) + 1];
    let targets = prop_oneof![0..40_u64, 62..82_u64, 254..266_u64, 510..522_u64];
    (starts, 0..12_u64, targets, 0..4_u8).prop_map(|(first, more, gpa, access)| {
        map_of(first, first + more, gpa, Access::from_bits_truncate(access))
    })
}

fn op() -> impl Strategy<Value = Op> {
    let errno = prop_oneof![Just(Errno::ENOMEM), Just(Errno::EFAULT), Just(Errno::EINVAL)];
    prop_oneof![
        6 => mapping().prop_map(Op::Map),
        4 => mapping().prop_map(Op::Replace),
        4 => (0..24_u64, 0..24_u64).prop_map(|(first, more)| Op::Unmap(first, first + more)),
        1 => Just(Op::Unmap(0, u64::MAX / PAGE)),
        2 => (0..24_u64, 0..24_u64, mapping()).prop_map(|(first, more, m)| Op::Batch(first, first + more, m)),
        1 => any::<bool>().prop_map(Op::Attach),
        1 => any::<bool>().prop_map(Op::Backing),
        2 => (0..3_usize, errno).prop_map(|(good, errno)| Op::Refuse(good, errno)),
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
            let extent = Extent { range: gpas(64, 71), medium: Medium::Ram };
            settled(if *there {
                rig.iommu.add_backing(extent)
            } else {
                rig.iommu.remove_backing(extent.range)
            });
        }
        Op::Refuse(good, errno) => {
            let mut fake = rig.fake.lock();
            fake.once = true;
            fake.faults = vec![(Kind::Map, *good, *errno)];
        }
    }
}

fn steps(ops: &[Op], limit: u32) {
    let rig = Rig::with(|config| Config { dma_entry_limit: limit, ..config }, |c| c);
    for op in ops {
        run(&rig, op);
        if rig.subscription.is_fenced() {
            return rig.check_fenced();
        }
        if rig.endpoint.attached().is_some_and(|view| view == viommu::View::Domain(1)) {
            rig.check();
        } else {
            assert_eq!(rig.fake.maps(), 0, "a blocked device reaches nothing");
            rig.check_audits();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn container_has_what_the_record_says(ops in prop::collection::vec(op(), 1..60), limit in 2..20_u32) {
        steps(&ops, limit);
    }
}
