//! Programs that outlive the harness: started in a session of their own with a pid file
//! and a log, ended by that very pid. The pid file keeps the process's start time too,
//! because a pid alone may by now be another program's.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Record {
    pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks since boot.
    start: u64,
    command: Vec<String>,
    log: PathBuf,
}

/// A daemon with a pid file.
#[derive(Debug)]
pub struct Daemon {
    file: PathBuf,
    record: Record,
}

impl Daemon {
    /// Starts `command` as daemon `name`; its output is appended to `log`. Fails if a
    /// daemon of that name already runs from `dir`.
    pub fn spawn(dir: &Path, name: &str, command: &[String], log: &Path) -> Result<Self> {
        if let Some(old) = Self::find(dir, name)? {
            if old.alive() {
                bail!("{name} already runs as process {}", old.pid());
            }
            old.forget()?;
        }
        let out = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        // setsid(1) execs in place when it is no group leader, so the pid is the program's.
        let child = Command::new("setsid")
            .args(command)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("starting {name}: {}", command.join(" ")))?;
        let pid = i32::try_from(child.id())?;
        let (_, start) = stat(pid).with_context(|| format!("{name} ended at once"))?;
        let record = Record {
            pid,
            start,
            command: command.to_vec(),
            log: log.to_owned(),
        };
        let file = pid_file(dir, name);
        std::fs::create_dir_all(dir)?;
        std::fs::write(&file, serde_json::to_vec_pretty(&record)?)
            .with_context(|| format!("writing {}", file.display()))?;
        Ok(Self { file, record })
    }

    /// The daemon `name` that was started from `dir`, alive or not.
    pub fn find(dir: &Path, name: &str) -> Result<Option<Self>> {
        let file = pid_file(dir, name);
        match std::fs::read(&file) {
            Ok(data) => {
                let record = serde_json::from_slice(&data)
                    .with_context(|| format!("reading {}", file.display()))?;
                Ok(Some(Self { file, record }))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(anyhow!(e).context(format!("reading {}", file.display()))),
        }
    }

    /// Every daemon with a pid file in `dir`, by name.
    pub fn all(dir: &Path) -> Result<Vec<(String, Self)>> {
        let mut found = Vec::new();
        let Ok(entries) = std::fs::read_dir(dir) else {
            return Ok(found);
        };
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(name) = name.strip_suffix(".pid.json")
                && let Some(d) = Self::find(dir, name)?
            {
                found.push((name.to_owned(), d));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    #[must_use]
    pub fn pid(&self) -> i32 {
        self.record.pid
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.record.log
    }

    /// Whether the very process that was started still runs.
    #[must_use]
    pub fn alive(&self) -> bool {
        matches!(stat(self.record.pid), Some((state, start))
            if start == self.record.start && state != 'Z' && state != 'X')
    }

    /// An error with the end of its log if it no longer runs.
    pub fn check(&self, name: &str) -> Result<()> {
        if self.alive() {
            return Ok(());
        }
        let log = std::fs::read(&self.record.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines
            .get(lines.len().saturating_sub(20)..)
            .unwrap_or_default()
            .join("\n");
        bail!(
            "{name} ended by itself; its log {} ends with:\n{tail}",
            self.record.log.display()
        )
    }

    /// Sends SIGTERM, waits for `grace`, then SIGKILL; removes the pid file when it is gone.
    pub fn stop(self, grace: Duration) -> Result<()> {
        let last = Duration::from_secs(20);
        for (signal, grace) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, last)] {
            if !self.alive() {
                return self.forget();
            }
            match kill(Pid::from_raw(self.record.pid), signal) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(e) => bail!("sending {signal} to process {}: {e}", self.record.pid),
            }
            let begun = Instant::now();
            while self.alive() && begun.elapsed() < grace {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        if self.alive() {
            bail!(
                "process {} ({}) does not die",
                self.record.pid,
                self.record.command.join(" ")
            );
        }
        self.forget()
    }

    fn forget(&self) -> Result<()> {
        std::fs::remove_file(&self.file)
            .with_context(|| format!("removing {}", self.file.display()))
    }
}

fn pid_file(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.pid.json"))
}

/// State letter and start time of a process.
fn stat(pid: i32) -> Option<(char, u64)> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in the second field may hold blanks and parentheses: count from the last `)`.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_an_odd_name() {
        let text = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99 1";
        assert_eq!(parse_stat(text), Some(('S', 4711)));
    }

    #[test]
    fn found_again_ended_by_its_pid_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let command = ["sleep".to_owned(), "100".to_owned()];
        let log = dir.path().join("log");
        Daemon::spawn(dir.path(), "s", &command, &log).unwrap();
        assert!(Daemon::spawn(dir.path(), "s", &command, &log).is_err());
        let found = Daemon::find(dir.path(), "s").unwrap().unwrap();
        assert!(found.alive());
        let pid = found.pid();
        found.stop(Duration::from_secs(5)).unwrap();
        assert!(!matches!(stat(pid), Some((s, _)) if s != 'Z'));
        assert!(Daemon::find(dir.path(), "s").unwrap().is_none());
    }

    #[test]
    fn another_process_with_the_pid_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        let record = Record {
            pid: me,
            start: 1,
            command: vec![],
            log: dir.path().join("l"),
        };
        let file = pid_file(dir.path(), "x");
        std::fs::write(&file, serde_json::to_vec(&record).unwrap()).unwrap();
        let d = Daemon::find(dir.path(), "x").unwrap().unwrap();
        assert!(!d.alive());
        d.stop(Duration::ZERO).unwrap();
    }
}
