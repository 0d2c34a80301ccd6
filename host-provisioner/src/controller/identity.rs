//! Whose claim a host claim is: the second wall behind the API server's RBAC
//! and admission policy. Pure.
//!
//! A guest's syncer writes `spec.guest`, so nothing in it is believed until the
//! namespace, which RBAC guards, says the same.

use common::api::{GuestCluster, GuestRef, VFClaim, host_claim_name, reason};
use kube::ResourceExt as _;

use super::refusal::Refusal;

/// A claim that is its guest's own.
pub struct Identified<'a> {
    pub guest: &'a GuestRef,
    pub cluster: &'a GuestCluster,
    /// The GuestCluster has no pinned cluster yet; this claim's is to be pinned
    /// before anything is granted.
    pub pin: bool,
}

/// The `GuestCluster` that a claim namespace belongs to: of several that name
/// it, the oldest, so that a newcomer cannot take a namespace over.
#[must_use]
pub fn namespace_owner<'a>(
    clusters: &'a [&'a GuestCluster],
    namespace: &str,
) -> Option<&'a GuestCluster> {
    clusters
        .iter()
        .filter(|c| c.spec.claim_namespace == namespace)
        .min_by_key(|c| (c.creation_timestamp(), c.name_any()))
        .copied()
}

/// Checks who the claim says it is against where it is.
pub fn identify<'a>(
    claim: &'a VFClaim,
    clusters: &'a [&'a GuestCluster],
) -> Result<Identified<'a>, Refusal> {
    let namespace = claim.namespace().unwrap_or_default();
    let mismatch = |message: String| Refusal::new(reason::GUEST_IDENTITY_MISMATCH, message);
    let Some(guest) = &claim.spec.guest else {
        return Err(mismatch(
            "spec.nodeName names a node of a guest cluster; make the claim in the guest cluster, \
             whose guest-syncer brings it here"
                .to_owned(),
        ));
    };
    let Some(cluster) = clusters.iter().find(|c| c.name_any() == guest.cluster) else {
        return Err(Refusal::new(
            reason::GUEST_CLUSTER_NOT_FOUND,
            format!(
                "the host has no GuestCluster {}; ask its administrator to make it, or set the \
                 guest-syncer's cluster name to the one that was made",
                guest.cluster
            ),
        ));
    };
    if cluster.spec.claim_namespace != namespace {
        return Err(mismatch(format!(
            "claims of GuestCluster {} belong in another namespace than {namespace}; set the \
             guest-syncer's namespace to its claimNamespace",
            guest.cluster
        )));
    }
    let owner = namespace_owner(clusters, &namespace);
    if owner.is_none_or(|owner| owner.name_any() != guest.cluster) {
        return Err(mismatch(format!(
            "namespace {namespace} is another GuestCluster's; the administrator has to give {} a \
             claimNamespace of its own",
            guest.cluster
        )));
    }
    if claim.name_any() != host_claim_name(&guest.uid) {
        return Err(mismatch(format!(
            "this object's name must be {}, from the UID of the guest's claim; it was not made by \
             the guest-syncer",
            host_claim_name(&guest.uid)
        )));
    }
    let pinned = cluster
        .status
        .as_ref()
        .and_then(|s| s.cluster_uid.as_deref());
    match pinned {
        Some(pinned) if pinned != guest.cluster_uid => Err(mismatch(format!(
            "GuestCluster {} belongs to the cluster whose kube-system namespace has another UID \
             than {}; if that cluster was rebuilt, the administrator has to make a new \
             GuestCluster",
            guest.cluster, guest.cluster_uid
        ))),
        _ => Ok(Identified {
            guest,
            cluster,
            pin: pinned.is_none(),
        }),
    }
}
