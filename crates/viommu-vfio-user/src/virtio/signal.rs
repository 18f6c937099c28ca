//! From a device to its driver: interrupts, and "reset me".

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::status;
use crate::server::Interrupts;

/// No vector: the driver wants no interrupt (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// Bits of the ISR status: a queue, the configuration (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What the transport shares with a device's threads.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) interrupts: Interrupts,
    pub(super) status: AtomicU8,
    pub(super) generation: AtomicU8,
    pub(super) config_vector: AtomicU16,
    /// What was negotiated.
    pub(super) features: AtomicU64,
    /// Held while the pin follows it: else one who reads it takes the pin down that another has just raised.
    isr: Mutex<u8>,
}

impl Shared {
    pub(super) fn new(interrupts: Interrupts) -> Self {
        Self {
            interrupts,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            features: AtomicU64::new(0),
            isr: Mutex::new(0),
        }
    }

    fn isr(&self) -> MutexGuard<'_, u8> {
        // Nothing panics under this lock.
        self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reading the ISR status takes it back, and the pin down.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.isr();
        self.interrupts.set_pin(false);
        core::mem::take(&mut *isr)
    }

    fn interrupt(&self, vector: u16, isr: u8) {
        if self.interrupts.msix_enabled() {
            if vector != NO_VECTOR {
                self.interrupts.raise(vector);
            }
            return;
        }
        let mut bits = self.isr();
        *bits |= isr;
        self.interrupts.set_pin(true);
    }

    fn config_interrupt(&self) {
        self.interrupt(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }
}

/// How a device tells its driver of itself.
#[derive(Clone, Debug)]
pub struct DeviceSignal(pub(super) Arc<Shared>);

impl DeviceSignal {
    /// The configuration has changed by itself. A driver that does not run yet, or no more, is not told (2.1.2).
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        if self.0.status.load(Ordering::SeqCst) & status::DRIVER_OK != 0 {
            self.0.config_interrupt();
        }
    }

    /// The device cannot go on until it is reset (2.1.2).
    pub fn needs_reset(&self) {
        let before = self.0.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::DRIVER_OK != 0 && before & status::NEEDS_RESET == 0 {
            self.0.config_interrupt();
        }
    }
}

/// What a driver has made of a device, to be read from any thread.
#[derive(Clone, Debug)]
pub struct DriverState(pub(super) Arc<Shared>);

impl DriverState {
    /// `device_status`; see [`status`].
    #[must_use]
    pub fn status(&self) -> u8 {
        self.0.status.load(Ordering::SeqCst)
    }

    /// The features that were negotiated; none until then.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.0.features.load(Ordering::SeqCst)
    }
}

/// How a queue's driver is told that something has been used.
#[derive(Clone, Debug)]
pub struct QueueSignal {
    pub(super) shared: Arc<Shared>,
    pub(super) vector: Arc<AtomicU16>,
}

impl QueueSignal {
    /// Interrupts the driver.
    pub fn interrupt(&self) {
        self.shared.interrupt(self.vector.load(Ordering::SeqCst), ISR_QUEUE);
    }

    /// The ring is broken: the device cannot go on until it is reset.
    pub fn needs_reset(&self) {
        DeviceSignal(self.shared.clone()).needs_reset();
    }
}
