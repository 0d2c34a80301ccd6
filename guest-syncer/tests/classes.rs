//! The mirrored classes, against two real API servers.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use common::api::{GuestCluster, MIRRORED_LABEL, VFClass};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

mod world;
use world::{CLUSTER, World, eventually};

async fn publish(host: &Client, classes: Value) {
    let api: Api<GuestCluster> = Api::all(host.clone());
    let status = json!({"status": {"classes": classes}});
    api.patch_status(CLUSTER, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
}

fn class(name: &str, description: &str) -> Value {
    json!({"name": name, "uid": "u", "description": description, "allowedOverrides": ["Vlan"]})
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_has_the_classes_that_the_host_lists_and_keeps_its_own() {
    let mut world = World::new().await;
    let guest: Api<VFClass> = Api::all(world.guest.admin());
    let own = json!({"metadata": {"name": "silver"}, "spec": {"description": "a tenant's own"}});
    let own = world::create(&guest, own).await;
    let host = world.host.admin();
    publish(
        &host,
        json!([class("gold", "fast"), class("silver", "slow")]),
    )
    .await;
    world.start().await;

    let described = async |name: &str, text: &str| {
        eventually(&format!("{name}: {text}"), || async {
            let found = guest.get_opt(name).await.unwrap()?;
            (found.spec.description.as_deref() == Some(text)).then_some(found)
        })
        .await
    };
    let gold = described("gold", "fast").await;
    assert_eq!(gold.labels()[MIRRORED_LABEL], CLUSTER);
    assert_eq!(gold.spec.pf_selector, Default::default());
    eventually("the conflict's event", || async {
        let told = world.events_on("silver").await;
        told.contains(&"Conflict".to_owned()).then_some(())
    })
    .await;

    // A tenant's edit of a mirrored class does not last.
    let edit = json!({"spec": {"description": "mine"}});
    guest
        .patch("gold", &PatchParams::default(), &Patch::Merge(edit))
        .await
        .unwrap();
    described("gold", "fast").await;
    publish(
        &host,
        json!([class("gold", "faster"), class("silver", "slow")]),
    )
    .await;
    described("gold", "faster").await;

    // A GuestCluster that is gone says nothing about its classes.
    let clusters: Api<GuestCluster> = Api::all(host.clone());
    clusters
        .delete(CLUSTER, &DeleteParams::default())
        .await
        .unwrap();
    world.claim("probe", "w1").await;
    world
        .says("probe", "Synced", "False", "GuestClusterNotFound")
        .await;
    assert!(guest.get_opt("gold").await.unwrap().is_some());
    world.make_guest_cluster().await;
    publish(&host, json!([])).await;
    eventually("gold gone", || async {
        guest.get_opt("gold").await.unwrap().is_none().then_some(())
    })
    .await;
    let still = guest.get("silver").await.unwrap();
    assert_eq!(still.resource_version(), own.resource_version());
    world.stop().await;
}
