//! The protocol once more in a few lines, with each of its orderings taken out in turn: a model must see that.

use super::*;

/// Small enough to be broken on purpose: what the other models are worth.
struct Twin {
    state: AtomicU64,
    waiter: loom::future::AtomicWaker,
    flaw: Flaw,
}

#[derive(Clone, Copy, PartialEq)]
enum Flaw {
    None,
    NoFenceInEnter,
    NoFenceInScan,
    RelaxedLeave,
    LeaveByStore,
}

const INSIDE: u64 = 1;
const WAIT: u64 = 2;

impl Twin {
    fn enter(&self, stay: u64) {
        let old = self.state.swap(stay << 2 | INSIDE, Release);
        if self.flaw != Flaw::NoFenceInEnter {
            fence(SeqCst);
        }
        if old & WAIT != 0 {
            self.waiter.wake();
        }
    }

    fn leave(&self, stay: u64) {
        let word = stay << 2;
        let old = match self.flaw {
            Flaw::LeaveByStore => {
                let old = self.state.load(Acquire);
                self.state.store(word, Release);
                old
            }
            Flaw::RelaxedLeave => self.state.swap(word, Relaxed),
            _ => self.state.swap(word, AcqRel),
        };
        if old & WAIT != 0 {
            self.waiter.wake();
        }
    }

    fn scan(&self) -> u64 {
        if self.flaw != Flaw::NoFenceInScan {
            fence(SeqCst);
        }
        self.state.load(Acquire) & !WAIT
    }

    /// Waits for the stay in a word.
    fn wait(&self, word: u64) {
        if word & INSIDE == 0 {
            return;
        }
        block_on(poll_fn(|cx| {
            self.waiter.register_by_ref(cx.waker());
            let pending = match self.state.compare_exchange(word, word | WAIT, AcqRel, Acquire) {
                Ok(_) => true,
                Err(now) => now == word | WAIT,
            };
            if pending { Poll::Pending } else { Poll::Ready(()) }
        }));
    }
}

fn twin(flaw: Flaw) {
    check(3, move || {
        let page = Page::new();
        let waiter = loom::future::AtomicWaker::new();
        let twin = Arc::new(Twin { state: AtomicU64::new(0), waiter, flaw });
        let device = thread::spawn({
            let (page, twin) = (page.clone(), twin.clone());
            move || {
                for stay in 1..=2 {
                    twin.enter(stay);
                    page.translate_and_touch();
                    twin.leave(stay);
                }
            }
        });
        page.unmap();
        twin.wait(twin.scan());
        let sealed = page.seal();
        device.join().unwrap();
        page.check(sealed);
    });
}

#[test]
fn twin_without_a_flaw_passes() {
    twin(Flaw::None);
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn twin_without_the_fence_in_enter_is_caught() {
    twin(Flaw::NoFenceInEnter);
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn twin_without_the_fence_in_scan_is_caught() {
    twin(Flaw::NoFenceInScan);
}

#[test]
#[should_panic(expected = "an access behind the completion")]
fn twin_that_leaves_relaxed_is_caught() {
    twin(Flaw::RelaxedLeave);
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_that_leaves_by_a_store_is_caught() {
    twin(Flaw::LeaveByStore);
}
