//! A real API server for tests: etcd and kube-apiserver as processes, in a temporary
//! folder, on free ports of 127.0.0.1, with RBAC on and client certificates for any user.
//!
//! The binaries come from `KUBEBUILDER_ASSETS`, else from where `cargo e2e tools` left
//! them. Without them [`TestApiServer::start`] fails; nothing is ever skipped.
//!
//! ```no_run
//! # async fn f() -> Result<(), test_apiserver::Error> {
//! let api = test_apiserver::TestApiServer::start().await?;
//! let client = api.admin();
//! # drop(client);
//! api.stop().await
//! # }
//! ```
//!
//! A server takes seconds to start and a test often less to run, so tests borrow one
//! ([`TestApiServer::lend`]): what an earlier test of the process is done with is put back
//! to what it was when new. [`TestApiServer::start`] is for a test that does to a server what
//! cannot be undone.

pub mod blind;
mod crds;
mod etcd;
pub mod gate;
mod keeper;
pub mod lease;
mod pki;
mod pool;
mod process;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;

use crate::pki::Authority;
use crate::pool::Loan;

/// How long the server may take to get ready. It needs 3 to 4 s on an idle machine.
const READY: Duration = Duration::from_secs(120);
/// How long a CRD may take to be established.
const ESTABLISHED: Duration = Duration::from_secs(30);

/// Why there is no server, or why it did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no etcd and kube-apiserver in {looked}: run `cargo e2e tools`, or set \
         KUBEBUILDER_ASSETS to a folder that has both"
    )]
    NoBinaries { looked: String },
    #[error("{what}: {source}")]
    Io {
        what: String,
        source: std::io::Error,
    },
    #[error("making a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("the API server was not ready after {} s: {last}\n{log}", READY.as_secs())]
    NotReady { last: String, log: String },
    #[error("{0}")]
    Ended(String),
    #[error("a client certificate of this harness carries one group, not {0}")]
    Groups(usize),
    #[error("kubeconfig: {0}")]
    Kubeconfig(String),
    #[error("{what}: {source}")]
    Api {
        what: String,
        source: Box<kube::Error>,
    },
    #[error("etcd: {0}")]
    Etcd(String),
    #[error("this server was stopped")]
    Stopped,
    #[error("never were {0} requests held at the gate")]
    NotHeld(usize),
    #[error("{}: {why}", .path.display())]
    Yaml { path: PathBuf, why: String },
    #[error("CRD {name} was not established after {} s: {last}", ESTABLISHED.as_secs())]
    NotEstablished { name: String, last: String },
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// A running API server with its etcd.
pub struct TestApiServer {
    loan: Arc<Loan>,
    admin: Client,
}

impl TestApiServer {
    /// A server of one's own, ready when this returns and stopped when it is dropped.
    pub async fn start() -> Result<Self, Error> {
        prepare();
        Self::of(pool::own().await?).await
    }

    /// A server with the CRDs of the YAML files in `folders` and nothing else: one that an
    /// earlier test of this process has ended with, or a new one. It is given back when it
    /// is dropped and the runtime that it was lent in has ended, so nobody still writes.
    pub async fn lend(folders: &[&Path]) -> Result<Self, Error> {
        prepare();
        Self::of(pool::lend(folders).await?).await
    }

    async fn of(loan: Arc<Loan>) -> Result<Self, Error> {
        // Of this runtime: a client does not outlive the one that it was made in.
        let admin = loan.process()?.admin().await?;
        Ok(Self { loan, admin })
    }

    /// A client of the group `system:masters`.
    #[must_use]
    pub fn admin(&self) -> Client {
        self.admin.clone()
    }

    /// The server's address, `https://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> &str {
        self.loan.url()
    }

    /// A client that authenticates as `user` by certificate, in at most one group.
    pub async fn client_for(&self, user: &str, groups: &[&str]) -> Result<Client, Error> {
        client(&self.kubeconfig_for(user, groups)?).await
    }

    /// A kubeconfig for `user` by certificate, in at most one group; all data inline.
    pub fn kubeconfig_for(&self, user: &str, groups: &[&str]) -> Result<String, Error> {
        self.loan.process()?.kubeconfig(user, groups)
    }

    /// Applies every CRD in the YAML files of `dir` and waits until each is established.
    pub async fn install_crds(&self, dir: &Path) -> Result<(), Error> {
        crds::install(&self.admin, dir).await
    }

    /// Stops the API server, then etcd, and reports what a drop could only print. Nobody
    /// gets this server any more.
    pub async fn stop(self) -> Result<(), Error> {
        let loan = Arc::clone(&self.loan);
        let stopped = tokio::task::spawn_blocking(move || loan.process()?.stop()).await;
        stopped.map_err(|e| Error::Ended(e.to_string()))?
    }
}

impl Drop for TestApiServer {
    fn drop(&mut self) {
        self.loan.returns();
    }
}

fn prepare() {
    // An error means that the test has installed one, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn kubeconfig(ca: &Authority, url: &str, user: &str, groups: &[&str]) -> Result<String, Error> {
    if groups.len() > 1 {
        return Err(Error::Groups(groups.len()));
    }
    let id = ca.client(user, groups)?;
    let b64 = |s: &str| base64(s.as_bytes());
    // JSON is YAML, and every client reads it.
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {
            "server": url, "certificate-authority-data": b64(&ca.pem()),
        }}],
        "users": [{"name": user, "user": {
            "client-certificate-data": b64(&id.certificate), "client-key-data": b64(&id.key),
        }}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
    });
    Ok(config.to_string())
}

pub(crate) async fn client(text: &str) -> Result<Client, Error> {
    let bad = |e: &dyn std::fmt::Display| Error::Kubeconfig(e.to_string());
    let parsed = Kubeconfig::from_yaml(text).map_err(|e| bad(&e))?;
    let config = Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default())
        .await
        .map_err(|e| bad(&e))?;
    Client::try_from(config).map_err(|e| bad(&e))
}

fn find_binaries(var: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, Error> {
    let set = |name| var(name).filter(|p| !p.as_os_str().is_empty());
    let candidates: Vec<PathBuf> = match set("KUBEBUILDER_ASSETS") {
        Some(dir) => vec![dir],
        None => [
            set("VF_E2E_CACHE"),
            set("XDG_CACHE_HOME").map(|d| d.join("vf-provisioner-e2e")),
            set("HOME").map(|d| d.join(".cache/vf-provisioner-e2e")),
        ]
        .into_iter()
        .flatten()
        .map(|cache| cache.join("assets"))
        .collect(),
    };
    let has = |d: &&PathBuf| d.join("etcd").is_file() && d.join("kube-apiserver").is_file();
    if let Some(dir) = candidates.iter().find(has) {
        return Ok(dir.clone());
    }
    let looked: Vec<String> = candidates.iter().map(|c| c.display().to_string()).collect();
    Err(Error::NoBinaries {
        looked: looked.join(", "),
    })
}

fn base64(data: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(data)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn absent_binaries_are_an_error_that_says_what_to_do() {
        let err = find_binaries(|_| Some(PathBuf::from("/nowhere")))
            .unwrap_err()
            .to_string();
        assert!(
            err.contains("cargo e2e tools") && err.contains("/nowhere"),
            "{err}"
        );
    }

    #[test]
    fn more_groups_than_carried_are_refused() {
        let ca = Authority::new().unwrap();
        assert!(kubeconfig(&ca, "https://x", "u", &["a", "b"]).is_err());
    }
}
