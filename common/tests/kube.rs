//! The Kubernetes plumbing against a real API server.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::api::{ConditionStatus, GuestRef, NewCondition, VFClaim, VFClaimSpec, type_};
use common::kube::client::ClientOptions;
use common::kube::status::{Report, decide, report};
use common::kube::{KubeClient, finalizer, is_conflict};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::api::{Api, DeleteParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Map, json};
use test_apiserver::TestApiServer;

mod wait;
use wait::eventually;

fn crds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/vf-crds/templates")
}

async fn whoami(client: Client) -> Result<String, kube::Error> {
    let me: Api<SelfSubjectReview> = Api::all(client);
    let who = me
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await?;
    Ok(who
        .status
        .and_then(|s| s.user_info)
        .and_then(|u| u.username)
        .unwrap_or_default())
}

/// A kubeconfig whose certificate and key are files beside it, as the
/// guest-syncer's Secret is mounted.
fn write_identity(folder: &Path, inline: &str) {
    use base64::Engine as _;
    let mut config: serde_json::Value = serde_json::from_str(inline).unwrap();
    let user = config.pointer_mut("/users/0/user").unwrap();
    let engine = base64::engine::general_purpose::STANDARD;
    for (data, file, name) in [
        ("client-certificate-data", "client-certificate", "tls.crt"),
        ("client-key-data", "client-key", "tls.key"),
    ] {
        let text = user[data].as_str().unwrap().to_owned();
        std::fs::write(folder.join(name), engine.decode(text).unwrap()).unwrap();
        user.as_object_mut().unwrap().remove(data);
        user[file] = json!(name);
    }
    std::fs::write(folder.join("kubeconfig"), config.to_string()).unwrap();
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let server = TestApiServer::lend(&[]).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_identity(folder.path(), &server.kubeconfig_for("first", &[]).unwrap());
    let options = ClientOptions {
        kubeconfig: Some(folder.path().join("kubeconfig")),
        qps: 0.0,
        burst: 1,
        look: Duration::from_millis(100),
    };
    let followed = KubeClient::new(&options).await.unwrap();
    assert_eq!(whoami(followed.client()).await.unwrap(), "first");

    // A half-written file leaves the old identity in use.
    std::fs::write(folder.path().join("tls.crt"), "-----BEGIN").unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(whoami(followed.client()).await.unwrap(), "first");

    write_identity(
        folder.path(),
        &server.kubeconfig_for("second", &[]).unwrap(),
    );
    let client = followed.client();
    eventually("the new identity is used", || {
        let client = client.clone();
        async move { whoami(client).await.unwrap() == "second" }
    })
    .await;
}

#[tokio::test]
async fn a_kubeconfig_that_is_not_there_is_named() {
    let options = ClientOptions {
        kubeconfig: Some("/nowhere/kubeconfig".into()),
        qps: 0.0,
        burst: 1,
        look: Duration::from_secs(1),
    };
    let error = KubeClient::new(&options).await.err().unwrap().to_string();
    assert!(error.contains("/nowhere/kubeconfig"), "{error}");
}

/// A server with our CRDs and the claim `a`.
async fn with_a_claim() -> (TestApiServer, Api<VFClaim>, VFClaim) {
    let server = TestApiServer::lend(&[&crds()]).await.unwrap();
    let api: Api<VFClaim> = Api::namespaced(server.admin(), "default");
    let made = api.create(&PostParams::default(), &claim("a")).await;
    (server, api, made.unwrap())
}

fn claim(name: &str) -> VFClaim {
    VFClaim::new(
        name,
        VFClaimSpec {
            guest: Some(GuestRef {
                cluster: "blue".into(),
                cluster_uid: "u".into(),
                namespace: "default".into(),
                name: "c".into(),
                uid: "1".into(),
                node_name: "n".into(),
                system_uuid: "11111111-2222-3333-4444-555555555555".into(),
                provider_id: None,
            }),
            ..VFClaimSpec::default()
        },
    )
}

#[tokio::test]
async fn decisions_are_fenced_and_reports_keep_to_their_own() {
    let (_server, api, seen) = with_a_claim().await;

    let decided = decide(&api, &seen, "test", &json!({"hostNode": "n1"}))
        .await
        .unwrap();
    assert_eq!(
        decided.status.as_ref().unwrap().host_node.as_deref(),
        Some("n1")
    );
    let stale = decide(&api, &seen, "test", &json!({"hostNode": "n2"}))
        .await
        .unwrap_err();
    assert!(is_conflict(&stale), "{stale}");

    let says = |manager, type_, message: &str, owned| Report {
        manager,
        owned,
        conditions: vec![NewCondition::new(
            type_,
            ConditionStatus::True,
            "Why",
            message,
        )],
        observed_generation: decided.metadata.generation,
        fields: Map::new(),
    };
    let conditions = |c: &VFClaim| c.status.clone().unwrap_or_default().conditions;
    let none = Map::new();
    let one = says("one", type_::ADMITTED, "yes", &[type_::ADMITTED]);
    let two = says("two", type_::READY, "no", &[type_::READY]);
    let after = report(&api, &decided, &[], &none, &one)
        .await
        .unwrap()
        .unwrap();
    // A report of another from an older read takes nothing away.
    let after = report(&api, &decided, &conditions(&after), &none, &two)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(conditions(&after).len(), 2);
    assert_eq!(
        after.status.as_ref().unwrap().host_node.as_deref(),
        Some("n1")
    );
    let again = report(&api, &after, &conditions(&after), &none, &two)
        .await
        .unwrap();
    assert!(again.is_none(), "an unchanged report is no request");
    let still = api.get("a").await.unwrap();
    assert_eq!(still.resource_version(), after.resource_version());

    // Clearing, then recreation: neither decision nor report reaches the new one.
    let cleared = decide(&api, &after, "test", &json!({"hostNode": null}))
        .await
        .unwrap();
    assert_eq!(cleared.status.unwrap().host_node, None);
    api.delete("a", &DeleteParams::default()).await.unwrap();
    api.create(&PostParams::default(), &claim("a"))
        .await
        .unwrap();
    let error = decide(&api, &after, "test", &json!({"hostNode": "x"}))
        .await
        .unwrap_err();
    assert!(is_conflict(&error), "{error}");
    let error = report(&api, &after, &[], &none, &one).await.unwrap_err();
    assert!(is_conflict(&error), "{error}");
    assert!(api.get("a").await.unwrap().status.is_none());
}

#[tokio::test]
async fn finalizers_are_put_on_and_taken_off_once() {
    let (_server, api, seen) = with_a_claim().await;
    let with = finalizer::add(&api, &seen, "example.com/one")
        .await
        .unwrap()
        .unwrap();
    assert!(finalizer::has(&with, "example.com/one"));
    assert!(
        finalizer::add(&api, &with, "example.com/one")
            .await
            .unwrap()
            .is_none()
    );
    let stale = finalizer::add(&api, &seen, "example.com/two")
        .await
        .unwrap_err();
    assert!(is_conflict(&stale), "{stale}");
    api.delete("a", &DeleteParams::default()).await.unwrap();
    let dying = api.get("a").await.unwrap();
    finalizer::remove(&api, &dying, "example.com/one")
        .await
        .unwrap()
        .unwrap();
    assert!(api.get_opt("a").await.unwrap().is_none());
}
