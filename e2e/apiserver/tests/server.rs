//! The server itself: it answers, knows its users apart, and leaves no process.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::Api;
use kube::api::PostParams;
use test_apiserver::TestApiServer;

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
