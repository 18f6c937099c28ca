//! Save and restore.

use std::time::Duration;

use viommu::fuzzing::recording::{Event, Handle, RecordingMirror};
use viommu::subscribe::Reach;
use viommu::{FaultReason, Interest, Iova, View};
use viommu_virtio::spec::Features;
use viommu_virtio::spec::request::Status;
use viommu_virtio::{EndpointPlan, RestoreError, STATE_VERSION, Saved, SavedMember};
use virtio_queue::Queue;

use crate::rig::{A, B, PAGE, Rig, attach, attach_bypass, map, over, rig, rig_with, unmap};

/// A third endpoint with a mirror.
const C: u32 = 10;

fn with_mirror(rig: &Rig, reach: Reach) -> (Handle, viommu::Subscription) {
    let (mirror, handle) = RecordingMirror::new(reach);
    let added = rig.device.add_endpoint(C, EndpointPlan::default().mirror(mirror, Interest::MIRROR)).unwrap();
    (handle, added.subscriptions.into_iter().next().unwrap())
}

/// A guest with two domains, a bypass domain, mappings, a fault that waits, and bypass switched on.
fn busy() -> (Rig, Handle, viommu::Subscription) {
    let mut rig = rig();
    let (handle, subscription) = with_mirror(&rig, Reach::default());
    rig.ok(&attach(1, A));
    rig.ok(&attach(1, C));
    rig.ok(&attach_bypass(7, B));
    rig.ok(&map(1, 1, 2, 10));
    rig.ok(&map(1, 5, 5, 20));
    rig.write_bypass(1);
    assert_eq!(rig.reads(A, 0x9000), Err(FaultReason::Unmapped));
    (rig, handle, subscription)
}

#[test]
fn what_is_saved_is_the_same_after_a_restore_and_mirrors_are_filled() {
    let (rig, ..) = busy();
    let saved = rig.device.save().unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    let saved: Saved = serde_json::from_str(&text).unwrap();

    let mut other = self::rig();
    let (handle, subscription) = with_mirror(&other, Reach::default());
    over(other.device.restore(&saved).unwrap());
    assert_eq!(other.device.save().unwrap(), saved);
    assert_eq!(handle.held(), other.record(1));
    assert!(subscription.audit().unwrap().is_clean());
    assert_eq!(other.reads(A, 0x1004), Ok(10 * PAGE + 4));
    assert_eq!(other.reads(B, 0x1004), Ok(0x1004));
    assert_eq!(other.bypass_byte(), 1);
    // The guest goes on where it was.
    assert_eq!(other.says(&map(1, 2, 2, 0)), Status::INVAL);
    assert_eq!(other.says(&map(7, 2, 2, 0)), Status::INVAL);
    other.ok(&unmap(1, 1, 2));
    assert_eq!(handle.held().len(), 1);
    // The fault that waited is reported here.
    other.driver.fill_events().unwrap();
    other.events.process().unwrap();
    let events = other.driver.events().unwrap();
    assert_eq!((events[0].endpoint.get(), events[0].address.get()), (A, 0x9000));
}

#[test]
fn requests_in_the_ring_are_executed_on_the_other_side_once() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 1, 1, 10));
    // Half-way: one is executed and answered, two lie in the ring.
    rig.driver.push(&unmap(1, 1, 1)).unwrap();
    rig.serve();
    rig.driver.push(&map(1, 2, 2, 11)).unwrap();
    rig.driver.push(&map(1, 3, 3, 12)).unwrap();
    let saved = rig.device.save().unwrap();
    let ring = rig.queue.queue_mut().state();

    // The same guest memory, another device.
    let other = self::rig();
    over(other.device.restore(&saved).unwrap());
    let queue = Queue::try_from(ring).unwrap();
    let mut requests = other.device.request_queue(queue, rig.memory.clone(), || {});
    requests.process().unwrap();
    requests.wait(Duration::from_secs(10)).unwrap();
    let statuses: Vec<_> = rig.driver.complete().unwrap().iter().map(|a| a.status()).collect();
    assert_eq!(statuses, [Some(Status::OK); 3]);
    assert_eq!(other.pages(1), [(2, 2), (3, 3)]);
}

#[test]
fn answers_that_are_out_are_waited_for_before_a_save() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 1, 1, 10));
    let mut reader = rig.device.endpoint(A).unwrap().reader("inside").unwrap();
    let guard = reader.enter();
    guard.translate(Iova(0x1000), viommu::Access::READ).unwrap();
    rig.driver.push(&unmap(1, 1, 1)).unwrap();
    rig.queue.process().unwrap();
    assert!(rig.device.save().is_err());
    drop(guard);
    rig.serve();
    rig.device.save().unwrap();
}

