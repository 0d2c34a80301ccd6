//! The command channel into a machine: a request is one line over a virtio-serial port,
//! so it works without the machine's network and without Kubernetes. The guest's end is
//! files/channel-agent. Touches the unix sockets of QEMU and lock files beside them.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
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

/// One request, ready to be sent.
pub(super) struct Request {
    id: String,
    line: String,
}

impl Request {
    pub(super) fn new(command: &str, stdin: &[u8], limit: Duration) -> Self {
        let id = unique();
        let line = format!(
            "{id} {} {} {}",
            limit.as_secs().max(1),
            STANDARD.encode(command),
            STANDARD.encode(stdin)
        );
        Self { id, line }
    }

    pub(super) fn line(&self) -> &str {
        &self.line
    }

    /// The answer in `line`; none if the line is about another request, as a caller that
    /// gave up leaves behind.
    pub(super) fn answer(&self, line: &str) -> Result<Option<Output>> {
        let mut words = line.trim_end().split(' ');
        if words.next() != Some(&self.id) {
            return Ok(None);
        }
        let mut word = || words.next().unwrap_or_default();
        let status = word().parse().context("the answer has no status")?;
        let stdout = STANDARD.decode(word()).context("the answer's output")?;
        let stderr = STANDARD.decode(word()).context("the answer's errors")?;
        Ok(Some(Output {
            status,
            stdout,
            stderr,
        }))
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

    /// Runs `command` in the machine's root shell. As many run at once as there are
    /// ports; one more waits for a free port.
    pub(super) async fn run(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<Output> {
        let request = Request::new(command, stdin, limit);
        let (socket, _lock) = wait::until(
            "a free channel port",
            limit + GRACE,
            Duration::from_millis(50),
            || async { self.free_port() },
        )
        .await?;
        tokio::time::timeout(limit + GRACE, talk(&socket, &request))
            .await
            .with_context(|| format!("no answer within {limit:?} to `{command}`"))?
            .with_context(|| format!("running `{command}`"))
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
        if let Some(output) = request.answer(&line)? {
            return Ok(output);
        }
    }
    bail!("the machine hung up")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_matched_by_id() {
        let r = Request::new("true", b"in", Duration::from_secs(5));
        let words: Vec<&str> = r.line().split(' ').collect();
        assert_eq!(words.len(), 4);
        assert_eq!(words[1], "5");
        assert_eq!(STANDARD.decode(words[3]).unwrap(), b"in");
        assert_eq!(r.answer("abc 0  ").unwrap(), None);
        let o = r
            .answer(&format!("{} 3 {} {}\n", words[0], STANDARD.encode("o"), ""))
            .unwrap()
            .unwrap();
        assert_eq!((o.status, o.text().as_str()), (3, "o"));
        assert!(o.ok("x").is_err());
        assert!(r.answer(&format!("{} x", words[0])).is_err());
    }

    #[tokio::test]
    async fn an_answer_of_an_earlier_caller_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(dir.path().join("port0.sock")).unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (r, mut w) = stream.into_split();
            let mut lines = BufReader::new(r).lines();
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some((id, _)) = line.split_once(' ') {
                    let text = format!("0000 1  \n{id} 0 {} \n", STANDARD.encode("hi"));
                    w.write_all(text.as_bytes()).await.unwrap();
                }
            }
        });
        let channel = Channel::new(dir.path(), 1);
        let out = channel.run("x", &[], Duration::from_secs(5)).await.unwrap();
        assert_eq!(out.text(), "hi");
        server.abort();
    }
}
