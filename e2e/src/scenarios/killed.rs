//! The node agent killed between any two steps: what there is then is what the point says,
//! and its successor brings the claim where it should be, once.

use anyhow::{Context, Result, ensure};
use futures::FutureExt;

use super::support::far::sh;
use super::support::pods::Part;
use super::support::site::TraceKind;
use super::support::stops::{self, Look};
use super::support::{Attached, Claim, Lab, Wish, l2, writes};
use super::{Scenario, release, scenario};
use crate::progress;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "killed-with-the-device-added",
            "the node agent is killed with the device in QEMU and its gates open, and with the device gone and the gates open: its successor closes them and ends what was begun",
            |lab| cycles(lab, &WORST)
        ),
        scenario!(
            Long,
            "killed-preparing-a-vf",
            "the node agent is killed between any two steps from choosing a VF to recording its attachment, and between as many of its release",
            |lab| cycles(lab, &PREPARING)
        ),
        scenario!(
            Long,
            "killed-plugging",
            "the node agent is killed between any two steps from opening the gates to the guest's having the device, and between the others of its release",
            |lab| cycles(lab, &PLUGGING)
        ),
    ]
}

/// A point on the way up, and one on the way down; each claim comes and goes once.
type Cycle = (&'static str, Option<&'static str>);

/// Where most is open: for every run.
const WORST: [Cycle; 1] = [("device-added", Some("unplugged"))];

const PREPARING: [Cycle; 6] = [
    ("chosen", Some("unplug-requested")),
    ("allocated", Some("unplugged")),
    ("vfs-created", Some("nodes-removed")),
    ("configured", Some("rules-restored")),
    ("bound", Some("memlock-restored")),
    ("attachment-recorded", Some("gates-closed")),
];

const PLUGGING: [Cycle; 7] = [
    ("journal-written", Some("reset")),
    ("memlock-raised", Some("unbound")),
    ("rules-set", Some("device-cleared")),
    ("nodes-made", Some("let-go")),
    ("device-added", None),
    ("group-closed", None),
    ("guest-configured", None),
];

async fn cycles(lab: &Lab<'_>, cycles: &[Cycle]) -> Result<()> {
    for (n, (up, down)) in cycles.iter().enumerate() {
        let mac = format!("02:5f:00:00:50:{n:02x}");
        let look = Look::begin(lab, &mac).await?;
        let wish = Wish::new(up).mac(&mac);
        let (claim, attached) = killed_attaching(lab, &look, &wish, up)
            .await
            .with_context(|| format!("killed at {up}"))?;
        killed_releasing(lab, &look, &claim, &attached, *down)
            .await
            .with_context(|| match down {
                Some(down) => format!("killed at {down}"),
                None => format!("released after it was killed at {up}"),
            })?;
        progress::line(&format!(
            "        killed at {up}{}: finished once, released clean",
            down.map_or(String::new(), |down| format!(" and at {down}"))
        ));
    }
    Ok(())
}

/// Kills the agent at the point, having seen that all is as the point says.
async fn kill_at(lab: &Lab<'_>, look: &Look<'_>, claim: &Claim, point: &str) -> Result<()> {
    stops::stopped(lab, point).await?;
    look.expect(claim, point).await?;
    Part::Agent.restart(lab).await
}

async fn killed_attaching(
    lab: &Lab<'_>,
    look: &Look<'_>,
    wish: &Wish,
    point: &str,
) -> Result<(Claim, Attached)> {
    let create = stops::before_the_vfs(point)?;
    if create {
        let count = format!("/sys/bus/pci/devices/{}/sriov_numvfs", lab.wired.address);
        sh(&lab.l1, &format!("echo 0 >{count}")).await?;
    }
    let before = lab.trace().await?;
    stops::arm(lab, point).await?;
    let claim = lab.create(wish).await?;
    kill_at(lab, look, &claim, point).await?;

    let attached = lab.ready(&claim).await?;
    look.expect(&claim, stops::ATTACHED).await?;
    let ours = lab.qemu.ours().await?;
    ensure!(ours.len() == 1, "QEMU has {ours:?}");
    l2::bound(&lab.l2, &attached.guest_address).await?;
    let in_guest = l2::vfs(&lab.l2).await?;
    ensure!(in_guest.len() == 1, "the guest has {in_guest:?}");
    let now = lab.trace().await?;
    let counts = writes::num_vfs(&before, &now, &lab.wired.address)?;
    ensure!(
        counts.len() == usize::from(create),
        "sriov_numvfs was written: {counts:?}"
    );
    let events = writes::between(&before, &now)?;
    let bound: Vec<_> = events
        .iter()
        .filter(|e| release::binds_vfio(&e.what))
        .collect();
    ensure!(
        bound.len() == 1,
        "VFs were bound to vfio-pci other than once: {bound:?}"
    );
    Ok((claim, attached))
}

async fn killed_releasing(
    lab: &Lab<'_>,
    look: &Look<'_>,
    claim: &Claim,
    attached: &Attached,
    point: Option<&str>,
) -> Result<()> {
    let before = lab.trace().await?;
    match point {
        Some(point) => {
            stops::arm(lab, point).await?;
            lab.delete(claim).await?;
            kill_at(lab, look, claim, point).await?;
        }
        None => lab.delete(claim).await?,
    }
    lab.gone(claim).await?;
    look.expect(claim, stops::RELEASED).await?;
    l2::gone(&lab.l2, &attached.guest_address).await?;
    let now = lab.trace().await?;
    let counts = writes::num_vfs(&before, &now, &lab.wired.address)?;
    ensure!(counts.is_empty(), "sriov_numvfs was written: {counts:?}");
    let events = writes::between(&before, &now)?;
    let left =
        |what: &TraceKind| matches!(what, TraceKind::Unbind { driver, .. } if driver == "vfio-pci");
    let released: Vec<_> = events.iter().filter(|e| left(&e.what)).collect();
    ensure!(
        released.len() == 1,
        "VFs were taken from vfio-pci other than once: {released:?}"
    );
    release::free_and_clean(lab, &attached.vf, attached.vf_index).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_killed_at_every_point() {
        let all = PREPARING.iter().chain(&PLUGGING);
        let mut killed: Vec<&str> = all
            .flat_map(|(up, down)| [Some(*up), *down])
            .flatten()
            .collect();
        killed.sort_unstable();
        let mut points = stops::POINTS.map(|p| p.name);
        points.sort_unstable();
        assert_eq!(killed, points);
    }
}
