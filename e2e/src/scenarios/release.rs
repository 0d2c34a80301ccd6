//! Deletion: the way back, in its order, and nothing left behind.

use anyhow::{Context, Result, ensure};
use common::api::{GUEST_FINALIZER, HOST_FINALIZER, PhysicalFunction};
use futures::FutureExt;
use kube::Api;

use super::support::claims::{RELEASE, told};
use super::support::events::Deletions;
use super::support::lab::Pf;
use super::support::site::{PEER, TraceKind};
use super::support::{Claim, Lab, Wish, far, l1, l2, watch, writes};
use super::{Scenario, scenario, traffic};
use crate::wait::Probe;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "deletion-is-clean",
            "the guest sees the device go, DEVICE_DELETED comes before anything is done to the VF, and it is Free and clean after",
            deletion_is_clean
        ),
        scenario!(
            "deletion-closes-the-gates",
            "with one VF left the container keeps what that needs; with the last one nodes, rules and memlock are as before",
            gates_closed
        ),
        scenario!(
            "next-claim-finds-nothing",
            "a VF that changes hands carries no MAC, VLAN or trust of its last holder",
            next_claim
        ),
    ]
}

async fn deletion_is_clean(lab: &Lab<'_>) -> Result<()> {
    let l2 = &lab.l2;
    let mac = "02:5f:00:00:30:01";
    let wish = Wish::new("deleted").mac(mac).vlan(300).trust(true);
    let (claim, attached) = lab.attach(&wish).await?;
    l2::bound(l2, &attached.guest_address).await?;
    let copy = lab.host_copy(&claim).await?.context("no copy")?;
    ensure!(
        copy.metadata
            .finalizers
            .iter()
            .flatten()
            .any(|f| f == HOST_FINALIZER),
        "{copy:?}"
    );
    let guest = lab.guest_claims().get(&claim.name).await?;
    ensure!(
        guest
            .metadata
            .finalizers
            .iter()
            .flatten()
            .any(|f| f == GUEST_FINALIZER),
        "{guest:?}"
    );

    let events = Deletions::listen(lab).await?;
    let before = lab.trace().await?;
    lab.release(&claim).await?;
    let deleted_at = events.of(lab, &claim.qemu_id()).await?;
    let after = lab.trace().await?;
    let touched = writes::about(&before, &after, &attached.vf)?;
    let early: Vec<_> = touched.iter().filter(|e| e.at_us < deleted_at).collect();
    ensure!(
        early.is_empty(),
        "before DEVICE_DELETED at {deleted_at} us: {early:?}"
    );
    let counts = writes::num_vfs(&before, &after, &lab.wired.address)?;
    ensure!(counts.is_empty(), "sriov_numvfs was written: {counts:?}");
    l2::gone(l2, &attached.guest_address).await?;
    free_and_clean(lab, &attached.vf, attached.vf_index).await
}

/// The kernel state of a VF of the wired PF, and its report.
pub(super) async fn free_and_clean(lab: &Lab<'_>, address: &str, index: u16) -> Result<()> {
    free_and_clean_of(lab, &lab.wired, address, index).await
}

/// The kernel state of a VF of `pf`, and its report.
pub(super) async fn free_and_clean_of(
    lab: &Lab<'_>,
    pf: &Pf,
    address: &str,
    index: u16,
) -> Result<()> {
    let l1 = &lab.l1;
    let kernel = l1::pf(l1, &pf.address).await?;
    let vf = kernel
        .vfs
        .iter()
        .find(|v| v.address == address)
        .context("the VF is gone")?;
    ensure!(
        vf.driver.as_deref().is_none_or(|d| d == "vfio-pci"),
        "{vf:?}"
    );
    let settings = l1::vf_settings(l1, &pf.interface).await?;
    let seen = settings.get(&index).context("no settings")?;
    ensure!(clean(seen), "VF {index} still has {seen:?}");
    let api: Api<PhysicalFunction> = Api::all(lab.host.clone());
    watch::until(
        &api,
        &pf.object,
        "the VF to be reported Free",
        RELEASE,
        |p| {
            let status = p.and_then(|p| p.status.as_ref()).context("no status")?;
            let vf = status.vfs.iter().find(|v| v.index == index);
            let vf = vf.with_context(|| format!("VF {index} is not reported"))?;
            Ok(
                if vf.state == common::api::VfState::Free && vf.claim_ref.is_none() {
                    Probe::Ready(())
                } else {
                    Probe::NotYet(format!("{vf:?}"))
                },
            )
        },
    )
    .await
}

