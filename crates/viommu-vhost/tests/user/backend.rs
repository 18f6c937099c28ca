//! The back end against front ends that do not do as they must.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use viommu_vhost::spec::{IotlbMsg, VIRTIO_F_ACCESS_PLATFORM, kind};
use viommu_vhost::user::backend::{BackendError, BackendOptions, MissError};
use viommu_vhost::user::spec::{backend_request, flag, request};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, Permissions};
use zerocopy::{FromBytes, IntoBytes};

use super::support::{Caller, Device, LIMIT, PAGE, memory, user};

/// A naive front end, and the back end.
struct Setup {
    main: Caller,
    back: Caller,
    memory: GuestMemoryMmap,
    device: Device,
}

fn setup(options: BackendOptions) -> Setup {
    let (front, back) = UnixStream::pair().unwrap();
    let device = Device::new(back, options);
    let mut main = Caller(front);
    main.protocol();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = std::fs::File::from(theirs.as_fd().try_clone_to_owned().unwrap());
    assert_eq!(main.ask(request::SET_BACKEND_REQ_FD, &[], &[&theirs]), Some(0));
    main.features(VIRTIO_F_ACCESS_PLATFORM);
    let memory = memory(&[(0, 16 * PAGE), (1 << 20, 16 * PAGE)]);
    assert_eq!(main.table(&memory), Some(0));
    Setup { main, back: Caller(ours), memory, device }
}

fn patient(patience: u64, limit: u64) -> BackendOptions {
    let mut options = BackendOptions::default();
    (options.patience, options.limit) = (Duration::from_millis(patience), Duration::from_millis(limit));
    options
}

fn update(iova: u64, size: u64, uaddr: u64, perm: u8) -> IotlbMsg {
    IotlbMsg { iova, size, uaddr, perm, kind: kind::UPDATE, ..IotlbMsg::default() }
}

fn invalidate(iova: u64, size: u64) -> IotlbMsg {
    IotlbMsg { iova, size, kind: kind::INVALIDATE, ..IotlbMsg::default() }
}

impl Setup {
    fn give(&mut self, iova: u64, gpa: u64, perm: u8) {
        let message = update(iova, PAGE, user(&self.memory, gpa), perm);
        assert_eq!(self.main.iotlb(&message), Some(0));
    }

    fn miss(&mut self) -> IotlbMsg {
        let (request, flags, payload) = self.back.receive().unwrap();
        assert_eq!((request, flags), (backend_request::IOTLB_MSG, flag::VERSION | flag::NEED_REPLY));
        IotlbMsg::read_from_bytes(&payload).unwrap()
    }

    fn answer_miss(&mut self, value: u64) {
        self.back.send(backend_request::IOTLB_MSG, flag::REPLY, value.as_bytes(), &[]);
    }
}

#[test]
fn update_when_it_cannot_be_is_refused_and_changes_nothing() {
    let mut setup = setup(BackendOptions::default());
    let (first, second) = (user(&setup.memory, 0), user(&setup.memory, 1 << 20));
    let bad = [
        update(0x1000, 0, first, 3),
        update(u64::MAX - 0xfff, 0x2000, first, 3),
        update(0x1000, u64::MAX, first, 3),
        update(0x1000, PAGE, 0x1000, 3),
        update(0x1000, PAGE, first.min(second) - PAGE, 3),
        update(0x1000, 17 * PAGE, first, 3),
        update(0x1000, PAGE, first.max(second) + 16 * PAGE, 3),
        update(0x1000, PAGE, u64::MAX - 0xfff, 3),
        update(0x1000, PAGE, first, 4),
        update(0x1800, PAGE, first, 3),
        update(0x1000, 0x800, first, 3),
        update(0x1000, PAGE, first + 0x800, 3),
        invalidate(0x1000, 0),
        invalidate(u64::MAX, 2),
    ];
    for message in bad {
        assert_eq!(setup.main.iotlb(&message), Some(1), "{message:x?}");
        assert_eq!(setup.device.backend.entries(), 0);
    }
    setup.give(0x1000, 0, 3);
    setup.give(u64::MAX - 0xfff, 0, 3);
    assert_eq!(setup.device.backend.entries(), 2);
    assert_eq!(setup.main.iotlb(&update(0x1000, PAGE, first, 0)), Some(0)); // no access: nothing there
    assert_eq!(setup.main.iotlb(&invalidate(0, u64::MAX)), Some(0));
    assert_eq!(setup.device.backend.entries(), 0);
    setup.device.end();
}

