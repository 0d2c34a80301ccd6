//! That it is real: the machines are nodes, QEMU runs without rights, the agent in a pod,
//! and the guest's credential opens nothing but its own claims.

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use k8s_openapi::api::core::v1::{Node, Pod, Secret};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::json;

use common::api::{PhysicalFunction, VFClaim};

use super::support::far::{Shell, sh};
use super::support::pods::Part;
use super::support::site::{L1_NODE, L2_NODE};
use super::support::{Lab, Wish};
use super::{Scenario, scenario};
use crate::clusters::not_ready;
use crate::deploy::names::{CLAIM_NAMESPACE, HOST_KUBECONFIG_SECRET, SYSTEM, VM_NAMESPACE};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "it-is-real",
            "L1 and L2 are Ready nodes, the VM's QEMU has user 107 and no capability, the agent is a pod on L1",
            it_is_real
        ),
        scenario!(
            "guest-credential-is-narrow",
            "with the guest's certificate one reads and writes its own claims' specs and nothing else",
            credential_is_narrow
        ),
    ]
}

async fn it_is_real(lab: &Lab<'_>) -> Result<()> {
    let machines: [(_, _, &dyn Shell); 2] = [
        (&lab.host, L1_NODE, &lab.l1),
        (&lab.guest, L2_NODE, &lab.l2),
    ];
    for (client, name, kernel) in machines {
        let node = Api::<Node>::all(client.clone()).get(name).await?;
        let why = not_ready(&node);
        ensure!(why.is_none(), "{name} is not Ready: {why:?}");
        let info = node
            .status
            .and_then(|s| s.node_info)
            .context("no nodeInfo")?;
        let boot = sh(kernel, "cat /proc/sys/kernel/random/boot_id").await?;
        ensure!(
            info.boot_id == boot,
            "{name} says boot {}, its kernel {boot}",
            info.boot_id
        );
    }
    qemu_is_unprivileged(lab).await?;
    launcher_is_a_pod(lab).await?;
    agent_is_a_pod(lab).await
}

async fn qemu_is_unprivileged(lab: &Lab<'_>) -> Result<()> {
    let status = sh(&lab.l1, &format!("cat /proc/{}/status", lab.qemu.pid)).await?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.map(str::trim)
            .with_context(|| format!("no {name} in {status}"))
    };
    let users: Vec<&str> = field("Uid:")?.split_ascii_whitespace().collect();
    ensure!(users == ["107"; 4], "QEMU's users are {users:?}");
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        let caps = u64::from_str_radix(field(set)?, 16)?;
        ensure!(caps == 0, "QEMU has {set} {caps:x}");
    }
    Ok(())
}

async fn launcher_is_a_pod(lab: &Lab<'_>) -> Result<()> {
    let cgroup = sh(&lab.l1, &format!("cat /proc/{}/cgroup", lab.qemu.pid)).await?;
    let pods: Api<Pod> = Api::namespaced(lab.host.clone(), VM_NAMESPACE);
    let pods = pods
        .list(&ListParams::default().labels("kubevirt.io=virt-launcher"))
        .await?;
    let pod = pods.items.iter().find(|p| in_cgroup(p, &cgroup));
    let pod = pod.with_context(|| format!("no launcher pod has QEMU's cgroup {cgroup}"))?;
    let spec = pod.spec.as_ref().context("no spec")?;
    let on_host = spec
        .volumes
        .iter()
        .flatten()
        .filter_map(|v| v.host_path.as_ref());
    for path in on_host {
        ensure!(
            !path.path.starts_with("/dev"),
            "the launcher has {} of the host",
            path.path
        );
    }
    for c in &spec.containers {
        let context = c.security_context.as_ref();
        ensure!(
            context.and_then(|s| s.privileged) != Some(true),
            "{} is privileged",
            c.name
        );
    }
    Ok(())
}

