//! The mirrored classes, against two real API servers.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use common::api::{GuestCluster, MIRRORED_LABEL, VFClass};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use test_apiserver::gate::Write;

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

fn with_free(class: Value, free: u32) -> Value {
    let mut class = class;
    class["free"] = json!(free);
    class
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_a_class_is_shown_and_churn_writes_it_now_and_then() {
    let mut world = World::new().await;
    let guest: Api<VFClass> = Api::all(world.guest.admin());
    let host = world.host.admin();
    publish(&host, json!([with_free(class("gold", "fast"), 1000)])).await;
    let gate = world.start().await;
    let free = async |number: u32| {
        eventually(&format!("{number} free"), || async {
            let found = guest.get_opt("gold").await.unwrap()?;
            (found.status.as_ref()?.free == Some(number)).then_some(found)
        })
        .await
    };
    let made = free(1000).await;
    // The host's inside is not told, and the number is no change of the class.
    let status = made.status.clone().unwrap();
    assert_eq!((status.nodes, status.observed_generation), (vec![], None));

    let begun = Instant::now();
    let writes = async || {
        let sent = gate.sent();
        let of_gold = |w: &&Write| w.path.contains("/vfclasses/gold");
        sent.iter().filter(of_gold).count()
    };
    let before = writes().await;
    for number in 0..60 {
        publish(&host, json!([with_free(class("gold", "fast"), number)])).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let last = free(59).await;
    assert_eq!(last.metadata.generation, made.metadata.generation);
    let written = writes().await - before;
    // One in three seconds, and the first one's start.
    let most = usize::try_from(begun.elapsed().as_secs() / 3).unwrap() + 1;
    assert!(
        (1..=most).contains(&written),
        "{written} writes, at most {most}"
    );

    // What says the same is not written, nor is the count of claims a class's concern.
    let counted = json!({"status": {"claims": 7}});
    let api: Api<GuestCluster> = Api::all(host.clone());
    api.patch_status(CLUSTER, &PatchParams::default(), &Patch::Merge(counted))
        .await
        .unwrap();
    publish(
        &host,
        json!([with_free(class("gold", "fast"), 59), class("later", "x")]),
    )
    .await;
    eventually("a later look", || async {
        guest.get_opt("later").await.unwrap()
    })
    .await;
    let still = guest.get("gold").await.unwrap();
    assert_eq!(still.resource_version(), last.resource_version());

    // Who writes another number is put right.
    let wrong = json!({"status": {"free": 7}});
    guest
        .patch_status("gold", &PatchParams::default(), &Patch::Merge(wrong))
        .await
        .unwrap();
    free(59).await;
    world.stop().await;
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
