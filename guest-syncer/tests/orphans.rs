//! Copies without a claim, and claims without a copy, against two real API servers.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use common::api::{
    DELETE_ORPHANS_ANNOTATION, GUEST_USER_PREFIX, HOST_FINALIZER, VFClaim, host_claim_name,
};
use guest_syncer::host_link::HostLink;
use guest_syncer::mirror::host_claims::HostClaims;
use guest_syncer::mirror::orphans;
use guest_syncer::mirror::up::GuestId;
use guest_syncer::syncer::cluster_uid;
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::json;

mod world;
use world::{CLAIMS, CLUSTER, UUID, World, eventually};

/// Between two looks, where a test does something in between.
const APART: Duration = Duration::from_secs(2);

async fn world(between_looks: Duration) -> World {
    let mut world = World::new().await;
    world.pace.interval = Duration::from_millis(200);
    world.pace.between_looks = between_looks;
    world
}

/// A copy on the host as a syncer of `cluster_uid` makes it, of a claim that is nowhere.
async fn stray(world: &World, cluster_uid: &str, claim_uid: &str, copy: &str) -> VFClaim {
    let guest = json!({"cluster": CLUSTER, "clusterUID": cluster_uid, "namespace": "team",
        "name": "nowhere", "uid": claim_uid, "nodeName": "w1", "systemUUID": UUID});
    let copy = json!({"metadata": {"name": copy}, "spec": {"className": "gold", "guest": guest}});
    world::create(&world.host_claims(), copy).await
}

async fn orphan(world: &World, claim_uid: &str) -> VFClaim {
    let uid = cluster_uid(&world.guest.admin()).await.unwrap();
    stray(world, &uid, claim_uid, &host_claim_name(claim_uid)).await
}

async fn host_has(world: &World, copy: &VFClaim) -> bool {
    let found = world.host_claims().get_opt(&copy.name_any()).await.unwrap();
    found.is_some_and(|f| f.uid() == copy.uid() && f.metadata.deletion_timestamp.is_none())
}

/// Takes a claim away without its syncer, which must be stopped or cut off.
async fn tear_off(world: &World, name: &str) {
    let api = world.guest_claims();
    api.delete(name, &DeleteParams::default()).await.unwrap();
    let torn = json!({"metadata": {"finalizers": null}});
    api.patch(name, &PatchParams::default(), &Patch::Merge(torn))
        .await
        .unwrap();
    world.gone(name).await;
}

async fn give_the_word(world: &World, word: &str) {
    let api: Api<Namespace> = Api::all(world.guest.admin());
    let patch = json!({"metadata": {"annotations": {DELETE_ORPHANS_ANNOTATION: word}}});
    api.patch("kube-system", &PatchParams::default(), &Patch::Merge(patch))
        .await
        .unwrap();
}

