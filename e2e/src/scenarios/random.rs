//! Claims and kills at random, for as long as one likes. At the end claims, kernel, QEMU,
//! cgroups and memlock must agree that nothing is left, and every write must have been due.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use common::api::type_;
use fastrand::Rng;
use futures::FutureExt;
use futures::future::try_join_all;
use kube::api::ListParams;

use super::several::Before;
use super::support::claims::truth;
use super::support::l1::Qemu;
use super::support::pods::Part;
use super::support::site::SECOND_NODE;
use super::support::{Claim, Lab, Wish};
use super::{Scenario, scenario};
use crate::progress;

/// Minutes that it goes on.
const MINUTES: &str = "VF_E2E_RANDOM_MINUTES";
/// The seed, to repeat a run's choices; what the machines do at them is never the same.
const SEED: &str = "VF_E2E_RANDOM_SEED";
/// Claims at a time: more than one VM has ports, and more than one PF has VFs.
const AT_ONCE: usize = 9;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![scenario!(
        Named,
        "at-random",
        "claims of two VMs come and go over two PFs and every program is killed, at random, for VF_E2E_RANDOM_MINUTES (30): at the end nothing is left, each VF had one holder at a time, and the VFs were made once",
        at_random
    )]
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Deed {
    Create,
    Delete,
    KillAgent,
    KillController,
    KillSyncer,
    Wait,
}

/// By how often each is chosen. The agent works on a claim for some seconds: killed more often
/// it would never finish, and less would be met.
const DEEDS: [(Deed, u32); 6] = [
    (Deed::Create, 6),
    (Deed::Delete, 4),
    (Deed::KillAgent, 2),
    (Deed::KillController, 1),
    (Deed::KillSyncer, 1),
    (Deed::Wait, 12),
];

fn choose(rng: &mut Rng) -> Deed {
    let all: u32 = DEEDS.iter().map(|(_, often)| often).sum();
    let mut at = rng.u32(0..all);
    for (deed, often) in DEEDS {
        match at.checked_sub(often) {
            None => return deed,
            Some(rest) => at = rest,
        }
    }
    Deed::Wait
}

/// A run so far.
struct Run {
    rng: Rng,
    alive: Vec<Claim>,
    going: Vec<Claim>,
    /// Claims made, Ready ones seen when they were deleted, processes killed.
    made: u32,
    served: u32,
    killed: BTreeMap<&'static str, u32>,
}

async fn at_random(lab: &Lab<'_>) -> Result<()> {
    let minutes: u64 = setting(MINUTES)?.unwrap_or(30);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed: u64 = setting(SEED)?.unwrap_or(now.as_secs());
    progress::line(&format!("{minutes} minutes with {SEED}={seed}"));
    let second = lab.second().await?;
    let qemus = [&lab.qemu, &second.qemu];
    let before = Before::take(lab, &qemus, &[&lab.wired, &lab.second]).await?;
    let until = Instant::now() + Duration::from_secs(minutes * 60);
    let mut run = Run {
        rng: Rng::with_seed(seed),
        alive: Vec::new(),
        going: Vec::new(),
        made: 0,
        served: 0,
        killed: BTreeMap::new(),
    };
    while Instant::now() < until {
        let deed = choose(&mut run.rng);
        run.act(lab, deed)
            .await
            .with_context(|| format!("{deed:?} after {}", run.told()))?;
        run.agree(lab, &qemus)
            .await
            .with_context(|| format!("after {deed:?}, {}", run.told()))?;
    }
    run.end(lab).await.with_context(|| run.told())?;
    before.nothing_left(lab).await.with_context(|| run.told())?;
    progress::line(&run.told());
    // A run in which nothing was served shows nothing.
    ensure!(run.served > 0 || minutes < 2, "{}", run.told());
    Ok(())
}

