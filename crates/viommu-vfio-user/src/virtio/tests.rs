mod access;
mod signals;

use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};
use virtio_queue::QueueT;

use super::common::register as reg;
use super::*;
use crate::function::{Function, Region};
use crate::memory::{WindowLimits, Windows};
use crate::spec::{IrqAction, irq};

const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const OFFERED: u64 = 0b101 | feature::EVENT_IDX | feature::ACCESS_PLATFORM;
const NO_VECTOR: u64 = 0xffff;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Negotiate(u64),
    WriteConfig(u64, Vec<u8>),
    Ready,
    Start(u16),
    Stop(u16),
    Notify(u16),
    Reset(ResetBy),
}

#[derive(Default)]
struct Recording {
    calls: Mutex<Vec<Call>>,
    refuses: bool,
    device: Option<DeviceSignal>,
    queues: [Option<(Queue, QueueSignal)>; 2],
    event: Option<Arc<OwnedFd>>,
}

impl Recording {
    fn says(&mut self, call: Call) {
        self.calls.get_mut().unwrap().push(call);
    }
}

impl Device for Recording {
    fn device_type(&self) -> u16 {
        23
    }

    fn class(&self) -> u32 {
        0x08_80_00
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 64]
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn negotiate(&mut self, features: u64) -> bool {
        self.says(Call::Negotiate(features));
        !self.refuses
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..16).zip(data) {
            *byte = 0xa0 + u8::try_from(at).unwrap();
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.says(Call::WriteConfig(offset, data.to_vec()));
    }

    fn ready(&mut self, signal: DeviceSignal) {
        self.device = Some(signal);
        self.says(Call::Ready);
    }

    fn start(&mut self, index: u16, queue: Queue, signal: QueueSignal) {
        self.queues[usize::from(index)] = Some((queue, signal));
        self.says(Call::Start(index));
    }

    fn stop(&mut self, index: u16) {
        assert!(self.queues[usize::from(index)].take().is_some(), "{index} was not started");
        self.says(Call::Stop(index));
    }

    fn notify(&mut self, index: u16) {
        assert!(self.queues[usize::from(index)].is_some(), "{index} is not started");
        self.says(Call::Notify(index));
    }

    fn reset(&mut self, by: ResetBy) {
        assert!(self.queues.iter().all(Option::is_none), "a queue goes on");
        self.says(Call::Reset(by));
    }

    fn doorbell(&self, index: u16) -> Option<Arc<OwnedFd>> {
        self.event.clone().filter(|_| index == 1)
    }
}

/// A driver: the function, as it is found by one.
struct Driver(VirtioFunction<Recording>);

impl Driver {
    fn new() -> Self {
        Self::of(Recording::default())
    }

    fn of(device: Recording) -> Self {
        Self(VirtioFunction::new(device, Windows::new(WindowLimits::default())))
    }

    fn read_in(&mut self, region: Region, offset: u64, bytes: usize) -> u64 {
        // What is not written over would be seen.
        let mut data = [0x55; 8];
        self.0.read(region, offset, &mut data[..bytes]);
        data[bytes..].fill(0);
        u64::from_le_bytes(data)
    }

    fn read(&mut self, offset: u64, bytes: usize) -> u64 {
        self.read_in(Region::Bar(0), offset, bytes)
    }

    fn write(&mut self, offset: u64, value: u64, bytes: usize) {
        self.0.write(Region::Bar(0), offset, &value.to_le_bytes()[..bytes]);
    }

    fn config(&mut self, offset: u8, bytes: usize) -> u64 {
        self.read_in(Region::Config, offset.into(), bytes)
    }

    fn set_config(&mut self, offset: u8, value: u64, bytes: usize) {
        self.0.write(Region::Config, offset.into(), &value.to_le_bytes()[..bytes]);
    }

    fn status(&mut self) -> u8 {
        u8::try_from(self.read(reg::STATUS, 1)).unwrap()
    }

    fn set_status(&mut self, status: u8) {
        self.write(reg::STATUS, status.into(), 1);
    }

