//! Attach, detach, reset and removal of endpoints beside readers and steps.

use shuttle::thread;

use super::peers::{Exact, Pages, find, holds};
use super::*;
use crate::iommu::ResetKind;
use crate::subscribe::{Interest, Reach};

/// Two domains, each with one page at the same place, and an endpoint in the first.
struct Two {
    iommu: Iommu,
    endpoint: Endpoint,
    domains: [Domain; 2],
    pages: [Gpa; 2],
    memory: Arc<Memory>,
}

fn two_domains() -> Two {
    let (iommu, first, endpoint) = domain_and_endpoint();
    let second = iommu.create_domain(2, Tables::Owned).unwrap();
    let memory = Memory::new();
    let domains = [first, second];
    let pages = [0, 1].map(|at| {
        let page = memory.page();
        domains[at].map(page_at(0, page)).unwrap().wait().unwrap();
        page
    });
    Two { iommu, endpoint, domains, pages, memory }
}

fn device(two: &Two, batches: usize) -> thread::JoinHandle<()> {
    let (endpoint, memory) = (two.endpoint.clone(), two.memory.clone());
    thread::spawn(move || {
        let Some(mut reader) = endpoint.reader("device") else { return };
        for _ in 0..batches {
            batch(&mut reader, &memory, 1);
        }
    })
}

/// There and back: each time the page of the space that was left may go.
fn attach_beside_readers() {
    let two = two_domains();
    let devices = [2, 3].map(|batches| device(&two, batches));
    two.endpoint.attach(2).unwrap().wait().unwrap();
    two.memory.let_go(two.pages[0]);
    if roll(2) == 0 {
        two.memory.take_back(two.pages[0]);
        two.endpoint.attach(1).unwrap().wait().unwrap();
        two.memory.let_go(two.pages[1]);
    } else {
        two.endpoint.detach().unwrap().wait().unwrap();
        two.memory.let_go(two.pages[1]);
    }
    devices.into_iter().for_each(|device| device.join().unwrap());
}

#[test]
fn old_space_is_not_used_behind_the_completion_of_an_attach() {
    check(attach_beside_readers);
}

/// A guard that began before an attach sees the new space as soon as the attach has returned.
fn attach_in_the_middle_of_a_batch() {
    let two = two_domains();
    let attached = Arc::new(AtomicBool::new(false));
    let device = thread::spawn({
        let (endpoint, attached, new) = (two.endpoint.clone(), attached.clone(), two.pages[1]);
        move || {
            let mut reader = endpoint.reader("device").unwrap();
            let guard = reader.enter();
            for _ in 0..3 {
                let is_attached = attached.load(Ordering::SeqCst);
                let hit = guard.translate(Iova(0), Access::READ).unwrap();
                assert!(!is_attached || hit.gpa == new, "the old space is still seen");
            }
        }
    });
    let done = two.endpoint.attach(2).unwrap();
    attached.store(true, Ordering::SeqCst);
    done.wait().unwrap();
    device.join().unwrap();
}

#[test]
fn attach_bites_in_the_middle_of_a_batch() {
    check(attach_in_the_middle_of_a_batch);
}

/// Both domains are unmapped while the endpoint moves: each unmap waits for who departed and for who came.
fn unmaps_beside_an_attach() {
    let two = two_domains();
    let devices = [2, 2].map(|batches| device(&two, batches));
    let drivers = [0, 1].map(|at| {
        let (domain, memory, page) = (two.domains[at].clone(), two.memory.clone(), two.pages[at]);
        thread::spawn(move || {
            domain.unmap(place(0)).unwrap().wait().unwrap();
            memory.let_go(page);
        })
    });
    two.endpoint.attach(2).unwrap().wait().unwrap();
    two.endpoint.attach(1).unwrap().wait().unwrap();
    devices.into_iter().chain(drivers).for_each(|thread| thread.join().unwrap());
}

#[test]
fn unmaps_in_both_spaces_wait_for_an_endpoint_between_them() {
    check(unmaps_beside_an_attach);
}

/// A cache follows the endpoint; the device looks into it under its guards and fills it.
fn attach_beside_fills() {
    let two = two_domains();
    let (cache, entries) = Pages::new();
    let subscription = Arc::new(two.endpoint.subscribe_cache(cache, Interest::CACHE).unwrap());
    let device = thread::spawn({
        let (memory, endpoint) = (two.memory.clone(), two.endpoint.clone());
        let (entries, subscription) = (entries.clone(), subscription.clone());
        move || {
            let mut reader = endpoint.reader("device").unwrap();
            for _ in 0..3 {
                let guard = reader.enter();
                if let Some(gpa) = find(&entries, Iova(0)) {
                    memory.access(gpa);
                    memory.access(gpa);
                }
                drop(guard);
                let _ = subscription.fill(Iova(0), Access::READ);
            }
        }
    });
    for (to, left) in [(2, two.pages[0]), (1, two.pages[1])] {
        two.memory.take_back(two.pages[to as usize - 1]);
        two.endpoint.attach(to).unwrap().wait().unwrap();
        assert!(!holds(&entries, left), "a stale entry");
        two.memory.let_go(left);
    }
    device.join().unwrap();
    assert!(subscription.audit().unwrap().is_clean());
}

