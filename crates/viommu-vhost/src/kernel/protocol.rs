//! Which messages a device takes, and how they are written.

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;
use viommu::{Access, IovaRange};

use super::sys;
use crate::spec::{self, IotlbMsg, Message, backend, kind, perm};

/// How to speak to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    version: u32,
    batch: bool,
    has_asid: bool,
    asid: u32,
}

/// A device that cannot be put behind an IOMMU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// It does not have its addresses translated, or the driver did not take the feature.
    #[error("the device has no VIRTIO_F_ACCESS_PLATFORM")]
    NoAccessPlatform,
    /// An address space was chosen, and messages have none.
    #[error("the device has not taken VHOST_BACKEND_F_IOTLB_ASID")]
    NoAsid,
    /// A call failed.
    #[error("{call}: {error}")]
    Failed {
        /// Which.
        call: &'static str,
        /// With what.
        error: io::Error,
    },
}

impl Protocol {
    /// Bits of the back-end's features that are used here where a device offers them.
    pub const WANTED: u64 = backend::IOTLB_MSG_V2 | backend::IOTLB_BATCH | backend::IOTLB_ASID;

    /// From the features of the device and of the back-end that are in force (what was given to VHOST_SET_FEATURES and
    /// VHOST_SET_BACKEND_FEATURES), for an embedder that negotiates by itself. `backend` is 0 where that call was never made.
    ///
    /// # Errors
    /// [`ProtocolError::NoAccessPlatform`].
    pub fn of(features: u64, backend: u64) -> Result<Self, ProtocolError> {
        if features & spec::VIRTIO_F_ACCESS_PLATFORM == 0 {
            return Err(ProtocolError::NoAccessPlatform);
        }
        let v2 = backend & backend::IOTLB_MSG_V2 != 0;
        Ok(Self {
            version: if v2 { spec::VERSION_2 } else { spec::VERSION_1 },
            batch: backend & backend::IOTLB_BATCH != 0,
            has_asid: v2 && backend & backend::IOTLB_ASID != 0,
            asid: 0,
        })
    }

    /// Asks the device what it can do, and takes of [`Protocol::WANTED`] what it offers: VHOST_GET_FEATURES,
    /// VHOST_GET_BACKEND_FEATURES, VHOST_SET_BACKEND_FEATURES. To be called after VHOST_SET_OWNER and before
    /// VHOST_SET_FEATURES, to which the embedder gives [`VIRTIO_F_ACCESS_PLATFORM`](spec::VIRTIO_F_ACCESS_PLATFORM) with
    /// what its driver took, before any ring's addresses.
    ///
    /// # Errors
    /// [`ProtocolError::NoAccessPlatform`], [`ProtocolError::Failed`].
    pub fn negotiate(fd: impl AsFd) -> Result<Self, ProtocolError> {
        let failed = |call| move |error: Errno| ProtocolError::Failed { call, error: error.into() };
        let fd = fd.as_fd();
        let features = sys::features(fd).map_err(failed("VHOST_GET_FEATURES"))?;
        // Before any change, so that a device that cannot be used is left as it is.
        Self::of(features, 0)?;
        let offered = match sys::backend_features(fd) {
            Ok(offered) => offered,
            Err(Errno::NOTTY) => 0, // before Linux 4.20
            Err(error) => return Err(failed("VHOST_GET_BACKEND_FEATURES")(error)),
        };
        let taken = offered & Self::WANTED;
        if taken != 0 {
            sys::set_backend_features(fd, taken).map_err(failed("VHOST_SET_BACKEND_FEATURES"))?;
        }
        Self::of(features, taken)
    }

    /// With the device's address space of this number instead of 0.
    ///
    /// # Errors
    /// [`ProtocolError::NoAsid`].
    pub fn asid(self, asid: u32) -> Result<Self, ProtocolError> {
        if !self.has_asid {
            return Err(ProtocolError::NoAsid);
        }
        Ok(Self { asid, ..self })
    }

    /// Whether messages are of the second version.
    #[must_use]
    pub fn is_v2(&self) -> bool {
        self.version == spec::VERSION_2
    }

    /// Whether messages that belong together are put between BATCH_BEGIN and BATCH_END.
    #[must_use]
    pub fn batches(&self) -> bool {
        self.batch
    }

    fn message(&self, iotlb: IotlbMsg) -> Message {
        Message { version: self.version, asid: self.asid, iotlb, ..Message::default() }
    }

    /// Whether a message of the device is of this version and address space.
    pub(crate) fn suits(&self, message: &Message) -> bool {
        message.version == self.version && (!self.has_asid || message.asid == self.asid)
    }
}

/// The access that a message names; `None` for none or for more than there is.
pub(crate) fn access_of(message: &Message) -> Option<Access> {
    match message.iotlb.perm {
        perm::READ => Some(Access::READ),
        perm::WRITE => Some(Access::WRITE),
        perm::READ_WRITE => Some(Access::RW),
        _ => None,
    }
}

/// Messages that are written one after the other: five at most, which is two ranges to drop and an entry, in a batch; or the
/// two halves of everything.
#[derive(Clone, Debug)]
pub(crate) struct Parcel {
    list: [Message; 5],
    len: u8,
    /// The next one to be written.
    next: u8,
}

