//! The whole syncer over two clients: who this cluster is, then claims, classes
//! and orphaned copies until told to stop.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use common::kube::Backoff;
use common::kube::events::Events;
use common::telemetry::Metrics;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::Api;
use kube::runtime::reflector::store::Writer;
use kube::{Client, ResourceExt as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::host_link::{Facts, HostLink};
use crate::mirror::claims::Context;
use crate::mirror::controller::{self, Caches};
use crate::mirror::metrics::OrphanMetrics;
use crate::mirror::orphan_pass::Pace;
use crate::mirror::{MANAGER, class_mirror, orphan_pass};

/// How the syncer works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of our `GuestCluster` on the host.
    pub guest_cluster: String,
    /// Claims worked on at once.
    pub workers: u16,
    /// Bound of each call to the host.
    pub timeout: Duration,
    pub retry_start: Duration,
    pub retry_max: Duration,
    /// When the host is looked through for orphaned copies.
    pub orphans: Pace,
    /// Our name in events, to tell replicas apart.
    pub identity: Option<String>,
}

/// UID of the guest's kube-system namespace: the cluster's own lasting identity.
pub async fn cluster_uid(guest: &Client) -> Result<String, kube::Error> {
    let namespaces: Api<Namespace> = Api::all(guest.clone());
    let found = namespaces.get("kube-system").await?;
    Ok(found.uid().unwrap_or_default())
}

/// The host has another claim namespace for us than when we began. It is
/// immutable, so the `GuestCluster` was made anew: what is cached is of the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host's GuestCluster was made anew with another claimNamespace; starting over")]
pub struct Moved;

/// Syncs until `stop`, then ends what is under way.
pub async fn run(
    guest: Client,
    host: Arc<HostLink>,
    cluster_uid: String,
    options: &Options,
    metrics: &Metrics,
    stop: CancellationToken,
) -> Result<(), Moved> {
    let orphans = OrphanMetrics::register(metrics);
    let caches = Caches {
        nodes: Writer::default(),
        copies: Writer::default(),
    };
    let ctx = Arc::new(Context {
        events: Events::new(guest.clone(), MANAGER, options.identity.clone()),
        guest,
        host: host.clone(),
        cluster: options.guest_cluster.clone(),
        cluster_uid,
        nodes: caches.nodes.as_reader(),
        copies: caches.copies.as_reader(),
        copies_listed: AtomicBool::new(false),
        relist: Arc::default(),
        backoff: Backoff::new(options.retry_start, options.retry_max),
    });
    let work = async {
        tokio::join!(
            controller::run(ctx.clone(), caches, options.workers, stop.clone()),
            class_mirror::run(ctx.clone(), stop.clone()),
            orphan_pass::run(
                ctx.clone(),
                orphans,
                options.orphans,
                options.identity.clone(),
                stop.clone()
            ),
        )
    };
    tokio::select! {
        _ = work => Ok(()),
        () = async { tokio::join!(host.follow(&options.guest_cluster), host.probe()); } => Ok(()),
        () = moved(host.facts()) => Err(Moved),
    }
}

/// Returns when the claim namespace is another than the first that was known.
async fn moved(mut facts: watch::Receiver<Facts>) {
    let namespace = |f: &Facts| match f {
        Facts::Known(found) => Some(found.spec.claim_namespace.clone()),
        Facts::Missing | Facts::Unknown(_) => None,
    };
    let mut first = None;
    // An error says that the link is gone, and with it everything here.
    let _ = facts
        .wait_for(|f| match (namespace(f), &first) {
            (Some(now), Some(before)) => now != *before,
            (Some(now), None) => {
                first = Some(now);
                false
            }
            (None, _) => false,
        })
        .await;
}
