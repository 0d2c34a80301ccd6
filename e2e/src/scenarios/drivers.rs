//! Kernel modules on the hosts: what `HostDriver`s make of L1's kernel, and what they leave alone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::api::{
    DriverStatus, HostDriver, HostDriverSpec, PhysicalFunction, SriovNode, condition, reason, type_,
};
use futures::FutureExt;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use super::support::far::sh;
use super::support::kinds;
use super::support::l2;
use super::support::lab::MARK;
use super::support::site::{L1_NODE, PEER};
use super::support::{Lab, Wish, watch, wire, writes};
use super::{Needs, Scenario, When, release, scenario, traffic};
use crate::context::DataCentre;
use crate::machine;
use crate::wait::Probe;

/// An agent looks at once; kmod on an emulated machine takes seconds.
const DONE: Duration = Duration::from_secs(90);
/// The module of the scenario: L1 has no NVMe device on a network, so nothing loads or uses it.
const MODULE: &str = "nvme_tcp";
const PARAMETER: &str = "so_priority";

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "host-driver",
            "a HostDriver has its module loaded with what that needs, and loaded anew for other parameters while nothing uses it; igb, with a guest's VF, is left alone, and so is what a deleted HostDriver had loaded",
            host_driver
        ),
        Scenario {
            needs: Needs::BareMachines,
            when: When::Long,
            name: "step2-driver-installed",
            shows: "L1 comes up without igb: a HostDriver brings it, the PF becomes a PhysicalFunction, and a claim goes all the way",
            run: |dc| step2(dc).boxed(),
        },
    ]
}

/// The proposal's test plan from its second step on, in a boot of its own.
async fn step2(dc: &DataCentre) -> Result<()> {
    let l1 = machine::find(dc)?.l1().clone();
    sh(&l1, "[[ ! -e /sys/module/igb ]]")
        .await
        .context("igb is there without having been asked for")?;
    let function = "for d in /sys/bus/pci/devices/*; do [[ -e $d/sriov_totalvfs && ! -e $d/driver ]] && echo ${d##*/}; done; true";
    let address = sh(&l1, function).await?;
    let host = dc.host.client();
    let functions: Api<PhysicalFunction> = Api::all(host.clone());
    let nodes: Api<SriovNode> = Api::all(host.clone());
    let told = nodes.get(L1_NODE).await?.status.unwrap_or_default().missing;
    let none = functions.list(&ListParams::default()).await?.items;
    ensure!(
        none.is_empty() && told.iter().any(|words| words.contains(&address)),
        "of a card without a driver there is {none:?}, and L1 says {told:?}"
    );

    let wishes: Api<HostDriver> = Api::all(host.clone());
    make(&wishes, "e2e-card", "igb", &[]).await?;
    let object = kinds::physical_function(&host, &address)
        .await
        .context("after the driver came")?;
    let status = functions.get(&object).await?.status.unwrap_or_default();
    ensure!(
        status.driver.as_deref() == Some("igb") && status.interface_name.is_some(),
        "the PhysicalFunction says {status:?}"
    );
    sh(&l1, "[[ $(</sys/module/igb/initstate) == live ]]").await?;
    counted(&wishes, "e2e-card", 1).await?;

    let lab = Lab::open_bare(dc).await?;
    ensure!(
        lab.wired.object == object && lab.wired.address == address,
        "the PF is another object now: {:?}",
        lab.wired
    );
    let wish = Wish::new("first").mac("02:5f:00:00:02:01").vlan(200);
    let (claim, had) = lab.attach(&wish).await?;
    let seen = l2::bound(&lab.l2, &had.guest_address).await?;
    ensure!(
        seen.mac.as_deref() == Some("02:5f:00:00:02:01"),
        "the guest has {seen:?}"
    );
    lab.switch.reset().await?;
    let net = traffic::net(&lab, &had, 0).await?;
    net.ping(&lab.l2, PEER, 3, Duration::from_secs(30)).await?;
    wire::only(&lab, &[("02:5f:00:00:02:01", Some(200))]).await?;
    net.close(&lab.l2).await?;
    lab.release(&claim).await?;
    release::free_and_clean(&lab, &had.vf, had.vf_index).await
}

async fn host_driver(lab: &Lab<'_>) -> Result<()> {
    // Also what an earlier run left.
    unload(lab).await?;
    let result = modules(lab).await;
    let unloaded = unload(lab).await;
    result.and(unloaded)
}

async fn unload(lab: &Lab<'_>) -> Result<()> {
    let script = format!("[[ ! -e /sys/module/{MODULE} ]] || modprobe -r {MODULE}");
    sh(&lab.l1, &script).await.map(drop)
}

