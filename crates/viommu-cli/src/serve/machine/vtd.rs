//! The VT-d unit as a PCI function: its register page is BAR 0, which the guest's DMAR table names.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use viommu::WaitError;
use viommu_vfio_user::memory::Window;
use viommu_vfio_user::pci::{ConfigSpace, Identity};
use viommu_vfio_user::{Function, Interrupts, Link, Region, Windows};
use viommu_virtio::viot::Bdf;
use viommu_vtd::spec::register::QUEUE_TAIL;
use viommu_vtd::{Msi, Vtd};

use super::place::Place;
use super::unit::{self, Unit};
use crate::serve::hush::Hush;
use crate::serve::times::Times;

/// A class of which Linux lets the BAR be where firmware has put it (an interrupt controller): its IOMMU driver has
/// claimed the page before its PCI code looks.
const CLASS: u32 = 0x08_00_00;
/// Red Hat's, and a device of theirs that there is not: no driver takes it. (Linux's virtio-pci takes all of 1af4.)
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x00f0;
/// Bytes of BAR 0.
const REGISTERS: u32 = 4096;
const COMMAND: u8 = 0x04;
const BAR: u8 = 0x10;
/// Interrupts that wait to be sent, at most: the driver looks at registers for what they are about.
const MOST: usize = 64;

/// The unit's function. What the driver asks for is done on its server's thread: the driver waits for it anyway.
pub(crate) struct VtdFunction {
    vtd: Vtd,
    address: Bdf,
    unit: Unit,
    windows: Windows,
    interrupts: Interrupts,
    config: ConfigSpace,
    pristine: ConfigSpace,
    link: Option<Link>,
    due: Arc<Due>,
    place: Arc<Place>,
    times: Arc<Times>,
    hush: Hush,
}

/// What the server's thread is to do.
struct Due {
    event: OwnedFd,
    interrupts: Mutex<Vec<Msi>>,
}

impl VtdFunction {
    pub(crate) fn new(
        vtd: Vtd,
        address: Bdf,
        unit: Unit,
        windows: Windows,
        place: Arc<Place>,
        times: Arc<Times>,
    ) -> std::io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let due = Arc::new(Due { event, interrupts: Mutex::default() });
        let sends = due.clone();
        vtd.on_interrupt(move |msi| {
            let mut waiting = sends.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() < MOST {
                waiting.push(msi);
            }
            raise(&sends.event);
        });
        let fills = due.clone();
        vtd.notify_subscribers(move || raise(&fills.event));
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE,
            class: CLASS,
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: 0x1100,
        };
        // No driver of the function's own switches bus mastering on, and interrupts need it.
        let mut config = ConfigSpace::new(identity, false).always_bus_master();
        config.add_memory_bar(0, REGISTERS);
        Ok(Self {
            vtd,
            address,
            unit,
            windows,
            interrupts: Interrupts::new(0),
            pristine: config.clone(),
            config,
            link: None,
            due,
            place,
            times,
            hush: Hush::default(),
        })
    }

    /// Does what the driver has asked for: devices hold it up for a batch each.
    fn run(&self) {
        loop {
            match self.vtd.wait(Duration::from_secs(1)) {
                Ok(()) => break,
                Err(WaitError::TimedOut(blockers)) => {
                    tracing::warn!("an invalidation is held up: {blockers:?}");
                }
                // A device could not be fenced. Nobody knows when that ends: it is looked at again then.
                Err(WaitError::FenceFailed) => {
                    let waker = Waker::from(self.due.clone());
                    if self.vtd.poll(&mut Context::from_waker(&waker)).is_pending() {
                        break;
                    }
                }
                Err(error) => {
                    tracing::error!("the VT-d unit: {error}");
                    break;
                }
            }
        }
        self.send();
    }

    fn send(&self) {
        let waiting =
            core::mem::take(&mut *self.due.interrupts.lock().unwrap_or_else(PoisonError::into_inner));
        for msi in waiting {
            let sent = self.link.as_ref().map(|link| link.dma_write(msi.address, &msi.data.to_le_bytes()));
            if let Some(Err(error)) = sent
                && self.hush.allows()
            {
                tracing::warn!("an interrupt of the VT-d unit is lost: {error}");
            }
        }
    }

    /// Firmware, or the guest, has written to the configuration.
    fn look_for_place(&self) {
        let decodes = self.config.value(COMMAND, 2) & 2 != 0;
        let at = self.config.value(BAR, 4) & !0xf;
        if decodes && at != 0 && at != u64::from(!(REGISTERS - 1)) {
            self.place.placed(at);
        }
    }
}

fn raise(event: &OwnedFd) {
    // One that is full wakes too.
    let _full = rustix::io::write(event, &1_u64.to_ne_bytes());
}

impl Wake for Due {
    fn wake(self: Arc<Self>) {
        raise(&self.event);
    }
}

impl Function for VtdFunction {
    fn bars(&self) -> [u64; 6] {
        [u64::from(REGISTERS), 0, 0, 0, 0, 0]
    }

    fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    fn windows(&self) -> &Windows {
        &self.windows
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        match region {
            Region::Bar(0) => self.vtd.read(offset, data),
            Region::Bar(_) => data.fill(0),
            Region::Config => self.config.read(offset, data),
        }
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        match region {
            Region::Bar(0) => {
                let start = Instant::now();
                self.vtd.write(offset, data);
                self.run();
                if offset == QUEUE_TAIL {
                    self.times.add(start.elapsed());
                }
            }
            Region::Bar(_) => {}
            Region::Config => {
                self.config.write(offset, data);
                self.look_for_place();
            }
        }
    }

    fn reset(&mut self) {
        self.config = self.pristine.clone();
        self.place.left();
        let reset = self.vtd.reset();
        if !reset.inside.is_empty() {
            tracing::debug!("reset while devices were at work: {:?}", reset.inside);
        }
        unit::wait(reset.completion, "a reset of the VT-d unit");
    }

    fn connected(&mut self, link: &Link) {
        self.link = Some(link.clone());
    }

    fn disconnected(&mut self) {
        self.reset();
    }

    fn mapped(&mut self, window: Window) {
        self.unit.add(self.address, window);
    }

    fn unmapped(&mut self, window: Window) {
        self.unit.remove(self.address, window);
    }

    fn events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.due.event.as_fd()]
    }

    fn event(&mut self, _index: usize) {
        let _empty = rustix::io::read(&self.due.event, &mut [0_u8; 8]);
        self.run();
    }
}