/// As a VF is before anybody had it. A driver may give an unset MAC any value of its own,
/// but igb's is zero (igb_vf_configure clears it for a new VF).
fn clean(seen: &l1::VfSettings) -> bool {
    seen.mac == "00:00:00:00:00:00"
        && seen.vlan == 0
        && seen.spoof_check
        && !seen.trust
        && seen.max_rate == 0
}

async fn gates_closed(lab: &Lab<'_>) -> Result<()> {
    let l1 = &lab.l1;
    let qemu = &lab.qemu;
    let fresh = (qemu.memlock(l1).await?, qemu.vfio_nodes(l1).await?);
    ensure!(
        fresh.1.is_empty(),
        "before any claim the container has {:?}",
        fresh.1
    );
    let (first, a) = lab.attach(&Wish::new("gate-a")).await?;
    let (second, b) = lab.attach(&Wish::new("gate-b")).await?;
    let raised = qemu.memlock(l1).await?;
    ensure!(raised != fresh.0, "memlock stayed at {raised} with two VFs");
    closed_for(lab, a.iommu_group).await?;
    closed_for(lab, b.iommu_group).await?;
    ensure!(
        qemu.cgroup_allows(l1, "vfio").await?,
        "/dev/vfio/vfio is closed with VFs attached"
    );

    lab.release(&first).await?;
    ensure!(
        qemu.memlock(l1).await? == raised,
        "memlock fell while a VF is attached"
    );
    ensure!(
        qemu.cgroup_allows(l1, "vfio").await?,
        "/dev/vfio/vfio closed before the last VF"
    );
    lab.release(&second).await?;
    let now = (qemu.memlock(l1).await?, qemu.vfio_nodes(l1).await?);
    ensure!(
        now == fresh,
        "before: {fresh:?}, after the last VF: {now:?}"
    );
    ensure!(
        !qemu.cgroup_allows(l1, "vfio").await?,
        "the rule for /dev/vfio/vfio is left"
    );
    Ok(())
}

/// No node and no rule of the group in the container; its VF may be in use or not.
async fn closed_for(lab: &Lab<'_>, group: u32) -> Result<()> {
    let nodes = lab.qemu.vfio_nodes(&lab.l1).await?;
    let name = group.to_string();
    ensure!(
        !nodes.iter().any(|n| n.split(' ').next() == Some(&name)),
        "{nodes:?} has {group}"
    );
    let open = lab.qemu.cgroup_allows(&lab.l1, &name).await?;
    ensure!(!open, "the cgroup lets group {group} through");
    Ok(())
}

async fn next_claim(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:31:01";
    let wish = Wish::new("holder").mac(mac).vlan(310).trust(true);
    let (claim, first) = lab.attach(&wish).await?;
    traffic::net(lab, &first, 0)
        .await?
        .ping(&lab.l2, PEER, 1, super::support::claims::REFUSE)
        .await?;
    lab.release(&claim).await?;
    far::sh(&lab.l2, "ip netns del e2e0").await?;
    // With every other VF taken by somebody else the next claim must get this very one.
    let hold = super::support::hold::OthersHold::all_but(lab, &first.vf).await?;
    let next = lab.attach(&Wish::new("heir")).await;
    hold.end(lab).await?;
    let (claim, second): (Claim, _) = next?;
    ensure!(second.vf == first.vf, "the heir got {}", second.vf);
    ensure!(second.mac != mac, "the heir has the holder's MAC");
    let settings = l1::vf_settings(&lab.l1, &lab.wired.interface).await?;
    let seen = settings.get(&second.vf_index).context("no settings")?;
    ensure!(
        seen.mac == second.mac && seen.vlan == 0 && seen.spoof_check && !seen.trust,
        "the heir's VF has {seen:?}: {}",
        told(&second.host)
    );
    let vf = l2::bound(&lab.l2, &second.guest_address).await?;
    ensure!(vf.mac.as_deref() == Some(&*second.mac), "{vf:?}");
    lab.switch.reset().await?;
    traffic::net(lab, &second, 0)
        .await?
        .ping(&lab.l2, PEER, 1, super::support::claims::REFUSE)
        .await?;
    super::support::wire::only(lab, &[(&second.mac, None)]).await?;
    lab.release(&claim).await
}

/// Whether an event bound the VF to vfio-pci.
#[must_use]
pub(super) fn binds_vfio(what: &TraceKind) -> bool {
    matches!(what, TraceKind::Bound { driver, .. } if driver == "vfio-pci")
}
