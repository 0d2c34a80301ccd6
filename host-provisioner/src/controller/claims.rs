//! Carries out the plan of one claim: at most one finalizer write, one
//! compare-and-swap decision and one report, each only when something changes. Of one that goes,
//! what its VF's `PhysicalFunction` is to withhold, or the finalizer.

use std::sync::Arc;
use std::time::Duration;

use common::api::{GuestCluster, HOST_FINALIZER, PhysicalFunction, VFClaim, condition, type_};
use common::kube::status::{Report, decide, report};
use common::kube::{ErrorClass, class_of, finalizer, is_conflict};
use kube::api::Api;
use kube::core::{DeserializeGuard, DynamicObject};
use kube::{Client, Resource as _, ResourceExt as _};
use serde_json::{Map, json};

use super::caches::{Guarded, readable};
use super::plan::{Known, Plan, plan};
use super::quota::Ledger;
use super::refusal::Refusal;
use super::run::{Controller, MANAGER, RESYNC, ReconcileError};
use super::vmi::{self, Vmi};
use super::withhold_apply;

/// Reconciles one claim; when to look again.
pub(super) async fn reconcile(
    controller: &Controller,
    claim: &VFClaim,
) -> Result<Duration, ReconcileError> {
    let api: Api<VFClaim> = namespaced(&controller.client, claim);
    let mut clusters = controller.caches.clusters();
    let pf = pf_in_question(controller, claim).await?;
    let vmis = vmis(controller, claim).await?;
    let mut due = decide_with(controller, claim, &clusters, &vmis, pf.as_ref());
    if let Some((cluster, uid)) = due.pin.take() {
        let pinned = pin(controller, &cluster, &uid).await?;
        clusters.retain(|c| c.name_any() != cluster);
        clusters.push(Arc::new(DeserializeGuard(Ok(pinned))));
        due = decide_with(controller, claim, &clusters, &vmis, pf.as_ref());
    }
    let done = carry_out(controller, &api, claim, &due).await;
    if let Err(error) = &done {
        // An error of unknown outcome keeps its place in the quota: the write
        // may have been done.
        if class_of(error) != ErrorClass::Retry {
            controller.ledger.forget(claim);
        }
    }
    done?;
    Ok(RESYNC)
}

/// The PF of a claim that has a device and a spec that is not decided yet. Asked for, though it
/// is watched: a grant is not taken back for what a cache had not heard yet.
async fn pf_in_question(
    controller: &Controller,
    claim: &VFClaim,
) -> Result<Option<PhysicalFunction>, ReconcileError> {
    let Some(status) = &claim.status else {
        return Ok(None);
    };
    let (Some(granted), Some(device)) = (&status.admitted, &status.device) else {
        return Ok(None);
    };
    if Some(granted.observed_generation) == claim.metadata.generation {
        return Ok(None);
    }
    let api: Api<PhysicalFunction> = Api::all(controller.client.clone());
    Ok(api.get_opt(&device.physical_function).await?)
}

/// The VMs with the claim's UUID. The one that the claim is bound to is asked for where the cache
/// has it not: another controller may have bound it by what this one has not heard yet, and a
/// binding is not taken away because a watch is behind.
async fn vmis(controller: &Controller, claim: &VFClaim) -> Result<Vec<Vmi>, ReconcileError> {
    let Some(guest) = &claim.spec.guest else {
        return Ok(Vec::new());
    };
    let mut known = controller.caches.vmis_with_uuid(&guest.system_uuid);
    let bound = claim.status.as_ref().filter(|s| s.host_node.is_some());
    let Some(vm) = bound.and_then(|s| s.vm.as_ref()) else {
        return Ok(known);
    };
    if known.iter().all(|vmi| vmi.uid != vm.uid) {
        let client = controller.client.clone();
        let api: Api<DynamicObject> =
            Api::namespaced_with(client, &vm.namespace, &vmi::api_resource());
        let found = api.get_opt(&vm.name).await?.map(|vmi| Vmi::read(&vmi));
        known.extend(found.filter(|found| known.iter().all(|vmi| vmi.uid != found.uid)));
    }
    Ok(known)
}

