//! L2, a tenant's VM: makes its objects in the host's cluster, waits until it runs, joins
//! it to the guest's cluster, and runs commands in it through L1. Writes to both clusters
//! and, by the launcher, to its pod.

use std::path::Path;
use std::time::Duration;

use ::channel::protocol::{Answer, Work};
use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use super::channel::{self, Output};
use super::domain::{self, CHANNEL_DIR_REAL, MONITOR_REAL, NAMESPACE, Vm};
use super::l1::{self, L1};
use super::objects;
use crate::archive;
use crate::clusters::Cluster;
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::progress;
use crate::wait::{self, Probe};

/// How long the relay and L1 may take on top of a command.
const RELAY: Duration = Duration::from_secs(20);
const BOOT: Duration = Duration::from_secs(600);
const EVERY: Duration = Duration::from_secs(1);
const MANAGER: &str = "vf-e2e";

/// A running VM.
#[derive(Clone, Debug)]
pub struct L2 {
    l1: L1,
    name: String,
    pod_uid: String,
    /// Of QEMU, in L1.
    pid: u32,
}

impl L2 {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// UID of the launcher pod.
    #[must_use]
    pub fn pod_uid(&self) -> &str {
        &self.pod_uid
    }

    /// QEMU's process in L1.
    #[must_use]
    pub fn qemu_pid(&self) -> u32 {
        self.pid
    }

    /// Runs a shell command as root in the VM; any exit status is a result. At most a minute.
    pub async fn run(&self, command: &str) -> Result<Output> {
        self.run_with(command, &[], Duration::from_secs(60)).await
    }

    /// Like [`Self::run`], but an exit status other than 0 is an error.
    pub async fn ok(&self, command: &str) -> Result<Output> {
        self.run(command).await?.ok(command)
    }

    /// Runs a shell command with `stdin`, for at most `limit`.
    pub async fn run_with(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<Output> {
        let request = channel::request(channel::command(command, stdin), limit);
        let sockets = format!("/proc/{}/root{CHANNEL_DIR_REAL}", self.pid);
        let relay = Work::Relay {
            sockets: sockets.clone(),
            request: request.line(),
        };
        let out = self
            .l1
            .ask(relay, limit + RELAY)
            .await?
            .ok(&sockets)
            .with_context(|| format!("running `{command}` in {}", self.name))?;
        let answer = Answer::parse(&String::from_utf8_lossy(&out.stdout), &request.id)?;
        let answer = answer.with_context(|| format!("{} answered another request", self.name))?;
        Ok(answer.into())
    }

    /// Executes one QMP command over the harness's own monitor of the VM's QEMU.
    pub async fn qmp(&self, execute: &str, arguments: &Value) -> Result<Value> {
        const ID: &str = "vf-e2e";
        let socket = format!("/proc/{}/root{MONITOR_REAL}", self.pid);
        let request = json!({"execute": execute, "arguments": arguments, "id": ID});
        let say = format!("{}\n{request}\n", json!({"execute": "qmp_capabilities"}));
        let said = self
            .l1
            .talk(&socket, &say, &format!("\"id\": \"{ID}\""))
            .await?;
        let last = said.lines().last().unwrap_or_default();
        let mut answer: Value =
            serde_json::from_str(last).with_context(|| format!("{execute}: QEMU said {last:?}"))?;
        if let Some(error) = answer.get("error") {
            anyhow::bail!("QEMU refused {execute}: {error}");
        }
        Ok(answer
            .get_mut("return")
            .map(Value::take)
            .unwrap_or_default())
    }
}

/// What a VM is to the host's cluster.
pub(super) async fn define(host: &Cluster) -> Result<()> {
    apply(host, &objects::definition()).await?;
    let crds: Api<CustomResourceDefinition> = Api::all(host.client());
    let name = "virtualmachineinstances.kubevirt.io";
    let limit = Duration::from_secs(60);
    wait::until("the VMI's definition", limit, EVERY / 4, || async {
        let crd = crds.get(name).await?;
        let conditions = crd.status.and_then(|s| s.conditions).unwrap_or_default();
        let ok = conditions
            .iter()
            .any(|c| c.type_ == "Established" && c.status == "True");
        Ok(Probe::of::<String>(Ok(ok.then_some(())), "not established"))
    })
    .await
}

/// What L1 and the host's cluster need before the first VM: the namespace, the launcher's
/// image and the device plugin.
pub(super) async fn prepare(l1: &L1, host: &Cluster, paths: &Paths) -> Result<()> {
    progress::step_async("preparing L1 for VMs", async {
        apply(
            host,
            &json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE},
            }),
        )
        .await?;
        l1.import_image(&launcher_image(paths)?).await?;
        start_plugin(l1).await
    })
    .await
}

