//! From the device to its driver.

use super::*;

#[test]
fn vectors_out_of_range_read_back_as_none() {
    let mut driver = running(0);
    for (asked, kept) in
        [(0, 0), (2, 2), (3, NO_VECTOR), (1, 1), (0xfffe, NO_VECTOR), (2, 2), (0xffff, NO_VECTOR)]
    {
        driver.write(reg::CONFIG_VECTOR, asked, 2);
        assert_eq!(driver.read(reg::CONFIG_VECTOR, 2), kept, "{asked}");
        driver.write(reg::QUEUE_VECTOR, asked, 2);
        assert_eq!(driver.read(reg::QUEUE_VECTOR, 2), kept, "{asked}");
    }
}

#[test]
fn interrupts_with_vectors_raise_the_one_that_the_driver_chose() {
    let mut driver = running(0);
    let vectors = events(&driver, irq::MSIX, 3);
    let counts = || vectors.iter().map(count).collect::<Vec<_>>();
    let signal = driver.0.device().queues[0].as_ref().unwrap().1.clone();
    let device = driver.0.device().device.clone().unwrap();
    signal.interrupt();
    assert_eq!(counts(), [0, 1, 0]);
    device.config_changed();
    assert_eq!(counts(), [1, 0, 0]);
    // It changes while the queue runs.
    driver.write(reg::QUEUE_VECTOR, 2, 2);
    signal.interrupt();
    assert_eq!(counts(), [0, 0, 1]);
    driver.write(reg::QUEUE_VECTOR, NO_VECTOR, 2);
    driver.write(reg::CONFIG_VECTOR, NO_VECTOR, 2);
    signal.interrupt();
    device.config_changed();
    assert_eq!(counts(), [0, 0, 0]);
    // The ISR status is for the pin.
    assert_eq!(driver.read(ISR, 1), 0);
}

#[test]
fn isr_when_read_is_cleared_and_lowers_the_pin() {
    let mut driver = running(0);
    let pin = events(&driver, irq::INTX, 1).remove(0);
    let signal = driver.0.device().queues[0].as_ref().unwrap().1.clone();
    let unmask = |driver: &Driver| {
        let action = IrqAction::DATA_NONE | IrqAction::UNMASK;
        driver.0.interrupts().set(irq::INTX, action, 0, 1, &[], vec![]).unwrap();
    };
    signal.interrupt();
    signal.interrupt();
    assert_eq!(count(&pin), 1);
    // Not read yet: the pin is still up.
    unmask(&driver);
    assert_eq!(count(&pin), 1);
    driver.0.device().device.as_ref().unwrap().config_changed();
    assert_eq!(driver.read(ISR, 1), 3);
    assert_eq!(driver.read(ISR, 1), 0);
    unmask(&driver);
    assert_eq!(count(&pin), 0);
    signal.interrupt();
    assert_eq!(count(&pin), 1);
    // What lies behind it is nothing, and reads nothing away.
    assert_eq!(driver.read(ISR + 1, 4), 0);
    assert_eq!(driver.read(ISR, 4), 1);
    // A reset lowers the pin, too.
    signal.interrupt();
    driver.set_status(0);
    unmask(&driver);
    count(&pin);
    unmask(&driver);
    assert_eq!((count(&pin), driver.read(ISR, 1)), (0, 0));
}

#[test]
fn configuration_when_it_changes_has_a_new_generation_and_interrupts_who_runs() {
    let mut driver = running(0);
    let vectors = events(&driver, irq::MSIX, 3);
    let device = driver.0.device().device.clone().unwrap();
    let before = driver.read(reg::GENERATION, 1);
    device.config_changed();
    assert_eq!(driver.read(reg::GENERATION, 1), before + 1);
    assert_eq!(count(&vectors[0]), 1);
    (0..256).for_each(|_| device.config_changed());
    assert_eq!(driver.read(reg::GENERATION, 1), before + 1);
    // After a reset there is nobody to tell.
    driver.set_status(0);
    count(&vectors[0]);
    driver.agree(0);
    driver.write(reg::CONFIG_VECTOR, 0, 2);
    device.config_changed();
    assert_eq!(count(&vectors[0]), 0);
    assert_eq!(driver.read(reg::GENERATION, 1), before + 2);
}

#[test]
fn ring_that_is_none_needs_a_reset() {
    let cases = [
        (reg::QUEUE_SIZE, 0, 2),
        (reg::QUEUE_SIZE, 17, 2),
        (reg::QUEUE_SIZE, 512, 2),
        (reg::QUEUE_SIZE, 0xffff, 2),
        (reg::QUEUE_DESC, 0x1008, 8),
        (reg::QUEUE_DRIVER, 0x2001, 8),
        (reg::QUEUE_DEVICE, 0x3002, 8),
    ];
    for (register, value, bytes) in cases {
        let mut driver = running(0);
        let vectors = events(&driver, irq::MSIX, 3);
        driver.write(reg::QUEUE_SELECT, 1, 2);
        driver.write(register, value, bytes);
        driver.write(reg::QUEUE_ENABLE, 1, 2);
        assert_ne!(driver.status() & status::NEEDS_RESET, 0, "{register:#x} {value:#x}");
        assert_eq!(count(&vectors[0]), 1);
        assert_eq!(driver.calls(), []);
        // It has not started, and the other goes on until the driver resets.
        driver.write(NOTIFY + 4, 1, 2);
        driver.write(NOTIFY, 0, 2);
        assert_eq!(driver.calls(), [Call::Notify(0)]);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
    }
}

#[test]
fn device_when_it_needs_a_reset_says_so_once() {
    let mut driver = running(0);
    let vectors = events(&driver, irq::MSIX, 3);
    let signal = driver.0.device().queues[0].as_ref().unwrap().1.clone();
    signal.needs_reset();
    driver.0.device().device.as_ref().unwrap().needs_reset();
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    assert_eq!(count(&vectors[0]), 1);
    // The driver cannot say that it does not.
    driver.set_status(status::ACKNOWLEDGE);
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
}
