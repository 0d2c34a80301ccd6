//! An API server that is away for minutes, of the host or of the guest, with a claim in use,
//! one on its way and one that goes, and all programs killed meanwhile: nothing is lost,
//! nothing is taken for gone, and all ends where it should when it is back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::{condition, reason, type_};
use futures::FutureExt;
use tokio::time::Instant;

use super::support::l2::{self, Counter};
use super::support::outage::{Flapping, Outage};
use super::support::pods::Part;
use super::support::site::{TraceEvent, TraceKind};
use super::support::{Attached, Claim, Lab, Wish, watch, writes};
use super::{Scenario, release, scenario};
use crate::wait::{self, Probe};

/// How long the API server is away.
const AWAY: Duration = Duration::from_secs(180);
/// How often the link goes down and comes back, and longest that may take.
const FLAPS: usize = 6;
const FLAPPING: Duration = Duration::from_secs(300);
/// Longest until a claim says that the host is away.
const TELL: Duration = Duration::from_secs(60);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            Long,
            "host-api-server-away",
            "the host's API server is away for three minutes and every program is killed meanwhile: a claim made then says so and is attached later, a deleted one keeps its VF until then, one in use is not touched",
            host_away
        ),
        scenario!(
            Long,
            "guest-api-server-away",
            "the guest's API server is away for three minutes and every program is killed meanwhile: no copy goes for its silence, and what was asked for just before ends where it should",
            guest_away
        ),
        scenario!(
            Long,
            "host-link-flaps",
            "for three minutes the link to the host's API server is down twenty seconds of thirty, without a word, for every program: claims made and deleted meanwhile end where they should, once, and nothing is doubled or taken away",
            host_flaps
        ),
    ]
}

/// What there is before an API server goes away: a claim that stays, and one that is to go.
struct Before {
    counter: Counter,
    pid: u32,
    staying: (Claim, Attached),
    leaving: (Claim, Attached),
    trace: Vec<TraceEvent>,
}

impl Before {
    async fn make(lab: &Lab<'_>) -> Result<Self> {
        let staying = lab.attach(&Wish::new("staying").vlan(700)).await?;
        let leaving = lab.attach(&Wish::new("leaving")).await?;
        let counter = Counter::start(&lab.l2, "outage").await?;
        let (pid, _) = counter.read(&lab.l2).await?;
        Ok(Self {
            counter,
            pid,
            staying,
            leaving,
            trace: lab.trace().await?,
        })
    }

    /// Everything ended where it should.
    async fn after(self, lab: &Lab<'_>, arriving: &Claim) -> Result<()> {
        let new = lab.ready(arriving).await?;
        lab.gone(&self.leaving.0).await?;
        let still = lab.ready(&self.staying.0).await?;
        let (was, gone) = (&self.staying.1, &self.leaving.1);
        ensure!(
            still.guest_address == was.guest_address && still.vf == was.vf,
            "the claim that stays had {was:?} and has {still:?}"
        );
        let ours = lab.qemu.ours().await?;
        ensure!(ours.len() == 2, "QEMU has {ours:?}");
        l2::bound(&lab.l2, &new.guest_address).await?;
        l2::bound(&lab.l2, &was.guest_address).await?;
        let (pid, _) = self.counter.read(&lab.l2).await?;
        ensure!(pid == self.pid && pid != 0, "the VM was disturbed");
        self.counter.stop(&lab.l2).await?;
        if new.vf != gone.vf {
            release::free_and_clean(lab, &gone.vf, gone.vf_index).await?;
        }

        let now = lab.trace().await?;
        let counts = writes::num_vfs(&self.trace, &now, &lab.wired.address)?;
        ensure!(counts.is_empty(), "sriov_numvfs was written: {counts:?}");
        let touched = writes::about(&self.trace, &now, &was.vf)?;
        ensure!(
            touched.is_empty(),
            "the VF in use was written to: {touched:?}"
        );
        let unbound = |e: &&TraceEvent| matches!(e.what, TraceKind::Unbind { .. });
        let unbinds: Vec<_> = writes::between(&self.trace, &now)?
            .iter()
            .filter(unbound)
            .collect();
        ensure!(unbinds.len() == 1, "unbound other than once: {unbinds:?}");
        lab.release(arriving).await?;
        lab.release(&self.staying.0).await
    }

