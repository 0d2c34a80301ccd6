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

/// Between what two scripts of one command said.
const MARK: &str = "--e2e-next--";

/// Standard outputs of `scripts`, run one after another by one command: every command is a
/// process more, and those are what an emulated machine is slow at.
pub async fn several(shell: &dyn Shell, scripts: &[String]) -> Result<Vec<String>> {
    let said = sh(shell, &joined(scripts)).await?;
    let outputs = outputs(&said);
    anyhow::ensure!(
        outputs.len() == scripts.len(),
        "{} answers to {} scripts: {said}",
        outputs.len(),
        scripts.len()
    );
    Ok(outputs)
}

fn joined(scripts: &[String]) -> String {
    let each = scripts
        .iter()
        .map(|s| format!("(\n{s}\n) || exit\nprintf '\\n%s\\n' {MARK}\n"));
    each.collect()
}

fn outputs(said: &str) -> Vec<String> {
    let mut outputs = vec![String::new()];
    for line in said.lines() {
        match outputs.last_mut() {
            Some(last) if line != MARK => {
                last.push_str(line);
                last.push('\n');
            }
            _ => outputs.push(String::new()),
        }
    }
    // The last mark has nothing behind it.
    outputs.pop();
    outputs.iter().map(|o| o.trim().to_owned()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_script_has_its_output_and_one_that_fails_ends_all() {
        let run = |scripts: &[&str]| {
            let scripts: Vec<String> = scripts.iter().map(|s| (*s).to_owned()).collect();
            let out = std::process::Command::new("bash")
                .args(["-c", &joined(&scripts)])
                .output()
                .unwrap();
            (
                out.status.code(),
                outputs(&String::from_utf8_lossy(&out.stdout)),
            )
        };
        let (status, said) = run(&["echo a; echo b", "cd /; true", "printf c # end"]);
        assert_eq!(
            (status, said),
            (Some(0), vec!["a\nb".into(), String::new(), "c".into()])
        );
        assert_eq!(run(&["echo a", "false", "echo c"]).0, Some(1));
    }
}