impl Run {
    async fn act(&mut self, lab: &Lab<'_>, deed: Deed) -> Result<()> {
        match deed {
            Deed::Create if self.alive.len() < AT_ONCE => {
                let mut wish = Wish::new(&format!("random-{}", self.made)).trust(self.rng.bool());
                if self.rng.bool() {
                    wish = wish.node(SECOND_NODE);
                }
                if self.rng.bool() {
                    wish = wish.vlan(self.rng.i64(2..4094));
                }
                self.made += 1;
                self.alive.push(lab.create(&wish).await?);
            }
            Deed::Delete if !self.alive.is_empty() => {
                let claim = self.alive.swap_remove(self.rng.usize(0..self.alive.len()));
                let now = lab.guest_claims().get(&claim.name).await?;
                self.served += u32::from(truth(&now, type_::READY) == Some("True"));
                lab.delete(&claim).await?;
                self.going.push(claim);
            }
            Deed::KillAgent => self.kill(lab, Part::Agent).await?,
            Deed::KillController => self.kill(lab, Part::Controller).await?,
            Deed::KillSyncer => self.kill(lab, Part::Syncer).await?,
            // Chance is the point here: there is no event to wait for.
            Deed::Create | Deed::Delete | Deed::Wait => {
                let pause = Duration::from_millis(self.rng.u64(0..8000));
                tokio::time::sleep(pause).await;
            }
        }
        Ok(())
    }

    async fn kill(&mut self, lab: &Lab<'_>, part: Part) -> Result<()> {
        *self.killed.entry(part.name()).or_default() += part.kill_if_any(lab).await?;
        Ok(())
    }

    /// At every moment: no VF is two claims' attachment, and no QEMU has a device whose claim
    /// is gone, nor have two the same.
    async fn agree(&mut self, lab: &Lab<'_>, qemus: &[&Qemu]) -> Result<()> {
        let mut devices = BTreeMap::new();
        for qemu in qemus.iter().copied() {
            for device in qemu.ours().await? {
                let id = device.id;
                if let Some(other) = devices.insert(id.clone(), qemu) {
                    bail!("{} and {} have {id}", other.domain, qemu.domain);
                }
            }
        }
        let copies = lab.host_claims().list(&ListParams::default()).await?.items;
        let mut attached = BTreeMap::new();
        for copy in &copies {
            let status = copy.status.as_ref();
            let device = status.and_then(|s| s.device.as_ref().zip(s.attachment.as_ref()));
            let name = copy.metadata.name.clone().unwrap_or_default();
            if let Some((device, _)) = device
                && let vf = (device.physical_function.clone(), device.vf_index)
                && let Some(other) = attached.insert(vf, name.clone())
            {
                bail!(
                    "VF {} of {} is attached for {other} and for {name}",
                    device.vf_index,
                    device.physical_function
                );
            }
        }
        // The devices were read before the copies: a copy goes after its device.
        let claims = lab.guest_claims().list(&ListParams::default()).await?.items;
        let known = |uid: &Option<String>, id: &str| {
            uid.as_deref()
                .is_some_and(|uid| common::api::host_claim_name(uid) == id)
        };
        self.going.retain(|g| {
            claims
                .iter()
                .any(|c| c.metadata.uid.as_ref() == Some(&g.uid))
        });
        for (id, qemu) in devices {
            let mut all = claims.iter();
            let there = all.any(|c| known(&c.metadata.uid, &id));
            // It may have gone, with its claim, since QEMU was asked.
            if !there && qemu.ours().await?.iter().any(|d| d.id == id) {
                bail!("{} has {id} and its claim is gone", qemu.domain);
            }
        }
        Ok(())
    }

    /// Deletes what is there, and sees that all programs came back and serve.
    async fn end(&mut self, lab: &Lab<'_>) -> Result<()> {
        try_join_all(self.alive.iter().map(|claim| lab.delete(claim))).await?;
        self.going.append(&mut self.alive);
        try_join_all(self.going.iter().map(|claim| lab.gone(claim))).await?;
        self.going.clear();
        let (last, _) = lab.attach(&Wish::new("random-last")).await?;
        lab.release(&last).await
    }

    fn told(&self) -> String {
        format!(
            "{} claims made, {} deleted when they were Ready, killed: {:?}",
            self.made, self.served, self.killed
        )
    }
}

/// A number from the environment.
fn setting<T: FromStr>(name: &str) -> Result<Option<T>> {
    let Some(text) = std::env::var_os(name) else {
        return Ok(None);
    };
    let number = text.to_str().and_then(|text| text.parse().ok());
    Ok(Some(number.with_context(|| {
        format!("{name} is {text:?}, which is no such number")
    })?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_deed_is_chosen_about_as_often_as_it_should_be() {
        let mut rng = Rng::with_seed(7);
        let mut counts = BTreeMap::new();
        for _ in 0..2600 {
            *counts.entry(choose(&mut rng)).or_insert(0_u32) += 1;
        }
        for (deed, often) in DEEDS {
            let count = counts.get(&deed).copied().unwrap_or(0);
            assert!(count.abs_diff(often * 100) < often * 50, "{deed:?} {count}");
        }
    }
}