    /// The kernel and QEMU are as they were.
    async fn undisturbed(&self, lab: &Lab<'_>) -> Result<()> {
        let now = lab.trace().await?;
        let touched = writes::between(&self.trace, &now)?;
        ensure!(touched.is_empty(), "meanwhile was written: {touched:?}");
        let ours = lab.qemu.ours().await?;
        ensure!(ours.len() == 2, "meanwhile QEMU had {ours:?}");
        Ok(())
    }
}

async fn kill_all(lab: &Lab<'_>) -> Result<()> {
    for part in Part::ALL {
        part.kill(lab).await?;
    }
    Ok(())
}

async fn host_away(lab: &Lab<'_>) -> Result<()> {
    let before = Before::make(lab).await?;
    let outage = Outage::begin(&lab.dc.host).await?;
    let over = Instant::now() + AWAY;
    let meanwhile = async {
        let arriving = lab.create(&Wish::new("arriving")).await?;
        lab.delete(&before.leaving.0).await?;
        kill_all(lab).await?;
        says_unreachable(lab, &arriving).await?;
        tokio::time::sleep_until(over).await;
        says_unreachable(lab, &arriving).await?;
        before.undisturbed(lab).await?;
        let guest = lab.guest_claims().get(&before.leaving.0.name).await?;
        let kept = guest.metadata.finalizers.unwrap_or_default();
        ensure!(!kept.is_empty(), "the claim that goes let go of its VF");
        Ok(arriving)
    }
    .await;
    outage.end().await?;
    before.after(lab, &meanwhile?).await
}

async fn says_unreachable(lab: &Lab<'_>, claim: &Claim) -> Result<()> {
    let what = "the claim to say that the host does not answer";
    watch::until(&lab.guest_claims(), &claim.name, what, TELL, |c| {
        let status = c.and_then(|c| c.status.as_ref());
        let synced = status.and_then(|s| condition(&s.conditions, type_::SYNCED));
        Ok(match synced {
            Some(c) if c.reason == reason::HOST_UNREACHABLE => Probe::Ready(()),
            other => Probe::NotYet(format!("{other:?}")),
        })
    })
    .await
}

async fn guest_away(lab: &Lab<'_>) -> Result<()> {
    let before = Before::make(lab).await?;
    let arriving = lab.create(&Wish::new("arriving")).await?;
    lab.delete(&before.leaving.0).await?;
    let outage = Outage::begin(&lab.dc.guest).await?;
    let over = Instant::now() + AWAY;
    let meanwhile = async {
        kill_all(lab).await?;
        tokio::time::sleep_until(over).await;
        let copy = lab.host_copy(&before.staying.0).await?;
        let copy = copy.context("a copy went for the guest's silence")?;
        ensure!(
            copy.metadata.deletion_timestamp.is_none(),
            "a copy was deleted for the guest's silence"
        );
        let ours = lab.qemu.ours().await?;
        ensure!(
            ours.iter().any(|d| d.id == before.staying.0.qemu_id()),
            "the VM lost the device of the claim that stays: {ours:?}"
        );
        Ok(())
    }
    .await;
    outage.end().await?;
    meanwhile?;
    before.after(lab, &arriving).await
}

async fn host_flaps(lab: &Lab<'_>) -> Result<()> {
    let before = Before::make(lab).await?;
    let flapping = Flapping::begin(&lab.dc.host).await?;
    let meanwhile = async {
        let arriving = lab.create(&Wish::new("arriving")).await?;
        lab.delete(&before.leaving.0).await?;
        let every = Duration::from_secs(1);
        wait::until("the link to come and go", FLAPPING, every, || async {
            let dropped = flapping.dropped()?;
            Ok(if dropped.len() >= FLAPS {
                Probe::Ready(dropped)
            } else {
                Probe::NotYet(format!("{dropped:?}"))
            })
        })
        .await
        .map(|dropped| (arriving, dropped))
    }
    .await;
    flapping.end()?;
    let (arriving, dropped) = meanwhile?;
    ensure!(
        dropped.iter().all(|n| *n > 0),
        "nobody met a link that was down: {dropped:?}"
    );
    before.after(lab, &arriving).await
}
