use std::sync::Arc;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::spec::request::{AttachFlags, Status};

const BASE: u64 = 0x1000;

fn driver(size: u16) -> Driver<Arc<GuestMemoryMmap>> {
    let bytes = Driver::<Arc<GuestMemoryMmap>>::bytes(size, 64);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), bytes.try_into().unwrap())]).unwrap();
    Driver::new(Arc::new(memory), BASE, size, 64).unwrap()
}

/// A device that writes `status` as the last of the writable part of each request, and tells what it read.
fn serve(driver: &Driver<Arc<GuestMemoryMmap>>, queue: &mut Queue, status: u8) -> Vec<(Vec<u8>, usize)> {
    let memory = driver.memory.clone();
    let mut seen = Vec::new();
    let chains: Vec<_> = queue.iter(memory.clone()).unwrap().collect();
    for chain in chains {
        let (mut bytes, mut room, mut pieces) = (Vec::new(), Vec::new(), 0);
        let head = chain.head_index();
        for descriptor in chain {
            pieces += 1;
            for at in 0..u64::from(descriptor.len()) {
                let at = GuestAddress(descriptor.addr().0 + at);
                if descriptor.is_write_only() {
                    room.push(at);
                } else {
                    bytes.push(memory.read_obj::<u8>(at).unwrap());
                }
            }
        }
        for (at, byte) in room.iter().rev().zip([0, 0, 0, status]) {
            memory.write_obj(byte, *at).unwrap();
        }
        queue.add_used(&*memory, head, room.len().try_into().unwrap()).unwrap();
        seen.push((bytes, pieces));
    }
    seen
}

fn attach(endpoint: u32) -> Request {
    Request::Attach { domain: 7, endpoint, flags: AttachFlags::empty() }
}

#[test]
fn request_comes_back_with_its_status_when_the_device_has_answered() {
    let mut driver = driver(8);
    let mut queue = driver.request_queue().unwrap();
    assert!(queue.is_valid(driver.memory()));
    let token = driver.push(&attach(3)).unwrap();
    assert_eq!(driver.complete().unwrap(), []);
    assert_eq!(serve(&driver, &mut queue, 6), [(attach(3).to_bytes(), 2)]);
    let answers = driver.complete().unwrap();
    assert_eq!(answers.len(), 1);
    assert_eq!((answers[0].token, answers[0].used_len), (token, 4));
    assert_eq!(answers[0].status(), Some(Status::NOENT));
    assert_eq!((driver.outstanding(), driver.is_outstanding(token)), (0, false));
}

#[test]
fn any_split_reads_as_the_same_bytes() {
    let mut driver = driver(128);
    let mut queue = driver.request_queue().unwrap();
    let request = Request::Unmap { domain: 1, virt_start: 0x1000, virt_end: u64::MAX };
    let splits = [
        Split { readable: vec![4, 4, 3, 27, 28, 900], writable: vec![1], indirect: false },
        Split::bytes(28, 4),
        Split { indirect: true, ..Split::bytes(28, 4) },
        Split { indirect: true, ..Split::default() },
    ];
    for (split, count) in splits.iter().zip([5, 32, 32, 2]) {
        driver.push_split(&request, split).unwrap();
        assert_eq!(serve(&driver, &mut queue, 5), [(request.to_bytes(), count)], "{split:?}");
        let answer = driver.next_answer().unwrap().unwrap();
        assert_eq!((answer.used_len, answer.status()), (4, Some(Status::RANGE)));
    }
}

#[test]
fn push_into_a_full_ring_is_refused_and_goes_on_when_there_is_room() {
    let mut driver = driver(4);
    let mut queue = driver.request_queue().unwrap();
    for round in 0..100_000_u32 {
        driver.push(&attach(round)).unwrap();
        driver.push(&attach(round)).unwrap();
        assert!(matches!(driver.push(&attach(round)), Err(DriverError::Full)));
        assert_eq!(serve(&driver, &mut queue, 0).len(), 2);
        let first = driver.next_answer().unwrap().unwrap();
        let second = driver.next_answer().unwrap().unwrap();
        assert!(first.token < second.token && second.status() == Some(Status::OK));
        assert_eq!(driver.next_answer().unwrap(), None);
    }
}

