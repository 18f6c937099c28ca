//! A mirror that is watched: what it is asked, what it refuses and in which words, and how long it takes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use viommu::subscribe::{FenceFailed, Mirror, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Ack, IovaRange, Mapping};

use crate::judge::told::lock;

/// Reasons that are told apart; more are counted as one.
const REASONS: usize = 16;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Calls that were not refused.
    pub(super) map: u64,
    pub(super) unmap: u64,
    /// Calls that were, by reason.
    pub(super) refused: BTreeMap<String, u64>,
    pub(super) fences: u64,
    /// In all calls.
    pub(super) time: Duration,
}

impl Seen {
    fn refuse(&mut self, what: String) {
        let known = self.refused.len() < REASONS || self.refused.contains_key(&what);
        *self.refused.entry(if known { what } else { "other reasons".to_owned() }).or_default() += 1;
    }
}

pub(super) struct Watched {
    inner: Box<dyn Mirror>,
    seen: Arc<Mutex<Seen>>,
}

impl Watched {
    pub(super) fn new(inner: Box<dyn Mirror>, seen: Arc<Mutex<Seen>>) -> Self {
        Self { inner, seen }
    }

    fn timed<R>(&mut self, call: impl FnOnce(&mut dyn Mirror) -> R) -> R {
        let begun = Instant::now();
        let outcome = call(&mut *self.inner);
        lock(&self.seen).time += begun.elapsed();
        outcome
    }
}

impl Mirror for Watched {
    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    fn begin(&mut self) {
        self.inner.begin();
    }

    fn commit(&mut self) -> Ack {
        self.timed(|mirror| mirror.commit())
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        let outcome = self.timed(|mirror| mirror.map(extent));
        let mut seen = lock(&self.seen);
        match outcome {
            Ok(ack) => {
                seen.map += 1;
                Ok(ack)
            }
            Err(refused) => {
                seen.refuse(refused.to_string());
                // The recorded driver is answered in one way, whatever the reason.
                let lost = refused.kind == RefusalKind::Lost;
                let kind = if lost { RefusalKind::Lost } else { RefusalKind::Resources };
                Err(Refused { kind, ..refused })
            }
        }
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let outcome = self.timed(|mirror| mirror.unmap(range));
        let mut seen = lock(&self.seen);
        match &outcome {
            Ok(_) => seen.unmap += 1,
            Err(refused) => seen.refuse(refused.to_string()),
        }
        outcome
    }

    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        let outcome = self.timed(|mirror| mirror.replace(old, new));
        outcome.inspect_err(|refused| lock(&self.seen).refuse(refused.to_string()))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        lock(&self.seen).fences += 1;
        self.timed(|mirror| mirror.fence())
    }

    fn held(&self) -> Vec<Mapping> {
        self.inner.held()
    }
}
