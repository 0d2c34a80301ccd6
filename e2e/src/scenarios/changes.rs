//! A claim's network is changed while its guest has the VF: what is granted reaches the VF
//! without the guest losing it, and what is not changes nothing.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::api::{condition, reason, type_};
use futures::FutureExt;
use serde_json::json;

use super::support::claims::{REFUSE, told, truth};
use super::support::l1::{self, VfSettings};
use super::support::site::PEER;
use super::support::{Claim, Lab, Wish, watch, wire, writes};
use super::{Scenario, release, scenario, traffic};
use crate::wait::{self, Probe};

/// Longest an edit may take to reach the VF.
const CHANGE: Duration = Duration::from_secs(20);
const EVERY: Duration = Duration::from_millis(200);
const PING: Duration = Duration::from_secs(30);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "network-changes-live",
            "VLAN, trust and maximum rate of an attached claim are changed and reach the VF in use; a MAC, a link state and a minimum rate are refused in words",
            network_changes_live
        ),
        scenario!(
            Long,
            "guest-changes-its-mac",
            "the PF refuses the address that a guest gives itself, until its claim is granted trust; then its frames leave from that address, which another change of the claim leaves to it and the next holder does not find",
            guest_changes_its_mac
        ),
    ]
}

async fn network_changes_live(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:61:01";
    let (claim, before) = lab
        .attach(&Wish::new("changing").mac(mac).vlan(630))
        .await?;
    let granted = VfSettings {
        mac: mac.to_owned(),
        vlan: 630,
        spoof_check: true,
        trust: false,
        max_rate: 0,
    };
    is_as(lab, before.vf_index, &granted).await?;
    let devices = lab.qemu.ours().await?;
    let trace = lab.trace().await?;
    let net = traffic::net(lab, &before, 0).await?;

    let asked =
        json!({"macAddress": mac, "vlan": {"id": 631}, "trust": true, "maxTxRateMbps": 500});
    lab.edit(&claim, asked.clone()).await?;
    let changed = VfSettings {
        vlan: 631,
        trust: true,
        max_rate: 500,
        ..granted.clone()
    };
    is_as(lab, before.vf_index, &changed).await?;
    let words = lab.host_event(&claim, reason::APPLIED).await?;
    ensure!(
        words.contains("VLAN and trust"),
        "of the edit it is said {words:?}"
    );
    lab.switch.reset().await?;
    net.ping(&lab.l2, PEER, 3, PING).await?;
    wire::only(lab, &[(mac, Some(631))]).await?;

    for (field, value, why, words) in [
        (
            "linkState",
            json!("Disable"),
            reason::UNSUPPORTED_SETTING,
            "driver igb cannot set link state Disable; it can set",
        ),
        (
            "minTxRateMbps",
            json!(10),
            reason::UNSUPPORTED_SETTING,
            "driver igb cannot set a minimum transmit rate; it can set",
        ),
        (
            "macAddress",
            json!("02:5f:00:00:61:02"),
            reason::OVERRIDE_NOT_ALLOWED,
            "delete the claim and make another",
        ),
    ] {
        let mut wish = asked.clone();
        if let Some(fields) = wish.as_object_mut() {
            fields.insert(field.to_owned(), value);
        }
        lab.edit(&claim, wish).await?;
        edit_refused(lab, &claim, why, words).await?;
        let now = settings(lab, before.vf_index).await?;
        ensure!(now == changed, "a refused {field} made it {now:?}");
    }

    lab.edit(&claim, json!({"macAddress": mac, "vlan": {"id": 630}}))
        .await?;
    is_as(lab, before.vf_index, &granted).await?;
    lab.switch.reset().await?;
    net.ping(&lab.l2, PEER, 3, PING).await?;
    wire::only(lab, &[(mac, Some(630))]).await?;

    let after = lab.ready(&claim).await?;
    ensure!(
        after.guest_address == before.guest_address && lab.qemu.ours().await? == devices,
        "the guest did not keep its device: {before:?} became {after:?}"
    );
    let now = lab.trace().await?;
    let touched = writes::between(&trace, &now)?;
    ensure!(touched.is_empty(), "the changes wrote {touched:?}");
    let said = lab.host_events(&claim).await?;
    ensure!(
        !said.iter().any(|reason| reason == reason::REPAIRED),
        "an edit was taken for somebody's doing: {said:?}"
    );
    lab.release(&claim).await?;

    // Asked for from the start it is refused before there is a VF.
    let down = lab
        .create(&Wish::new("down").network("linkState", json!("Disable")))
        .await?;
    let said = lab
        .refused(&down, type_::READY, reason::UNSUPPORTED_SETTING)
        .await?;
    ensure!(
        said.message.contains("link state Disable") && said.message.contains("another class"),
        "it says {:?}",
        said.message
    );
    lab.release(&down).await
}

