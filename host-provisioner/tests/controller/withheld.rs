//! What becomes of a claim's VF is granted with it, and what is not to go back to the pool is
//! withheld before the claim goes; with the chart's own rights.

use common::api::{
    PhysicalFunction, PhysicalFunctionSpec, ReclaimPolicy, VFClaim, VFClass, WithheldReason,
    reason, type_,
};
use kube::ResourceExt as _;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::harness::{Harness, UUID, claim, eventually};

fn functions(harness: &Harness) -> Api<PhysicalFunction> {
    Api::all(harness.admin.clone())
}

async fn function(harness: &Harness, name: &str) {
    let spec = PhysicalFunctionSpec {
        node_name: "host1".into(),
        identity: name.into(),
        managed: true,
        num_vfs: Some(4),
        ..PhysicalFunctionSpec::default()
    };
    functions(harness)
        .create(&PostParams::default(), &PhysicalFunction::new(name, spec))
        .await
        .unwrap();
}

async fn policy(harness: &Harness, policy: ReclaimPolicy) {
    let api: Api<VFClass> = Api::all(harness.admin.clone());
    let patch = Patch::Merge(json!({"spec": {"reclaimPolicy": policy}}));
    let params = PatchParams::default();
    api.patch("gold", &params, &patch).await.unwrap();
    // The guest is told of it when the controller has seen it.
    let guests = harness.guests();
    eventually("the guest is told of the policy", || async {
        let classes = guests.get("blue").await.unwrap().status.unwrap().classes;
        let told = classes.iter().any(|c| c.reclaim_policy == policy);
        told.then_some(()).ok_or(format!("{classes:?}"))
    })
    .await;
}

async fn set(harness: &Harness, name: &str, status: Value) {
    let patch = Patch::Merge(json!({ "status": status }));
    let params = PatchParams::default();
    let claims = harness.claims();
    claims.patch_status(name, &params, &patch).await.unwrap();
}

/// A bound claim that has a VF, as a node agent writes it.
async fn allocated(harness: &Harness, uid: &str, index: u16) -> VFClaim {
    let made = harness.create(&claim(uid)).await;
    let bound = harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    let device = json!({"nodeName": "host1", "physicalFunction": "pf", "vfIndex": index});
    set(harness, &made.name_any(), json!({"device": device})).await;
    bound
}

/// Waits until the PF withholds so many.
async fn withheld(harness: &Harness, count: usize) -> PhysicalFunction {
    let api = functions(harness);
    eventually(&format!("{count} are withheld"), || async {
        let pf = api.get("pf").await.unwrap();
        let now = pf.spec.withheld.clone();
        (now.len() == count).then_some(pf).ok_or(format!("{now:?}"))
    })
    .await
}

