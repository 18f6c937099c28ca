//! Several virtual CPUs at one bus, while devices use it.

use core::future::Future;
use core::pin::pin;
use core::task::{Context, Poll};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Wake, Waker};

use viommu::{Access, Iova};
use viommu_spapr::spec::Code;
use vm_memory::{Bytes, GuestAddress};

use crate::rig::{A, B, LIST, RW, Rig, code, page, replacing, type1};

#[test]
fn calls_of_several_cpus_on_the_same_entries_are_in_one_order() {
    let mut rig = Rig::new();
    let mirrors = [rig.mirror(type1()), rig.mirror(replacing())];
    for cpu in 0..3_u64 {
        for at in 0..8 {
            let gpa = if (cpu + at) % 2 == 0 { A } else { B };
            let at = GuestAddress(LIST + cpu * 0x1000 + 8 * at);
            rig.memory.write_slice(&(gpa | RW).to_be_bytes(), at).unwrap();
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let mut reader = rig.endpoint.reader("queue").unwrap();
            let mut hits = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let guard = reader.enter();
                for at in 0..8 {
                    if let Ok(hit) = guard.translate(Iova(at * 0x1000 + 4), Access::WRITE) {
                        assert!(hit.gpa.0 == A + 4 || hit.gpa.0 == B + 4);
                        hits += 1;
                    }
                }
            }
            hits
        });
        let cpus: Vec<_> = (0..3_u64)
            .map(|cpu| {
                let rig = &rig;
                scope.spawn(move || {
                    for round in 0..400 {
                        let (at, tce) = ((round * 7 + cpu) % 8 * 0x1000, if round & 1 == 0 { A } else { B });
                        assert_eq!(code(rig.liobn.put_tce(at, tce | RW)), Code::Success);
                        let list = LIST + cpu * 0x1000;
                        assert_eq!(code(rig.liobn.put_tce_indirect(0, list, 8, &rig.memory)), Code::Success);
                        if round % 5 == 0 {
                            assert_eq!(code(rig.liobn.stuff_tce(at, 0, 1)), Code::Success);
                        }
                    }
                })
            })
            .collect();
        cpus.into_iter().for_each(|cpu| cpu.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        device.join().unwrap();
    });
    rig.check();
    let held: Vec<_> = (0..8)
        .map(|at| (at * 0x1000, rig.get(at * 0x1000)))
        .filter(|(_, tce)| *tce != 0)
        .map(|(at, tce)| page(at, tce))
        .collect();
    assert!(mirrors.iter().all(|mirror| mirror.held() == held));
}

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_answer_can_be_awaited() {
    let rig = Rig::new();
    rig.put(0, A | RW);
    let mut reader = rig.endpoint.reader("queue").unwrap();
    let guard = reader.enter();
    let count = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(count.clone());
    let mut context = Context::from_waker(&waker);
    let mut pending = pin!(rig.liobn.put_tce(0, B | RW));
    assert!(pending.as_mut().poll(&mut context).is_pending());
    drop(guard);
    assert!(count.0.load(Ordering::Relaxed) > 0, "the end of the guard wakes");
    let Poll::Ready(answer) = pending.as_mut().poll(&mut context) else { panic!("still pending") };
    assert_eq!(answer.code, Code::Success);
}
