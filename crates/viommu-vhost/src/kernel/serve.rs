//! The worker's part: what the device asks, and what waits for it.

use std::io;
use std::time::Instant;

use rustix::io::Errno;
use viommu::{FillError, Iova, Subscription};

use super::Handle;
use super::protocol::access_of;
use super::state::Phase;
use crate::log;
use crate::spec::{Message, kind};

/// Messages that one call reads.
const MESSAGES: usize = 64;

/// What is left to be done after [`Handle::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[must_use]
pub struct Turn {
    /// The device may have more to say: call again, without waiting.
    pub more: bool,
    /// Messages wait for the device: call again when the descriptor can be written.
    pub waits: bool,
    /// And at this time at the latest: then a removal that waits has been too long.
    pub deadline: Option<Instant>,
}

/// Why a device cannot be served any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// It has been cut off, or its subscription has left and is over.
    #[error("the device has been cut off")]
    Fenced,
    /// It could not be told of a removal, and will be cut off by whoever waits for that, or by the next removal.
    #[error("the device could not be told of a removal")]
    Failed,
    /// Reading failed.
    #[error("reading from the device: {0}")]
    Read(#[source] io::Error),
    /// Called inside a subscriber's callback, or with a subscription that is not this cache's.
    #[error(transparent)]
    Fill(FillError),
}

impl Handle {
    /// Does what there is to do at the device, without waiting: writes what had to wait, reads what the device asks, and
    /// answers it through the subscription of this handle's cache. To be called when the descriptor can be read, when
    /// [`Turn`] says so, and when [`Device::on_wait`](super::Device::on_wait) asks for it. One thread at a time.
    ///
    /// While something waits, nothing is read. While the device is stopped, what it asks is thrown away.
    ///
    /// # Errors
    /// See [`ServeError`]. After [`ServeError::Fenced`] and [`ServeError::Failed`] there is nothing more to do until
    /// [`Handle::start`].
    pub fn serve(&self, subscription: &Subscription) -> Result<Turn, ServeError> {
        let _ = self.flush();
        let mut more = true;
        for _ in 0..MESSAGES {
            let (phase, line, waits) = {
                let state = self.0.state();
                (state.phase, state.line.clone(), state.waits())
            };
            let line = line.ok_or(ServeError::Fenced)?;
            match phase {
                Phase::Fenced => return Err(ServeError::Fenced),
                Phase::Failed => return Err(ServeError::Failed),
                Phase::Running if waits => break,
                Phase::Running | Phase::Stopped => {}
            }
            match line.read() {
                // A kernel without an IOTLB has nothing to say either.
                Err(Errno::AGAIN | Errno::BADFD) => {
                    more = false;
                    break;
                }
                Err(errno) => return Err(ServeError::Read(errno.into())),
                Ok(_) if phase == Phase::Stopped => {}
                Ok(message) => self.hear(&message, subscription)?,
            }
            // Where a worker does all the writing, it is done here.
            self.0.flush();
        }
        let state = self.0.state();
        let waits = state.waits();
        Ok(Turn { more: more && !waits, waits, deadline: state.deadline() })
    }

    /// Does a part of that: writes what had to wait. For when the subscription has left, and what it has left to say is
    /// awaited.
    pub fn flush(&self) -> Turn {
        self.0.flush();
        self.expire(Instant::now());
        let state = self.0.state();
        Turn { more: false, waits: state.waits(), deadline: state.deadline() }
    }

    fn hear(&self, message: &Message, subscription: &Subscription) -> Result<(), ServeError> {
        let iova = Iova(message.iotlb.iova);
        let (suits, access) = {
            let state = self.0.state();
            (state.protocol.suits(message), access_of(message))
        };
        match (message.iotlb.kind, access) {
            (kind::MISS, Some(access)) if suits => {
                self.0.state().counts.misses += 1;
                match subscription.fill(iova, access) {
                    Ok(_) => {}
                    Err(FillError::Fault(fault)) => {
                        let sink = {
                            let mut state = self.0.state();
                            state.counts.denied += 1;
                            state.faults.clone()
                        };
                        log::denied(&fault);
                        if let Some(sink) = sink {
                            sink.fault(&fault);
                        }
                    }
                    Err(error) => return Err(ServeError::Fill(error)),
                }
            }
            (kind::ACCESS_FAIL, Some(access)) if suits => {
                self.0.state().counts.access_fails += 1;
                log::access_fail(iova, access);
            }
            _ => {
                self.0.state().counts.odd += 1;
                log::odd(message);
            }
        }
        Ok(())
    }
}
