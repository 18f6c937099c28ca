//! An answer that is given when nothing uses any more what was taken away.

use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, ready};
use core::time::Duration;

use viommu::{Blocker, Completion, WaitError};

use crate::spec::Code;

/// What a hypercall returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// For r3.
    pub code: Code,
    /// For r4: the entry that H_GET_TCE asked for, else 0.
    pub value: u64,
}

/// An answer to the guest that is kept back until the step is complete: what it says has happened, but a device may
/// still be using what was there before. The virtual CPU that made the call is not resumed before.
///
/// Who drops one that is pending has answered too early ([`Iommu::dropped`](viommu::Iommu::dropped)).
#[derive(Debug)]
#[must_use = "the guest is answered when this has resolved"]
pub struct Pending<T> {
    answer: T,
    completion: Completion,
}

impl<T> Pending<T> {
    pub(crate) fn new(answer: T, completion: Completion) -> Self {
        Self { answer, completion }
    }

    /// What keeps the answer back now.
    #[must_use]
    pub fn blockers(&self) -> Vec<Blocker> {
        self.completion.blockers()
    }

    /// Blocks until the guest may be answered: for the thread of the virtual CPU.
    ///
    /// # Errors
    /// [`WaitError::HoldingGuard`] and [`WaitError::InCallback`] at once; [`WaitError::FenceFailed`]: the virtual
    /// machine must be stopped, and this call not be answered.
    pub fn wait(self) -> Result<T, WaitError> {
        self.completion.wait()?;
        Ok(self.answer)
    }
}

impl<T: Copy> Pending<T> {
    /// The answer, if the guest may have it. Never blocks.
    pub fn poll(&mut self) -> Option<T> {
        self.completion.is_complete().then_some(self.answer)
    }

    /// Blocks until the guest may be answered, or for `limit`; it can be waited on again.
    ///
    /// # Errors
    /// As [`Pending::wait`], and [`WaitError::TimedOut`] with what it still waits for.
    pub fn wait_timeout(&mut self, limit: Duration) -> Result<T, WaitError> {
        self.completion.wait_timeout(limit)?;
        Ok(self.answer)
    }
}

impl<T: Copy + Unpin> Future for Pending<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        ready!(Pin::new(&mut self.completion).poll(context));
        Poll::Ready(self.answer)
    }
}
