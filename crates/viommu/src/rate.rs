//! How often something may be said: a token bucket, for models and embedders. What a guest can cause again and again must
//! not fill a log.

use std::time::Instant;

/// So many at once and so many a second. Takes the time from its caller.
#[derive(Debug)]
pub struct Bucket {
    per_second: u32,
    burst: u32,
    /// In billionths.
    tokens: u64,
    last: Option<Instant>,
}

const ONE: u64 = 1_000_000_000;

impl Bucket {
    /// `burst` at once, and `per_second` more in each second.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second, burst, tokens: u64::from(burst).saturating_mul(ONE), last: None }
    }

    /// Whether one more may be said now.
    pub fn take(&mut self, now: Instant) -> bool {
        let since = self.last.map_or(0, |last| now.saturating_duration_since(last).as_nanos());
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        let full = u64::from(self.burst).saturating_mul(ONE);
        let gained = since.saturating_mul(u64::from(self.per_second));
        self.last = Some(now);
        self.tokens = self.tokens.saturating_add(gained).min(full);
        match self.tokens.checked_sub(ONE) {
            Some(rest) => {
                self.tokens = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn take_when_the_burst_is_used_up_waits_for_time() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, 3);
        assert_eq!((0..5).filter(|_| bucket.take(start)).count(), 3);
        assert!(!bucket.take(start + Duration::from_millis(99)));
        assert!(bucket.take(start + Duration::from_millis(150)));
        assert!(!bucket.take(start + Duration::from_millis(199)));
        assert!(bucket.take(start + Duration::from_millis(200)));
        let later = start + Duration::from_secs(3600);
        assert_eq!((0..9).filter(|_| bucket.take(later)).count(), 3);
    }
}