/// The launcher's image: links into L1's /usr, users, and empty folders.
fn launcher_image(paths: &Paths) -> Result<std::path::PathBuf> {
    let dir = tempfile::tempdir_in(paths.state())?;
    let root = dir.path().join("root");
    for d in [
        "usr",
        "boot",
        "etc/harness-vm",
        "etc/libvirt",
        "run",
        "tmp",
        "proc",
        "sys",
        "dev",
        "var/lib",
        "var/log",
        "var/cache",
    ] {
        std::fs::create_dir_all(root.join(d))?;
    }
    for l in ["bin", "sbin", "lib", "lib64"] {
        std::os::unix::fs::symlink(format!("usr/{l}"), root.join(l))?;
    }
    std::os::unix::fs::symlink("../run", root.join("var/run"))?;
    for (path, text) in [
        (
            "etc/passwd",
            "root:x:0:0::/:/bin/bash\nqemu:x:107:107::/:/bin/bash\n",
        ),
        ("etc/group", "root:x:0:\nqemu:x:107:\n"),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files dns\n",
        ),
        ("etc/machine-id", "11111111000040008000000000000107\n"),
    ] {
        std::fs::write(root.join(path), text)?;
    }
    let out = paths.state().join("launcher.tar");
    let image = archive::Image {
        name: objects::LAUNCHER_IMAGE,
        entrypoint: &["/usr/lib/harness/launcher"],
        env: &[],
        user: "107:107",
    };
    archive::write(&root, &image, &out)?;
    Ok(out)
}

/// This very program serves /dev/kvm to pods, as a service of L1. It runs with the
/// libraries it was linked with, which may be newer or older than the image's.
async fn start_plugin(l1: &L1) -> Result<()> {
    let exe = std::env::current_exe()?;
    let program = l1.bring(&exe)?;
    let mut loader = None;
    for word in Cmd::new("ldd").arg(&exe).text()?.split_ascii_whitespace() {
        if word.starts_with('/') {
            let place = l1.bring(Path::new(word))?;
            if word.contains("/ld-linux") {
                loader = Some(place);
            }
        }
    }
    let loader = loader.context("the harness has no dynamic loader")?;
    let command = format!(
        "systemctl is-active -q harness-device-plugin || {{ \
         systemctl reset-failed harness-device-plugin 2>/dev/null; \
         systemd-run --unit=harness-device-plugin -p Restart=always -p RestartSec=2 \
         {loader} --library-path /harness {program} device-plugin; }}"
    );
    l1.ok(&command).await?;
    Ok(())
}