#[test]
fn a_mirror_that_refuses_fails_the_whole_restore() {
    let (rig, ..) = busy();
    let saved = rig.device.save().unwrap();
    let other = self::rig();
    let (handle, _subscription) = with_mirror(&other, Reach::default());
    handle.refuse_nth(2, 1, |event| matches!(event, Event::Map(_)));
    assert!(matches!(other.device.restore(&saved), Err(RestoreError::Record(_))));
    assert!(other.device.iommu().domains().is_empty());
    assert_eq!(handle.held(), []);
    assert_eq!(other.bypass_byte(), 0);
}

#[test]
fn state_of_the_first_version_is_read() {
    let saved: Saved = serde_json::from_str(include_str!("../data/state-1.json")).unwrap();
    let rig = rig();
    let (_handle, _subscription) = with_mirror(&rig, Reach::default());
    over(rig.device.restore(&saved).unwrap());
    assert_eq!(rig.pages(1), [(1, 2), (5, 5)]);
    assert_eq!(rig.reads(B, 0x5000), Ok(0x5000));
    let newer = Saved { version: STATE_VERSION + 1, ..saved };
    assert!(matches!(self::rig().device.restore(&newer), Err(RestoreError::Version(_))));
}

/// `change` makes it a state that no device has saved.
#[track_caller]
fn refused(change: impl FnOnce(&mut Saved)) -> RestoreError {
    let (rig, ..) = busy();
    let mut saved = rig.device.save().unwrap();
    change(&mut saved);
    let other = self::rig();
    let (handle, _subscription) = with_mirror(&other, Reach::default());
    let error = other.device.restore(&saved).unwrap_err();
    assert!(other.device.iommu().domains().is_empty() && handle.held().is_empty());
    error
}

fn member(saved: &mut Saved, id: u32) -> &mut SavedMember {
    saved.members.iter_mut().find(|m| m.endpoint == id).unwrap()
}

#[test]
fn what_no_device_can_have_saved_is_refused() {
    assert!(matches!(refused(|s| s.members.clear()), RestoreError::Endpoint(_) | RestoreError::Invalid(_)));
    assert!(matches!(refused(|s| s.members.push(s.members[0].clone())), RestoreError::Endpoint(A)));
    assert!(matches!(refused(|s| member(s, B).regions.clear()), RestoreError::Regions(B)));
    assert!(matches!(refused(|s| member(s, A).domain = None), RestoreError::Invalid(_)));
    assert!(matches!(refused(|s| member(s, B).domain = Some(1)), RestoreError::Invalid(_)));
    assert!(matches!(refused(|s| s.negotiated |= 1 << 20), RestoreError::Features(_)));
    let bypass = Features::BYPASS.bits();
    assert!(matches!(refused(|s| s.negotiated |= bypass), RestoreError::Features(_)));
    let mapping = |s: &mut Saved| {
        let first = s.record.domains[0].mappings[0];
        s.record.domains[0].mappings.push(first);
    };
    assert!(matches!(refused(mapping), RestoreError::Record(_)));
    assert!(matches!(refused(|s| s.record.domains[0].mappings[0].gpa.0 += 1), RestoreError::Invalid(_)));
    assert!(matches!(refused(|s| s.record.domains[0].id = 3), RestoreError::Invalid(_)));
    let domain = |s: &mut Saved| {
        let mut more = s.record.domains[0].clone();
        more.id = 9;
        s.record.domains.push(more);
    };
    assert!(matches!(refused(domain), RestoreError::Invalid(_)));
    let view = |s: &mut Saved| s.record.endpoints[0].attached = Some(View::Domain(99));
    assert!(matches!(refused(view), RestoreError::Invalid(_)));
    assert!(matches!(refused(|s| s.events.push([0xff; 24])), RestoreError::Invalid(_)));
    assert!(matches!(refused(|s| s.page_size_mask = 0), RestoreError::PageSize { .. }));
}

#[test]
fn larger_pages_here_than_the_driver_uses_are_refused() {
    let (rig, ..) = busy();
    let saved = rig.device.save().unwrap();
    let config = viommu_virtio::Config { page_size_mask: !0xffff, ..crate::rig::config() };
    let other = rig_with(config, |builder| builder);
    let (_handle, _subscription) = with_mirror(&other, Reach::default());
    let error = other.device.restore(&saved).unwrap_err();
    assert!(matches!(error, RestoreError::PageSize { saved: 0x1000, here: 0x1_0000 }));
}

#[test]
fn a_device_that_is_in_use_is_not_restored_over() {
    let (rig, ..) = busy();
    let saved = rig.device.save().unwrap();
    assert!(rig.device.restore(&saved).is_err());
    assert_eq!(rig.pages(1), [(1, 2), (5, 5)]);
}

/// Writes the fixture anew: `VIOMMU_WRITE_STATE=FILE cargo test -p viommu-virtio --test checklist write_state`.
#[test]
fn write_state_when_asked() {
    let (rig, ..) = busy();
    let text = serde_json::to_string(&rig.device.save().unwrap()).unwrap();
    assert!(text.contains("\"version\":1"));
    if let Some(file) = std::env::var_os("VIOMMU_WRITE_STATE") {
        std::fs::write(file, text + "\n").unwrap();
    }
}
