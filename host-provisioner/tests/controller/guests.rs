//! What a guest gets: its namespace, its rights and no more, its report.

use common::api::{GUEST_USER_PREFIX, GuestCluster, HOST_FINALIZER, VFClaim, reason, type_};
use host_provisioner::controller::guests::{GUEST_LABEL, ROLE_BINDING};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::rbac::v1::RoleBinding;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, Error, ResourceExt as _};
use serde_json::json;

use crate::harness::{CLAIMS, Harness, UUID, claim, eventually};

#[track_caller]
fn denied<T>(what: &str, result: Result<T, Error>, code: u16, says: &str) {
    match result {
        Ok(_) => panic!("{what}: allowed"),
        Err(Error::Api(status)) => {
            assert_eq!(status.code, code, "{what}: {}", status.message);
            assert!(status.message.contains(says), "{what}: {}", status.message);
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

/// A guest's user, once the API server's authorizer has its rights: it reads
/// them from a watch.
async fn user(harness: &Harness, guest: &str, namespace: &str) -> Client {
    let name = format!("{GUEST_USER_PREFIX}{guest}");
    let client = harness.server.client_for(&name, &[]).await.unwrap();
    let claims = own(&client, namespace);
    let guests: Api<GuestCluster> = Api::all(client.clone());
    eventually("the guest has its rights", || async {
        let listed = claims.list(&ListParams::default()).await;
        listed.map_err(|e| e.to_string())?;
        guests.get(guest).await.map(drop).map_err(|e| e.to_string())
    })
    .await;
    client
}

fn own(client: &Client, namespace: &str) -> Api<VFClaim> {
    Api::namespaced(client.clone(), namespace)
}

#[tokio::test]
async fn a_guest_does_all_it_needs_in_its_namespace_and_nothing_elsewhere() {
    let harness = Harness::running().await;
    harness.guest("green", "claims-green").await;
    harness.guest_ready("green").await;
    harness.vmi("a", UUID).await;
    let blue = user(&harness, "blue", CLAIMS).await;
    let claims = own(&blue, CLAIMS);
    let new = PostParams::default();
    let made = claims.create(&new, &claim("u1")).await.unwrap();
    harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    let patch = Patch::Merge(json!({"spec": {"vmIP": null}}));
    claims
        .patch("vfc-u1", &PatchParams::default(), &patch)
        .await
        .unwrap();
    assert_eq!(
        claims
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .len(),
        1
    );

    let status = Patch::Merge(json!({"status": {"hostNode": "host2"}}));
    let params = PatchParams::default();
    denied(
        "status",
        claims.patch_status("vfc-u1", &params, &status).await,
        403,
        "forbidden",
    );
    let elsewhere = own(&blue, "claims-green");
    let mut foreign = claim("u2");
    foreign.metadata.namespace = Some("claims-green".into());
    denied(
        "create there",
        elsewhere.create(&new, &foreign).await,
        403,
        "forbidden",
    );
    denied(
        "list there",
        elsewhere.list(&ListParams::default()).await,
        403,
        "forbidden",
    );
    let all: Api<VFClaim> = Api::all(blue.clone());
    denied(
        "list all",
        all.list(&ListParams::default()).await,
        403,
        "forbidden",
    );

    let guests: Api<GuestCluster> = Api::all(blue.clone());
    guests.get("blue").await.unwrap();
    let mine = ListParams::default().fields("metadata.name=blue");
    assert_eq!(guests.list(&mine).await.unwrap().items.len(), 1);
    denied("another guest", guests.get("green").await, 403, "forbidden");
    denied(
        "all guests",
        guests.list(&ListParams::default()).await,
        403,
        "forbidden",
    );
    let greedy = Patch::Merge(json!({"spec": {"quota": {"claims": 99}}}));
    denied(
        "its quota",
        guests.patch("blue", &params, &greedy).await,
        403,
        "forbidden",
    );
    claims
        .delete("vfc-u1", &DeleteParams::default())
        .await
        .unwrap();
    harness.gone(&made).await;
    harness.end().await;
}

/// Waits until the policy is in force: the API server reads it from a watch.
async fn policy_in_force(claims: &Api<VFClaim>) {
    let mut forged = claim("probe");
    forged.spec.guest.as_mut().unwrap().cluster = "green".into();
    let dry = PostParams {
        dry_run: true,
        field_manager: None,
    };
    eventually("the policy is in force", || async {
        match claims.create(&dry, &forged).await {
            Err(Error::Api(status)) if status.message.contains("must be blue") => Ok(()),
            other => Err(format!("{:?}", other.map(|c| c.metadata.name))),
        }
    })
    .await;
}

#[tokio::test]
async fn the_policy_keeps_a_guest_to_its_own_cluster_and_shape() {
    let harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    let claims = own(&user(&harness, "blue", CLAIMS).await, CLAIMS);
    policy_in_force(&claims).await;
    let edit = |uid: &str, f: fn(&mut VFClaim)| {
        let mut claim = claim(uid);
        f(&mut claim);
        claim
    };
    for (claim, says) in [
        (
            edit("p1", |c| {
                c.spec.guest.as_mut().unwrap().cluster = "green".into()
            }),
            "must be blue",
        ),
        (
            edit("p2", |c| {
                c.spec.guest = None;
                c.spec.vm_ip = None;
                c.spec.node_name = Some("n".into());
            }),
            "must be blue",
        ),
        (
            edit("p3", |c| c.metadata.name = Some("mine".into())),
            "must be vfc-",
        ),
        (
            edit("p4", |c| {
                c.metadata.finalizers = Some(vec!["example.com/mine".into()])
            }),
            "no finalizer but the host's",
        ),
        (
            edit("p5", |c| {
                c.metadata.owner_references = Some(vec![
                    serde_json::from_value(
                        json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "y"}),
                    )
                    .unwrap(),
                ])
            }),
            "no owner references",
        ),
    ] {
        denied(
            says,
            claims.create(&PostParams::default(), &claim).await,
            422,
            says,
        );
    }
    // It may bring the host's finalizer along, and cannot take it off.
    let mut early = claim("p6");
    early.metadata.finalizers = Some(vec![HOST_FINALIZER.into()]);
    let made = claims.create(&PostParams::default(), &early).await.unwrap();
    harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    let off = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    let taken = claims.patch("vfc-p6", &PatchParams::default(), &off).await;
    denied("finalizer", taken, 422, "taken off by the host");
    // The administrator is not a guest.
    harness
        .claims()
        .patch("vfc-p6", &PatchParams::default(), &off)
        .await
        .unwrap();

    // A claim of another's in its namespace is not its to delete.
    let foreign = edit("p7", |c| {
        c.spec.guest.as_mut().unwrap().cluster = "green".into()
    });
    harness.create(&foreign).await;
    let deleted = claims.delete("vfc-p7", &DeleteParams::default()).await;
    denied("delete", deleted, 422, "must be blue");
    harness.end().await;
}

#[tokio::test]
async fn namespaces_are_not_shared_and_not_adopted() {
    let mut harness = Harness::new().await;
    harness.guest("blue", CLAIMS).await;
    harness.start().await;
    harness.guest_ready("blue").await;
    let namespaces: Api<Namespace> = Api::all(harness.admin.clone());
    let made = namespaces.get(CLAIMS).await.unwrap();
    assert_eq!(
        made.labels().get(GUEST_LABEL).map(String::as_str),
        Some("blue")
    );

    let second = harness.guest("second", CLAIMS).await;
    let refused = harness.guest_says("second", "ClaimNamespaceTaken").await;
    assert_eq!(refused.uid(), second.uid());
    let mut intruder = claim("u1");
    intruder.spec.guest.as_mut().unwrap().cluster = "second".into();
    let intruder = harness.create(&intruder).await;
    harness
        .says(&intruder, type_::ADMITTED, reason::GUEST_IDENTITY_MISMATCH)
        .await;

    let namespace = Namespace {
        metadata: ObjectMeta {
            name: Some("somebodys".into()),
            ..ObjectMeta::default()
        },
        ..Namespace::default()
    };
    namespaces
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
    harness.guest("third", "somebodys").await;
    harness.guest_says("third", reason::CONFLICT).await;
    let bindings: Api<RoleBinding> = Api::namespaced(harness.admin.clone(), "somebodys");
    assert!(bindings.get_opt(ROLE_BINDING).await.unwrap().is_none());
    // Handed over by its administrator, it is taken.
    let label = Patch::Merge(json!({"metadata": {"labels": {GUEST_LABEL: "third"}}}));
    namespaces
        .patch("somebodys", &PatchParams::default(), &label)
        .await
        .unwrap();
    harness.guest_ready("third").await;
    harness.end().await;
}

#[tokio::test]
async fn the_report_has_classes_and_claims_and_is_quiet_when_nothing_changes() {
    let harness = Harness::running().await;
    harness.vmi("a", UUID).await;
    let made = harness.create(&claim("u1")).await;
    harness.says(&made, type_::RESOLVED, reason::RESOLVED).await;
    let guests = harness.guests();
    let reported = |claims: u32, classes: usize| {
        let guests = guests.clone();
        async move {
            eventually(&format!("{claims} claims, {classes} classes"), || async {
                let guest = guests.get("blue").await.unwrap();
                let status = guest.status.clone().unwrap_or_default();
                let found = status.claims == claims && status.classes.len() == classes;
                found.then_some(guest).ok_or(format!("{status:?}"))
            })
            .await
        }
    };
    let one = reported(1, 1).await;
    let status = one.status.clone().unwrap();
    assert_eq!(status.classes[0].name, "gold");
    assert!(status.last_seen_time.is_some());
    assert_eq!(status.cluster_uid.as_deref(), Some("kube-system-of-blue"));

    // A claim's condition changes: the guest's report does not.
    harness
        .patch_vmi("a", json!({"status": {"phase": "Scheduling"}}))
        .await;
    harness
        .says(&made, type_::RESOLVED, reason::VM_NOT_RUNNING)
        .await;
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert_eq!(
        guests.get("blue").await.unwrap().resource_version(),
        one.resource_version()
    );

    harness.class("later", &[]).await;
    reported(1, 2).await;
    harness.delete("vfc-u1").await;
    reported(0, 2).await;
    harness.end().await;
}