/// Makes the VM's objects, waits until it answers and, if asked, until it is a node.
pub(super) async fn up(l1: &L1, host: &Cluster, guest: &Cluster, vm: &Vm) -> Result<L2> {
    let hosts = [host, guest].map(|c| (c.node(), c.address.clone()));
    let xml = domain::xml(vm, &l1.kernel, &hosts);
    let pods: Api<Pod> = Api::namespaced(host.client(), NAMESPACE);
    let pod = objects::pod_name(&vm.name);
    let lives = pods.get_opt(&pod).await?.is_some_and(|p| !ended(&p));
    if !lives {
        // As in KubeVirt, a VMI is over when its launcher is: the next one has a uid and a
        // status of its own.
        down(host, guest, &vm.name).await?;
    }
    let vmi = apply(host, &objects::vmi(vm)).await?;
    let uid = vmi.metadata.uid.context("a VMI without uid")?;
    for object in [
        objects::volume(vm),
        objects::volume_claim(vm),
        objects::config(vm, &xml),
    ] {
        apply(host, &object).await?;
    }
    if !lives {
        // A kubelet that finds the claim unbound looks again after ten seconds only.
        bound(host, &vm.name).await?;
        apply(host, &objects::pod(vm, &uid)).await?;
    }
    let l2 = progress::step_async(
        &format!("starting the VM {} in its launcher pod", vm.name),
        wait::until(
            &format!("VM {} to answer", vm.name),
            BOOT,
            EVERY,
            || async {
                let now = pods.get_opt(&pod).await?;
                anyhow::ensure!(
                    !now.is_some_and(|p| ended(&p)),
                    "the launcher pod {pod} has ended: see its log"
                );
                Ok(Probe::of(answers(l1, host, vm).await.map(Some), "it boots"))
            },
        ),
    )
    .await?;
    report(host, vm, &l2.pod_uid).await?;
    if vm.join {
        progress::step_async(
            &format!("joining {} to the guest's cluster", vm.name),
            join(&l2, guest),
        )
        .await?;
    }
    Ok(l2)
}

async fn bound(host: &Cluster, name: &str) -> Result<()> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(host.client(), NAMESPACE);
    let what = format!("the volume claim {name} to be bound");
    wait::until(&what, Duration::from_secs(60), EVERY / 4, || async {
        let phase = claims.get(name).await?.status.and_then(|s| s.phase);
        Ok(match phase.as_deref() {
            Some("Bound") => Probe::Ready(()),
            other => Probe::NotYet(format!("it is {}", other.unwrap_or("new"))),
        })
    })
    .await
}

/// A launcher is not started again: its VM is gone with it.
fn ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

async fn answers(l1: &L1, host: &Cluster, vm: &Vm) -> Result<L2> {
    let l2 = find(l1, host, &vm.name).await?;
    let command = if vm.join {
        "systemctl is-active -q containerd && systemctl is-active -q harness-network"
    } else {
        "systemctl is-active -q harness-network"
    };
    l2.run_with(command, &[], Duration::from_secs(20))
        .await?
        .ok(command)?;
    Ok(l2)
}

/// Writes what virt-controller writes.
async fn report(host: &Cluster, vm: &Vm, pod_uid: &str) -> Result<()> {
    vmis(host)
        .patch_status(
            &vm.name,
            &PatchParams::default(),
            &Patch::Merge(objects::vmi_status(vm, pod_uid)),
        )
        .await?;
    Ok(())
}

async fn join(l2: &L2, guest: &Cluster) -> Result<()> {
    let limit = Duration::from_secs(400);
    l2.run_with(l1::IMPORT, &[], limit).await?.ok(l1::IMPORT)?;
    let command = l1::join_command(&guest.join()?, &l2.name);
    l2.run_with(&command, &[], limit).await?.ok(&command)?;
    let nodes: Api<Node> = Api::all(guest.client());
    l1::ready(&nodes, &l2.name).await?;
    Ok(())
}

/// Whether the VM's launcher runs still.
pub(super) async fn runs(host: &Cluster, vm: &L2) -> Result<bool> {
    let pods: Api<Pod> = Api::namespaced(host.client(), NAMESPACE);
    let pod = pods.get_opt(&objects::pod_name(&vm.name)).await?;
    let same = pod.filter(|p| p.metadata.uid.as_deref() == Some(&vm.pod_uid));
    let phase = same.and_then(|p| p.status).and_then(|s| s.phase);
    Ok(phase.as_deref() == Some("Running"))
}

