//! Each program killed while a claim is attached and while one is in flight: nothing is
//! lost and nothing doubled.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::FutureExt;

use super::support::l2::Counter;
use super::support::pods::Part;
use super::support::site::{PEER, TraceEvent};
use super::support::{Attached, Claim, Lab, Wish, l2, wire, writes};
use super::{Scenario, release, scenario, traffic};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "restart-agent-while-attached",
            "the node agent is killed while a VF is in use: the VF is not touched, traffic goes on, and the claim can still be released",
            |lab| attached(lab, Part::Agent)
        ),
        scenario!(
            "restart-controller-while-attached",
            "the controller is killed while a VF is in use",
            |lab| attached(lab, Part::Controller)
        ),
        scenario!(
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
    ]
}

async fn attached(lab: &Lab<'_>, part: Part) -> Result<()> {
    let mac = "02:5f:00:00:40:01";
    let (claim, before) = lab.attach(&Wish::new("held").mac(mac).vlan(400)).await?;
    lab.switch.reset().await?;
    let net = traffic::net(lab, &before, 0).await?;
    let steady = net.ping_on(&lab.l2, PEER).await?;
    let counter = Counter::start(&lab.l2, "held").await?;
    let (pid, _) = counter.read(&lab.l2).await?;
    let trace = lab.trace().await?;
    let devices = lab.qemu.ours().await?;

    part.restart(lab).await?;
    let after = lab.ready(&claim).await?;
    ensure!(same(&before, &after), "{before:?} became {after:?}");
    ensure!(lab.qemu.ours().await? == devices, "QEMU's devices changed");
    let now = lab.trace().await?;
    let touched = writes::between(&trace, &now)?;
    ensure!(touched.is_empty(), "the restart wrote {touched:?}");
    let (pid_after, _) = counter.read(&lab.l2).await?;
    ensure!(
        pid == pid_after && pid != 0,
        "the counter is process {pid_after}, was {pid}"
    );
    counter.stop(&lab.l2).await?;
    net.ping(&lab.l2, PEER, 3, Duration::from_secs(30)).await?;
    wire::only(lab, &[(mac, Some(400))]).await?;
    let answers = steady.stop(&lab.l2).await?;
    ensure!(
        answers.received > 5 && answers.missed <= 5,
        "the ping: {answers:?}"
    );

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
    lab.release(&claim).await?;
    l2::gone(&lab.l2, &before.guest_address).await
}

fn same(a: &Attached, b: &Attached) -> bool {
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
