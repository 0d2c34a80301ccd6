//! Leader election over a real API server: who leads when, and what a term that
//! ends does to the work in it.

// A test's helper that fails fails its test; clippy allows that only inside `#[test]`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::kube::{LeaderConfig, LeaderError, run_as_leader};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use test_apiserver::TestApiServer;
use test_apiserver::gate::{Gate, Hold};
use test_apiserver::lease;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

mod wait;
use wait::eventually;

/// One at a time: what is tested is time, and a busy machine has little of it.
static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn candidate(name: &str) -> LeaderConfig {
    LeaderConfig {
        namespace: "default".to_owned(),
        name: "test".to_owned(),
        identity: name.to_owned(),
        lease_duration: Duration::from_secs(3),
        renew_deadline: Duration::from_secs(2),
        retry_period: Duration::from_millis(200),
    }
}

/// What happened, in its order.
#[derive(Clone, Default)]
struct Story(Arc<Mutex<Vec<String>>>);

impl Story {
    fn tell(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }

    fn told(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    async fn has(&self, what: &str) {
        eventually(what, || async { self.told().iter().any(|t| t == what) }).await;
    }
}

/// Tells of a term's end, whichever way it ends.
struct Term(Story, String);

impl Drop for Term {
    fn drop(&mut self) {
        self.0.tell(format!("{} ended", self.1));
    }
}

type Ended = JoinHandle<Result<Option<()>, LeaderError>>;

/// A candidate that leads until it is stopped or loses the Lease.
fn start(client: Client, config: LeaderConfig, story: &Story) -> (CancellationToken, Ended) {
    let (stop, story) = (CancellationToken::new(), story.clone());
    let name = config.identity.clone();
    let run = run_as_leader(client, config, stop.clone(), |term| async move {
        story.tell(format!("{name} leads"));
        let _ended = Term(story, name);
        term.cancelled().await;
    });
    (stop, tokio::spawn(run))
}

/// How a term ended; that it does not end is a failure too.
async fn end_of(term: Ended) -> Result<Option<()>, LeaderError> {
    let ended = tokio::time::timeout(Duration::from_secs(30), term).await;
    ended.expect("the term ends").unwrap()
}

#[tokio::test]
async fn one_leads_the_next_follows_and_a_lost_lease_ends_the_work() {
    let _one = ONE.lock().await;
    let server = TestApiServer::lend(&[]).await.unwrap();
    let leases: Api<Lease> = Api::namespaced(server.admin(), "default");
    let holder = || async {
        let lease = leases.get_opt("test").await.unwrap();
        lease.and_then(|l| l.spec).and_then(|s| s.holder_identity)
    };
    let story = Story::default();
    let (stop_one, one) = start(server.admin(), candidate("one"), &story);
    story.has("one leads").await;
    let (stop_two, two) = start(server.admin(), candidate("two"), &story);
    // Longer than the lease: a leader that renews keeps it.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        assert_eq!(holder().await.as_deref(), Some("one"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stop_one.cancel();
    assert!(matches!(end_of(one).await, Ok(Some(()))));
    story.has("two leads").await;
    lease::steal(&leases, "test").await.unwrap();
    assert!(matches!(end_of(two).await, Err(LeaderError::Lost(_))));
    assert_eq!(
        story.told(),
        ["one leads", "one ended", "two leads", "two ended"]
    );
    drop(stop_two);
}

#[tokio::test]
async fn a_lost_lease_drops_the_write_in_flight_and_a_stop_finishes_it() {
    let _one = ONE.lock().await;
    let server = TestApiServer::lend(&[]).await.unwrap();
    let leases: Api<Lease> = Api::namespaced(server.admin(), "default");
    let maps: Api<ConfigMap> = Api::namespaced(server.admin(), "default");
    let named = |name: &str| ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    };
    let made = maps.create(&PostParams::default(), &named("written")).await;
    let written = async || maps.get("written").await.unwrap().resource_version();
    let gate = Gate::default();
    let gated: Api<ConfigMap> = Api::namespaced(gate.client(server.admin()), "default");
    gate.hold(Hold::Writes);
    // Writes one after the other, and looks at its token only between them.
    let lead = || {
        let (stop, maps) = (CancellationToken::new(), gated.clone());
        let run = run_as_leader(
            server.admin(),
            candidate("one"),
            stop.clone(),
            |term| async move {
                let mut n = 0;
                while !term.is_cancelled() {
                    n += 1;
                    let patch = Patch::Merge(json!({"data": {"n": n.to_string()}}));
                    let params = PatchParams::default();
                    maps.patch("written", &params, &patch).await.unwrap();
                }
            },
        );
        (stop, tokio::spawn(run))
    };

    let (stop, one) = lead();
    gate.held(1).await.unwrap();
    stop.cancel();
    gate.hold(Hold::Nothing);
    assert!(matches!(end_of(one).await, Ok(Some(()))));
    let finished = written().await;
    assert_ne!(
        finished,
        made.unwrap().resource_version(),
        "a stop finishes it"
    );