#[test]
fn cache_holds_nothing_of_a_space_that_was_left() {
    check(attach_beside_fills);
}

/// Steps in two domains, an endpoint with a mirror that moves between them, and a device.
fn steps_and_attaches() {
    let two = two_domains();
    let (mirror, shadow) = Exact::new(Reach::default());
    let subscription = two.endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    let device = device(&two, 2);
    let drivers = [0, 1].map(|at| {
        let (domain, memory) = (two.domains[at].clone(), two.memory.clone());
        thread::spawn(move || {
            for at in 1..=2 {
                let page = memory.page();
                domain.map(page_at(at, page)).unwrap().wait().unwrap();
                if roll(2) == 0 {
                    domain.unmap(place(at)).unwrap().wait().unwrap();
                    memory.let_go(page);
                }
            }
        })
    });
    for to in [2, 1, 2] {
        two.endpoint.attach(to).unwrap().wait().unwrap();
    }
    drivers.into_iter().chain([device]).for_each(|thread| thread.join().unwrap());
    let audit = subscription.audit().unwrap();
    assert!(audit.is_clean(), "{audit:?}");
    assert_eq!(audit.held, two.domains[1].len());
    subscription.leave().wait().unwrap();
    assert!(shadow.lock().unwrap().held.is_empty());
    assert_eq!(two.iommu.outstanding(), 0);
}

#[test]
fn steps_on_two_domains_and_an_attach_between_do_not_deadlock() {
    check(steps_and_attaches);
}

/// A reset beside a device that was not stopped and a driver that goes on.
fn reset_beside_readers_and_steps() {
    let two = two_domains();
    let devices = [1, 2].map(|batches| device(&two, batches));
    let driver = thread::spawn({
        let (domain, memory) = (two.domains[0].clone(), two.memory.clone());
        move || {
            // The domain may be gone at any time.
            for at in 0..2 {
                let page = memory.page();
                let Ok(done) = domain.replace(page_at(at, page)) else { return };
                done.wait().unwrap();
            }
        }
    });
    let reset = two.iommu.reset(ResetKind::System).unwrap();
    reset.completion.wait().unwrap();
    for page in 0..PAGES {
        two.memory.let_go(Gpa(page * PAGE));
    }
    assert!(two.iommu.domains().is_empty());
    devices.into_iter().chain([driver]).for_each(|thread| thread.join().unwrap());
    assert_eq!(two.iommu.outstanding(), 0);
}

#[test]
fn nothing_is_used_behind_the_completion_of_a_reset() {
    check(reset_beside_readers_and_steps);
}

/// Hot-unplug beside the device's own threads and a step.
fn removal_beside_readers_and_steps() {
    let two = two_domains();
    let (mirror, shadow) = Exact::new(Reach::default());
    let subscription = two.endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    let devices = [1, 2].map(|batches| device(&two, batches));
    let driver = thread::spawn({
        let (domain, memory) = (two.domains[0].clone(), two.memory.clone());
        move || {
            let page = memory.page();
            domain.map(page_at(1, page)).unwrap().wait().unwrap();
            domain.unmap(place(1)).unwrap().wait().unwrap();
            memory.let_go(page);
        }
    });
    two.endpoint.clone().remove().unwrap().wait().unwrap();
    two.memory.let_go(two.pages[0]);
    {
        let mut shadow = shadow.lock().unwrap();
        assert!(shadow.held.is_empty() && !shadow.running);
        shadow.left = true;
    }
    devices.into_iter().chain([driver]).for_each(|thread| thread.join().unwrap());
    subscription.leave().wait().unwrap();
}

#[test]
fn nothing_is_used_behind_the_completion_of_an_endpoints_removal() {
    check(removal_beside_readers_and_steps);
}

/// Readers come and go while their endpoint moves.
fn readers_come_beside_an_attach() {
    let two = two_domains();
    let devices = [0, 1].map(|_| {
        let (endpoint, memory) = (two.endpoint.clone(), two.memory.clone());
        thread::spawn(move || {
            for _ in 0..2 {
                batch(&mut endpoint.reader("short").unwrap(), &memory, 1);
            }
        })
    });
    two.endpoint.attach(2).unwrap().wait().unwrap();
    two.memory.let_go(two.pages[0]);
    two.domains[1].unmap(place(0)).unwrap().wait().unwrap();
    two.memory.let_go(two.pages[1]);
    devices.into_iter().for_each(|device| device.join().unwrap());
}

#[test]
fn reader_made_beside_an_attach_is_awaited() {
    check(readers_come_beside_an_attach);
}
