//! A device that does nothing, for measuring what all else costs. Not for use.

use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use viommu::Iova;

use super::line::Line;
use super::{Device, Protocol};
use crate::spec::{IotlbMsg, Message, VERSION_2, VIRTIO_F_ACCESS_PLATFORM, backend, kind, perm};

/// The address that the device asks for next.
#[derive(Clone, Debug, Default)]
pub struct Asks(Arc<Mutex<Option<Iova>>>);

impl Asks {
    /// It misses this address once.
    pub fn miss(&self, iova: Iova) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(iova);
    }
}

impl Line for Asks {
    fn read(&self) -> Result<Message, Errno> {
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Iova(iova) = asked.ok_or(Errno::AGAIN)?;
        let iotlb = IotlbMsg { iova, perm: perm::READ, kind: kind::MISS, ..IotlbMsg::default() };
        Ok(Message { version: VERSION_2, iotlb, ..Message::default() })
    }

    fn write(&self, _: &Message) -> Result<(), Errno> {
        Ok(())
    }
}

impl Device {
    /// Over nothing, and what it asks.
    ///
    /// # Errors
    /// None.
    #[doc(hidden)]
    pub fn of_nothing() -> Result<(Self, Asks), super::ProtocolError> {
        let asks = Asks::default();
        let protocol = Protocol::of(VIRTIO_F_ACCESS_PLATFORM, backend::IOTLB_MSG_V2)?;
        Ok((Self::over(Arc::new(asks.clone()), protocol), asks))
    }
}
