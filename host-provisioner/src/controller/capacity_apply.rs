//! Keeps the reports of what is left of each class: `VFClass.status`, and the totals that the
//! `GuestCluster`s' reports take. VFs come and go all the time, so one pass counts for a while.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::api::{VFClass, VFClassStatus};
use common::kube::status::{Report, report};
use common::kube::{is_conflict, is_gone};
use kube::ResourceExt as _;
use kube::api::Api;
use kube::runtime::reflector::ObjectRef;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::caches::{Caches, ClusterKey, readable};
use super::capacity::{Totals, capacities, totals};
use super::run::{Controller, MANAGER};

/// Changes within this time are one pass.
const DEBOUNCE: Duration = Duration::from_secs(1);
/// The least time between two passes, and with it between two writes of one object: under
/// churn a count that is some seconds old is as good as a new one.
const PAUSE: Duration = Duration::from_secs(5);
/// What could not be written is written again after this time.
const AGAIN: Duration = Duration::from_secs(10);

/// The totals of the last pass, which are told to guests until the next one.
#[derive(Default)]
pub(super) struct Counted(Mutex<Arc<Totals>>);

impl Counted {
    pub(super) fn totals(&self) -> Arc<Totals> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts, and writes nothing.
    pub(super) fn count(&self, caches: &Caches) {
        let (classes, functions) = (caches.classes(), caches.functions.state());
        let counted = capacities(&readable(&classes), &readable(&functions), &caches.labels());
        self.replace(totals(&counted));
    }

    /// Takes these; those before.
    fn replace(&self, totals: Totals) -> Arc<Totals> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *kept, Arc::new(totals))
    }
}

/// Counts and reports until it is dropped: at once, and then when something has changed.
pub(super) async fn run(
    controller: Arc<Controller>,
    mut changed: watch::Receiver<()>,
    clusters: UnboundedSender<ClusterKey>,
) {
    loop {
        changed.mark_unchanged();
        let done = pass(&controller, &clusters).await;
        if let Err(error) = &done {
            tracing::warn!(%error, "cannot report what is left of a VFClass");
        }
        let again = tokio::time::sleep(AGAIN);
        tokio::time::sleep(PAUSE).await;
        tokio::select! {
            Ok(()) = changed.changed() => tokio::time::sleep(DEBOUNCE).await,
            () = again, if done.is_err() => {}
            else => return,
        }
    }
}

/// Counts once, writes what is new of each class, and has the guests looked at that are told
/// another number. One class that fails keeps no other from its report.
async fn pass(
    controller: &Controller,
    clusters: &UnboundedSender<ClusterKey>,
) -> Result<(), kube::Error> {
    let caches = &controller.caches;
    let (classes, functions) = (caches.classes(), caches.functions.state());
    let (classes, functions) = (readable(&classes), readable(&functions));
    let counted = capacities(&classes, &functions, &caches.labels());
    let now = totals(&counted);
    let before = controller.counted.replace(now.clone());
    let other = |class: &&&VFClass| {
        let uid = class.uid().unwrap_or_default();
        before.get(&uid) != now.get(&uid)
    };
    let other: Vec<String> = classes.iter().filter(other).map(|c| c.name_any()).collect();
    let guests = caches.clusters();
    for guest in readable(&guests) {
        if guest.spec.classes.iter().any(|name| other.contains(name)) {
            // The receiver is gone only when all is stopping.
            let _ = clusters.send(ObjectRef::new(&guest.name_any()));
        }
    }
    let api: Api<VFClass> = Api::all(controller.client.clone());
    let mut done = Ok(());
    for (class, status) in &counted {
        match write(&api, class, status).await {
            Ok(()) => {}
            // Gone, or made anew: its event is on its way.
            Err(error) if is_conflict(&error) || is_gone(&error) => {}
            Err(error) => done = Err(error),
        }
    }
    done
}

async fn write(
    api: &Api<VFClass>,
    class: &VFClass,
    status: &VFClassStatus,
) -> Result<(), kube::Error> {
    let seen = class.status.as_ref().map(fields).unwrap_or_default();
    let says = Report {
        manager: MANAGER,
        fields: fields(status),
        ..Report::default()
    };
    report(api, class, &[], &seen, &says).await.map(drop)
}

fn fields(status: &VFClassStatus) -> Map<String, Value> {
    match json!(status) {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}