#[tokio::test]
async fn a_vf_that_does_not_go_back_is_withheld_before_its_claim_goes() {
    let mut harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    function(&harness, "pf").await;
    policy(&harness, ReclaimPolicy::Destroy).await;
    let destroyed = allocated(&harness, "u1", 2).await;
    policy(&harness, ReclaimPolicy::Retain).await;
    let retained = allocated(&harness, "u2", 0).await;
    policy(&harness, ReclaimPolicy::Return).await;
    let returned = allocated(&harness, "u3", 1).await;
    let granted = |claim: &VFClaim| {
        let admitted = claim.status.as_ref().unwrap().admitted.as_ref().unwrap();
        admitted.reclaim_policy
    };
    // Edits of the class reach no claim that has its grant.
    let now = harness.claims().get(&destroyed.name_any()).await.unwrap();
    assert_eq!(granted(&now), ReclaimPolicy::Destroy);
    assert_eq!(granted(&retained), ReclaimPolicy::Retain);
    assert_eq!(granted(&returned), ReclaimPolicy::Return);
    let before = functions(&harness).get("pf").await.unwrap();
    assert_eq!(before.spec.withheld, []);

    // Nothing is written for one that goes back.
    harness.delete("vfc-u3").await;
    set(&harness, "vfc-u3", json!({"device": null})).await;
    harness.gone(&returned).await;
    let after = functions(&harness).get("pf").await.unwrap();
    assert_eq!(after.resource_version(), before.resource_version());

    harness.delete("vfc-u1").await;
    let one = withheld(&harness, 1).await;
    let entry = &one.spec.withheld[0];
    assert_eq!(
        (entry.vf_index, entry.reason),
        (2, WithheldReason::Destroyed)
    );
    assert_eq!(Some(&entry.claim.uid), destroyed.uid().as_ref());
    assert_eq!(
        (entry.claim.name.as_str(), one.spec.num_vfs),
        ("vfc-u1", Some(4))
    );
    assert!(one.spec.managed, "no other field is the controller's");
    // The claim has the VF until its agent says so; a restart in between changes nothing.
    harness.halt().await;
    harness.start().await;
    harness.delete("vfc-u2").await;
    let both = withheld(&harness, 2).await;
    let indexes: Vec<u16> = both.spec.withheld.iter().map(|vf| vf.vf_index).collect();
    assert_eq!(indexes, [0, 2]);
    assert!(harness.claims().get_opt("vfc-u1").await.unwrap().is_some());
    set(&harness, "vfc-u1", json!({"device": null})).await;
    harness.gone(&destroyed).await;

    // Taken out while its claim has the VF still, it is entered again; afterwards it is not.
    let patch = Patch::Merge(json!({"spec": {"withheld": null}}));
    let params = PatchParams::default();
    functions(&harness)
        .patch("pf", &params, &patch)
        .await
        .unwrap();
    let again = withheld(&harness, 1).await;
    assert_eq!(again.spec.withheld[0].reason, WithheldReason::Retained);
    set(&harness, "vfc-u2", json!({"device": null})).await;
    harness.gone(&retained).await;
    functions(&harness)
        .patch("pf", &params, &patch)
        .await
        .unwrap();
    harness.create(&claim("u4")).await;
    harness
        .says(&claim("u4"), type_::RESOLVED, reason::RESOLVED)
        .await;
    let given_back = functions(&harness).get("pf").await.unwrap();
    assert_eq!(given_back.spec.withheld, []);
    harness.end().await;
}

#[tokio::test]
async fn two_that_lead_enter_an_index_once_and_one_waits_for_the_object() {
    let mut harness = Harness::running().await;
    harness.start().await;
    harness.vmi("a", UUID).await;
    policy(&harness, ReclaimPolicy::Destroy).await;
    let made = allocated(&harness, "u1", 3).await;
    harness.delete("vfc-u1").await;
    // Its object comes later: nothing is lost meanwhile.
    assert!(harness.claims().get_opt("vfc-u1").await.unwrap().is_some());
    function(&harness, "pf").await;
    let pf = withheld(&harness, 1).await;
    assert_eq!(pf.metadata.generation, Some(2), "one write");
    set(&harness, "vfc-u1", json!({"device": null})).await;
    harness.gone(&made).await;
    let after = functions(&harness).get("pf").await.unwrap();
    assert_eq!(after.metadata.generation, Some(2));
    harness.end().await;
}

#[tokio::test]
async fn entries_are_taken_out_when_the_agent_says_that_their_vfs_are_gone() {
    let harness = Harness::running().await;
    function(&harness, "pf").await;
    let api = functions(&harness);
    let params = PatchParams::default();
    let entry = |index: u16, reason: &str, uid: &str| {
        json!({"vfIndex": index, "reason": reason,
            "claim": {"namespace": "claims", "name": uid, "uid": uid}})
    };
    let entries = json!([
        entry(0, "Destroyed", "a"),
        entry(1, "Retained", "b"),
        entry(2, "Destroyed", "c")
    ]);
    let patch = Patch::Merge(json!({"spec": {"withheld": entries}}));
    api.patch("pf", &params, &patch).await.unwrap();
    let says = async |complete: bool| {
        let resize = json!({"numVFs": 3, "destroyed": ["a", "b"], "complete": complete});
        let patch = Patch::Merge(json!({"status": {"resize": resize}}));
        api.patch_status("pf", &params, &patch).await.unwrap();
    };
    says(false).await;
    // A claim's whole way through the controller: time enough to err.
    harness.vmi("a", UUID).await;
    harness.create(&claim("u1")).await;
    harness
        .says(&claim("u1"), type_::RESOLVED, reason::RESOLVED)
        .await;
    assert_eq!(api.get("pf").await.unwrap().spec.withheld.len(), 3);
    says(true).await;
    let pf = withheld(&harness, 2).await;
    let indexes: Vec<u16> = pf.spec.withheld.iter().map(|vf| vf.vf_index).collect();
    assert_eq!(
        indexes,
        [1, 2],
        "what is retained is an administrator's to give back"
    );
    harness.end().await;
}
