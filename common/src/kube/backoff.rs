//! Waits between tries, doubling for each key of its own. No I/O, no clock.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Failures so far, by object. The key should hold the object's UID, so that a
/// new object of an old name starts afresh; [`Backoff::forget`] what is gone.
pub struct Backoff<K> {
    start: Duration,
    max: Duration,
    failures: Mutex<HashMap<K, u32>>,
}

impl<K: Eq + Hash> Backoff<K> {
    #[must_use]
    pub fn new(start: Duration, max: Duration) -> Self {
        Self {
            start,
            max: max.max(start),
            failures: Mutex::default(),
        }
    }

    /// Counts one more failure of `key`; how long to wait before the next try:
    /// `start`, then twice as long each time, at most `max`.
    pub fn failed(&self, key: K) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key).or_default();
        let wait = self
            .start
            .saturating_mul(2_u32.saturating_pow(*count))
            .min(self.max);
        *count = count.saturating_add(1);
        wait
    }

    /// `key` did well, or is gone: its next failure is a first one.
    pub fn forget(&self, key: &K) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_bound_and_start_afresh() {
        let backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
        let waits: Vec<u64> = (0..11).map(|_| backoff.failed("a").as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(backoff.failed("b").as_secs(), 1);
        backoff.forget(&"a");
        assert_eq!(backoff.failed("a").as_secs(), 1);
    }
}
