//! Registers and capabilities of a virtio device as a PCI function.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::common::{QueueSetup, register};
use super::signal::{DeviceSignal, DriverState, NO_VECTOR, QueueSignal, Shared};
use super::{Device, ResetBy, feature, status};
use crate::function::{Doorbell, Function, Region};
use crate::memory::{Window, Windows};
use crate::pci::{ConfigSpace, Identity};
use crate::server::{Interrupts, Link};

const VIRTIO_VENDOR: u16 = 0x1af4;
/// Device ids of the modern transport start here (4.1.2).
const MODERN: u16 = 0x1040;
/// Kinds of the capabilities (4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
/// Where they are in BAR 0, each with a page of its own.
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const BAR0: u32 = 0x4000;
const PAGE: u64 = 0x1000;
/// Bytes from one queue's doorbell to the next.
const NOTIFY_STEP: u64 = 4;
/// BAR 1 has the MSI-X table and, in its second half, the pending bits.
const BAR1: u32 = 0x1000;
const PENDING: u32 = 0x800;
/// As many as the table holds.
const MOST_VECTORS: u16 = 128;
const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;
const ADVANCED_FEATURES: u8 = 0x13;
/// From the start of the capability of kind PCI_CFG to its window.
const WINDOW: u64 = 16;

/// A virtio device as a PCI function, for a [`Server`](crate::Server).
#[derive(Debug)]
pub struct VirtioFunction<D> {
    device: D,
    windows: Windows,
    shared: Arc<Shared>,
    config: ConfigSpace,
    /// As it is after a reset.
    pristine: ConfigSpace,
    /// Where two capabilities lie that do something when written.
    window: u8,
    advanced: u8,
    /// The client has the true table; this is what it may read back.
    table: Vec<u8>,
    offered: u64,
    driver: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
    queues: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    setup: QueueSetup,
    started: bool,
}

impl<D: Device> VirtioFunction<D> {
    /// Puts `device` behind the transport. `windows` is the memory that its client gives; the device has a clone of it.
    #[must_use]
    pub fn new(device: D, windows: Windows) -> Self {
        let sizes = device.queue_sizes();
        let queues: Vec<_> =
            sizes.iter().map(|max| Slot { setup: QueueSetup::new(*max), started: false }).collect();
        let vectors = u16::try_from(queues.len()).unwrap_or(u16::MAX).saturating_add(1).min(MOST_VECTORS);
        let identity = Identity {
            vendor: VIRTIO_VENDOR,
            device: MODERN.saturating_add(device.device_type()),
            class: device.class(),
            revision: 1,
            subsystem_vendor: VIRTIO_VENDOR,
            subsystem: 0x1100,
        };
        let mut config = ConfigSpace::new(identity, true);
        config.add_memory_bar(0, BAR0);
        config.add_memory_bar(1, BAR1);
        let (window, advanced) = add_capabilities(&mut config, vectors);
        let shared = Arc::new(Shared::new(Interrupts::new(vectors)));
        let offered = device.features() | feature::VERSION_1 | feature::RING_RESET;
        Self {
            device,
            windows,
            shared,
            pristine: config.clone(),
            config,
            window,
            advanced,
            table: vec![0; usize::try_from(BAR1).unwrap_or_default()],
            offered,
            driver: 0,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
            queues,
        }
    }

    /// The device behind it.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// What its driver has made of it, for whoever watches.
    #[must_use]
    pub fn driver_state(&self) -> DriverState {
        DriverState(self.shared.clone())
    }

    fn status(&self) -> u8 {
        self.shared.status.load(Ordering::SeqCst)
    }

    fn running(&self) -> bool {
        self.status() & status::DRIVER_OK != 0
    }

    fn reset_device(&mut self, by: ResetBy) {
        for index in 0..self.queues.len() {
            self.stop(index);
        }
        for slot in &mut self.queues {
            slot.setup.reset();
        }
        self.device.reset(by);
        self.driver = 0;
        self.shared.features.store(0, Ordering::SeqCst);
        (self.device_select, self.driver_select, self.queue_select) = (0, 0, 0);
        self.shared.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        let _isr = self.shared.take_isr();
        self.shared.status.store(0, Ordering::SeqCst);
    }

    fn stop(&mut self, index: usize) {
        let Some(slot) = self.queues.get_mut(index) else { return };
        if core::mem::take(&mut slot.started) {
            self.device.stop(u16::try_from(index).unwrap_or(u16::MAX));
        }
    }

