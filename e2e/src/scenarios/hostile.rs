//! Others on the host who use VFs that are ours to give: they keep what they have, and only
//! what they have is kept from claims.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::{PhysicalFunction, VfState, reason, type_};
use futures::FutureExt;
use kube::Api;

use super::support::far::sh;
use super::support::hold::{DeviceUser, OthersHold};
use super::support::pods::Part;
use super::support::site::TraceKind;
use super::support::{Lab, Wish, stops, watch, writes};
use super::{Scenario, release, scenario};
use crate::wait::Probe;

/// The cgroups of the agent's helpers, one for each function.
const HELPERS: &str = "/sys/fs/cgroup/vf-provisioner";
/// Longest until the kernel or the agent tells.
const TELL: Duration = Duration::from_secs(60);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            Long,
            "foreign-holder-left-alone",
            "a process of nobody's has the groups of six VFs open: they are Foreign, claims get the seventh, nothing is written to the six, also not by a restarted agent",
            foreign_holder
        ),
        scenario!(
            Long,
            "unbind-hangs",
            "somebody opens a VF in the moment before it is unbound: the unbind waits outside of the pod, the VF is Broken, the agent serves others and can be replaced, and the claim ends when that somebody lets go",
            unbind_hangs
        ),
    ]
}

async fn foreign_holder(lab: &Lab<'_>) -> Result<()> {
    let (claim, first) = lab.attach(&Wish::new("before")).await?;
    lab.release(&claim).await?;
    let hold = OthersHold::all_but(lab, &first.vf).await?;
    let result = beside(lab, &hold, &first.vf).await;
    hold.end(lab).await?;
    result?;
    states(lab, "all VFs to be Free again", |s| *s == VfState::Free, 7).await
}

async fn beside(lab: &Lab<'_>, hold: &OthersHold, free: &str) -> Result<()> {
    let foreign = |s: &VfState| *s == VfState::Foreign;
    states(lab, "the held VFs to be Foreign", foreign, hold.vfs().len()).await?;
    let before = lab.trace().await?;
    let (claim, given) = lab.attach(&Wish::new("beside")).await?;
    ensure!(given.vf == free, "the claim got {}", given.vf);
    let refused = lab.create(&Wish::new("too-many")).await?;
    let said = lab
        .refused(&refused, type_::ALLOCATED, reason::NO_FREE_VF)
        .await?;
    ensure!(
        said.message
            .contains("in use by something else on the host"),
        "the refusal says {:?}",
        said.message
    );
    lab.release(&refused).await?;
    Part::Agent.restart(lab).await?;
    lab.release(&claim).await?;
    states(lab, "the held VFs to be Foreign", foreign, hold.vfs().len()).await?;
    let after = lab.trace().await?;
    for vf in hold.vfs() {
        let touched = writes::about(&before, &after, vf)?;
        ensure!(touched.is_empty(), "{vf} was written to: {touched:?}");
    }
    let counts = writes::num_vfs(&before, &after, &lab.wired.address)?;
    ensure!(counts.is_empty(), "sriov_numvfs was written: {counts:?}");
    Ok(())
}

async fn unbind_hangs(lab: &Lab<'_>) -> Result<()> {
    let (claim, had) = lab.attach(&Wish::new("hangs")).await?;
    let before = lab.trace().await?;
    stops::arm(lab, "let-go").await?;
    lab.delete(&claim).await?;
    stops::stopped(lab, "let-go").await?;
    let user = DeviceUser::take(lab, &had.vf, had.iommu_group).await?;
    stops::go_on(lab).await?;

    let words = lab.host_event(&claim, reason::BROKEN).await?;
    let helper = self::helper(lab, &had.vf)
        .await?
        .context("no helper waits")?;
    ensure!(
        words.contains(&format!("process {helper} of the host")),
        "the event names another process than {helper}: {words:?}"
    );
    broken(lab, 1).await?;
    // The kernel itself shows a VF that nobody has.
    let shown = format!(
        "[[ -e /sys/bus/pci/devices/{}/driver ]] && echo bound; true",
        had.vf
    );
    ensure!(
        sh(&lab.l1, &shown).await?.is_empty(),
        "it is bound, so nothing hangs"
    );

    // The agent goes on, and its pod can be replaced.
    let (other, given) = lab.attach(&Wish::new("other")).await?;
    ensure!(given.vf != had.vf, "a Broken VF was given away");
    let old = Part::Agent.delete(lab).await?;
    Part::Agent.replaced(lab, &old).await?;
    lab.ready(&other).await?;
    lab.release(&other).await?;
    broken(lab, 1).await?;
    let still = lab.host_copy(&claim).await?.context("the copy is gone")?;
    let device = still.status.and_then(|s| s.device);
    ensure!(device.is_some(), "the claim let go of a VF that is in use");
    ensure!(
        self::helper(lab, &had.vf).await? == Some(helper),
        "it is not helper {helper} that waits"
    );

    user.end(lab).await?;
    lab.gone(&claim).await?;
    broken(lab, 0).await?;
    release::free_and_clean(lab, &had.vf, had.vf_index).await?;
    let after = lab.trace().await?;
    let unbound =
        |what: &TraceKind| matches!(what, TraceKind::Unbind { device, .. } if *device == had.vf);
    let events = writes::between(&before, &after)?.iter();
    let unbinds: Vec<_> = events.filter(|e| unbound(&e.what)).collect();
    ensure!(unbinds.len() == 1, "unbound other than once: {unbinds:?}");
    Ok(())
}

/// The process that waits in the kernel about the function, if one does.
async fn helper(lab: &Lab<'_>, function: &str) -> Result<Option<u32>> {
    let script = format!("cat {HELPERS}/{function}/cgroup.procs 2>/dev/null; true");
    let said = sh(&lab.l1, &script).await?;
    let first = said.lines().next();
    first.map(|pid| pid.parse().context("a pid")).transpose()
}

async fn broken(lab: &Lab<'_>, count: usize) -> Result<()> {
    let what = format!("{count} VFs to be Broken");
    states(lab, &what, |s| *s == VfState::Broken, count).await
}

/// Waits until so many VFs of the wired PF are reported in such a state.
async fn states(
    lab: &Lab<'_>,
    what: &str,
    such: impl Fn(&VfState) -> bool,
    count: usize,
) -> Result<()> {
    let api: Api<PhysicalFunction> = Api::all(lab.host.clone());
    watch::until(&api, &lab.wired.object, what, TELL, |p| {
        let status = p.and_then(|p| p.status.as_ref()).context("no status")?;
        let seen: Vec<VfState> = status.vfs.iter().map(|v| v.state).collect();
        Ok(if seen.iter().filter(|s| such(s)).count() == count {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("{seen:?}"))
        })
    })
    .await
}
