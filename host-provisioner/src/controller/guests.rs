//! What a `GuestCluster` needs on the host: its namespace, its rights, and a
//! report. Pure; `guests_apply` writes it.

use std::collections::BTreeMap;

use common::api::{
    ClassSummary, ConditionStatus, GROUP, GUEST_USER_PREFIX, GuestCluster, NewCondition, VFClaim,
    VFClass, reason, type_,
};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::rbac::v1::{
    ClusterRole, ClusterRoleBinding, PolicyRule, RoleBinding, RoleRef, Subject,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource as _, ResourceExt as _};
use serde_json::{Map, Value, json};

use super::admit::{default_class, usable};
use super::capacity::Totals;
use super::identity::namespace_owner;
use super::refusal::Refusal;
use super::resolve::selector;

/// Label on what is made here: the name of the `GuestCluster` it is for.
pub const GUEST_LABEL: &str = "sriov.harvesterhci.io/guest-cluster";
/// Name of the RoleBinding in a claim namespace.
pub const ROLE_BINDING: &str = "sriov-guest";

/// The objects that a guest needs.
pub struct Wanted {
    pub namespace: Namespace,
    pub role_binding: RoleBinding,
    pub cluster_role: ClusterRole,
    pub cluster_role_binding: ClusterRoleBinding,
}

/// True when the object was made for this guest.
#[must_use]
pub fn is_made_for(labels: &BTreeMap<String, String>, guest: &str) -> bool {
    labels.get(GUEST_LABEL).is_some_and(|name| name == guest)
}

/// What is wrong with the object itself, in words for its administrator.
pub fn validate(cluster: &GuestCluster, clusters: &[&GuestCluster]) -> Result<(), Refusal> {
    let owner = namespace_owner(clusters, &cluster.spec.claim_namespace);
    if let Some(owner) = owner.filter(|owner| owner.uid() != cluster.uid()) {
        return Err(Refusal::new(
            "ClaimNamespaceTaken",
            format!(
                "claimNamespace {} is GuestCluster {}'s already; delete this one and make it with \
                 a namespace of its own",
                cluster.spec.claim_namespace,
                owner.name_any()
            ),
        ));
    }
    selector(&cluster.spec.vm_selector)
        .map(drop)
        .map_err(|why| {
            Refusal::new(
                "InvalidSelector",
                format!("vmSelector selects nothing: {why}"),
            )
        })
}

/// The namespace and rights of a guest. `claim_role` is the ClusterRole that
/// says what a guest may do in its own claim namespace.
#[must_use]
pub fn wanted(cluster: &GuestCluster, claim_role: &str) -> Wanted {
    let name = cluster.name_any();
    let own_role = format!("{GUEST_USER_PREFIX}{name}");
    let meta = |object: &str, namespace: Option<&str>, owned: bool| ObjectMeta {
        name: Some(object.to_owned()),
        namespace: namespace.map(str::to_owned),
        labels: Some(BTreeMap::from([(GUEST_LABEL.to_owned(), name.clone())])),
        // The namespace is not owned: with it would go the claims.
        owner_references: owned
            .then(|| cluster.controller_owner_ref(&()))
            .flatten()
            .map(|reference| vec![reference]),
        ..ObjectMeta::default()
    };
    let subject = || {
        Some(vec![Subject {
            api_group: Some("rbac.authorization.k8s.io".to_owned()),
            kind: "User".to_owned(),
            name: own_role.clone(),
            namespace: None,
        }])
    };
    let role_ref = |role: &str| RoleRef {
        api_group: "rbac.authorization.k8s.io".to_owned(),
        kind: "ClusterRole".to_owned(),
        name: role.to_owned(),
    };
    let namespace = cluster.spec.claim_namespace.as_str();
    Wanted {
        namespace: Namespace {
            metadata: meta(namespace, None, false),
            ..Namespace::default()
        },
        role_binding: RoleBinding {
            metadata: meta(ROLE_BINDING, Some(namespace), true),
            role_ref: role_ref(claim_role),
            subjects: subject(),
        },
        cluster_role: ClusterRole {
            metadata: meta(&own_role, None, true),
            aggregation_rule: None,
            rules: Some(vec![PolicyRule {
                api_groups: Some(vec![GROUP.to_owned()]),
                resources: Some(vec!["guestclusters".to_owned()]),
                resource_names: Some(vec![name.clone()]),
                verbs: ["get", "list", "watch"].map(str::to_owned).to_vec(),
                non_resource_urls: None,
            }]),
        },
        cluster_role_binding: ClusterRoleBinding {
            metadata: meta(&own_role, None, true),
            role_ref: role_ref(&own_role),
            subjects: subject(),
        },
    }
}

/// The fields of status that this controller reports. `free` has what is left of each class.
#[must_use]
pub fn fields(
    cluster: &GuestCluster,
    classes: &[&VFClass],
    claims: &[&VFClaim],
    free: &Totals,
) -> Map<String, Value> {
    let usable = usable(cluster, classes);
    let default = default_class(&usable).and_then(|c| c.uid());
    let summaries: Vec<ClassSummary> = usable
        .iter()
        .map(|class| ClassSummary {
            name: class.name_any(),
            uid: class.uid().unwrap_or_default(),
            description: class.spec.description.clone(),
            network: class.spec.network.clone(),
            storage: class.spec.storage.clone(),
            allowed_overrides: class.spec.allowed_overrides.clone(),
            reclaim_policy: class.spec.reclaim_policy,
            placement: class.spec.placement,
            free: class.uid().and_then(|uid| free.get(&uid).copied()),
            default: class.uid() == default,
        })
        .collect();
    let admitted = claims
        .iter()
        .filter(|c| c.status.as_ref().is_some_and(|s| s.admitted.is_some()))
        .count();
    let mut fields = Map::new();
    fields.insert("claims".to_owned(), json!(admitted));
    if !summaries.is_empty() {
        fields.insert("classes".to_owned(), json!(summaries));
    }
    if let Some(time) = last_seen(cluster, claims) {
        fields.insert("lastSeenTime".to_owned(), json!(time));
    }
    fields
}

/// The same fields as the object has them, to see whether a report is new.
#[must_use]
pub fn seen_fields(cluster: &GuestCluster) -> Map<String, Value> {
    let mut fields = Map::new();
    let Some(status) = &cluster.status else {
        return fields;
    };
    fields.insert("claims".to_owned(), json!(status.claims));
    if !status.classes.is_empty() {
        fields.insert("classes".to_owned(), json!(status.classes));
    }
    if let Some(time) = &status.last_seen_time {
        fields.insert("lastSeenTime".to_owned(), json!(time));
    }
    fields
}

/// The latest making or deleting of a claim; never earlier than it was.
fn last_seen(cluster: &GuestCluster, claims: &[&VFClaim]) -> Option<Time> {
    let times = claims.iter().flat_map(|claim| {
        let meta = &claim.metadata;
        [
            meta.creation_timestamp.clone(),
            meta.deletion_timestamp.clone(),
        ]
    });
    let before = cluster
        .status
        .as_ref()
        .and_then(|s| s.last_seen_time.clone());
    times.chain([before]).flatten().max()
}

/// The condition of the GuestCluster.
#[must_use]
pub fn condition(outcome: &Result<(), Refusal>) -> NewCondition {
    match outcome {
        Ok(()) => NewCondition::new(
            type_::READY,
            ConditionStatus::True,
            reason::READY,
            "the guest has its namespace and its rights",
        ),
        Err(refusal) => NewCondition::new(
            type_::READY,
            ConditionStatus::False,
            refusal.reason,
            refusal.message.as_str(),
        ),
    }
}
