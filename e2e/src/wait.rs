//! Bounded waits. Every wait names what it waits for, and its error carries the last
//! state that was seen.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::interrupt;

/// What a probe saw.
pub enum Probe<T> {
    /// It is so; the wait returns this.
    Ready(T),
    /// Not yet; the text is the state seen, for the error.
    NotYet(String),
}

impl<T> Probe<T> {
    /// An error of a thing that is still starting is only a state.
    pub fn of<E: std::fmt::Display>(r: std::result::Result<Option<T>, E>, state: &str) -> Self {
        match r {
            Ok(Some(t)) => Self::Ready(t),
            Ok(None) => Self::NotYet(state.to_owned()),
            Err(e) => Self::NotYet(format!("{e:#}")),
        }
    }
}

/// A wait that ended without its condition.
#[derive(Debug, thiserror::Error)]
#[error("waited {} s for {what}; last seen: {last}", .after.as_secs())]
pub struct TimedOut {
    pub what: String,
    pub after: Duration,
    pub last: String,
}

/// Awaits until `probe` is ready, asking every `every`. An `Err` of the probe ends the
/// wait: use [`Probe::of`] for errors that may pass.
pub async fn until<T, F, Fut>(
    what: &str,
    timeout: Duration,
    every: Duration,
    mut probe: F,
) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Probe<T>>>,
{
    let begun = Instant::now();
    let mut last = String::from("nothing yet");
    loop {
        interrupt::check()?;
        let left = timeout.saturating_sub(begun.elapsed());
        match tokio::time::timeout(left, probe()).await {
            Ok(seen) => match seen? {
                Probe::Ready(t) => return Ok(t),
                Probe::NotYet(state) => last = state,
            },
            Err(_) => last = format!("{last} (the last look did not return)"),
        }
        if begun.elapsed() + every > timeout {
            return Err(anyhow!(TimedOut {
                what: what.to_owned(),
                after: timeout,
                last
            }));
        }
        tokio::time::sleep(every).await;
    }
}

/// [`until`] for code that is not async.
pub fn until_blocking<T>(
    what: &str,
    timeout: Duration,
    every: Duration,
    mut probe: impl FnMut() -> Result<Probe<T>>,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        interrupt::check()?;
        let last = match probe()? {
            Probe::Ready(t) => return Ok(t),
            Probe::NotYet(state) => state,
        };
        if begun.elapsed() + every > timeout {
            return Err(anyhow!(TimedOut {
                what: what.to_owned(),
                after: timeout,
                last
            }));
        }
        std::thread::sleep(every);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn error_says_what_and_the_last_state() {
        let mut n = 0;
        let err = until::<(), _, _>(
            "the moon",
            Duration::from_millis(30),
            Duration::from_millis(5),
            || {
                n += 1;
                let state = format!("look {n}");
                async move { Ok(Probe::NotYet(state)) }
            },
        )
        .await
        .unwrap_err();
        let text = err.to_string();
        assert!(text.contains("the moon") && text.contains("look"), "{text}");
    }

    #[tokio::test]
    async fn a_probe_that_hangs_is_bounded() {
        let every = Duration::from_millis(5);
        let err = until::<(), _, _>("x", Duration::from_millis(30), every, || {
            std::future::pending::<Result<Probe<()>>>()
        })
        .await
        .unwrap_err();
        assert!(err.to_string().contains("did not return"), "{err}");
    }
}
