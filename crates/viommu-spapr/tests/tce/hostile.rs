//! Arguments that no driver sends.

use viommu::endpoint::{Region, RegionKind};
use viommu::{EndpointConfig, Gpa, GpaRange};
use viommu_spapr::spec::{self, Code};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::rig::{A, B, LIOBN, LIST, RAM, RW, Rig, code, range, type1};

/// By number and registers.
fn call(rig: &Rig, number: u64, args: [u64; 4]) -> Code {
    code(rig.spapr.hypercall(number, args, &rig.memory).unwrap())
}

const L: u64 = 0x8000_0000;
const CALLS: [u64; 4] = [spec::H_GET_TCE, spec::H_PUT_TCE, spec::H_STUFF_TCE, spec::H_PUT_TCE_INDIRECT];

#[test]
fn a_number_that_is_no_call_of_these_is_somebody_elses() {
    let rig = Rig::new();
    for number in [0, 0x1d, 0x24, 0x134, 0x140, u64::MAX] {
        assert!(rig.spapr.hypercall(number, [0; 4], &rig.memory).is_none());
    }
}

#[test]
fn registers_are_dispatched_as_they_lie() {
    let rig = Rig::new();
    assert_eq!(call(&rig, spec::H_PUT_TCE, [L, 0x1000, A | RW, 9]), Code::Success);
    let read = rig.spapr.hypercall(spec::H_GET_TCE, [L, 0x1000, 9, 9], &rig.memory).unwrap();
    assert_eq!(read.wait().unwrap().value, A | RW);
    rig.write_list(&[B | RW, A | RW]);
    assert_eq!(call(&rig, spec::H_PUT_TCE_INDIRECT, [L, 0x1000, LIST, 2]), Code::Success);
    assert_eq!((rig.get(0x1000), rig.get(0x2000)), (B | RW, A | RW));
    assert_eq!(call(&rig, spec::H_STUFF_TCE, [L, 0x1000, 0, 2]), Code::Success);
    assert!(rig.bus.domain().is_empty());
    let metrics = rig.spapr.metrics();
    assert_eq!(CALLS.map(|number| metrics.answers(number, Code::Success)), [3, 1, 1, 1]);
    assert_eq!((metrics.mapped, metrics.replaced, metrics.cleared), (2, 1, 2));
}

#[test]
fn a_liobn_that_is_not_there_is_a_wrong_argument() {
    let rig = Rig::new();
    // The second is there, and has no window now; the third has a bit above 32.
    for liobn in [L | 0x7f00, u64::from(LIOBN) | 1, 1 << 32 | L, u64::MAX, 0] {
        for number in CALLS {
            assert_eq!(call(&rig, number, [liobn, 0, LIST, 1]), Code::Parameter, "{liobn:#x}");
        }
    }
    assert_eq!(rig.spapr.metrics().calls.iter().flatten().sum::<u64>(), 20);
}

#[test]
fn addresses_and_counts_outside_the_window_are_refused() {
    let mut rig = Rig::new();
    let mirror = rig.mirror(type1());
    rig.write_list(&[A | RW; 512]);
    for ioba in [1 << 30, 1 << 40, u64::MAX, 0x0800_0000_0000_0000] {
        for number in CALLS {
            let third = if number == spec::H_STUFF_TCE { 0 } else { LIST };
            assert_eq!(call(&rig, number, [L, ioba, third, 1]), Code::Parameter);
        }
    }
    let last = (1 << 30) - 0x1000;
    for (ioba, count) in [(last, 2), (0, 0), (last - 0x1000, 3), (0, 513), (0, u64::MAX), (last, u64::MAX)] {
        let args = [L, ioba, LIST, count];
        assert_eq!(call(&rig, spec::H_PUT_TCE_INDIRECT, args), Code::Parameter, "{ioba:#x}, {count}");
    }
    for (ioba, count) in [(last, 2), (0, 0), (0, (1 << 18) + 1), (0, u64::MAX), (0x1000, 1 << 52)] {
        assert_eq!(call(&rig, spec::H_STUFF_TCE, [L, ioba, 0, count]), Code::Parameter, "{ioba:#x}, {count}");
    }
    assert_eq!(mirror.take(), []);
    assert_eq!(call(&rig, spec::H_PUT_TCE_INDIRECT, [L, last + 0xfff, LIST, 1]), Code::Success);
}

