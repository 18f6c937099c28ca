//! How often a guest may cause a line in the log.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use viommu::rate::Bucket;

/// Lines that may come at once, and the one more in each second.
const BURST: u32 = 8;

/// A limit that several threads share.
#[derive(Debug)]
pub(crate) struct Hush(Mutex<Bucket>);

impl Default for Hush {
    fn default() -> Self {
        Self(Mutex::new(Bucket::new(1, BURST)))
    }
}

impl Hush {
    /// Whether a line may be written now.
    pub(crate) fn allows(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now())
    }
}