    gate.hold(Hold::Writes);
    let (stop, one) = lead();
    gate.held(1).await.unwrap();
    let sent = gate.sent();
    lease::steal(&leases, "test").await.unwrap();
    assert!(matches!(end_of(one).await, Err(LeaderError::Lost(_))));
    assert_eq!(gate.waiting(), [], "the request outlived the term");
    gate.hold(Hold::Nothing);
    // Another one's way through the same gate: time enough to err.
    gated
        .create(&PostParams::default(), &named("later"))
        .await
        .unwrap();
    assert_eq!(gate.sent().len(), sent.len() + 1, "{:?}", gate.sent());
    assert_eq!(written().await, finished);
    drop(stop);
}

#[tokio::test]
async fn a_request_that_hangs_makes_no_term_longer() {
    let _one = ONE.lock().await;
    let server = TestApiServer::lend(&[]).await.unwrap();
    let story = Story::default();
    let gate = Gate::default();
    let (_stop, one) = start(gate.client(server.admin()), candidate("one"), &story);
    story.has("one leads").await;
    let (_stop, _two) = start(server.admin(), candidate("two"), &story);
    gate.hold(Hold::Requests);
    gate.held(1).await.unwrap();
    story.has("two leads").await;
    assert_eq!(story.told(), ["one leads", "one ended", "two leads"]);
    assert!(matches!(end_of(one).await, Err(LeaderError::Lost(_))));
}

#[tokio::test]
async fn a_term_begins_when_the_lease_was_asked_for() {
    let _one = ONE.lock().await;
    let server = TestApiServer::lend(&[]).await.unwrap();
    let story = Story::default();
    let gate = Gate::default();
    gate.hold(Hold::Answers);
    let config = LeaderConfig {
        lease_duration: Duration::from_secs(6),
        renew_deadline: Duration::from_secs(4),
        ..candidate("one")
    };
    let (_stop, one) = start(gate.client(server.admin()), config.clone(), &story);
    gate.held(1).await.unwrap();
    // The Lease is one's and one does not know it; whoever looks counts from here.
    let two = LeaderConfig {
        identity: "two".to_owned(),
        ..config
    };
    let (_stop, _two) = start(server.admin(), two, &story);
    // An answer after most of the deadline, and none to what is asked then.
    tokio::time::sleep(Duration::from_secs(3)).await;
    gate.hold(Hold::Requests);
    story.has("two leads").await;
    assert_eq!(story.told(), ["one leads", "one ended", "two leads"]);
    assert!(matches!(end_of(one).await, Err(LeaderError::Lost(_))));
}

#[tokio::test]
async fn an_answer_after_the_deadline_is_no_term() {
    let _one = ONE.lock().await;
    let server = TestApiServer::lend(&[]).await.unwrap();
    let story = Story::default();
    let gate = Gate::default();
    gate.hold(Hold::Answers);
    let (stop, one) = start(gate.client(server.admin()), candidate("one"), &story);
    let first = gate.held(1).await.unwrap();
    // It gives that try up by itself, finds the Lease its own and renews it.
    eventually("another try", || async {
        let now = gate.waiting();
        !now.is_empty() && now != first
    })
    .await;
    assert_eq!(story.told(), [""; 0]);
    gate.hold(Hold::Nothing);
    story.has("one leads").await;
    stop.cancel();
    assert!(matches!(end_of(one).await, Ok(Some(()))));
}

#[tokio::test]
async fn what_time_a_lease_says_it_is_means_nothing() {
    let _one = ONE.lock().await;
    let server = TestApiServer::lend(&[]).await.unwrap();
    let leases: Api<Lease> = Api::namespaced(server.admin(), "default");
    let hours = |h| SignedDuration::from_hours(h);
    let held_by = |who: &str, renewed: Timestamp| Lease {
        metadata: ObjectMeta {
            name: Some("test".to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(who.to_owned()),
            lease_duration_seconds: Some(3),
            renew_time: Some(MicroTime(renewed)),
            ..LeaseSpec::default()
        }),
    };
    // A holder that lives and whose clock is five hours behind keeps the Lease.
    let mut said = Timestamp::now() - hours(5);
    let made = held_by("behind", said);
    let mut lease = leases.create(&PostParams::default(), &made).await.unwrap();
    let story = Story::default();
    let (_stop, one) = start(server.admin(), candidate("one"), &story);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(200)).await;
        said += SignedDuration::from_millis(1);
        lease.spec = held_by("behind", said).spec;
        let params = PostParams::default();
        lease = leases.replace("test", &params, &lease).await.unwrap();
    }
    assert_eq!(story.told(), [""; 0]);
    // One that died and whose clock was five hours ahead does not.
    lease.spec = held_by("ahead", Timestamp::now() + hours(5)).spec;
    let params = PostParams::default();
    leases.replace("test", &params, &lease).await.unwrap();
    story.has("one leads").await;
    let spec = leases.get("test").await.unwrap().spec.unwrap();
    assert_eq!(spec.holder_identity.as_deref(), Some("one"));
    one.abort();
}
