//! The far end of the managed PF's wire: a process that plays the switch. It answers ARP
//! and ICMP echo for a few addresses in whatever VLAN it is asked, counts every frame by
//! (source, VLAN, type), keeps the last ones, and tells all that on a control socket.
//! Touches two unix sockets and nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixDatagram, UnixListener, UnixStream};

use super::frame::{Frame, Kind};

/// Frames that are kept whole.
const KEPT: usize = 256;
/// Largest frame QEMU's dgram netdev sends.
const LARGEST: usize = 68 * 1024;

/// The command line of the hidden subcommand.
#[derive(Clone, Debug, clap::Args)]
pub struct SwitchArgs {
    /// Datagram socket that this process binds.
    #[arg(long)]
    pub wire: PathBuf,
    /// Datagram socket that QEMU binds.
    #[arg(long)]
    pub peer: PathBuf,
    /// Stream socket for `stats` and `reset`.
    #[arg(long)]
    pub control: PathBuf,
    /// Address to answer for; may be repeated.
    #[arg(long = "address", required = true)]
    pub addresses: Vec<Ipv4Addr>,
    /// Hardware address to answer with.
    #[arg(long, default_value = "02:00:5e:00:00:01")]
    pub mac: String,
}

/// Frames of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Count {
    #[serde(flatten)]
    pub kind: Kind,
    pub frames: u64,
    /// Of those, how many were answered.
    pub answered: u64,
}

/// One frame as it came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seen {
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    #[serde(flatten)]
    pub kind: Kind,
    pub length: usize,
}

/// What the control socket tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    pub counts: Vec<Count>,
    /// The last frames, oldest first.
    pub last: Vec<Seen>,
    /// Frames too short to have headers.
    pub malformed: u64,
    /// Answers that QEMU did not take.
    pub send_errors: u64,
}

#[derive(Default)]
struct Book {
    counts: BTreeMap<Kind, (u64, u64)>,
    last: VecDeque<Seen>,
    malformed: u64,
    send_errors: u64,
}

impl Book {
    fn note(&mut self, kind: &Kind, length: usize, answered: bool) {
        let c = self.counts.entry(kind.clone()).or_default();
        c.0 += 1;
        c.1 += u64::from(answered);
        if self.last.len() == KEPT {
            self.last.pop_front();
        }
        let at_ms = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        self.last.push_back(Seen {
            at_ms,
            kind: kind.clone(),
            length,
        });
    }

    fn stats(&self) -> Stats {
        Stats {
            counts: self
                .counts
                .iter()
                .map(|(kind, (frames, answered))| Count {
                    kind: kind.clone(),
                    frames: *frames,
                    answered: *answered,
                })
                .collect(),
            last: self.last.iter().cloned().collect(),
            malformed: self.malformed,
            send_errors: self.send_errors,
        }
    }
}

type Shared = Arc<Mutex<Book>>;

fn locked(book: &Shared) -> std::sync::MutexGuard<'_, Book> {
    // Counters are whole after every statement; a panic elsewhere does not spoil them.
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs until it is killed.
pub async fn serve(args: SwitchArgs) -> Result<()> {
    let me = parse_mac(&args.mac)?;
    let wire = UnixDatagram::bind(fresh(&args.wire)?)
        .with_context(|| format!("binding {}", args.wire.display()))?;
    let control = UnixListener::bind(fresh(&args.control)?)
        .with_context(|| format!("binding {}", args.control.display()))?;
    let book = Shared::default();
    tokio::spawn(accept(control, book.clone()));
    let mut buffer = vec![0; LARGEST];
    loop {
        let n = wire.recv(&mut buffer).await.context("reading the wire")?;
        let bytes = buffer.get(..n).unwrap_or_default();
        let Some(frame) = Frame::parse(bytes) else {
            locked(&book).malformed += 1;
            continue;
        };
        let answer = frame.answer(me, &args.addresses);
        // Noted before it is answered, so that whoever has the answer finds the note.
        locked(&book).note(&frame.kind, n, answer.is_some());
        if let Some(answer) = answer
            && let Err(e) = wire.send_to(&answer, &args.peer).await
        {
            locked(&book).send_errors += 1;
            tracing::warn!(error = %e, "an answer was not taken");
        }
    }
}

