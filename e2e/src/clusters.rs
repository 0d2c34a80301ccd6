//! The two kind clusters, `vf-host` and `vf-guest`: created side by side in one network,
//! with pod and service ranges that do not meet, so that a machine may join either.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::json;

use crate::docker::Docker;
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::progress;
use crate::tools::Tools;
use crate::wait::{self, Probe};

/// Name and ranges of one cluster.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    pub name: &'static str,
    pub pods: &'static str,
    pub services: &'static str,
}

/// The host's cluster: L1 joins it.
pub const HOST: Spec = Spec {
    name: "vf-host",
    pods: "10.244.0.0/16",
    services: "10.96.0.0/16",
};
/// The guest's cluster: L2 joins it.
pub const GUEST: Spec = Spec {
    name: "vf-guest",
    pods: "10.245.0.0/16",
    services: "10.97.0.0/16",
};

/// A running cluster.
#[derive(Clone)]
pub struct Cluster {
    pub spec: Spec,
    /// The node's address in [`crate::docker::NETWORK`].
    pub address: String,
    pub kubeconfig: PathBuf,
    client: Client,
    docker: Docker,
}

/// What `kubeadm join` needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// `name:port` of the API server; the name must resolve to [`Cluster::address`].
    pub endpoint: String,
    pub token: String,
    /// `sha256:…` of the cluster's CA key.
    pub ca_hash: String,
}

impl Cluster {
    /// The control plane's node, and its container.
    #[must_use]
    pub fn node(&self) -> String {
        node(self.spec)
    }

    /// A client with the rights of the cluster's administrator.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// A command inside the control plane's container.
    #[must_use]
    pub fn exec(&self) -> Cmd {
        self.docker.exec(&self.node())
    }

    /// Puts an image archive into the node's containerd.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        self.exec()
            .args([
                "ctr",
                "-n",
                "k8s.io",
                "images",
                "import",
                "--all-platforms",
                "--digests",
                "-",
            ])
            .stdin_file(archive)
            .timeout(Duration::from_secs(300))
            .run()
            .with_context(|| format!("importing {} into {}", archive.display(), self.spec.name))?;
        Ok(())
    }

    /// A fresh token for one more node.
    pub fn join(&self) -> Result<Join> {
        let text = self
            .exec()
            .args(["kubeadm", "token", "create", "--print-join-command"])
            .text()?;
        parse_join(&text).with_context(|| format!("not a join command: {text}"))
    }

    /// Routes `cidr` (another node's pods) by way of `via`, as kind's own network daemon would.
    pub fn add_route(&self, cidr: &str, via: &str) -> Result<()> {
        self.exec()
            .args(["ip", "route", "replace", cidr, "via", via])
            .run()?;
        Ok(())
    }

    /// A cluster that was made earlier.
    async fn open(paths: &Paths, docker: &Docker, spec: Spec) -> Result<Self> {
        let kubeconfig = kubeconfig(paths, spec);
        let parsed = Kubeconfig::read_from(&kubeconfig)?;
        let config = Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        let address = docker.address(&node(spec))?;
        Ok(Self {
            spec,
            address,
            kubeconfig,
            client,
            docker: docker.clone(),
        })
    }

    /// Ready for pods: the node is Ready and the default ServiceAccount, without which a
    /// pod is refused, is there.
    async fn ready(&self) -> Result<()> {
        let limit = Duration::from_secs(180);
        let every = Duration::from_millis(500);
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), "default");
        let what = format!("the default ServiceAccount of {}", self.spec.name);
        wait::until(&what, limit, every, || async {
            Ok(Probe::of(accounts.get_opt("default").await, "not there"))
        })
        .await?;
        let nodes: Api<Node> = Api::all(self.client());
        let name = self.node();
        wait::until(
            &format!("node {name} to be Ready"),
            limit,
            every,
            || async {
                Ok(match nodes.get_opt(&name).await {
                    Ok(Some(node)) => match not_ready(&node) {
                        None => Probe::Ready(()),
                        Some(why) => Probe::NotYet(why),
                    },
                    Ok(None) => Probe::NotYet("not registered".into()),
                    Err(e) => Probe::NotYet(e.to_string()),
                })
            },
        )
        .await
    }
}

/// Why a node is not Ready; nothing if it is.
#[must_use]
pub fn not_ready(node: &Node) -> Option<String> {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    let ready = conditions.and_then(|all| all.iter().find(|c| c.type_ == "Ready"));
    match ready {
        Some(c) if c.status == "True" => None,
        Some(c) => Some(
            c.message
                .clone()
                .unwrap_or_else(|| format!("Ready is {}", c.status)),
        ),
        None => Some("it reports no condition yet".into()),
    }
}

fn node(spec: Spec) -> String {
    format!("{}-control-plane", spec.name)
}

fn kubeconfig(paths: &Paths, spec: Spec) -> PathBuf {
    paths.state().join(format!("{}.kubeconfig", spec.name))
}

