//! Syncers that lead when they should not, between two real API servers: one
//! whose Lease is lost in the middle of a reconcile, and two at once.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::time::Duration;

use common::api::{GUEST_FINALIZER, VFClaim, VFClaimStatus, condition, host_claim_name};
use common::kube::{LeaderConfig, LeaderError, run_as_leader};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use serde_json::json;
use test_apiserver::gate::{Gate, Hold, Write};
use test_apiserver::lease;
use tokio_util::sync::CancellationToken;

mod world;
use world::{CLAIMS, World, eventually};

/// Calls to the host that a gate holds do not time out.
const PATIENT: Duration = Duration::from_secs(120);

/// A write to the host: its claim namespace is there alone.
fn to_host(write: &Write) -> bool {
    write.path.contains(CLAIMS)
}

async fn copies(world: &World) -> Vec<VFClaim> {
    let all = world.host_claims().list(&ListParams::default()).await;
    all.unwrap().items
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_ends_a_sync_where_it_is_and_a_stop_finishes_it() {
    let mut world = World::new().await;
    world.timeout = PATIENT;
    let gate = Gate::default();
    gate.hold_if(to_host);
    let config = |lease: &str| LeaderConfig {
        namespace: "team".to_owned(),
        name: lease.to_owned(),
        identity: "us".to_owned(),
        lease_duration: Duration::from_secs(30),
        renew_deadline: Duration::from_secs(20),
        retry_period: Duration::from_millis(200),
    };
    let made = world.claim("fast", "w1").await;

    let work = world.syncer_to_lead(&gate).await;
    let stop = CancellationToken::new();
    let lead = run_as_leader(world.guest.admin(), config("lost"), stop.clone(), work);
    let term = tokio::spawn(lead);
    gate.held(1).await.unwrap();
    let before = gate.sent();
    let leases: Api<Lease> = Api::namespaced(world.guest.admin(), "team");
    lease::steal(&leases, "lost").await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), term).await;
    let ended = ended.expect("the term ends").unwrap();
    assert!(matches!(ended, Err(LeaderError::Lost(_))));
    assert_eq!(gate.waiting(), [], "a write outlived the term");
    gate.hold(Hold::Nothing);
    assert_eq!(gate.sent(), before);
    assert!(copies(&world).await.is_empty());

    gate.hold_if(to_host);
    let work = world.syncer_to_lead(&gate).await;
    let lead = run_as_leader(world.guest.admin(), config("kept"), stop.clone(), work);
    let term = tokio::spawn(lead);
    gate.held(1).await.unwrap();
    stop.cancel();
    gate.hold(Hold::Nothing);
    assert!(matches!(term.await.unwrap(), Ok(Some(()))));
    let copies = copies(&world).await;
    assert_eq!(copies[0].name_any(), host_claim_name(&made.uid().unwrap()));
    let after = world.guest_claims().get("fast").await.unwrap();
    let conditions = after.status.unwrap_or_default().conditions;
    assert_eq!(condition(&conditions, "Synced").unwrap().status, "True");
}

