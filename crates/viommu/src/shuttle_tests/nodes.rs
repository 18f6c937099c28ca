//! Nodes of the table are used again while readers walk: no answer of another address.

use shuttle::thread;

use super::*;

const PLACES: u64 = 2;

/// Far apart, so that each has nodes of its own, and the same in all lower bits, so that a node of one would answer for
/// another.
fn apart(at: u64) -> IovaRange {
    IovaRange::from_len(Iova((at + 1) << 40), PAGE).unwrap()
}

/// One page after the other at any place. Each target tells its place. Nobody waits for completions, so that a reader
/// can be inside while all around it changes.
fn churn() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let map = |round: u64, at: u64| {
        let target = Gpa((round * PLACES + at) * PAGE);
        domain.map(Mapping::over(apart(at), target, Access::RW).unwrap()).map(drop).is_ok()
    };
    assert!(map(0, 0));
    let device = thread::spawn(move || {
        let mut reader = endpoint.reader("device").unwrap();
        for _ in 0..2 {
            let guard = reader.enter();
            for at in 0..PLACES {
                if let Ok(hit) = guard.translate(apart(at).start(), Access::READ) {
                    assert_eq!(hit.gpa.0 / PAGE % PLACES, at, "the answer of another address");
                }
            }
        }
    });
    for round in 1..5 {
        drop(domain.unmap(IovaRange::ALL).unwrap());
        // Out of memory while a reader holds nodes up is fine.
        map(round, round % PLACES);
    }
    device.join().unwrap();
}

#[test]
fn recycled_node_answers_for_nobody_else() {
    check(churn);
    // What would go wrong takes one long stop of the reader at one place.
    run(PctScheduler::new(2, 20_000), churn);
}
