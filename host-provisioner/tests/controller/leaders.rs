//! Controllers that lead when they should not: one whose Lease is lost in the
//! middle of a reconcile, and two at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::api::{
    HOST_FINALIZER, NetworkRequest, VFClaim, VFClaimStatus, condition, reason, type_,
};
use common::kube::{LeaderConfig, LeaderError, run_as_leader};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use serde_json::json;
use test_apiserver::blind::blind;
use test_apiserver::gate::{Gate, Hold, Write};
use test_apiserver::lease;
use tokio_util::sync::CancellationToken;

use crate::harness::{CLAIMS, Harness, UUID, claim, controller, eventually};

fn status(claim: &VFClaim) -> VFClaimStatus {
    claim.status.clone().unwrap_or_default()
}

fn is_granted(claim: &VFClaim) -> bool {
    status(claim).admitted.is_some()
}

/// The claim that a write is about.
fn target(write: &Write) -> Option<&str> {
    let (_, rest) = write.path.split_once("/vfclaims/")?;
    rest.split('/').next()
}

/// The first write of a grant is the finalizer; a refusal writes only status.
fn first_granted(held: &[Write]) -> Option<String> {
    let finalizer = held.iter().find(|w| !w.path.ends_with("/status"))?;
    target(finalizer).map(str::to_owned)
}

/// Guest `blue`, its VM and a claim that is bound, so that caches have them all.
async fn with_a_bound_claim(harness: &mut Harness) {
    harness.guest("blue", CLAIMS).await;
    harness.vmi("a", UUID).await;
    harness.start().await;
    harness.guest_ready("blue").await;
    let first = harness.create(&claim("first")).await;
    harness
        .says(&first, type_::RESOLVED, reason::RESOLVED)
        .await;
}

#[tokio::test]
async fn a_lost_lease_ends_a_reconcile_where_it_is_and_a_stop_finishes_it() {
    let mut harness = Harness::new().await;
    with_a_bound_claim(&mut harness).await;
    harness.halt().await;
    let gate = Gate::default();
    let client = harness.controllers_client(&gate).await;
    let lead = |lease: &str| {
        let config = LeaderConfig {
            namespace: "vf-system".to_owned(),
            name: lease.to_owned(),
            identity: "us".to_owned(),
            lease_duration: Duration::from_secs(30),
            renew_deadline: Duration::from_secs(20),
            retry_period: Duration::from_millis(200),
        };
        let (client, stop) = (client.clone(), CancellationToken::new());
        let work = |term| controller(client, term);
        let run = run_as_leader(harness.admin.clone(), config, stop.clone(), work);
        (stop, tokio::spawn(run))
    };
    gate.hold_if(|write| target(write).is_some());
    let made = harness.create(&claim("u1")).await;
    let name = made.name_any();

    let (_stop, term) = lead("lost");
    gate.held(1).await.unwrap();
    let leases: Api<Lease> = Api::namespaced(harness.admin.clone(), "vf-system");
    lease::steal(&leases, "lost").await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), term).await;
    let ended = ended.expect("the term ends").unwrap();
    assert!(matches!(ended, Err(LeaderError::Lost(_))));
    assert_eq!(gate.waiting(), [], "a write outlived the term");
    gate.hold(Hold::Nothing);
    let sent = gate.sent();
    assert!(!sent.iter().any(|w| target(w).is_some()), "{sent:?}");
    let after = harness.claims().get(&name).await.unwrap();
    assert_eq!(after.resource_version(), made.resource_version());

    gate.hold_if(|write| target(write).is_some());
    let (stop, term) = lead("kept");
    gate.held(1).await.unwrap();
    stop.cancel();
    gate.hold(Hold::Nothing);
    term.await.unwrap().unwrap().unwrap().unwrap();
    let after = harness.claims().get(&name).await.unwrap();
    assert!(after.finalizers().contains(&HOST_FINALIZER.to_owned()));
    assert_eq!(status(&after).host_node.as_deref(), Some("host1"));
    assert_eq!(status(&after).conditions.len(), 2, "{:?}", status(&after));
    harness.end().await;
}

