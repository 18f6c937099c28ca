//! What the server is given, step for step.

use vm_memory::Bytes as _;

use super::recorder::Access as ByMessage;
use super::*;
use crate::spec::Command;

const MAP: Command = Command::DMA_MAP;
const UNMAP: Command = Command::DMA_UNMAP;

#[test]
fn mapping_when_made_is_a_window_of_its_file_with_its_own_permission() {
    let rig = Rig::new();
    over(rig.domain.map(rw(100, 103, 2)).unwrap());
    over(rig.domain.map(map_of(200, 200, 18, Access::WRITE)).unwrap());
    over(rig.domain.map(map_of(300, 301, 29, Access::RW)).unwrap());
    let given: Vec<_> =
        rig.server.windows().iter().map(|w| (w.address / PAGE, w.offset / PAGE, w.flags)).collect();
    // Read-only memory is not writable by a mapping that says so.
    assert_eq!(given, [(100, 18, 3), (200, 2, 2), (300, 13, 1)]);
    rig.check();
}

#[test]
fn mapping_over_two_regions_is_two_windows_that_go_together() {
    let rig = Rig::new();
    rig.server.take_calls();
    over(rig.domain.map(rw(0, 7, 12)).unwrap());
    assert_eq!(rig.server.take_calls(), [MAP, MAP]);
    rig.check();
    over(rig.domain.unmap(pages(0, 7)).unwrap());
    assert_eq!(rig.server.take_calls(), [UNMAP, UNMAP]);
    rig.check();
}

#[test]
fn wide_unmap_is_one_message_for_each_window() {
    let rig = Rig::new();
    for page in 0..90 {
        over(rig.domain.map(rw(page * 2, page * 2, page % 16)).unwrap());
    }
    rig.server.take_calls();
    over(rig.domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!(rig.server.take_calls(), [UNMAP; 90]);
    rig.check();
}

#[test]
fn change_in_place_is_an_unmap_and_a_map() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.server.take_calls();
    over(rig.domain.replace(map_of(0, 3, 0, Access::READ)).unwrap());
    assert_eq!(rig.server.take_calls(), [UNMAP, MAP]);
    rig.check();
    over(rig.domain.replace(map_of(0, 3, 0, Access::READ)).unwrap());
    assert_eq!(rig.server.take_calls(), []);
}

#[test]
fn memory_without_a_file_is_left_out_and_told_of() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 64)).unwrap());
    assert_eq!((rig.server.windows().len(), rig.handle.left_out()), (0, vec![pages(0, 3)]));
    rig.check();
    over(rig.domain.unmap(pages(0, 3)).unwrap());
    assert_eq!(rig.handle.left_out(), []);
}

#[test]
fn memory_without_a_file_is_a_window_for_messages_where_it_is_said() {
    let rig = Rig::with(100, SOON, MirrorOptions::default().no_file(NoFile::Messages));
    over(rig.domain.map(rw(0, 3, 64)).unwrap());
    over(rig.domain.map(rw(8, 8, 0)).unwrap());
    let files: Vec<_> =
        rig.server.windows().iter().map(|w| (w.address / PAGE, w.size / PAGE, w.file.is_some())).collect();
    assert_eq!(files, [(0, 4, false), (8, 1, true)]);
    let rig = Rig::with(100, SOON, MirrorOptions::default().by_messages());
    over(rig.domain.map(rw(0, 7, 12)).unwrap());
    let windows = rig.server.windows();
    assert_eq!((windows.len(), windows[0].size, windows[0].file), (1, 8 * PAGE, None));
}

