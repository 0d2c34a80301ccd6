//! L1, the emulated node of the host's cluster: starts and ends its QEMU and the switch
//! on its wire, joins it to the cluster, and runs commands in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ::channel::protocol::Work;
use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Node;
use kube::Api;

use super::channel::{self, Channel, Output};
use super::image::Image;
use super::switch::Switch;
use super::trace::{self, TraceEvent};
use super::{mend, network, qemu};
use crate::clusters::{Cluster, Join, not_ready};
use crate::context::DataCentre;
use crate::daemon::Daemon;
use crate::docker;
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::progress;
use crate::wait::{self, Probe};

/// Name of the node.
pub const NODE: &str = "l1";
/// Sockets lie here: their paths are limited to 108 bytes, a cache's may be longer.
const RUN: &str = "/run/vf-provisioner-e2e/l1";
/// A whole boot takes about half a minute on an idle machine.
const BOOT: Duration = Duration::from_secs(600);
/// Addresses the switch answers for.
pub const SWITCH_ADDRESSES: [&str; 2] = ["10.9.0.1", "10.9.1.1"];
const MEMORY_MIB: u32 = 7168;
/// Bytes of a namespace: each is read whole several times in a scenario.
const DISK: u64 = 8 << 20;

/// A running L1.
#[derive(Clone, Debug)]
pub struct L1 {
    channel: Channel,
    share: PathBuf,
    /// Name of the kernel in the image's /boot; VMs boot it too.
    pub(super) kernel: String,
}

impl L1 {
    pub(super) fn at(paths: &Paths, image: &Image) -> Self {
        Self {
            channel: Channel::new(Path::new(RUN), qemu::PORTS),
            share: share(paths),
            kernel: image.kernel_name.clone(),
        }
    }

    /// Runs a shell command as root; any exit status is a result. At most a minute.
    pub async fn run(&self, command: &str) -> Result<Output> {
        self.run_with(command, &[], Duration::from_secs(60)).await
    }

    /// Like [`Self::run`], but an exit status other than 0 is an error.
    pub async fn ok(&self, command: &str) -> Result<Output> {
        self.run(command).await?.ok(command)
    }