/// Waits until neither controller has anything to write. Each alone brings a
/// claim `marker` to a new grant, and before that it has looked at all that
/// happened earlier; what it thinks should be otherwise it has then written.
async fn settled(harness: &Harness, gates: [&Gate; 2], mut round: u8) -> u8 {
    let marker = claim("marker").name_any();
    let versions = async || {
        let claims = harness.claims().list(&ListParams::default()).await.unwrap();
        let guests = harness.guests().list(&ListParams::default()).await.unwrap();
        let mut versions: BTreeMap<String, Option<String>> = BTreeMap::new();
        versions.extend(claims.iter().map(|c| (c.name_any(), c.resource_version())));
        versions.extend(guests.iter().map(|g| (g.name_any(), g.resource_version())));
        versions.remove(&marker);
        versions
    };
    let last = round + 6;
    while round < last {
        // A guest is looked at every few seconds, so its count comes last.
        eventually("the guest's claims are counted", || async {
            let claims = harness.claims().list(&ListParams::default()).await.unwrap();
            let granted = claims.iter().filter(|c| is_granted(c)).count();
            let guest = harness.guests().get("blue").await.unwrap();
            let counted = guest.status.map(|s| s.claims as usize);
            (counted == Some(granted))
                .then_some(())
                .ok_or(format!("{counted:?} of {granted}"))
        })
        .await;
        let before = versions().await;
        for waits in [gates[1], gates[0]] {
            round += 1;
            waits.hold(Hold::Writes);
            let mac = format!("02:00:00:00:01:{round:02x}");
            let network = NetworkRequest {
                mac_address: Some(mac.clone()),
                ..NetworkRequest::default()
            };
            let edit = Patch::Merge(json!({"spec": {"network": network}}));
            let params = PatchParams::default();
            harness
                .claims()
                .patch(&marker, &params, &edit)
                .await
                .unwrap();
            eventually("the marker is granted anew", || async {
                let claim = harness.claims().get(&marker).await.unwrap();
                let granted = status(&claim).admitted;
                let granted = granted.and_then(|a| a.network).map(|n| n.mac_address);
                let said = status(&claim).conditions;
                let said = said
                    .iter()
                    .all(|c| c.observed_generation == claim.metadata.generation);
                (granted == Some(mac.clone()) && said)
                    .then_some(())
                    .ok_or(format!("{:?}", claim.status))
            })
            .await;
            waits.hold(Hold::Nothing);
        }
        if versions().await == before {
            return round;
        }
    }
    panic!("they write without end");
}

#[tokio::test]
async fn two_controllers_at_once_bind_each_claim_once_and_then_rest() {
    let mut harness = Harness::new().await;
    let (a, b) = (harness.start().await, harness.start().await);
    with_a_bound_claim(&mut harness).await;
    harness.kill_last().await;
    harness.create(&claim("marker")).await;
    harness
        .says(&claim("marker"), type_::RESOLVED, reason::RESOLVED)
        .await;
    let watch = WatchParams::default();
    let events = harness.claims().watch(&watch, "0").await.unwrap();

    let all: Vec<VFClaim> = (0..12).map(|i| claim(&format!("q{i}"))).collect();
    futures::future::join_all(all.iter().map(|c| harness.create(c))).await;
    for claim in &all {
        harness.says(claim, type_::RESOLVED, reason::RESOLVED).await;
    }
    let round = settled(&harness, [&a, &b], 0).await;

    // Both deleted and both let go: nothing is left, and the rest is untouched.
    let (go, stay) = all.split_at(6);
    for claim in go {
        harness.delete(&claim.name_any()).await;
    }
    for claim in go {
        harness.gone(claim).await;
    }
    settled(&harness, [&a, &b], round).await;
    let left = harness.claims().list(&ListParams::default()).await.unwrap();
    assert_eq!(left.items.len(), stay.len() + 2);
    for claim in &left {
        assert!(is_granted(claim) && status(claim).host_node.is_some());
        assert_eq!(claim.finalizers(), [HOST_FINALIZER]);
        assert!(status(claim).conditions.iter().all(|c| c.status == "True"));
    }
    let guest = harness.guests().get("blue").await.unwrap().status.unwrap();
    assert_eq!(guest.cluster_uid.as_deref(), Some("kube-system-of-blue"));

    // What each claim went through: one decision, whoever made it.
    let events: Vec<WatchEvent<VFClaim>> = events
        .take_until(tokio::time::sleep(Duration::from_secs(1)))
        .try_collect()
        .await
        .unwrap();
    let mut decided: BTreeMap<String, Vec<VFClaimStatus>> = BTreeMap::new();
    for event in &events {
        let (WatchEvent::Added(claim) | WatchEvent::Modified(claim)) = event else {
            continue;
        };
        let decision = VFClaimStatus {
            conditions: Vec::new(),
            ..status(claim)
        };
        let past = decided.entry(claim.name_any()).or_default();
        if past.last() != Some(&decision) {
            past.push(decision);
        }
    }
    for claim in &all {
        let past = &decided[&claim.name_any()];
        // One that has not heard of the VM yet may admit it, and leave the VM to the next look.
        let bound = past.iter().filter(|s| s.host_node.is_some()).count();
        assert!(
            bound == 1 && past.len() <= 3,
            "decided other than once: {past:?}"
        );
        let grants: Vec<_> = past.iter().filter_map(|s| s.admitted.clone()).collect();
        assert!(
            grants.windows(2).all(|w| w[0] == w[1]),
            "granted twice: {past:?}"
        );
        assert!(
            past.last().unwrap().host_node.is_some(),
            "taken back: {past:?}"
        );
    }
    // Of the guest's own objects there is one each; the names see to that.
    let label = ListParams::default().labels("sriov.harvesterhci.io/guest-cluster=blue");
    let namespaces: Api<Namespace> = Api::all(harness.admin.clone());
    assert_eq!(namespaces.list(&label).await.unwrap().items.len(), 1);
    let bindings: Api<RoleBinding> = Api::all(harness.admin.clone());
    assert_eq!(bindings.list(&label).await.unwrap().items.len(), 1);
    harness.end().await;
}

