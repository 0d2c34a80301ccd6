//! The way up, decided: from a guest's claim to its copy on the host.
//!
//! Pure: plain values in, an action out. `executor` carries it out.

use common::api::{
    GUEST_GENERATION_ANNOTATION, GuestRef, NetworkRequest, VFClaim, VFClaimSpec, host_claim_name,
    reason,
};
use kube::ResourceExt as _;

use super::NodeView;
use crate::node_identity::{NodeIdentity, NodeProblem};

/// Which guest cluster this is, in the host's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestId {
    /// Name of the `GuestCluster` object.
    pub cluster: String,
    /// UID of this cluster's kube-system namespace.
    pub cluster_uid: String,
    /// The host namespace of this guest's claims.
    pub claim_namespace: String,
}

/// What of a host copy a later edit of the guest's claim may change.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    pub network: Option<NetworkRequest>,
    pub vm_ip: Option<String>,
    /// `metadata.generation` of the guest's claim.
    pub guest_generation: i64,
}

/// What is to be done on the host for a claim that is not being deleted.
#[derive(Clone, Debug, PartialEq)]
pub enum Up {
    /// There is no copy: make this one.
    Create(Box<VFClaim>),
    /// The copy is ours and behind.
    Update(Edit),
    /// The copy is ours and says what it should.
    Keep,
    /// The copy is on its way out while the guest's claim lives; it is made
    /// again once it is gone.
    AwaitGone,
    /// Nothing may be done; the sentence is for the tenant.
    Refuse {
        reason: &'static str,
        message: String,
    },
}

/// What is to be done on the host for a claim that is being deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Release {
    /// The host has no copy of ours: the claim may go.
    LetGo,
    /// The name is somebody else's, in words: the claim may go and that object stays.
    LeaveForeign(String),
    /// The copy is on its way out; its VF is not back yet.
    AwaitGone,
    /// Delete the copy, if it is still this object.
    Delete,
}

/// Decides what to do on the host for `claim`, which is being deleted, given what the host
/// itself has just answered about its copy: an absence from anywhere else proves nothing.
#[must_use]
pub fn release(claim: &VFClaim, guest: &GuestId, found: Option<&VFClaim>) -> Release {
    let Some(copy) = found else {
        return Release::LetGo;
    };
    match owned(claim, guest, copy) {
        Err(foreign) => Release::LeaveForeign(foreign),
        Ok(()) if copy.metadata.deletion_timestamp.is_some() => Release::AwaitGone,
        Ok(()) => Release::Delete,
    }
}

/// Decides what to do on the host for `claim`, of which the host has `copy`.
///
/// A node that cannot be identified refuses a new copy. It does not disturb an
/// existing one: a Node that is gone for a moment (kubelet registering anew) is
/// no reason to touch a VF in use.
#[must_use]
pub fn plan(claim: &VFClaim, node: &NodeView, guest: &GuestId, copy: Option<&VFClaim>) -> Up {
    let Some(copy) = copy else {
        return match node {
            Ok(node) => Up::Create(Box::new(desired_copy(claim, node, guest))),
            Err(problem) => refuse(problem.reason(), problem.to_string()),
        };
    };
    if let Err(message) = owned(claim, guest, copy) {
        return refuse(reason::CONFLICT, message);
    }
    if copy.metadata.deletion_timestamp.is_some() {
        return Up::AwaitGone;
    }
    if let Some(message) = identity_changed(node, copy) {
        return refuse(reason::GUEST_IDENTITY_MISMATCH, message);
    }
    let edit = Edit {
        network: claim.spec.network.clone(),
        vm_ip: match node {
            Ok(node) => node.internal_ip.clone(),
            Err(_) => copy.spec.vm_ip.clone(),
        },
        guest_generation: generation(claim),
    };
    let same = edit.network == copy.spec.network
        && edit.vm_ip == copy.spec.vm_ip
        && Some(edit.guest_generation) == mirrored_generation(copy);
    if same { Up::Keep } else { Up::Update(edit) }
}