async fn modules(lab: &Lab<'_>) -> Result<()> {
    let wishes: Api<HostDriver> = Api::all(lab.host.clone());
    make(&wishes, "e2e-storage", MODULE, &[(PARAMETER, "64")]).await?;
    let line = line_of(lab, "e2e-storage", 1).await?;
    ensure!(line.ready && line.reason == reason::LOADED, "{line:?}");
    ensure!(
        kernel_has(lab).await? == "live 64",
        "the kernel has {}",
        kernel_has(lab).await?
    );
    // What it needs came with it.
    sh(&lab.l1, "grep -q live /sys/module/nvme_fabrics/initstate").await?;
    counted(&wishes, "e2e-storage", 1).await?;

    let with = Patch::Merge(json!({"spec": {"parameters": {PARAMETER: "128"}}}));
    wishes
        .patch("e2e-storage", &PatchParams::default(), &with)
        .await?;
    let line = line_of(lab, "e2e-storage", 2).await?;
    ensure!(line.ready, "{line:?}");
    ensure!(
        kernel_has(lab).await? == "live 128",
        "the kernel has {}",
        kernel_has(lab).await?
    );

    refused(lab, &wishes).await?;
    in_use(lab, &wishes).await?;

    wishes
        .delete("e2e-storage", &DeleteParams::default())
        .await?;
    let api: Api<SriovNode> = Api::all(lab.host.clone());
    watch::until(
        &api,
        L1_NODE,
        "the node to say nothing of it",
        DONE,
        |node| {
            let lines = node
                .and_then(|n| n.status.clone())
                .unwrap_or_default()
                .drivers;
            Ok(if lines.iter().any(|l| l.name == "e2e-storage") {
                Probe::NotYet(format!("{lines:?}"))
            } else {
                Probe::Ready(())
            })
        },
    )
    .await?;
    ensure!(
        kernel_has(lab).await? == "live 128",
        "a deleted wish unloaded it"
    );
    Ok(())
}

/// What cannot be loaded ends in words, and nothing is loaded for it.
async fn refused(lab: &Lab<'_>, wishes: &Api<HostDriver>) -> Result<()> {
    make(wishes, "e2e-absent", "no_such_module", &[]).await?;
    make(wishes, "e2e-strange", "ixgbe", &[("max_vsf", "4")]).await?;
    let kernel = sh(&lab.l1, "uname -r").await?;
    let absent = line_of(lab, "e2e-absent", 1).await?;
    ensure!(
        absent.reason == reason::MODULE_NOT_FOUND && absent.message.contains(&kernel),
        "{absent:?}"
    );
    let strange = line_of(lab, "e2e-strange", 1).await?;
    ensure!(
        strange.reason == reason::PARAMETER_UNKNOWN && strange.message.contains("max_vsf"),
        "{strange:?}"
    );
    sh(&lab.l1, "[[ ! -e /sys/module/ixgbe ]]").await?;
    counted(wishes, "e2e-absent", 0).await?;
    for name in ["e2e-absent", "e2e-strange"] {
        wishes.delete(name, &DeleteParams::default()).await?;
    }
    Ok(())
}

/// The driver of a PF whose VF a guest has is not taken away for a parameter.
async fn in_use(lab: &Lab<'_>, wishes: &Api<HostDriver>) -> Result<()> {
    let (claim, given) = lab.attach(&Wish::new("drives")).await?;
    let before = lab.trace().await?;
    make(wishes, "e2e-card", "igb", &[("debug", "1")]).await?;
    let line = line_of(lab, "e2e-card", 1).await?;
    ensure!(
        !line.ready
            && line.reason == reason::MODULE_IN_USE
            && line.message.contains(&lab.wired.address),
        "{line:?}"
    );
    let after = lab.trace().await?;
    let touched = writes::between(&before, &after)?;
    ensure!(
        touched.is_empty(),
        "igb's devices were touched: {touched:?}"
    );
    let still = lab.ready(&claim).await?;
    ensure!(
        still.vf == given.vf && still.guest_address == given.guest_address,
        "{given:?} became {still:?}"
    );
    wishes.delete("e2e-card", &DeleteParams::default()).await?;
    lab.release(&claim).await
}

async fn make(
    wishes: &Api<HostDriver>,
    name: &str,
    module: &str,
    parameters: &[(&str, &str)],
) -> Result<()> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let spec = HostDriverSpec {
        module: module.to_owned(),
        parameters: parameters.iter().map(owned).collect(),
        ..HostDriverSpec::default()
    };
    let mut wish = HostDriver::new(name, spec);
    wish.metadata.labels = Some([(MARK.to_owned(), "yes".to_owned())].into());
    wishes.create(&PostParams::default(), &wish).await?;
    Ok(())
}

/// What L1's agent says of a HostDriver of that generation.
async fn line_of(lab: &Lab<'_>, name: &str, generation: i64) -> Result<DriverStatus> {
    let api: Api<SriovNode> = Api::all(lab.host.clone());
    let what = format!("L1's agent to say something of {name}");
    watch::until(&api, L1_NODE, &what, DONE, |node| {
        let lines = node
            .and_then(|n| n.status.clone())
            .unwrap_or_default()
            .drivers;
        let mut mine = lines.iter().filter(|l| l.name == name);
        let found = mine.find(|l| l.observed_generation == Some(generation));
        Ok(match found {
            Some(line) => Probe::Ready(line.clone()),
            None => Probe::NotYet(format!("{lines:?}")),
        })
    })
    .await
}

/// The controller's count: one node is to have it, and `loaded` have.
async fn counted(wishes: &Api<HostDriver>, name: &str, loaded: u32) -> Result<()> {
    let what = format!("{name} to be counted");
    watch::until(wishes, name, &what, DONE, |wish| {
        let status = wish.and_then(|w| w.status.clone()).unwrap_or_default();
        let ready = condition(&status.conditions, type_::READY).map(|c| c.status == "True");
        let right = (status.nodes.selected, status.nodes.loaded) == (1, loaded)
            && ready == Some(loaded == 1);
        Ok(if right {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("{status:?}"))
        })
    })
    .await
}

/// The module's state and parameter in L1's kernel.
async fn kernel_has(lab: &Lab<'_>) -> Result<String> {
    let script =
        format!("cd /sys/module/{MODULE} && echo $(<initstate) $(<parameters/{PARAMETER})");
    sh(&lab.l1, &script)
        .await
        .context("the module is not loaded")
}