#[test]
fn nonsense_ends_the_connection_and_access() {
    type Say = fn(&mut Setup);
    let cases: [(&str, Say); 7] = [
        ("a short message", |s| s.main.send(request::IOTLB_MSG, 8, &[0; 25], &[])),
        ("a long message", |s| s.main.send(request::IOTLB_MSG, 8, &[0; 33], &[])),
        ("a MISS", |s| {
            let message = IotlbMsg { size: PAGE, kind: kind::MISS, ..IotlbMsg::default() };
            s.main.send(request::IOTLB_MSG, 8, message.as_bytes(), &[]);
        }),
        ("a channel without a descriptor", |s| s.main.send(request::SET_BACKEND_REQ_FD, 8, &[], &[])),
        ("an answer to nothing", |s| s.answer_miss(0)),
        ("a table without descriptors", |s| s.main.send(request::SET_MEM_TABLE, 8, &[1; 40], &[])),
        ("features that are no number", |s| s.main.send(request::SET_FEATURES, 8, &[1; 4], &[])),
    ];
    for (what, say) in cases {
        let mut setup = setup(BackendOptions::default());
        setup.give(0x1000, 0, 3);
        let space = setup.device.backend.memory().unwrap();
        space.memory().write_obj(1_u8, GuestAddress(0x1000)).unwrap();
        say(&mut setup);
        assert!(setup.main.receive().is_none(), "{what}");
        assert!(!space.memory().check_range(GuestAddress(0x1000), 1, Permissions::Read), "{what}");
        setup.device.end();
    }
}

#[test]
fn updates_that_overlap_replace_and_a_part_can_be_taken_back() {
    let mut setup = setup(BackendOptions::default());
    let first = user(&setup.memory, 0);
    assert_eq!(setup.main.iotlb(&update(0x1_0000, 4 * PAGE, first, 3)), Some(0));
    assert_eq!(setup.main.iotlb(&update(0x1_1000, PAGE, first + 8 * PAGE, 1)), Some(0));
    let space = setup.device.backend.memory().unwrap();
    setup.memory.write_obj(8_u8, GuestAddress(8 * PAGE)).unwrap();
    setup.memory.write_obj(2_u8, GuestAddress(2 * PAGE)).unwrap();
    assert_eq!(space.memory().read_obj::<u8>(GuestAddress(0x1_1000)).unwrap(), 8);
    assert_eq!(space.memory().read_obj::<u8>(GuestAddress(0x1_2000)).unwrap(), 2);
    assert_eq!(setup.main.iotlb(&invalidate(0x1_2800, 1)), Some(0));
    let guard = space.memory();
    for (page, there) in [(0x1_0000, true), (0x1_1000, true), (0x1_3000, true)] {
        assert_eq!(guard.translator().probe(viommu::Iova(page), viommu::Access::READ).is_ok(), there);
    }
    assert!(guard.translator().probe(viommu::Iova(0x1_2000), viommu::Access::READ).is_err());
    drop(guard);
    setup.device.end();
}

#[test]
fn invalidate_inside_an_entry_when_full_drops_all_entries() {
    let mut options = BackendOptions::default();
    options.entries = 1;
    let mut setup = setup(options);
    let first = user(&setup.memory, 0);
    assert_eq!(setup.main.iotlb(&update(0x1000, 3 * PAGE, first, 3)), Some(0));
    assert_eq!(setup.main.iotlb(&invalidate(0x2000, PAGE)), Some(0));
    assert_eq!(setup.device.backend.entries(), 0);
    setup.give(0x1000, 0, 3);
    setup.device.end();
}

#[test]
fn invalidate_is_answered_when_the_guard_has_ended() {
    let mut setup = setup(BackendOptions::default());
    setup.give(0x1000, 0x3000, 3);
    let space = setup.device.backend.memory().unwrap();
    let guard = space.memory();
    guard.write_obj(1_u8, GuestAddress(0x1000)).unwrap();
    let (mut main, begin) = (setup.main, Instant::now());
    let asking = thread::spawn(move || (main.iotlb(&invalidate(0x1000, PAGE)), begin.elapsed()));
    thread::sleep(Duration::from_millis(200));
    assert!(!asking.is_finished(), "answered while a guard is held");
    drop(guard);
    let (answer, after) = asking.join().unwrap();
    assert_eq!(answer, Some(0));
    assert!(after >= Duration::from_millis(200) && after < LIMIT);
    setup.device.end();
}

