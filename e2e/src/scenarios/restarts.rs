//! Each program killed while a claim is attached and while one is in flight, and a copy lost
//! whose VF is in use: nothing is lost and nothing doubled.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::type_;
use futures::FutureExt;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use super::support::l1::PciDevice;
use super::support::l2::{Counter, Steady};
use super::support::pods::Part;
use super::support::site::{PEER, TraceEvent};
use super::support::{Attached, Claim, Lab, Wish, claims, l2, watch, wire, writes};
use super::{Scenario, release, scenario, traffic};
use crate::wait::Probe;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "restart-agent-while-attached",
            "the node agent is killed while a VF is in use: the VF is not touched, traffic goes on, and the claim can still be released",
            |lab| attached(lab, Part::Agent)
        ),
        scenario!(
            Long,
            "restart-controller-while-attached",
            "the controller is killed while a VF is in use",
            |lab| attached(lab, Part::Controller)
        ),
        scenario!(
            Long,
            "restart-syncer-while-attached",
            "the guest-syncer is killed while a VF is in use",
            |lab| attached(lab, Part::Syncer)
        ),
        scenario!(
            "restart-agent-in-flight",
            "the node agent is killed with a VF chosen and not yet attached: its successor finishes, with that VF",
            |lab| in_flight(lab, Part::Agent)
        ),
        scenario!(
            "restart-controller-in-flight",
            "the controller is killed as a claim arrives: its successor admits it",
            |lab| in_flight(lab, Part::Controller)
        ),
        scenario!(
            "restart-syncer-in-flight",
            "the guest-syncer is killed with the copy made: its successor finds it and reports",
            |lab| in_flight(lab, Part::Syncer)
        ),
        scenario!(
            "restart-agent-while-releasing",
            "the node agent is killed while a claim is deleted: its successor unplugs once and frees the VF",
            releasing
        ),
        scenario!(
            "copy-torn-off",
            "a claim's copy is deleted on the host with its finalizer torn off while the VF is in use: the next copy takes over that very VF, nothing is touched, and the claim can be released",
            torn_off
        ),
    ]
}

/// A VF that the guest uses while something happens around it.
struct InUse {
    claim: Claim,
    before: Attached,
    net: l2::Net,
    steady: Steady,
    counter: Counter,
    pid: u32,
    trace: Vec<TraceEvent>,
    devices: Vec<PciDevice>,
}

const MAC: &str = "02:5f:00:00:40:01";
const VLAN: u16 = 400;

impl InUse {
    async fn begin(lab: &Lab<'_>) -> Result<Self> {
        let wish = Wish::new("held").mac(MAC).vlan(VLAN.into());
        let (claim, before) = lab.attach(&wish).await?;
        lab.switch.reset().await?;
        let net = traffic::net(lab, &before, 0).await?;
        let steady = net.ping_on(&lab.l2, PEER).await?;
        let counter = Counter::start(&lab.l2, "held").await?;
        let (pid, _) = counter.read(&lab.l2).await?;
        Ok(Self {
            claim,
            before,
            net,
            steady,
            counter,
            pid,
            trace: lab.trace().await?,
            devices: lab.qemu.ours().await?,
        })
    }

    /// It was used all the time, and nobody touched it.
    async fn undisturbed(self, lab: &Lab<'_>) -> Result<()> {
        let after = lab.ready(&self.claim).await?;
        ensure!(
            same(&self.before, &after),
            "{:?} became {after:?}",
            self.before
        );
        ensure!(
            lab.qemu.ours().await? == self.devices,
            "QEMU's devices changed"
        );
        let now = lab.trace().await?;
        let touched = writes::between(&self.trace, &now)?;
        ensure!(touched.is_empty(), "it was written: {touched:?}");
        let (pid, _) = self.counter.read(&lab.l2).await?;
        ensure!(
            pid == self.pid && pid != 0,
            "the counter is process {pid}, was {}",
            self.pid
        );
        self.counter.stop(&lab.l2).await?;
        let limit = Duration::from_secs(30);
        self.net.ping(&lab.l2, PEER, 3, limit).await?;
        wire::only(lab, &[(MAC, Some(VLAN))]).await?;
        let answers = self.steady.stop(&lab.l2).await?;
        ensure!(
            answers.received > 5 && answers.missed <= 5,
            "the ping: {answers:?}"
        );
        Ok(())
    }
}

async fn attached(lab: &Lab<'_>, part: Part) -> Result<()> {
    let used = InUse::begin(lab).await?;
    let (claim, before) = (used.claim.clone(), used.before.clone());
    let trace = used.trace.clone();
    part.restart(lab).await?;
    used.undisturbed(lab).await?;

    // Two can be told apart from one only if the successor works at all; and what it found
    // it has seen by then.
    let (second, _) = lab.attach(&Wish::new("after")).await?;
    lab.release(&second).await?;
    let after = lab.ready(&claim).await?;
    ensure!(
        same(&before, &after),
        "after another claim {before:?} became {after:?}"
    );
    let now = lab.trace().await?;
    let touched = writes::about(&trace, &now, &before.vf)?;
    ensure!(
        touched.is_empty(),
        "the successor touched the VF: {touched:?}"
    );
    let counts = writes::num_vfs(&trace, &now, &lab.wired.address)?;
    ensure!(counts.is_empty(), "sriov_numvfs was written: {counts:?}");
    lab.release(&claim).await?;
    l2::gone(&lab.l2, &before.guest_address).await
}

