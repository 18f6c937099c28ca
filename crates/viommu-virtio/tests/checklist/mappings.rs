//! MAP and UNMAP (D22 to D33), the examples for UNMAP, and what the specification leaves open.

use viommu::fuzzing::recording::{Event, RecordingMirror};
use viommu::subscribe::Reach;
use viommu::{Access, FaultReason, Interest, Target};
use viommu_virtio::Config;
use viommu_virtio::driver::Request;
use viommu_virtio::spec::Features;
use viommu_virtio::spec::request::Status;

use crate::rig::*;

/// A domain (1) with one endpoint.
fn attached() -> Rig {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig
}

#[test]
fn d22_map_that_is_not_aligned_is_range() {
    for (mask, granule) in [(!0xfff, 0x1000), (!0xffff, 0x1_0000)] {
        let mut rig = rig_with(Config { page_size_mask: mask, ..config() }, |b| b);
        rig.ok(&attach(1, A));
        let (start, end, phys) = (4 * granule, 6 * granule - 1, 8 * granule);
        for off in [1, 0x10, granule / 2, granule - 1] {
            assert_eq!(rig.says(&map_bytes(1, start + off, end, phys, RW)), Status::RANGE);
            assert_eq!(rig.says(&map_bytes(1, start, end - off, phys, RW)), Status::RANGE);
            assert_eq!(rig.says(&map_bytes(1, start, end, phys + off, RW)), Status::RANGE);
        }
        assert_eq!(rig.record(1), []);
        rig.ok(&map_bytes(1, start, end, phys, RW));
    }
}

#[test]
fn d23_map_over_a_mapping_is_invalid() {
    let mut rig = attached();
    rig.ok(&map(1, 4, 7, 40));
    for (first, last) in [(4, 7), (4, 4), (7, 7), (5, 6), (0, 4), (7, 9), (0, 99)] {
        assert_eq!(rig.says(&map(1, first, last, 80)), Status::INVAL);
    }
    rig.ok(&map(1, 3, 3, 80));
    rig.ok(&map(1, 8, 8, 80));
    assert_eq!(rig.pages(1), [(3, 3), (4, 7), (8, 8)]);
}

#[test]
fn d24_map_with_an_unknown_flag_is_invalid() {
    let mut rig = attached();
    for bit in 3..32 {
        assert_eq!(rig.says(&map_bytes(1, 0, 0xfff, 0, RW | 1 << bit)), Status::INVAL);
    }
    rig.ok(&map_bytes(1, 0, 0xfff, 0, RW | 4));
    assert_eq!(rig.target(1), [Target::Mmio]);
    over(rig.device.reset().completion);
    over(rig.device.negotiate(Features::all() - Features::MMIO));
    rig.ok(&attach(1, A));
    assert_eq!(rig.says(&map_bytes(1, 0, 0xfff, 0, RW | 4)), Status::INVAL, "not negotiated");
}

#[test]
fn d25_map_in_no_domain_is_noent() {
    let mut rig = attached();
    assert_eq!(rig.says(&map(2, 0, 0, 0)), Status::NOENT);
}

#[test]
fn d26_map_in_a_bypass_domain_is_invalid() {
    let mut rig = rig();
    rig.ok(&attach_bypass(1, A));
    assert_eq!(rig.says(&map(1, 0, 0, 0)), Status::INVAL);
}

#[test]
fn d27_without_the_write_flag_nothing_is_written() {
    let mut rig = attached();
    for (page, flags, reads, writes) in [(0, 0, false, false), (1, R, true, false), (2, W, false, true)] {
        let start = page * PAGE;
        rig.ok(&map_bytes(1, start, start + 0xfff, start, flags));
        assert_eq!((rig.reads(A, start).is_ok(), rig.writes(A, start).is_ok()), (reads, writes));
    }
    assert_eq!(rig.writes(A, 0x1000), Err(FaultReason::Permission));
}

#[test]
fn d28_map_over_a_region_of_an_attached_endpoint_is_invalid() {
    let mut rig = attached();
    rig.ok(&attach(1, B));
    for (start, end) in [RESERVED, MSI] {
        for (from, to) in
            [(start, end), (start - PAGE, start + 0xfff), (end - 0xfff, end + PAGE), (0, u64::MAX)]
        {
            assert_eq!(rig.says(&map_bytes(1, from, to, 0, RW)), Status::INVAL, "{from:#x} to {to:#x}");
        }
        rig.ok(&map_bytes(1, start - PAGE, start - 1, 0, RW));
        rig.ok(&map_bytes(1, end + 1, end + PAGE, 0, RW));
    }
    rig.ok(&detach(1, B));
    rig.ok(&map_bytes(1, RESERVED.0, RESERVED.1, 0, RW));
}

