//! What becomes of a VM while it has a VF.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::{condition, reason, type_};
use futures::FutureExt;
use k8s_openapi::api::core::v1::Node;
use kube::Api;

use super::support::far::sh;
use super::support::site::{L2_NODE, PEER, TraceKind};
use super::support::stops::{self, Look};
use super::support::{Attached, Claim, Lab, Wish, l2, watch, writes};
use super::{Scenario, release, scenario, traffic};
use crate::clusters;
use crate::machine::Vm;
use crate::wait::{self, Probe};

/// Longest a guest may take to boot again and be a Ready node.
const BOOT: Duration = Duration::from_secs(400);
/// Longest it may take to fill a quarter of its memory.
const TOUCH: Duration = Duration::from_secs(240);
const EVERY: Duration = Duration::from_secs(2);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            Long,
            "guest-reboots",
            "the guest reboots with its VF and then touches much of its memory, all gates closed long before: it finds the VF again as it was granted, and nothing is opened for it",
            reboots
        ),
        scenario!(
            Long,
            "qemu-dies",
            "QEMU is killed with the VF in it: the claim keeps the VF and says that its VM does not run, and gets it again by itself in the VM's next launcher",
            qemu_dies
        ),
    ]
}

async fn qemu_dies(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:76:01";
    let (claim, before) = lab.attach(&Wish::new("killed").mac(mac).vlan(760)).await?;
    let trace = lab.trace().await?;
    sh(&lab.l1, &format!("kill -KILL {}", lab.qemu.pid)).await?;
    let result = without_qemu(lab, &claim, &before).await;
    // The VM is to run again for whoever comes next, whatever was seen.
    lab.machine.stop_vm(L2_NODE).await?;
    lab.machine.start_vm(&Vm::first()).await?;
    result?;

    let lab = &Lab::open(lab.dc).await?;
    let after = lab.ready(&claim).await?;
    ensure!(after.vf == before.vf, "{} became {}", before.vf, after.vf);
    ensure!(
        after.host.metadata.uid == before.host.metadata.uid,
        "it is another copy"
    );
    lab.switch.reset().await?;
    let net = traffic::net(lab, &after, 0).await?;
    net.ping(&lab.l2, PEER, 3, Duration::from_secs(30)).await?;
    let written = lab.trace().await?;
    let unbound = |what: &TraceKind| matches!(what, TraceKind::Unbind { .. });
    let taken: Vec<_> = writes::about(&trace, &written, &before.vf)?
        .into_iter()
        .filter(|e| unbound(&e.what))
        .collect();
    ensure!(taken.is_empty(), "the VF was taken meanwhile: {taken:?}");
    lab.release(&claim).await?;
    release::free_and_clean(lab, &before.vf, before.vf_index).await
}

/// The claim without its QEMU: the VF is its, the attachment is none.
async fn without_qemu(lab: &Lab<'_>, claim: &Claim, before: &Attached) -> Result<()> {
    let device = lab
        .host_status(claim, "the attachment to be cleared", |s| {
            let ready = condition(&s.conditions, type_::READY)?;
            let cleared = s.attachment.is_none() && s.guest_device.is_none();
            let told = ready.status != "True" && ready.reason == reason::VM_NOT_RUNNING;
            (cleared && told).then(|| s.device.clone())
        })
        .await?;
    ensure!(
        device.is_some_and(|d| d.vf_index == before.vf_index),
        "the claim let go of VF {}",
        before.vf_index
    );
    Ok(())
}

async fn reboots(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:75:01";
    let look = Look::begin(lab, mac).await?;
    let (claim, before) = lab.attach(&Wish::new("reboots").mac(mac).vlan(750)).await?;
    look.expect(&claim, stops::ATTACHED).await?;
    let trace = lab.trace().await?;
    let boot = sh(&lab.l2, "cat /proc/sys/kernel/random/boot_id").await?;
    sh(&lab.l2, "systemd-run -q --on-active=1 systemctl reboot").await?;
    let nodes: Api<Node> = Api::all(lab.guest.clone());
    watch::until(&nodes, L2_NODE, "the guest to boot again", BOOT, |node| {
        let node = node.context("the guest's node is gone")?;
        let info = node.status.as_ref().and_then(|s| s.node_info.as_ref());
        let now = info.map(|i| i.boot_id.as_str()).unwrap_or_default();
        Ok(match clusters::not_ready(node) {
            None if now != boot.trim() => Probe::Ready(()),
            why => Probe::NotYet(format!("boot {now}, {why:?}")),
        })
    })
    .await?;
    // QEMU has mapped the guest's memory for the device again, with nothing open.
    look.expect(&claim, stops::ATTACHED).await?;
    l2::bound(&lab.l2, &before.guest_address).await?;
    touch_memory(lab).await?;
    let after = lab.ready(&claim).await?;
    ensure!(
        after.guest_address == before.guest_address && after.vf == before.vf,
        "the guest had {before:?} and has {after:?}"
    );
    lab.switch.reset().await?;
    let net = traffic::net(lab, &after, 0).await?;
    net.ping(&lab.l2, PEER, 3, Duration::from_secs(30)).await?;
    look.expect(&claim, stops::ATTACHED).await?;
    let written = lab.trace().await?;
    ensure!(written == trace, "something was written to VFs meanwhile");
    lab.release(&claim).await?;
    look.expect(&claim, stops::RELEASED).await
}

/// Has the guest use a quarter of the memory that it has to spare: dd fills one buffer of that
/// size. An emulated guest takes its time for every page.
async fn touch_memory(lab: &Lab<'_>) -> Result<()> {
    let script = "while read -r k kib _; do [[ $k == MemAvailable: ]] && break; done </proc/meminfo
systemctl reset-failed e2e-touch 2>/dev/null
systemd-run -q --unit=e2e-touch --service-type=oneshot --remain-after-exit --no-block \
dd if=/dev/zero of=/dev/null bs=$((kib * 256)) count=1 iflag=fullblock";
    sh(&lab.l2, script).await?;
    wait::until("the guest to touch its memory", TOUCH, EVERY, || async {
        let state = sh(&lab.l2, "systemctl is-active e2e-touch; true").await?;
        ensure!(state.trim() != "failed", "dd failed in the guest");
        Ok(match state.trim() {
            "active" => Probe::Ready(()),
            other => Probe::NotYet(other.to_owned()),
        })
    })
    .await
}