async fn guest_changes_its_mac(lab: &Lab<'_>) -> Result<()> {
    let (mac, own) = ("02:5f:00:00:62:01", "02:5f:00:00:62:02");
    let (claim, attached) = lab.attach(&Wish::new("own-mac").mac(mac).vlan(640)).await?;
    let granted = VfSettings {
        mac: mac.to_owned(),
        vlan: 640,
        spoof_check: true,
        trust: false,
        max_rate: 0,
    };
    let net = traffic::net(lab, &attached, 0).await?;
    let Err(refused) = net.set_mac(&lab.l2, own).await else {
        bail!("an untrusted guest gave itself the address {own}");
    };
    let words = format!("{refused:#}");
    ensure!(words.contains("Cannot assign requested address"), "{words}");
    is_as(lab, attached.vf_index, &granted).await?;
    lab.switch.reset().await?;
    net.ping(&lab.l2, PEER, 3, PING).await?;
    wire::only(lab, &[(mac, Some(640))]).await?;

    let asked = json!({"macAddress": mac, "vlan": {"id": 640}, "trust": true});
    lab.edit(&claim, asked).await?;
    let trusted = VfSettings {
        trust: true,
        ..granted
    };
    is_as(lab, attached.vf_index, &trusted).await?;
    net.set_mac(&lab.l2, own).await?;
    lab.switch.reset().await?;
    net.ping(&lab.l2, PEER, 3, PING).await?;
    wire::only(lab, &[(own, Some(640))]).await?;
    // Another change of the claim leaves the guest its address.
    let asked =
        json!({"macAddress": mac, "vlan": {"id": 640}, "trust": true, "maxTxRateMbps": 500});
    lab.edit(&claim, asked).await?;
    let changed = VfSettings {
        mac: own.to_owned(),
        max_rate: 500,
        ..trusted
    };
    is_as(lab, attached.vf_index, &changed).await?;
    lab.ready(&claim).await?;
    let said = lab.host_events(&claim).await?;
    ensure!(
        !said.iter().any(|reason| reason == reason::REPAIRED),
        "a trusted guest's own address was taken for a drift: {said:?}"
    );
    lab.release(&claim).await?;
    release::free_and_clean(lab, &attached.vf, attached.vf_index).await
}

/// Waits until the kernel reads the VF back so.
async fn is_as(lab: &Lab<'_>, index: u16, wanted: &VfSettings) -> Result<()> {
    let what = "the VF to be as it was changed";
    wait::until(what, CHANGE, EVERY, || async {
        let now = settings(lab, index).await?;
        Ok(if now == *wanted {
            Probe::Ready(())
        } else {
            Probe::NotYet(format!("{now:?}"))
        })
    })
    .await
}

async fn settings(lab: &Lab<'_>, index: u16) -> Result<VfSettings> {
    let all = l1::vf_settings(&lab.l1, &lab.wired.interface).await?;
    all.get(&index)
        .cloned()
        .with_context(|| format!("there is no VF {index}"))
}

/// Waits until the guest's claim says that its edit was refused, and that it works on.
async fn edit_refused(lab: &Lab<'_>, claim: &Claim, why: &str, words: &str) -> Result<()> {
    let api = lab.guest_claims();
    let what = format!(
        "the edit of claim {} to be refused with {words:?}",
        claim.name
    );
    watch::until(&api, &claim.name, &what, REFUSE, |c| {
        let Some(c) = c else {
            bail!("claim {} is gone", claim.name)
        };
        let all = c.status.as_ref().map(|s| s.conditions.as_slice());
        let said = all.and_then(|all| condition(all, type_::ADMITTED));
        let refused = said
            .is_some_and(|s| s.status == "False" && s.reason == why && s.message.contains(words));
        Ok(if refused && truth(c, type_::READY) == Some("True") {
            Probe::Ready(())
        } else {
            Probe::NotYet(told(c))
        })
    })
    .await
}
