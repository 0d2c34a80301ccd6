//! The one way the harness runs other programs. Each run is bounded, its output goes
//! into a file of the run's log folder, and its error carries the command line, the exit
//! status and the end of what it said.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::interrupt;

static LOG_DIR: OnceLock<PathBuf> = OnceLock::new();
static NEXT: AtomicU32 = AtomicU32::new(1);

/// Longest a program may run unless [`Cmd::timeout`] says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// How much of a program's output an error carries.
const TAIL: usize = 2000;

/// Sets the folder for the logs of programs; the first call of a process wins.
pub fn set_log_dir(dir: &Path) {
    let _ = LOG_DIR.set(dir.to_owned());
}

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error("cannot start `{command}`: {source}")]
    Start {
        command: String,
        source: std::io::Error,
    },
    #[error("`{command}` {status}{log}; it said:\n{tail}", log = at(.log))]
    Failed {
        command: String,
        status: String,
        log: Option<PathBuf>,
        tail: String,
    },
    #[error("`{command}` did not end within {after:?}{log}; it said:\n{tail}", log = at(.log))]
    TimedOut {
        command: String,
        after: Duration,
        log: Option<PathBuf>,
        tail: String,
    },
    #[error("interrupted while `{command}` ran")]
    Interrupted { command: String },
    #[error("`{command}`: {source}")]
    Io {
        command: String,
        source: std::io::Error,
    },
}

fn at(log: &Option<PathBuf>) -> String {
    log.as_ref()
        .map(|l| format!(" (log: {})", l.display()))
        .unwrap_or_default()
}

/// What a program said.
#[derive(Clone, Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text without surrounding white space.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

enum Input {
    Nothing,
    Bytes(Vec<u8>),
    File(PathBuf),
}

/// A program to run.
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    env_remove: Vec<OsString>,
    cwd: Option<PathBuf>,
    input: Input,
    output: Option<PathBuf>,
    timeout: Duration,
    logged: bool,
}