#[test]
fn a_target_that_is_not_there_or_not_aligned_is_refused() {
    let rig = Rig::new();
    for tce in [RAM | RW, u64::MAX, !0xfff | RW, A | 0x800 | RW, A | 4 | RW, A | 0x400 | 1, 1 << 62 | 2] {
        assert_eq!(rig.put(0, tce), Code::Parameter, "{tce:#x}");
        assert_eq!(rig.put_list(0, &[A | RW, tce]), Code::Parameter, "{tce:#x}");
    }
    assert!(rig.bus.domain().is_empty());
    // The same addresses without access are poison.
    assert_eq!(rig.put(0, !3), Code::Success);
    assert_eq!(rig.get(0), 0);
    // A page that reaches past the memory.
    let window = rig.bus.create_window(24, 30).unwrap();
    let liobn = rig.spapr.liobn(window.liobn).unwrap();
    assert_eq!(code(liobn.put_tce(window.range.start().0, (RAM - (16 << 20)) | RW)), Code::Success);
    assert_eq!(code(liobn.put_tce(window.range.start().0, RAM | RW)), Code::Parameter);
    let upper = GpaRange::from_len(Gpa(RAM - (32 << 20)), 16 << 20).unwrap();
    assert!(rig.bus.domain().is_backed(upper));
}

#[test]
fn a_value_with_access_stuffs_nothing() {
    let rig = Rig::new();
    rig.put(0, A | RW);
    for value in 1..4 {
        assert_eq!(code(rig.liobn.stuff_tce(0, B | value, 1)), Code::Parameter);
    }
    assert_eq!(rig.get(0), A | RW);
    assert_eq!(code(rig.liobn.stuff_tce(0, 0xdead_0000, 1)), Code::Success);
    assert_eq!(rig.get(0), 0);
}

#[test]
fn a_list_that_is_not_aligned_or_not_in_memory_is_refused() {
    let rig = Rig::new();
    rig.write_list(&[A | RW; 4]);
    for list in [LIST + 8, LIST + 0x800, 4 << 20, !0xfff, 1 << 63] {
        let refused = rig.liobn.put_tce_indirect(0, list, 2, &rig.memory);
        assert_eq!(code(refused), Code::Parameter, "{list:#x}");
    }
    // One that runs out of memory.
    let short = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1800)]).unwrap();
    for at in 0..0x100 {
        short.write_slice(&(A | RW).to_be_bytes(), GuestAddress(0x1000 + 8 * at)).unwrap();
    }
    assert_eq!(code(rig.liobn.put_tce_indirect(0, 0x1000, 256, &short)), Code::Success);
    assert_eq!(code(rig.liobn.put_tce_indirect(0x10_0000, 0x1000, 257, &short)), Code::Parameter);
    assert_eq!(rig.get(0x10_0000), 0);
}

#[test]
fn a_region_of_an_endpoint_is_not_mapped() {
    let rig = Rig::new();
    let region = Region { range: range(0x10_0000, 0x1000), kind: RegionKind::Msi };
    let (endpoint, _) = rig.bus.add_endpoint(9, EndpointConfig { regions: vec![region] }).unwrap();
    rig.put(0xf_f000, A | RW);
    assert_eq!(rig.put_list(0xf_f000, &[B | RW, B | RW]), Code::Parameter);
    assert_eq!(rig.get(0xf_f000), A | RW, "nothing has changed");
    endpoint.remove().unwrap().wait().unwrap();
    assert_eq!(rig.put(0x10_0000, A | RW), Code::Success);
    let refused = rig.bus.add_endpoint(9, EndpointConfig { regions: vec![region] });
    assert!(refused.is_err() && rig.spapr.iommu().endpoint(9).is_none());
}

#[test]
fn a_call_from_a_callback_of_the_record_of_another_bus_is_refused() {
    let mut rig = Rig::new();
    let other = rig.spapr.add_bus(2, viommu_spapr::BusConfig::host_bridge(1)).unwrap();
    let mirror = rig.mirror(type1());
    let there = rig.spapr.liobn(LIOBN | 0x100).unwrap();
    let codes = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = codes.clone();
    mirror.lock().inside = Some(Box::new(move |_| {
        heard.lock().unwrap().push(there.put_tce(0, A | RW).poll().map(|answer| answer.code));
    }));
    assert_eq!(rig.put(0, A | RW), Code::Success);
    mirror.lock().inside = None;
    assert_eq!(*codes.lock().unwrap(), [Some(Code::Hardware)]);
    assert!(other.domain().is_empty());
}
