//! The protocol of guards, leases and views, in all schedules.
//!
//! A table is one word, and the page behind it a counter. Whoever may use a page counts it up with no ordering of its
//! own. [`Page::seal`] is what the guest does when an unmap has completed: it looks at the page. What it sees must be
//! all that was ever done to it: an access that comes later, and one that came before but is not visible yet, both make
//! the count differ at the end.

mod twin;

use core::future::poll_fn;
use core::task::Poll;

use loom::future::block_on;
use loom::model::Builder;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicU64, fence};
use loom::sync::{Arc, Mutex, mpsc};
use loom::thread;

use crate::addr::IovaRange;
use crate::quiesce::published::{Outlook, Published};
use crate::quiesce::slot::{Entry, Grace};
use crate::quiesce::space::Space;

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// What one address of the table leads to.
struct Page {
    mapped: AtomicU64,
    accesses: AtomicU64,
}

impl Page {
    fn new() -> Arc<Self> {
        Arc::new(Self { mapped: AtomicU64::new(1), accesses: AtomicU64::new(0) })
    }

    fn is_mapped(&self) -> bool {
        self.mapped.load(Acquire) != 0
    }

    fn unmap(&self) {
        self.mapped.store(0, Release);
    }

    fn touch(&self) {
        self.accesses.fetch_add(1, Relaxed);
    }

    fn translate_and_touch(&self) {
        if self.is_mapped() {
            self.touch();
        }
    }

    /// The unmap has completed: what is seen now is all there may ever be.
    fn seal(&self) -> u64 {
        self.accesses.load(Relaxed)
    }

    /// To be called when all threads are joined.
    fn check(&self, sealed: u64) {
        assert_eq!(self.accesses.load(Relaxed), sealed, "an access behind the completion");
    }
}

fn wait_for(mut grace: Grace) {
    block_on(poll_fn(|cx| if grace.poll(cx.waker()) { Poll::Ready(()) } else { Poll::Pending }));
}

/// A space with one reader.
fn space() -> (Arc<Space>, Entry) {
    let entry = Entry::new("reader", 1);
    let space = Arc::new(Space::default());
    space.join(entry.slot());
    (space, entry)
}

/// One reader, one unmap, `step` in between.
fn unmap(batches: usize, wait: fn(&Space)) {
    check(3, move || {
        let page = Page::new();
        let (space, mut reader) = space();
        let device = thread::spawn({
            let page = page.clone();
            move || {
                for _ in 0..batches {
                    reader.enter();
                    page.translate_and_touch();
                    reader.leave();
                }
            }
        });
        page.unmap();
        wait(&space);
        let sealed = page.seal();
        device.join().unwrap();
        page.check(sealed);
    });
}

#[test]
fn unmap_that_waits_is_behind_every_access() {
    unmap(2, |space| wait_for(space.grace()));
}

