//! The client's rate limit: a token bucket, as client-go's QPS and Burst.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Hands out turns: `burst` at once, then `qps` a second.
pub(super) struct Limiter {
    qps: f64,
    burst: f64,
    bucket: Mutex<Bucket>,
}

struct Bucket {
    /// Negative: turns promised ahead of time.
    tokens: f64,
    at: Instant,
}

impl Limiter {
    /// No limit when `qps` is not above zero.
    pub(super) fn new(qps: f64, burst: u32) -> Option<Self> {
        (qps > 0.0).then(|| Self {
            qps,
            burst: f64::from(burst.max(1)),
            bucket: Mutex::new(Bucket {
                tokens: f64::from(burst.max(1)),
                at: Instant::now(),
            }),
        })
    }

    /// Takes a turn; how long to wait before using it.
    pub(super) fn take(&self, now: Instant) -> Duration {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.tokens = (bucket.tokens + since * self.qps).min(self.burst) - 1.0;
        bucket.at = bucket.at.max(now);
        Duration::try_from_secs_f64((-bucket.tokens / self.qps).max(0.0))
            .unwrap_or(Duration::from_secs(60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_then_the_rate_holds() {
        let limiter = Limiter::new(10.0, 3).unwrap();
        let start = Instant::now();
        let waits: Vec<u128> = (0..5).map(|_| limiter.take(start).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        let later = start + Duration::from_secs(60);
        assert_eq!(limiter.take(later), Duration::ZERO);
    }

    #[test]
    fn zero_is_no_limit() {
        assert!(Limiter::new(0.0, 3).is_none());
    }
}
