//! Notifiers as QEMU keeps them: a linked list, an index and a range check each, a copy of the event, a call through a
//! pointer.

use std::cell::Cell;
use std::hint::black_box;

#[derive(Clone, Copy)]
struct Event {
    kind: u32,
    iova: u64,
    gpa: u64,
    mask: u64,
    access: u32,
}

struct Notifier {
    call: fn(&Notifier, &mut Event),
    flags: u32,
    start: u64,
    end: u64,
    index: u32,
    seen: Cell<u64>,
    next: Option<Box<Notifier>>,
}

pub(crate) struct List(Option<Box<Notifier>>);

fn xor(notifier: &Notifier, event: &mut Event) {
    notifier.seen.set(notifier.seen.get().wrapping_add(event.iova ^ event.gpa ^ u64::from(event.access)));
}

fn add(notifier: &Notifier, event: &mut Event) {
    notifier.seen.set(notifier.seen.get().wrapping_add(event.iova.wrapping_add(event.gpa)));
}

#[inline(never)]
fn notify_one(notifier: &Notifier, event: &Event) {
    let mut copy = *event;
    if notifier.start > event.iova + event.mask || notifier.end < event.iova {
        return;
    }
    if event.kind & notifier.flags != 0 {
        (notifier.call)(notifier, &mut copy);
    }
}

impl List {
    pub(crate) fn new(count: usize) -> Self {
        let mut head = None;
        for at in 0..count {
            head = Some(Box::new(Notifier {
                call: black_box(if at % 2 == 0 { xor } else { add }),
                flags: black_box(3),
                start: 0,
                end: black_box(u64::MAX),
                index: black_box(0),
                seen: Cell::new(0),
                next: head,
            }));
        }
        Self(head)
    }

    #[inline(never)]
    pub(crate) fn fire(&self, iova: u64, gpa: u64) {
        let event = Event { kind: 1, iova, gpa, mask: 0xfff, access: 3 };
        let mut at = self.0.as_deref();
        while let Some(notifier) = at {
            if notifier.index == 0 {
                notify_one(notifier, &event);
            }
            at = notifier.next.as_deref();
        }
    }
}