    fn choose(&mut self, features: u64) {
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(reg::DRIVER_FEATURE_SELECT, select, 4);
            self.write(reg::DRIVER_FEATURE, half, 4);
        }
    }

    /// To FEATURES_OK.
    fn agree(&mut self, features: u64) {
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.choose(features | feature::VERSION_1);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert_ne!(self.status() & status::FEATURES_OK, 0);
    }

    fn enable(&mut self, queue: u16) {
        self.write(reg::QUEUE_SELECT, queue.into(), 2);
        self.write(reg::QUEUE_SIZE, 16, 2);
        for (register, address) in
            [(reg::QUEUE_DESC, 0x1000), (reg::QUEUE_DRIVER, 0x2000), (reg::QUEUE_DEVICE, 0x3000)]
        {
            self.write(register, address, 8);
        }
        self.write(reg::QUEUE_VECTOR, u64::from(queue) + 1, 2);
        self.write(reg::QUEUE_ENABLE, 1, 2);
    }

    fn go(&mut self) {
        let status = self.status();
        self.set_status(status | status::DRIVER_OK);
    }

    /// What the device was asked since the last time.
    fn calls(&self) -> Vec<Call> {
        core::mem::take(&mut *self.0.device().calls.lock().unwrap())
    }

    /// Where the capability of this kind lies.
    fn capability(&mut self, id: u64, kind: Option<u64>) -> u8 {
        let mut at = self.config(0x34, 1);
        while at != 0 {
            let here = u8::try_from(at).unwrap();
            if self.config(here, 1) == id && kind.is_none_or(|kind| self.config(here + 3, 1) == kind) {
                return here;
            }
            at = self.config(here + 1, 1);
        }
        panic!("no capability {id} {kind:?}");
    }
}

/// A driver that has come to DRIVER_OK with queue 0.
fn running(features: u64) -> Driver {
    let mut driver = Driver::new();
    driver.agree(features);
    driver.write(reg::CONFIG_VECTOR, 0, 2);
    driver.enable(0);
    driver.go();
    assert_eq!(driver.calls(), [Call::Negotiate(features | feature::VERSION_1), Call::Ready, Call::Start(0)]);
    driver
}

