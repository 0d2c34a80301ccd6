//! Refusals: each says in a condition and an event what is wrong and what to do, and
//! changes nothing in kernel and QEMU.

use anyhow::{Context, Result, ensure};
use common::api::{reason, type_};
use futures::FutureExt;
use serde_json::json;

use super::support::claims::refused_at_once;
use super::support::hold::OthersHold;
use super::support::ports::Fillers;
use super::support::site::L2_NODE;
use super::support::untouched::Picture;
use super::support::{Claim, Lab, Wish};
use super::{Scenario, scenario};
use crate::deploy::names::{CLASS, DEFAULT_CLASS};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "refused-unknown-class",
            "a class that the guest may not use or that does not exist",
            unknown_class
        ),
        scenario!(
            "refused-unknown-node",
            "a node that the guest cluster does not have",
            unknown_node
        ),
        scenario!(
            "refused-forged-uuid",
            "a node made up by the guest with the UUID of another tenant's VM",
            forged_uuid
        ),
        scenario!(
            "refused-contradicting-ip",
            "a node with the right UUID and another machine's address",
            contradicting_ip
        ),
        scenario!(
            "refused-pf-not-managed",
            "a PF that no administrator gave its consent to",
            not_managed
        ),
        scenario!(
            "refused-own-pf-managed-by-mistake",
            "the PF with the node's default route, marked managed by mistake",
            in_use_by_host
        ),
        scenario!(
            "refused-not-isolated",
            "a PF whose IOMMU group has other devices",
            not_isolated
        ),
        scenario!(
            "refused-pool-exhausted",
            "every VF of the PF is held by somebody",
            pool_exhausted
        ),
        scenario!(
            "refused-mac-in-use",
            "a MAC that another VF of the PF has",
            mac_in_use
        ),
        scenario!(
            "refused-no-free-port",
            "a VM whose PCIe root ports are all taken",
            no_free_port
        ),
        scenario!(
            "refused-override",
            "a setting that the class does not let claims choose",
            override_not_allowed
        ),
        scenario!(
            "refused-by-the-api-server",
            "a malformed MAC and a VLAN out of range never become a claim",
            by_the_api_server
        ),
    ]
}

/// Makes a claim that must be refused for `why`, with every one of `words` in condition and
/// event, and checks that nothing else happened.
async fn refuse(lab: &Lab<'_>, wish: Wish, why: &str, words: &[&str]) -> Result<()> {
    let before = Picture::take(lab).await?;
    let claim = lab.create(&wish).await?;
    speaks(lab, &claim, why, words).await?;
    before.still(lab).await?;
    lab.release(&claim).await?;
    before
        .still(lab)
        .await
        .context("after the refused claim was deleted")
}

async fn speaks(lab: &Lab<'_>, claim: &Claim, why: &str, words: &[&str]) -> Result<()> {
    let condition = lab.refused(claim, type_::READY, why).await?;
    let event = lab.event(claim, why).await?;
    for said in [&condition.message, &event] {
        for word in words {
            ensure!(
                said.contains(word),
                "{why}: {said:?} does not mention {word:?}"
            );
        }
        ensure!(
            said.split_whitespace().count() >= 6,
            "{why}: {said:?} says not what to do"
        );
    }
    Ok(())
}

async fn unknown_class(lab: &Lab<'_>) -> Result<()> {
    let wish = Wish::new("no-class").class("no-such-class");
    refuse(
        lab,
        wish,
        reason::CLASS_NOT_FOUND,
        &["no-such-class", CLASS],
    )
    .await?;
    lab.class_for_others("gold", json!({})).await?;
    let wish = Wish::new("not-mine").class("gold");
    refuse(lab, wish, reason::CLASS_NOT_ALLOWED, &["gold", CLASS]).await
}

async fn unknown_node(lab: &Lab<'_>) -> Result<()> {
    let wish = Wish::new("no-node").node("no-such-node");
    refuse(lab, wish, reason::NODE_NOT_FOUND, &["no-such-node"]).await
}

async fn forged_uuid(lab: &Lab<'_>) -> Result<()> {
    let uuid = "0f0f0f0f-1111-4222-8333-444444444444";
    lab.other_tenants_vm("other", uuid).await?;
    lab.node_without_kubelet("forged", uuid, "10.77.0.7")
        .await?;
    refuse(
        lab,
        Wish::new("forged").node("forged"),
        reason::VM_NOT_FOUND,
        &[uuid],
    )
    .await
}

