//! The virtio-iommu as a device behind the virtio-pci transport.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use viommu_vfio_user::Windows;
use viommu_vfio_user::memory::Window;
use viommu_vfio_user::virtio::{Device, DeviceSignal, QueueSignal, ResetBy, feature};
use viommu_virtio::spec::Features;
use viommu_virtio::viot::Bdf;
use viommu_virtio::{EventQueue, PendingError, RequestQueue, VirtioIommu};
use virtio_queue::Queue;

use super::unit::{self, Unit};
use crate::serve::hush::Hush;

const DEVICE_TYPE: u16 = 23;
/// PCI's class of an IOMMU.
const CLASS: u32 = 0x08_06_00;
const REQUESTS: u16 = 0;
const EVENTS: u16 = 1;
/// Times that a driver that goes on kicking is served before the socket is looked at again.
const ROUNDS: usize = 16;
/// What is watched: faults to report, and requests left over. A client may ring either as the queue's doorbell.
const FAULTS: usize = 0;
const AGAIN: usize = 1;

/// The IOMMU's function. Requests are executed on its server's thread: the driver waits for each batch anyway.
pub(crate) struct IommuDevice {
    device: VirtioIommu,
    address: Bdf,
    unit: Unit,
    windows: Windows,
    requests: Option<(RequestQueue<Windows>, QueueSignal)>,
    events: Option<(EventQueue<Windows>, QueueSignal)>,
    faults: Arc<OwnedFd>,
    again: Arc<OwnedFd>,
    hush: Hush,
}

impl IommuDevice {
    pub(crate) fn new(
        device: VirtioIommu,
        address: Bdf,
        unit: Unit,
        windows: Windows,
    ) -> std::io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let faults = Arc::new(eventfd(0, flags)?);
        let again = Arc::new(eventfd(0, flags)?);
        let raised = faults.clone();
        device.notify_faults(move || raise(&raised));
        Ok(Self {
            device,
            address,
            unit,
            windows,
            requests: None,
            events: None,
            faults,
            again,
            hush: Hush::default(),
        })
    }

    fn serve_requests(&mut self) {
        let Some((requests, signal)) = &mut self.requests else { return };
        for _ in 0..ROUNDS {
            match requests.process() {
                Ok(more) => {
                    if !answered(requests, signal, &self.again) {
                        return;
                    }
                    if !more {
                        return;
                    }
                }
                Err(error) => {
                    if self.hush.allows() {
                        tracing::warn!("the request queue: {error}");
                    }
                    return signal.needs_reset();
                }
            }
        }
        raise(&self.again);
    }

    fn serve_events(&mut self) {
        let Some((events, signal)) = &mut self.events else { return };
        if let Err(error) = events.process() {
            if self.hush.allows() {
                tracing::warn!("the event queue: {error}");
            }
            signal.needs_reset();
        }
    }
}

/// Waits until all requests are given back: devices hold them up for a batch each. Gives whether there can be more: not
/// where a device could not be fenced. Nobody knows when that ends, so `again` is raised then.
fn answered(requests: &mut RequestQueue<Windows>, signal: &QueueSignal, again: &Arc<OwnedFd>) -> bool {
    while requests.pending() > 0 {
        match requests.wait(Duration::from_secs(1)) {
            Ok(()) => {}
            Err(PendingError::Wait(viommu::WaitError::TimedOut(blockers))) => {
                tracing::warn!("an UNMAP is held up: {blockers:?}");
            }
            Err(PendingError::Wait(viommu::WaitError::FenceFailed)) => {
                let waker = Waker::from(Arc::new(Raise(again.clone())));
                match requests.poll(&mut Context::from_waker(&waker)) {
                    Poll::Pending => return false,
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => {
                        tracing::error!("the request queue: {error}");
                        signal.needs_reset();
                        return false;
                    }
                }
            }
            Err(error) => {
                tracing::error!("the request queue: {error}");
                signal.needs_reset();
                return false;
            }
        }
    }
    true
}

/// Has the server's thread look again.
struct Raise(Arc<OwnedFd>);

impl Wake for Raise {
    fn wake(self: Arc<Self>) {
        raise(&self.0);
    }
}

fn raise(event: &OwnedFd) {
    // One that is full wakes too.
    let _full = rustix::io::write(event, &1_u64.to_ne_bytes());
}

fn lower(event: &OwnedFd) {
    let _empty = rustix::io::read(event, &mut [0_u8; 8]);
}

impl Device for IommuDevice {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![1024, 256]
    }

    fn features(&self) -> u64 {
        self.device.features().bits() | feature::INDIRECT_DESC | feature::EVENT_IDX
    }

    fn negotiate(&mut self, features: u64) -> bool {
        let done = self.device.negotiate(Features::from_bits_truncate(features));
        unit::wait(done, "the driver's bypass");
        true
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        unit::wait(self.device.write_config(offset, data), "a switch of bypass");
    }

    fn ready(&mut self, signal: DeviceSignal) {
        // Its configuration changes by its driver alone.
        drop(signal);
    }

    fn start(&mut self, index: u16, queue: Queue, signal: QueueSignal) {
        let interrupt = signal.clone();
        let interrupt = move || interrupt.interrupt();
        match index {
            REQUESTS => {
                let queue = self.device.request_queue(queue, self.windows.clone(), interrupt);
                self.requests = Some((queue, signal));
                self.serve_requests();
            }
            EVENTS => {
                let queue = self.device.event_queue(queue, self.windows.clone(), interrupt);
                self.events = Some((queue, signal));
                self.serve_events();
            }
            _ => {}
        }
    }

    fn stop(&mut self, index: u16) {
        match index {
            REQUESTS => {
                if let Some((mut requests, _)) = self.requests.take() {
                    unit::wait(requests.reset(), "a reset of the request queue");
                }
            }
            EVENTS => self.events = None,
            _ => {}
        }
    }

    fn notify(&mut self, index: u16) {
        match index {
            REQUESTS => self.serve_requests(),
            EVENTS => self.serve_events(),
            _ => {}
        }
    }

    fn reset(&mut self, by: ResetBy) {
        let reset = match by {
            ResetBy::Driver => self.device.reset(),
            ResetBy::Machine => self.device.system_reset(),
        };
        if !reset.inside.is_empty() {
            tracing::debug!("reset while devices were at work: {:?}", reset.inside);
        }
        unit::wait(reset.completion, "a reset of the IOMMU");
    }

    fn doorbell(&self, index: u16) -> Option<Arc<OwnedFd>> {
        match index {
            REQUESTS => Some(self.again.clone()),
            EVENTS => Some(self.faults.clone()),
            _ => None,
        }
    }

    fn mapped(&mut self, window: Window) {
        self.unit.add(self.address, window);
    }

    fn unmapped(&mut self, window: Window) {
        self.unit.remove(self.address, window);
    }

    fn events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.faults.as_fd(), self.again.as_fd()]
    }

    fn event(&mut self, index: usize) {
        match index {
            FAULTS => {
                lower(&self.faults);
                self.serve_events();
            }
            AGAIN => {
                lower(&self.again);
                self.serve_requests();
            }
            _ => {}
        }
    }
}