#[test]
fn d29_reserved_of_unmap_is_ignored() {
    let mut rig = attached();
    rig.ok(&map(1, 0, 3, 0));
    rig.ok(&raw(&unmap(1, 0, 3), |bytes| bytes[24..28].fill(0xff)));
    assert_eq!(rig.pages(1), []);
}

#[test]
fn d30_unmap_in_no_domain_is_noent() {
    let mut rig = attached();
    assert_eq!(rig.says(&unmap(2, 0, 0)), Status::NOENT);
    // It matters not how it is aligned.
    assert_eq!(rig.says(&unmap_bytes(2, 1, 2)), Status::NOENT);
}

#[test]
fn d31_unmap_in_a_bypass_domain_is_invalid() {
    let mut rig = rig();
    rig.ok(&attach_bypass(1, A));
    assert_eq!(rig.says(&unmap(1, 0, 0)), Status::INVAL);
    assert_eq!(rig.says(&unmap_bytes(1, 1, 2)), Status::INVAL);
}

#[test]
fn d32_unmap_that_would_split_is_range_and_removes_nothing() {
    let mut rig = attached();
    rig.ok(&map(1, 0, 3, 0));
    rig.ok(&map(1, 4, 7, 0));
    rig.ok(&map(1, 8, 11, 0));
    for (first, last) in [(0, 10), (1, 11), (5, 6), (3, 4), (0, 0), (11, 11), (4, 8)] {
        assert_eq!(rig.says(&unmap(1, first, last)), Status::RANGE);
        assert_eq!(rig.pages(1), [(0, 3), (4, 7), (8, 11)]);
    }
    // Also where it ends inside a page.
    for (start, end) in [(0, 12 * PAGE - 2), (1, 12 * PAGE - 1), (0x4800, 0x4800), (0x3fff, 0x8000)] {
        assert_eq!(rig.says(&unmap_bytes(1, start, end)), Status::RANGE);
        assert_eq!(rig.pages(1), [(0, 3), (4, 7), (8, 11)]);
    }
}

#[test]
fn d33_unmap_of_what_is_partly_empty_is_ok() {
    let mut rig = attached();
    rig.ok(&unmap(1, 0, 1000));
    rig.ok(&map(1, 4, 7, 0));
    rig.ok(&map(1, 9, 9, 0));
    rig.ok(&unmap(1, 0, 3));
    rig.ok(&unmap(1, 8, 8));
    assert_eq!(rig.pages(1), [(4, 7), (9, 9)]);
    rig.ok(&unmap(1, 2, 20));
    assert_eq!(rig.pages(1), []);
}

#[test]
fn d33_unmap_may_begin_and_end_anywhere_in_a_hole() {
    let mut rig = attached();
    rig.ok(&map(1, 4, 7, 0));
    rig.ok(&map(1, 9, 9, 0));
    rig.ok(&unmap_bytes(1, 0x8001, 0x8002));
    rig.ok(&unmap_bytes(1, 0x3fff, 0x8000));
    assert_eq!(rig.pages(1), [(9, 9)]);
    rig.ok(&unmap_bytes(1, 0x9000, u64::MAX - 7));
    assert_eq!(rig.pages(1), []);
    rig.ok(&unmap_bytes(1, 5, 5));
}

/// The domain of an example, and what is left of it.
fn example(setup: &[(u64, u64)], first: u64, last: u64, due: Status, left: &[(u64, u64)]) {
    // Once for its own sake, and once where somebody listens.
    for mirrored in [false, true] {
        let mut rig = attached();
        let (mirror, handle) = RecordingMirror::new(Reach::default());
        let subscription =
            mirrored.then(|| rig.device.subscribe_mirror(A, mirror, Interest::MIRROR).unwrap());
        for (at, (first, last)) in setup.iter().enumerate() {
            rig.ok(&map(1, *first, *last, at as u64 * 64));
        }
        assert_eq!(rig.says(&unmap(1, first, last)), due);
        assert_eq!(rig.pages(1), left);
        if let Some(subscription) = subscription {
            assert_eq!(handle.held().len(), left.len());
            assert!(subscription.audit().unwrap().is_clean());
        }
    }
}

#[test]
fn unmap_example_1() {
    example(&[], 0, 4, Status::OK, &[]);
}

#[test]
fn unmap_example_2() {
    example(&[(0, 9)], 0, 9, Status::OK, &[]);
}