fn count(event: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(event, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

/// Gives the function eventfds for a kind of interrupt.
fn events(driver: &Driver, index: u32, count: u32) -> Vec<OwnedFd> {
    let events: Vec<_> =
        (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()).collect();
    let fds = events.iter().map(|event| event.try_clone().unwrap()).collect();
    let action = IrqAction::DATA_EVENTFD | IrqAction::TRIGGER;
    driver.0.interrupts().set(index, action, 0, count, &[], fds).unwrap();
    events
}

#[test]
fn capabilities_when_walked_are_those_of_the_modern_transport() {
    let mut driver = Driver::new();
    assert_eq!(driver.config(0, 4), 0x1057_1af4);
    assert_eq!(driver.config(8, 4), 0x0880_0001);
    for (kind, offset, length) in [(1, 0, 0x3c), (2, NOTIFY, 0x1000), (3, ISR, 1), (4, CONFIG, 0x1000)] {
        let at = driver.capability(9, Some(kind));
        let found = (driver.config(at + 4, 1), driver.config(at + 8, 4), driver.config(at + 12, 4));
        assert_eq!(found, (0, offset, length));
        // It is not to be moved.
        driver.set_config(at + 4, u64::MAX, 8);
        assert_eq!(driver.config(at + 8, 4), offset);
    }
    let notify = driver.capability(9, Some(2));
    assert_eq!(driver.config(notify + 16, 4), 4);
    let msix = driver.capability(0x11, None);
    assert_eq!(driver.config(msix + 2, 2), 2, "three vectors");
    assert_eq!((driver.config(msix + 4, 4), driver.config(msix + 8, 4)), (1, 0x801));
    driver.set_config(msix + 2, 0xffff, 2);
    assert_eq!(driver.config(msix + 2, 2), 0xc002);
}

#[test]
fn features_when_selected_are_read_in_halves() {
    let mut driver = Driver::new();
    let all = OFFERED | feature::VERSION_1 | feature::RING_RESET;
    for (select, half) in [(0, all & 0xffff_ffff), (1, all >> 32), (2, 0), (0xffff_ffff, 0)] {
        driver.write(reg::DEVICE_FEATURE_SELECT, select, 4);
        assert_eq!(driver.read(reg::DEVICE_FEATURE_SELECT, 4), select);
        assert_eq!(driver.read(reg::DEVICE_FEATURE, 4), half);
    }
    driver.choose(0x1234_5678_9abc_def0);
    for (select, half) in [(0, 0x9abc_def0), (1, 0x1234_5678), (2, 0)] {
        driver.write(reg::DRIVER_FEATURE_SELECT, select, 4);
        assert_eq!(driver.read(reg::DRIVER_FEATURE, 4), half);
    }
    driver.write(reg::DRIVER_FEATURE, 0xffff_ffff, 4);
    driver.write(reg::DRIVER_FEATURE_SELECT, 0, 4);
    assert_eq!(driver.read(reg::DRIVER_FEATURE, 4), 0x9abc_def0);
}

#[test]
fn features_when_they_cannot_be_are_not_agreed_on() {
    for features in [OFFERED, feature::VERSION_1 | 0b10, feature::VERSION_1 | 1 << 63, 0] {
        let mut driver = Driver::new();
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER);
        driver.choose(features);
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert_eq!(driver.status(), status::ACKNOWLEDGE | status::DRIVER, "{features:#x}");
        // And without them nothing runs.
        driver.enable(0);
        driver.go();
        assert_eq!(driver.status() & status::DRIVER_OK, 0);
        assert_eq!(driver.calls(), []);
    }
}

#[test]
fn features_when_the_device_refuses_them_are_not_agreed_on() {
    let mut driver = Driver::of(Recording { refuses: true, ..Recording::default() });
    driver.choose(feature::VERSION_1);
    driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    assert_eq!(driver.status() & status::FEATURES_OK, 0);
    assert_eq!(driver.calls(), [Call::Negotiate(feature::VERSION_1)]);
    assert_eq!(driver.0.driver_state().features(), 0);
}

#[test]
fn features_when_agreed_on_are_fixed_and_asked_once() {
    let mut driver = Driver::new();
    driver.agree(0b101);
    driver.choose(feature::VERSION_1);
    driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    driver.write(reg::DRIVER_FEATURE_SELECT, 0, 4);
    assert_eq!(driver.read(reg::DRIVER_FEATURE, 4), 0b101);
    assert_eq!(driver.calls(), [Call::Negotiate(0b101 | feature::VERSION_1)]);
    assert_eq!(driver.0.driver_state().features(), 0b101 | feature::VERSION_1);
    assert_eq!(driver.0.driver_state().status(), driver.status());
}

#[test]
fn status_when_written_keeps_what_it_has_and_takes_only_what_is_the_drivers() {
    let mut driver = Driver::new();
    driver.set_status(status::NEEDS_RESET | 0x30 | status::ACKNOWLEDGE);
    assert_eq!(driver.status(), status::ACKNOWLEDGE);
    driver.set_status(status::FAILED);
    assert_eq!(driver.status(), status::ACKNOWLEDGE | status::FAILED);
    // Of one byte, not of two.
    driver.write(reg::STATUS, u64::from(status::DRIVER), 2);
    assert_eq!(driver.status(), status::ACKNOWLEDGE | status::FAILED);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn queues_when_the_driver_is_ready_start_once() {
    let mut driver = running(0);
    driver.go();
    driver.write(reg::QUEUE_ENABLE, 1, 2);
    assert_eq!(driver.calls(), []);
    // One that comes later starts at once.
    driver.enable(1);
    assert_eq!(driver.calls(), [Call::Start(1)]);
    let queues = &driver.0.device().queues;
    for (queue, _) in queues.iter().flatten() {
        assert_eq!((queue.size(), queue.max_size() >= 64), (16, true));
        let rings = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        assert_eq!(rings, (0x1000, 0x2000, 0x3000));
        assert!(!queue.event_idx_enabled());
    }
    assert!(running(feature::EVENT_IDX).0.device().queues[0].as_ref().unwrap().0.event_idx_enabled());
}

#[test]
fn doorbell_when_its_queue_has_not_started_is_silent() {
    let mut driver = Driver::new();
    driver.write(NOTIFY, 0, 2);
    driver.agree(0);
    driver.enable(0);
    driver.write(NOTIFY, 0, 2);
    assert_eq!(driver.calls(), [Call::Negotiate(feature::VERSION_1)]);
    driver.go();
    driver.calls();
    driver.write(NOTIFY, 0, 2);
    driver.write(NOTIFY + 4, 1, 2);
    for offset in [NOTIFY + 8, 0x3ffe] {
        driver.write(offset, 2, 2);
    }
    assert_eq!(driver.calls(), [Call::Notify(0)]);
    driver.enable(1);
    driver.write(reg::QUEUE_SELECT, 1, 2);
    assert_eq!(driver.read(reg::QUEUE_NOTIFY_OFF, 2), 1);
    driver.write(NOTIFY + 4, 1, 2);
    assert_eq!(driver.calls(), [Call::Start(1), Call::Notify(1)]);
}

#[test]
fn queue_when_enabled_is_locked() {
    let mut driver = running(0);
    driver.write(reg::QUEUE_SIZE, 32, 2);
    for register in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
        driver.write(register, 0x8000, 8);
        driver.write(register + 4, 1, 4);
    }
    driver.write(reg::QUEUE_ENABLE, 0, 2);
    assert_eq!(driver.read(reg::QUEUE_SIZE, 2), 16);
    assert_eq!(driver.read(reg::QUEUE_ENABLE, 2), 1);
    assert_eq!(driver.read(reg::QUEUE_DESC, 8), 0x1000);
    assert_eq!(driver.read(reg::QUEUE_DRIVER, 8), 0x2000);
    assert_eq!(driver.read(reg::QUEUE_DEVICE, 8), 0x3000);
}

#[test]
fn addresses_when_written_in_halves_or_whole_are_the_same() {
    let mut driver = Driver::new();
    for (nth, register) in (1..).zip([reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE]) {
        driver.write(register, 0x1111_2222_3333_4440 * nth, 8);
        driver.write(register + 4, nth, 4);
        driver.write(register, 0x9000_0000 + nth, 4);
    }
    for (nth, register) in (1..).zip([reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE]) {
        assert_eq!(driver.read(register, 8), nth << 32 | (0x9000_0000 + nth));
        assert_eq!(driver.read(register + 4, 4), nth);
    }
    // One that passes the end of its field leaves the next alone.
    driver.write(reg::QUEUE_DESC + 4, u64::MAX, 8);
    assert_eq!(driver.read(reg::QUEUE_DRIVER, 8), 2 << 32 | 0x9000_0002);
    // Each queue has its own.
    driver.write(reg::QUEUE_SELECT, 1, 2);
    assert_eq!(driver.read(reg::QUEUE_DESC, 8), 0);
}

#[test]
fn queue_that_does_not_exist_has_no_size_and_takes_nothing() {
    let mut driver = running(feature::RING_RESET);
    for queue in [2, 0xffff] {
        driver.write(reg::QUEUE_SELECT, queue, 2);
        assert_eq!(driver.read(reg::QUEUE_SIZE, 2), 0);
        driver.write(reg::QUEUE_SIZE, 16, 2);
        driver.write(reg::QUEUE_DESC, 0x1000, 8);
        driver.write(reg::QUEUE_VECTOR, 0, 2);
        driver.write(reg::QUEUE_ENABLE, 1, 2);
        driver.write(reg::QUEUE_RESET, 1, 2);
        assert_eq!(driver.read(reg::QUEUE_SIZE, 2), 0);
        assert_eq!(driver.read(reg::QUEUE_ENABLE, 2), 0);
        assert_eq!(driver.read(reg::QUEUE_DESC, 8), 0);
    }
    assert_eq!(driver.read(reg::NUM_QUEUES, 2), 2);
    assert_eq!(driver.calls(), []);
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn queue_when_reset_stops_and_can_be_enabled_again() {
    let mut driver = running(feature::RING_RESET);
    driver.write(reg::QUEUE_RESET, 1, 2);
    assert_eq!(driver.calls(), [Call::Stop(0)]);
    assert_eq!(driver.read(reg::QUEUE_RESET, 2), 0);
    assert_eq!(driver.read(reg::QUEUE_ENABLE, 2), 0);
    assert_eq!(driver.read(reg::QUEUE_SIZE, 2), 256);
    assert_eq!(driver.read(reg::QUEUE_VECTOR, 2), NO_VECTOR);
    assert_eq!(driver.read(reg::QUEUE_DESC, 8), 0);
    driver.write(NOTIFY, 0, 2);
    driver.write(reg::QUEUE_RESET, 1, 2);
    assert_eq!(driver.calls(), []);
    driver.enable(0);
    driver.write(NOTIFY, 0, 2);
    assert_eq!(driver.calls(), [Call::Start(0), Call::Notify(0)]);

    // Only for those who have agreed on it.
    let mut driver = running(0);
    driver.write(reg::QUEUE_RESET, 1, 2);
    assert_eq!(driver.calls(), []);
    assert_eq!(driver.read(reg::QUEUE_ENABLE, 2), 1);
}

#[test]
fn device_when_reset_by_its_driver_is_as_before() {
    let mut driver = running(0);
    driver.enable(1);
    driver.calls();
    driver.set_config(4, 6, 2);
    driver.set_status(0);
    assert_eq!(driver.calls(), [Call::Stop(0), Call::Stop(1), Call::Reset(ResetBy::Driver)]);
    let zero = [
        (reg::DEVICE_FEATURE_SELECT, 4),
        (reg::DRIVER_FEATURE_SELECT, 4),
        (reg::DRIVER_FEATURE, 4),
        (reg::STATUS, 1),
        (reg::QUEUE_SELECT, 2),
        (reg::QUEUE_ENABLE, 2),
        (reg::QUEUE_DESC, 8),
        (reg::QUEUE_DRIVER, 8),
        (reg::QUEUE_DEVICE, 8),
    ];
    for (register, bytes) in zero {
        assert_eq!(driver.read(register, bytes), 0, "{register:#x}");
    }
    assert_eq!(driver.read(reg::CONFIG_VECTOR, 2), NO_VECTOR);
    assert_eq!(driver.read(reg::QUEUE_VECTOR, 2), NO_VECTOR);
    assert_eq!(driver.read(reg::QUEUE_SIZE, 2), 256);
    assert_eq!(driver.0.driver_state().features(), 0);
    // What PCI has is not the driver's.
    assert_eq!(driver.config(4, 2), 6);
    // And the next one begins anew.
    driver.agree(0b1);
    driver.enable(0);
    driver.go();
    assert_eq!(driver.calls(), [Call::Negotiate(1 | feature::VERSION_1), Call::Ready, Call::Start(0)]);
}

#[test]
fn machine_when_reset_restores_configuration_space_and_the_table() {
    let mut driver = running(0);
    let window = driver.capability(9, Some(5));
    let mut pristine = [0; 256];
    Driver::new().0.read(Region::Config, 0, &mut pristine);
    for (at, value) in [(4, 6), (0x10, 0xfeb0_0000), (0x14, 0xfeb1_0000), (0x3c, 11), (window + 8, 0x14)] {
        driver.set_config(at, value, 4);
    }
    driver.0.write(Region::Bar(1), 8, &[0xff; 8]);
    driver.0.reset();
    assert_eq!(driver.calls(), [Call::Stop(0), Call::Reset(ResetBy::Machine)]);
    let mut now = [1; 256];
    driver.0.read(Region::Config, 0, &mut now);
    assert_eq!(now, pristine);
    assert_eq!(driver.read_in(Region::Bar(1), 8, 8), 0);
    driver.0.disconnected();
    assert_eq!(driver.calls(), [Call::Reset(ResetBy::Machine)]);
}

#[test]
fn function_when_reset_by_its_advanced_features_resets_the_device() {
    let mut driver = running(0);
    let advanced = driver.capability(0x13, None);
    assert_eq!(driver.config(advanced + 2, 2), 0x0306);
    driver.set_config(advanced + 4, 0, 1);
    driver.set_config(advanced + 4, 2, 1);
    driver.set_config(advanced + 5, 1, 1);
    driver.set_config(advanced + 3, 1, 1);
    assert_eq!(driver.calls(), []);
    driver.set_config(advanced + 4, 1, 1);
    assert_eq!(driver.calls(), [Call::Stop(0), Call::Reset(ResetBy::Driver)]);
    assert_eq!(driver.status(), 0);
    // Done at once: it does not read back, and nothing is pending.
    assert_eq!(driver.config(advanced + 4, 2), 0);
    // Also as a part of a wider write.
    driver.set_config(advanced, 1 << 32, 8);
    assert_eq!(driver.calls(), [Call::Reset(ResetBy::Driver)]);
}
