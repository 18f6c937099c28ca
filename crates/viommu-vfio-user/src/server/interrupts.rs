//! A function's interrupts: what the client gave to raise them with.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::spec::{IrqAction, IrqFlags, irq};

/// A function's pin and MSI-X vectors. A handle for any thread: clones are the same interrupts.
#[derive(Clone, Debug)]
pub struct Interrupts(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    pin: Pin,
    /// Whether the client has turned MSI-X on.
    msix: bool,
    vectors: Vec<Option<OwnedFd>>,
}

#[derive(Debug, Default)]
struct Pin {
    event: Option<OwnedFd>,
    /// What the function drives it to.
    raised: bool,
    masked: bool,
}

impl Pin {
    fn signal(&mut self) {
        if self.raised
            && !self.masked
            && let Some(event) = &self.event
        {
            // It masks itself, and the client unmasks it when the guest has served it.
            self.masked = true;
            raise(event);
        }
    }
}

/// An eventfd of the client's that cannot count any further is one that it has not looked at for 2^64 interrupts.
fn raise(event: &OwnedFd) {
    let _full = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// Takes a descriptor that the client says is an eventfd.
pub(crate) fn event_of(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
    if link.is_ok_and(|link| link.as_os_str() != "anon_inode:[eventfd]") {
        return Err(Errno::INVAL);
    }
    // Else a client could make us wait.
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

impl Interrupts {
    /// A function with `vectors` MSI-X vectors, and a pin.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        let vectors = (0..vectors).map(|_| None).collect();
        Self(Arc::new(Mutex::new(State { pin: Pin::default(), msix: false, vectors })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each field is whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the client has turned MSI-X on; the pin is not to be used then.
    #[must_use]
    pub fn msix_enabled(&self) -> bool {
        self.lock().msix
    }

    /// Raises an MSI-X vector. One that is not set up is not raised.
    pub fn raise(&self, vector: u16) {
        if let Some(Some(event)) = self.lock().vectors.get(usize::from(vector)) {
            raise(event);
        }
    }

    /// Drives the pin. While it is up, it is raised again each time it is unmasked.
    pub fn set_pin(&self, up: bool) {
        let pin = &mut self.lock().pin;
        let rises = up && !pin.raised;
        pin.raised = up;
        if rises {
            pin.signal();
        }
    }

    /// What the client gave is forgotten.
    pub(crate) fn clear(&self) {
        let state = &mut *self.lock();
        state.pin = Pin { raised: state.pin.raised, ..Pin::default() };
        state.msix = false;
        state.vectors.fill_with(|| None);
    }

    /// What DEVICE_GET_IRQ_INFO says of a kind: flags and number. None for kinds that do not exist.
    pub(crate) fn info(&self, index: u32) -> Option<(IrqFlags, u32)> {
        match index {
            irq::INTX => Some((IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED, 1)),
            irq::MSIX => {
                Some((IrqFlags::EVENTFD, u32::try_from(self.lock().vectors.len()).unwrap_or(u32::MAX)))
            }
            other => (other < irq::COUNT).then_some((IrqFlags::empty(), 0)),
        }
    }

    /// DEVICE_SET_IRQS.
    ///
    /// # Errors
    /// `EINVAL` for what makes no sense. Interrupts before the wrong one may have been set.
    pub(crate) fn set(
        &self,
        index: u32,
        action: IrqAction,
        start: u32,
        count: u32,
        data: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        let (_, there) = self.info(index).ok_or(Errno::INVAL)?;
        let within = start.checked_add(count).is_some_and(|end| end <= there);
        let (data_kind, what) = (action & DATA, action & ACTIONS);
        let one_of_each = data_kind.bits().count_ones() == 1 && what.bits().count_ones() == 1;
        if !within || !one_of_each || action != data_kind | what {
            return Err(Errno::INVAL);
        }
        let whole = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        let bytes = if data_kind == IrqAction::DATA_BOOL { whole } else { 0 };
        let most = if data_kind == IrqAction::DATA_EVENTFD { whole } else { 0 };
        if data.len() != bytes || fds.len() > most {
            return Err(Errno::INVAL);
        }
        let chosen =
            |nth: usize| data_kind == IrqAction::DATA_NONE || data.get(nth).is_some_and(|on| *on != 0);
        let first = usize::try_from(start).map_err(|_| Errno::INVAL)?;
        let state = &mut *self.lock();
        match (index, what) {
            (irq::INTX, IrqAction::TRIGGER) if data_kind == IrqAction::DATA_EVENTFD => {
                state.pin.event = fds.into_iter().next().map(event_of).transpose()?;
                state.pin.masked = false;
                state.pin.signal();
            }
            (irq::INTX, IrqAction::TRIGGER) if count == 0 => {
                state.pin.event = None;
                state.pin.masked = false;
            }
            (irq::INTX, IrqAction::TRIGGER) if chosen(0) => {
                state.pin.event.iter().for_each(raise);
            }
            (irq::INTX, IrqAction::MASK) if data_kind != IrqAction::DATA_EVENTFD => {
                state.pin.masked |= count > 0 && chosen(0);
            }
            (irq::INTX, IrqAction::UNMASK) if data_kind != IrqAction::DATA_EVENTFD => {
                if count > 0 && chosen(0) {
                    state.pin.masked = false;
                    state.pin.signal();
                }
            }
            (irq::MSIX, IrqAction::TRIGGER) if data_kind == IrqAction::DATA_EVENTFD => {
                // A vector without a descriptor is taken away.
                let mut fds = fds.into_iter();
                for vector in state.vectors.iter_mut().skip(first).take(whole) {
                    *vector = fds.next().map(event_of).transpose()?;
                }
                state.msix = true;
            }
            (irq::MSIX, IrqAction::TRIGGER) if count == 0 => {
                state.msix = false;
                state.vectors.fill_with(|| None);
            }
            (irq::MSIX, IrqAction::TRIGGER) => {
                let vectors = state.vectors.iter().skip(first).take(whole).enumerate();
                vectors
                    .filter(|(nth, _)| chosen(*nth))
                    .filter_map(|(_, event)| event.as_ref())
                    .for_each(raise);
            }
            // A kind that has none may be turned off.
            (_, IrqAction::TRIGGER) if count == 0 => {}
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }
}

const DATA: IrqAction = IrqAction::DATA_NONE.union(IrqAction::DATA_BOOL).union(IrqAction::DATA_EVENTFD);
const ACTIONS: IrqAction = IrqAction::MASK.union(IrqAction::UNMASK).union(IrqAction::TRIGGER);
