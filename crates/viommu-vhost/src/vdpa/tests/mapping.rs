//! What is mapped, and by which messages.

use proptest::prelude::*;

use super::*;

const BEGIN: u8 = kind::BATCH_BEGIN;
const END: u8 = kind::BATCH_END;

fn calls_of(rig: &Rig, step: impl FnOnce(&Domain)) -> Vec<(u32, u8)> {
    rig.fake.take_calls();
    step(&rig.domains[0]);
    rig.check();
    rig.fake.take_calls()
}

fn of_space(asid: u32, kinds: &[u8]) -> Vec<(u32, u8)> {
    kinds.iter().map(|kind| (asid, *kind)).collect()
}

#[test]
fn a_step_is_one_batch() {
    let rig = Rig::new();
    let calls = calls_of(&rig, |domain| over(domain.map(rw(100, 103, 14)).unwrap()));
    assert_eq!(calls, of_space(0, &[BEGIN, kind::UPDATE, kind::UPDATE, END]), "two regions");
    let calls = calls_of(&rig, |domain| over(domain.replace(rw(100, 103, 0)).unwrap()));
    assert_eq!(calls, of_space(0, &[BEGIN, kind::INVALIDATE, kind::UPDATE, END]));
    let calls = calls_of(&rig, |domain| over(domain.unmap(IovaRange::ALL).unwrap()));
    assert_eq!(calls, of_space(0, &[BEGIN, kind::INVALIDATE, END]));
    let calls = calls_of(&rig, |domain| over(domain.unmap(IovaRange::ALL).unwrap()));
    assert_eq!(calls, [], "nothing held, nothing said");
}

#[test]
fn a_device_without_batches_gets_plain_messages() {
    let rig = Rig::with(Info { batches: false, ..INFO }, |device| device);
    let calls = calls_of(&rig, |domain| {
        over(domain.map(rw(100, 103, 0)).unwrap());
        over(domain.replace(map_of(100, 103, 4, Access::READ)).unwrap());
    });
    assert_eq!(calls, of_space(0, &[kind::UPDATE, kind::INVALIDATE, kind::UPDATE]));
}

#[test]
fn two_address_spaces_amid_one_step_have_their_batches_one_after_the_other() {
    // Both mirrors follow one domain: a step goes to both before either ends.
    let rig = Rig::new();
    over(rig.endpoints[1].attach(1).unwrap());
    rig.fake.take_calls();
    over(rig.domains[0].map(rw(5, 6, 3)).unwrap());
    over(rig.domains[0].batch().unmap(pages(5, 6)).map(rw(8, 8, 1)).commit().unwrap());
    let entries = [0, 1].map(|asid| rig.fake.reached(asid));
    assert_eq!(entries[0], [(8 * PAGE, 9 * PAGE - 1, rig.host(1), perm::READ_WRITE)]);
    assert_eq!(entries[0], entries[1]);
    let open = rig.fake.take_calls().iter().fold(None, |open: Option<u32>, (asid, kind)| match *kind {
        BEGIN => open.xor(Some(*asid)),
        END => None,
        _ => open.filter(|open| open == asid).or_else(|| panic!("a message amid the batch of another")),
    });
    assert_eq!(open, None);
}