impl Cmd {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            env_remove: Vec::new(),
            cwd: None,
            input: Input::Nothing,
            output: None,
            timeout: DEFAULT_TIMEOUT,
            logged: true,
        }
    }

    /// `sh -euc script`, with `args` as `$1`…; for pipelines only.
    pub fn sh(script: &str, args: &[&str]) -> Self {
        Self::new("sh").args(["-euc", script, "sh"]).args(args)
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.env_remove.push(name.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.cwd = Some(dir.as_ref().to_owned());
        self
    }

    /// Bytes for its standard input (otherwise it reads nothing).
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// A file as its standard input.
    #[must_use]
    pub fn stdin_file(mut self, path: impl AsRef<Path>) -> Self {
        self.input = Input::File(path.as_ref().to_owned());
        self
    }

    /// A file that its standard output replaces (it is then not in [`Output`]).
    #[must_use]
    pub fn stdout_file(mut self, path: impl AsRef<Path>) -> Self {
        self.output = Some(path.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Writes no log file: for probes asked again and again.
    #[must_use]
    pub fn unlogged(mut self) -> Self {
        self.logged = false;
        self
    }

    /// The command as one could type it.
    #[must_use]
    pub fn line(&self) -> String {
        std::iter::once(&self.program)
            .chain(&self.args)
            .map(|a| quote(&a.to_string_lossy()))
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Runs to the end; an exit status other than 0 is an error.
    pub fn run(&self) -> Result<Output, ExecError> {
        let (out, log) = self.complete()?;
        if out.status.success() {
            return Ok(out);
        }
        Err(ExecError::Failed {
            command: self.line(),
            status: describe(out.status),
            log,
            tail: tail(&out.stdout, &out.stderr),
        })
    }

    /// Runs to the end and returns standard output as text.
    pub fn text(&self) -> Result<String, ExecError> {
        self.run().map(|o| o.text())
    }

    /// Runs to the end; any exit status is a result.
    pub fn status(&self) -> Result<Output, ExecError> {
        self.complete().map(|(out, _)| out)
    }

    fn command(&self) -> Command {
        let mut c = Command::new(&self.program);
        c.args(&self.args);
        for name in &self.env_remove {
            c.env_remove(name);
        }
        c.envs(self.env.iter().map(|(k, v)| (k, v)));
        if let Some(dir) = &self.cwd {
            c.current_dir(dir);
        }
        c
    }

    fn complete(&self) -> Result<(Output, Option<PathBuf>), ExecError> {
        if interrupt::requested() {
            return Err(ExecError::Interrupted {
                command: self.line(),
            });
        }
        let io = |source| ExecError::Io {
            command: self.line(),
            source,
        };
        let mut err = tempfile::tempfile().map_err(io)?;
        let mut out = match &self.output {
            Some(path) => File::create(path).map_err(io)?,
            None => tempfile::tempfile().map_err(io)?,
        };
        let mut command = self.command();
        // A group of its own: Ctrl-C on the terminal must not end the tear-down's programs.
        command.process_group(0);
        command
            .stdout(out.try_clone().map_err(io)?)
            .stderr(err.try_clone().map_err(io)?);
        command.stdin(self.open_stdin().map_err(io)?);
        let _running = interrupt::Running::begin();
        let mut child = command.spawn().map_err(|source| ExecError::Start {
            command: self.line(),
            source,
        })?;
        let ended = wait_child(&mut child, self.timeout).map_err(io)?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        if self.output.is_none() {
            out.rewind()
                .and_then(|()| out.read_to_end(&mut stdout))
                .map_err(io)?;
        }
        err.rewind()
            .and_then(|()| err.read_to_end(&mut stderr))
            .map_err(io)?;
        let status = match &ended {
            Ended::Exit(s) => describe(*s),
            Ended::TimedOut => "timed out".to_owned(),
            Ended::Interrupted => "interrupted".to_owned(),
        };
        let log = self.write_log(&status, &stdout, &stderr).map_err(io)?;
        match ended {
            Ended::Exit(status) => Ok((
                Output {
                    status,
                    stdout,
                    stderr,
                },
                log,
            )),
            Ended::TimedOut => Err(ExecError::TimedOut {
                command: self.line(),
                after: self.timeout,
                log,
                tail: tail(&stdout, &stderr),
            }),
            Ended::Interrupted => Err(ExecError::Interrupted {
                command: self.line(),
            }),
        }
    }

    fn open_stdin(&self) -> std::io::Result<Stdio> {
        Ok(match &self.input {
            Input::Nothing => Stdio::null(),
            Input::File(path) => File::open(path)?.into(),
            Input::Bytes(bytes) => {
                let mut f = tempfile::tempfile()?;
                f.write_all(bytes)?;
                f.rewind()?;
                f.into()
            }
        })
    }

    fn write_log(&self, status: &str, out: &[u8], err: &[u8]) -> std::io::Result<Option<PathBuf>> {
        let Some(dir) = LOG_DIR.get().filter(|_| self.logged) else {
            return Ok(None);
        };
        let name = Path::new(&self.program)
            .file_name()
            .unwrap_or(&self.program);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{n:04}-{}.log", name.to_string_lossy()));
        let mut f = File::create(&path)?;
        writeln!(f, "$ {}\n# {status}\n--- stdout", self.line())?;
        f.write_all(out)?;
        writeln!(f, "\n--- stderr")?;
        f.write_all(err)?;
        Ok(Some(path))
    }
}

enum Ended {
    Exit(ExitStatus),
    TimedOut,
    Interrupted,
}

fn wait_child(child: &mut Child, timeout: Duration) -> std::io::Result<Ended> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::Exit(status));
        }
        let why = if interrupt::requested() {
            Some(Ended::Interrupted)
        } else if begun.elapsed() >= timeout {
            Some(Ended::TimedOut)
        } else {
            None
        };
        if let Some(why) = why {
            end_group(child)?;
            return Ok(why);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// SIGTERM to the whole group, two seconds, then SIGKILL; reaps the child.
fn end_group(child: &mut Child) -> std::io::Result<()> {
    let group = i32::try_from(child.id())
        .map(Pid::from_raw)
        .map_err(std::io::Error::other)?;
    for (signal, grace) in [(Signal::SIGTERM, 2), (Signal::SIGKILL, 10)] {
        match killpg(group, signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(e) => return Err(e.into()),
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(grace) {
            if child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Err(std::io::Error::other(format!(
        "process {group} does not die"
    )))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(sig)) => format!("was ended by signal {sig}"),
        (None, None) => format!("ended: {status}"),
    }
}

fn tail(stdout: &[u8], stderr: &[u8]) -> String {
    let blank = stderr.iter().all(u8::is_ascii_whitespace);
    let text = String::from_utf8_lossy(if blank { stdout } else { stderr });
    let text = text.trim_end();
    let cut = text.len().saturating_sub(TAIL);
    let cut = (cut..=text.len())
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0);
    text.get(cut..).unwrap_or_default().to_owned()
}

fn quote(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        arg.to_owned()
    } else {
        format!("'{}'", arg.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_carries_command_status_and_words() {
        let err = Cmd::sh("echo out; echo bad >&2; exit 3", &[])
            .run()
            .unwrap_err()
            .to_string();
        assert!(err.contains("sh -euc"), "{err}");
        assert!(
            err.contains("exited with 3") && err.contains("bad"),
            "{err}"
        );
    }

    #[test]
    fn a_program_that_hangs_is_ended_with_its_children() {
        let begun = Instant::now();
        let cmd = Cmd::sh("sleep 60 & wait", &[]).timeout(Duration::from_millis(100));
        assert!(matches!(cmd.run(), Err(ExecError::TimedOut { .. })));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn stdin_and_environment_reach_it() {
        let cmd = Cmd::sh("printf '%s-' \"$A\" \"$1\"; cat", &["x y"])
            .env("A", "b")
            .stdin("in");
        assert_eq!(cmd.text().unwrap(), "b-x y-in");
    }

    #[test]
    fn quoting_survives_a_shell() {
        let odd = "a'b \"$c";
        assert_eq!(
            Cmd::sh(&format!("printf %s {}", quote(odd)), &[])
                .text()
                .unwrap(),
            odd
        );
    }
}
