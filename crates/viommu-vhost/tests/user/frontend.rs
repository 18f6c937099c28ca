//! The front end against back ends that do not do as they must.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use viommu::subscribe::FenceFailed;
use viommu::{Access, Gpa, Interest, Iova, IovaRange, Mapping};
use viommu_vhost::software::{Iotlb, SoftwareCache};
use viommu_vhost::spec::{IotlbMsg, VIRTIO_F_ACCESS_PLATFORM, kind};
use viommu_vhost::user::frontend::{FrontendError, Peer};
use viommu_vhost::user::spec::{backend_request, flag, protocol, request};
use zerocopy::{FromBytes, IntoBytes};

use super::support::{Caller, LIMIT, PAGE, Vmm, memory, user, wait};

const SHORT: Duration = Duration::from_millis(300);

/// A front end that is negotiated, and the naive back end's two sockets.
struct Setup {
    vmm: Vmm,
    main: Caller,
    back: Caller,
    cut_off: Arc<AtomicU32>,
}

fn setup(limit: Duration) -> Setup {
    let (front, back) = UnixStream::pair().unwrap();
    let cut_off = Arc::new(AtomicU32::new(0));
    let counter = cut_off.clone();
    let vmm = Vmm::new(front, memory(&[(0, 64 * PAGE)]), limit, move || {
        counter.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let mut main = Caller(back);
    let Vmm { mut caller, .. } = vmm;
    let speaking = thread::spawn(move || {
        caller.protocol();
        caller.features(VIRTIO_F_ACCESS_PLATFORM);
        caller
    });
    // Protocol features, our channel with its descriptor, features.
    let mut channel: Option<OwnedFd> = None;
    for _ in 0..3 {
        let (request, fds) = receive_with_fds(&mut main);
        channel = channel.or(fds);
        answer(&mut main, request, 0);
    }
    let vmm = Vmm { caller: speaking.join().unwrap(), ..vmm };
    Setup { vmm, main, back: Caller(channel.unwrap().into()), cut_off }
}

fn receive_with_fds(caller: &mut Caller) -> (u32, Option<OwnedFd>) {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [core::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut header = [0; 12];
    let mut parts = [std::io::IoSliceMut::new(&mut header)];
    recvmsg(&caller.0, &mut parts, &mut ancillary, RecvFlags::WAITALL).unwrap();
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = part {
            fds.extend(more);
        }
    }
    let request = u32::read_from_bytes(&header[..4]).unwrap();
    let size = u32::read_from_bytes(&header[8..]).unwrap();
    let mut rest = vec![0; usize::try_from(size).unwrap()];
    std::io::Read::read_exact(&mut caller.0, &mut rest).unwrap();
    (request, fds.pop())
}

fn answer(caller: &mut Caller, request: u32, value: u64) {
    caller.send(request, flag::REPLY, value.as_bytes(), &[]);
}

fn iotlb(caller: &mut Caller) -> IotlbMsg {
    let (request, flags, payload) = caller.receive().unwrap();
    assert_eq!((request, flags), (request::IOTLB_MSG, flag::VERSION | flag::NEED_REPLY));
    IotlbMsg::read_from_bytes(&payload).unwrap()
}

fn miss(back: &mut Caller, iova: u64, perm: u8, flags: u32) {
    let body = IotlbMsg { iova, perm, kind: kind::MISS, ..IotlbMsg::default() };
    back.send(backend_request::IOTLB_MSG, flags, body.as_bytes(), &[]);
}

fn page(iova: u64, gpa: u64, access: Access) -> Mapping {
    Mapping::new(Iova(iova), PAGE, Gpa(gpa), access).unwrap()
}

impl Setup {
    /// The back end has one page.
    fn with_a_page(limit: Duration) -> Self {
        let mut setup = setup(limit);
        wait(setup.vmm.domain.map(page(0x1000, 0x5000, Access::RW)).unwrap());
        miss(&mut setup.back, 0x1234, 1, 0);
        let update = iotlb(&mut setup.main);
        assert_eq!((update.kind, update.iova, update.size, update.perm), (kind::UPDATE, 0x1000, PAGE, 3));
        assert_eq!(update.uaddr, user(&setup.vmm.memory, 0x5000));
        answer(&mut setup.main, request::IOTLB_MSG, 0);
        setup
    }
}

#[test]
fn miss_is_answered_when_the_update_is() {
    let Setup { vmm, mut main, mut back, .. } = setup(LIMIT);
    wait(vmm.domain.map(page(0x1000, 0x5000, Access::READ)).unwrap());
    miss(&mut back, 0x1000, 1, flag::NEED_REPLY);
    let update = iotlb(&mut main);
    assert_eq!((update.kind, update.perm), (kind::UPDATE, 1));
    back.0.set_read_timeout(Some(SHORT)).unwrap();
    assert!(back.receive().is_none(), "the MISS was answered before its UPDATE");
    back.0.set_read_timeout(None).unwrap();
    answer(&mut main, request::IOTLB_MSG, 0);
    let (_, flags, payload) = back.receive().unwrap();
    assert_eq!((flags, &payload[..]), (flag::VERSION | flag::REPLY, 0_u64.as_bytes()));
    // What is not there, or not for this, is answered with a failure, and nothing is sent.
    for (iova, perm) in [(0x2000, 1), (0x1000, 2), (0x1000, 3)] {
        miss(&mut back, iova, perm, flag::NEED_REPLY);
        assert_eq!(back.receive().unwrap().2, 1_u64.as_bytes());
    }
    // The same again, and the back end cannot: it is told that its MISS has failed.
    miss(&mut back, 0x1000, 1, flag::NEED_REPLY);
    iotlb(&mut main);
    answer(&mut main, request::IOTLB_MSG, 1);
    assert_eq!(back.receive().unwrap().2, 1_u64.as_bytes());
    let counts = vmm.frontend.counts();
    assert_eq!((counts.misses, counts.misses_refused, counts.updates, counts.refused), (5, 3, 2, 1));
    vmm.frontend.close();
    vmm.server.join().unwrap();
}

#[test]
fn answers_come_in_the_order_of_their_messages() {
    let Setup { vmm, mut main, mut back, .. } = setup(LIMIT);
    wait(vmm.domain.map(page(0x1000, 0x5000, Access::RW)).unwrap());
    miss(&mut back, 0x1000, 1, flag::NEED_REPLY);
    iotlb(&mut main);
    // Nothing is there, a request that is not known, an ACCESS_FAIL: each could be answered at once.
    miss(&mut back, 0x9000, 1, flag::NEED_REPLY);
    back.send(77, flag::NEED_REPLY, &[], &[]);
    let fail = IotlbMsg { kind: kind::ACCESS_FAIL, ..IotlbMsg::default() };
    back.send(backend_request::IOTLB_MSG, flag::NEED_REPLY, fail.as_bytes(), &[]);
    back.0.set_read_timeout(Some(SHORT)).unwrap();
    assert!(back.receive().is_none(), "an answer that the back end takes for that to its first MISS");
    back.0.set_read_timeout(None).unwrap();
    answer(&mut main, request::IOTLB_MSG, 0);
    for (request, value) in [(1, 0_u64), (1, 1), (77, 1), (1, 0)] {
        let (answered, _, payload) = back.receive().unwrap();
        assert_eq!((answered, &payload[..]), (request, value.as_bytes()));
    }
    vmm.frontend.close();
    vmm.server.join().unwrap();
}

#[test]
fn descriptors_that_come_with_a_miss_are_not_kept() {
    let Setup { vmm, mut main, mut back, .. } = setup(LIMIT);
    wait(vmm.domain.map(page(0x1000, 0x5000, Access::RW)).unwrap());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let theirs = std::fs::File::from(OwnedFd::from(theirs));
    let body = IotlbMsg { iova: 0x1000, perm: 1, kind: kind::MISS, ..IotlbMsg::default() };
    back.send(backend_request::IOTLB_MSG, flag::NEED_REPLY, body.as_bytes(), &[&theirs]);
    drop(theirs);
    // The MISS waits for this one's answer.
    iotlb(&mut main);
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(std::io::Read::read(&mut ours, &mut [0]).unwrap(), 0, "kept open");
    answer(&mut main, request::IOTLB_MSG, 0);
    assert_eq!(back.receive().unwrap().2, 0_u64.as_bytes());
    vmm.frontend.close();
    vmm.server.join().unwrap();
}

#[test]
fn unmap_completes_with_the_answer_and_nobody_else_waits() {
    let Setup { vmm, mut main, back: _back, .. } = Setup::with_a_page(LIMIT);
    // Another subscriber of the same endpoint, and another endpoint of the same domain.
    let other = Arc::new(std::sync::Mutex::new(Iotlb::default()));
    let _other =
        vmm.endpoint.subscribe_cache(Box::new(SoftwareCache::new(other.clone())), Interest::CACHE).unwrap();
    other.lock().unwrap().update(&page(0x1000, 0x5000, Access::RW)).unwrap();
    let mut done = vmm.domain.unmap(IovaRange::ALL).unwrap();
    assert_eq!(other.lock().unwrap().iter().count(), 0);
    assert!(!done.is_complete());
    // Steps go on while it is silent, and those that take nothing from it are complete.
    wait(vmm.domain.map(page(0x2000, 0x6000, Access::RW)).unwrap());
    wait(vmm.domain.unmap(page(0x2000, 0, Access::RW).range).unwrap());
    let invalidate = iotlb(&mut main);
    assert_eq!((invalidate.kind, invalidate.iova, invalidate.size), (kind::INVALIDATE, 0x1000, PAGE));
    assert!(!done.is_complete());
    answer(&mut main, request::IOTLB_MSG, 0);
    wait(done);
    assert!(!vmm.endpoint.is_fenced());
    // Everything: as many bytes as back ends can add to an address.
    wait(vmm.domain.map(page(0x1000, 0x5000, Access::RW)).unwrap());
    vmm.subscription.fill(Iova(0x1000), Access::READ).unwrap();
    let done = vmm.subscription.replay().unwrap();
    assert_eq!(iotlb(&mut main).kind, kind::UPDATE);
    let invalidate = iotlb(&mut main);
    assert_eq!((invalidate.kind, invalidate.iova, invalidate.size), (kind::INVALIDATE, 0, u64::MAX));
    answer(&mut main, request::IOTLB_MSG, 0);
    answer(&mut main, request::IOTLB_MSG, 0);
    wait(done);
    vmm.frontend.close();
    vmm.server.join().unwrap();
}

#[test]
fn back_end_that_does_not_answer_is_closed_and_fenced() {
    let Setup { mut vmm, mut main, back: _back, cut_off } = Setup::with_a_page(SHORT);
    let begin = Instant::now();
    let done = vmm.domain.unmap(IovaRange::ALL).unwrap();
    assert!(matches!(vmm.server.join().unwrap(), FrontendError::TimedOut(_)));
    assert_eq!(cut_off.load(Ordering::SeqCst), 0, "fenced before the completion was looked at");
    wait(done);
    assert!(begin.elapsed() < LIMIT / 2);
    assert_eq!(cut_off.load(Ordering::SeqCst), 1);
    assert!(vmm.endpoint.is_fenced() && vmm.subscription.is_fenced());
    assert_eq!(iotlb(&mut main).kind, kind::INVALIDATE);
    assert!(main.receive().is_none() && vmm.caller.receive().is_none());
}

#[test]
fn back_end_that_fails_or_goes_away_is_fenced() {
    for goes in [false, true] {
        let Setup { vmm, mut main, back, cut_off } = Setup::with_a_page(LIMIT);
        let done = vmm.domain.unmap(IovaRange::ALL).unwrap();
        if goes {
            drop((main, back));
        } else {
            iotlb(&mut main);
            answer(&mut main, request::IOTLB_MSG, 5);
        }
        wait(done);
        assert_eq!(cut_off.load(Ordering::SeqCst), 1);
        assert!(vmm.endpoint.is_fenced());
        vmm.frontend.close();
        vmm.server.join().unwrap();
    }
}

#[test]
fn unmap_behind_a_closed_connection_fences() {
    let Setup { vmm, main, back, cut_off } = Setup::with_a_page(LIMIT);
    drop((main, back));
    assert!(matches!(vmm.server.join().unwrap(), FrontendError::Wire { .. }));
    wait(vmm.domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!(cut_off.load(Ordering::SeqCst), 1);
    assert!(vmm.endpoint.is_fenced());
}

#[test]
fn connection_that_ends_when_nothing_is_held_cuts_nobody_off() {
    let Setup { vmm, mut main, back: _back, cut_off } = Setup::with_a_page(LIMIT);
    let done = vmm.domain.unmap(IovaRange::ALL).unwrap();
    assert_eq!(iotlb(&mut main).kind, kind::INVALIDATE);
    answer(&mut main, request::IOTLB_MSG, 0);
    wait(done);
    vmm.frontend.close();
    vmm.server.join().unwrap();
    let mapping = page(0x1000, 0x5000, Access::RW);
    wait(vmm.domain.map(mapping).unwrap());
    wait(vmm.domain.unmap(mapping.range).unwrap());
    drop(vmm.subscription);
    assert_eq!(cut_off.load(Ordering::SeqCst), 0);
    assert!(!vmm.endpoint.is_fenced());
}

#[test]
fn back_end_that_reads_nothing_holds_up_no_step() {
    let (front, _back) = UnixStream::pair().unwrap();
    let mut vmm = Vmm::new(front, memory(&[(0, 64 * PAGE)]), LIMIT, || Ok(()));
    // Nobody answers, so nobody is asked for an answer.
    let wanted = protocol::REPLY_ACK | protocol::BACKEND_REQ;
    vmm.caller.send(request::SET_PROTOCOL_FEATURES, 0, wanted.as_bytes(), &[]);
    vmm.caller.send(request::SET_FEATURES, 0, VIRTIO_F_ACCESS_PLATFORM.as_bytes(), &[]);
    let mapping = page(0x1000, 0x5000, Access::RW);
    let begin = Instant::now();
    let mut waiting = Vec::new();
    for _ in 0..100_000 {
        wait(vmm.domain.map(mapping).unwrap());
        if vmm.subscription.fill(Iova(0x1000), Access::READ).is_err() {
            break; // it reads too little, and has been given up
        }
        waiting.push(vmm.domain.unmap(mapping.range).unwrap());
        if vmm.frontend.is_closed() {
            break;
        }
    }
    assert!(vmm.frontend.is_closed(), "what waits for it has no cap");
    assert!(begin.elapsed() < LIMIT);
    vmm.server.join().unwrap();
    waiting.into_iter().for_each(wait);
    assert!(vmm.endpoint.is_fenced());
}

#[test]
fn nonsense_ends_the_connection() {
    type Say = fn(&mut Setup);
    let cases: [(&str, Say); 6] = [
        ("an answer to nothing", |s| answer(&mut s.main, request::IOTLB_MSG, 0)),
        ("an answer that is no number", |s| s.main.send(request::IOTLB_MSG, flag::REPLY, &[1; 3], &[])),
        ("a MISS for no access", |s| miss(&mut s.back, 0, 0, 0)),
        ("a MISS for a strange access", |s| miss(&mut s.back, 0, 9, 0)),
        ("an UPDATE of its own", |s| {
            let body = IotlbMsg { size: 1, perm: 3, kind: kind::UPDATE, ..IotlbMsg::default() };
            s.back.send(backend_request::IOTLB_MSG, 0, body.as_bytes(), &[]);
        }),
        ("a short MISS", |s| s.back.send(backend_request::IOTLB_MSG, 0, &[1; 25], &[])),
    ];
    for (what, say) in cases {
        let mut setup = Setup::with_a_page(LIMIT);
        say(&mut setup);
        let error = setup.vmm.server.join().unwrap();
        assert!(matches!(error, FrontendError::Protocol(_)), "{what}: {error}");
        // The unit goes on.
        let other = setup.vmm.iommu.create_domain(2, viommu::Tables::Owned).unwrap();
        wait(other.map(page(0, 0, Access::RW)).unwrap());
    }
}

#[test]
fn iotlb_without_what_it_takes_is_refused() {
    let (front, _back) = UnixStream::pair().unwrap();
    let mut vmm = Vmm::new(front, memory(&[(0, PAGE)]), LIMIT, || Ok(()));
    vmm.caller.send(request::SET_PROTOCOL_FEATURES, 0, protocol::REPLY_ACK.as_bytes(), &[]);
    vmm.caller.send(request::SET_FEATURES, 0, VIRTIO_F_ACCESS_PLATFORM.as_bytes(), &[]);
    assert!(matches!(vmm.server.join().unwrap(), FrontendError::Negotiation));
}

#[test]
fn peer_when_killed_is_gone() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let peer = Peer::of_pid(pid).unwrap();
    peer.kill(LIMIT).unwrap();
    assert!(!child.wait().unwrap().success());
    peer.kill(LIMIT).unwrap(); // it has ended, which is what is wanted
    let (ours, _theirs) = UnixStream::pair().unwrap();
    Peer::of(&ours).unwrap();
    let _: FenceFailed = FenceFailed(String::new());
}
