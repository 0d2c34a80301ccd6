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
//! Keep the server in the test, not in a `static`: a static is never dropped, and its
//! temporary folder would stay.

pub mod gate;
mod keeper;
pub mod lease;
mod pki;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::{Value, json};

use crate::keeper::{Keeper, Layout, Ports};
use crate::pki::Authority;

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

/// A running API server with its etcd; stopped when dropped.
pub struct TestApiServer {
    // Before `dir`: fields drop in order, and the processes write there.
    keeper: Keeper,
    authority: Authority,
    admin: Client,
    url: String,
    dir: tempfile::TempDir,
}

impl TestApiServer {
    /// Starts both processes and returns when `/readyz` says ok.
    pub async fn start() -> Result<Self, Error> {
        // An error means that the test has installed one, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
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
        let dir = tempfile::Builder::new()
            .prefix("test-apiserver-")
            .tempdir()
            .map_err(io("creating a temporary folder"))?;
        let authority = Authority::new()?;
        write_certificates(&authority, dir.path())?;
        let ports = Ports::pick().map_err(io("picking free ports"))?;
        let layout = Layout {
            binaries: binaries.to_owned(),
            dir: dir.path().to_owned(),
        };
        let keeper = Keeper::start(&layout, ports)?;
        let url = format!("https://127.0.0.1:{}", ports.api);
        let text = kubeconfig(&authority, &url, "admin", &["system:masters"])?;
        let admin = client(&text).await?;
        let server = Self {
            keeper,
            authority,
            admin,
            url,
            dir,
        };
        server.ready().await?;
        Ok(server)
    }

    async fn ready(&self) -> Result<(), Error> {
        let begun = Instant::now();
        let mut last = String::new();
        while begun.elapsed() < READY {
            if !self.keeper.running() {
                return Err(Error::NotReady {
                    last: ENDED.into(),
                    log: self.logs(),
                });
            }
            match self.admin.request_text(get("/readyz")?).await {
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
            let text = std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().rev().take(15).collect();
            let lines: Vec<&str> = lines.into_iter().rev().collect();
            format!("--- {name}\n{}", lines.join("\n"))
        };
        format!("{}\n{}", tail("etcd.log"), tail("kube-apiserver.log"))
    }

    /// A client of the group `system:masters`.
    #[must_use]
    pub fn admin(&self) -> Client {
        self.admin.clone()
    }

    /// The server's address, `https://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A client that authenticates as `user` by certificate, in at most one group.
    pub async fn client_for(&self, user: &str, groups: &[&str]) -> Result<Client, Error> {
        client(&self.kubeconfig_for(user, groups)?).await
    }

    /// A kubeconfig for `user` by certificate, in at most one group; all data inline.
    pub fn kubeconfig_for(&self, user: &str, groups: &[&str]) -> Result<String, Error> {
        kubeconfig(&self.authority, &self.url, user, groups)
    }

    /// Applies every CRD in the YAML files of `dir` and waits until each is established.
    pub async fn install_crds(&self, dir: &Path) -> Result<(), Error> {
        let kind = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
        let crds: Api<DynamicObject> = Api::all_with(self.admin(), &ApiResource::from_gvk(&kind));
        let found = read_crds(dir)?;
        if found.is_empty() {
            return Err(Error::Yaml {
                path: dir.to_owned(),
                why: "no CRD found".into(),
            });
        }
        for (name, crd) in &found {
            let params = PatchParams::apply("test-apiserver").force();
            crds.patch(name, &params, &Patch::Apply(crd))
                .await
                .map_err(|e| Error::Api {
                    what: format!("applying CRD {name}"),
                    source: Box::new(e),
                })?;
        }
        for (name, _) in &found {
            established(&crds, name).await?;
        }
        Ok(())
    }

    /// Stops the API server, then etcd, and reports what a drop could only print.
    pub async fn stop(mut self) -> Result<(), Error> {
        let stopped = tokio::task::spawn_blocking(move || self.keeper.stop()).await;
        stopped.map_err(|e| Error::Ended(e.to_string()))?
    }
}

const ENDED: &str = "a process ended";

fn get(path: &str) -> Result<http::Request<Vec<u8>>, Error> {
    http::Request::get(path)
        .body(Vec::new())
        .map_err(|e| Error::Kubeconfig(e.to_string()))
}

async fn established(crds: &Api<DynamicObject>, name: &str) -> Result<(), Error> {
    let begun = Instant::now();
    loop {
        let crd = crds.get(name).await.map_err(|e| Error::Api {
            what: format!("reading CRD {name}"),
            source: Box::new(e),
        })?;
        let conditions = crd
            .data
            .pointer("/status/conditions")
            .cloned()
            .unwrap_or(Value::Null);
        let yes = conditions.as_array().is_some_and(|all| {
            all.iter().any(|c| {
                c.get("type") == Some(&json!("Established"))
                    && c.get("status") == Some(&json!("True"))
            })
        });
        if yes {
            return Ok(());
        }
        if begun.elapsed() > ESTABLISHED {
            return Err(Error::NotEstablished {
                name: name.to_owned(),
                last: conditions.to_string(),
            });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn read_crds(dir: &Path) -> Result<Vec<(String, Value)>, Error> {
    let bad = |path: &Path, why: String| Error::Yaml {
        path: path.to_owned(),
        why,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io(format!("reading {}", dir.display())))? {
        let path = entry
            .map_err(io(format!("reading {}", dir.display())))?
            .path();
        if path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
        {
            files.push(path);
        }
    }
    files.sort();
    let mut crds = Vec::new();
    for path in files {
        let text =
            std::fs::read_to_string(&path).map_err(io(format!("reading {}", path.display())))?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).map_err(|e| bad(&path, e.to_string()))?;
        for doc in documents {
            if doc.get("kind") != Some(&json!("CustomResourceDefinition")) {
                continue;
            }
            let name = doc.pointer("/metadata/name").and_then(Value::as_str);
            let name = name
                .ok_or_else(|| bad(&path, "a CRD without a name".into()))?
                .to_owned();
            crds.push((name, doc));
        }
    }
    Ok(crds)
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

async fn client(text: &str) -> Result<Client, Error> {
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
