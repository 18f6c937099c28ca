//! Each error at each kind of step: what becomes of the step, the device and everybody else.

use super::*;

/// What a write may fail with: vhost's own, and those of a descriptor in trouble.
const ERRNOS: [Errno; 14] = [
    Errno::FAULT,
    Errno::INVAL,
    Errno::BADF,
    Errno::BADFD,
    Errno::PERM,
    Errno::NOMEM,
    Errno::NOSPC,
    Errno::EXIST,
    Errno::IO,
    Errno::NODEV,
    Errno::PIPE,
    Errno::CONNRESET,
    Errno::NOTCONN,
    Errno::BADMSG,
];

/// A kind of step that takes page 0 to 3, which the device has an entry for, from it.
#[derive(Clone, Copy, Debug)]
enum Step {
    Unmap,
    Replace,
    Batch,
    Replay,
    Block,
    Move,
    Backing,
    Destroy,
    Reset,
    Leave,
}

const STEPS: [Step; 10] = [
    Step::Unmap,
    Step::Replace,
    Step::Batch,
    Step::Replay,
    Step::Block,
    Step::Move,
    Step::Backing,
    Step::Destroy,
    Step::Reset,
    Step::Leave,
];

impl Step {
    fn run(self, rig: &Rig) -> Completion {
        let all = pages(0, 3);
        match self {
            Self::Unmap => rig.domain.unmap(all).unwrap(),
            Self::Replace => rig.domain.replace(rw(0, 3, 8)).unwrap(),
            Self::Batch => rig.domain.batch().unmap(all).map(rw(0, 0, 9)).commit().unwrap(),
            Self::Replay => rig.subscription.replay().unwrap(),
            Self::Block => rig.endpoint.block().unwrap(),
            Self::Move => rig.endpoint.attach(2).unwrap(),
            Self::Backing => rig.iommu.remove_backing(extent((64, 71), Medium::Ram).range).unwrap(),
            Self::Destroy => {
                let mut done = rig.endpoint.block().unwrap();
                done.merge(rig.iommu.destroy_domain(1).unwrap());
                done
            }
            Self::Reset => rig.iommu.reset(viommu::ResetKind::System).unwrap().completion,
            Self::Leave => Completion::ready(),
        }
    }
}

/// With an entry of the device's over pages 0 to 3.
fn rig_with_an_entry() -> Rig {
    let rig = Rig::fenced_by_action();
    rig.iommu.create_domain(2, Tables::Owned).unwrap();
    over(rig.domain.map(rw(0, 3, 64)).unwrap());
    rig.fill(0, Access::READ);
    rig.other_subscription.fill(Iova(0), Access::READ).unwrap();
    rig.peer.take_told();
    rig
}

#[test]
fn removal_that_is_refused_has_the_device_cut_off() {
    for errno in ERRNOS {
        for step in STEPS {
            let rig = rig_with_an_entry();
            rig.peer.lock().fails = Some((kind::INVALIDATE, 0, errno));
            if matches!(step, Step::Leave) {
                over(leave(rig));
                continue;
            }
            let done = step.run(&rig);
            over(done);
            assert!(rig.handle.counts().refused == 1, "{step:?} {errno:?}");
            rig.check_fenced();
        }
    }
}

/// The device would go on with what it has when its subscription has ended: it is cut off.
fn leave(rig: Rig) -> Completion {
    let Rig { subscription, handle, peer, .. } = rig;
    let mut done = subscription.leave();
    assert!(done.is_complete() && handle.is_fenced());
    assert_eq!(peer.lock().iotlb.lookup(Iova(0), Access::READ), Lookup::Fenced);
    done
}

#[test]
fn removal_that_waits_at_first_is_the_same_as_one_that_does_not() {
    for step in STEPS {
        let rig = rig_with_an_entry();
        rig.peer.stall(true);
        if matches!(step, Step::Leave) {
            let Rig { subscription, handle, peer, .. } = rig;
            let mut done = subscription.leave();
            assert!(!done.is_complete());
            assert!(handle.flush().waits);
            peer.stall(false);
            assert_eq!(handle.flush(), Turn::default());
            over(done);
            assert_eq!(peer.lock().iotlb.len(), 0);
            assert_eq!(handle.start().unwrap_err().raw_os_error(), Some(Errno::BADF.raw_os_error()));
            continue;
        }
        let mut done = step.run(&rig);
        assert!(!done.is_complete(), "{step:?}");
        assert_eq!(
            rig.other.held().iter().filter(|m| m.range.overlaps(pages(0, 3))).count(),
            match step {
                // It has not moved, and nothing has gone.
                Step::Block | Step::Move | Step::Replay => 1,
                _ => 0,
            }
        );
        rig.peer.stall(false);
        assert_eq!(rig.serve(), Turn::default());
        over(done);
        assert_eq!(rig.peer.lock().iotlb.entry(Iova(0)), None, "{step:?}");
        rig.check_audits();
    }
}