impl Parcel {
    pub(crate) fn new() -> Self {
        Self { list: [Message::default(); 5], len: 0, next: 0 }
    }

    fn push(&mut self, message: Message) {
        if let Some(place) = self.list.get_mut(usize::from(self.len)) {
            *place = message;
            self.len += 1;
        }
        debug_assert!(usize::from(self.len) <= self.list.len());
    }

    /// INVALIDATE of `range`: in two halves where its size cannot be said.
    pub(crate) fn drop_range(&mut self, protocol: &Protocol, range: IovaRange) {
        let start = range.start().0;
        let mut push = |iova: u64, size: u64| {
            self.push(protocol.message(IotlbMsg {
                iova,
                size,
                kind: kind::INVALIDATE,
                ..IotlbMsg::default()
            }));
        };
        match u64::try_from(range.bytes()) {
            Ok(size) => push(start, size),
            Err(_) => {
                push(0, 1 << 63);
                push(1 << 63, 1 << 63);
            }
        }
    }

    /// UPDATE: `range` lies at `host`.
    pub(crate) fn enter(&mut self, protocol: &Protocol, range: IovaRange, host: u64, access: Access) {
        // No memory is as large as everything.
        let Ok(size) = u64::try_from(range.bytes()) else { return };
        let perm = match (access.contains(Access::READ), access.contains(Access::WRITE)) {
            (true, true) => perm::READ_WRITE,
            (true, false) => perm::READ,
            (false, true) => perm::WRITE,
            (false, false) => return,
        };
        let iova = range.start().0;
        let entry = IotlbMsg { iova, size, uaddr: host, perm, kind: kind::UPDATE, ..IotlbMsg::default() };
        self.push(protocol.message(entry));
    }

    /// In a batch, where the device knows that and there is more than one message.
    pub(crate) fn closed(self, protocol: &Protocol) -> Self {
        if !protocol.batch || self.len < 2 {
            return self;
        }
        let mut batch = Self::new();
        let mark = |kind| protocol.message(IotlbMsg { kind, ..IotlbMsg::default() });
        batch.push(mark(kind::BATCH_BEGIN));
        self.rest().iter().for_each(|message| batch.push(*message));
        batch.push(mark(kind::BATCH_END));
        batch
    }

    /// What is left to be written.
    pub(crate) fn rest(&self) -> &[Message] {
        self.list.get(usize::from(self.next)..usize::from(self.len)).unwrap_or(&[])
    }

    /// One more has been written.
    pub(crate) fn pass(&mut self) {
        self.next = self.next.saturating_add(1).min(self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu::Iova;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn features_say_how_to_speak() {
        let platform = spec::VIRTIO_F_ACCESS_PLATFORM;
        assert!(matches!(Protocol::of(!platform, 0), Err(ProtocolError::NoAccessPlatform)));
        let old = Protocol::of(platform, 0).unwrap();
        assert!(!old.is_v2() && !old.batches());
        assert!(matches!(old.asid(3), Err(ProtocolError::NoAsid)));
        // The address space is of the second version.
        assert!(Protocol::of(platform, backend::IOTLB_ASID).unwrap().asid(3).is_err());
        let new = Protocol::of(platform, Protocol::WANTED).unwrap().asid(3).unwrap();
        assert!(new.is_v2() && new.batches());
        let message = new.message(IotlbMsg::default());
        assert_eq!((message.version, message.asid), (2, 3));
        assert!(new.suits(&message) && !new.suits(&Message { asid: 4, ..message }) && !old.suits(&message));
    }

    #[test]
    fn everything_is_dropped_in_two_halves_and_a_batch() {
        let protocol = Protocol::of(!0, backend::IOTLB_MSG_V2).unwrap();
        let mut parcel = Parcel::new();
        parcel.drop_range(&protocol, IovaRange::ALL);
        let said: Vec<_> = parcel.rest().iter().map(|m| (m.iotlb.iova, m.iotlb.size, m.iotlb.kind)).collect();
        assert_eq!(said, [(0, 1 << 63, 3), (1 << 63, 1 << 63, 3)]);
        let batching = Protocol::of(!0, Protocol::WANTED).unwrap();
        let kinds: Vec<_> = parcel.closed(&batching).rest().iter().map(|m| m.iotlb.kind).collect();
        assert_eq!(kinds, [5, 3, 3, 6]);
    }

    #[test]
    fn entry_has_bytes_and_permission() {
        let protocol = Protocol::of(!0, backend::IOTLB_MSG_V2).unwrap();
        for (access, perm) in [(Access::READ, 1), (Access::WRITE, 2), (Access::RW, 3)] {
            let mut parcel = Parcel::new();
            parcel.enter(&protocol, range(u64::MAX - 0xfff, u64::MAX), 0x7000, access);
            let mut parcel = parcel.closed(&protocol);
            let IotlbMsg { iova, size, uaddr, perm: said, kind, .. } = parcel.rest()[0].iotlb;
            assert_eq!((iova, size, uaddr, said, kind), (u64::MAX - 0xfff, 0x1000, 0x7000, perm, 2));
            assert_eq!(access_of(&parcel.rest()[0]), Some(access));
            parcel.pass();
            assert!(parcel.rest().is_empty());
        }
    }
}
