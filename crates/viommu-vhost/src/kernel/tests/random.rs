//! Random steps, misses and stalls, with the software IOTLB as the device and the naive reference beside the record: a
//! device never has an entry that the record has not, but for a step that is not over.

use std::collections::BTreeMap;

use proptest::prelude::*;
use viommu::fuzzing::reference::{Cell, Pages, given};
use viommu::{StepError, View};

use super::*;

/// What a page comes to: host address and access.
type Seen = BTreeMap<u64, (Gpa, Access)>;

#[derive(Clone, Debug)]
enum Op {
    Map(Mapping),
    Replace(Mapping),
    Unmap(u64, u64),
    Batch(u64, u64, Mapping),
    Attach(bool),
    Backing(bool),
    /// The device touches a page.
    Touch(u64, Access),
    /// The worker runs.
    Serve,
    Stall(bool),
    /// The next message of the kind but so many is refused, once.
    Refuse(u8, usize),
    /// Time passes.
    Expire,
    Restart,
}

fn access() -> impl Strategy<Value = Access> {
    (0..4_u8).prop_map(Access::from_bits_truncate)
}

fn mapping() -> impl Strategy<Value = Mapping> {
    let targets = prop_oneof![8 => 0..36_u64, 2 => 62..82_u64, 1 => 254..266_u64];
    (0..24_u64, 0..12_u64, targets, access())
        .prop_map(|(first, more, gpa, access)| map_of(first, first + more, gpa, access))
}

fn op() -> impl Strategy<Value = Op> {
    let touched = prop_oneof![Just(Access::READ), Just(Access::WRITE)];
    prop_oneof![
        6 => mapping().prop_map(Op::Map),
        3 => mapping().prop_map(Op::Replace),
        4 => (0..24_u64, 0..24_u64).prop_map(|(first, more)| Op::Unmap(first, first + more)),
        1 => Just(Op::Unmap(0, u64::MAX / PAGE)),
        2 => (0..24_u64, 0..24_u64, mapping()).prop_map(|(first, more, m)| Op::Batch(first, first + more, m)),
        1 => any::<bool>().prop_map(Op::Attach),
        1 => any::<bool>().prop_map(Op::Backing),
        12 => (0..36_u64, touched).prop_map(|(page, access)| Op::Touch(page, access)),
        8 => Just(Op::Serve),
        2 => any::<bool>().prop_map(Op::Stall),
    ]
}

/// With what has a device cut off.
fn rough_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        40 => op(),
        1 => (prop_oneof![Just(kind::UPDATE), Just(kind::INVALIDATE)], 0..3_usize)
            .prop_map(|(of, good)| Op::Refuse(of, good)),
        1 => Just(Op::Expire),
        1 => Just(Op::Restart),
    ]
}

struct World {
    rig: Rig,
    reference: Pages,
    backing: Vec<Extent>,
    attached: bool,
    /// Steps that are not over, with what they took away.
    open: Vec<(Completion, Seen)>,
}

impl World {
    fn new(writes: Writes, room: usize) -> Self {
        let room = NonZero::new(room).unwrap();
        let peer = Peer::new();
        let cut = peer.clone();
        let rig = Rig::over(peer, protocol(), |device| {
            device.writes(writes).entries(room).fence(move || {
                cut.lock().iotlb.fence();
                Ok(())
            })
        });
        let (reference, backing) = (Pages::default(), backing().to_vec());
        Self { rig, reference, backing, attached: true, open: Vec::new() }
    }

    /// What the device may be told now, by the reference.
    fn due(&self) -> Seen {
        let of = |(page, cell): (&u64, &Cell)| {
            let (gpa, access, registers) = given(&self.backing, cell)?;
            (!registers).then(|| (*page, (self.rig.host(gpa), access)))
        };
        if self.attached { self.reference.0.iter().filter_map(of).collect() } else { Seen::new() }
    }

    fn step(&mut self, before: &Seen, done: Completion) {
        let after = self.due();
        let gone = before.iter().filter(|(page, was)| after.get(*page) != Some(*was));
        self.open.push((done, gone.map(|(page, was)| (*page, *was)).collect()));
    }

    fn on_domain(&mut self, outcome: Result<Completion, StepError>, change: impl FnOnce(&mut Pages)) {
        let before = self.due();
        match outcome {
            Ok(done) => {
                change(&mut self.reference);
                self.step(&before, done);
            }
            Err(error) => self.step(&before, error.completion),
        }
    }

