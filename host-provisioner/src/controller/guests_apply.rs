//! Makes what a `GuestCluster` needs and reports on it. What exists under such
//! a name and was not made for this guest is a conflict, never adopted.

use std::fmt::Debug;
use std::time::Duration;

use common::api::{GuestCluster, reason, type_};
use common::kube::is_conflict;
use common::kube::status::{Report, report};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, RoleBinding};
use kube::api::{Api, PostParams};
use kube::{Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::caches::readable;
use super::guests::{self, Wanted, is_made_for};
use super::refusal::Refusal;
use super::run::{Controller, MANAGER, RESYNC, ReconcileError, Version};

/// How long objects once seen to be right are trusted.
const TRUST: Duration = Duration::from_secs(600);
/// The least time between two looks at a guest, whose claims may change often, and
/// with it between two reports. Not a debounce, which would put a busy guest off for ever.
const PAUSE: Duration = Duration::from_secs(3);

/// Reconciles one guest; when to look again.
pub(super) async fn reconcile(
    controller: &Controller,
    cluster: &GuestCluster,
) -> Result<Duration, ReconcileError> {
    if cluster.metadata.deletion_timestamp.is_some() {
        return Ok(RESYNC);
    }
    let version = (
        cluster.uid().unwrap_or_default(),
        cluster.metadata.generation,
    );
    if let Some(rest) = controller
        .looked
        .elapsed(&version)
        .and_then(|e| PAUSE.checked_sub(e))
    {
        return Ok(rest);
    }
    controller.looked.now(version.clone());
    let caches = &controller.caches;
    let clusters = caches.clusters();
    let outcome = match guests::validate(cluster, &readable(&clusters)) {
        Ok(()) => ensure(controller, cluster, version).await?,
        Err(refusal) => Err(refusal),
    };
    let classes = caches.classes();
    let claims = match outcome {
        Ok(()) => caches.claims_in(&cluster.spec.claim_namespace),
        Err(_) => Vec::new(),
    };
    let says = Report {
        manager: MANAGER,
        owned: &[type_::READY],
        conditions: vec![guests::condition(&outcome)],
        observed_generation: cluster.metadata.generation,
        fields: guests::fields(
            cluster,
            &readable(&classes),
            &readable(&claims),
            &controller.counted.totals(),
        ),
    };
    let before = cluster.status.clone().unwrap_or_default().conditions;
    let api: Api<GuestCluster> = Api::all(controller.client.clone());
    let written = report(&api, cluster, &before, &guests::seen_fields(cluster), &says).await?;
    if let (Some(_), Err(refusal)) = (&written, &outcome) {
        let on = cluster.object_ref(&());
        let (reason, message) = (refusal.reason, &refusal.message);
        controller
            .events
            .warning(&on, "Prepare", reason, message)
            .await;
    }
    // What stands in the way, a namespace say, is not watched.
    Ok(if outcome.is_ok() {
        RESYNC
    } else {
        controller.settings.retry_max
    })
}

/// Makes namespace and rights, unless that was seen done a short time ago.
async fn ensure(
    controller: &Controller,
    cluster: &GuestCluster,
    version: Version,
) -> Result<Result<(), Refusal>, ReconcileError> {
    let since = controller.ensured.elapsed(&version);
    if since.is_some_and(|elapsed| elapsed < TRUST) {
        return Ok(Ok(()));
    }
    let made = make(
        &controller.client,
        &cluster.name_any(),
        guests::wanted(cluster, &controller.settings.guest_cluster_role),
    )
    .await?;
    if made.is_ok() {
        controller.ensured.now(version);
    }
    Ok(made)
}

async fn make(
    client: &Client,
    guest: &str,
    wanted: Wanted,
) -> Result<Result<(), Refusal>, kube::Error> {
    let namespace = wanted.namespace.name_any();
    let namespaces = Api::all(client.clone());
    if let Err(refusal) = exists(&namespaces, guest, &wanted.namespace).await? {
        return Ok(Err(refusal));
    }
    let roles: Api<ClusterRole> = Api::all(client.clone());
    let same_rules = |a: &ClusterRole, b: &ClusterRole| a.rules == b.rules;
    if let Err(refusal) = settle(&roles, guest, wanted.cluster_role, same_rules).await? {
        return Ok(Err(refusal));
    }
    let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
    let same = |a: &ClusterRoleBinding, b: &ClusterRoleBinding| a.subjects == b.subjects;
    if let Err(refusal) = settle(&bindings, guest, wanted.cluster_role_binding, same).await? {
        return Ok(Err(refusal));
    }
    let bindings: Api<RoleBinding> = namespaced(client, &namespace);
    let same =
        |a: &RoleBinding, b: &RoleBinding| a.subjects == b.subjects && a.role_ref == b.role_ref;
    settle(&bindings, guest, wanted.role_binding, same).await
}

fn namespaced<K>(client: &Client, namespace: &str) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), namespace)
}

/// Reads the object or makes it; a conflict when it is there and not ours.
async fn exists<K>(api: &Api<K>, guest: &str, wanted: &K) -> Result<Result<K, Refusal>, kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
{
    let name = wanted.name_any();
    let found = match api.get_opt(&name).await? {
        Some(found) => found,
        None => match api.create(&PostParams::default(), wanted).await {
            Ok(made) => made,
            // Made between the two requests: by us or not, the labels say.
            Err(error) if is_conflict(&error) => api.get(&name).await?,
            Err(error) => return Err(error),
        },
    };
    if is_made_for(found.labels(), guest) {
        return Ok(Ok(found));
    }
    Ok(Err(Refusal::new(
        reason::CONFLICT,
        format!(
            "{} {name} exists and was not made for this GuestCluster; use another name, or label \
             it {}={guest} to hand it over",
            K::kind(&()),
            guests::GUEST_LABEL,
        ),
    )))
}

/// Makes the object, or corrects ours when it differs.
async fn settle<K>(
    api: &Api<K>,
    guest: &str,
    wanted: K,
    same: impl Fn(&K, &K) -> bool,
) -> Result<Result<(), Refusal>, kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
{
    let found = match exists(api, guest, &wanted).await? {
        Ok(found) => found,
        Err(refusal) => return Ok(Err(refusal)),
    };
    if !same(&found, &wanted) {
        let mut corrected = wanted;
        corrected.meta_mut().resource_version = found.resource_version();
        corrected.meta_mut().uid = found.uid();
        let name = corrected.name_any();
        api.replace(&name, &PostParams::default(), &corrected)
            .await?;
    }
    Ok(Ok(()))
}
