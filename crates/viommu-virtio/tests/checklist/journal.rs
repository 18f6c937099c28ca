//! What a journal is told.

use std::sync::{Arc, Mutex};

use viommu::ResetKind;
use viommu_virtio::spec::request::Status;
use viommu_virtio::{EndpointPlan, Entry, Journal};

use crate::rig::*;

/// Remembers, in words.
#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Journal for Heard {
    fn note(&self, entry: &Entry<'_>) {
        let text = match *entry {
            Entry::Config { page_size_mask, bypass, .. } => format!("config {page_size_mask:#x} {bypass}"),
            Entry::EndpointAdded { endpoint, regions } => format!("added {endpoint} {}", regions.len()),
            Entry::EndpointRemoved { endpoint } => format!("removed {endpoint}"),
            Entry::Attach { endpoint, domain, bypass } => format!("attach {domain} {endpoint} {bypass}"),
            Entry::Detach { endpoint, domain } => format!("detach {domain} {endpoint}"),
            Entry::Map { domain, mapping } => {
                format!("map {domain} {} {} {:?}", mapping.range, mapping.gpa, mapping.access)
            }
            Entry::Unmap { domain, range, removed } => format!("unmap {domain} {range} {removed}"),
            Entry::Reset(ResetKind::Device) => "reset".into(),
            Entry::Reset(_) => "system reset".into(),
            Entry::Bypass { on } => format!("bypass {on}"),
            Entry::Fault(fault) => format!("fault {} {:#x}", fault.endpoint.get(), fault.address.get()),
            _ => "something new".into(),
        };
        self.0.lock().unwrap().push(text);
    }
}

impl Heard {
    fn take(&self) -> Vec<String> {
        core::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// A rig with a journal, which has heard of what there is.
fn heard() -> (Rig, Arc<Heard>) {
    let rig = rig();
    let heard = Arc::new(Heard::default());
    assert!(rig.device.journal(heard.clone()));
    assert_eq!(heard.take(), ["config 0xfffffffffffff000 false", "added 8 0", "added 9 2"]);
    (rig, heard)
}

#[test]
fn a_journal_is_told_what_requests_did_and_not_what_was_refused() {
    let (mut rig, heard) = heard();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 1, 2, 10));
    assert_eq!(rig.says(&map(1, 2, 2, 10)), Status::INVAL);
    assert_eq!(rig.says(&map(2, 2, 2, 10)), Status::NOENT);
    assert_eq!(rig.says(&unmap(1, 1, 1)), Status::RANGE);
    rig.ok(&attach(1, A));
    rig.ok(&attach_bypass(7, B));
    assert_eq!(rig.says(&attach_bypass(1, B)), Status::INVAL);
    rig.ok(&unmap_bytes(1, 0x100, 0x2fff));
    rig.ok(&unmap(1, 9, 9));
    assert_eq!(rig.says(&detach(1, B)), Status::INVAL);
    rig.ok(&detach(7, B));
    rig.ok(&attach(2, A));
    let due = [
        "attach 1 8 false",
        "map 1 [0x1000, 0x2fff] 0xa000 Access(READ | WRITE)",
        "attach 7 9 true",
        "unmap 1 [0x100, 0x2fff] 1",
        "unmap 1 [0x9000, 0x9fff] 0",
        "detach 7 9",
        "attach 2 8 false",
    ];
    assert_eq!(heard.take(), due);
}

#[test]
fn a_journal_is_told_of_bypass_resets_endpoints_and_reported_faults() {
    let (mut rig, heard) = heard();
    rig.write_bypass(1);
    rig.write_bypass(7);
    over(rig.device.reset().completion);
    over(rig.device.system_reset().completion);
    rig.device.add_endpoint(10, EndpointPlan::default()).unwrap();
    assert!(rig.device.add_endpoint(10, EndpointPlan::default()).is_err());
    over(rig.device.remove_endpoint(10).unwrap());
    assert_eq!(
        heard.take(),
        ["bypass true", "reset", "system reset", "bypass false", "added 10 0", "removed 10"]
    );
    rig.reads(A, 0x1234).unwrap_err();
    rig.events.process().unwrap();
    assert!(heard.take().is_empty(), "nobody has been told of it");
    rig.driver.fill_events().unwrap();
    rig.events.process().unwrap();
    assert_eq!(heard.take(), ["fault 8 0x1234"]);
}

#[test]
fn a_journal_that_comes_late_is_told_what_there_is_and_the_second_is_not_taken() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 3, 3, 10));
    rig.ok(&map(1, 1, 2, 20));
    rig.ok(&attach_bypass(7, B));
    let saved = rig.device.save().unwrap();
    let late = Arc::new(Heard::default());
    assert!(rig.device.journal(late.clone()));
    let attached = [
        "attach 1 8 false",
        "attach 7 9 true",
        "map 1 [0x1000, 0x2fff] 0x14000 Access(READ | WRITE)",
        "map 1 [0x3000, 0x3fff] 0xa000 Access(READ | WRITE)",
    ];
    let told = late.take();
    assert_eq!(told[..3], ["config 0xfffffffffffff000 false", "added 8 0", "added 9 2"]);
    assert_eq!(told[3..], attached);
    let second = Arc::new(Heard::default());
    assert!(!rig.device.journal(second.clone()));
    rig.ok(&detach(7, B));
    assert_eq!((late.take(), second.take()), (vec!["detach 7 9".to_owned()], Vec::new()));

    let (other, heard) = heard();
    over(other.device.restore(&saved).unwrap());
    let told = heard.take();
    assert_eq!(told[0], "bypass false");
    assert_eq!(told[1..], attached);
}

#[test]
fn a_request_that_fails_and_leaves_its_endpoint_nowhere_is_told_as_a_detach() {
    use viommu::Interest;
    use viommu::fuzzing::recording::{Event, RecordingMirror};
    use viommu::subscribe::Reach;

    let (mut rig, heard) = heard();
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    let plan = EndpointPlan::default().mirror(mirror, Interest::MIRROR);
    let _added = rig.device.add_endpoint(10, plan).unwrap();
    rig.ok(&attach(1, 10));
    rig.write_bypass(1);
    heard.take();
    // What it holds of memory when it is attached to nothing, it refuses.
    handle.refuse_nth(1, usize::MAX, |event| matches!(event, Event::Map(_)));
    assert_ne!(rig.says(&detach(1, 10)), Status::OK);
    assert_eq!(heard.take(), ["detach 1 10"]);
}