#[test]
fn accesses_by_messages_are_what_the_record_says_at_that_moment() {
    let rig = Rig::new();
    over(rig.domain.map(rw(100, 100, 2)).unwrap());
    over(rig.domain.map(map_of(101, 101, 3, Access::READ)).unwrap());
    over(rig.domain.map(rw(102, 102, 64)).unwrap());
    rig.memory.write_slice(b"there", GuestAddress(3 * PAGE)).unwrap();
    // Page 100 is going: the record has lost it when the server is told.
    rig.server.access(vec![
        ByMessage::Read(101 * PAGE, 5),
        ByMessage::Write(101 * PAGE, b"no".to_vec()),
        ByMessage::Write(102 * PAGE + 8, b"yes".to_vec()),
        ByMessage::Read(100 * PAGE, 5),
        ByMessage::Write(100 * PAGE, b"no".to_vec()),
        ByMessage::Read(101 * PAGE, 12),
        ByMessage::Read(101 * PAGE, u64::MAX),
        ByMessage::Read(u64::MAX, 2),
        ByMessage::Other(Command::REGION_READ.0),
        ByMessage::Other(999),
    ]);
    over(rig.domain.unmap(pages(100, 100)).unwrap());
    let [fault, big, unknown] = [14, 7, 38].map(Err);
    assert_eq!(
        rig.server.take_outcomes(),
        [
            Ok(b"there".to_vec()),
            fault.clone(),
            Ok(Vec::new()),
            fault.clone(),
            fault.clone(),
            Ok(b"there\0\0\0\0\0\0\0".to_vec()),
            big,
            fault,
            unknown.clone(),
            unknown
        ]
    );
    let mut written = [0; 3];
    rig.memory.read_slice(&mut written, GuestAddress(64 * PAGE + 8)).unwrap();
    assert_eq!(&written, b"yes");
    rig.check();
}

#[test]
fn budget_when_used_up_is_said_before_the_server_is_asked() {
    let rig = Rig::with(2, SOON, MirrorOptions::default());
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    rig.server.take_calls();
    // One extent of the record, and two windows.
    let error = rig.domain.map(rw(10, 17, 12)).unwrap_err();
    assert!(error.to_string().contains("2 windows are wanted beside 1 of 2"), "{error}");
    over(rig.domain.map(rw(1, 1, 0)).unwrap());
    assert!(rig.domain.map(rw(2, 2, 0)).is_err());
    assert_eq!(rig.server.take_calls(), [MAP]);
    rig.check();
}

#[test]
fn new_connection_is_given_everything_again() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.map(rw(10, 19, 12)).unwrap());
    let Rig { iommu, endpoint, domain, memory, server, client, subscription, incidents, .. } = rig;
    // The server dies; the record hears of it at the next step, and nobody else is hurt.
    server.fail(UNMAP, 0, Fault::HangUp);
    over(domain.unmap(pages(0, 3)).unwrap());
    assert!(subscription.is_fenced() && !client.is_open());
    drop(subscription);
    let (server, stream) = Recorder::start(100);
    let client = Client::connect(stream, SOON, NoMemory).unwrap();
    let (mirror, handle) = client.mirror(memory.clone(), MirrorOptions::default());
    let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap();
    incidents.lock().unwrap().clear();
    let rig = Rig { iommu, endpoint, domain, memory, server, client, subscription, handle, incidents };
    assert_eq!(rig.server.windows().len(), 2);
    rig.check();
    over(rig.endpoint.block().unwrap());
    assert_eq!(rig.server.windows().len(), 0);
}

/// Memory that can be exchanged, as a server's windows are.
#[test]
fn memory_that_comes_and_goes_under_what_is_held_is_given_and_taken() {
    use vm_memory::GuestMemoryAtomic;
    let rig = Rig::new();
    let all = (*rig.memory).clone();
    let (without, _) = all.remove_region(GuestAddress(16 * PAGE), 16 * PAGE).unwrap();
    let space = GuestMemoryAtomic::new(all.clone());
    let Rig { iommu: _iommu, endpoint, domain, server, client, subscription, .. } = rig;
    over(subscription.leave());
    let (mirror, handle) = client.mirror(space.clone(), MirrorOptions::default());
    let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap();
    over(domain.map(rw(0, 7, 12)).unwrap());
    over(domain.map(rw(20, 20, 1)).unwrap());
    server.take_calls();
    for _ in 0..2 {
        space.lock().unwrap().replace(without.clone());
        handle.refresh(gpas(16, 31)).unwrap();
        assert_eq!(server.take_calls(), [UNMAP]);
        assert_eq!((handle.left_out(), handle.windows()), (vec![pages(4, 7)], 2));
        space.lock().unwrap().replace(all.clone());
        handle.refresh(gpas(16, 31)).unwrap();
        assert_eq!(server.take_calls(), [MAP]);
        assert_eq!((handle.left_out(), handle.windows()), (vec![], 3));
    }
    assert!(subscription.audit().unwrap().is_clean());
    // A server that does not follow is cut off.
    space.lock().unwrap().replace(without);
    server.fail(UNMAP, 0, Fault::Errno(5));
    handle.refresh(gpas(16, 31)).unwrap();
    server.join();
    assert!(server.windows().is_empty() && !client.is_open());
}
