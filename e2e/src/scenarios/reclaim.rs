//! What becomes of a VF when its claim goes, and of the number of VFs.

use anyhow::{Context, Result, ensure};
use common::api::{VfState, WithheldReason, reason};
use futures::FutureExt;
use serde_json::json;

use super::support::pool::resized;
use super::support::{Lab, Wish, l1, writes};
use super::{Scenario, scenario};

const DESTROY: &str = "e2e-destroy";
const RETAIN: &str = "e2e-retain";

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![scenario!(
        Long,
        "reclaim-policies",
        "a destroyed VF is missing from the kernel's count once nobody has one, a retained one stays as it was until it is given back, and another number waits for who holds a VF",
        reclaim_policies
    )]
}

async fn reclaim_policies(lab: &Lab<'_>) -> Result<()> {
    destroyed(lab).await.context("Destroy")?;
    retained(lab).await.context("Retain")
}

/// What was written to the count since `before`.
async fn counts(lab: &Lab<'_>, before: &[super::support::site::TraceEvent]) -> Result<Vec<String>> {
    let after = lab.trace().await?;
    writes::num_vfs(before, &after, &lab.wired.address)
}

async fn destroyed(lab: &Lab<'_>) -> Result<()> {
    lab.class_reclaiming(DESTROY, "Destroy").await?;
    let (keeper, _) = lab.attach(&Wish::new("keeper")).await?;
    let (claim, attached) = lab.attach(&Wish::new("destroyed").class(DESTROY)).await?;
    let before = lab.trace().await?;
    lab.release(&claim).await?;
    let pf = lab.pool(&lab.wired).await?;
    let entry = pf.spec.withheld.first().context("nothing is withheld")?;
    ensure!(
        entry.vf_index == attached.vf_index
            && entry.reason == WithheldReason::Destroyed
            && entry.claim.name == claim.host_name(),
        "{entry:?}"
    );
    let holder = keeper.host_name();
    lab.pool_until(&lab.wired, "the change to wait for the keeper", |_, s| {
        let waits =
            resized(s).is_some_and(|w| w.starts_with(reason::IN_USE) && w.contains(&holder));
        s.counts.retired == 1 && waits
    })
    .await?;
    let early = counts(lab, &before).await?;
    ensure!(
        early.is_empty(),
        "with a VF in a VM the count was written: {early:?}"
    );

    lab.release(&keeper).await?;
    lab.pool_until(&lab.wired, "the destroyed VF to be gone", |pf, s| {
        pf.spec.withheld.is_empty() && s.resize.as_ref().is_some_and(|r| r.complete)
    })
    .await?;
    let written = counts(lab, &before).await?;
    ensure!(
        written == ["0", "6"],
        "the count was written {written:?}, not 0 and 6"
    );
    let kernel = l1::pf(&lab.l1, &lab.wired.address).await?;
    ensure!(
        kernel.vfs.len() == 6,
        "the kernel has {} VFs",
        kernel.vfs.len()
    );
    // And the pool serves as before.
    let (next, _) = lab.attach(&Wish::new("after-destroy")).await?;
    lab.release(&next).await
}

async fn retained(lab: &Lab<'_>) -> Result<()> {
    lab.class_reclaiming(RETAIN, "Retain").await?;
    let mac = "02:5f:00:00:32:01";
    let (claim, first) = lab
        .attach(&Wish::new("retained").class(RETAIN).mac(mac))
        .await?;
    let before = lab.trace().await?;
    lab.release(&claim).await?;
    let index = first.vf_index;
    lab.pool_until(&lab.wired, "the VF to be Retired", |_, s| {
        let mut vfs = s.vfs.iter();
        vfs.any(|vf| vf.index == index && vf.state == VfState::Retired)
    })
    .await?;
    let touched = writes::about(&before, &lab.trace().await?, &first.vf)?;
    ensure!(
        touched.is_empty(),
        "the retained VF was written to: {touched:?}"
    );
    let settings = l1::vf_settings(&lab.l1, &lab.wired.interface).await?;
    let seen = settings.get(&index).context("no settings")?;
    ensure!(seen.mac == mac, "the retained VF has {seen:?}");
    let (other, second) = lab.attach(&Wish::new("not-the-retained")).await?;
    ensure!(second.vf != first.vf, "the retained VF was given away");
    lab.release(&other).await?;

    // Given back, it is the one on vfio-pci, which goes first.
    lab.set_pool(&lab.wired, json!({"withheld": null})).await?;
    let (heir, third) = lab.attach(&Wish::new("heir-of-retained")).await?;
    ensure!(third.vf == first.vf, "the heir got {}", third.vf);
    ensure!(third.mac != mac, "the heir has the holder's MAC");
    lab.set_pool(&lab.wired, json!({"numVFs": 3})).await?;
    let holder = heir.host_name();
    lab.pool_until(
        &lab.wired,
        "the smaller number to wait for the heir",
        |_, s| resized(s).is_some_and(|w| w.starts_with(reason::IN_USE) && w.contains(&holder)),
    )
    .await?;
    let early = counts(lab, &before).await?;
    ensure!(
        early.is_empty(),
        "with a VF in a VM the count was written: {early:?}"
    );
    lab.release(&heir).await?;
    lab.pool_until(&lab.wired, "three VFs", |_, s| {
        s.num_vfs == 3 && s.counts.free == 3
    })
    .await?;
    let written = counts(lab, &before).await?;
    ensure!(
        written == ["0", "3"],
        "the count was written {written:?}, not 0 and 3"
    );
    let kernel = l1::pf(&lab.l1, &lab.wired.address).await?;
    ensure!(
        kernel.vfs.len() == 3,
        "the kernel has {} VFs",
        kernel.vfs.len()
    );
    Ok(())
}