#[test]
fn removal_that_waits_and_is_refused_then_has_the_device_cut_off() {
    for errno in ERRNOS {
        for step in STEPS {
            if matches!(step, Step::Leave) {
                continue;
            }
            let rig = rig_with_an_entry();
            rig.peer.stall(true);
            let done = step.run(&rig);
            rig.peer.stall(false);
            rig.peer.lock().fails = Some((kind::INVALIDATE, 0, errno));
            assert!(matches!(rig.handle.serve(&rig.subscription), Err(ServeError::Failed)));
            over(done);
            rig.check_fenced();
        }
    }
}

#[test]
fn entry_that_is_refused_is_not_there_and_all_else_goes_on() {
    for errno in ERRNOS {
        let rig = Rig::fenced_by_action();
        over(rig.domain.map(rw(0, 3, 0)).unwrap());
        rig.peer.lock().fails = Some((kind::UPDATE, 0, errno));
        rig.fill(0, Access::READ);
        assert_eq!(rig.peer.take_told(), []);
        assert_eq!((rig.handle.counts().updates, rig.handle.counts().refused), (0, 1));
        // Asked again, it is answered. Whether the device has it was not known, so it is dropped first.
        rig.peer.lock().fails = None;
        rig.fill(0, Access::READ);
        assert_eq!(rig.peer.take_told(), [invalidate(0, 3), update(0, 3, rig.host(0), 3)]);
        over(rig.domain.unmap(pages(0, 3)).unwrap());
        assert_eq!(rig.peer.take_told(), [invalidate(0, 3)]);
        assert!(!rig.subscription.is_fenced());
    }
}

#[test]
fn entry_that_cannot_be_dropped_for_a_new_one_has_the_device_cut_off_at_the_next_removal() {
    let rig = Rig::fenced_by_action();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.lock().fails = Some((kind::INVALIDATE, 0, Errno::FAULT));
    rig.peer.lock().asked.push_back(miss(0, Access::READ));
    assert!(matches!(rig.handle.serve(&rig.subscription), Err(ServeError::Failed)));
    assert!(!rig.subscription.is_fenced(), "what it has is what the record says");
    over(rig.domain.unmap(pages(3, 3)).unwrap_or_else(|error| error.completion));
    over(rig.domain.unmap(pages(0, 3)).unwrap());
    rig.check_fenced();
}

#[test]
fn read_that_fails_is_for_the_worker_and_harms_nobody() {
    for errno in ERRNOS.into_iter().filter(|errno| *errno != Errno::BADFD) {
        let rig = rig_with_an_entry();
        rig.peer.lock().read_fails = Some(errno);
        let Err(ServeError::Read(error)) = rig.handle.serve(&rig.subscription) else { panic!("{errno:?}") };
        assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()));
        over(rig.domain.unmap(pages(0, 3)).unwrap());
        assert_eq!(rig.peer.take_told(), [invalidate(0, 3)]);
        assert!(!rig.subscription.is_fenced());
    }
}

#[test]
fn read_without_an_iotlb_is_nothing_to_read() {
    let rig = rig_with_an_entry();
    rig.peer.lock().read_fails = Some(Errno::BADFD);
    assert_eq!(rig.serve(), Turn::default());
}

#[test]
fn start_without_an_iotlb_fails_and_the_device_stays_stopped() {
    let rig = rig_with_an_entry();
    rig.handle.stop();
    rig.peer.lock().iotlb.reset();
    rig.peer.lock().fails = Some((kind::INVALIDATE, 0, Errno::FAULT));
    assert_eq!(rig.handle.start().unwrap_err().raw_os_error(), Some(Errno::FAULT.raw_os_error()));
    over(rig.domain.unmap(pages(0, 3)).unwrap());
    assert!(!rig.subscription.is_fenced());
}