    fn start(&mut self, index: usize) {
        let Some(slot) = self.queues.get_mut(index) else { return };
        if slot.started || !slot.setup.enabled {
            return;
        }
        let signal = QueueSignal { shared: self.shared.clone(), vector: slot.setup.vector.clone() };
        match slot.setup.ring(self.driver) {
            Ok(queue) => {
                slot.started = true;
                self.device.start(u16::try_from(index).unwrap_or(u16::MAX), queue, signal);
            }
            Err(_) => signal.needs_reset(),
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset_device(ResetBy::Driver);
        }
        let known = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;
        let mut now = self.status() | value & known;
        if value & status::FEATURES_OK != 0 && now & status::FEATURES_OK == 0 {
            let whole = self.driver & feature::VERSION_1 != 0 && self.driver & !self.offered == 0;
            if whole && self.device.negotiate(self.driver) {
                now |= status::FEATURES_OK;
                self.shared.features.store(self.driver, Ordering::SeqCst);
            }
        }
        let begins = value & status::DRIVER_OK != 0 && now & status::DRIVER_OK == 0;
        if begins && now & status::FEATURES_OK != 0 {
            now |= status::DRIVER_OK;
            self.shared.status.fetch_or(now, Ordering::SeqCst);
            self.device.ready(DeviceSignal(self.shared.clone()));
            (0..self.queues.len()).for_each(|index| self.start(index));
        }
        // A thread of the device's may say meanwhile that it needs a reset.
        self.shared.status.fetch_or(now, Ordering::SeqCst);
    }