/// Plans under the ledger's lock, so that two claims cannot both take the last
/// place of a quota.
fn decide_with(
    controller: &Controller,
    claim: &VFClaim,
    clusters: &[Arc<Guarded<GuestCluster>>],
    vmis: &[Vmi],
    pf: Option<&PhysicalFunction>,
) -> Plan {
    let caches = &controller.caches;
    let classes = caches.classes();
    let (classes, clusters) = (readable(&classes), readable(clusters));
    let counted = has_quota(claim, &clusters).then(|| {
        let namespace = claim.namespace().unwrap_or_default();
        caches.claims_in(&namespace)
    });
    controller.ledger.with(|reserved| {
        let admitted_others = counted
            .as_ref()
            .map_or(0, |all| Ledger::others(reserved, claim, &readable(all)));
        let known = Known {
            clusters: &clusters,
            classes: &classes,
            vmis,
            admitted_others,
            pf,
        };
        let due = plan(claim, &known);
        if due.decision.is_some() && counted.is_some() {
            Ledger::reserve(reserved, claim);
        }
        due
    })
}

/// Only the first grant counts against a quota.
fn has_quota(claim: &VFClaim, clusters: &[&GuestCluster]) -> bool {
    let granted = claim.status.as_ref().is_some_and(|s| s.admitted.is_some());
    let guest = claim.spec.guest.as_ref().map(|g| g.cluster.as_str());
    !granted
        && clusters
            .iter()
            .any(|c| Some(c.name_any().as_str()) == guest && c.spec.quota.claims.is_some())
}

/// Pins the guest's cluster UID before anything is granted to it. Whoever was
/// quicker decides; the plan made with what is returned says the rest.
async fn pin(
    controller: &Controller,
    name: &str,
    uid: &str,
) -> Result<GuestCluster, ReconcileError> {
    let api: Api<GuestCluster> = Api::all(controller.client.clone());
    loop {
        let cluster = api.get(name).await?;
        if cluster
            .status
            .as_ref()
            .is_some_and(|s| s.cluster_uid.is_some())
        {
            return Ok(cluster);
        }
        match decide(&api, &cluster, MANAGER, &json!({"clusterUID": uid})).await {
            Ok(pinned) => return Ok(pinned),
            Err(error) if is_conflict(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn carry_out(
    controller: &Controller,
    api: &Api<VFClaim>,
    claim: &VFClaim,
    due: &Plan,
) -> Result<(), kube::Error> {
    if due.release {
        finalizer::remove(api, claim, HOST_FINALIZER).await?;
        controller.ledger.forget(claim);
        return Ok(());
    }
    if let Some(due) = &due.withhold {
        return withhold_apply::enter(controller, api, claim, due).await;
    }
    let mut latest = claim.clone();
    if due.finalizer
        && let Some(written) = finalizer::add(api, &latest, HOST_FINALIZER).await?
    {
        latest = written;
    }
    if let Some(fields) = &due.decision {
        latest = decide(api, &latest, MANAGER, fields).await?;
    }
    let Some(conditions) = &due.conditions else {
        return Ok(());
    };
    let says = Report {
        manager: MANAGER,
        owned: &[type_::ADMITTED, type_::RESOLVED],
        conditions: conditions.clone(),
        observed_generation: claim.metadata.generation,
        fields: Map::new(),
    };
    let before = latest.status.clone().unwrap_or_default().conditions;
    let written = report(api, &latest, &before, &Map::new(), &says).await?;
    if let (Some(_), Some(refusal)) = (written, &due.refusal)
        && is_new(claim, refusal)
    {
        let on = claim.object_ref(&());
        let (reason, message) = (refusal.reason, &refusal.message);
        controller
            .events
            .warning(&on, "Admit", reason, message)
            .await;
        controller.metrics.refused(refusal.reason);
    }
    Ok(())
}

/// True when no condition of the claim says it yet.
fn is_new(claim: &VFClaim, refusal: &Refusal) -> bool {
    let conditions = claim.status.clone().unwrap_or_default().conditions;
    ![type_::ADMITTED, type_::RESOLVED]
        .iter()
        .any(|type_| condition(&conditions, type_).is_some_and(|c| c.reason == refusal.reason))
}

fn namespaced(client: &Client, claim: &VFClaim) -> Api<VFClaim> {
    Api::namespaced(client.clone(), &claim.namespace().unwrap_or_default())
}
