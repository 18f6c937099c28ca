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

/// Takes a descriptor that the client says is an eventfd. Where there is no /proc it is believed.
pub(crate) fn event_of(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
    if link.is_ok_and(|link| link.as_os_str() != "anon_inode:[eventfd]") {
        return Err(Errno::INVAL);
    }
    // Else a full one would make us wait. The client can take this back, and holds up its own function then.
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
    /// `EINVAL` for what makes no sense. Nothing has changed then.
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
        let events: Vec<_> = fds.into_iter().map(event_of).collect::<Result<_, _>>()?;
        // Of no interrupt, and of nothing: the kind is turned off.
        let off = count == 0 && data_kind == IrqAction::DATA_NONE;
        let state = &mut *self.lock();
        match (index, what) {
            (irq::INTX, IrqAction::TRIGGER) if data_kind == IrqAction::DATA_EVENTFD => {
                state.pin.event = events.into_iter().next();
                state.pin.masked = false;
                state.pin.signal();
            }
            (irq::INTX, IrqAction::TRIGGER) if off => {
                state.pin.event = None;
                state.pin.masked = false;
            }
            (irq::INTX, IrqAction::TRIGGER) => {
                state.pin.event.iter().filter(|_| count > 0 && chosen(0)).for_each(raise);
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
                let mut events = events.into_iter();
                for vector in state.vectors.iter_mut().skip(first).take(whole) {
                    *vector = events.next();
                }
                state.msix = true;
            }
            (irq::MSIX, IrqAction::TRIGGER) if off => {
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
            (_, IrqAction::TRIGGER) if off => {}
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }
}

const DATA: IrqAction = IrqAction::DATA_NONE.union(IrqAction::DATA_BOOL).union(IrqAction::DATA_EVENTFD);
const ACTIONS: IrqAction = IrqAction::MASK.union(IrqAction::UNMASK).union(IrqAction::TRIGGER);

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    const NONE: IrqAction = IrqAction::DATA_NONE;
    const BOOL: IrqAction = IrqAction::DATA_BOOL;
    const EVENTFD: IrqAction = IrqAction::DATA_EVENTFD;
    const MASK: IrqAction = IrqAction::MASK;
    const UNMASK: IrqAction = IrqAction::UNMASK;
    const TRIGGER: IrqAction = IrqAction::TRIGGER;

    /// Blocking, as a client may make it.
    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    /// How often it was raised since the last time.
    fn count(event: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(event, &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(errno) => {
                assert_eq!(errno, Errno::AGAIN, "not made non-blocking");
                0
            }
        }
    }

    fn twin(event: &OwnedFd) -> Vec<OwnedFd> {
        vec![event.try_clone().unwrap()]
    }

    fn with_pin() -> (Interrupts, OwnedFd) {
        let (interrupts, event) = (Interrupts::new(4), event());
        interrupts.set(irq::INTX, EVENTFD | TRIGGER, 0, 1, &[], twin(&event)).unwrap();
        (interrupts, event)
    }

    fn with_vectors(vectors: u16) -> (Interrupts, Vec<OwnedFd>) {
        let interrupts = Interrupts::new(vectors);
        let events: Vec<_> = (0..vectors).map(|_| event()).collect();
        let fds = events.iter().flat_map(twin).collect();
        interrupts.set(irq::MSIX, EVENTFD | TRIGGER, 0, vectors.into(), &[], fds).unwrap();
        (interrupts, events)
    }

    #[test]
    fn pin_when_raised_masks_itself_until_it_is_unmasked() {
        let (interrupts, event) = with_pin();
        interrupts.set_pin(true);
        assert_eq!(count(&event), 1);
        interrupts.set_pin(true);
        interrupts.set_pin(false);
        interrupts.set_pin(true);
        assert_eq!(count(&event), 0);
        // It is up: unmasking raises it again, each time.
        for _ in 0..2 {
            interrupts.set(irq::INTX, NONE | UNMASK, 0, 1, &[], vec![]).unwrap();
            assert_eq!(count(&event), 1);
        }
        interrupts.set_pin(false);
        interrupts.set(irq::INTX, BOOL | UNMASK, 0, 1, &[1], vec![]).unwrap();
        assert_eq!(count(&event), 0);
        interrupts.set_pin(true);
        assert_eq!(count(&event), 1);
    }

    #[test]
    fn pin_when_masked_is_raised_when_it_is_unmasked() {
        let (interrupts, event) = with_pin();
        interrupts.set(irq::INTX, NONE | MASK, 0, 1, &[], vec![]).unwrap();
        interrupts.set_pin(true);
        assert_eq!(count(&event), 0);
        // Of none, or of those that are not meant: nothing happens.
        interrupts.set(irq::INTX, BOOL | UNMASK, 0, 1, &[0], vec![]).unwrap();
        interrupts.set(irq::INTX, NONE | UNMASK, 0, 0, &[], vec![]).unwrap();
        assert_eq!(count(&event), 0);
        interrupts.set(irq::INTX, BOOL | UNMASK, 0, 1, &[1], vec![]).unwrap();
        assert_eq!(count(&event), 1);
    }

    #[test]
    fn pin_when_it_is_up_before_its_eventfd_comes_is_raised_then() {
        let (interrupts, event) = (Interrupts::new(0), event());
        interrupts.set_pin(true);
        interrupts.set(irq::INTX, EVENTFD | TRIGGER, 0, 1, &[], twin(&event)).unwrap();
        assert_eq!(count(&event), 1);
    }

    #[test]
    fn pin_when_its_eventfd_is_taken_away_is_not_raised() {
        for how in [EVENTFD | TRIGGER, NONE | TRIGGER] {
            let (interrupts, event) = with_pin();
            let count_of = u32::from(how.contains(EVENTFD));
            interrupts.set(irq::INTX, how, 0, count_of, &[], vec![]).unwrap();
            interrupts.set_pin(true);
            assert_eq!(count(&event), 0, "{how:?}");
        }
        let (interrupts, event) = with_pin();
        interrupts.clear();
        interrupts.set_pin(true);
        assert_eq!(count(&event), 0);
    }

    #[test]
    fn interrupts_when_the_client_triggers_them_are_raised() {
        let (interrupts, event) = with_pin();
        interrupts.set(irq::INTX, NONE | TRIGGER, 0, 1, &[], vec![]).unwrap();
        assert_eq!(count(&event), 1);
        interrupts.set(irq::INTX, BOOL | TRIGGER, 0, 1, &[0], vec![]).unwrap();
        interrupts.set(irq::INTX, BOOL | TRIGGER, 0, 0, &[], vec![]).unwrap();
        assert_eq!(count(&event), 0);
        interrupts.set(irq::INTX, BOOL | TRIGGER, 0, 1, &[1], vec![]).unwrap();
        assert_eq!(count(&event), 1);

        let (interrupts, events) = with_vectors(4);
        interrupts.set(irq::MSIX, BOOL | TRIGGER, 1, 3, &[1, 0, 7], vec![]).unwrap();
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [0, 1, 0, 1]);
        interrupts.set(irq::MSIX, NONE | TRIGGER, 2, 2, &[], vec![]).unwrap();
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [0, 0, 1, 1]);
        // Of none is none, and turns nothing off.
        interrupts.set(irq::MSIX, BOOL | TRIGGER, 0, 0, &[], vec![]).unwrap();
        assert!(interrupts.msix_enabled());
    }

    #[test]
    fn vectors_when_set_are_raised_until_they_are_taken_away() {
        let (interrupts, events) = with_vectors(4);
        assert!(interrupts.msix_enabled());
        (0..4).for_each(|vector| interrupts.raise(vector));
        interrupts.raise(4);
        interrupts.raise(0xffff);
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [1; 4]);
        // A range of four, of which the client gives two: the others are taken away.
        let fds = events[..2].iter().rev().flat_map(twin).collect();
        interrupts.set(irq::MSIX, EVENTFD | TRIGGER, 0, 4, &[], fds).unwrap();
        (0..4).for_each(|vector| interrupts.raise(vector));
        interrupts.raise(0);
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [1, 2, 0, 0]);
        interrupts.set(irq::MSIX, EVENTFD | TRIGGER, 1, 1, &[], vec![]).unwrap();
        interrupts.raise(1);
        assert_eq!(count(&events[0]), 0);
        // Another range changes those within it alone.
        interrupts.set(irq::MSIX, EVENTFD | TRIGGER, 3, 1, &[], twin(&events[3])).unwrap();
        (0..4).for_each(|vector| interrupts.raise(vector));
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [0, 1, 0, 1]);

        interrupts.set(irq::MSIX, NONE | TRIGGER, 0, 0, &[], vec![]).unwrap();
        assert!(!interrupts.msix_enabled());
        (0..4).for_each(|vector| interrupts.raise(vector));
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [0; 4]);
    }

    #[test]
    fn interrupts_when_forgotten_close_the_clients_descriptors() {
        let (interrupts, _events) = with_vectors(2);
        interrupts.clear();
        assert!(!interrupts.msix_enabled());
        let state = interrupts.lock();
        assert!(state.vectors.iter().all(Option::is_none) && state.pin.event.is_none());
    }

    #[test]
    fn ranges_and_combinations_that_make_no_sense_are_refused() {
        let (interrupts, events) = with_vectors(4);
        let cases = [
            (irq::COUNT, NONE | TRIGGER, 0, 0, 0, 0),
            (u32::MAX, NONE | TRIGGER, 0, 0, 0, 0),
            // Behind the last one, and behind the last number.
            (irq::MSIX, EVENTFD | TRIGGER, 4, 1, 0, 1),
            (irq::MSIX, EVENTFD | TRIGGER, 0, 5, 0, 1),
            (irq::MSIX, NONE | TRIGGER, 5, 0, 0, 0),
            (irq::MSIX, NONE | TRIGGER, u32::MAX, 2, 0, 0),
            (irq::INTX, NONE | TRIGGER, 0, 2, 0, 0),
            (irq::INTX, NONE | TRIGGER, 1, 1, 0, 0),
            // There are none of these.
            (irq::MSI, EVENTFD | TRIGGER, 0, 1, 0, 1),
            (irq::MSI, NONE | MASK, 0, 0, 0, 0),
            // Not one of each kind.
            (irq::INTX, TRIGGER, 0, 1, 0, 0),
            (irq::INTX, NONE, 0, 1, 0, 0),
            (irq::INTX, NONE | BOOL | TRIGGER, 0, 1, 1, 0),
            (irq::INTX, NONE | MASK | UNMASK, 0, 1, 0, 0),
            (irq::INTX, NONE | TRIGGER | IrqAction::from_bits_retain(1 << 6), 0, 1, 0, 0),
            (irq::INTX, IrqAction::empty(), 0, 0, 0, 0),
            // Masking by eventfds, and masking of what cannot be masked.
            (irq::INTX, EVENTFD | MASK, 0, 1, 0, 1),
            (irq::INTX, EVENTFD | UNMASK, 0, 1, 0, 1),
            (irq::MSIX, NONE | MASK, 0, 1, 0, 0),
            (irq::MSIX, NONE | UNMASK, 0, 1, 0, 0),
            // Too much or too little to go with it.
            (irq::INTX, BOOL | TRIGGER, 0, 1, 0, 0),
            (irq::INTX, BOOL | TRIGGER, 0, 1, 2, 0),
            (irq::INTX, NONE | TRIGGER, 0, 1, 1, 0),
            (irq::INTX, EVENTFD | TRIGGER, 0, 1, 4, 1),
            (irq::INTX, EVENTFD | TRIGGER, 0, 1, 0, 2),
            (irq::MSIX, EVENTFD | TRIGGER, 0, 2, 0, 3),
            (irq::MSIX, NONE | TRIGGER, 0, 2, 0, 1),
        ];
        for (index, action, start, count, data, fds) in cases {
            let fds = (0..fds).map(|_| event()).collect();
            let result = interrupts.set(index, action, start, count, &[1; 4][..data], fds);
            assert_eq!(result, Err(Errno::INVAL), "{index} {action:?} {start} {count} {data}");
        }
        (0..4).for_each(|vector| interrupts.raise(vector));
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [1; 4]);
        // A kind that has none may be turned off.
        interrupts.set(irq::MSI, NONE | TRIGGER, 0, 0, &[], vec![]).unwrap();
    }

    #[test]
    fn descriptors_when_not_eventfds_are_refused_and_nothing_has_changed() {
        let (interrupts, events) = with_vectors(2);
        let (read, write) = rustix::pipe::pipe().unwrap();
        let memory = rustix::fs::memfd_create("eventfd", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        for wrong in [read, write, memory] {
            let pin = vec![wrong.try_clone().unwrap()];
            assert_eq!(interrupts.set(irq::INTX, EVENTFD | TRIGGER, 0, 1, &[], pin), Err(Errno::INVAL));
            let fds = vec![event(), wrong];
            assert_eq!(interrupts.set(irq::MSIX, EVENTFD | TRIGGER, 0, 2, &[], fds), Err(Errno::INVAL));
        }
        (0..2).for_each(|vector| interrupts.raise(vector));
        assert_eq!(events.iter().map(count).collect::<Vec<_>>(), [1; 2]);
    }

    #[test]
    fn eventfd_when_it_can_count_no_further_does_not_hold_us_up() {
        let (interrupts, events) = with_vectors(1);
        rustix::io::write(&events[0], &(u64::MAX - 1).to_ne_bytes()).unwrap();
        interrupts.raise(0);
        assert_eq!(count(&events[0]), u64::MAX - 1);
    }

    #[test]
    fn kinds_when_asked_for_have_what_the_function_has() {
        let interrupts = Interrupts::new(3);
        let intx = IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED;
        assert_eq!(interrupts.info(irq::INTX), Some((intx, 1)));
        assert_eq!(interrupts.info(irq::MSIX), Some((IrqFlags::EVENTFD, 3)));
        assert_eq!(interrupts.info(irq::MSI), Some((IrqFlags::empty(), 0)));
        assert_eq!(interrupts.info(irq::COUNT), None);
    }
}