#[test]
fn unmap_example_3() {
    example(&[(0, 4), (5, 9)], 0, 9, Status::OK, &[]);
}

#[test]
fn unmap_example_4() {
    example(&[(0, 9)], 0, 4, Status::RANGE, &[(0, 9)]);
}

#[test]
fn unmap_example_5() {
    example(&[(0, 4), (5, 9)], 0, 4, Status::OK, &[(5, 9)]);
}

#[test]
fn unmap_example_6() {
    example(&[(0, 4)], 0, 9, Status::OK, &[]);
}

#[test]
fn unmap_example_7() {
    example(&[(0, 4), (10, 14)], 0, 14, Status::OK, &[]);
}

#[test]
fn choice_a_range_that_ends_before_or_where_it_begins_is_range() {
    let mut rig = attached();
    for (start, end) in [(0x5000, 0x4fff), (0x5000, 0x5000), (0x5000, 0), (u64::MAX, 0), (0, 0)] {
        assert_eq!(rig.says(&map_bytes(1, start, end, 0, RW)), Status::RANGE);
    }
    assert_eq!(rig.says(&unmap_bytes(1, 0x5000, 0x4fff)), Status::RANGE);
    assert_eq!(rig.says(&unmap_bytes(1, u64::MAX, 0)), Status::RANGE);
}

#[test]
fn choice_what_is_outside_the_input_range_is_range() {
    let limits = range(0x10_0000, 0x7f_ffff);
    let mut rig = rig_with(Config { input_range: limits, ..config() }, |b| b);
    rig.ok(&attach(1, A));
    for (start, end) in [(0xf_f000, 0x10_0fff), (0x7f_f000, 0x80_0fff), (0, u64::MAX), (0x80_0000, 0x80_0fff)]
    {
        assert_eq!(rig.says(&map_bytes(1, start, end, 0, RW)), Status::RANGE);
        assert_eq!(rig.says(&unmap_bytes(1, start, end)), Status::RANGE);
    }
    rig.ok(&map_bytes(1, 0x10_0000, 0x7f_ffff, 0, RW));
    rig.ok(&unmap_bytes(1, 0x10_0000, 0x7f_ffff));
}

#[test]
fn choice_a_domain_outside_the_domain_range_is_range() {
    let mut rig = rig_with(Config { domain_range: 5..=7, ..config() }, |b| b);
    for domain in [0, 4, 8, u32::MAX] {
        for request in
            [attach(domain, A), attach_bypass(domain, A), map(domain, 0, 0, 0), unmap(domain, 0, 0)]
        {
            assert_eq!(rig.says(&request), Status::RANGE, "{request:?}");
        }
        assert_eq!(rig.says(&detach(domain, A)), Status::INVAL, "it is not attached there");
    }
    rig.ok(&attach(5, A));
    rig.ok(&attach(7, A));
}

#[test]
fn choice_physical_addresses_that_wrap_are_range() {
    let mut rig = attached();
    assert_eq!(rig.says(&map_bytes(1, 0, 0x1fff, 0_u64.wrapping_sub(0x1000), RW)), Status::RANGE);
    assert_eq!(rig.says(&map_bytes(1, 0x1000, u64::MAX, 0x2000, RW)), Status::RANGE);
    rig.ok(&map_bytes(1, 0, 0x1fff, 0_u64.wrapping_sub(0x2000), RW));
}

#[test]
fn choice_a_mapping_without_flags_occupies_and_allows_nothing() {
    let mut rig = attached();
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    let subscription = rig.device.subscribe_mirror(A, mirror, Interest::MIRROR).unwrap();
    rig.ok(&map_bytes(1, 0x4000, 0x7fff, 0, 0));
    assert_eq!(rig.reads(A, 0x4000), Err(FaultReason::Unmapped));
    assert_eq!(rig.says(&map(1, 5, 5, 0)), Status::INVAL);
    assert_eq!(rig.says(&unmap(1, 5, 5)), Status::RANGE);
    assert_eq!(handle.take(), [], "nobody is told");
    assert!(subscription.audit().unwrap().is_clean());
    rig.ok(&unmap(1, 4, 7));
    assert_eq!(rig.pages(1), []);
}

#[test]
fn choice_the_last_address_of_all_is_aligned() {
    let mut rig = attached();
    rig.ok(&map_bytes(1, 0_u64.wrapping_sub(0x2000), u64::MAX, 0x8000, RW));
    assert_eq!(rig.reads(A, u64::MAX), Ok(0x9fff));
    assert_eq!(rig.says(&map_bytes(1, 0_u64.wrapping_sub(0x1000), u64::MAX, 0, RW)), Status::INVAL);
    rig.ok(&unmap_bytes(1, 0x1000, u64::MAX));
    rig.ok(&map_bytes(1, 0, u64::MAX, 0, RW));
    assert_eq!(rig.record(1)[0].range, viommu::IovaRange::ALL);
    rig.ok(&unmap_bytes(1, 0, u64::MAX));
    assert_eq!(rig.pages(1), []);
}

