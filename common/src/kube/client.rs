//! A `kube::Client` that follows its files: when the kubeconfig, or a
//! certificate, key or CA that it names, changes, later requests go through a
//! new connection with the new identity. kube reads client certificates once,
//! and certificates are renewed under a running program.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use http::{Request, Response};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tower::Service;

use super::limit::Limiter;
use crate::cli::KubeArgs;

/// How often the files are looked at. Mounted Secrets change by renamed
/// symlinks, which inotify on the file does not see; a look costs some KiB.
const LOOK: Duration = Duration::from_secs(5);

/// Why there is no client.
#[derive(Debug, Error)]
pub enum ClientError {
    #[error("kubeconfig {}: {source}", .path.display())]
    Kubeconfig {
        path: PathBuf,
        source: Box<KubeconfigError>,
    },
    #[error("no kubeconfig given (--kubeconfig) and not in a cluster: {0}")]
    InCluster(#[source] Box<kube::config::InClusterError>),
    #[error("TLS to the API server: {0}")]
    Build(#[source] Box<kube::Error>),
}

/// Where the API server is and how hard it may be worked.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Left out: the pod's ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// Requests a second, 0 for no limit.
    pub qps: f64,
    pub burst: u32,
    /// How often the files are looked at.
    pub look: Duration,
}

impl From<&KubeArgs> for ClientOptions {
    fn from(args: &KubeArgs) -> Self {
        Self {
            kubeconfig: args.kubeconfig.clone(),
            qps: args.kube_api_qps,
            burst: args.kube_api_burst,
            look: LOOK,
        }
    }
}

/// Makes ring the process's TLS provider; call it first in `main`. Two
/// providers in one build make rustls refuse to choose.
pub fn install_crypto() {
    // An error says that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The client and the task that follows its files; dropping it stops the
/// following, not the client.
pub struct KubeClient {
    client: Client,
    _follower: Option<AbortOnDropHandle<()>>,
}

impl KubeClient {
    /// Reads the files and builds the client. Needs a tokio runtime.
    pub async fn new(options: &ClientOptions) -> Result<Self, ClientError> {
        install_crypto();
        let (config, files) = load(options.kubeconfig.as_deref()).await?;
        let namespace = config.default_namespace.clone();
        let (send, current) = watch::channel(build(config)?);
        let follower = options.kubeconfig.clone().map(|path| {
            let task = follow(path, files, send, options.look);
            AbortOnDropHandle::new(tokio::spawn(task))
        });
        let service = Reloading {
            current,
            limiter: Limiter::new(options.qps, options.burst).map(Arc::new),
        };
        Ok(Self {
            client: Client::new(service, namespace),
            _follower: follower,
        })
    }

    /// The client; clones of it follow the files too.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }
}

/// Content of the files that a configuration was made from.
type Seen = BTreeMap<PathBuf, Option<[u8; 32]>>;

async fn load(path: Option<&Path>) -> Result<(Config, Seen), ClientError> {
    let Some(path) = path else {
        // kube itself reads the token and the CA again there.
        let config = Config::incluster().map_err(|e| ClientError::InCluster(Box::new(e)))?;
        return Ok((config, Seen::new()));
    };
    let fail = |source| ClientError::Kubeconfig {
        path: path.to_owned(),
        source: Box::new(source),
    };
    // Read before use: a change in between is then seen at the next look.
    let kubeconfig = read(path).map_err(fail)?;
    let seen = look(path, &kubeconfig);
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(fail)?;
    Ok((config, seen))
}

/// Reads a kubeconfig. kube takes UTF-16 too, and panics at a file of it that is cut off within
/// a character, as one that is just being written is: that would end the following.
fn read(path: &Path) -> Result<Kubeconfig, KubeconfigError> {
    let fail = |source| KubeconfigError::ReadConfig(source, path.to_owned());
    let bytes = std::fs::read(path).map_err(fail)?;
    let utf16 = bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]);
    if utf16 && !bytes.len().is_multiple_of(2) {
        let cut = "it is UTF-16 and ends within a character";
        return Err(fail(io::Error::new(io::ErrorKind::InvalidData, cut)));
    }
    Kubeconfig::read_from(path)
}

fn build(config: Config) -> Result<Client, ClientError> {
    Client::try_from(config).map_err(|e| ClientError::Build(Box::new(e)))
}

/// The kubeconfig and the files that it names, with what is in them.
fn look(path: &Path, kubeconfig: &Kubeconfig) -> Seen {
    let users = kubeconfig
        .auth_infos
        .iter()
        .filter_map(|user| user.auth_info.as_ref())
        .flat_map(|user| [&user.client_certificate, &user.client_key]);
    let clusters = kubeconfig
        .clusters
        .iter()
        .filter_map(|cluster| cluster.cluster.as_ref())
        .map(|cluster| &cluster.certificate_authority);
    // `read` has made relative names absolute.
    let named = users.chain(clusters).flatten().map(PathBuf::from);
    std::iter::once(path.to_owned())
        .chain(named)
        .map(|file| {
            let digest = std::fs::read(&file)
                .ok()
                .map(|content| Sha256::digest(content).into());
            (file, digest)
        })
        .collect()
}

/// Sends a new client when the files have changed and make one. Half-written
/// files fail to load, are logged once, and are looked at again.
async fn follow(path: PathBuf, mut seen: Seen, clients: watch::Sender<Client>, every: Duration) {
    let mut failed = None;
    loop {
        tokio::time::sleep(every).await;
        let now = match read(&path) {
            Ok(kubeconfig) => look(&path, &kubeconfig),
            Err(_) => look(&path, &Kubeconfig::default()),
        };
        if now == seen || failed.as_ref() == Some(&now) {
            continue;
        }
        match load(Some(&path))
            .await
            .and_then(|(c, s)| Ok((build(c)?, s)))
        {
            Ok((client, files)) => {
                tracing::info!(kubeconfig = %path.display(), "kubeconfig or its files changed; connecting anew");
                seen = files;
                failed = None;
                if clients.send(client).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "changed kubeconfig is not usable; the old one stays in use");
                failed = Some(now);
            }
        }
    }
}

/// For the fuzzers, which lie outside of this crate (room `fuzz`): reads a kubeconfig as the
/// programs do, and the client that it makes, if `may` lets it be made (kube starts the programs
/// that a kubeconfig names). Answers the files that are followed.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub async fn load_for_fuzzing(
    path: &Path,
    may: impl FnOnce(&Config) -> bool,
) -> Result<Vec<PathBuf>, ClientError> {
    install_crypto();
    let (config, seen) = load(Some(path)).await?;
    if may(&config) {
        build(config)?;
    }
    Ok(seen.into_keys().collect())
}

/// Sends each request through the client of the moment.
struct Reloading {
    current: watch::Receiver<Client>,
    limiter: Option<Arc<Limiter>>,
}

impl Service<Request<Body>> for Reloading {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, kube::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), kube::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let client = self.current.borrow().clone();
        let wait = self
            .limiter
            .as_ref()
            .map_or(Duration::ZERO, |limiter| limiter.take(Instant::now()));
        Box::pin(async move {
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            client.send(request).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_cut_off_within_a_character_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        for mark in [[0xff, 0xfe], [0xfe, 0xff]] {
            std::fs::write(&path, [&mark[..], b"{"].concat()).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("UTF-16"), "{error}");
        }
        let text: Vec<u8> = "kind: Config\n"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        std::fs::write(&path, [&[0xff, 0xfe], &text[..]].concat()).unwrap();
        assert_eq!(read(&path).unwrap().kind.as_deref(), Some("Config"));
    }
}
