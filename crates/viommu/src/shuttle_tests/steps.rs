//! Steps beside readers: what a guard, a lease or a span may see.

use shuttle::thread;

use super::*;

fn device(endpoint: &Endpoint, memory: &Arc<Memory>, batches: usize) -> thread::JoinHandle<()> {
    let (endpoint, memory) = (endpoint.clone(), memory.clone());
    thread::spawn(move || {
        let mut reader = endpoint.reader("device").unwrap();
        for _ in 0..batches {
            batch(&mut reader, &memory, 2);
        }
    })
}

fn steps_beside_readers() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let mut driver = Driver::<2>::new(&domain, &memory);
    driver.map_all();
    let devices = [0, 1].map(|_| device(&endpoint, &memory, 2));
    for _ in 0..3 {
        let pages = driver.any_step();
        driver.let_go(pages);
    }
    devices.into_iter().for_each(|device| device.join().unwrap());
}

#[test]
fn page_is_not_used_behind_the_completion_of_its_removal() {
    check(steps_beside_readers);
}

/// As [`steps_beside_readers`], but nobody waits: the oracle must see it.
fn steps_without_waiting() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let page = memory.page();
    domain.map(page_at(0, page)).unwrap().wait().unwrap();
    let device = device(&endpoint, &memory, 1);
    drop(domain.unmap(place(0)).unwrap());
    memory.let_go(page);
    device.join().unwrap();
}

#[test]
#[should_panic(expected = "after it was let go")]
fn page_let_go_before_the_completion_is_used() {
    check(steps_without_waiting);
}

/// Two steppers in one domain, each waiting for its own.
fn two_drivers() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let device = device(&endpoint, &memory, 3);
    let drivers = [0, 1].map(|at| {
        let (domain, memory) = (domain.clone(), memory.clone());
        thread::spawn(move || {
            for _ in 0..2 {
                let page = memory.page();
                domain.map(page_at(at, page)).unwrap().wait().unwrap();
                domain.unmap(place(at)).unwrap().wait().unwrap();
                memory.let_go(page);
            }
        })
    });
    drivers.into_iter().chain([device]).for_each(|thread| thread.join().unwrap());
}

#[test]
fn completions_of_two_threads_are_both_reported() {
    check(two_drivers);
}

/// Two unmaps with one completion, which has been polled before the second came to it.
fn merged_completions() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let mut driver = Driver::<2>::new(&domain, &memory);
    driver.map_all();
    // Each uses its page for long.
    let devices = [0, 1].map(|at| {
        let (endpoint, memory) = (endpoint.clone(), memory.clone());
        thread::spawn(move || {
            let mut reader = endpoint.reader("device").unwrap();
            let guard = reader.enter();
            if let Ok(hit) = guard.translate(place(at).start(), Access::READ) {
                (0..8).for_each(|_| memory.access(hit.gpa));
            }
        })
    });
    let mut done = domain.unmap(place(0)).unwrap();
    let _ = done.is_complete();
    done.merge(domain.unmap(place(1)).unwrap());
    let _ = done.is_complete();
    done.wait().unwrap();
    driver.let_go(driver.places.iter().copied().flatten().collect());
    devices.into_iter().for_each(|device| device.join().unwrap());
}

#[test]
fn merged_completion_waits_for_both() {
    check(merged_completions);
}

/// A device that takes leases, uses them behind its guards, and ends them when they are asked back.
fn leases_beside_steps() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let mut driver = Driver::<2>::new(&domain, &memory);
    driver.map_all();
    let device = thread::spawn({
        let memory = memory.clone();
        move || {
            let mut reader = endpoint.reader("device").unwrap();
            for _ in 0..2 {
                let both = IovaRange::new(place(0).start(), place(1).last()).unwrap();
                let lease = {
                    let guard = reader.enter();
                    guard.lease(both, Access::RW, "request", || {})
                };
                if let Ok(lease) = lease {
                    lease.pieces().iter().for_each(|piece| memory.access(piece.gpa));
                }
            }
        }
    });
    for _ in 0..3 {
        let pages = driver.any_step();
        driver.let_go(pages);
    }
    device.join().unwrap();
}

#[test]
fn leased_page_is_not_used_behind_the_completion_of_its_removal() {
    check(leases_beside_steps);
}

/// Two neighbours that are always replaced together; a third page is there to disturb.
fn spans_beside_batches() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let mut pair = Driver::<2>::new(&domain, &memory);
    let first = pair.replace_all();
    assert!(first.is_empty());
    let devices = [0, 1].map(|_| {
        let (endpoint, memory) = (endpoint.clone(), memory.clone());
        thread::spawn(move || {
            let mut reader = endpoint.reader("device").unwrap();
            let both = IovaRange::new(place(0).start(), place(1).last()).unwrap();
            for _ in 0..2 {
                let guard = reader.enter();
                let mut pieces = Vec::new();
                if guard.span(both, Access::READ, &mut pieces).is_ok() {
                    // The two are neighbours in memory too, of whichever step: one piece.
                    let [piece] = pieces.as_slice() else { panic!("a mix of two steps: {pieces:?}") };
                    memory.access(piece.gpa);
                    memory.access(Gpa(piece.gpa.0 + PAGE));
                } else {
                    assert!(pieces.is_empty());
                }
            }
        })
    });
    let disturber = thread::spawn({
        let domain = domain.clone();
        move || {
            for _ in 0..2 {
                domain.map(page_at(7, Gpa((PAGES - 1) * PAGE))).unwrap().wait().unwrap();
                domain.unmap(place(7)).unwrap().wait().unwrap();
            }
        }
    });
    for _ in 0..2 {
        let pages = pair.replace_all();
        pair.let_go(pages);
    }
    devices.into_iter().chain([disturber]).for_each(|thread| thread.join().unwrap());
}

#[test]
fn span_never_mixes_two_steps() {
    check(spans_beside_batches);
}

/// Backing goes while a device uses it.
fn backing_beside_readers() {
    let (iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let page = memory.page();
    domain.map(page_at(0, page)).unwrap().wait().unwrap();
    let device = device(&endpoint, &memory, 3);
    let all = iommu.backing()[0].range;
    iommu.remove_backing(all).unwrap().wait().unwrap();
    memory.let_go(page);
    device.join().unwrap();
}

#[test]
fn memory_is_not_used_behind_the_completion_of_its_removal() {
    check(backing_beside_readers);
}