fn refuse(reason: &'static str, message: String) -> Up {
    Up::Refuse { reason, message }
}

/// The copy as it is first written. Its name comes from the claim's UID alone,
/// so that a retry meets what an earlier try made.
#[must_use]
pub fn desired_copy(claim: &VFClaim, node: &NodeIdentity, guest: &GuestId) -> VFClaim {
    let uid = claim.uid().unwrap_or_default();
    let mut copy = VFClaim::new(
        &host_claim_name(&uid),
        VFClaimSpec {
            class_name: claim.spec.class_name.clone(),
            node_name: None,
            guest: Some(GuestRef {
                cluster: guest.cluster.clone(),
                cluster_uid: guest.cluster_uid.clone(),
                namespace: claim.namespace().unwrap_or_default(),
                name: claim.name_any(),
                uid,
                node_name: node.name.clone(),
                system_uuid: node.system_uuid.clone(),
                provider_id: node.provider_id.clone(),
            }),
            vm_ip: node.internal_ip.clone(),
            network: claim.spec.network.clone(),
            storage: claim.spec.storage.clone(),
        },
    );
    copy.metadata.namespace = Some(guest.claim_namespace.clone());
    copy.metadata.annotations = Some(
        [(
            GUEST_GENERATION_ANNOTATION.to_owned(),
            generation(claim).to_string(),
        )]
        .into(),
    );
    copy
}

/// Whether the host object of our copy's name is the one we made for this
/// claim. What we did not make is reported, never adopted and never deleted.
pub fn owned(claim: &VFClaim, guest: &GuestId, copy: &VFClaim) -> Result<(), String> {
    let expected = (
        guest.cluster.as_str(),
        guest.cluster_uid.as_str(),
        claim.namespace().unwrap_or_default(),
        claim.name_any(),
        claim.uid().unwrap_or_default(),
    );
    let ours = copy.spec.guest.as_ref().is_some_and(|g| {
        expected
            == (
                g.cluster.as_str(),
                g.cluster_uid.as_str(),
                g.namespace.clone(),
                g.name.clone(),
                g.uid.clone(),
            )
    });
    if ours {
        return Ok(());
    }
    Err(format!(
        "the host has a VFClaim {}/{} that was not made for this claim; it is left alone. Ask the \
         host's administrator to look at it; if it is removed, this claim goes on by itself",
        guest.claim_namespace,
        copy.name_any()
    ))
}

/// A node of the same name on another machine: the copy stays with the VM it
/// was made for.
fn identity_changed(node: &NodeView, copy: &VFClaim) -> Option<String> {
    let node = node.as_ref().ok()?;
    let pinned = &copy.spec.guest.as_ref()?.system_uuid;
    (node.system_uuid != *pinned).then(|| {
        format!(
            "node {:?} is now the machine {}, but this claim was made for the machine {pinned}; a \
             claim does not move between machines: delete it and make another",
            node.name, node.system_uuid
        )
    })
}

/// `metadata.generation` of the guest's claim that the copy carries.
#[must_use]
pub fn mirrored_generation(copy: &VFClaim) -> Option<i64> {
    copy.annotations()
        .get(GUEST_GENERATION_ANNOTATION)?
        .parse()
        .ok()
}

/// `metadata.generation`; the API server always sets it on a stored object.
#[must_use]
pub fn generation(claim: &VFClaim) -> i64 {
    claim.metadata.generation.unwrap_or_default()
}

/// What a claim's target is, given the Node of that name if there is one.
pub fn target<'a>(
    claim: &VFClaim,
    find: impl FnOnce(&str) -> Option<&'a k8s_openapi::api::core::v1::Node>,
) -> NodeView {
    let name = claim
        .spec
        .node_name
        .as_deref()
        .ok_or(NodeProblem::NoTarget)?;
    let node = find(name).ok_or_else(|| NodeProblem::NotFound(name.to_owned()))?;
    crate::node_identity::identify(node)
}

#[cfg(test)]
#[path = "up_tests.rs"]
mod tests;
