//! How often a guest may cause a line in the log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 8;
/// One more for each such time.
const PACE: Duration = Duration::from_secs(10);

/// A bucket of lines: each line takes one, and time brings new ones.
#[derive(Debug)]
pub(crate) struct Hush(Mutex<(u32, Instant)>);

impl Default for Hush {
    fn default() -> Self {
        Self(Mutex::new((BURST, Instant::now())))
    }
}

impl Hush {
    /// Whether a line may be written now.
    pub(crate) fn allows(&self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> bool {
        let (left, since) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *left < BURST && now.saturating_duration_since(*since) >= PACE {
            *left = left.saturating_add(1);
            *since = since.checked_add(PACE).unwrap_or(now);
        }
        if *left == BURST {
            *since = now;
        }
        match left.checked_sub(1) {
            Some(rest) => {
                *left = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_when_too_many_come_one_for_each_pace() {
        let hush = Hush::default();
        let start = Instant::now();
        assert_eq!((0..100).filter(|_| hush.allows_at(start)).count(), 8);
        assert!(!hush.allows_at(start + PACE / 2));
        assert!(hush.allows_at(start + PACE));
        assert!(!hush.allows_at(start + PACE));
        let later = start + PACE * 1000;
        assert_eq!((0..100).filter(|_| hush.allows_at(later)).count(), 8);
    }
}
