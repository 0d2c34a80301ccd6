//! A claim's way through the controller, and every way to be refused.

use std::time::Duration;

use common::api::{
    DEFAULT_CLASS_ANNOTATION, HOST_FINALIZER, LinkState, NetworkField, NetworkRequest,
    PhysicalFunction, PhysicalFunctionSpec, VFClaim, VFClaimStatus, VFClass, condition, reason,
    type_,
};
use futures::{StreamExt as _, TryStreamExt as _};
use host_provisioner::controller::admit::derived_mac;
use kube::ResourceExt as _;
use kube::api::{Api, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde_json::{Value, json};

use crate::harness::{Harness, UUID, claim};

fn status(claim: &VFClaim) -> VFClaimStatus {
    claim.status.clone().unwrap_or_default()
}

/// Nothing was decided for it: no node will ever see it.
fn assert_nothing_granted(claim: &VFClaim) {
    let status = status(claim);
    assert_eq!(status.admitted, None);
    assert_eq!(
        (status.vm, status.host_node, status.launcher),
        (None, None, None)
    );
    assert!(claim.finalizers().is_empty(), "{:?}", claim.finalizers());
}

#[tokio::test]
async fn a_good_claim_is_bound_in_three_writes_and_left_alone_afterwards() {
    let mut harness = Harness::running().await;
    let vmi = harness.vmi("a", UUID).await;
    // One claim before the counted one: afterwards the controller's caches have
    // the class and the VM, which a busy API server may show it late.
    let first = harness.create(&claim("u0")).await;
    harness
        .says(&first, type_::RESOLVED, reason::RESOLVED)
        .await;
    let params = WatchParams::default();
    let events = harness.claims().watch(&params, "0").await.unwrap();
    let made = harness.create(&claim("u1")).await;
    let bound = harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;

    let seen = status(&bound);
    let admitted = seen.admitted.unwrap();
    assert_eq!(admitted.class_name, "gold");
    assert_eq!(admitted.observed_generation, 1);
    assert_eq!(admitted.network.unwrap().mac_address, derived_mac("u1"));
    let vm = seen.vm.unwrap();
    assert_eq!((vm.name.as_str(), vm.uid), ("a", vmi.uid().unwrap()));
    assert_eq!(vm.ip.as_deref(), Some("10.0.0.5"));
    assert_eq!(seen.host_node.as_deref(), Some("host1"));
    let launcher = seen.launcher.unwrap();
    assert_eq!(
        (launcher.vmi_uid, launcher.pod_uid),
        (vmi.uid().unwrap(), "pod-1".to_owned())
    );
    assert!(bound.finalizers().contains(&HOST_FINALIZER.to_owned()));
    let pinned = harness
        .guests()
        .get("blue")
        .await
        .unwrap()
        .status
        .unwrap()
        .cluster_uid;
    assert_eq!(pinned.as_deref(), Some("kube-system-of-blue"));

    // A restart finds nothing to do either.
    harness.halt().await;
    harness.start().await;
    harness.create(&claim("u2")).await;
    harness
        .says(&claim("u2"), type_::RESOLVED, reason::RESOLVED)
        .await;
    let after = harness.claims().get(&bound.name_any()).await.unwrap();
    assert_eq!(after.resource_version(), bound.resource_version());
    let writes: Vec<WatchEvent<VFClaim>> = events
        .take_until(tokio::time::sleep(Duration::from_secs(1)))
        .try_collect()
        .await
        .unwrap();
    let of_first = |e: &&WatchEvent<VFClaim>| match e {
        WatchEvent::Added(c) | WatchEvent::Modified(c) => c.name_any() == bound.name_any(),
        _ => false,
    };
    assert_eq!(
        writes.iter().filter(of_first).count(),
        1 + 3,
        "made, finalizer, decision, report"
    );
    harness.end().await;
}

#[tokio::test]
async fn refusals_of_admission_say_why_and_change_nothing() {
    let harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    harness.class("secret", &[]).await;
    let edit = |uid: &str, f: fn(&mut VFClaim)| {
        let mut claim = claim(uid);
        f(&mut claim);
        claim
    };
    let trusting = NetworkRequest {
        trust: Some(true),
        ..NetworkRequest::default()
    };
    let mut trusted = claim("override");
    trusted.spec.network = Some(trusting);
    for (claim, expected) in [
        (
            edit("unknown", |c| c.spec.class_name = Some("none".into())),
            reason::CLASS_NOT_FOUND,
        ),
        (
            edit("default", |c| c.spec.class_name = None),
            reason::CLASS_NOT_FOUND,
        ),
        (
            edit("foreign", |c| c.spec.class_name = Some("secret".into())),
            reason::CLASS_NOT_ALLOWED,
        ),
        (trusted, reason::OVERRIDE_NOT_ALLOWED),
    ] {
        let made = harness.create(&claim).await;
        let refused = harness.says(&made, type_::ADMITTED, expected).await;
        assert_nothing_granted(&refused);
        harness.warned(&made, expected).await;
        // It goes at once: nothing of ours is on it.
        harness.delete(&made.name_any()).await;
        harness.gone(&made).await;
    }
    harness.end().await;
}

#[tokio::test]
async fn forged_identities_get_a_condition_and_nothing_else() {
    let harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    harness.guest("green", "claims-green").await;
    harness.guest_ready("green").await;
    // The first claim pins blue's cluster.
    let first = harness.create(&claim("u1")).await;
    harness
        .says(&first, type_::RESOLVED, reason::RESOLVED)
        .await;

    let edit = |uid: &str, f: fn(&mut VFClaim)| {
        let mut claim = claim(uid);
        f(&mut claim);
        claim
    };
    let mismatch = reason::GUEST_IDENTITY_MISMATCH;
    for (claim, expected) in [
        (
            edit("f1", |c| {
                c.spec.guest.as_mut().unwrap().cluster = "red".into()
            }),
            reason::GUEST_CLUSTER_NOT_FOUND,
        ),
        (
            edit("f2", |c| c.metadata.namespace = Some("claims-green".into())),
            mismatch,
        ),
        (
            edit("f3", |c| {
                c.spec.guest.as_mut().unwrap().cluster = "green".into()
            }),
            mismatch,
        ),
        (
            edit("f4", |c| c.metadata.name = Some("mine".into())),
            mismatch,
        ),
        (
            edit("f5", |c| {
                c.spec.guest.as_mut().unwrap().cluster_uid = "rebuilt".into()
            }),
            mismatch,
        ),
        (
            edit("f6", |c| {
                c.spec.guest = None;
                c.spec.vm_ip = None;
                c.spec.node_name = Some("n".into());
            }),
            mismatch,
        ),
    ] {
        let made = harness.create(&claim).await;
        let refused = harness.says(&made, type_::ADMITTED, expected).await;
        assert_nothing_granted(&refused);
        harness.warned(&made, expected).await;
    }
    harness.end().await;
}

#[tokio::test]
async fn a_vm_that_is_not_the_guests_or_not_sure_is_not_bound() {
    let harness = Harness::running().await;
    let other = "00000000-0000-0000-0000-000000000002";
    harness.vmi("a", UUID).await;
    harness.vmi("twin1", other).await;
    harness.vmi("twin2", other).await;
    let foreign = "00000000-0000-0000-0000-000000000003";
    harness.vmi_of("green", "greens", foreign).await;
    let last = "00000000-0000-0000-0000-000000000004";
    harness.vmi("last", last).await;
    let with = |uid: &str, system: &str, ip: &str| {
        let mut claim = claim(uid);
        claim.spec.guest.as_mut().unwrap().system_uuid = system.to_owned();
        claim.spec.vm_ip = Some(ip.to_owned());
        claim
    };
    let nobody = "00000000-0000-0000-0000-000000000009";
    // Watches keep their order: with the last VM the cache has all.
    let made = harness.create(&with("v0", last, "10.0.0.5")).await;
    harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    for (claim, expected) in [
        (with("v1", nobody, "10.0.0.5"), reason::VM_NOT_FOUND),
        (with("v2", foreign, "10.0.0.5"), reason::VM_NOT_FOUND),
        (with("v3", other, "10.0.0.5"), reason::VM_AMBIGUOUS),
        (with("v4", UUID, "10.0.0.6"), reason::IP_CONTRADICTS),
    ] {
        let made = harness.create(&claim).await;
        let refused = harness.says(&made, type_::RESOLVED, expected).await;
        let seen = status(&refused);
        assert_eq!(
            (seen.vm, seen.host_node, seen.launcher),
            (None, None, None),
            "{expected}"
        );
        harness.warned(&made, expected).await;
        harness.delete(&made.name_any()).await;
        harness.gone(&made).await;
    }
    // A second GuestCluster that selects blue's VM makes it nobody's.
    let good = harness.create(&claim("v5")).await;
    harness.says(&good, type_::RESOLVED, reason::RESOLVED).await;
    harness.guest("greedy", "claims-greedy").await;
    let all = json!({"spec": {"vmSelector": {"matchLabels": null}}});
    let params = PatchParams::default();
    harness
        .guests()
        .patch("greedy", &params, &Patch::Merge(all))
        .await
        .unwrap();
    harness.guest_observed("greedy").await;
    let late = harness.create(&claim("v6")).await;
    let refused = harness
        .says(&late, type_::RESOLVED, reason::VM_AMBIGUOUS)
        .await;
    assert_eq!(status(&refused).host_node, None);
    harness.end().await;
}

#[tokio::test]
async fn waiting_claims_go_on_by_themselves() {
    let harness = Harness::running().await;
    // For a VM: not there, not running, running.
    let made = harness.create(&claim("u1")).await;
    harness
        .says(&made, type_::RESOLVED, reason::VM_NOT_FOUND)
        .await;
    harness.vmi("a", UUID).await;
    harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    harness
        .patch_vmi("a", json!({"status": {"phase": "Scheduling"}}))
        .await;
    let waiting = harness
        .says(&made, type_::RESOLVED, reason::VM_NOT_RUNNING)
        .await;
    assert_eq!(status(&waiting).host_node, None);
    assert_eq!(status(&waiting).launcher, None);
    harness
        .patch_vmi("a", json!({"status": {"phase": "Running"}}))
        .await;
    let bound = harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    assert_eq!(status(&bound).host_node.as_deref(), Some("host1"));

    // For a class, named or the default one.
    let mut later = claim("u2");
    later.spec.class_name = Some("later".into());
    let later = harness.create(&later).await;
    let mut unnamed = claim("u3");
    unnamed.spec.class_name = None;
    let unnamed = harness.create(&unnamed).await;
    harness
        .says(&later, type_::ADMITTED, reason::CLASS_NOT_FOUND)
        .await;
    harness
        .says(&unnamed, type_::ADMITTED, reason::CLASS_NOT_FOUND)
        .await;
    harness.class("later", &[NetworkField::MacAddress]).await;
    harness
        .says(&later, type_::RESOLVED, reason::RESOLVED)
        .await;
    let mark = json!({"metadata": {"annotations": {DEFAULT_CLASS_ANNOTATION: "true"}}});
    let classes: Api<VFClass> = Api::all(harness.admin.clone());
    classes
        .patch("later", &PatchParams::default(), &Patch::Merge(mark))
        .await
        .unwrap();
    let granted = harness
        .says(&unnamed, type_::RESOLVED, reason::RESOLVED)
        .await;
    assert_eq!(status(&granted).admitted.unwrap().class_name, "later");
    harness.end().await;
}

#[tokio::test]
async fn cordon_and_quota_hold_and_a_freed_place_is_taken() {
    let harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    let guests = harness.guests();
    let params = PatchParams::default();
    let set = async |spec: Value| {
        let patch = Patch::Merge(json!({ "spec": spec }));
        guests.patch("blue", &params, &patch).await.unwrap();
        harness.guest_observed("blue").await;
    };
    set(json!({"quota": {"claims": 2}})).await;
    // Many at once: exactly two get a place.
    let all: Vec<VFClaim> = (0..8).map(|i| claim(&format!("q{i}"))).collect();
    futures::future::join_all(all.iter().map(|c| harness.create(c))).await;
    let granted = |claims: &[VFClaim]| -> Vec<String> {
        let has = |c: &&VFClaim| status(c).admitted.is_some();
        claims.iter().filter(has).map(|c| c.name_any()).collect()
    };
    let settled = || async {
        crate::harness::eventually("every claim has its answer", || async {
            let list = harness
                .claims()
                .list(&Default::default())
                .await
                .unwrap()
                .items;
            let answered = list.iter().all(|c| !status(c).conditions.is_empty());
            answered.then_some(list).ok_or("not yet".to_owned())
        })
        .await
    };
    let first = granted(&settled().await);
    assert_eq!(first.len(), 2, "{first:?}");
    harness.delete(&first[0]).await;
    crate::harness::eventually("another one takes the place", || async {
        let now = granted(&settled().await);
        (now.len() == 2 && !now.contains(&first[0]))
            .then_some(())
            .ok_or(format!("{now:?}"))
    })
    .await;

    set(json!({"quota": {"claims": null}, "cordoned": true})).await;
    harness.guest_observed("blue").await;
    let late = harness.create(&claim("late")).await;
    let refused = harness.says(&late, type_::ADMITTED, reason::CORDONED).await;
    assert_nothing_granted(&refused);
    harness.warned(&late, reason::CORDONED).await;
    set(json!({"cordoned": false})).await;
    harness.says(&late, type_::RESOLVED, reason::RESOLVED).await;
    harness.end().await;
}

#[tokio::test]
async fn an_edit_that_the_vfs_driver_cannot_do_is_refused_and_the_grant_stays() {
    let harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    let open = [NetworkField::LinkState, NetworkField::MaxTxRateMbps];
    harness.class("later", &open).await;
    let mut wish = claim("u1");
    wish.spec.class_name = Some("later".into());
    let made = harness.create(&wish).await;
    harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    // As a node agent writes them.
    let pfs: Api<PhysicalFunction> = Api::all(harness.admin.clone());
    let spec = PhysicalFunctionSpec {
        node_name: "host1".into(),
        identity: "serial".into(),
        ..PhysicalFunctionSpec::default()
    };
    let pf = PhysicalFunction::new("pf", spec);
    pfs.create(&PostParams::default(), &pf).await.unwrap();
    let params = PatchParams::default();
    let can = json!({"status": {"driver": "igb", "capabilities": {
        "spoofCheck": true, "maxTxRateFromMbps": 1,
    }}});
    pfs.patch_status("pf", &params, &Patch::Merge(can))
        .await
        .unwrap();
    let api = harness.claims();
    let device = json!({"status": {"device": {
        "nodeName": "host1", "physicalFunction": "pf", "vfIndex": 0,
    }}});
    api.patch_status("vfc-u1", &params, &Patch::Merge(device))
        .await
        .unwrap();

    let edit = async |network: Value| {
        let patch = Patch::Merge(json!({"spec": {"network": network}}));
        api.patch("vfc-u1", &params, &patch).await.unwrap();
    };
    edit(json!({"linkState": "Disable"})).await;
    let refused = harness
        .says(&made, type_::ADMITTED, reason::UNSUPPORTED_SETTING)
        .await;
    let now = status(&refused);
    let words = &condition(&now.conditions, type_::ADMITTED).unwrap().message;
    assert!(
        words.contains("driver igb cannot set link state Disable; it can set")
            && words.contains("the earlier grant holds"),
        "{words}"
    );
    let network = now.admitted.unwrap().network.unwrap();
    assert_eq!(network.link_state, LinkState::Auto);

    edit(json!({"linkState": null, "maxTxRateMbps": 500})).await;
    let changed = harness.says(&made, type_::ADMITTED, reason::ADMITTED).await;
    let network = status(&changed).admitted.unwrap().network.unwrap();
    assert_eq!(network.max_tx_rate_mbps, Some(500));
    harness.end().await;
}

#[tokio::test]
async fn a_claim_goes_only_when_its_vf_is_back() {
    let harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    let made = harness.create(&claim("u1")).await;
    harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    let api = harness.claims();
    let params = PatchParams::default();
    let set = async |status: Value| {
        let patch = Patch::Merge(json!({ "status": status }));
        api.patch_status("vfc-u1", &params, &patch).await.unwrap();
    };
    // As a node agent writes it.
    let device = json!({"nodeName": "host1", "physicalFunction": "pf", "vfIndex": 0});
    let attachment = json!({"vmiUID": "v", "podUID": "p", "qemuDeviceID": "vfc-u1", "port": "r",
        "transport": "QmpSocket", "bootID": "b", "qemuStartTime": 1});
    set(json!({"device": device, "attachment": attachment})).await;

    // The VM goes away under it: the node keeps the claim.
    harness
        .patch_vmi("a", json!({"status": {"phase": "Succeeded"}}))
        .await;
    let held = harness
        .says(&made, type_::RESOLVED, reason::VM_NOT_RUNNING)
        .await;
    assert_eq!(status(&held).host_node.as_deref(), Some("host1"));
    assert!(status(&held).launcher.is_some());

    harness.delete("vfc-u1").await;
    set(json!({"attachment": null})).await;
    // Another claim's whole way through the same queue: time enough to err.
    harness.create(&claim("u2")).await;
    harness
        .says(&claim("u2"), type_::RESOLVED, reason::VM_NOT_RUNNING)
        .await;
    assert!(
        api.get_opt("vfc-u1").await.unwrap().is_some(),
        "gone while its VF is out"
    );
    set(json!({"device": null})).await;
    harness.gone(&made).await;
    // Granted but never allocated: at once.
    harness.delete("vfc-u2").await;
    harness.gone(&claim("u2")).await;
    harness.end().await;
}
