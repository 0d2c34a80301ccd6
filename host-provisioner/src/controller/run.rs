//! Runs the controller: caches, the work queues, bounded concurrency,
//! back-off, and an orderly end.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::api::{GuestCluster, PhysicalFunction, VFClaim};
use common::kube::events::Events;
use common::kube::{Backoff, ErrorClass, class_of};
use common::telemetry::{Check, Metrics};
use futures::{FutureExt as _, StreamExt as _, TryFutureExt as _};
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Config, applier};
use kube::{Client, Resource, ResourceExt as _};
use thiserror::Error;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::caches::{Caches, Guarded, Triggers};
use super::capacity_apply::{self, Counted};
use super::metrics::ControllerMetrics;
use super::quota::Ledger;
use super::{claims, drivers, guests_apply, withhold_apply};

/// Field manager of everything that the controller writes.
pub const MANAGER: &str = "host-provisioner-controller";

/// An object is looked at again after this time even when nothing changed: a
/// deletion may be missed while a watch is broken.
pub(super) const RESYNC: Duration = Duration::from_secs(600);
/// How the controller works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The ClusterRole that says what a guest may do in its claim namespace.
    pub guest_cluster_role: String,
    /// Objects of a kind worked on at once.
    pub workers: u16,
    /// How long one reconcile may take before it is tried again.
    pub timeout: Duration,
    pub retry_start: Duration,
    pub retry_max: Duration,
    /// Tells replicas apart in events.
    pub instance: Option<String>,
}

/// Why the controller ended by itself.
#[derive(Debug, Error)]
pub enum ControllerError {
    #[error("a watch of the controller ended")]
    Watch,
}

/// Why one object could not be worked on.
#[derive(Debug, Error)]
pub(super) enum ReconcileError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("not done after {0:?}; trying again")]
    Timeout(Duration),
    #[error("the object cannot be read: {0}")]
    Unreadable(String),
}

impl ReconcileError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Api(error) => class_of(error),
            Self::Timeout(_) => ErrorClass::Retry,
            Self::Unreadable(_) => ErrorClass::TellUser,
        }
    }
}

/// What every reconcile shares.
pub(super) struct Controller {
    pub(super) client: Client,
    pub(super) caches: Caches,
    pub(super) events: Events,
    pub(super) ledger: Ledger,
    pub(super) metrics: ControllerMetrics,
    pub(super) settings: Settings,
    /// When a guest's objects were last seen right.
    pub(super) ensured: Since,
    /// When a guest was last looked at in full.
    pub(super) looked: Since,
    /// What was left of the classes when it was last counted.
    pub(super) counted: Counted,
    backoff: Backoff<String>,
}

/// UID and generation of an object.
pub(super) type Version = (String, Option<i64>);

/// When something was last done about an object, as it then was.
#[derive(Default)]
pub(super) struct Since(Mutex<HashMap<Version, Instant>>);

impl Since {
    pub(super) fn elapsed(&self, of: &Version) -> Option<Duration> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(of).map(Instant::elapsed)
    }

    pub(super) fn now(&self, of: Version) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(uid, _), _| *uid != of.0);
        all.insert(of, Instant::now());
    }
}