/// The word in the latest complaint about so many orphans.
async fn word_for(world: &World, orphans: usize) -> String {
    let sign = format!("{DELETE_ORPHANS_ANNOTATION}={orphans}-");
    eventually(&format!("MassOrphan of {orphans}"), || async {
        let notes = world.notes_on("kube-system").await;
        let complaints = notes.iter().filter(|(reason, _)| reason == "MassOrphan");
        complaints.into_iter().find_map(|(_, note)| {
            let (_, after) = note.split_once(&sign)?;
            let (digest, _) = after.split_once(' ')?;
            Some(format!("{orphans}-{digest}"))
        })
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_goes_after_its_second_look_and_not_before() {
    let mut world = world(APART).await;
    world.start().await;
    let torn = world.claim("torn", "w1").await;
    let orphan = world.copy_of(&torn).await;
    let kept = world.claim("kept", "w1").await;
    let kept = world.copy_of(&kept).await;
    world.says("kept", "Synced", "True", "Synced").await;
    world.says("torn", "Synced", "True", "Synced").await;
    world.stop().await;
    tear_off(&world, "torn").await;
    // Another claim of its name is none of the copy's business.
    let again = world.claim("torn", "w1").await;
    let hold = json!({"metadata": {"finalizers": [HOST_FINALIZER]}});
    let params = PatchParams::default();
    let host = world.host_claims();
    host.patch(&orphan.name_any(), &params, &Patch::Merge(hold))
        .await
        .unwrap();

    // One look is not enough, also not two with a stop in between.
    for _ in 0..2 {
        world.start().await;
        eventually("a first look", || async {
            (world.counted("orphan_suspects") == 1).then_some(())
        })
        .await;
        world.stop().await;
        assert!(host_has(&world, &orphan).await);
    }
    let begun = Instant::now();
    world.start().await;
    eventually("the orphan told to go", || async {
        let found = host.get(&orphan.name_any()).await.unwrap();
        found.metadata.deletion_timestamp
    })
    .await;
    assert!(begun.elapsed() >= APART, "{:?}", begun.elapsed());
    // While it is going it is deleted no second time.
    world.passes("clean", 2).await;
    assert_eq!(world.counted("orphans_deleted_total"), 1);
    let free = json!({"metadata": {"finalizers": null}});
    host.patch(&orphan.name_any(), &params, &Patch::Merge(free))
        .await
        .unwrap();
    assert!(host_has(&world, &kept).await);
    assert!(host_has(&world, &world.copy_of(&again).await).await);

    // A finalizer that is torn off while the syncer is there, and cut off.
    world.wire.cut().await;
    tear_off(&world, "kept").await;
    assert!(host_has(&world, &kept).await);
    world.wire.mend().await;
    eventually("the second orphan gone", || async {
        (!host_has(&world, &kept).await).then_some(())
    })
    .await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_a_404_about_something_else_delete_nothing() {
    let mut world = world(APART).await;
    let orphan = orphan(&world, "u-1").await;
    world.start().await;
    eventually("a first look", || async {
        (world.counted("orphan_suspects") == 1).then_some(())
    })
    .await;
    world.guest_wire.cut().await;
    world.passes("failed", 2).await;
    assert!(host_has(&world, &orphan).await);
    world.stop().await;

    // Without its CRD the guest has no claim of any name, and says so.
    let kind = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let crds: Api<DynamicObject> =
        Api::all_with(world.guest.admin(), &ApiResource::from_gvk(&kind));
    let name = "vfclaims.sriov.harvesterhci.io";
    crds.delete(name, &DeleteParams::default()).await.unwrap();
    eventually("the CRD gone", || async {
        let claims = world.guest_claims().list(&Default::default()).await;
        (claims.is_err() && crds.get_opt(name).await.unwrap().is_none()).then_some(())
    })
    .await;
    world.guest_wire.mend().await;
    world.start().await;
    world.passes("kept", 2).await;
    assert_eq!(world.counted("orphan_suspects"), 1);
    assert!(host_has(&world, &orphan).await);

    let dir =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/vf-crds/templates");
    world.guest.install_crds(&dir).await.unwrap();
    eventually("the orphan gone", || async {
        (!host_has(&world, &orphan).await).then_some(())
    })
    .await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mass_of_orphans_waits_for_an_administrators_word() {
    let mut world = world(Duration::from_millis(300)).await;
    let mut orphans = Vec::new();
    for n in 0..6 {
        orphans.push(orphan(&world, &format!("u-{n}")).await);
    }
    world.start().await;
    world.passes("braked", 2).await;
    assert_eq!(world.counted("orphans_held"), 6);
    let six = word_for(&world, 6).await;

    // One more, and the word for the six releases none of the seven.
    orphans.push(orphan(&world, "u-6").await);
    let seven = word_for(&world, 7).await;
    give_the_word(&world, &six).await;
    world.passes("braked", 2).await;
    assert_eq!(world.counted("orphans_held"), 7);
    for copy in &orphans {
        assert!(host_has(&world, copy).await, "{}", copy.name_any());
    }
    assert_eq!(world.counted("orphans_deleted_total"), 0);
    world.stop().await;

    // The right word wakes a syncer that would not look for long.
    world.pace.interval = Duration::from_secs(600);
    world.start().await;
    world.passes("braked", 1).await;
    give_the_word(&world, &seven).await;
    eventually("all released", || async {
        let left = world.host_claims().list(&Default::default()).await.unwrap();
        left.items.is_empty().then_some(())
    })
    .await;
    eventually("what was done, said", || async {
        let told = world.events_on("kube-system").await;
        told.contains(&"DeleteOrphans".to_owned()).then_some(())
    })
    .await;
    assert_eq!(world.counted("orphans_held"), 0);
    world.stop().await;

    // It is good for once.
    for n in 0..7 {
        orphan(&world, &format!("u-{n}")).await;
    }
    world.start().await;
    world.passes("braked", 1).await;
    assert_eq!(world.counted("orphans_deleted_total"), 0);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_cluster_or_somebody_else_made_stays() {
    let mut world = world(Duration::from_millis(300)).await;
    let uid = cluster_uid(&world.guest.admin()).await.unwrap();
    let host_own = json!({"metadata": {"name": "vfc-u-3"}, "spec": {"nodeName": "h1"}});
    let foreign = [
        stray(&world, "another", "u-1", "vfc-u-1").await,
        stray(&world, &uid, "u-2", "by-hand").await,
        world::create(&world.host_claims(), host_own).await,
    ];
    let ours = orphan(&world, "u-4").await;
    world.start().await;
    eventually("ours gone", || async {
        (!host_has(&world, &ours).await).then_some(())
    })
    .await;
    world.passes("clean", 2).await;
    for copy in &foreign {
        assert!(host_has(&world, copy).await, "{}", copy.name_any());
    }
    world.stop().await;

    // A syncer that another cluster answers than the one it began with.
    let user = format!("{GUEST_USER_PREFIX}{CLUSTER}");
    world.start_with(&user, "another".to_owned()).await;
    world.passes("another_cluster", 2).await;
    for copy in &foreign {
        assert!(host_has(&world, copy).await, "{}", copy.name_any());
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_missing_is_made_again() {
    let mut world = world(Duration::from_millis(300)).await;
    world.start().await;
    let claim = world.claim("fast", "w1").await;
    let first = world.copy_of(&claim).await;
    world.says("fast", "Synced", "True", "Synced").await;
    world.stop().await;

    // Lost while nobody looked, as from a host restored from a backup.
    let host = world.host_claims();
    let (name, params) = (first.name_any(), DeleteParams::default());
    host.delete(&name, &params).await.unwrap();
    world.start().await;
    let second = world.copy_of(&claim).await;
    assert_ne!(second.uid(), first.uid());
    world.passes("clean", 1).await;

    // Lost while the watch was deaf: nobody tells, and nobody touches the claim.
    world.wire.freeze();
    host.delete(&name, &params).await.unwrap();
    let third = world.copy_of(&claim).await;
    assert_ne!(third.uid(), second.uid());
    // And the watch hears again.
    host.delete(&name, &params).await.unwrap();
    let fourth = world.copy_of(&claim).await;
    assert_ne!(fourth.uid(), third.uid());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_complete_and_what_changed_since_stays() {
    let world = World::new().await;
    for n in 0..5 {
        orphan(&world, &format!("u-{n}")).await;
    }
    let link = HostLink::new(world.host.admin(), world.pace.timeout);
    let host = HostClaims::new(&link, CLAIMS);
    for page in [1, 2, 5, 500] {
        assert_eq!(host.list_by(page).await.unwrap().len(), 5, "{page}");
    }

    let uid = cluster_uid(&world.guest.admin()).await.unwrap();
    let guest = GuestId {
        cluster: CLUSTER.into(),
        cluster_uid: uid,
        claim_namespace: CLAIMS.into(),
    };
    let api = world.host_claims();
    let found = api.get("vfc-u-0").await.unwrap();
    let seen = orphans::ours(&found, &guest).unwrap();
    let edit = json!({"spec": {"vmIP": "10.0.0.8"}});
    let params = PatchParams::default();
    api.patch("vfc-u-0", &params, &Patch::Merge(edit))
        .await
        .unwrap();
    assert_eq!(host.delete_orphan(&seen).await, Ok(false));
    // Of a name that was given anew.
    api.delete("vfc-u-0", &DeleteParams::default())
        .await
        .unwrap();
    assert_eq!(host.delete_orphan(&seen).await, Ok(false));
    let again = orphan(&world, "u-0").await;
    assert_eq!(host.delete_orphan(&seen).await, Ok(false));
    assert!(host_has(&world, &again).await);
    // A restored host may count a version a second time.
    let mut seen = seen;
    seen.resource_version = again.resource_version().unwrap();
    assert_eq!(host.delete_orphan(&seen).await, Ok(false));
    let seen = orphans::ours(&again, &guest).unwrap();
    assert_eq!(host.delete_orphan(&seen).await, Ok(true));
    assert!(!host_has(&world, &again).await);
}
