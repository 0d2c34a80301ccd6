//! A class is for the claims to come: what has been granted stays, whatever becomes of it.

use common::api::{
    DEFAULT_CLASS_ANNOTATION, GuestCluster, NetworkField, Placement, ReclaimPolicy, VFClaim,
    VFClass, reason, type_,
};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::{Harness, UUID, claim, eventually};

async fn edit(harness: &Harness, class: &str, patch: Value) {
    let api: Api<VFClass> = Api::all(harness.admin.clone());
    let params = PatchParams::default();
    let edited = api.patch(class, &params, &Patch::Merge(patch)).await;
    edited.unwrap();
}

/// Waits until the controller has seen it, which it shows by what it tells the guest.
async fn seen(harness: &Harness, what: &str, such: impl Fn(&GuestCluster) -> bool) {
    let api = harness.guests();
    eventually(what, || async {
        let guest = api.get("blue").await.unwrap();
        such(&guest)
            .then_some(())
            .ok_or(format!("{:?}", guest.status))
    })
    .await;
}

fn status_of(guest: &GuestCluster) -> common::api::GuestClusterStatus {
    guest.status.clone().unwrap_or_default()
}

fn granted(claim: &VFClaim) -> common::api::Admitted {
    claim.status.clone().unwrap().admitted.unwrap()
}

#[tokio::test]
async fn a_class_that_is_edited_or_deleted_disturbs_no_claim() {
    let mut harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    let mark = json!({"metadata": {"annotations": {DEFAULT_CLASS_ANNOTATION: "true"}}});
    edit(&harness, "gold", mark.clone()).await;
    let named = harness.create(&claim("u1")).await;
    let mut unnamed = claim("u2");
    unnamed.spec.class_name = None;
    let unnamed = harness.create(&unnamed).await;
    let named = harness
        .says(&named, type_::RESOLVED, reason::RESOLVED)
        .await;
    let unnamed = harness
        .says(&unnamed, type_::RESOLVED, reason::RESOLVED)
        .await;
    assert_eq!(granted(&unnamed).class_name, "gold");
    assert_eq!(granted(&named).placement, Placement::Pack);
    let undisturbed = async |when: &str| {
        for before in [&named, &unnamed] {
            let now = harness.claims().get(&before.name_any()).await.unwrap();
            assert_eq!(now.resource_version(), before.resource_version(), "{when}");
        }
    };

    // Another class is the default one from now on.
    harness.class("later", &[NetworkField::MacAddress]).await;
    edit(&harness, "later", mark).await;
    // The newer of two counts, and these may be of one second.
    let unmark = json!({"metadata": {"annotations": {DEFAULT_CLASS_ANNOTATION: null}}});
    edit(&harness, "gold", unmark).await;
    let default = |name: &'static str| {
        move |guest: &GuestCluster| {
            let classes = status_of(guest).classes;
            classes.iter().any(|c| c.name == name && c.default)
        }
    };
    seen(
        &harness,
        "the default class is another one",
        default("later"),
    )
    .await;
    // All that can be edited of it, at once.
    let spec = json!({"spec": {
        "description": "edited", "pfSelector": {"drivers": ["ice"]}, "numVFs": 2,
        "reclaimPolicy": "Destroy", "placement": "Spread", "allowedOverrides": [],
        "network": {"vlan": {"id": 9}, "trust": true, "spoofCheck": false},
    }});
    edit(&harness, "gold", spec).await;
    seen(&harness, "the guest is told of the edit", |guest| {
        let classes = status_of(guest).classes;
        classes.iter().any(|c| c.placement == Placement::Spread)
    })
    .await;
    // A claim that comes now gets it as it is now; when it is bound, those before have been
    // looked at as well, if anybody thought they should be.
    let new = harness.create(&claim("u3")).await;
    let new = harness.says(&new, type_::RESOLVED, reason::RESOLVED).await;
    let now = granted(&new);
    assert_eq!(
        (now.placement, now.reclaim_policy, now.num_vfs),
        (Placement::Spread, ReclaimPolicy::Destroy, Some(2))
    );
    assert_eq!(now.pf_selector.drivers, ["ice"]);
    undisturbed("edited").await;

    let api: Api<VFClass> = Api::all(harness.admin.clone());
    api.delete("gold", &DeleteParams::default()).await.unwrap();
    seen(&harness, "the class is gone", |guest| {
        status_of(guest).classes.len() == 1
    })
    .await;
    undisturbed("deleted").await;
    // Nor by a controller that knows nothing but that.
    harness.halt().await;
    harness.start().await;
    let mut after = claim("u4");
    after.spec.class_name = None;
    let after = harness.create(&after).await;
    let after = harness
        .says(&after, type_::RESOLVED, reason::RESOLVED)
        .await;
    assert_eq!(granted(&after).class_name, "later");
    for before in [&named, &unnamed] {
        let now = harness.claims().get(&before.name_any()).await.unwrap();
        assert_eq!(
            now.resource_version(),
            before.resource_version(),
            "restarted"
        );
    }
    harness.end().await;
}