#[test]
fn caps_are_nomem_and_leave_nothing() {
    let mut rig = rig_with(config(), |b| b.domain_mappings(2).mappings(3));
    rig.ok(&attach(1, A));
    rig.ok(&attach(2, B));
    rig.ok(&map(1, 1, 1, 0));
    rig.ok(&map(1, 3, 3, 0));
    assert_eq!(rig.says(&map(1, 5, 5, 0)), Status::NOMEM, "of the domain");
    assert_eq!(rig.says(&map(1, 3, 3, 0)), Status::INVAL, "what is wrong in itself comes first");
    rig.ok(&map(2, 1, 1, 0));
    assert_eq!(rig.says(&map(2, 5, 5, 0)), Status::NOMEM, "in all");
    rig.ok(&unmap(1, 0, 9));
    rig.ok(&map(2, 5, 5, 0));
    assert_eq!((rig.pages(1), rig.pages(2)), (vec![], vec![(1, 1), (5, 5)]));
}

#[test]
fn a_mirror_that_refuses_fails_the_map_in_its_own_way_everywhere() {
    let mut rig = attached();
    rig.ok(&attach(1, B));
    let (first, one) = RecordingMirror::new(Reach::default());
    let (second, two) = RecordingMirror::new(Reach::default());
    let ours = rig.device.subscribe_mirror(A, first, Interest::MIRROR).unwrap();
    let theirs = rig.device.subscribe_mirror(B, second, Interest::MIRROR).unwrap();
    two.refuse_nth(1, 1, |event| matches!(event, Event::Map(_)));
    assert_eq!(rig.says(&map(1, 1, 1, 0)), Status::NOMEM);
    assert_eq!((rig.pages(1), one.held(), two.held()), (vec![], vec![], vec![]));
    rig.ok(&map(1, 1, 1, 0));
    assert!(ours.audit().unwrap().is_clean() && theirs.audit().unwrap().is_clean());
    assert_eq!((one.held().len(), two.held().len()), (1, 1));
}

#[test]
fn a_mirror_that_cannot_remove_is_fenced_and_its_endpoint_with_it() {
    let mut rig = attached();
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    let subscription = rig.device.subscribe_mirror(A, mirror, Interest::MIRROR).unwrap();
    rig.ok(&map(1, 1, 1, 0));
    handle.refuse_nth(1, 1, |event| matches!(event, Event::Unmap(_)));
    rig.ok(&unmap(1, 1, 1));
    assert!(subscription.is_fenced());
    assert_eq!(rig.access(A, 0x1000, Access::READ).unwrap_err(), FaultReason::Fenced);
    assert_eq!(rig.says(&attach(2, A)), Status::DEVERR);
    assert_eq!(rig.says(&map(2, 1, 1, 0)), Status::NOENT, "no domain is left of it");
    rig.ok(&detach(1, A));
    assert_eq!(rig.says(&attach(1, A)), Status::DEVERR);
}

#[test]
fn map_and_unmap_in_one_batch_are_executed_in_order() {
    let mut rig = attached();
    let requests = [
        map(1, 0, 3, 8),
        unmap(1, 0, 3),
        map(1, 0, 1, 16),
        map(1, 1, 2, 16),
        map(2, 0, 0, 0),
        attach(2, B),
        map(2, 0, 0, 5),
        unmap_bytes(1, 0x2001, 0x3000),
        map(1, 2, 2, 24),
        Request::Probe { endpoint: A },
    ];
    let due = [0, 0, 0, 4, 6, 0, 0, 0, 0, 0];
    requests.iter().for_each(|request| {
        rig.driver.push(request).unwrap();
    });
    rig.serve();
    let answers = rig.driver.complete().unwrap();
    let statuses: Vec<u8> = answers.iter().map(|answer| answer.status().unwrap().0).collect();
    assert_eq!(statuses, due);
    assert!(answers.is_sorted_by_key(|answer| answer.token), "and answered in order");
    assert_eq!(
        (rig.reads(A, 0x1000), rig.reads(A, 0x2000), rig.reads(B, 0)),
        (Ok(0x1_1000), Ok(0x1_8000), Ok(0x5000))
    );
}