async fn accept(control: UnixListener, book: Shared) {
    loop {
        match control.accept().await {
            Ok((stream, _)) => {
                let book = book.clone();
                tokio::spawn(async move {
                    if let Err(e) = answer_control(stream, &book).await {
                        tracing::warn!(error = %e, "a control connection failed");
                    }
                });
            }
            Err(e) => tracing::warn!(error = %e, "accepting a control connection"),
        }
    }
}

async fn answer_control(stream: UnixStream, book: &Shared) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    (&mut stream).take(64).read_line(&mut line).await?;
    let stats = match line.trim() {
        "stats" => locked(book).stats(),
        "reset" => {
            let mut book = locked(book);
            let stats = book.stats();
            *book = Book::default();
            stats
        }
        other => bail!("unknown request {other:?}"),
    };
    stream
        .get_mut()
        .write_all(&serde_json::to_vec(&stats)?)
        .await?;
    Ok(())
}

/// A socket file that nobody listens on any more would make the bind fail.
fn fresh(path: &Path) -> Result<&Path> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(path),
        Err(e) => Err(e).with_context(|| format!("removing {}", path.display())),
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|p| u8::from_str_radix(p, 16))
        .collect::<Result<_, _>>()
        .with_context(|| format!("{text} is no MAC address"))?;
    bytes
        .try_into()
        .map_err(|_| anyhow::anyhow!("{text} is no MAC address"))
}

/// The harness's view of a running switch.
#[derive(Clone, Debug)]
pub struct Switch {
    control: PathBuf,
}

impl Switch {
    #[must_use]
    pub fn at(control: &Path) -> Self {
        Self {
            control: control.to_owned(),
        }
    }

    /// Everything since the last reset.
    pub async fn stats(&self) -> Result<Stats> {
        self.ask("stats").await
    }

    /// Forgets everything, and returns what it forgot.
    pub async fn reset(&self) -> Result<Stats> {
        self.ask("reset").await
    }

    async fn ask(&self, request: &str) -> Result<Stats> {
        let talk = async {
            let mut stream = UnixStream::connect(&self.control).await?;
            stream.write_all(format!("{request}\n").as_bytes()).await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            anyhow::Ok(serde_json::from_slice(&answer)?)
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), talk)
            .await
            .context("the switch does not answer")?
            .with_context(|| format!("asking the switch at {}", self.control.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn counts_answers_and_forgets() {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        let guest = UnixDatagram::bind(at("q")).unwrap();
        let args = SwitchArgs {
            wire: at("h"),
            peer: at("q"),
            control: at("c"),
            addresses: vec![Ipv4Addr::new(10, 9, 0, 1)],
            mac: "02:00:5e:00:00:01".into(),
        };
        let server = tokio::spawn(serve(args));
        let switch = Switch::at(&at("c"));
        let mut request = vec![0xff; 6];
        request.extend([2, 0, 0, 0, 0, 0xaa, 0x81, 0, 0, 100, 8, 6]);
        request.extend([0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 0xaa, 10, 9, 0, 50]);
        request.extend([0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
        crate::wait::until(
            "the switch",
            std::time::Duration::from_secs(5),
            std::time::Duration::from_millis(5),
            || async { Ok(crate::wait::Probe::of(switch.stats().await.map(Some), "")) },
        )
        .await
        .unwrap();
        guest.send_to(&request, at("h")).await.unwrap();
        let mut answer = vec![0; 100];
        let n = guest.recv(&mut answer).await.unwrap();
        assert_eq!(answer[12..16], [0x81, 0, 0, 100]);
        assert_eq!(n, 46);
        let stats = switch.reset().await.unwrap();
        assert_eq!(stats.counts.len(), 1);
        assert_eq!(stats.counts[0].kind.vlan, Some(100));
        assert_eq!((stats.counts[0].frames, stats.counts[0].answered), (1, 1));
        assert_eq!(stats.last.len(), 1);
        assert_eq!(switch.stats().await.unwrap(), Stats::default());
        server.abort();
    }

    #[test]
    fn mac_addresses_are_checked() {
        assert!(parse_mac("02:00:5e:00:00:01").is_ok());
        assert!(parse_mac("02:00:5e:00:00").is_err());
        assert!(parse_mac("zz:00:5e:00:00:01").is_err());
    }
}