#[test]
fn read_only_memory_registers_and_gaps_are_cut_out() {
    let rig = Rig::new();
    calls_of(&rig, |domain| over(domain.map(rw(0, 15, 64)).unwrap()));
    assert_eq!(rig.fake.reached(0).iter().map(|entry| entry.3).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(calls_of(&rig, |domain| over(domain.map(rw(20, 21, 256)).unwrap())), []);
    assert_eq!(calls_of(&rig, |domain| over(domain.map(rw(30, 31, 1000)).unwrap())), []);
}

#[test]
fn the_range_is_the_aperture_and_the_last_page_is_out_of_it() {
    let range = IovaRange::new(Iova(0x10_000), Iova(0xffff_ffff)).unwrap();
    let rig = Rig::with(Info { range, ..INFO }, |device| device);
    for outside in [rw(0, 0, 0), rw(15, 16, 0), rw(0xf_ffff, 0x10_0000, 0)] {
        over(rig.domains[0].map(outside).unwrap_err().completion);
    }
    over(rig.domains[0].map(rw(16, 17, 0)).unwrap());
    over(rig.domains[0].map(rw(0xf_ffff, 0xf_ffff, 0)).unwrap());
    rig.check();
    let rig = Rig::new();
    let last = u64::MAX / PAGE;
    over(rig.domains[0].map(rw(last, last, 0)).unwrap_err().completion);
    over(rig.domains[0].map(rw(last - 1, last - 1, 0)).unwrap());
    over(rig.domains[0].map(rw(0, 0, 1)).unwrap());
    over(rig.domains[0].unmap(IovaRange::ALL).unwrap());
    rig.check();
}

#[test]
fn entries_are_counted_by_pieces() {
    let rig = Rig::new();
    for at in 0..32 {
        over(rig.domains[0].map(rw(100 + 2 * at, 101 + 2 * at, 15)).unwrap());
    }
    assert_eq!(rig.handles[0].entries(), 64);
    over(rig.domains[0].map(rw(0, 0, 0)).unwrap_err().completion);
    over(rig.domains[0].unmap(pages(100, 101)).unwrap());
    over(rig.domains[0].map(rw(0, 0, 0)).unwrap());
    let error = rig.domains[0].map(rw(10, 11, 15)).unwrap_err();
    assert!(error.to_string().contains("2 entries are wanted beside 63 of 64"), "{error}");
    over(error.completion);
    // Another address space has its own.
    over(rig.domains[1].map(rw(0, 0, 0)).unwrap());
    rig.check();
}

#[test]
fn features_are_those_needed_and_those_asked_for() {
    let all = backend::IOTLB_MSG_V2 | backend::IOTLB_BATCH | backend::IOTLB_ASID | backend::IOTLB_PERSIST;
    assert_eq!(
        wanted(all | backend::SUSPEND | backend::RESUME, backend::SUSPEND),
        Ok(all | backend::SUSPEND)
    );
    assert_eq!(wanted(backend::IOTLB_MSG_V2, 0), Ok(backend::IOTLB_MSG_V2));
    assert_eq!(wanted(backend::IOTLB_BATCH, 0), Err(OpenError::NoMessages));
    assert_eq!(wanted(all, backend::RESUME), Err(OpenError::NoFeatures(backend::RESUME)));
    let device = Device::over(Box::new(Fake::new(INFO, 8)), INFO);
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
    let error = device.mirror(2, memory).map(drop).unwrap_err();
    assert_eq!(error, OpenError::NoAddressSpace { asid: 2, count: 2 });
}

#[test]
fn a_replay_tells_everything_anew() {
    let rig = Rig::new();
    over(rig.domains[0].map(rw(0, 3, 0)).unwrap());
    over(rig.domains[0].map(rw(9, 9, 9)).unwrap());
    rig.fake.take_calls();
    over(rig.subscriptions[0].replay().unwrap());
    rig.check();
    let calls: Vec<u8> = rig.fake.take_calls().iter().map(|call| call.1).collect();
    let count = |wanted| calls.iter().filter(|kind| **kind == wanted).count();
    assert_eq!((count(kind::INVALIDATE), count(kind::UPDATE)), (1, 2), "{calls:?}");
}

#[derive(Clone, Debug)]
enum Op {
    Map(usize, Mapping),
    Replace(usize, Mapping),
    Unmap(usize, u64, u64),
    Batch(usize, u64, u64, Mapping),
    Attach(usize, bool),
    Backing(bool),
    /// The next message of a kind but so many is refused.
    Refuse(usize),
}

fn mapping() -> impl Strategy<Value = Mapping> {
    let starts = prop_oneof![0..24_u64, (u64::MAX / PAGE) - 6..u64::MAX / PAGE];
    let targets = prop_oneof![0..40_u64, 62..82_u64, 254..266_u64, 510..522_u64];
    (starts, 0..6_u64, targets, 0..4_u8).prop_map(|(first, more, gpa, access)| {
        let last = first.saturating_add(more).min(u64::MAX / PAGE);
        map_of(first, last, gpa, Access::from_bits_truncate(access))
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..2_usize, mapping()).prop_map(|(at, m)| Op::Map(at, m)),
        4 => (0..2_usize, mapping()).prop_map(|(at, m)| Op::Replace(at, m)),
        4 => (0..2_usize, 0..24_u64, 0..24_u64).prop_map(|(at, first, more)| Op::Unmap(at, first, first + more)),
        1 => (0..2_usize).prop_map(|at| Op::Unmap(at, 0, u64::MAX / PAGE)),
        2 => (0..2_usize, 0..24_u64, 0..24_u64, mapping())
            .prop_map(|(at, first, more, m)| Op::Batch(at, first, first + more, m)),
        1 => (0..2_usize, any::<bool>()).prop_map(|(at, on)| Op::Attach(at, on)),
        1 => any::<bool>().prop_map(Op::Backing),
        2 => (0..3_usize).prop_map(Op::Refuse),
    ]
}

fn run(rig: &Rig, op: &Op) {
    // What is refused is for the model; that all is right afterwards is what is looked at.
    let settled = |outcome: Result<Completion, viommu::StepError>| {
        over(outcome.unwrap_or_else(|error| error.completion));
    };
    match op {
        Op::Map(at, m) => settled(rig.domains[*at].map(*m)),
        Op::Replace(at, m) => settled(rig.domains[*at].replace(*m)),
        Op::Unmap(at, first, last) => settled(rig.domains[*at].unmap(pages(*first, *last))),
        Op::Batch(at, first, last, m) => {
            settled(rig.domains[*at].batch().unmap(pages(*first, *last)).map(*m).commit());
        }
        Op::Attach(at, on) => {
            let endpoint = &rig.endpoints[*at];
            let outcome =
                if *on { endpoint.attach(u32::try_from(*at).unwrap() + 1) } else { endpoint.block() };
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
        Op::Refuse(good) => {
            let mut fake = rig.fake.lock();
            fake.once = true;
            fake.faults.push((kind::UPDATE, *good, Errno::FAULT));
        }
    }
}

proptest! {
    #[test]
    fn after_any_step_the_device_has_what_the_record_says(
        batches: bool,
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let rig = Rig::with(Info { batches, ..INFO }, |device| device);
        for op in &ops {
            run(&rig, op);
            rig.check();
        }
    }
}
