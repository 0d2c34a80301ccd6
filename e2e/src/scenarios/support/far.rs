//! Shells on the machines of the data centre. What a script says is read line by line by
//! the callers; a script that fails is an error that carries what it said.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::future::BoxFuture;

/// What a script said.
#[derive(Clone, Debug, Default)]
pub struct Said {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A machine that runs bash scripts as root.
pub trait Shell: Send + Sync {
    /// Its name, for errors.
    fn name(&self) -> &str;

    /// Runs `script`; an exit status other than 0 is a result here.
    fn said<'a>(&'a self, script: &'a str, limit: Duration) -> BoxFuture<'a, Result<Said>>;
}

/// Longest an ordinary look may take; an emulated machine is slow.
pub const LOOK: Duration = Duration::from_secs(30);

/// Standard output of `script`, trimmed; another exit status than 0 is an error.
pub async fn sh(shell: &dyn Shell, script: &str) -> Result<String> {
    sh_within(shell, script, LOOK).await
}

/// [`sh`] with a limit of its own.
pub async fn sh_within(shell: &dyn Shell, script: &str, limit: Duration) -> Result<String> {
    let said = shell
        .said(script, limit)
        .await
        .with_context(|| format!("on {}: {script}", shell.name()))?;
    if said.status != 0 {
        bail!(
            "on {}: `{script}` ended with {}: {} {}",
            shell.name(),
            said.status,
            said.stdout.trim(),
            said.stderr.trim()
        );
    }
    Ok(said.stdout.trim().to_owned())
}

/// How far a machine's clock is ahead of this one's, in microseconds, and how exactly
/// that is known: half of the shortest round trip of a few.
pub async fn clock_offset(shell: &dyn Shell) -> Result<(i64, i64)> {
    let mut best: Option<(i64, i64)> = None;
    for _ in 0..5 {
        let before = now_us();
        let there: i64 = sh(shell, "echo ${EPOCHREALTIME/./}").await?.parse()?;
        let after = now_us();
        let error = (after - before) / 2;
        if best.is_none_or(|(_, e)| error < e) {
            best = Some((there - (before + error), error));
        }
    }
    best.context("no look at the clock")
}

/// Microseconds since the epoch by this machine's clock.
#[must_use]
pub fn now_us() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_micros()).unwrap_or(i64::MAX))
}
