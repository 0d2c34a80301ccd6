//! From which of two PFs a claim's VF comes, and what is left of a class.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::VFClass;
use futures::FutureExt;
use kube::{Api, Client};

use super::support::{Attached, Lab, Wish, l1, watch};
use super::{Scenario, scenario};
use crate::wait::Probe;

const SPREAD: &str = "e2e-spread";
const PACK: &str = "e2e-pack";
/// Longest until a number of free VFs is told on the host, and from there in the guest.
const TOLD: Duration = Duration::from_secs(60);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![scenario!(
        Long,
        "placement",
        "claims of a class that spreads get VFs of two PFs, those of one that packs leave the idle PF idle, and host and guest say how many are left",
        placement
    )]
}

async fn placement(lab: &Lab<'_>) -> Result<()> {
    lab.manage(&lab.second, true).await?;
    lab.class_placing(SPREAD, "Spread").await?;
    let (_first, at) = lab.attach(&Wish::new("spread-1").class(SPREAD)).await?;
    let (second, beside) = lab.attach(&Wish::new("spread-2").class(SPREAD)).await?;
    let (used, other) = (pf_of(&at)?, pf_of(&beside)?);
    ensure!(used != other, "both claims got VFs of {used}");

    // The other PF is idle again, and has more VFs left.
    lab.release(&second).await?;
    lab.class_placing(PACK, "Pack").await?;
    let (_packed, at) = lab.attach(&Wish::new("pack-1").class(PACK)).await?;
    let packed = pf_of(&at)?;
    ensure!(
        packed == used,
        "a VF of {packed} was taken, and {used} is in use"
    );
    lab.class_placing(SPREAD, "Spread").await?;
    let (_third, at) = lab.attach(&Wish::new("spread-3").class(SPREAD)).await?;
    let spread = pf_of(&at)?;
    ensure!(
        spread == other,
        "a VF of {spread} was taken, and {other} is idle"
    );

    let mut vfs = 0;
    for pf in [&lab.wired, &lab.second] {
        vfs += l1::pf(&lab.l1, &pf.address).await?.vfs.len();
    }
    let left = u32::try_from(vfs)?.saturating_sub(3);
    for (whose, client) in [("the host", &lab.host), ("the guest", &lab.guest)] {
        let told = told(client, whose, left).await?;
        let nodes = told.status.map(|s| s.nodes).unwrap_or_default();
        let named = nodes.len() == usize::from(whose == "the host");
        ensure!(named, "{whose} is told of {nodes:?}");
    }
    Ok(())
}

/// The PF of an attached claim's VF.
fn pf_of(attached: &Attached) -> Result<String> {
    let status = attached.host.status.as_ref();
    let device = status.and_then(|s| s.device.as_ref());
    Ok(device.context("no device")?.physical_function.clone())
}

async fn told(client: &Client, whose: &str, left: u32) -> Result<VFClass> {
    let api: Api<VFClass> = Api::all(client.clone());
    let what = format!("{whose} to be told of {left} free VFs");
    watch::until(&api, SPREAD, &what, TOLD, |class| {
        let status = class.and_then(|c| c.status.clone());
        Ok(match (class, &status) {
            (Some(class), Some(status)) if status.free == Some(left) => Probe::Ready(class.clone()),
            _ => Probe::NotYet(format!("{status:?}")),
        })
    })
    .await
}
