//! The server itself: it answers, knows its users apart, and leaves no process.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::path::Path;

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::{Value, json};
use test_apiserver::TestApiServer;

/// Runs as a test does: in a runtime that ends with it.
fn alone<T>(test: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(test)
}

async fn lend() -> TestApiServer {
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/vf-crds/templates");
    TestApiServer::lend(&[&crds]).await.unwrap()
}

fn namespace(name: &str) -> Namespace {
    serde_json::from_value(json!({"metadata": {"name": name, "finalizers": ["a.example/b"]}}))
        .unwrap()
}

async fn names(server: &TestApiServer) -> Vec<Option<String>> {
    let all: Api<Namespace> = Api::all(server.admin());
    let all = all.list(&Default::default()).await.unwrap().items;
    all.into_iter().map(|n| n.metadata.name).collect()
}

/// What one test leaves is not there for the next, which has the same server.
#[test]
fn a_lent_server_is_new_for_each_that_borrows_it() {
    let post = PostParams::default();
    let map = |value: &str| -> ConfigMap {
        serde_json::from_value(json!({"metadata": {"name": "m"}, "data": {"a": value}})).unwrap()
    };
    let (url, before) = alone(async {
        let server = lend().await;
        let before = names(&server).await;
        let all: Api<Namespace> = Api::all(server.admin());
        all.create(&post, &namespace("mine")).await.unwrap();
        let maps: Api<ConfigMap> = Api::namespaced(server.admin(), "mine");
        maps.create(&post, &map("1")).await.unwrap();
        all.delete("kube-node-lease", &DeleteParams::default())
            .await
            .unwrap();
        // Two at once are two servers.
        assert_ne!(lend().await.url(), server.url());
        (server.url().to_owned(), before)
    });
    alone(async {
        // The first one is one of those that are at rest now.
        let (one, other) = (lend().await, lend().await);
        let again = if one.url() == url { &one } else { &other };
        assert_eq!(again.url(), url);
        assert_eq!(names(again).await, before);
        let maps: Api<ConfigMap> = Api::namespaced(again.admin(), "mine");
        assert!(maps.get_opt("m").await.unwrap().is_none());
        // And it works as a new one does.
        let all: Api<Namespace> = Api::all(again.admin());
        all.create(&post, &namespace("mine")).await.unwrap();
        maps.create(&post, &map("2")).await.unwrap();
    });

    // One whose kinds were changed is not what it was, whatever its data say.
    let url = alone(async {
        let server = lend().await;
        let crds: Api<CustomResourceDefinition> = Api::all(server.admin());
        let crd: Value = json!({
            "metadata": {"name": "things.example.com"},
            "spec": {
                "group": "example.com", "scope": "Cluster",
                "names": {"plural": "things", "kind": "Thing"},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {
                    "openAPIV3Schema": {"type": "object"},
                }}],
            },
        });
        let crd = serde_json::from_value(crd).unwrap();
        crds.create(&PostParams::default(), &crd).await.unwrap();
        server.url().to_owned()
    });
    alone(async {
        let (one, other) = (lend().await, lend().await);
        assert!(one.url() != url && other.url() != url);
    });
}

#[tokio::test]
async fn users_are_who_their_certificates_say_and_rbac_is_on() {
    let server = TestApiServer::start().await.unwrap();
    let all: Api<Namespace> = Api::all(server.admin());
    assert!(all.list(&Default::default()).await.unwrap().items.len() >= 3);

    let tenant = server.client_for("guest:a:b", &["guests"]).await.unwrap();
    let me: Api<SelfSubjectReview> = Api::all(tenant.clone());
    let who = me
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await
        .unwrap();
    let user = who.status.unwrap().user_info.unwrap();
    assert_eq!(user.username.as_deref(), Some("guest:a:b"));
    assert!(user.groups.unwrap().contains(&"guests".to_owned()));

    let maps: Api<ConfigMap> = Api::namespaced(tenant, "default");
    let refused = maps.list(&Default::default()).await.unwrap_err();
    assert!(
        matches!(refused, kube::Error::Api(ref s) if s.code == 403),
        "{refused}"
    );

    let url = server.url().trim_start_matches("https://").to_owned();
    server.stop().await.unwrap();
    assert!(
        std::net::TcpStream::connect(url).is_err(),
        "something still listens"
    );
}
