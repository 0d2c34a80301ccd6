//! The two processes, etcd and kube-apiserver, and the thread that owns them.
//!
//! They are started with a parent-death signal, so that a killed test leaves none. Linux
//! sends it when the *thread* that forked ends (prctl(2), PR_SET_PDEATHSIG), hence one
//! thread that stays from start to stop.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Error;

/// How long a process may take to end before it is killed.
const GRACE: Duration = Duration::from_secs(15);

/// Where the processes find and keep things.
pub(crate) struct Layout {
    pub(crate) binaries: PathBuf,
    pub(crate) dir: PathBuf,
}

/// Ports the server listens on, on 127.0.0.1.
#[derive(Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) api: u16,
    pub(crate) etcd: u16,
    peer: u16,
}

impl Ports {
    /// Ports that were free a moment ago; a process that finds its port taken ends, and
    /// the caller tries again with others.
    pub(crate) fn pick() -> std::io::Result<Self> {
        let bind = || TcpListener::bind(("127.0.0.1", 0));
        let (a, b, c) = (bind()?, bind()?, bind()?);
        let port = |l: &TcpListener| l.local_addr().map(|x| x.port());
        Ok(Self {
            api: port(&a)?,
            etcd: port(&b)?,
            peer: port(&c)?,
        })
    }
}

/// Owns the processes; dropping it stops them, the API server first.
pub(crate) struct Keeper {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

impl Keeper {
    pub(crate) fn start(layout: &Layout, ports: Ports) -> Result<Self, Error> {
        let etcd = command(layout, "etcd", &etcd_args(&layout.dir, ports))?;
        let api = command(layout, "kube-apiserver", &api_args(&layout.dir, ports))?;
        let (stop, stopped) = mpsc::channel::<()>();
        let (started, starting) = mpsc::channel::<Result<(), Error>>();
        let thread = std::thread::spawn(move || keep(etcd, api, &started, &stopped));
        let keeper = Self {
            stop: Some(stop),
            thread: Some(thread),
        };
        match starting.recv() {
            Ok(Ok(())) => Ok(keeper),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(Error::Ended(
                "the thread that keeps the processes ended".into(),
            )),
        }
    }

    /// Whether both processes still run: the thread ends when one of them does.
    pub(crate) fn running(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Stops both and says what went wrong on the way.
    pub(crate) fn stop(&mut self) -> Result<(), Error> {
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        match thread.join() {
            Ok(r) => r.map_err(Error::Ended),
            Err(_) => Err(Error::Ended(
                "the thread that keeps the processes panicked".into(),
            )),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("stopping the test API server: {e}");
        }
    }
}

fn keep(
    mut etcd: Command,
    mut api: Command,
    started: &mpsc::Sender<Result<(), Error>>,
    stopped: &mpsc::Receiver<()>,
) -> Result<(), String> {
    let start = |c: &mut Command, what| {
        c.spawn().map_err(|source| Error::Io {
            what: format!("starting {what}"),
            source,
        })
    };
    let mut children = Vec::new();
    for (command, what) in [(&mut etcd, "etcd"), (&mut api, "kube-apiserver")] {
        match start(command, what) {
            Ok(child) => children.push((what, child)),
            Err(e) => {
                // The caller waits on the channel, so it is there to take the error.
                let _ = started.send(Err(e));
                return end_all(children, None);
            }
        }
    }
    let _ = started.send(Ok(()));
    let mut early = None;
    while early.is_none() {
        match stopped.recv_timeout(Duration::from_millis(100)) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                early = children
                    .iter_mut()
                    .find_map(|(what, c)| match c.try_wait() {
                        Ok(None) => None,
                        Ok(Some(status)) => Some(format!("{what} ended by itself: {status}")),
                        Err(e) => Some(format!("{what}: {e}")),
                    });
            }
            _ => break,
        }
    }
    end_all(children, early)
}

/// Ends the API server before etcd: without etcd it lingers for minutes.
fn end_all(mut children: Vec<(&str, Child)>, early: Option<String>) -> Result<(), String> {
    let mut wrong: Vec<String> = early.into_iter().collect();
    while let Some((what, mut child)) = children.pop() {
        if let Err(e) = end(&mut child) {
            wrong.push(format!("ending {what}: {e}"));
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; "))
    }
}

fn end(child: &mut Child) -> std::io::Result<()> {
    let pid = i32::try_from(child.id())
        .map(Pid::from_raw)
        .map_err(std::io::Error::other)?;
    if child.try_wait()?.is_some() {
        return Ok(());
    }
    kill(pid, Signal::SIGTERM)?;
    let begun = Instant::now();
    while begun.elapsed() < GRACE {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill()?;
    child.wait().map(|_| ())
}

fn command(layout: &Layout, name: &str, args: &[String]) -> Result<Command, Error> {
    let log = layout.dir.join(format!("{name}.log"));
    let io = |source| Error::Io {
        what: format!("creating {}", log.display()),
        source,
    };
    let out = File::create(&log).map_err(io)?;
    // setpriv(1) sets the death signal and then becomes the program.
    let mut c = Command::new("setpriv");
    c.args(["--pdeathsig", "KILL", "--"])
        .arg(layout.binaries.join(name))
        .args(args);
    c.stdin(Stdio::null())
        .stdout(out.try_clone().map_err(io)?)
        .stderr(out);
    Ok(c)
}

fn etcd_args(dir: &Path, p: Ports) -> Vec<String> {
    let client = format!("http://127.0.0.1:{}", p.etcd);
    let peer = format!("http://127.0.0.1:{}", p.peer);
    vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // The data lives as long as one test: durability would only cost time.
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ]
}

fn api_args(dir: &Path, p: Ports) -> Vec<String> {
    let file = |name: &str| dir.join(name).display().to_string();
    vec![
        format!("--etcd-servers=http://127.0.0.1:{}", p.etcd),
        "--bind-address=127.0.0.1".into(),
        format!("--secure-port={}", p.api),
        format!("--cert-dir={}", file("certs")),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--service-account-key-file={}", file("tokens.pub")),
        format!("--service-account-signing-key-file={}", file("tokens.key")),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        "--service-cluster-ip-range=10.0.0.0/24".into(),
        "--authorization-mode=RBAC".into(),
        // No controller makes the default ServiceAccount here, so pods would be refused.
        "--disable-admission-plugins=ServiceAccount".into(),
        "--allow-privileged=true".into(),
    ]
}
