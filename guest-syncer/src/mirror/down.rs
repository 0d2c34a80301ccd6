//! The way down, decided: what a guest's claim says, given the host's copy.
//!
//! Pure. The guest-syncer is the only writer of status in a guest cluster, and
//! it shows what a tenant may see: not the pod, QEMU or class selectors behind it.

use common::api::{
    ConditionStatus, NewCondition, VFClaim, VFClaimStatus, condition, reason, set_condition, type_,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::up::{generation, mirrored_generation};

/// What is known of the host's copy.
#[derive(Clone, Copy, Debug)]
pub enum HostView<'a> {
    /// Our copy as it was last seen.
    Copy(&'a VFClaim),
    /// The host has no copy of ours.
    Absent,
    /// The host could not be asked: what was last said stands.
    Unknown,
}

/// The status that `claim` should have.
///
/// Times move only with a condition's status, so that an unchanged report
/// equals the status that is there.
#[must_use]
pub fn wanted_status(
    claim: &VFClaim,
    host: HostView<'_>,
    synced: &NewCondition,
    now: &Time,
) -> VFClaimStatus {
    let old = claim.status.clone().unwrap_or_default();
    let mut status = match host {
        HostView::Copy(copy) => mirrored(claim, &old, copy),
        HostView::Absent => VFClaimStatus {
            conditions: kept(&old, &[type_::SYNCED, type_::READY]),
            ..VFClaimStatus::default()
        },
        HostView::Unknown => old.clone(),
    };
    let own = Some(generation(claim));
    set_condition(&mut status.conditions, synced, own, now);
    let (ready, about) = ready(claim, &old, host, synced);
    set_condition(&mut status.conditions, &ready, about, now);
    status
}

/// The fields and conditions of the copy that a tenant may see.
fn mirrored(claim: &VFClaim, old: &VFClaimStatus, copy: &VFClaim) -> VFClaimStatus {
    let host = copy.status.clone().unwrap_or_default();
    let mut conditions: Vec<Condition> = host
        .conditions
        .into_iter()
        .filter(|c| c.type_ != type_::SYNCED && c.type_ != type_::READY)
        .map(|mut c| {
            let before = condition(&old.conditions, &c.type_).and_then(|o| o.observed_generation);
            c.observed_generation = guest_generation(claim, copy, c.observed_generation, before);
            c
        })
        .collect();
    // The syncer's own keep their place and their times.
    conditions.extend(kept(old, &[type_::SYNCED, type_::READY]));
    let admitted = host.admitted.map(|mut granted| {
        let before = old.admitted.as_ref().map(|a| a.observed_generation);
        let about = Some(granted.observed_generation);
        granted.observed_generation =
            guest_generation(claim, copy, about, before).unwrap_or_default();
        // Which hardware a class stands for is the administrator's affair.
        granted.pf_selector = common::api::PfSelector::default();
        granted.num_vfs = None;
        granted
    });
    VFClaimStatus {
        admitted,
        vm: host.vm,
        host_node: host.host_node,
        launcher: None,
        device: host.device,
        attachment: None,
        guest_device: host.guest_device,
        conditions,
    }
}

/// In the order that they have: another one would be a report that says nothing new.
fn kept(old: &VFClaimStatus, types: &[&str]) -> Vec<Condition> {
    let known = old.conditions.iter();
    let kept = known.filter(|c| types.contains(&c.type_.as_str()));
    kept.cloned().collect()
}

/// The guest's generation that a host statement about host generation `about`
/// speaks of: the one written with the copy's spec, if the statement is about
/// that spec; else what was known `before`, which stays true.
fn guest_generation(
    claim: &VFClaim,
    copy: &VFClaim,
    about: Option<i64>,
    before: Option<i64>,
) -> Option<i64> {
    let current = about.is_some() && about == copy.metadata.generation;
    let written = mirrored_generation(copy).filter(|g| *g <= generation(claim));
    if current { written } else { before }
}

/// The claim's Ready: from whatever the host says, and always something.
fn ready(
    claim: &VFClaim,
    old: &VFClaimStatus,
    host: HostView<'_>,
    synced: &NewCondition,
) -> (NewCondition, Option<i64>) {
    let own = Some(generation(claim));
    let no = |reason: &str, message: &str| {
        NewCondition::new(type_::READY, ConditionStatus::False, reason, message)
    };
    match host {
        HostView::Absent => (no(&synced.reason, &synced.message), own),
        HostView::Unknown => match condition(&old.conditions, type_::READY) {
            Some(last) => (again(last), last.observed_generation),
            None => (
                NewCondition::new(
                    type_::READY,
                    ConditionStatus::Unknown,
                    synced.reason.clone(),
                    synced.message.clone(),
                ),
                own,
            ),
        },
        HostView::Copy(copy) => {
            let said = copy.status.as_ref().map(|s| s.conditions.as_slice());
            let said = said.unwrap_or_default();
            let before = condition(&old.conditions, type_::READY);
            let about = |c: &Condition| {
                let before = before.and_then(|c| c.observed_generation);
                guest_generation(claim, copy, c.observed_generation, before)
            };
            if claim.metadata.deletion_timestamp.is_some() {
                return (no(reason::RELEASING, &releasing(said)), own);
            }
            match decisive(said) {
                Some(c) => (again(c), about(c)),
                None => (no(reason::PENDING, waiting_for(copy)), own),
            }
        }
    }
}

/// The condition of the host that decides whether the claim can be used: a
/// Ready that is true, else the first refusal on the claim's way, else Ready.
fn decisive(said: &[Condition]) -> Option<&Condition> {
    let with = |t: &str, status: ConditionStatus| {
        condition(said, t).filter(|c| c.status == status.as_str())
    };
    with(type_::READY, ConditionStatus::True)
        .or_else(|| with(type_::ADMITTED, ConditionStatus::False))
        .or_else(|| with(type_::RESOLVED, ConditionStatus::False))
        .or_else(|| condition(said, type_::READY))
}

/// A stored condition, said again as Ready.
fn again(c: &Condition) -> NewCondition {
    let status = match c.status.as_str() {
        "True" => ConditionStatus::True,
        "False" => ConditionStatus::False,
        _ => ConditionStatus::Unknown,
    };
    NewCondition::new(type_::READY, status, c.reason.clone(), c.message.clone())
}

fn waiting_for(copy: &VFClaim) -> &'static str {
    let status = copy.status.as_ref();
    if status.is_some_and(|s| s.host_node.is_some()) {
        "the VM's host node has been told; waiting for its agent to allocate a VF"
    } else if status.is_some_and(|s| s.admitted.is_some()) {
        "the claim is admitted; waiting for the host to find the node's VM"
    } else {
        "the host has the claim; waiting for it to be admitted"
    }
}