async fn torn_off(lab: &Lab<'_>) -> Result<()> {
    let used = InUse::begin(lab).await?;
    let (claim, before) = (used.claim.clone(), used.before.clone());
    let old = before.host.metadata.uid.clone().context("no UID")?;
    let (api, name) = (lab.host_claims(), claim.host_name());
    let nobody = json!({"metadata": {"uid": old, "finalizers": null}});
    let nobody = Patch::Merge(nobody);
    let as_is = PatchParams::default();
    api.patch(&name, &as_is, &nobody).await?;
    // The controller may have put its finalizer back by now.
    let deleted = api.delete(&name, &DeleteParams::default()).await?;
    if let Some(there) = deleted.left()
        && there.metadata.uid.as_ref() == Some(&old)
        && !there.finalizers().is_empty()
    {
        api.patch(&name, &as_is, &nobody).await?;
    }
    let what = "another copy to be Ready";
    watch::until(&api, &name, what, claims::ATTACH, |copy| {
        let Some(copy) = copy.filter(|c| c.metadata.uid.as_ref() != Some(&old)) else {
            return Ok(Probe::NotYet("there is none".into()));
        };
        Ok(match claims::truth(copy, type_::READY) {
            Some("True") => Probe::Ready(()),
            _ => Probe::NotYet(claims::told(copy)),
        })
    })
    .await?;
    used.undisturbed(lab).await?;
    lab.release(&claim).await?;
    l2::gone(&lab.l2, &before.guest_address).await?;
    release::free_and_clean(lab, &before.vf, before.vf_index).await?;
    let ours = lab.qemu.ours().await?;
    ensure!(ours.is_empty(), "QEMU still has {ours:?}");
    Ok(())
}

/// The claim has what it had.
pub(super) fn same(a: &Attached, b: &Attached) -> bool {
    let status = |x: &Attached| {
        x.host
            .status
            .as_ref()
            .map(|s| (s.device.clone(), s.attachment.clone(), s.admitted.clone()))
    };
    status(a) == status(b) && a.guest_address == b.guest_address && a.mac == b.mac
}

/// Kills `part` when the claim has come to where it is that part's work.
async fn in_flight(lab: &Lab<'_>, part: Part) -> Result<()> {
    let before = lab.trace().await?;
    let wish = Wish::new("flying").mac("02:5f:00:00:41:01");
    let (claim, old, chosen) = match part {
        Part::Agent => {
            let claim = lab.create(&wish).await?;
            let what = "a VF to be chosen";
            let chosen = lab.host_status(&claim, what, |s| s.device.clone()).await?;
            (claim, part.crash(lab).await?, Some(chosen))
        }
        Part::Controller => {
            // Its work is done in milliseconds: it is dead already when the copy arrives.
            let old = part.crash(lab).await?;
            let claim = lab.create(&wish).await?;
            lab.copied(&claim).await?;
            (claim, old, None)
        }
        Part::Syncer => {
            let claim = lab.create(&wish).await?;
            lab.copied(&claim).await?;
            (claim, part.crash(lab).await?, None)
        }
    };
    part.replaced(lab, &old).await?;
    let now = lab.ready(&claim).await?;
    if let Some(chosen) = chosen {
        let status = now.host.status.as_ref().and_then(|s| s.device.as_ref());
        let device = status.context("the copy has no device")?;
        ensure!(
            (device.vf_index, &device.physical_function)
                == (chosen.vf_index, &chosen.physical_function),
            "{chosen:?} was chosen, {device:?} was attached"
        );
    }
    once(lab, &claim, &now, &before).await?;
    lab.release(&claim).await
}

/// One device in QEMU, one in the guest, one VF bound.
async fn once(lab: &Lab<'_>, claim: &Claim, now: &Attached, before: &[TraceEvent]) -> Result<()> {
    let ours = lab.qemu.ours().await?;
    ensure!(
        ours.len() == 1 && ours.iter().all(|d| d.id == claim.qemu_id()),
        "QEMU has {ours:?}"
    );
    l2::bound(&lab.l2, &now.guest_address).await?;
    let in_guest = l2::vfs(&lab.l2).await?;
    ensure!(in_guest.len() == 1, "the guest has {in_guest:?}");
    let now = lab.trace().await?;
    let events = writes::between(before, &now)?;
    let bound: std::collections::BTreeSet<String> = events
        .iter()
        .filter(|e| release::binds_vfio(&e.what))
        .map(|e| format!("{:?}", e.what))
        .collect();
    ensure!(bound.len() <= 1, "more than one VF was bound: {bound:?}");
    Ok(())
}

async fn releasing(lab: &Lab<'_>) -> Result<()> {
    let (claim, attached) = lab.attach(&Wish::new("leaving")).await?;
    l2::bound(&lab.l2, &attached.guest_address).await?;
    lab.delete(&claim).await?;
    lab.host_deleting(&claim).await?;
    Part::Agent.restart(lab).await?;
    lab.gone(&claim).await?;
    ensure!(
        lab.qemu.ours().await?.is_empty(),
        "QEMU still has the device"
    );
    l2::gone(&lab.l2, &attached.guest_address).await?;
    release::free_and_clean(lab, &attached.vf, attached.vf_index).await?;
    let (next, _) = lab.attach(&Wish::new("heir")).await?;
    lab.release(&next).await
}