#[test]
fn unmap_that_spins_is_behind_every_access() {
    unmap(1, |space| {
        let mut grace = space.grace();
        while !grace.is_over() {
            thread::yield_now();
        }
    });
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn unmap_that_does_not_wait_is_too_early() {
    unmap(1, |_| {});
}

#[test]
fn two_completions_on_one_guard_are_both_woken() {
    check(3, || {
        let (space, mut reader) = space();
        let device = thread::spawn(move || {
            reader.enter();
            reader.leave();
        });
        let other = thread::spawn({
            let space = space.clone();
            move || wait_for(space.grace())
        });
        wait_for(space.grace());
        other.join().unwrap();
        device.join().unwrap();
    });
}

#[test]
fn guard_begun_after_the_scan_delays_nobody() {
    check(3, || {
        let (space, mut reader) = space();
        let (scanned, is_scanned) = mpsc::channel();
        let (completed, is_completed) = mpsc::channel();
        let device = thread::spawn(move || {
            reader.enter();
            is_scanned.recv().unwrap();
            reader.leave();
            reader.enter();
            is_completed.recv().unwrap();
            reader.leave();
        });
        let grace = space.grace();
        scanned.send(()).unwrap();
        wait_for(grace);
        completed.send(()).unwrap();
        device.join().unwrap();
    });
}

#[test]
fn guards_of_two_readers_are_both_awaited() {
    check(3, || {
        let page = Page::new();
        let (space, mut first) = space();
        let mut second = Entry::new("other", 2);
        space.join(second.slot());
        let device = thread::spawn({
            let page = page.clone();
            move || {
                first.enter();
                page.translate_and_touch();
                first.leave();
            }
        });
        let other = thread::spawn({
            let page = page.clone();
            move || {
                second.enter();
                page.translate_and_touch();
                second.leave();
            }
        });
        page.unmap();
        wait_for(space.grace());
        let sealed = page.seal();
        device.join().unwrap();
        other.join().unwrap();
        page.check(sealed);
    });
}

/// A guard that was leaked ends when its reader enters again, and when the reader is dropped.
fn leaked(enters_again: bool) {
    check(4, move || {
        let page = Page::new();
        let (space, mut reader) = space();
        let device = thread::spawn({
            let page = page.clone();
            move || {
                reader.enter(); // and never leaves
                page.translate_and_touch();
                if enters_again {
                    reader.enter();
                    page.translate_and_touch();
                    reader.leave();
                }
                drop(reader);
            }
        });
        page.unmap();
        wait_for(space.grace());
        let sealed = page.seal();
        device.join().unwrap();
        page.check(sealed);
        assert!(space.grace().is_over());
    });
}

#[test]
fn superseded_guard_wakes_who_waits_for_it() {
    leaked(true);
}

#[test]
fn dropped_reader_wakes_who_waits_for_its_leaked_guard() {
    leaked(false);
}

/// The parts of a step that takes one address from a cache.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Publish,
    TellCache,
    Scan,
}

/// A device with a cache of one entry: a hit is used under a guard, and a miss is filled (cache lock, translate,
/// install). `filled` says whether the cache has the entry already, so that no miss occurs.
fn cache(filled: bool, step: [Part; 3]) {
    check(3, move || {
        let page = Page::new();
        let entry = Arc::new(Mutex::new(filled));
        let (space, mut reader) = space();
        let device = thread::spawn({
            let (page, entry) = (page.clone(), entry.clone());
            move || {
                reader.enter();
                let hit = {
                    let mut entry = entry.lock().unwrap();
                    *entry |= !filled && page.is_mapped();
                    *entry
                };
                if hit {
                    page.touch();
                }
                reader.leave();
            }
        });
        let mut grace = Grace::default();
        for part in step {
            match part {
                Part::Publish => page.unmap(),
                Part::TellCache => *entry.lock().unwrap() = false,
                Part::Scan => grace = space.grace(),
            }
        }
        wait_for(grace);
        let sealed = page.seal();
        assert!(!*entry.lock().unwrap(), "a stale entry stays");
        device.join().unwrap();
        assert!(!*entry.lock().unwrap(), "a stale entry comes");
        page.check(sealed);
    });
}

#[test]
fn fill_beside_an_unmap_leaves_nothing() {
    cache(false, [Part::Publish, Part::TellCache, Part::Scan]);
}

#[test]
fn hit_beside_an_unmap_is_awaited() {
    cache(true, [Part::Publish, Part::TellCache, Part::Scan]);
}

