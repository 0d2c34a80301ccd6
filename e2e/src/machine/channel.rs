//! The harness's end of the command channel into a machine; the crate `channel` has the
//! protocol and the guest's end. Touches the unix sockets of QEMU and lock files beside them.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use channel::protocol::{Answer, Request, Work};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::wait::{self, Probe};

/// How much longer than the command the harness waits for its answer: the guest ends the
/// command itself, and an emulated machine is slow to say so.
const GRACE: Duration = Duration::from_secs(30);

/// What a command in a machine did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit status as a shell has it; 124 when the command ran out of time.
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Output {
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == 0
    }

    /// Standard output as text without surrounding white space.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// An error with what it said, unless it ended with 0.
    pub fn ok(self, command: &str) -> Result<Self> {
        if self.success() {
            return Ok(self);
        }
        bail!(
            "`{command}` exited with {}; it said:\n{}{}",
            self.status,
            String::from_utf8_lossy(&self.stderr),
            String::from_utf8_lossy(&self.stdout)
        )
    }
}

impl From<Answer> for Output {
    fn from(a: Answer) -> Self {
        Self {
            status: a.status,
            stdout: a.stdout,
            stderr: a.stderr,
        }
    }
}

/// A request of an id that no other has.
pub(super) fn request(work: Work, limit: Duration) -> Request {
    Request {
        id: unique(),
        seconds: limit.as_secs().max(1),
        work,
    }
}

/// A shell command with its standard input.
pub(super) fn command(command: &str, stdin: &[u8]) -> Work {
    Work::Run {
        command: command.to_owned(),
        stdin: stdin.to_vec(),
    }
}

/// Hexadecimal; two processes or two calls never share one.
fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{:x}{now:x}{n:x}", std::process::id())
}

/// The harness's end of a machine's ports.
#[derive(Clone, Debug)]
pub(super) struct Channel {
    dir: PathBuf,
    ports: usize,
}

impl Channel {
    pub(super) fn new(dir: &Path, ports: usize) -> Self {
        Self {
            dir: dir.to_owned(),
            ports,
        }
    }

    /// Has `work` done in the machine. As much is done at once as there are ports; more
    /// waits for a free port.
    pub(super) async fn ask(&self, work: Work, limit: Duration) -> Result<Output> {
        let request = request(work, limit);
        let (socket, _lock) = wait::until(
            "a free channel port",
            limit + GRACE,
            Duration::from_millis(50),
            || async { self.free_port() },
        )
        .await?;
        tokio::time::timeout(limit + GRACE, talk(&socket, &request))
            .await
            .with_context(|| format!("no answer within {limit:?} to {:?}", request.work))?
            .with_context(|| format!("asking for {:?}", request.work))
    }

    /// QEMU serves one peer of a port and lets others wait unheard: a lock says which
    /// ports are in use, to other processes too.
    fn free_port(&self) -> Result<Probe<(PathBuf, File)>> {
        for n in 0..self.ports {
            let lock = File::create(self.dir.join(format!("port{n}.lock")))?;
            match lock.try_lock() {
                Ok(()) => {
                    return Ok(Probe::Ready((self.dir.join(format!("port{n}.sock")), lock)));
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => return Err(e).context("locking a port"),
            }
        }
        Ok(Probe::NotYet("all are in use".into()))
    }
}

async fn talk(socket: &Path, request: &Request) -> Result<Output> {
    let mut stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("connecting to {}", socket.display()))?;
    // The first line end closes what a caller that was killed left half-written.
    stream
        .write_all(format!("\n{}\n", request.line()).as_bytes())
        .await?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await? {
        if let Some(answer) = Answer::parse(&line, &request.id)? {
            return Ok(answer.into());
        }
    }
    bail!("the machine hung up")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_of_an_earlier_caller_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(dir.path().join("port0.sock")).unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (r, mut w) = stream.into_split();
            let mut lines = BufReader::new(r).lines();
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Ok(request) = Request::parse(&line) {
                    let answer = Answer {
                        stdout: b"hi".to_vec(),
                        ..Answer::default()
                    };
                    let text = format!("0000 1  \n{}\n", answer.line(&request.id));
                    w.write_all(text.as_bytes()).await.unwrap();
                }
            }
        });
        let channel = Channel::new(dir.path(), 1);
        let work = command("x", &[]);
        let out = channel.ask(work, Duration::from_secs(5)).await.unwrap();
        assert_eq!(out.text(), "hi");
        server.abort();
    }
}