/// One that leads and whose watch of VMs is behind knows nothing of the VM that another has bound
/// a claim to.
#[tokio::test]
async fn a_controller_that_has_not_heard_of_a_vm_takes_no_binding_away() {
    let mut harness = Harness::new().await;
    with_a_bound_claim(&mut harness).await;
    harness.halt().await;
    let name = claim("first").name_any();
    let bound = harness.claims().get(&name).await.unwrap();
    assert!(status(&bound).host_node.is_some());

    let gate = Gate::default();
    let client = harness.controllers_client(&gate).await;
    let behind = blind(client, "virtualmachineinstances");
    harness.start_through(behind);
    let next = harness.create(&claim("next")).await;
    harness
        .says(&next, type_::RESOLVED, reason::VM_NOT_FOUND)
        .await;
    let edit = Patch::Merge(json!({"spec": {"vmIP": null}}));
    let params = PatchParams::default();
    let edited = harness.claims().patch(&name, &params, &edit).await.unwrap();
    let api = harness.claims();
    let now = eventually("the edited claim is looked at", || async {
        let now = api.get(&name).await.unwrap();
        let said = status(&now).conditions;
        let looked = condition(&said, type_::RESOLVED)
            .is_some_and(|c| c.observed_generation == edited.metadata.generation);
        looked.then_some(now).ok_or(format!("{said:?}"))
    })
    .await;
    let placed = |claim: &VFClaim| (status(claim).host_node, status(claim).launcher);
    assert_eq!(placed(&now), placed(&bound));
    let said = status(&now).conditions;
    assert_eq!(
        condition(&said, type_::RESOLVED).unwrap().reason,
        reason::RESOLVED
    );

    // Of a VM that is gone in truth the claim is told.
    let vmis = harness.vmis();
    vmis.delete("a", &DeleteParams::default()).await.unwrap();
    let now = harness
        .says(&now, type_::RESOLVED, reason::VM_NOT_FOUND)
        .await;
    assert_eq!(status(&now).host_node, None);
    harness.end().await;
}

/// What no compare-and-swap on a claim can see: each of two leaders gives the
/// last place to another claim. Nothing is taken back, and no place is given
/// again before the guest is below its quota.
#[tokio::test]
async fn two_controllers_may_both_give_the_last_place_and_then_no_other() {
    let mut harness = Harness::new().await;
    with_a_bound_claim(&mut harness).await;
    harness.create(&claim("marker")).await;
    harness
        .says(&claim("marker"), type_::RESOLVED, reason::RESOLVED)
        .await;
    harness.halt().await;
    let quota = Patch::Merge(json!({"spec": {"quota": {"claims": 3}}}));
    let params = PatchParams::default();
    harness
        .guests()
        .patch("blue", &params, &quota)
        .await
        .unwrap();

    harness.create(&claim("q0")).await;
    let a = Gate::default();
    a.hold(Hold::Writes);
    let client = harness.controllers_client(&a).await;
    harness.start_through(client);
    let held = eventually("a gives q0 the place", || async {
        first_granted(&a.waiting()).ok_or(format!("{:?}", a.waiting()))
    });
    let given_by_a = held.await;
    for i in 1..7 {
        harness.create(&claim(&format!("q{i}"))).await;
    }
    // Which of the seven b takes is chance; another one than a in six of seven.
    let (b, given_by_b) = loop {
        let b = Gate::default();
        b.hold(Hold::Writes);
        let client = harness.controllers_client(&b).await;
        harness.start_through(client);
        let given = eventually("b gives the place", || async {
            first_granted(&b.waiting()).ok_or(format!("{:?}", b.waiting()))
        });
        let given = given.await;
        if given != given_by_a {
            break (b, given);
        }
        harness.kill_last().await;
    };
    for (gate, given) in [(&a, &given_by_a), (&b, &given_by_b)] {
        let given = given.clone();
        gate.hold_if(move |write| target(write) != Some(&given));
    }
    let granted = async || -> BTreeSet<String> {
        let all = harness.claims().list(&ListParams::default()).await.unwrap();
        let granted = all.items.iter().filter(|c| is_granted(c));
        let placed = granted.map(|c| c.name_any());
        placed.filter(|n| n.starts_with("vfc-q")).collect()
    };
    let both = BTreeSet::from([given_by_a.clone(), given_by_b.clone()]);
    eventually("one too many", || async {
        let now = granted().await;
        (now == both).then_some(()).ok_or(format!("{now:?}"))
    })
    .await;
    for gate in [&a, &b] {
        gate.hold(Hold::Nothing);
    }
    let round = settled(&harness, [&a, &b], 0).await;
    assert_eq!(granted().await, both);
    for name in &both {
        let claim = harness.claims().get(name).await.unwrap();
        let conditions = status(&claim).conditions;
        assert!(conditions.iter().all(|c| c.status == "True"), "{claim:?}");
    }
    // Back at the quota: the next one must wait still.
    harness.delete(&given_by_a).await;
    settled(&harness, [&a, &b], round).await;
    assert_eq!(granted().await, BTreeSet::from([given_by_b]));
    harness.end().await;
}