    /// Runs a shell command with `stdin`, for at most `limit`.
    pub async fn run_with(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<Output> {
        self.channel
            .ask(channel::command(command, stdin), limit)
            .await
    }

    /// Has the agent do other work than a command.
    pub(super) async fn ask(&self, work: Work, limit: Duration) -> Result<Output> {
        self.channel.ask(work, limit).await
    }

    /// Says `say` to a unix socket of L1 and returns all that is said up to a line with
    /// `until` in it.
    pub async fn talk(&self, socket: &str, say: &str, until: &str) -> Result<String> {
        let work = Work::Talk {
            socket: socket.to_owned(),
            say: say.to_owned(),
            until: until.to_owned(),
        };
        let out = self.ask(work, Duration::from_secs(60)).await?;
        Ok(out.ok(&format!("talking to {socket}"))?.text())
    }

    /// Every write to sriov_numvfs and every driver bound or released since boot.
    pub async fn write_trace(&self) -> Result<Vec<TraceEvent>> {
        let out = self.ok("cat /run/harness/write-trace").await?;
        trace::parse(&String::from_utf8_lossy(&out.stdout))
    }

    /// Puts a container image archive into the node's containerd.
    pub async fn import_image(&self, archive: &Path) -> Result<()> {
        let place = self.bring(archive)?;
        let command = format!("ctr --connect-timeout 60s -n k8s.io images import {place}");
        self.run_with(&command, &[], Duration::from_secs(300))
            .await?
            .ok(&command)?;
        Ok(())
    }

    /// Makes a file visible in L1 and returns its path there.
    pub fn bring(&self, file: &Path) -> Result<String> {
        let name = file.file_name().context("a file needs a name")?;
        // Copied beside and renamed: L1 may be reading the old one.
        let fresh = self.share.join(format!(".{}", name.to_string_lossy()));
        std::fs::copy(file, &fresh).with_context(|| format!("copying {}", file.display()))?;
        std::fs::rename(&fresh, self.share.join(name))?;
        Ok(format!("/harness/{}", name.to_string_lossy()))
    }
}

fn share(paths: &Paths) -> PathBuf {
    paths.state().join("l1-share")
}

fn overlay(paths: &Paths) -> PathBuf {
    paths.state().join("l1.qcow2")
}

/// L1's namespaces: sparse files.
fn disks(paths: &Paths) -> [PathBuf; 2] {
    ["l1-disk1.raw", "l1-disk2.raw"].map(|name| paths.state().join(name))
}

/// The switch of the managed PF's wire.
pub(super) fn switch() -> Switch {
    Switch::at(&Path::new(RUN).join("switch.sock"))
}

/// Starts what does not run and waits until L1 answers.
pub(super) async fn up(dc: &DataCentre, image: &Image) -> Result<L1> {
    let paths = &dc.ctx.paths;
    std::fs::create_dir_all(RUN)?;
    std::fs::create_dir_all(share(paths))?;
    network::up()?;
    start_switch(paths)?;
    start_qemu(dc, image)?;
    let l1 = L1::at(paths, image);
    progress::step_async("booting L1", async {
        wait::until("L1 to answer", BOOT, Duration::from_secs(1), || async {
            match Daemon::find(&paths.state(), NODE)? {
                Some(d) => d.check("L1's QEMU")?,
                None => anyhow::bail!("L1's QEMU has no pid file"),
            }
            let command = "systemctl is-active -q containerd && mountpoint -q /harness && \
                 systemctl is-active -q harness-network";
            Ok(Probe::of(
                l1.run_with(command, &[], Duration::from_secs(20))
                    .await
                    .and_then(|o| o.ok(command))
                    .map(|_| Some(())),
                "it boots",
            ))
        })
        .await
    })
    .await?;
    Ok(l1)
}

fn start_switch(paths: &Paths) -> Result<()> {
    if Daemon::find(&paths.state(), "switch")?.is_some_and(|d| d.alive()) {
        return Ok(());
    }
    let run = Path::new(RUN);
    let path = |name: &str| run.join(name).display().to_string();
    let mut command = vec![
        std::env::current_exe()?.display().to_string(),
        "switch".into(),
        "--wire".into(),
        path("wire-switch.sock"),
        "--peer".into(),
        path("wire-machine.sock"),
        "--control".into(),
        path("switch.sock"),
    ];
    for a in SWITCH_ADDRESSES {
        command.extend(["--address".into(), a.into()]);
    }
    let log = paths.state().join("switch.log");
    Daemon::spawn(&paths.state(), "switch", &command, &log)?;
    Ok(())
}

fn start_qemu(dc: &DataCentre, image: &Image) -> Result<()> {
    let paths = &dc.ctx.paths;
    if Daemon::find(&paths.state(), NODE)?.is_some_and(|d| d.alive()) {
        return Ok(());
    }
    let overlay = overlay(paths);
    let mut create = image.command("usr/bin/qemu-img").into_iter();
    let program = create.next().context("no program")?;
    Cmd::new(program)
        .args(create)
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(&image.disk)
        .arg(&overlay)
        .run()?;
    let disks = disks(paths);
    for disk in &disks {
        std::fs::File::create(disk)
            .and_then(|file| file.set_len(DISK))
            .with_context(|| format!("making {}", disk.display()))?;
    }
    let hosts = [&dc.host, &dc.guest].map(|c| (c.node(), c.address.clone()));
    let address = format!("{}/{}", network::ADDRESS, network::PREFIX);
    let mend = mend::ensure(paths)?;
    let spec = qemu::Spec {
        name: NODE,
        mend: &mend,
        dir: Path::new(RUN),
        share: &share(paths),
        overlay: &overlay,
        tap: network::TAP,
        address: &address,
        gateway: docker::GATEWAY,
        hosts: &hosts,
        memory_mib: MEMORY_MIB,
        disks: &disks,
        bare: dc.ctx.bare,
    };
    // QEMU's modules lie beside its libraries, not where the program expects them.
    let modules = image.root.join("usr/lib/x86_64-linux-gnu/qemu");
    let mut command: Vec<String> = vec!["env".into()];
    command.extend([format!("QEMU_MODULE_DIR={}", modules.display())]);
    command.extend(qemu::command(image, &spec));
    let log = paths.state().join("l1-qemu.log");
    Daemon::spawn(&paths.state(), NODE, &command, &log)?;
    Ok(())
}

/// Makes L1 a Ready node of the host's cluster, with routes to and from its pods.
pub(super) async fn join(l1: &L1, host: &Cluster) -> Result<()> {
    let nodes: Api<Node> = Api::all(host.client());
    progress::step_async("joining L1 to the host's cluster", async {
        l1.run_with(IMPORT, &[], Duration::from_secs(300))
            .await?
            .ok(IMPORT)?;
        let command = join_command(&host.join()?, NODE);
        l1.run_with(&command, &[], Duration::from_secs(300))
            .await?
            .ok(&command)?;
        let node = ready(&nodes, NODE).await?;
        let cidr = pod_cidr(&node).context("the node has no podCIDR")?;
        host.add_route(&cidr, network::ADDRESS)?;
        let other = nodes.get(&host.node()).await?;
        let other = pod_cidr(&other).context("the control plane has no podCIDR")?;
        l1.ok(&format!("ip route replace {other} via {}", host.address))
            .await?;
        Ok(())
    })
    .await
}

/// Images that the machine image brings along for every node.
/// Nothing is to be done on a machine that has joined.
pub(super) const IMPORT: &str = "test -e /etc/kubernetes/kubelet.conf && exit; for f in /usr/lib/harness/images/*.tar; do \
     ctr --connect-timeout 60s -n k8s.io images import $f || exit; done";

/// Does nothing on a machine that has joined.
pub(super) fn join_command(join: &Join, node: &str) -> String {
    format!(
        "test -e /etc/kubernetes/kubelet.conf || kubeadm join {} --token {} \
         --discovery-token-ca-cert-hash {} --ignore-preflight-errors=all --node-name {node}",
        join.endpoint, join.token, join.ca_hash
    )
}

fn pod_cidr(node: &Node) -> Option<String> {
    node.spec.as_ref()?.pod_cidr.clone()
}

/// The node `name`, once it is Ready.
pub(super) async fn ready(nodes: &Api<Node>, name: &str) -> Result<Node> {
    let limit = Duration::from_secs(400);
    let what = format!("node {name} to be Ready");
    wait::until(&what, limit, Duration::from_secs(1), || async {
        Ok(match nodes.get_opt(name).await {
            Ok(Some(node)) => match not_ready(&node) {
                None => Probe::Ready(node),
                Some(why) => Probe::NotYet(why),
            },
            Ok(None) => Probe::NotYet("not registered".into()),
            Err(e) => Probe::NotYet(e.to_string()),
        })
    })
    .await
}

/// Whether L1's QEMU was started and does not run.
pub(super) fn died(paths: &Paths) -> Result<bool> {
    Ok(Daemon::find(&paths.state(), NODE)?.is_some_and(|d| !d.alive()))
}

/// Ends QEMU and the switch, and removes the tap, the overlay and the sockets.
pub(super) fn down(paths: &Paths) -> Result<()> {
    for name in [NODE, "switch"] {
        if let Some(d) = Daemon::find(&paths.state(), name)? {
            d.stop(Duration::from_secs(5))?;
        }
    }
    network::down()?;
    for path in [Path::new(RUN), &share(paths)] {
        if path.is_dir() {
            std::fs::remove_dir_all(path)?;
        }
    }
    for file in disks(paths).into_iter().chain([overlay(paths)]) {
        if file.exists() {
            std::fs::remove_file(&file)?;
        }
    }
    Ok(())
}
