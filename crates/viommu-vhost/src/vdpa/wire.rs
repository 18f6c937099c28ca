//! The one line to a device that all mirrors of its address spaces share, and its batches.

use rustix::io::Errno;
use viommu::subscribe::FenceFailed;

use crate::spec::{IotlbMsg, Message, VERSION_2, kind};

/// What is asked of a device: the kernel's answers, or those of a stand-in.
pub(crate) trait Kernel: Send {
    /// Writes a message. One that fails has changed nothing.
    fn write(&mut self, message: &Message) -> Result<(), Errno>;

    /// Resets the device; its status afterwards, which is 0.
    fn reset(&mut self) -> Result<u8, Errno>;
}

/// What an embedder does to cut its device off: see [`Device::fence`](crate::vdpa::Device::fence).
pub(super) type Action = Box<dyn FnMut() -> Result<(), FenceFailed> + Send>;

/// A device, until it is cut off.
pub(super) struct Wire {
    kernel: Option<Box<dyn Kernel>>,
    /// Whether it takes batches.
    batches: bool,
    /// The address space whose batch is open: a device has one at a time.
    open: Option<u32>,
    /// Address spaces whose batch could not be ended, which they have not heard of yet.
    failed: Vec<u32>,
    pub(super) action: Option<Action>,
}

impl Wire {
    pub(super) fn new(kernel: Box<dyn Kernel>, batches: bool) -> Self {
        Self { kernel: Some(kernel), batches, open: None, failed: Vec::new(), action: None }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.kernel.is_none()
    }

    /// Sends a message of an address space, as one of its batch where it is amid a step.
    pub(super) fn send(&mut self, asid: u32, in_step: bool, iotlb: IotlbMsg) -> Result<(), Errno> {
        // The kernel refuses messages of others amid a batch: that one goes on in another batch, then.
        if let Some(other) = self.open.filter(|other| *other != asid) {
            self.end(other);
        }
        if in_step && self.batches && self.open.is_none() {
            self.write(asid, IotlbMsg { kind: kind::BATCH_BEGIN, ..IotlbMsg::default() })?;
            self.open = Some(asid);
        }
        self.write(asid, iotlb)
    }

    /// Ends the batch of an address space, if one is open. Whether all of its batches took effect since it was last asked.
    pub(super) fn commit(&mut self, asid: u32) -> bool {
        if self.open == Some(asid) {
            self.end(asid);
        }
        let before = self.failed.len();
        self.failed.retain(|failed| *failed != asid);
        self.failed.len() == before
    }

    fn end(&mut self, asid: u32) {
        self.open = None;
        if self.write(asid, IotlbMsg { kind: kind::BATCH_END, ..IotlbMsg::default() }).is_err() {
            self.failed.push(asid);
        }
    }

    fn write(&mut self, asid: u32, iotlb: IotlbMsg) -> Result<(), Errno> {
        let kernel = self.kernel.as_mut().ok_or(Errno::BADF)?;
        kernel.write(&Message { version: VERSION_2, asid, iotlb, padding: [0; 32] })
    }

    /// Returns when the device does no DMA any more. Once it has, it does nothing.
    pub(super) fn fence(&mut self) -> Result<(), FenceFailed> {
        let Some(kernel) = self.kernel.as_mut() else { return Ok(()) };
        match self.action.as_mut() {
            // Only the embedder knows what else there is; what it says holds.
            Some(action) => action()?,
            None => match kernel.reset() {
                Ok(0) => {}
                Ok(status) => return Err(FenceFailed(format!("after a reset the status is {status:#x}"))),
                Err(errno) => return Err(FenceFailed(format!("VHOST_VDPA_SET_STATUS: {errno}"))),
            },
        }
        self.kernel = None;
        self.open = None;
        Ok(())
    }
}