#[test]
fn probe_shows_what_lies_before_the_tail() {
    let mut driver = driver(4);
    let mut queue = driver.request_queue().unwrap();
    driver.push(&Request::Probe { endpoint: 9 }).unwrap();
    serve(&driver, &mut queue, 0);
    let answer = driver.next_answer().unwrap().unwrap();
    assert_eq!((answer.used_len, answer.status()), (68, Some(Status::OK)));
    assert_eq!(answer.properties, [FILL; 64]);
}

#[test]
fn raw_requests_show_the_whole_writable_part_and_are_bounded() {
    let mut driver = driver(4);
    let mut queue = driver.request_queue().unwrap();
    driver.push(&Request::Raw { bytes: vec![9, 9], writable: 3 }).unwrap();
    assert_eq!(serve(&driver, &mut queue, 8), [(vec![9, 9], 2)]);
    let answer = driver.next_answer().unwrap().unwrap();
    assert_eq!((answer.used_len, answer.tail, answer.properties), (3, None, vec![0, 0, 0]));
    driver.push(&Request::Raw { bytes: vec![], writable: 0 }).unwrap();
    assert_eq!(serve(&driver, &mut queue, 8), [(vec![], 1)]);
    driver.next_answer().unwrap();
    for (bytes, writable) in [(RAW_BYTES + 1, 4), (4, 64 + 4 + RAW_WRITABLE + 16)] {
        let request = Request::Raw { bytes: vec![0; bytes as usize], writable };
        assert!(matches!(driver.push(&request), Err(DriverError::TooLong)));
    }
    assert!(matches!(driver.push_split(&attach(1), &Split::bytes(20, 4)), Err(DriverError::TooLong)));
}

#[test]
fn used_entries_that_break_the_rules_are_told() {
    let mut driver = driver(4);
    let mut queue = driver.request_queue().unwrap();
    queue.add_used(driver.memory(), 2, 4).unwrap();
    assert!(matches!(driver.next_answer(), Err(DriverError::NotOutstanding(2))));
    driver.push(&attach(1)).unwrap();
    let head = queue.iter(driver.memory()).unwrap().next().unwrap().head_index();
    queue.add_used(driver.memory(), head, 5).unwrap();
    assert!(matches!(driver.next_answer(), Err(DriverError::UsedLength { used: 5, writable: 4 })));
    queue.add_used(driver.memory(), head, 4).unwrap();
    assert!(matches!(driver.next_answer(), Err(DriverError::NotOutstanding(_))), "used twice");
}

#[test]
fn raw_chains_have_the_links_that_they_are_given() {
    let mut driver = driver(8);
    let mut queue = driver.request_queue().unwrap();
    let scratch = driver.scratch().0;
    let one = RawDescriptor { addr: scratch, len: 1, flags: RawDescriptor::NEXT, next: 1 };
    let two = RawDescriptor { addr: scratch + 1, len: 1, flags: RawDescriptor::NEXT, next: 0 };
    let token = driver.push_raw(&[one, two]).unwrap();
    let chain = queue.iter(driver.memory()).unwrap().next().unwrap();
    let head = chain.head_index();
    let addresses: Vec<_> = chain.map(|d| d.addr().0 - scratch).collect();
    assert_eq!(addresses, [0, 1, 0, 1, 0, 1, 0, 1], "a loop, as far as the queue goes");
    queue.add_used(driver.memory(), head, 0).unwrap();
    let answer = driver.next_answer().unwrap().unwrap();
    assert_eq!((answer.token, answer.tail), (token, None));
    // What is behind the list is no link.
    driver.push_raw(&[RawDescriptor { next: 99, ..one }]).unwrap();
    assert_eq!(queue.iter(driver.memory()).unwrap().next().unwrap().count(), 1);
}

