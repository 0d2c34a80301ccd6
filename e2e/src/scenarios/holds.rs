//! What others do to a VF in use: it is served again as it was granted, or the claim says
//! what became of it, with the cause.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::reason;
use futures::FutureExt;

use super::support::far::sh;
use super::support::l1::{self, VfSettings};
use super::support::l2::{self, Counter};
use super::support::site::PEER;
use super::support::{Attached, Claim, Lab, Wish, wire, writes};
use super::{Scenario, scenario, traffic};
use crate::wait::{self, Probe};

/// Longest a repair may take.
const REPAIR: Duration = Duration::from_secs(20);
const EVERY: Duration = Duration::from_millis(200);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "config-holds",
            "somebody changes VLAN, trust and spoof check of a VF in use, and takes the PF down: all is as granted again, the guest keeps its device",
            config_holds
        ),
        scenario!(
            "lost-with-its-vf",
            "somebody writes 0 to sriov_numvfs under a guest: the claim says Lost and why, and the guest gets a VF again",
            lost_with_its_vf
        ),
        scenario!(
            "lost-by-unplug",
            "somebody unplugs the device at QEMU's monitor: the claim says Lost, and the guest gets its VF again",
            lost_by_unplug
        ),
    ]
}

async fn config_holds(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:60:01";
    let wish = Wish::new("held").mac(mac).vlan(600);
    let (claim, before) = lab.attach(&wish).await?;
    let granted = settings(lab, before.vf_index).await?;
    ensure!(
        granted.mac == mac && granted.vlan == 600 && granted.spoof_check && !granted.trust,
        "granted was {granted:?}"
    );
    let devices = lab.qemu.ours().await?;
    let counter = Counter::start(&lab.l2, "held").await?;
    let (pid, _) = counter.read(&lab.l2).await?;
    let trace = lab.trace().await?;

    let (pf, vf) = (&lab.wired.interface, before.vf_index);
    let foreign = format!(
        "ip link set {pf} vf {vf} vlan 0 && ip link set {pf} vf {vf} trust on && ip link set {pf} vf {vf} spoofchk off"
    );
    sh(&lab.l1, &foreign).await?;
    wait::until("the VF to be as granted", REPAIR, EVERY, || async {
        let now = settings(lab, vf).await?;
        Ok(if now == granted {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("{now:?}"))
        })
    })
    .await?;
    let words = lab.host_event(&claim, reason::REPAIRED).await?;
    ensure!(words.contains("VLAN"), "the event says {words:?}");
    lab.switch.reset().await?;
    let net = traffic::net(lab, &before, 0).await?;
    net.ping(&lab.l2, PEER, 3, Duration::from_secs(30)).await?;
    wire::only(lab, &[(mac, Some(600))]).await?;

    // That the guest's driver finds its link again is its own affair: igb resets the whole
    // device when its interface goes up, and the emulated igbvf does not notice.
    sh(&lab.l1, &format!("ip link set {pf} down")).await?;
    wait::until("the PF to be up", REPAIR, EVERY, || async {
        let flags = sh(&lab.l1, &format!("cat /sys/class/net/{pf}/flags")).await?;
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16)?;
        Ok(if flags & 1 == 1 {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("flags {flags:#x}"))
        })
    })
    .await?;

    let after = lab.ready(&claim).await?;
    let still = settings(lab, vf).await?;
    ensure!(still == granted, "with the PF up again it is {still:?}");
    ensure!(
        after.guest_address == before.guest_address && lab.qemu.ours().await? == devices,
        "the guest did not keep its device: {before:?} became {after:?}"
    );
    let (pid_after, _) = counter.read(&lab.l2).await?;
    ensure!(pid == pid_after && pid != 0, "the VM was disturbed");
    counter.stop(&lab.l2).await?;
    let now = lab.trace().await?;
    let touched = writes::between(&trace, &now)?;
    ensure!(touched.is_empty(), "the repair wrote {touched:?}");
    lab.release(&claim).await
}

async fn settings(lab: &Lab<'_>, index: u16) -> Result<VfSettings> {
    let all = l1::vf_settings(&lab.l1, &lab.wired.interface).await?;
    all.get(&index)
        .cloned()
        .with_context(|| format!("there is no VF {index}"))
}

async fn lost_with_its_vf(lab: &Lab<'_>) -> Result<()> {
    let (claim, before) = lab.attach(&Wish::new("robbed").vlan(610)).await?;
    l2::bound(&lab.l2, &before.guest_address).await?;
    let trace = lab.trace().await?;
    // The write waits for QEMU to give the VF back, which asks its guest: not for us.
    let count = format!("/sys/bus/pci/devices/{}/sriov_numvfs", lab.wired.address);
    let rob = format!("systemd-run -q --unit=e2e-rob bash -c 'echo 0 >{count}'");
    sh(&lab.l1, &rob).await?;
    let words = lab.host_event(&claim, reason::LOST).await?;
    ensure!(
        words.contains("number of VFs"),
        "the event does not say why: {words:?}"
    );
    again(lab, &claim, &before).await?;
    let now = lab.trace().await?;
    let counts = writes::num_vfs(&trace, &now, &lab.wired.address)?;
    ensure!(
        counts.len() == 2 && counts.first().is_some_and(|c| c == "0"),
        "sriov_numvfs was written: {counts:?}"
    );
    lab.release(&claim).await
}

async fn lost_by_unplug(lab: &Lab<'_>) -> Result<()> {
    let (claim, before) = lab.attach(&Wish::new("unplugged").vlan(620)).await?;
    l2::bound(&lab.l2, &before.guest_address).await?;
    let id = serde_json::json!({"id": claim.qemu_id()});
    lab.qemu.qmp("device_del", &id).await?;
    let words = lab.host_event(&claim, reason::LOST).await?;
    ensure!(
        words.contains("QEMU's monitor"),
        "the event does not say why: {words:?}"
    );
    again(lab, &claim, &before).await?;
    lab.release(&claim).await
}

/// The guest has a VF of the claim again, with what was granted.
async fn again(lab: &Lab<'_>, claim: &Claim, before: &Attached) -> Result<()> {
    // It was Ready before too: what is waited for is the device.
    wait::until(
        "the device to be in QEMU again",
        super::support::claims::ATTACH,
        EVERY,
        || async {
            let ours = lab.qemu.ours().await?;
            Ok(
                if ours.len() == 1 && ours.iter().all(|d| d.id == claim.qemu_id()) {
                    Probe::Ready(())
                } else {
                    Probe::NotYet(format!("QEMU has {ours:?}"))
                },
            )
        },
    )
    .await?;
    let now = lab.ready(claim).await?;
    l2::bound(&lab.l2, &now.guest_address).await?;
    let in_guest = l2::vfs(&lab.l2).await?;
    ensure!(in_guest.len() == 1, "the guest has {in_guest:?}");
    let seen = settings(lab, now.vf_index).await?;
    ensure!(
        seen.mac == before.mac && (seen.vlan == 610 || seen.vlan == 620),
        "it is served with {seen:?}"
    );
    Ok(())
}