async fn agent_is_a_pod(lab: &Lab<'_>) -> Result<()> {
    let pods = Part::Agent.pods(lab).await?;
    let [pod] = pods.as_slice() else {
        bail!("{} agent pods", pods.len())
    };
    let on = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
    ensure!(on == Some(L1_NODE), "the agent is on {on:?}");
    let pids = sh(&lab.l1, "pgrep -x host-provisione").await?;
    let pid = pids.lines().next().context("no agent process")?;
    let cgroup = sh(&lab.l1, &format!("cat /proc/{pid}/cgroup")).await?;
    ensure!(
        in_cgroup(pod, &cgroup),
        "the agent's cgroup {cgroup} is not its pod's"
    );
    Ok(())
}

/// The systemd driver writes a pod's UID with underscores.
fn in_cgroup(pod: &Pod, cgroup: &str) -> bool {
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    !uid.is_empty() && cgroup.contains("kubepods") && cgroup.contains(&uid.replace('-', "_"))
}

async fn credential_is_narrow(lab: &Lab<'_>) -> Result<()> {
    let (claim, _) = lab.attach(&Wish::new("mine")).await?;
    let guest = as_guest(lab).await?;
    let mine: Api<VFClaim> = Api::namespaced(guest.clone(), CLAIM_NAMESPACE);
    mine.get(&claim.host_name())
        .await
        .context("the guest reads its own copy")?;
    // A change that the schema has nothing against.
    let patch = Patch::Merge(json!({"status": {"guestDevice": null}}));
    let to = PatchParams::default();
    denied(
        "its copy's status",
        mine.patch_status(&claim.host_name(), &to, &patch).await,
    )?;
    let everyone: Api<VFClaim> = Api::all(guest.clone());
    denied(
        "every namespace's claims",
        everyone.list(&ListParams::default()).await,
    )?;
    let elsewhere: Api<VFClaim> = Api::namespaced(guest.clone(), VM_NAMESPACE);
    let copy = lab.host_copy(&claim).await?.context("no copy")?;
    let mut forged = VFClaim::new("forged", copy.spec);
    forged.metadata.namespace = Some(VM_NAMESPACE.into());
    denied(
        "another namespace",
        elsewhere.create(&PostParams::default(), &forged).await,
    )?;
    let pfs: Api<PhysicalFunction> = Api::all(guest.clone());
    let patch = Patch::Merge(json!({"spec": {"managed": true}}));
    denied(
        "a PhysicalFunction",
        pfs.patch(&lab.uplink.object, &to, &patch).await,
    )?;
    let secrets: Api<Secret> = Api::namespaced(guest.clone(), SYSTEM);
    denied("secrets", secrets.list(&ListParams::default()).await)?;
    let pods: Api<Pod> = Api::namespaced(guest, VM_NAMESPACE);
    denied("pods", pods.list(&ListParams::default()).await)
}

fn denied<T>(what: &str, result: kube::Result<T>) -> Result<()> {
    match result {
        Err(kube::Error::Api(s)) if s.code == 403 => Ok(()),
        Err(e) => Err(e).with_context(|| format!("{what}: refused, but not as forbidden")),
        Ok(_) => bail!("the guest's credential opens {what}"),
    }
}

/// A client that is the guest, by the very Secret its syncer uses.
async fn as_guest(lab: &Lab<'_>) -> Result<Client> {
    let secrets: Api<Secret> = Api::namespaced(lab.guest.clone(), SYSTEM);
    let secret = secrets.get(HOST_KUBECONFIG_SECRET).await?;
    let text = secret
        .data
        .as_ref()
        .and_then(|d| d.get("kubeconfig"))
        .context("the Secret has no kubeconfig")?;
    let mut config = Kubeconfig::from_yaml(std::str::from_utf8(&text.0)?)?;
    // The name resolves in the containers' network only; the port kind opens on this
    // machine leads to the same server, whose certificate is checked for that address.
    let local = Kubeconfig::read_from(&lab.dc.host.kubeconfig)?;
    let server = local
        .clusters
        .into_iter()
        .next()
        .and_then(|c| c.cluster)
        .and_then(|c| c.server);
    for cluster in config
        .clusters
        .iter_mut()
        .filter_map(|c| c.cluster.as_mut())
    {
        cluster.server.clone_from(&server);
    }
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}
