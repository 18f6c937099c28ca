//! Devices are switched between tables.

use super::*;

#[test]
fn an_attach_to_a_domain_where_another_device_is_is_one_call() {
    let rig = Rig::new();
    for page in 0..40 {
        over(rig.domains[0].map(rw(2 * page, 2 * page, page % 32)).unwrap());
    }
    over(rig.endpoints[1].block().unwrap());
    rig.check();
    rig.fake.take_calls();
    over(rig.endpoints[1].attach(1).unwrap());
    let calls = rig.fake.take_calls();
    assert!(matches!(calls[..], [Call::Attach { device, .. }] if device == rig.devices[1]), "{calls:?}");
    rig.check();
    assert_eq!((rig.handle.spaces(), rig.handle.tables(), rig.handle.entries()), (1, 1, 40));
}

#[test]
fn a_domain_is_filled_before_the_first_device_comes_and_emptied_behind_the_last() {
    let rig = Rig::new();
    over(rig.domains[0].map(rw(0, 3, 0)).unwrap());
    over(rig.domains[1].map(rw(5, 6, 8)).unwrap());
    over(rig.endpoints[0].attach(2).unwrap());
    rig.check();
    assert_eq!(rig.handle.spaces(), 2);
    rig.fake.take_calls();
    over(rig.endpoints[1].attach(2).unwrap());
    let calls = rig.fake.take_calls();
    // One switch, then what nobody uses any more goes.
    assert!(matches!(calls[0], Call::Attach { .. }), "{calls:?}");
    assert_eq!(calls[1..], [Call::Unmap(0, 4 * PAGE), Call::Destroy, Call::Destroy]);
    rig.check();
    assert_eq!(rig.fake.objects(), (1, 1));
    over(rig.endpoints[0].block().unwrap());
    over(rig.endpoints[1].block().unwrap());
    rig.check();
    assert_eq!(rig.fake.objects(), (0, 0), "nothing is left behind");
}

#[test]
fn identity_is_an_ioas_like_any_other() {
    let rig = Rig::new();
    over(rig.endpoints[0].attach_identity().unwrap());
    over(rig.endpoints[1].attach_identity().unwrap());
    rig.check();
    assert_eq!(rig.reached(0).len(), 48, "memory, and no registers");
    assert_eq!(rig.handle.spaces(), 1);
}

#[test]
fn a_device_of_another_kind_gets_a_table_of_its_own_in_the_same_ioas() {
    let rig = Rig::with(Kinds { kinds: [0, 1], ..Kinds::default() });
    assert_eq!((rig.handle.spaces(), rig.handle.tables()), (1, 2));
    over(rig.domains[0].map(rw(0, 3, 0)).unwrap());
    let calls = rig.fake.take_calls();
    assert_eq!(calls.len(), 1, "one map for both: {calls:?}");
    rig.check();
    // It comes back to the table that was made for it.
    over(rig.endpoints[1].block().unwrap());
    over(rig.endpoints[1].attach(1).unwrap());
    assert_eq!(rig.handle.tables(), 2);
    rig.check();
}

#[test]
fn limits_are_read_once_a_device_and_bound_what_is_mapped() {
    let rig = Rig::new();
    let limits = rig.handle.limits(rig.endpoints[0].id()).unwrap();
    assert_eq!((limits.apertures.len(), limits.page_size), (2, PAGE));
    for outside in [rw(0xfedff, 0xfee00, 0), rw(0xfee00, 0xfee00, 0), rw(1 << 36, 1 << 36, 0)] {
        over(rig.domains[0].map(outside).unwrap_err().completion);
    }
    assert_eq!(rig.fake.take_calls(), [], "refused before the kernel is asked");
    assert_eq!(rig.handle.add(rig.endpoints[0].id(), rig.fake.device(0, true, None)), Err(Errno::EEXIST));
}

#[test]
fn a_device_is_given_back_detached() {
    let rig = Rig::new();
    over(rig.domains[0].map(rw(0, 3, 0)).unwrap());
    let Rig { endpoints: [first, second], handle, fake, devices, .. } = rig;
    let id = first.id();
    over(first.remove().unwrap());
    let device = handle.remove(id).unwrap();
    assert_eq!((device.id(), fake.reached(devices[0]).len()), (devices[0], 0));
    assert_eq!(handle.remove(id).map(drop), Err(Errno::ENODEV));
    assert_eq!(fake.reached(devices[1]).len(), 1, "the other is where it was");
    drop(second);
}

#[test]
fn an_endpoint_without_a_device_is_refused() {
    let rig = Rig::new();
    let lonely = rig.iommu.add_endpoint(20, EndpointConfig::default()).unwrap();
    over(lonely.attach(1).unwrap());
    lonely.bind_with(&rig.binding).unwrap_err();
    rig.check();
}