/// The VM `name`, by its launcher pod and QEMU's process in that pod's cgroup.
pub(super) async fn find(l1: &L1, host: &Cluster, name: &str) -> Result<L2> {
    let pods: Api<Pod> = Api::namespaced(host.client(), NAMESPACE);
    let pod = pods.get(&objects::pod_name(name)).await?;
    let phase = pod.status.and_then(|s| s.phase).unwrap_or_default();
    anyhow::ensure!(phase == "Running", "the launcher pod is {phase:?}");
    let pod_uid = pod.metadata.uid.context("a pod without uid")?;
    // The systemd driver writes the uid with underscores.
    let command = format!(
        "for p in $(pgrep -f '^/usr/bin/qemu-system-x86_64 -name guest={NAMESPACE}_{name},'); do \
         grep -q {} /proc/$p/cgroup && echo $p; done",
        pod_uid.replace('-', "_")
    );
    let out = l1.run(&command).await?;
    let pid = out
        .text()
        .parse()
        .with_context(|| format!("not one QEMU of pod {pod_uid}: {:?}", out.text()))?;
    Ok(L2 {
        l1: l1.clone(),
        name: name.to_owned(),
        pod_uid,
        pid,
    })
}

/// Deletes the VM's objects and waits until its pod is gone.
pub(super) async fn down(host: &Cluster, guest: &Cluster, name: &str) -> Result<()> {
    let at_once = DeleteParams::default();
    for (kind, version, object) in [
        ("Pod", "v1", objects::pod_name(name)),
        ("VirtualMachineInstance", "kubevirt.io/v1", name.to_owned()),
        ("ConfigMap", "v1", name.to_owned()),
        ("PersistentVolumeClaim", "v1", name.to_owned()),
    ] {
        let api = Api::<DynamicObject>::namespaced_with(
            host.client(),
            NAMESPACE,
            &resource(version, kind),
        );
        gone(&api, &object, &at_once).await?;
    }
    let volumes =
        Api::<DynamicObject>::all_with(host.client(), &resource("v1", "PersistentVolume"));
    gone(&volumes, &format!("{NAMESPACE}-{name}"), &at_once).await?;
    let nodes = Api::<DynamicObject>::all_with(guest.client(), &resource("v1", "Node"));
    gone(&nodes, name, &at_once).await
}

async fn gone(api: &Api<DynamicObject>, name: &str, params: &DeleteParams) -> Result<()> {
    if api.get_opt(name).await?.is_none() {
        return Ok(());
    }
    api.delete(name, params).await?;
    let what = format!("{name} to be gone");
    wait::until(&what, Duration::from_secs(120), EVERY, || async {
        Ok(match api.get_opt(name).await? {
            None => Probe::Ready(()),
            Some(_) => Probe::NotYet("still there".into()),
        })
    })
    .await
}

fn vmis(host: &Cluster) -> Api<DynamicObject> {
    Api::namespaced_with(
        host.client(),
        NAMESPACE,
        &resource("kubevirt.io/v1", "VirtualMachineInstance"),
    )
}

fn resource(version: &str, kind: &str) -> ApiResource {
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
}

/// Server-side apply of one object.
async fn apply(cluster: &Cluster, object: &Value) -> Result<DynamicObject> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let meta = object
        .get("metadata")
        .context("an object without metadata")?;
    let name = text(meta.get("name").unwrap_or(&Value::Null));
    let namespace = text(meta.get("namespace").unwrap_or(&Value::Null));
    let kind = text(object.get("kind").unwrap_or(&Value::Null));
    let version = text(object.get("apiVersion").unwrap_or(&Value::Null));
    let resource = resource(&version, &kind);
    let client = cluster.client();
    let api: Api<DynamicObject> = if namespace.is_empty() {
        Api::all_with(client, &resource)
    } else {
        Api::namespaced_with(client, &namespace, &resource)
    };
    api.patch(
        &name,
        &PatchParams::apply(MANAGER).force(),
        &Patch::Apply(object),
    )
    .await
    .with_context(|| format!("applying {kind} {name}"))
}