/// What a release waits for, in the host's words where it has some.
fn releasing(said: &[Condition]) -> String {
    let host = [type_::READY, type_::ATTACHED]
        .into_iter()
        .filter_map(|t| condition(said, t))
        .find(|c| c.status != ConditionStatus::True.as_str() && !c.message.is_empty());
    match host {
        Some(c) => format!(
            "the host is taking the VF back: {} ({})",
            c.message, c.reason
        ),
        None => "the host is taking the VF back; the claim goes when that is done".to_owned(),
    }
}

/// The status writes that lead from `old` to `wanted`: none, one, or two.
///
/// The CRD lets a device be set only once until it is cleared, and `hostNode`
/// not change while one is set. The host may clear and set them between two
/// looks of ours, so a changed device is cleared here first.
#[must_use]
pub fn writes(old: Option<&VFClaimStatus>, wanted: VFClaimStatus) -> Vec<VFClaimStatus> {
    if old == Some(&wanted) {
        return Vec::new();
    }
    let clearing = old.and_then(|old| {
        let device = old.device.as_ref()?;
        let follows = wanted.host_node == old.host_node
            && wanted.device.as_ref().is_none_or(|next| {
                next.node_name == device.node_name
                    && next.physical_function == device.physical_function
                    && next.vf_index == device.vf_index
                    && next.namespace_id == device.namespace_id
                    && (device.pci_address.is_none() || next.pci_address == device.pci_address)
            });
        (!follows).then(|| VFClaimStatus {
            device: None,
            attachment: None,
            guest_device: None,
            ..old.clone()
        })
    });
    clearing.into_iter().chain([wanted]).collect()
}

#[cfg(test)]
#[path = "down_tests.rs"]
mod tests;