    fn selected(&mut self) -> Option<&mut QueueSetup> {
        // What the driver has enabled is not to be changed any more (4.1.4.3.2).
        let slot = self.queues.get_mut(usize::from(self.queue_select))?;
        (!slot.setup.enabled).then_some(&mut slot.setup)
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        if (register::QUEUE_DESC..register::QUEUE_NOTIFY_DATA).contains(&offset) {
            return self.write_address(offset, data);
        }
        let index = usize::from(self.queue_select);
        match (offset, data) {
            (register::DEVICE_FEATURE_SELECT, &[a, b, c, d]) => {
                self.device_select = u32::from_le_bytes([a, b, c, d]);
            }
            (register::DRIVER_FEATURE_SELECT, &[a, b, c, d]) => {
                self.driver_select = u32::from_le_bytes([a, b, c, d]);
            }
            (register::DRIVER_FEATURE, &[a, b, c, d]) => {
                let half = u64::from(u32::from_le_bytes([a, b, c, d]));
                // Not after the features have been agreed on (3.1.1).
                match self.driver_select {
                    _ if self.status() & status::FEATURES_OK != 0 => {}
                    0 => self.driver = self.driver & !LOW | half,
                    1 => self.driver = self.driver & LOW | half << 32,
                    _ => {}
                }
            }
            (register::CONFIG_VECTOR, &[a, b]) => {
                let vector = self.vector(u16::from_le_bytes([a, b]));
                self.shared.config_vector.store(vector, Ordering::SeqCst);
            }
            (register::STATUS, &[value]) => self.write_status(value),
            (register::QUEUE_SELECT, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (register::QUEUE_SIZE, &[a, b]) => {
                if let Some(queue) = self.selected() {
                    queue.size = u16::from_le_bytes([a, b]);
                }
            }
            (register::QUEUE_VECTOR, &[a, b]) => {
                let vector = self.vector(u16::from_le_bytes([a, b]));
                if let Some(slot) = self.queues.get(index) {
                    slot.setup.vector.store(vector, Ordering::SeqCst);
                }
            }
            (register::QUEUE_ENABLE, &[1, 0]) => {
                if let Some(queue) = self.selected() {
                    queue.enabled = true;
                }
                if self.running() {
                    self.start(index);
                }
            }
            (register::QUEUE_RESET, &[1, 0]) if self.driver & feature::RING_RESET != 0 => {
                self.stop(index);
                if let Some(slot) = self.queues.get_mut(index) {
                    slot.setup.reset();
                }
            }
            _ => {}
        }
    }

    /// A part of one of the three addresses of a queue, in halves or as a whole.
    fn write_address(&mut self, offset: u64, data: &[u8]) {
        let Some(queue) = self.selected() else { return };
        let (field, at) = match offset {
            register::QUEUE_DRIVER.. if offset >= register::QUEUE_DEVICE => {
                (&mut queue.device, offset.saturating_sub(register::QUEUE_DEVICE))
            }
            register::QUEUE_DRIVER.. => (&mut queue.driver, offset.saturating_sub(register::QUEUE_DRIVER)),
            _ => (&mut queue.descriptors, offset.saturating_sub(register::QUEUE_DESC)),
        };
        let mut bytes = field.to_le_bytes();
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        for (to, from) in bytes.iter_mut().skip(at).zip(data) {
            *to = *from;
        }
        *field = u64::from_le_bytes(bytes);
    }

    /// A vector that does not exist cannot be set (4.1.5.1.2.1).
    fn vector(&self, asked: u16) -> u16 {
        let vectors = u16::try_from(self.queues.len()).unwrap_or(u16::MAX).saturating_add(1);
        if asked < vectors.min(MOST_VECTORS) { asked } else { NO_VECTOR }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut registers = [0; 0x3c];
        const { assert!(register::END == 0x3c) };
        let mut set = |at: u64, bytes: &[u8]| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            for (to, from) in registers.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        let half = |features: u64, select: u32| match select {
            0 => (features & LOW).to_le_bytes(),
            1 => (features >> 32).to_le_bytes(),
            _ => [0; 8],
        };
        let word = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
        set(register::DEVICE_FEATURE_SELECT, &self.device_select.to_le_bytes());
        // Eight bytes, of which the upper four are zero and written over by the next register.
        set(register::DEVICE_FEATURE, &half(self.offered, self.device_select));
        set(register::DRIVER_FEATURE_SELECT, &self.driver_select.to_le_bytes());
        set(register::DRIVER_FEATURE, &half(self.driver, self.driver_select));
        set(register::CONFIG_VECTOR, &self.shared.config_vector.load(Ordering::SeqCst).to_le_bytes());
        set(register::NUM_QUEUES, &word(self.queues.len()));
        set(register::STATUS, &[self.status()]);
        set(register::GENERATION, &[self.shared.generation.load(Ordering::SeqCst)]);
        set(register::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0.
        if let Some(Slot { setup: queue, .. }) = self.queues.get(usize::from(self.queue_select)) {
            set(register::QUEUE_SIZE, &queue.size.to_le_bytes());
            set(register::QUEUE_VECTOR, &queue.vector.load(Ordering::SeqCst).to_le_bytes());
            set(register::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            set(register::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            set(register::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            set(register::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            set(register::QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(registers.iter().skip(from)) {
            *to = *from;
        }
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (bar, offset) {
            (0, ISR..CONFIG) => {
                if let (ISR, Some(first)) = (offset, data.first_mut()) {
                    *first = self.shared.take_isr();
                }
            }
            (0, CONFIG..NOTIFY) => self.device.read_config(offset.saturating_sub(CONFIG), data),
            (0, COMMON..ISR) => self.read_common(offset, data),
            (1, _) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                for (to, from) in data.iter_mut().zip(self.table.iter().skip(from)) {
                    *to = *from;
                }
            }
            _ => {}
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        match (bar, offset) {
            (0, COMMON..ISR) => self.write_common(offset, data),
            (0, CONFIG..NOTIFY) => self.device.write_config(offset.saturating_sub(CONFIG), data),
            (0, NOTIFY..) => {
                let index = offset.saturating_sub(NOTIFY).checked_div(NOTIFY_STEP).unwrap_or_default();
                let slot = usize::try_from(index).ok().and_then(|index| self.queues.get(index));
                if slot.is_some_and(|slot| slot.started) {
                    self.device.notify(u16::try_from(index).unwrap_or(u16::MAX));
                }
            }
            (1, _) => {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                // Pending bits cannot be written.
                let table = self.table.iter_mut().take(usize::try_from(PENDING).unwrap_or_default());
                for (to, from) in table.skip(at).zip(data) {
                    *to = *from;
                }
            }
            _ => {}
        }
    }

    /// What the capability of kind PCI_CFG points at (4.1.4.9): BAR, offset, and 1, 2 or 4 bytes.
    fn pointed_at(&self) -> Option<(u8, u64, usize)> {
        let field = |at: u8, bytes: usize| self.config.value(self.window.saturating_add(at), bytes);
        let bar = u8::try_from(field(4, 1)).ok()?;
        let (offset, bytes) = (field(8, 4), field(12, 4));
        let size = *self.bars().get(usize::from(bar))?;
        let bytes = usize::try_from(bytes).ok().filter(|bytes| matches!(bytes, 1 | 2 | 4))?;
        let end = offset.checked_add(u64::try_from(bytes).ok()?)?;
        (end <= size).then_some((bar, offset, bytes))
    }

    /// Whether an access of configuration space meets `bytes` bytes at `at`.
    fn meets(offset: u64, count: usize, at: u64, bytes: u64) -> bool {
        let end = offset.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        offset < at.saturating_add(bytes) && at < end
    }
}

const LOW: u64 = 0xffff_ffff;

fn add_capabilities(config: &mut ConfigSpace, vectors: u16) -> (u8, u8) {
    let part = |kind: u8, offset: u64, length: u64, more: &[u8]| {
        let [offset, length] = [offset, length].map(|value| u32::try_from(value).unwrap_or(0).to_le_bytes());
        let whole = u8::try_from(more.len().saturating_add(16)).unwrap_or(u8::MAX);
        let mut body = vec![whole, kind, 0, 0, 0, 0];
        body.extend_from_slice(&offset);
        body.extend_from_slice(&length);
        body.extend_from_slice(more);
        body
    };
    let step = u32::try_from(NOTIFY_STEP).unwrap_or_default().to_le_bytes();
    let parts = [
        part(COMMON_CFG, COMMON, register::END, &[]),
        part(NOTIFY_CFG, NOTIFY, PAGE, &step),
        part(ISR_CFG, ISR, 1, &[]),
        part(DEVICE_CFG, CONFIG, PAGE, &[]),
    ];
    for body in parts {
        config.add_capability(VENDOR_SPECIFIC, &body, &[]);
    }
    // BAR, offset, length and the window itself can be written.
    let writable = [&[0, 0, 0xff, 0, 0, 0][..], &[0xff; 12]].concat();
    let window = config.add_capability(VENDOR_SPECIFIC, &part(PCI_CFG, 0, 0, &[0; 4]), &writable);
    let mut msix = vectors.saturating_sub(1).to_le_bytes().to_vec();
    msix.extend_from_slice(&1_u32.to_le_bytes());
    msix.extend_from_slice(&(PENDING | 1).to_le_bytes());
    config.add_capability(MSIX, &msix, &[0, 0xc0]);
    // Function-level reset, also for a function that is not PCI Express: transactions pending, and reset.
    let advanced = config.add_capability(ADVANCED_FEATURES, &[6, 0b11, 0, 0], &[]);
    (window.unwrap_or_default(), advanced.unwrap_or_default())
}

impl<D: Device> Function for VirtioFunction<D> {
    fn bars(&self) -> [u64; 6] {
        [u64::from(BAR0), u64::from(BAR1), 0, 0, 0, 0]
    }

    fn interrupts(&self) -> &Interrupts {
        &self.shared.interrupts
    }

    fn windows(&self) -> &Windows {
        &self.windows
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        match region {
            Region::Bar(bar) => self.read_bar(bar, offset, data),
            Region::Config => {
                let window = u64::from(self.window).saturating_add(WINDOW);
                if Self::meets(offset, data.len(), window, 4)
                    && let Some((bar, at, bytes)) = self.pointed_at()
                {
                    let mut value = [0; 4];
                    self.read_bar(bar, at, value.get_mut(..bytes).unwrap_or_default());
                    self.config.write(window, &value);
                }
                self.config.read(offset, data);
            }
        }
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        match region {
            Region::Bar(bar) => self.write_bar(bar, offset, data),
            Region::Config => {
                self.config.write(offset, data);
                let window = self.window.saturating_add(16);
                if Self::meets(offset, data.len(), u64::from(window), 4)
                    && let Some((bar, at, bytes)) = self.pointed_at()
                {
                    let value = self.config.value(window, 4).to_le_bytes();
                    self.write_bar(bar, at, value.get(..bytes).unwrap_or_default());
                }
                let control = u64::from(self.advanced).saturating_add(4);
                let reset = control.checked_sub(offset).and_then(|at| data.get(usize::try_from(at).ok()?));
                if reset.is_some_and(|bits| bits & 1 != 0) {
                    self.reset_device(ResetBy::Driver);
                }
            }
        }
    }

    fn reset(&mut self) {
        self.reset_device(ResetBy::Machine);
        self.config = self.pristine.clone();
        self.table.fill(0);
    }

    fn connected(&mut self, link: &Link) {
        self.device.connected(link);
    }

    fn disconnected(&mut self) {
        self.reset();
    }

    fn mapped(&mut self, window: Window) {
        self.device.mapped(window);
    }

    fn unmapped(&mut self, window: Window) {
        self.device.unmapped(window);
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let queues = (0_u16..).take(self.queues.len());
        let bell = |index: u16| {
            let event = self.device.doorbell(index)?;
            let offset = NOTIFY.saturating_add(u64::from(index).saturating_mul(NOTIFY_STEP));
            Some(Doorbell { bar: 0, offset, size: 2, value: None, event })
        };
        queues.filter_map(bell).collect()
    }

    fn events(&self) -> Vec<BorrowedFd<'_>> {
        self.device.events()
    }

    fn event(&mut self, index: usize) {
        self.device.event(index);
    }
}