#[test]
#[should_panic(expected = "a stale entry")]
fn cache_told_before_publishing_keeps_a_stale_entry() {
    cache(false, [Part::TellCache, Part::Publish, Part::Scan]);
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn scan_before_the_cache_is_told_is_too_early() {
    cache(true, [Part::Publish, Part::Scan, Part::TellCache]);
}

/// The reader walks from a root to a node; the writer takes the node out of its place, and uses it for another.
fn recycle(wait: fn(&Space)) {
    check(3, move || {
        let places = Arc::new([AtomicU64::new(1), AtomicU64::new(0)]); // the node hangs at the first
        let node = Arc::new(AtomicU64::new(7)); // 7 belongs to the first place, 9 to the second
        let (space, mut reader) = space();
        let device = thread::spawn({
            let (places, node) = (places.clone(), node.clone());
            move || {
                for _ in 0..2 {
                    reader.enter();
                    if places[0].load(Acquire) != 0 {
                        let value = node.load(Acquire);
                        assert!(value == 7 || value == 0, "the first place says {value}");
                    }
                    reader.leave();
                }
            }
        });
        node.store(0, Release); // unmapped
        places[0].store(0, Release); // unlinked
        wait(&space);
        node.store(9, Relaxed);
        places[1].store(1, Release);
        device.join().unwrap();
    });
}

#[test]
fn recycled_node_is_never_seen_from_its_old_place() {
    recycle(|space| wait_for(space.grace()));
}

#[test]
#[should_panic(expected = "the first place says 9")]
fn node_recycled_without_a_grace_is_seen_from_its_old_place() {
    recycle(|_| {});
}

/// An address space of one page, as an endpoint's readers see it.
struct Sight {
    space: Arc<Space>,
    page: Arc<Page>,
}

impl Outlook for Sight {
    fn space(&self) -> Option<&Arc<Space>> {
        Some(&self.space)
    }
}

/// As the crate's reader does it.
struct Reader {
    entry: Entry,
    shared: Arc<Published<Sight>>,
    seen: u64,
    sight: Arc<Sight>,
}

impl Reader {
    fn new(shared: &Arc<Published<Sight>>) -> Self {
        let entry = Entry::new("reader", 1);
        shared.add_slot(entry.slot());
        let (seen, sight) = shared.current();
        Self { entry, shared: shared.clone(), seen, sight }
    }

    fn batch(&mut self) {
        self.entry.enter();
        if self.shared.generation() != self.seen {
            (self.seen, self.sight) = self.shared.current();
        }
        self.translate_and_touch();
        self.entry.leave();
    }

    fn translate_and_touch(&self) {
        if self.shared.generation() == self.seen {
            self.sight.page.translate_and_touch();
        } else {
            self.shared.current().1.page.translate_and_touch();
        }
    }
}

/// Two address spaces and an endpoint that sees the first.
fn two_spaces() -> (Arc<Published<Sight>>, [Arc<Sight>; 2]) {
    let sight = || Arc::new(Sight { space: Arc::default(), page: Page::new() });
    let sights = [sight(), sight()];
    (Arc::new(Published::new(copy(&sights[0]))), sights)
}

fn copy(sight: &Sight) -> Sight {
    Sight { space: sight.space.clone(), page: sight.page.clone() }
}

#[test]
fn attach_waits_for_who_is_still_in_the_old_space() {
    check(3, || {
        let (shared, [old, new]) = two_spaces();
        let mut reader = Reader::new(&shared);
        let device = thread::spawn(move || reader.batch());
        shared.publish(|_| copy(&new));
        // Nothing is unmapped: whoever comes sees the new view, and whoever stays is known in the old one.
        wait_for(old.space.grace_of(Some(1)));
        let sealed = old.page.seal();
        device.join().unwrap();
        old.page.check(sealed);
    });
}

#[test]
fn unmap_in_the_new_space_waits_for_who_came_in_mid_batch() {
    check(3, || {
        let (shared, [_, new]) = two_spaces();
        let mut reader = Reader::new(&shared);
        let device = thread::spawn(move || {
            reader.entry.enter();
            reader.translate_and_touch();
            reader.entry.leave();
        });
        shared.publish(|_| copy(&new));
        new.page.unmap();
        wait_for(new.space.grace());
        let sealed = new.page.seal();
        device.join().unwrap();
        new.page.check(sealed);
    });
}

#[test]
fn attach_there_and_back_forgets_nobody() {
    check(3, || {
        let (shared, [old, new]) = two_spaces();
        let mut reader = Reader::new(&shared);
        let device = thread::spawn(move || {
            reader.entry.enter();
            reader.translate_and_touch();
            reader.entry.leave();
        });
        shared.publish(|_| copy(&new));
        shared.publish(|_| copy(&old));
        for sight in [&old, &new] {
            sight.page.unmap();
            wait_for(sight.space.grace());
        }
        let sealed = [&old, &new].map(|sight| sight.page.seal());
        device.join().unwrap();
        old.page.check(sealed[0]);
        new.page.check(sealed[1]);
    });
}

/// An unmap in one of the spaces while another thread attaches.
fn unmap_beside_an_attach(which: usize) {
    check(3, move || {
        let (shared, sights) = two_spaces();
        let sight = sights[which].clone();
        let mut reader = Reader::new(&shared);
        let device = thread::spawn(move || {
            reader.entry.enter();
            reader.translate_and_touch();
            reader.entry.leave();
        });
        let attach = thread::spawn(move || shared.publish(|_| copy(&sights[1])));
        sight.page.unmap();
        wait_for(sight.space.grace());
        let sealed = sight.page.seal();
        device.join().unwrap();
        attach.join().unwrap();
        sight.page.check(sealed);
    });
}

#[test]
fn unmap_in_the_old_space_beside_an_attach_waits_for_the_departed() {
    unmap_beside_an_attach(0);
}

#[test]
fn unmap_in_the_new_space_beside_an_attach_waits_for_who_came() {
    unmap_beside_an_attach(1);
}

/// The parts of a move that goes wrong.
#[derive(Clone, Copy)]
enum Move {
    Join,
    Publish,
    Depart,
}

/// A move in the given order. Right behind its publication somebody unmaps in the new space, or nobody does.
fn moved(order: [Move; 3], unmap: bool) {
    check(3, move || {
        let spaces: [Arc<Space>; 2] = [Arc::default(), Arc::default()];
        let pages = Arc::new([Page::new(), Page::new()]);
        let view = Arc::new(AtomicU64::new(0));
        let mut reader = Entry::new("reader", 1);
        spaces[0].join(reader.slot());
        let slot = reader.slot().clone();
        let device = thread::spawn({
            let (pages, view) = (pages.clone(), view.clone());
            move || {
                reader.enter();
                let page = &pages[usize::from(view.load(Acquire) != 0)];
                page.translate_and_touch();
                reader.leave();
            }
        });
        let mut sealed_new = None;
        for part in order {
            match part {
                Move::Join => spaces[1].join(&slot),
                Move::Publish => view.store(1, Release),
                Move::Depart => spaces[0].depart(&slot),
            }
            if unmap && matches!(part, Move::Publish) {
                pages[1].unmap();
                wait_for(spaces[1].grace());
                sealed_new = Some(pages[1].seal());
            }
        }
        wait_for(spaces[0].grace());
        let sealed_old = pages[0].seal();
        device.join().unwrap();
        pages[0].check(sealed_old);
        sealed_new.into_iter().for_each(|sealed| pages[1].check(sealed));
    });
}

#[test]
fn move_in_the_right_order_passes() {
    moved([Move::Join, Move::Publish, Move::Depart], true);
    moved([Move::Join, Move::Publish, Move::Depart], false);
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn join_after_publishing_is_too_late() {
    moved([Move::Publish, Move::Join, Move::Depart], true);
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn depart_before_publishing_is_too_early() {
    moved([Move::Join, Move::Depart, Move::Publish], false);
}

/// One reader that takes a lease under its guard and uses it behind the guard, beside an unmap that waits so.
fn lease(wait: fn(&Space)) {
    check(3, move || {
        let page = Page::new();
        let (space, mut reader) = space();
        let device = thread::spawn({
            let (page, space) = (page.clone(), space.clone());
            move || {
                reader.enter();
                // In the set first, then translated.
                let id = space.leases.lend(IovaRange::ALL, 1, "lease", Box::new(|| {}));
                let there = page.is_mapped();
                reader.leave();
                if there {
                    page.touch();
                }
                space.leases.end(id);
            }
        });
        page.unmap();
        wait(&space);
        let sealed = page.seal();
        device.join().unwrap();
        page.check(sealed);
    });
}

fn wait_for_leases(space: &Space) {
    for lent in space.leases.meeting(&[IovaRange::ALL], None) {
        lent.revoke();
        block_on(poll_fn(|cx| if lent.poll(cx.waker()) { Poll::Ready(()) } else { Poll::Pending }));
    }
}

#[test]
fn lease_taken_beside_an_unmap_is_awaited() {
    lease(|space| {
        wait_for(space.grace());
        wait_for_leases(space);
    });
}

#[test]
fn unused_is_said_only_where_nobody_holds_a_lease() {
    lease(|space| {
        if !space.is_unused(&[IovaRange::ALL]) {
            wait_for(space.grace());
            wait_for_leases(space);
        }
    });
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn leases_read_before_the_guards_are_too_few() {
    lease(|space| {
        wait_for_leases(space);
        wait_for(space.grace());
    });
}