    fn run(&mut self, op: &Op) {
        let whole = |m: &Mapping| (m.range.start().0 / PAGE, m.range.last().0 / PAGE);
        match op {
            Op::Map(m) => {
                let outcome = self.rig.domain.map(*m);
                self.on_domain(outcome, |pages| pages.map(m));
            }
            Op::Replace(m) => {
                let outcome = self.rig.domain.replace(*m);
                self.on_domain(outcome, |pages| {
                    let (first, last) = whole(m);
                    pages.unmap(first, last);
                    pages.map(m);
                });
            }
            Op::Unmap(first, last) => {
                let outcome = self.rig.domain.unmap(pages(*first, *last));
                self.on_domain(outcome, |pages| pages.unmap(*first, *last));
            }
            Op::Batch(first, last, m) => {
                let outcome = self.rig.domain.batch().unmap(pages(*first, *last)).map(*m).commit();
                self.on_domain(outcome, |pages| {
                    pages.unmap(*first, *last);
                    pages.map(m);
                });
            }
            Op::Attach(on) => {
                let before = self.due();
                let outcome = if *on { self.rig.endpoint.attach(1) } else { self.rig.endpoint.block() };
                self.attached = match self.rig.endpoint.attached() {
                    Some(view) => view == View::Domain(1),
                    None => false,
                };
                self.step(&before, outcome.unwrap_or_else(|error| error.completion));
            }
            Op::Backing(there) => {
                let before = self.due();
                let all = extent((64, 71), Medium::Ram);
                let iommu = &self.rig.iommu;
                let outcome = if *there { iommu.add_backing(all) } else { iommu.remove_backing(all.range) };
                self.backing = iommu.backing();
                self.step(&before, outcome.unwrap_or_else(|error| error.completion));
            }
            Op::Touch(page, access) => {
                self.rig.peer.reach(page * PAGE, *access);
            }
            Op::Serve => {
                let _ = self.rig.handle.serve(&self.rig.subscription);
                self.rig.peer.lock().fails = None;
            }
            Op::Stall(on) => self.rig.peer.stall(*on),
            Op::Refuse(of, good) => self.rig.peer.lock().fails = Some((*of, *good, Errno::FAULT)),
            Op::Expire => self.rig.handle.expire(Instant::now() + Duration::from_secs(60)),
            Op::Restart => {
                self.rig.handle.stop();
                let mut peer = self.rig.peer.lock();
                if !peer.iotlb.is_fenced() {
                    peer.iotlb.reset();
                }
                drop(peer);
                let _ = self.rig.handle.start();
            }
        }
    }

    fn check(&mut self) {
        self.open.retain_mut(|(done, _)| !done.is_complete());
        self.reference.check(&self.rig.domain);
        let due = self.due();
        let peer = self.rig.peer.lock();
        for entry in peer.iotlb.iter() {
            for at in (entry.range.start().0..=entry.range.last().0).step_by(0x1000) {
                let (page, has) = (at / PAGE, (entry.translate(Iova(at)), entry.access));
                let allowed = due.get(&page) == Some(&has)
                    || self.open.iter().any(|(_, gone)| gone.get(&page) == Some(&has));
                assert!(
                    allowed,
                    "the device has page {page} as {has:?}, which should be {:?}",
                    due.get(&page)
                );
            }
        }
        assert_eq!(peer.iotlb.overlaps(), 0);
        let fenced = peer.iotlb.is_fenced();
        drop(peer);
        assert_eq!(fenced, self.rig.handle.is_fenced());
        if fenced {
            assert!(self.rig.subscription.is_fenced());
        }
        self.rig.check_audits();
    }

    /// With a device that takes everything, all is over, and what it asks it gets.
    fn finish(&mut self) {
        self.rig.peer.stall(false);
        self.rig.peer.lock().fails = None;
        for _ in 0..10 {
            let _ = self.rig.handle.serve(&self.rig.subscription);
        }
        self.check();
        assert!(self.open.is_empty(), "{} steps are not over", self.open.len());
        if self.rig.handle.is_fenced() || self.rig.handle.start().is_err() {
            return;
        }
        let due = self.due();
        for (page, (host, access)) in due {
            let wanted = if access.contains(Access::READ) { Access::READ } else { Access::WRITE };
            let mut found = self.rig.peer.reach(page * PAGE, wanted);
            if found == Lookup::Miss {
                let _ = self.rig.serve();
                found = self.rig.peer.reach(page * PAGE, wanted);
            }
            assert_eq!(found, Lookup::Hit(host), "page {page}");
        }
        self.check();
    }
}

fn play(ops: &[Op], writes: Writes, room: usize) {
    let mut world = World::new(writes, room);
    for op in ops {
        world.run(op);
        world.check();
    }
    world.finish();
}

fn writes() -> impl Strategy<Value = Writes> {
    prop_oneof![Just(Writes::InStep), Just(Writes::ByWorker)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn device_has_what_the_record_says(
        ops in prop::collection::vec(op(), 1..80), writes in writes(), room in 1..12_usize,
    ) {
        play(&ops, writes, room);
    }

    #[test]
    fn device_that_fails_has_nothing(
        ops in prop::collection::vec(rough_op(), 1..80), writes in writes(), room in 1..12_usize,
    ) {
        play(&ops, writes, room);
    }
}