fn parse_join(text: &str) -> Option<Join> {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let after = |flag: &str| {
        let at = words.iter().position(|w| *w == flag)?;
        words.get(at + 1).map(|w| (*w).to_owned())
    };
    Some(Join {
        endpoint: after("join")?,
        token: after("--token")?,
        ca_hash: after("--discovery-token-ca-cert-hash")?,
    })
}

/// There is one of each, and on a busy machine a lease that could not be renewed in time
/// makes them start anew, which makes the machine busier still. A list replaces kind's
/// own, so what kind asks for (`enable-hostpath-provisioner`) stands here too.
const ALONE: &str = "\
controllerManager:
  extraArgs:
  - {name: enable-hostpath-provisioner, value: \"true\"}
  - {name: leader-elect, value: \"false\"}
scheduler:
  extraArgs:
  - {name: leader-elect, value: \"false\"}
";

/// A scenario that kills a program waits for its successor, not for a back-off.
const KUBELET: &str = "\
failCgroupV1: false
crashLoopBackOff:
  maxContainerRestartPeriod: 1s
";

/// kind reads JSON as YAML.
fn config(spec: Spec) -> String {
    let patch = |kind: &str, rest: &str| format!("kind: {kind}\n{rest}");
    json!({
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": {
            "disableDefaultCNI": true,
            "podSubnet": spec.pods,
            "serviceSubnet": spec.services,
        },
        "kubeadmConfigPatches": [
            patch("KubeletConfiguration", KUBELET),
            patch("InitConfiguration", "skipPhases: [preflight]\n"),
            patch("ClusterConfiguration", ALONE),
        ],
        "nodes": [{"role": "control-plane"}],
    })
    .to_string()
}

fn exists(tools: &Tools, docker: &Docker, spec: Spec) -> Result<bool> {
    let names = docker
        .with_host(tools.cmd("kind")?.args(["get", "clusters"]))
        .text()?;
    Ok(names.lines().any(|l| l == spec.name))
}

fn create(paths: &Paths, tools: &Tools, docker: &Docker, image: &str, spec: Spec) -> Result<()> {
    let kubeconfig = kubeconfig(paths, spec);
    if exists(tools, docker, spec)? {
        if kubeconfig.exists() && docker.running(&node(spec))? {
            return Ok(());
        }
        // Half made by a run that was killed, or stopped by a reboot: kind writes the
        // kubeconfig last, and does not start a cluster again.
        delete(paths, tools, docker, spec)?;
    }
    let command = tools
        .cmd("kind")?
        .args([
            "create", "cluster", "--name", spec.name, "--image", image, "--config", "-",
        ])
        .arg("--kubeconfig")
        .arg(&kubeconfig)
        .stdin(config(spec))
        .timeout(Duration::from_secs(600));
    docker
        .with_host(command)
        .run()
        .with_context(|| format!("creating {}", spec.name))?;
    Ok(())
}

/// Both clusters, created if they are not there, ready for pods.
pub async fn up(
    paths: &Paths,
    tools: &Tools,
    docker: &Docker,
    image: &str,
) -> Result<(Cluster, Cluster)> {
    progress::step("creating the host's and the guest's cluster", |_| {
        std::thread::scope(|s| {
            let other = s.spawn(|| create(paths, tools, docker, image, GUEST));
            let host = create(paths, tools, docker, image, HOST);
            let guest = other
                .join()
                .map_err(|_| anyhow!("creating {} panicked", GUEST.name))?;
            host.and(guest)
        })
    })?;
    let (host, guest) = find(paths, docker).await?;
    progress::step_async("waiting until both clusters take pods", async {
        tokio::try_join!(host.ready(), guest.ready())
    })
    .await?;
    Ok((host, guest))
}

/// The clusters of the running data centre.
pub async fn find(paths: &Paths, docker: &Docker) -> Result<(Cluster, Cluster)> {
    let host = Cluster::open(paths, docker, HOST).await?;
    let guest = Cluster::open(paths, docker, GUEST).await?;
    Ok((host, guest))
}

/// Deletes both clusters, existing or not.
pub fn down(paths: &Paths, tools: &Tools, docker: &Docker) -> Result<()> {
    for spec in [HOST, GUEST] {
        delete(paths, tools, docker, spec)?;
    }
    Ok(())
}

fn delete(paths: &Paths, tools: &Tools, docker: &Docker, spec: Spec) -> Result<()> {
    let file = kubeconfig(paths, spec);
    let delete = ["delete", "cluster", "--name", spec.name, "--kubeconfig"];
    docker
        .with_host(tools.cmd("kind")?.args(delete).arg(&file))
        .run()?;
    match std::fs::remove_file(&file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", file.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_command() {
        let text = "kubeadm join a:6443 --token t.x --discovery-token-ca-cert-hash sha256:00 \n";
        let join = parse_join(text).unwrap();
        assert_eq!(join.endpoint, "a:6443");
        assert_eq!(
            (join.token.as_str(), join.ca_hash.as_str()),
            ("t.x", "sha256:00")
        );
        assert_eq!(parse_join("nothing"), None);
    }
}
