//! A request means the same however it lies over descriptors.

use viommu_virtio::driver::{FILL, Request, Split};
use viommu_virtio::spec::request::Status;

use crate::rig::*;

/// Each request once, with what it must say, in an order that makes sense.
fn requests() -> [(Request, Status, u32); 6] {
    [
        (attach(1, B), Status::OK, 4),
        (map(1, 2, 5, 7), Status::OK, 4),
        (Request::Probe { endpoint: B }, Status::OK, 516),
        (map(1, 5, 5, 7), Status::INVAL, 4),
        (unmap(1, 2, 5), Status::OK, 4),
        (detach(1, B), Status::OK, 4),
    ]
}

#[track_caller]
fn play(rig: &mut Rig, split: impl Fn(u32, u32) -> Split) {
    for (request, status, used) in requests() {
        let split = split(request.to_bytes().len().try_into().unwrap(), used);
        rig.driver.push_split(&request, &split).unwrap();
        rig.serve();
        let answer = rig.driver.next_answer().unwrap().unwrap();
        assert_eq!((answer.used_len, answer.status()), (used, Some(status)), "{request:?}, {split:?}");
        if let Request::Probe { .. } = request {
            assert_eq!(answer.resv_mem().len(), 2, "{split:?}");
            assert_eq!(answer.properties[48..], [0; 464]);
        }
    }
}

#[test]
fn a_cut_anywhere_in_the_readable_part() {
    let mut rig = rig();
    for cut in 1..72 {
        for indirect in [false, true] {
            play(&mut rig, |_, _| Split { readable: vec![cut], writable: vec![], indirect });
        }
    }
}

#[test]
fn a_cut_anywhere_in_the_writable_part() {
    let mut rig = rig();
    for cut in 1..516 {
        play(&mut rig, |_, _| Split { readable: vec![4], writable: vec![cut], indirect: cut % 2 == 0 });
    }
}

#[test]
fn two_cuts_anywhere() {
    let mut rig = rig();
    for first in 1..36 {
        for second in first + 1..36 {
            play(&mut rig, |_, _| Split {
                readable: vec![first, second],
                writable: vec![second % 4, 512 + first % 4],
                indirect: false,
            });
        }
    }
}

#[test]
fn every_byte_in_a_descriptor_of_its_own() {
    let mut rig = rig();
    play(&mut rig, Split::bytes);
    // A table of its own holds 64.
    let few = |readable, writable: u32| Split { indirect: true, ..Split::bytes(readable, writable.min(5)) };
    for (request, status, used) in requests().iter().filter(|(request, ..)| request.to_bytes().len() < 60) {
        rig.driver.push_split(request, &few(request.to_bytes().len().try_into().unwrap(), *used)).unwrap();
        rig.serve();
        assert_eq!(rig.driver.next_answer().unwrap().unwrap().status(), Some(*status));
    }
}

#[test]
fn a_readable_part_that_is_too_short_is_not_understood() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    for (request, ..) in requests() {
        let bytes = request.to_bytes();
        for len in 0..bytes.len() {
            let bytes = bytes[..len].to_vec();
            let answer = rig.ask(&Request::Raw { bytes, writable: 516 });
            assert_eq!((answer.used_len, &answer.properties[..]), (0, &[FILL; 516][..]), "{request:?}");
        }
    }
    assert_eq!(rig.pages(1), []);
    assert_eq!(rig.device.iommu().endpoints_in(1).len(), 1);
}

#[test]
fn a_readable_part_that_is_longer_is_as_good() {
    let mut rig = rig();
    for (request, status, _) in requests() {
        assert_eq!(rig.says(&raw(&request, |bytes| bytes.extend([0xff; 100]))), status);
    }
}

#[test]
fn without_room_for_the_tail_nothing_is_executed() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 8, 8, 0));
    for request in [attach(2, A), attach(2, B), map(1, 0, 0, 0), unmap(1, 8, 8), detach(1, A)] {
        for writable in 0..4 {
            let answer = rig.ask(&Request::Raw { bytes: request.to_bytes(), writable });
            assert_eq!(answer.used_len, 0);
            assert!(answer.properties.iter().all(|byte| *byte == FILL));
        }
    }
    assert_eq!(rig.pages(1), [(8, 8)]);
    assert_eq!(rig.device.iommu().endpoints_in(1).len(), 1);
}

#[test]
fn with_more_room_the_tail_is_at_its_beginning() {
    let mut rig = rig();
    for (request, status, _) in requests() {
        if let Request::Probe { .. } = request {
            continue;
        }
        let answer = rig.ask(&Request::Raw { bytes: request.to_bytes(), writable: 64 });
        assert_eq!((answer.used_len, answer.status()), (4, Some(status)));
        assert_eq!(answer.properties[..4], [status.0, 0, 0, 0]);
        assert_eq!(answer.properties[4..], [FILL; 60]);
    }
}
