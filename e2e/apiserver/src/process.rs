//! One server: its two processes, its certificates and its folder.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;

use crate::keeper::{Keeper, Layout, Ports};
use crate::pki::{self, Authority};
use crate::{Error, READY, client, find_binaries, io, kubeconfig};

/// A running API server with its etcd; stopped when dropped.
pub(crate) struct Process {
    // Before `folder`: fields drop in order, and the processes write there.
    keeper: Mutex<Keeper>,
    authority: Authority,
    url: String,
    ports: Ports,
    folder: Folder,
}

impl Process {
    /// Starts both processes and returns when `/readyz` says ok.
    pub(crate) async fn start() -> Result<Self, Error> {
        let binaries = find_binaries(|name| std::env::var_os(name).map(PathBuf::from))?;
        let mut tries = 0;
        loop {
            tries += 1;
            match Self::start_once(&binaries).await {
                // A port may have been taken between its choice and its use.
                Err(Error::NotReady { last, .. }) if tries < 3 && last == ENDED => {}
                r => return r,
            }
        }
    }

    async fn start_once(binaries: &Path) -> Result<Self, Error> {
        let folder = Folder::new()?;
        let authority = Authority::new()?;
        write_certificates(&authority, folder.path())?;
        let ports = Ports::pick().map_err(io("picking free ports"))?;
        let layout = Layout {
            binaries: binaries.to_owned(),
            dir: folder.path().to_owned(),
        };
        let keeper = Mutex::new(Keeper::start(&layout, ports)?);
        let process = Self {
            keeper,
            authority,
            url: format!("https://127.0.0.1:{}", ports.api),
            ports,
            folder,
        };
        process.ready().await?;
        Ok(process)
    }

    async fn ready(&self) -> Result<(), Error> {
        let admin = self.admin().await?;
        let begun = Instant::now();
        let mut last = String::new();
        while begun.elapsed() < READY {
            if !self.running() {
                return Err(Error::NotReady {
                    last: ENDED.into(),
                    log: self.logs(),
                });
            }
            match admin.request_text(get("/readyz")?).await {
                Ok(text) if text == "ok" => return Ok(()),
                Ok(text) => last = text,
                Err(e) => last = e.to_string(),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(Error::NotReady {
            last,
            log: self.logs(),
        })
    }

    /// The end of both processes' logs.
    fn logs(&self) -> String {
        let tail = |name: &str| {
            let text = std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().rev().take(15).collect();
            let lines: Vec<&str> = lines.into_iter().rev().collect();
            format!("--- {name}\n{}", lines.join("\n"))
        };
        format!("{}\n{}", tail("etcd.log"), tail("kube-apiserver.log"))
    }

    pub(crate) fn running(&self) -> bool {
        self.keeper().running()
    }

    fn keeper(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&self) -> Result<(), Error> {
        self.keeper().stop()
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The port of its etcd on 127.0.0.1, without TLS.
    pub(crate) fn etcd(&self) -> u16 {
        self.ports.etcd
    }

    pub(crate) fn kubeconfig(&self, user: &str, groups: &[&str]) -> Result<String, Error> {
        kubeconfig(&self.authority, &self.url, user, groups)
    }

    /// A client of the group `system:masters`.
    pub(crate) async fn admin(&self) -> Result<Client, Error> {
        client(&self.kubeconfig("admin", &["system:masters"])?).await
    }
}

const ENDED: &str = "a process ended";

fn get(path: &str) -> Result<http::Request<Vec<u8>>, Error> {
    http::Request::get(path)
        .body(Vec::new())
        .map_err(|e| Error::Kubeconfig(e.to_string()))
}

fn write_certificates(authority: &Authority, dir: &Path) -> Result<(), Error> {
    let server = authority.server()?;
    let (token_key, token_pub) = pki::token_key()?;
    let files = [
        ("ca.crt", authority.pem()),
        ("server.crt", server.certificate),
        ("server.key", server.key),
        ("tokens.key", token_key),
        ("tokens.pub", token_pub),
    ];
    for (name, data) in files {
        std::fs::write(dir.join(name), data).map_err(io(format!("writing {name}")))?;
    }
    Ok(())
}

/// A temporary folder that goes with this process even if nobody drops it, as nobody drops
/// what a `static` has and nobody can after SIGKILL.
struct Folder {
    // Dropped before the folder is.
    _warden: Warden,
    dir: tempfile::TempDir,
}

impl Folder {
    fn new() -> Result<Self, Error> {
        let dir = tempfile::Builder::new()
            .prefix("test-apiserver-")
            .tempdir()
            .map_err(io("creating a temporary folder"))?;
        let warden = Warden::of(dir.path())?;
        Ok(Self {
            _warden: warden,
            dir,
        })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// A shell that waits until its input ends, and then removes the folder. In a process group
/// of its own, so that a Ctrl-C does not end it with the test.
struct Warden(Child);

/// The processes that write there are killed at the same moment and may write once more.
const REMOVE: &str = r#"read -r _; for _ in 1 2 3 4 5 6 7 8 9; do rm -rf -- "$0" && exit 0; sleep 0.2; done 2>/dev/null"#;

impl Warden {
    fn of(folder: &Path) -> Result<Self, Error> {
        use std::os::unix::process::CommandExt as _;
        let mut shell = Command::new("sh");
        shell.args(["-c", REMOVE]).arg(folder).process_group(0);
        shell
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = shell.spawn().map_err(io("starting a shell"))?;
        Ok(Self(child))
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(e) = self.0.wait() {
            eprintln!("removing the test API server's folder: {e}");
        }
    }
}
