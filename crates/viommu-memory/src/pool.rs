//! Readers for guards that nobody can lend one to.

use core::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::{OwnedGuard, Reader, Translator};

/// The readers of one shared handle: as many as guards were ever held at a time, and one to clone.
#[derive(Clone)]
pub(crate) struct Pool(Arc<Mutex<Readers>>);

struct Readers {
    /// Never inside: the others are made from it, without any lock of the unit.
    origin: Reader,
    idle: Vec<Reader>,
}

impl Pool {
    pub(crate) fn new(origin: Reader) -> Self {
        Self(Arc::new(Mutex::new(Readers { origin, idle: Vec::new() })))
    }

    fn readers(&self) -> MutexGuard<'_, Readers> {
        // Whatever panicked under it, the list is whole: a push and a pop are all there is.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(&self) -> Entered {
        let reader = {
            let mut readers = self.readers();
            readers.idle.pop().unwrap_or_else(|| readers.origin.clone())
        };
        Entered { guard: Some(reader.into_guard()), pool: self.clone() }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pool").field(&self.readers().origin).finish()
    }
}

/// A guard whose reader goes back to its pool.
pub(crate) struct Entered {
    /// Empty only while it is dropped.
    guard: Option<OwnedGuard>,
    pool: Pool,
}

impl Entered {
    pub(crate) fn translator(&self) -> &Translator {
        match &self.guard {
            Some(guard) => guard,
            None => unreachable!("the guard is taken out by drop only"),
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            // Outside first: leaving may wake others.
            let reader = guard.leave();
            self.pool.readers().idle.push(reader);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu::{EndpointConfig, Iommu};

    #[test]
    fn readers_are_as_many_as_guards_were_held_at_a_time() {
        let iommu = Iommu::builder().build().unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        let pool = Pool::new(endpoint.reader("pool").unwrap());
        assert!(pool.readers().idle.is_empty());
        for _ in 0..3 {
            let guards = (pool.enter(), pool.clone().enter());
            assert!(pool.readers().idle.is_empty());
            drop(guards);
            assert_eq!(pool.readers().idle.len(), 2);
        }
        drop(pool.enter());
        assert_eq!(pool.readers().idle.len(), 2);
    }
}
