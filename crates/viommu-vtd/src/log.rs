//! Events for `tracing`, if that is wanted. What a guest can cause is said a few times a second at most.

#[cfg(feature = "tracing")]
mod limited {
    use std::sync::{Mutex, PoisonError};
    use std::time::Instant;

    use viommu::rate::Bucket;

    /// Whether a guest-caused event may be said now; one limit for all units of the process.
    pub(super) fn may_say() -> bool {
        static LIMIT: Mutex<Option<Bucket>> = Mutex::new(None);
        let mut limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
        limit.get_or_insert_with(|| Bucket::new(10, 20)).take(Instant::now())
    }
}

/// A device behind the unit was blocked.
pub(crate) fn fault(fault: &viommu::Fault, reason: u8) {
    #[cfg(feature = "tracing")]
    if tracing::enabled!(tracing::Level::DEBUG) && limited::may_say() {
        tracing::debug!(%fault, reason, "a device faulted");
    }
    #[cfg(not(feature = "tracing"))]
    let _ = (fault, reason);
}

/// The driver did what no driver does.
pub(crate) fn odd(what: &str, value: u64) {
    #[cfg(feature = "tracing")]
    if tracing::enabled!(tracing::Level::DEBUG) && limited::may_say() {
        tracing::debug!(value = format_args!("{value:#x}"), "{what}");
    }
    #[cfg(not(feature = "tracing"))]
    let _ = (what, value);
}

/// Something went wrong that is the host's, or that the embedder should look at.
pub(crate) fn trouble(what: &str, why: &dyn core::fmt::Display) {
    #[cfg(feature = "tracing")]
    if limited::may_say() {
        tracing::warn!(%why, "{what}");
    }
    #[cfg(not(feature = "tracing"))]
    let _ = (what, why);
}
