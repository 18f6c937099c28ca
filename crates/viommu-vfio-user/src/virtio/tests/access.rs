//! What lies in the BARs besides the common configuration, and the ways to it.

use super::*;

#[test]
fn device_configuration_when_accessed_is_the_devices() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(CONFIG, 4), 0xa3a2_a1a0);
    assert_eq!(driver.read(CONFIG + 14, 8), 0xafae);
    assert_eq!(driver.read(CONFIG + 0xff8, 8), 0);
    driver.write(CONFIG + 5, 0x1234, 2);
    assert_eq!(driver.calls(), [Call::WriteConfig(5, vec![0x34, 0x12])]);
}

#[test]
fn window_in_configuration_space_when_it_points_somewhere_is_that() {
    let mut driver = running(0);
    let window = driver.capability(9, Some(5));
    // Nowhere yet.
    driver.set_config(window + 16, 1, 4);
    assert_eq!(driver.calls(), []);
    let point = |driver: &mut Driver, bar: u64, offset: u64, bytes: u64| {
        driver.set_config(window + 4, bar, 1);
        driver.set_config(window + 8, offset, 4);
        driver.set_config(window + 12, bytes, 4);
    };
    point(&mut driver, 0, CONFIG + 4, 4);
    assert_eq!(driver.config(window + 16, 4), 0xa7a6_a5a4);
    driver.set_config(window + 16, 0x0403_0201, 4);
    assert_eq!(driver.calls(), [Call::WriteConfig(4, vec![1, 2, 3, 4])]);
    point(&mut driver, 0, CONFIG + 4, 2);
    assert_eq!(driver.config(window + 16, 4), 0xa5a4);
    driver.set_config(window + 16, 0x0605, 2);
    assert_eq!(driver.calls(), [Call::WriteConfig(4, vec![5, 6])]);
    point(&mut driver, 0, NOTIFY, 2);
    driver.set_config(window + 16, 0, 2);
    assert_eq!(driver.calls(), [Call::Notify(0)]);
    point(&mut driver, 0, reg::STATUS, 1);
    assert_eq!(driver.config(window + 16, 1), u64::from(driver.status()));
    driver.set_config(window + 16, 0, 1);
    assert_eq!(driver.status(), 0);
    driver.calls();
    point(&mut driver, 1, 0x10, 4);
    driver.set_config(window + 16, 0x7777_6666, 4);
    assert_eq!(driver.read_in(Region::Bar(1), 0x10, 4), 0x7777_6666);
    // Nowhere at all, or of a size that there is not.
    for (bar, offset, bytes) in [
        (0, 0x3ffd, 4),
        (0, 0x4000, 1),
        (0, 0xffff_ffff, 4),
        (1, 0x1000, 1),
        (2, 0, 1),
        (6, 0, 4),
        (255, 0, 4),
        (0, CONFIG, 0),
        (0, CONFIG, 3),
        (0, CONFIG, 8),
        (0, CONFIG, 0xffff_ffff),
    ] {
        point(&mut driver, bar, offset, bytes);
        driver.set_config(window + 16, 0x1111_1111, 4);
        assert_eq!(driver.config(window + 16, 4), 0x1111_1111, "{bar} {offset:#x} {bytes}");
        assert_eq!(driver.calls(), []);
    }
}

#[test]
fn registers_when_accessed_in_other_sizes_do_not_break() {
    let mut driver = running(0);
    for bytes in 0..=8 {
        for offset in (0..0x80).chain(0xff8..0x1008) {
            driver.read(offset, bytes);
            if !(reg::STATUS..=reg::STATUS).contains(&offset) {
                driver.write(offset, u64::MAX, bytes);
            }
        }
    }
    assert_ne!(driver.status() & status::DRIVER_OK, 0);
    // A long read is the registers one after the other, and zeros behind them.
    let mut long = [0xff; 0x100];
    driver.0.read(Region::Bar(0), 0, &mut long);
    assert_eq!(long[0x12..0x14], [2, 0]);
    assert_eq!(long[0x3c..], [0; 0xc4]);
}

#[test]
fn table_when_written_reads_back_and_pending_bits_do_not() {
    let mut driver = Driver::new();
    driver.0.write(Region::Bar(1), 0x7f8, &[0xee; 16]);
    assert_eq!(driver.read_in(Region::Bar(1), 0x7f8, 8), 0xeeee_eeee_eeee_eeee);
    assert_eq!(driver.read_in(Region::Bar(1), 0x800, 8), 0);
}

#[test]
fn doorbells_when_the_device_has_events_are_those() {
    assert!(Driver::new().0.doorbells().is_empty());
    let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let driver = Driver::of(Recording { event: Some(event.clone()), ..Recording::default() });
    let [bell] = &driver.0.doorbells()[..] else { panic!("one queue has an event") };
    assert_eq!((bell.bar, bell.offset, bell.size, bell.value), (0, NOTIFY + 4, 2, None));
    assert!(Arc::ptr_eq(&bell.event, &event));
}
