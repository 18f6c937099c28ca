//! Events for `tracing`, if that is wanted. What a guest can cause is said a few times a second at most.

use core::fmt::Display;
use core::time::Duration;

use viommu::{Access, Fault, Iova, Mapping};

use crate::spec::{IotlbMsg, Message};

#[cfg(feature = "tracing")]
mod limited {
    use std::sync::{Mutex, PoisonError};
    use std::time::Instant;

    use viommu::rate::Bucket;

    /// Whether one more event may be said now; one limit for all devices of the process.
    pub(super) fn may_say() -> bool {
        static LIMIT: Mutex<Option<Bucket>> = Mutex::new(None);
        let mut limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
        limit.get_or_insert_with(|| Bucket::new(10, 20)).take(Instant::now())
    }
}

/// Says it, if anybody listens and not too often.
macro_rules! say {
    ($level:ident, $($event:tt)*) => {
        #[cfg(feature = "tracing")]
        if tracing::enabled!(tracing::Level::$level) && limited::may_say() {
            tracing::event!(tracing::Level::$level, $($event)*);
        }
    };
}

/// A miss that the record has nothing for.
pub(crate) fn denied(fault: &Fault) {
    say!(DEBUG, %fault, "a device has missed what is not mapped: its ring waits");
    let _ = fault;
}

/// A miss that this process has no memory for.
pub(crate) fn no_memory(entry: &Mapping) {
    say!(DEBUG, iova = %entry.range, gpa = %entry.gpa, "a device has missed what is no memory: its ring waits");
    let _ = entry;
}

/// The device did what its entry forbids.
pub(crate) fn access_fail(iova: Iova, access: Access) {
    say!(DEBUG, %iova, ?access, "a device was denied an access");
    let _ = (iova, access);
}

/// The device says what no device says.
pub(crate) fn odd(message: &Message) {
    say!(DEBUG, version = message.version, kind = message.iotlb.kind, "a message of a device makes no sense");
    let _ = message;
}

/// The device does not take a message.
pub(crate) fn refused(message: &IotlbMsg, why: &dyn Display) {
    say!(WARN, iova = format_args!("{:#x}", message.iova), kind = message.kind, %why, "a device refuses a message");
    let _ = (message, why);
}

/// The device has not read a removal.
pub(crate) fn too_late(limit: Duration) {
    say!(WARN, ?limit, "a device has not taken an invalidation in time");
    let _ = limit;
}
