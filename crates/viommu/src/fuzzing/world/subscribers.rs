//! Subscribers come, are filled, get into trouble, and go.

use viommu::subscribe::{OutOfReach, Reach};
use viommu::{Access, FaultReason, FillError, Interest, Iova, IovaRange, Kinds, Space, SubscribeError};

use super::super::recording::{Event, RecordingCache, RecordingMirror, RecordingObserver};
use super::super::reference::{PAGE, range_of};
use super::{DOMAINS, Home, Kind, SLOTS, Sub, World};

impl World {
    pub(super) fn subscribe(&mut self, [a, b, c, d]: [u8; 4]) {
        let slot = usize::from(a) % SLOTS;
        if let Some(sub) = self.subs[slot].take() {
            let done = sub.subscription.leave();
            let resolvers = core::mem::take(&mut sub.handle.lock().resolvers);
            resolvers.into_iter().for_each(|r| r.done());
            self.complete(done);
            let record = sub.handle.lock();
            assert!(
                record.fenced || record.shadow.is_empty(),
                "leaves something behind: {:?}",
                record.shadow
            );
            assert!(record.dropped || sub.kind == Kind::Cache, "kept after it left");
            return;
        }
        let home = match b % 6 {
            0..=2 => Home::Endpoint(usize::from(b) % 6),
            3 => Home::Space(Space::Identity),
            _ => Home::Space(Space::Domain(DOMAINS[usize::from(b) / 6 % 3])),
        };
        let window = match c & 3 {
            0 | 1 => IovaRange::ALL,
            2 => range_of(self.base + 4, self.base + 11),
            _ => range_of(self.base, self.base + 7),
        };
        let offset = match c & 12 {
            4 if window != IovaRange::ALL && self.base == 0 => 64 * PAGE,
            4 if window != IovaRange::ALL => (64 * PAGE).wrapping_neg(),
            _ => 0,
        };
        let kind = match c >> 4 {
            0..=3 => Kind::Cache,
            4 => Kind::Observer,
            _ => Kind::Mirror,
        };
        let kinds = if kind == Kind::Cache { Kinds::UNMAP } else { Kinds::MAP | Kinds::UNMAP };
        let interest = Interest::all_of(kinds).within(window).with_offset(offset);
        let mut reach = Reach {
            replace: d & 1 != 0,
            wide_unmap: d & 2 == 0,
            batches: d & 4 != 0,
            mmio: d & 8 != 0,
            out_of_reach: if d & 16 != 0 { OutOfReach::LeaveOut } else { OutOfReach::Fence },
            ..Reach::default()
        };
        match d >> 5 {
            1 => reach.page_sizes = !0x1fff,
            2 => reach.entries = Some(3),
            3 => {
                let at = |f: u64, l: u64| {
                    let range = range_of(self.base + f, self.base + l);
                    let start = Iova(range.start().0.wrapping_add(offset));
                    IovaRange::new(start, Iova(range.last().0.wrapping_add(offset))).unwrap()
                };
                reach.apertures = vec![at(0, 5), at(8, 15)];
            }
            _ => {}
        }
        let sound = kind != Kind::Mirror || d >> 5 == 0 || d >> 5 > 3;
        let on = self.iommu.clone();
        let outcome;
        let handle;
        macro_rules! subscribe {
            ($made:expr, $at_endpoint:ident, $at_space:ident) => {{
                let (subscriber, its) = $made;
                handle = its;
                outcome = match home {
                    Home::Endpoint(at) => self.endpoints[at].$at_endpoint(subscriber, interest),
                    Home::Space(space) => on.$at_space(space, subscriber, interest),
                };
            }};
        }
        match kind {
            Kind::Mirror => {
                subscribe!(RecordingMirror::new(reach.clone()), subscribe_mirror, subscribe_mirror);
            }
            Kind::Cache => subscribe!(RecordingCache::new(), subscribe_cache, subscribe_cache),
            Kind::Observer => {
                subscribe!(RecordingObserver::new(), subscribe_observer, subscribe_observer);
            }
        }
        match outcome {
            Ok(subscription) => {
                self.subs[slot] = Some(Sub { subscription, handle, kind, home, interest, reach, sound });
            }
            Err(error) => {
                assert!(!sound, "refused for no reason: {error}");
                assert!(matches!(error, SubscribeError::Unreachable { .. }), "not foreseen: {error}");
                assert!(handle.lock().log.is_empty(), "called before it was refused");
            }
        }
    }

    pub(super) fn fill(&mut self, slot: usize, b: u8, c: u8) {
        let Some(sub) = self.subs[slot].as_ref().filter(|s| s.kind == Kind::Cache) else { return };
        let page = self.base + u64::from(b & 15);
        let iova = Iova((page * PAGE + 8).wrapping_add(sub.interest.offset));
        let access = [Access::READ, Access::WRITE, Access::RW, Access::empty()][usize::from(c & 3)];
        let due = self.due_of(sub).get(&((iova.0 - 8) / PAGE)).copied();
        match sub.subscription.fill(iova, access) {
            Ok(entry) => {
                let (gpa, allowed) = due.expect("L9: filled with what is not there");
                assert!(entry.range.contains(iova) && allowed == entry.access && allowed.contains(access));
                assert_eq!(entry.translate(iova).0 / PAGE, gpa);
            }
            Err(FillError::Fault(fault)) => {
                let may = due.is_none_or(|(_, allowed)| !allowed.contains(access));
                assert!(may || fault.reason == FaultReason::Fenced, "not filled: {fault}");
            }
            Err(error) => panic!("not filled: {error}"),
        }
    }

    /// Trouble: a call is refused, acks come later.
    pub(super) fn meddle(&mut self, slot: usize, b: u8, c: u8) {
        let Some(sub) = self.subs[slot].as_mut().filter(|s| s.kind == Kind::Mirror) else { return };
        if b & 1 != 0 {
            let pending = sub.handle.lock().pending;
            sub.handle.lock().pending = !pending;
            return;
        }
        sub.sound = false;
        let (nth, times) = (usize::from(c & 3) + 1, usize::from(c >> 6) % 3 + 1);
        let of: fn(&Event) -> bool = match b >> 1 & 3 {
            0 => |e| matches!(e, Event::Unmap(_)),
            _ => |e| matches!(e, Event::Map(_) | Event::Replace(..)),
        };
        sub.handle.refuse_nth(nth, times, of);
    }

    pub(super) fn replay(&mut self, slot: usize) {
        let Some(sub) = &self.subs[slot] else { return };
        let sound = sub.sound;
        match sub.subscription.replay() {
            Ok(done) => self.complete(done),
            Err(error) => assert!(!sound, "a replay refused for no reason: {error}"),
        }
    }
}