async fn contradicting_ip(lab: &Lab<'_>) -> Result<()> {
    let (uuid, _) = lab.node_identity(L2_NODE).await?;
    let wrong = "10.77.0.8";
    lab.node_without_kubelet("elsewhere", &uuid, wrong).await?;
    let wish = Wish::new("elsewhere").node("elsewhere");
    refuse(lab, wish, reason::IP_CONTRADICTS, &[wrong]).await
}

async fn not_managed(lab: &Lab<'_>) -> Result<()> {
    lab.class("uplink", json!({"pciAddresses": [lab.uplink.address]}))
        .await?;
    refuse(
        lab,
        Wish::new("unmanaged").class("uplink"),
        reason::NOT_MANAGED,
        &["managed"],
    )
    .await
}

async fn in_use_by_host(lab: &Lab<'_>) -> Result<()> {
    lab.class("uplink", json!({"pciAddresses": [lab.uplink.address]}))
        .await?;
    lab.manage(&lab.uplink, true).await?;
    let words = [lab.uplink.interface.as_str()];
    refuse(
        lab,
        Wish::new("uplink").class("uplink"),
        reason::IN_USE_BY_HOST,
        &words,
    )
    .await
}

async fn not_isolated(lab: &Lab<'_>) -> Result<()> {
    lab.class("shared", json!({"pciAddresses": [lab.shared.address]}))
        .await?;
    lab.manage(&lab.shared, true).await?;
    refuse(
        lab,
        Wish::new("shared").class("shared"),
        reason::NOT_ISOLATED,
        &["IOMMU"],
    )
    .await
}

async fn pool_exhausted(lab: &Lab<'_>) -> Result<()> {
    let hold = OthersHold::all(lab).await?;
    let result = refuse(lab, Wish::new("late"), reason::NO_FREE_VF, &["VF"]).await;
    hold.end(lab).await?;
    result
}

async fn mac_in_use(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:50:01";
    let (_, held) = lab.attach(&Wish::new("first").mac(mac)).await?;
    ensure!(held.mac == mac, "the first claim has {}", held.mac);
    refuse(
        lab,
        Wish::new("double").mac(mac),
        reason::MAC_IN_USE,
        &[mac],
    )
    .await
}

async fn no_free_port(lab: &Lab<'_>) -> Result<()> {
    let fillers = Fillers::plug(lab).await?;
    let waits = async {
        let before = Picture::take(lab).await?;
        let claim = lab.create(&Wish::new("no-port")).await?;
        speaks(lab, &claim, reason::NO_FREE_PORT, &["port"]).await?;
        // It has no VF either, which a VM with a port could use.
        before.still(lab).await.map(|()| claim)
    }
    .await;
    fillers.unplug(lab).await?;
    let claim = waits?;
    // A port is free again, so the waiting claim gets its VF without being made anew.
    lab.ready(&claim).await?;
    Ok(())
}

async fn override_not_allowed(lab: &Lab<'_>) -> Result<()> {
    let wish = Wish::new("greedy").class(DEFAULT_CLASS).trust(true);
    refuse(lab, wish, reason::OVERRIDE_NOT_ALLOWED, &["trust"]).await
}

async fn by_the_api_server(lab: &Lab<'_>) -> Result<()> {
    for mac in [
        "02:5f:00:00:50",
        "zz:5f:00:00:50:01",
        "01:00:5e:00:00:01",
        "00:00:00:00:00:00",
    ] {
        let said = refused_at_once(lab, &Wish::new("bad").mac(mac)).await?;
        ensure!(said.contains("macAddress"), "{mac}: {said}");
    }
    for vlan in [0, 4095, -1] {
        let said = refused_at_once(lab, &Wish::new("bad").vlan(vlan)).await?;
        ensure!(said.contains("vlan.id"), "{vlan}: {said}");
    }
    // The neighbours of what is refused are taken.
    for vlan in [1, 4094] {
        let claim = lab
            .create(&Wish::new("good").node("nowhere").vlan(vlan))
            .await?;
        lab.release(&claim).await?;
    }
    Ok(())
}
