//! A link to the host that is long: it costs time, and nothing is done twice for it.
// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::Duration;

use common::api::{VFClaim, VFClaimStatus};
use http::Method;
use kube::api::ListParams;
use serde_json::json;
use test_apiserver::gate::{Gate, Write};

mod world;
use world::{CLAIMS, World, eventually};

/// A claim up, its status down, and its end.
async fn whole_way(world: &World, name: &str) {
    let claim = world.claim(name, "w1").await;
    let copy = world.copy_of(&claim).await;
    world.says(name, "Synced", "True", "Synced").await;
    let status: VFClaimStatus = serde_json::from_value(json!({"hostNode": "h1"})).unwrap();
    world.host_says(&copy, &status).await;
    let api = world.guest_claims();
    eventually("the host's word in the guest", || async {
        let shown = api.get(name).await.unwrap().status.unwrap_or_default();
        (shown.host_node == status.host_node).then_some(())
    })
    .await;
    world.delete(name).await;
    world.gone(name).await;
}

/// The writes to the host's claims, without their names. A POST that comes before the watch
/// has shown the copy finds the name taken and changes nothing, so such count as one.
fn to_the_host(gate: &Gate) -> Vec<Method> {
    let about_copies = |write: &Write| write.path.contains(&format!("/namespaces/{CLAIMS}/"));
    let sent = gate.sent().into_iter();
    let mut methods: Vec<_> = sent.filter(about_copies).map(|w| w.method).collect();
    methods.dedup_by(|next, last| *next == Method::POST && next == last);
    methods
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_link_costs_time_and_no_writes() {
    let mut world = World::new().await;
    world.timeout = Duration::from_secs(15);
    let gate = world.start().await;
    whole_way(&world, "near").await;
    let near = to_the_host(&gate);
    assert_eq!(near, [Method::POST, Method::DELETE]);
    world.stop().await;

    // Around the world and back, for a syncer that starts so as well.
    world.wire.lengthen(Duration::from_millis(400));
    let gate = world.start().await;
    whole_way(&world, "far").await;
    assert_eq!(to_the_host(&gate), near);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_longer_than_the_patience_makes_no_second_copy_and_loses_none() {
    let mut world = World::new().await;
    let patience = Duration::from_secs(1);
    world.timeout = patience;
    let gate = world.start().await;
    world.claim("old", "w1").await;
    world.says("old", "Synced", "True", "Synced").await;

    // Requests may be carried out; their answers come when nobody waits any more.
    world.wire.lengthen(patience);
    let claim = world.claim("new", "w1").await;
    world
        .says("new", "Synced", "False", "HostUnreachable")
        .await;
    world.delete("old").await;
    world
        .says("old", "Synced", "False", "HostUnreachable")
        .await;

    world.wire.lengthen(Duration::ZERO);
    world.says("new", "Synced", "True", "Synced").await;
    world.gone("old").await;
    let copies = world.host_claims().list(&ListParams::default()).await;
    let copies: Vec<VFClaim> = copies.unwrap().items;
    let of = copies
        .iter()
        .filter_map(|c| Some(c.spec.guest.as_ref()?.uid.clone()));
    let of: Vec<String> = of.collect();
    assert_eq!(
        of,
        [claim.metadata.uid.unwrap()],
        "one copy, of the one claim"
    );
    assert!(to_the_host(&gate).contains(&Method::DELETE));
    world.stop().await;
}