#[test]
fn events_come_in_the_buffers_that_were_posted() {
    let mut driver = driver(4);
    let mut queue = driver.event_queue().unwrap();
    driver.fill_events().unwrap();
    assert!(matches!(driver.post_event(24), Err(DriverError::Full)));
    let fault = event::Fault { reason: event::MAPPING, address: 0x5000.into(), ..event::Fault::default() };
    let chains: Vec<_> = queue.iter(driver.memory()).unwrap().collect();
    assert_eq!(chains.len(), 4);
    for (at, mut chain) in chains.into_iter().enumerate() {
        let head = chain.head_index();
        let buffer = chain.next().unwrap();
        assert!(buffer.is_write_only() && buffer.len() == 24);
        driver.memory().write_slice(fault.as_bytes(), buffer.addr()).unwrap();
        queue.add_used(driver.memory(), head, if at == 3 { 0 } else { 24 }).unwrap();
    }
    assert_eq!(driver.events().unwrap(), [fault; 3]);
    driver.post_event(8).unwrap();
    driver.fill_events().unwrap();
    assert_eq!(queue.iter(driver.memory()).unwrap().count(), 4);
}

#[test]
fn reset_forgets_what_was_at_the_device() {
    let mut driver = driver(4);
    let mut queue = driver.request_queue().unwrap();
    let old = driver.push(&attach(1)).unwrap();
    serve(&driver, &mut queue, 0);
    driver.push(&attach(2)).unwrap();
    driver.fill_events().unwrap();
    driver.reset().unwrap();
    assert_eq!((driver.outstanding(), driver.complete().unwrap().len()), (0, 0));
    let mut queue = driver.request_queue().unwrap();
    assert_eq!(queue.iter(driver.memory()).unwrap().count(), 0);
    let new = driver.push(&attach(3)).unwrap();
    assert_ne!(old, new);
    serve(&driver, &mut queue, 0);
    assert_eq!(driver.next_answer().unwrap().unwrap().token, new);
    driver.fill_events().unwrap();
}

#[test]
fn new_refuses_what_is_no_queue_or_no_memory() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let bytes = Driver::<&GuestMemoryMmap>::bytes(4, 64);
    assert!(matches!(Driver::new(&memory, 0, 3, 64), Err(DriverError::QueueSize(3))));
    assert!(matches!(Driver::new(&memory, 0, 0, 64), Err(DriverError::QueueSize(0))));
    assert!(matches!(Driver::new(&memory, 8, 4, 64), Err(DriverError::Area { .. })));
    assert!(matches!(Driver::new(&memory, u64::MAX - 15, 4, 64), Err(DriverError::Area { .. })));
    assert!(Driver::new(&memory, (0x10000 - bytes) & !15, 4, 64).is_ok());
    assert!(matches!(Driver::new(&memory, 0x10000 - bytes + 16, 4, 64), Err(DriverError::Area { .. })));
}

#[test]
fn resv_mem_passes_over_what_it_does_not_know() {
    let region = |start: u64| ResvMemBytes::new(start).0;
    struct ResvMemBytes(Vec<u8>);
    impl ResvMemBytes {
        fn new(start: u64) -> Self {
            let mut bytes = vec![1, 0, 20, 0, 1, 0, 0, 0];
            bytes.extend(start.to_le_bytes());
            bytes.extend((start + 0xfff).to_le_bytes());
            Self(bytes)
        }
    }
    let mut list = region(0x1000);
    list.extend([2, 0, 3, 0, 9, 9, 9]);
    let mut reserved = region(0x5000);
    reserved[1] = 0x10;
    list.extend(reserved);
    list.extend(region(0x3000));
    list.extend([0; 4]);
    list.extend(region(0x7000));
    let starts: Vec<_> = resv_mem(&list).iter().map(|r| r.start.get()).collect();
    assert_eq!(starts, [0x1000, 0x3000]);
    assert!(resv_mem(&list[..23]).is_empty(), "cut short");
}
