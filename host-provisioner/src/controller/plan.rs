//! What the controller does about one claim, from everything it knows. Pure.

use common::api::{
    Admitted, ConditionStatus, GuestCluster, HOST_FINALIZER, NewCondition, PhysicalFunction,
    VFClaim, VFClaimStatus, VFClass, reason, type_,
};
use common::kube::{finalizer, status::merge_diff};
use kube::ResourceExt as _;
use serde_json::{Value, json};

use super::admit::{Ask, admit};
use super::identity::identify;
use super::refusal::Refusal;
use super::resolve::{Resolution, resolve};
use super::vmi::Vmi;
use super::withhold::{self, Withhold};

/// Everything that the plan depends on, beside the claim.
pub struct Known<'a> {
    pub clusters: &'a [&'a GuestCluster],
    pub classes: &'a [&'a VFClass],
    /// At least the VMs whose firmware UUID is the claim's.
    pub vmis: &'a [Vmi],
    /// Claims of the same guest, other than this one, that were admitted.
    pub admitted_others: usize,
    /// The PF of the claim's device; needed only when its spec has changed.
    pub pf: Option<&'a PhysicalFunction>,
}

/// The writes that are due, in this order. Empty: nothing is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The claim is going and its VF is back: take the finalizer off.
    pub release: bool,
    /// It is going, and its VF is not to go back to the pool: see to it that it is withheld.
    pub withhold: Option<Withhold>,
    /// Pin this cluster UID to this GuestCluster, then plan again.
    pub pin: Option<(String, String)>,
    /// Put the finalizer on before anything is granted.
    pub finalizer: bool,
    /// Merge patch of the status fields that this controller decides.
    pub decision: Option<Value>,
    /// The conditions to report; `None` says nothing about the claim.
    pub conditions: Option<Vec<NewCondition>>,
    /// The refusal, for an event when it is new.
    pub refusal: Option<Refusal>,
}

/// Plans one claim.
#[must_use]
pub fn plan(claim: &VFClaim, known: &Known<'_>) -> Plan {
    let status = claim.status.clone().unwrap_or_default();
    if claim.metadata.deletion_timestamp.is_some() {
        let back = status.device.is_none() && status.attachment.is_none();
        return Plan {
            release: back && finalizer::has(claim, HOST_FINALIZER),
            withhold: withhold::due(claim),
            ..Plan::default()
        };
    }
    let identified = match identify(claim, known.clusters) {
        Ok(identified) => identified,
        Err(refusal) => return refused(refusal),
    };
    let asked = admit(&Ask {
        claim,
        guest_uid: &identified.guest.uid,
        cluster: identified.cluster,
        classes: known.classes,
        admitted_others: known.admitted_others,
        pf: known.pf,
    });
    // An earlier grant holds when a changed spec is refused.
    let granted = asked.clone().ok().or_else(|| status.admitted.clone());
    let Some(granted) = granted else {
        return asked.err().map(refused).unwrap_or_default();
    };
    if identified.pin {
        let pin = (
            identified.cluster.name_any(),
            identified.guest.cluster_uid.clone(),
        );
        return Plan {
            pin: Some(pin),
            ..Plan::default()
        };
    }
    let resolution = resolve(
        identified.guest,
        claim.spec.vm_ip.as_deref(),
        identified.cluster,
        known.clusters,
        known.vmis,
    );
    let (placed, resolved) = follow(&status, resolution);
    let desired = VFClaimStatus {
        admitted: Some(granted.clone()),
        ..placed
    };
    Plan {
        finalizer: !finalizer::has(claim, HOST_FINALIZER),
        decision: decision(&status, &desired),
        conditions: Some(vec![
            admitted_condition(&asked, &granted),
            resolved.condition(),
        ]),
        refusal: asked.err().or(match resolved {
            Resolved::Not(refusal) if refusal.reason != reason::VM_NOT_RUNNING => Some(refusal),
            _ => None,
        }),
        ..Plan::default()
    }
}

/// A claim that has no grant: only its condition is written.
fn refused(refusal: Refusal) -> Plan {
    let no = ConditionStatus::False;
    let unknown = ConditionStatus::Unknown;
    Plan {
        conditions: Some(vec![
            NewCondition::new(type_::ADMITTED, no, refusal.reason, &*refusal.message),
            NewCondition::new(
                type_::RESOLVED,
                unknown,
                reason::PENDING,
                "the VM is looked for when the claim is admitted",
            ),
        ]),
        refusal: Some(refusal),
        ..Plan::default()
    }
}

fn admitted_condition(asked: &Result<Admitted, Refusal>, granted: &Admitted) -> NewCondition {
    match asked {
        Ok(_) => NewCondition::new(
            type_::ADMITTED,
            ConditionStatus::True,
            reason::ADMITTED,
            format!("granted from VFClass {}", granted.class_name),
        ),
        Err(refusal) => NewCondition::new(
            type_::ADMITTED,
            ConditionStatus::False,
            refusal.reason,
            format!("{}; until then the earlier grant holds", refusal.message),
        ),
    }
}

/// What `Resolved` says.
enum Resolved {
    Yes(String),
    Not(Refusal),
}

impl Resolved {
    fn condition(&self) -> NewCondition {
        match self {
            Self::Yes(message) => NewCondition::new(
                type_::RESOLVED,
                ConditionStatus::True,
                reason::RESOLVED,
                message.as_str(),
            ),
            Self::Not(refusal) => NewCondition::new(
                type_::RESOLVED,
                ConditionStatus::False,
                refusal.reason,
                refusal.message.as_str(),
            ),
        }
    }
}

/// Where the claim is to be, given where it was: a node that has a device for
/// it keeps it, whatever the VM does, until the agent has cleared the device.
fn follow(status: &VFClaimStatus, resolution: Resolution) -> (VFClaimStatus, Resolved) {
    let held = status.device.is_some() || status.attachment.is_some();
    let mut placed = status.clone();
    match resolution {
        Resolution::Running { vm, node, launcher } => {
            if held && status.host_node.as_ref() != Some(&node) {
                let here = status.host_node.clone().unwrap_or_default();
                let message = format!(
                    "VM {} runs on node {node} now, its VF is on {here}; delete the claim and \
                     make another",
                    vm.name
                );
                return (
                    placed,
                    Resolved::Not(Refusal::new(reason::VM_MOVED, message)),
                );
            }
            let message = format!("VM {}/{} on node {node}", vm.namespace, vm.name);
            placed.vm = Some(vm);
            placed.host_node = Some(node);
            placed.launcher = Some(launcher);
            (placed, Resolved::Yes(message))
        }
        Resolution::Waiting { vm, why } => {
            if !held {
                placed.vm = Some(vm);
                placed.host_node = None;
                placed.launcher = None;
            }
            (placed, Resolved::Not(why))
        }
        Resolution::Refused(refusal) => {
            if !held {
                placed.host_node = None;
                placed.launcher = None;
            }
            (placed, Resolved::Not(refusal))
        }
    }
}

/// The merge patch from the decided fields as they are to as they should be.
fn decision(now: &VFClaimStatus, desired: &VFClaimStatus) -> Option<Value> {
    let fields = |s: &VFClaimStatus| {
        let mut fields = json!({
            "admitted": s.admitted, "vm": s.vm, "hostNode": s.host_node, "launcher": s.launcher,
        });
        if let Value::Object(map) = &mut fields {
            map.retain(|_, v| !v.is_null());
        }
        fields
    };
    merge_diff(&fields(now), &fields(desired))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