/// Waits until neither syncer has anything to write. Each alone brings an edit of
/// the claim `marker` up and says so, and before that it has looked at all that
/// happened earlier; what it thinks should be otherwise it has then written.
async fn settled(world: &World, gates: [&Gate; 2], mut vlan: u16) -> u16 {
    let marker = world.guest_claims().get("marker").await.unwrap();
    let copy = host_claim_name(&marker.uid().unwrap());
    let versions = async || {
        let guests = world.guest_claims().list(&ListParams::default()).await;
        let all = guests.unwrap().items.into_iter().chain(copies(world).await);
        let versions = all.map(|c| (c.name_any(), c.resource_version()));
        let mut versions: BTreeMap<String, Option<String>> = versions.collect();
        versions.remove("marker");
        versions.remove(&copy);
        versions
    };
    let last = vlan + 6;
    while vlan < last {
        let before = versions().await;
        for waits in gates {
            vlan += 1;
            waits.hold(Hold::Writes);
            let edit = json!({"spec": {"network": {"vlan": {"id": vlan}}}});
            let (params, edit) = (PatchParams::default(), Patch::Merge(edit));
            let claims = world.guest_claims();
            let edited = claims.patch("marker", &params, &edit).await.unwrap();
            eventually("the marker's edit is up and said", || async {
                let up = world.host_claims().get(&copy).await.unwrap();
                let id = up.spec.network?.vlan?.id;
                let claim = claims.get("marker").await.unwrap();
                let conditions = claim.status?.conditions;
                let said = condition(&conditions, "Synced")?.observed_generation;
                (id == vlan && said == edited.metadata.generation).then_some(())
            })
            .await;
            waits.hold(Hold::Nothing);
        }
        if versions().await == before {
            return vlan;
        }
    }
    panic!("they write without end");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_syncers_at_once_make_one_copy_each_and_then_rest() {
    let mut world = World::new().await;
    world.timeout = PATIENT;
    let (a, b) = (world.start().await, world.start().await);
    let watch = WatchParams::default();
    let events = world.host_claims().watch(&watch, "0").await.unwrap();
    world.claim("marker", "w1").await;
    world.says("marker", "Synced", "True", "Synced").await;

    let names: Vec<String> = (0..10).map(|i| format!("c{i}")).collect();
    let made = names.iter().map(|name| world.claim(name, "w1"));
    let made = futures::future::join_all(made).await;
    for claim in &made {
        let copy = world.copy_of(claim).await;
        let ready = Condition {
            type_: "Ready".into(),
            status: "True".into(),
            reason: "Ready".into(),
            message: "says the host".into(),
            observed_generation: copy.metadata.generation,
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
        };
        let status = VFClaimStatus {
            host_node: Some("h1".into()),
            conditions: vec![ready],
            ..VFClaimStatus::default()
        };
        world.host_says(&copy, &status).await;
    }
    for name in &names {
        world.says(name, "Synced", "True", "Synced").await;
        let claim = world.says(name, "Ready", "True", "Ready").await;
        assert_eq!(claim.finalizers(), [GUEST_FINALIZER]);
        assert_eq!(claim.status.unwrap().host_node.as_deref(), Some("h1"));
    }
    let vlan = settled(&world, [&a, &b], 200).await;

    let (go, stay) = names.split_at(5);
    for name in go {
        world.delete(name).await;
    }
    for name in go {
        world.gone(name).await;
    }
    settled(&world, [&a, &b], vlan).await;
    assert_eq!(copies(&world).await.len(), stay.len() + 1);

    let events: Vec<WatchEvent<VFClaim>> = events
        .take_until(tokio::time::sleep(Duration::from_secs(1)))
        .try_collect()
        .await
        .unwrap();
    let (mut added, mut deleted) = (0, 0);
    for event in &events {
        match event {
            WatchEvent::Added(_) => added += 1,
            WatchEvent::Deleted(_) => deleted += 1,
            _ => {}
        }
    }
    assert_eq!((added, deleted), (names.len() + 1, go.len()));
    world.stop().await;
}

/// What a fence on the claim cannot stop: a POST that was sent before the claim
/// went, and that the host carries out after it. The next pass takes it away.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_comes_after_its_claim_goes_with_the_next_pass() {
    let mut world = World::new().await;
    world.timeout = PATIENT;
    world.pace.interval = Duration::from_millis(200);
    world.pace.between_looks = Duration::from_millis(300);
    let watch = WatchParams::default();
    let events = world.host_claims().watch(&watch, "0").await.unwrap();
    // It leads no more, and its request is on its way.
    let former = world.start().await;
    former.hold_if(to_host);
    let claim = world.claim("late", "w1").await;
    let copy = host_claim_name(&claim.uid().unwrap());
    former.held(1).await.unwrap();
    world.start().await;
    world.says("late", "Synced", "True", "Synced").await;
    world.delete("late").await;
    world.gone("late").await;
    assert!(copies(&world).await.is_empty());

    former.hold(Hold::Nothing);
    let deleted = events.try_filter(|event| {
        let it = matches!(event, WatchEvent::Deleted(c) if c.name_any() == copy);
        futures::future::ready(it)
    });
    let twice: Vec<_> = tokio::time::timeout(Duration::from_secs(60), deleted.take(2).collect())
        .await
        .expect("the late copy goes too");
    assert_eq!(twice.len(), 2);
    assert!(copies(&world).await.is_empty());
    world.stop().await;
}
