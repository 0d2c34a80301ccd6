//! What the controller knows of the cluster: one watch a kind, and who has to
//! be looked at again when something changes. Reads only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::api::{GuestCluster, PhysicalFunction, VFClaim, VFClass};
use common::telemetry::Check;
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DynamicObject};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch as latest;
use tokio::task::JoinSet;

use super::capacity::Nodes;
use super::vmi::{self, Vmi};
use super::withhold;

/// An object as the watch has it; one that cannot be read does not end the watch.
pub(super) type Guarded<K> = DeserializeGuard<K>;
pub(super) type ClaimKey = ObjectRef<Guarded<VFClaim>>;
pub(super) type ClusterKey = ObjectRef<Guarded<GuestCluster>>;
pub(super) type FunctionKey = ObjectRef<Guarded<PhysicalFunction>>;

/// The caches, each fed by its watch.
#[derive(Clone)]
pub(super) struct Caches {
    pub(super) claims: Store<Guarded<VFClaim>>,
    pub(super) clusters: Store<Guarded<GuestCluster>>,
    classes: Store<Guarded<VFClass>>,
    pub(super) functions: Store<Guarded<PhysicalFunction>>,
    vmis: Store<DynamicObject>,
    nodes: Store<PartialObjectMeta<Node>>,
    /// Every cache has been filled once.
    filled: Arc<AtomicBool>,
}

/// Where changes go: each key is an object to look at again.
#[derive(Clone)]
pub(super) struct Triggers {
    pub(super) claims: UnboundedSender<ClaimKey>,
    pub(super) clusters: UnboundedSender<ClusterKey>,
    pub(super) functions: UnboundedSender<FunctionKey>,
    /// What is left of the classes may have changed.
    pub(super) capacity: latest::Sender<()>,
}

/// The objects of a cache that could be read.
pub(super) fn readable<K>(cached: &[Arc<Guarded<K>>]) -> Vec<&K> {
    cached
        .iter()
        .filter_map(|object| object.0.as_ref().ok())
        .collect()
}

impl Caches {
    /// Starts the watches in `tasks`.
    pub(super) fn start(client: &Client, triggers: &Triggers, tasks: &mut JoinSet<()>) -> Self {
        let (claims, claim_writer) = reflector::store();
        let (clusters, cluster_writer) = reflector::store();
        let (classes, class_writer) = reflector::store();
        let (functions, function_writer) = reflector::store();
        let kind = vmi::api_resource();
        let vmi_writer = reflector::store::Writer::new(kind.clone());
        let (nodes, node_writer) = reflector::store();
        let caches = Self {
            claims,
            clusters,
            classes,
            functions,
            vmis: vmi_writer.as_reader(),
            nodes,
            filled: Arc::default(),
        };
        let (known, to) = (caches.clone(), triggers.clone());
        let on_claim = move |claim: Guarded<VFClaim>| known.claim_changed(&claim, &to);
        tasks.spawn(feed("vfclaims", watch(client), claim_writer, on_claim));
        let (known, to) = (caches.clone(), triggers.clone());
        let on_cluster = move |cluster: Guarded<GuestCluster>| known.cluster_changed(&cluster, &to);
        tasks.spawn(feed(
            "guestclusters",
            watch(client),
            cluster_writer,
            on_cluster,
        ));
        let (known, to) = (caches.clone(), triggers.clone());
        let on_class = move |_: Guarded<VFClass>| known.class_changed(&to);
        tasks.spawn(feed("vfclasses", watch(client), class_writer, on_class));
        let (known, to) = (caches.clone(), triggers.clone());
        let on_function =
            move |function: Guarded<PhysicalFunction>| known.function_changed(&function, &to);
        tasks.spawn(feed(
            "physicalfunctions",
            watch(client),
            function_writer,
            on_function,
        ));
        let (known, to) = (caches.clone(), triggers.clone());
        let on_vmi = move |vmi: DynamicObject| known.vmi_changed(&vmi, &to);
        let api = Api::all_with(client.clone(), &kind);
        let vmis = watcher::watcher(api, watcher::Config::default()).modify(vmi::strip);
        tasks.spawn(feed("virtualmachineinstances", vmis, vmi_writer, on_vmi));
        let to = triggers.capacity.clone();
        let on_node = move |_| {
            to.send_replace(());
        };
        let api: Api<PartialObjectMeta<Node>> = Api::all(client.clone());
        let nodes = watcher::watcher(api, watcher::Config::default()).modify(|node| {
            node.metadata.managed_fields = None;
            node.metadata.annotations = None;
        });
        tasks.spawn(feed("nodes", nodes, node_writer, on_node));
        caches
    }

    /// Waits until every kind has been read in full.
    pub(super) async fn fill(&self, check: &Check) -> Result<(), reflector::store::WriterDropped> {
        check.fail("reading VFClaims");
        self.claims.wait_until_ready().await?;
        check.fail("reading GuestClusters");
        self.clusters.wait_until_ready().await?;
        check.fail("reading VFClasses");
        self.classes.wait_until_ready().await?;
        check.fail("reading PhysicalFunctions");
        self.functions.wait_until_ready().await?;
        check.fail("reading VirtualMachineInstances");
        self.vmis.wait_until_ready().await?;
        check.fail("reading Nodes");
        self.nodes.wait_until_ready().await?;
        self.filled.store(true, Ordering::Release);
        check.pass();
        Ok(())
    }

    pub(super) fn clusters(&self) -> Vec<Arc<Guarded<GuestCluster>>> {
        self.clusters.state()
    }

    pub(super) fn classes(&self) -> Vec<Arc<Guarded<VFClass>>> {
        self.classes.state()
    }