impl Controller {
    /// Bounds a reconcile, counts it, and says when to look again.
    async fn attend<F>(&self, kind: &'static str, uid: Option<String>, work: F) -> Action
    where
        F: Future<Output = Result<Duration, ReconcileError>>,
    {
        let began = Instant::now();
        let uid = uid.unwrap_or_default();
        let done = tokio::time::timeout(self.settings.timeout, work)
            .await
            .unwrap_or(Err(ReconcileError::Timeout(self.settings.timeout)));
        let error = match done {
            Ok(again) => {
                self.metrics.reconciled(kind, "ok", began.elapsed());
                self.backoff.forget(&uid);
                return Action::requeue(again);
            }
            Err(error) => error,
        };
        let class = error.class();
        self.metrics
            .reconciled(kind, class.as_str(), began.elapsed());
        let wait = self.backoff.failed(uid);
        match class {
            // The watch brings the change, mostly sooner.
            ErrorClass::WaitForChange => tracing::debug!(%error, kind, ?wait, "planning again"),
            ErrorClass::Retry => tracing::warn!(%error, kind, ?wait, "trying again"),
            ErrorClass::TellUser => tracing::error!(%error, kind, ?wait, "needs a person"),
        }
        Action::requeue(wait)
    }
}

/// Works until `stop`; what is under way then is finished first. Dropped, it ends
/// where it is: nothing that writes is a task of its own. `check` turns good when
/// every cache is filled.
pub async fn run(
    client: Client,
    settings: Settings,
    metrics: &Metrics,
    check: Check,
    stop: CancellationToken,
) -> Result<(), ControllerError> {
    let mut watches = JoinSet::new();
    let (claims_to, claims_queue) = unbounded_channel();
    let (clusters_to, clusters_queue) = unbounded_channel();
    let (functions_to, functions_queue) = unbounded_channel();
    let (capacity_to, capacity_changed) = watch::channel(());
    let triggers = Triggers {
        claims: claims_to,
        clusters: clusters_to.clone(),
        functions: functions_to,
        capacity: capacity_to,
    };
    let caches = Caches::start(&client, &triggers, &mut watches);
    drop(triggers);
    tokio::select! {
        () = stop.cancelled() => return Ok(()),
        filled = caches.fill(&check) => filled.map_err(|_| ControllerError::Watch)?,
    }
    tracing::info!("caches are filled, working");
    let counts = drivers::run(client.clone());
    let controller = Arc::new(Controller {
        events: Events::new(client.clone(), MANAGER, settings.instance.clone()),
        ledger: Ledger::default(),
        metrics: ControllerMetrics::register(metrics),
        ensured: Since::default(),
        looked: Since::default(),
        counted: Counted::default(),
        backoff: Backoff::new(settings.retry_start, settings.retry_max),
        client,
        caches: caches.clone(),
        settings,
    });
    // Before a guest's report is made, which would take the numbers of an earlier one back.
    controller.counted.count(&caches);
    let capacity = capacity_apply::run(controller.clone(), capacity_changed, clusters_to);
    let claim_work = work(
        controller.clone(),
        caches.claims.clone(),
        claims_queue,
        stop.clone(),
        |controller, claim: Arc<Guarded<VFClaim>>| async move {
            let uid = claim.uid();
            let work = async {
                match &claim.0 {
                    Ok(claim) => claims::reconcile(&controller, claim).await,
                    Err(bad) => Err(ReconcileError::Unreadable(bad.to_string())),
                }
            };
            controller.attend("VFClaim", uid, work).await
        },
    );
    let function_work = work(
        controller.clone(),
        caches.functions.clone(),
        functions_queue,
        stop.clone(),
        |controller, function: Arc<Guarded<PhysicalFunction>>| async move {
            let uid = function.uid();
            let work = async {
                match &function.0 {
                    Ok(function) => withhold_apply::reconcile(&controller, function).await,
                    Err(bad) => Err(ReconcileError::Unreadable(bad.to_string())),
                }
            };
            controller.attend("PhysicalFunction", uid, work).await
        },
    );
    let cluster_work = work(
        controller,
        caches.clusters.clone(),
        clusters_queue,
        stop.clone(),
        |controller, cluster: Arc<Guarded<GuestCluster>>| async move {
            let uid = cluster.uid();
            let work = async {
                match &cluster.0 {
                    Ok(cluster) => guests_apply::reconcile(&controller, cluster).await,
                    Err(bad) => Err(ReconcileError::Unreadable(bad.to_string())),
                }
            };
            controller.attend("GuestCluster", uid, work).await
        },
    );
    tokio::select! {
        _ = async { tokio::join!(claim_work, cluster_work, function_work) } => {}
        () = counts => return Err(ControllerError::Watch),
        () = capacity => return Err(ControllerError::Watch),
        // Watches go on for ever; one that ends would leave the caches stale.
        _ = watches.join_next() => return Err(ControllerError::Watch),
    }
    if stop.is_cancelled() {
        Ok(())
    } else {
        Err(ControllerError::Watch)
    }
}

/// Works a queue off until `stop`, each object at most once at a time.
async fn work<K, F, Fut>(
    controller: Arc<Controller>,
    store: Store<K>,
    queue: UnboundedReceiver<ObjectRef<K>>,
    stop: CancellationToken,
    mut reconcile: F,
) where
    K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
    F: FnMut(Arc<Controller>, Arc<K>) -> Fut,
    Fut: Future<Output = Action> + Send + 'static,
{
    let workers = controller.settings.workers;
    let queue = futures::stream::unfold(queue, |mut queue| async move {
        queue
            .recv()
            .await
            .map(|key| (Ok::<_, Infallible>(key), queue))
    })
    .take_until(stop.cancelled_owned());
    let done = applier(
        move |object, controller| {
            // Its panic, if ever, is not the queue's. No task of its own: that
            // would go on writing when the queue is dropped, as it is with a lost Lease.
            let running = AssertUnwindSafe(reconcile(controller, object)).catch_unwind();
            running.map_err(|_| Crashed).boxed()
        },
        |_, _: &Crashed, controller: Arc<Controller>| {
            Action::requeue(controller.settings.retry_max)
        },
        controller,
        store,
        Box::pin(queue),
        Config::default().concurrency(workers),
    );
    let mut done = pin!(done);
    while let Some(outcome) = done.next().await {
        match outcome {
            Ok(_) => {}
            // Gone since it was queued: nothing to do.
            Err(kube::runtime::controller::Error::ObjectNotFound(_)) => {}
            Err(error) => tracing::error!(%error, "work queue"),
        }
    }
}

/// A reconcile that did not come back; the panic itself is in the log.
#[derive(Debug, Error)]
#[error("a reconcile panicked")]
struct Crashed;