#[test]
fn guard_that_never_ends_costs_the_connection() {
    let mut setup = setup(patient(5000, 200));
    setup.give(0x1000, 0x3000, 3);
    let space = setup.device.backend.memory().unwrap();
    let guard = space.memory();
    guard.write_obj(1_u8, GuestAddress(0x1000)).unwrap();
    assert_eq!(setup.main.iotlb(&invalidate(0x1000, PAGE)), None, "an answer while a guard is held");
    drop(guard);
    assert!(matches!(setup.device.end(), BackendError::Busy(_)));
}

#[test]
fn wait_inside_a_guard_ends_when_something_is_taken_back() {
    let mut setup = setup(BackendOptions::default());
    setup.give(0x1000, 0x3000, 3);
    let space = setup.device.backend.memory().unwrap();
    let begin = Instant::now();
    let device = thread::spawn(move || {
        let guard = space.memory();
        guard.write_obj(1_u8, GuestAddress(0x1000)).unwrap();
        guard.write_obj(1_u8, GuestAddress(0x9000)).unwrap_err();
    });
    assert_eq!(setup.miss().iova, 0x9000);
    // As QEMU does: the MISS is not looked at while an answer is awaited.
    assert_eq!(setup.main.iotlb(&invalidate(0x1000, PAGE)), Some(0));
    device.join().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4), "it ended by the time limit only");
    setup.device.end();
}

#[test]
fn wait_outside_a_guard_goes_on_and_ends_when_the_device_stops() {
    let mut setup = setup(BackendOptions::default());
    setup.give(0x1000, 0x3000, 3);
    let space = setup.device.backend.memory().unwrap();
    let preparing = space.clone();
    let device = thread::spawn(move || {
        preparing.prepare(|guard| guard.check_range(GuestAddress(0x9010), 4, Permissions::Read))
    });
    let miss = setup.miss();
    assert_eq!((miss.kind, miss.iova, miss.size, miss.perm), (kind::MISS, 0x9000, 0, 1));
    assert_eq!(setup.main.iotlb(&invalidate(0x1000, PAGE)), Some(0));
    setup.give(0x9000, 0x4000, 1);
    setup.answer_miss(0);
    assert_eq!(device.join().unwrap(), Ok(true));
    let device = thread::spawn(move || {
        space.prepare(|guard| guard.check_range(GuestAddress(0xa000), 4, Permissions::Read))
    });
    setup.miss();
    assert_eq!(setup.main.ask(request::GET_VRING_BASE, &[0; 8], &[]), Some(0));
    assert_eq!(device.join().unwrap(), Err(MissError::Interrupted));
    setup.device.end();
}

#[test]
fn miss_when_refused_or_not_answered_is_an_error() {
    let mut setup = setup(patient(2000, 5000));
    let space = setup.device.backend.memory().unwrap();
    let look = move || space.prepare(|guard| guard.check_range(GuestAddress(0x9010), 4, Permissions::Write));
    let device = thread::spawn(look.clone());
    assert_eq!(setup.miss().perm, 2);
    setup.answer_miss(1);
    assert_eq!(device.join().unwrap(), Err(MissError::Refused));
    // An UPDATE that gives too little is as good as none.
    let device = thread::spawn(look.clone());
    setup.miss();
    setup.give(0x9000, 0x4000, 1);
    setup.answer_miss(0);
    setup.miss();
    setup.answer_miss(0);
    assert_eq!(device.join().unwrap(), Err(MissError::Refused));
    assert_eq!(setup.main.iotlb(&invalidate(0x9000, PAGE)), Some(0));
    let begin = Instant::now();
    assert_eq!(thread::spawn(look.clone()).join().unwrap(), Err(MissError::TimedOut));
    assert!(begin.elapsed() >= Duration::from_millis(2000));
    setup.device.backend.close();
    assert_eq!(look(), Err(MissError::Closed));
    setup.device.end();
}

#[test]
fn memory_table_when_exchanged_leaves_nothing_of_the_old_one() {
    let mut setup = setup(BackendOptions::default());
    setup.give(0x1000, 0x3000, 3);
    let space = setup.device.backend.memory().unwrap();
    space.memory().write_obj(1_u8, GuestAddress(0x1000)).unwrap();
    let old = user(&setup.memory, 0);
    let other = memory(&[(0, 4 * PAGE)]);
    assert_eq!(setup.main.table(&other), Some(0));
    assert_eq!(setup.device.backend.entries(), 0);
    assert_eq!(setup.main.iotlb(&update(0x1000, PAGE, old, 3)), Some(1));
    setup.memory = other;
    setup.give(0x1000, 0x3000, 3);
    space.memory().write_obj(6_u8, GuestAddress(0x1001)).unwrap();
    assert_eq!(setup.memory.read_obj::<u8>(GuestAddress(0x3001)).unwrap(), 6);
    setup.device.end();
}