    /// The host's nodes with their labels.
    pub(super) fn labels(&self) -> Nodes {
        let all = self.nodes.state();
        let labelled = all
            .iter()
            .map(|node| (node.name_any(), node.labels().clone()));
        labelled.collect()
    }

    pub(super) fn function(&self, name: &str) -> Option<Arc<Guarded<PhysicalFunction>>> {
        self.functions.get(&ObjectRef::new(name))
    }

    pub(super) fn claims_in(&self, namespace: &str) -> Vec<Arc<Guarded<VFClaim>>> {
        self.claims
            .state_filter(|c| c.meta().namespace.as_deref() == Some(namespace))
    }

    pub(super) fn vmis_with_uuid(&self, uuid: &str) -> Vec<Vmi> {
        let same = |vmi: &DynamicObject| {
            vmi::firmware_uuid(vmi).is_some_and(|u| u.eq_ignore_ascii_case(uuid))
        };
        self.vmis
            .state_filter(same)
            .iter()
            .map(|vmi| Vmi::read(vmi))
            .collect()
    }

    fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    fn send_claims(&self, to: &Triggers, which: impl Fn(&Guarded<VFClaim>) -> bool) {
        // Until the caches are filled every claim is on its way anyway.
        if self.is_filled() {
            for claim in self.claims.state_filter(which) {
                // The receiver is gone only when all is stopping.
                let _ = to.claims.send(ObjectRef::from_obj(&*claim));
            }
        }
    }

    fn claim_changed(&self, claim: &Guarded<VFClaim>, to: &Triggers) {
        let _ = to.claims.send(ObjectRef::from_obj(claim));
        if !self.is_filled() {
            return;
        }
        let namespace = claim.namespace();
        if claim.meta().deletion_timestamp.is_some() {
            // Its place in the quota may be what another one waits for.
            self.send_claims(to, |other| {
                other.namespace() == namespace && other.0.as_ref().is_ok_and(|c| !is_granted(c))
            });
        }
        let whose = |c: &Guarded<GuestCluster>| {
            c.0.as_ref()
                .is_ok_and(|c| Some(&c.spec.claim_namespace) == namespace.as_ref())
        };
        for cluster in self.clusters.state_filter(whose) {
            let _ = to.clusters.send(ObjectRef::from_obj(&*cluster));
        }
    }

    fn cluster_changed(&self, cluster: &Guarded<GuestCluster>, to: &Triggers) {
        let _ = to.clusters.send(ObjectRef::from_obj(cluster));
        let name = cluster.name_any();
        // Claims that it decides about, and those it may stand in the way of.
        self.send_claims(to, |claim| {
            claim.0.as_ref().is_ok_and(|c| {
                let named = c.spec.guest.as_ref().is_some_and(|g| g.cluster == name);
                named || !is_granted(c)
            })
        });
    }

    /// Only claims without a grant wait for a class; guests show all of them.
    fn class_changed(&self, to: &Triggers) {
        to.capacity.send_replace(());
        self.send_claims(to, |claim| claim.0.as_ref().is_ok_and(|c| !is_granted(c)));
        if self.is_filled() {
            for cluster in self.clusters.state() {
                let _ = to.clusters.send(ObjectRef::from_obj(&*cluster));
            }
        }
    }

    /// Itself, and claims on their way out whose VF it does not withhold yet, or no more.
    fn function_changed(&self, function: &Guarded<PhysicalFunction>, to: &Triggers) {
        let _ = to.functions.send(ObjectRef::from_obj(function));
        to.capacity.send_replace(());
        let name = function.name_any();
        self.send_claims(to, |claim| {
            let due = claim.0.as_ref().ok().and_then(withhold::due);
            due.is_some_and(|due| due.physical_function == name)
        });
    }

    fn vmi_changed(&self, vmi: &DynamicObject, to: &Triggers) {
        let uuid = vmi::firmware_uuid(vmi).unwrap_or_default();
        let uid = vmi.uid();
        self.send_claims(to, |claim| {
            claim.0.as_ref().is_ok_and(|c| {
                let guest = c.spec.guest.as_ref();
                let vm = c.status.as_ref().and_then(|s| s.vm.as_ref());
                guest.is_some_and(|g| g.system_uuid.eq_ignore_ascii_case(uuid))
                    || vm.is_some_and(|vm| Some(&vm.uid) == uid.as_ref())
            })
        });
    }
}

fn is_granted(claim: &VFClaim) -> bool {
    claim.status.as_ref().is_some_and(|s| s.admitted.is_some())
}

/// What happens to all objects of a kind.
pub(super) fn watch<K>(
    client: &Client,
) -> impl Stream<Item = watcher::Result<watcher::Event<Guarded<K>>>> + use<K>
where
    K: Resource<DynamicType = ()>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug
        + Send
        + Sync
        + 'static,
{
    let api: Api<Guarded<K>> = Api::all(client.clone());
    watcher::watcher(api, watcher::Config::default()).modify(|object: &mut Guarded<K>| {
        object.managed_fields_mut().clear();
    })
}

/// Feeds a cache from its watch, for ever: errors are logged and the watch goes
/// on with back-off, as kube's does by itself.
pub(super) async fn feed<K>(
    what: &'static str,
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send,
    writer: reflector::store::Writer<K>,
    changed: impl Fn(K) + Send,
) where
    K: Resource + Clone + Send + Sync + 'static,
    K::DynamicType: std::hash::Hash + Eq + Clone,
{
    let fed = reflector::reflector(writer, events).default_backoff();
    let mut touched = std::pin::pin!(fed.touched_objects());
    while let Some(next) = touched.next().await {
        match next {
            Ok(object) => changed(object),
            Err(error) => tracing::warn!(%error, kind = what, "watching"),
        }
    }
}
