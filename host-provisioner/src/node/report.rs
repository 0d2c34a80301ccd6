//! What the node agent says of a claim: its conditions, from the outcome of a
//! reconcile. Pure.
//!
//! `Ready` repeats the first thing that is not good, because it is the column
//! that people read.

use common::api::{
    ConditionStatus, GuestDevice, NewCondition, VFClaim, VFClaimStatus, condition, reason, type_,
};

use super::plan::Wait;

/// The conditions that the node agent alone writes.
pub const OWN: [&str; 4] = [
    type_::ALLOCATED,
    type_::PREPARED,
    type_::ATTACHED,
    type_::READY,
];

/// How far a claim got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No VF could be chosen.
    NotAllocated(Wait),
    /// A VF is chosen, it is not set up yet.
    NotPrepared(Wait),
    /// The VF is set up, it is not in the VM yet.
    NotAttached(Wait),
    /// The guest has it.
    Attached(GuestDevice),
    /// The guest has it, and it does not do what was granted, or that is not known.
    Degraded(GuestDevice, Wait),
    /// It is going, and something has to be waited for.
    Releasing(Wait),
}

/// The agent's conditions for an outcome, in the order of a claim's way.
#[must_use]
pub fn conditions(outcome: &Outcome) -> Vec<NewCondition> {
    use ConditionStatus::{False, True};
    let done = |type_, reason, message: &str| NewCondition::new(type_, True, reason, message);
    let not = |type_, wait: &Wait| NewCondition::new(type_, False, wait.reason, &*wait.message);
    let allocated = done(
        type_::ALLOCATED,
        reason::ALLOCATED,
        "a VF is reserved for this claim",
    );
    let prepared = done(
        type_::PREPARED,
        reason::PREPARED,
        "the VF is configured and bound to vfio-pci",
    );
    match outcome {
        Outcome::NotAllocated(wait) => {
            vec![not(type_::ALLOCATED, wait), not(type_::READY, wait)]
        }
        Outcome::NotPrepared(wait) => {
            vec![
                allocated,
                not(type_::PREPARED, wait),
                not(type_::READY, wait),
            ]
        }
        Outcome::NotAttached(wait) => {
            vec![
                allocated,
                prepared,
                not(type_::ATTACHED, wait),
                not(type_::READY, wait),
            ]
        }
        Outcome::Attached(device) => {
            let message = format!("the VM has the VF at PCI address {}", device.pci_address);
            vec![
                allocated,
                prepared,
                done(type_::ATTACHED, reason::ATTACHED, &message),
                done(type_::READY, reason::READY, &message),
            ]
        }
        Outcome::Degraded(device, wait) => {
            let message = format!("the VM has the VF at PCI address {}", device.pci_address);
            vec![
                allocated,
                prepared,
                done(type_::ATTACHED, reason::ATTACHED, &message),
                not(type_::READY, wait),
            ]
        }
        Outcome::Releasing(wait) => {
            vec![
                allocated,
                prepared,
                not(type_::ATTACHED, wait),
                not(type_::READY, wait),
            ]
        }
    }
}

/// The generation of the claim's spec that the agent speaks of: the one that was granted, since
/// it acts on nothing else. An edit that nobody has granted has reached no VF. Of a claim that
/// goes, it is the deletion's.
#[must_use]
pub fn observed(claim: &VFClaim) -> Option<i64> {
    let granted = claim.status.as_ref().and_then(|s| s.admitted.as_ref());
    match granted {
        Some(granted) if claim.metadata.deletion_timestamp.is_none() => {
            Some(granted.observed_generation)
        }
        _ => claim.metadata.generation,
    }
}

/// The grant is newer than what was last said of the claim: what the kernel does otherwise is for
/// an edit of the claim, and nobody has changed it.
#[must_use]
pub fn newly_granted(status: &VFClaimStatus) -> bool {
    let said = condition(&status.conditions, type_::READY).and_then(|c| c.observed_generation);
    let granted = status.admitted.as_ref().map(|a| a.observed_generation);
    said.zip(granted)
        .is_some_and(|(said, granted)| said < granted)
}

/// The wait that an outcome tells of, if it does.
#[must_use]
pub const fn waits_for(outcome: &Outcome) -> Option<&Wait> {
    match outcome {
        Outcome::NotAllocated(wait)
        | Outcome::NotPrepared(wait)
        | Outcome::NotAttached(wait)
        | Outcome::Degraded(_, wait)
        | Outcome::Releasing(wait) => Some(wait),
        Outcome::Attached(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A status with a grant of one generation, last said to be Ready with another.
    fn granted(generation: i64, said: Option<i64>) -> VFClaimStatus {
        let ready = said.map(|said| {
            serde_json::json!({
                "type": "Ready", "status": "True", "reason": "Ready", "message": "",
                "observedGeneration": said, "lastTransitionTime": "2026-01-01T00:00:00Z",
            })
        });
        serde_json::from_value(serde_json::json!({
            "admitted": {
                "observedGeneration": generation, "className": "gold", "classUID": "g",
                "network": {"macAddress": "02:00:00:00:00:01", "spoofCheck": true, "trust": false},
            },
            "conditions": ready.into_iter().collect::<Vec<_>>(),
        }))
        .unwrap()
    }

    #[test]
    fn ready_repeats_what_is_not_good() {
        let outcome = Outcome::NotAttached(Wait {
            reason: reason::NO_FREE_PORT,
            message: "no port".into(),
        });
        let said = conditions(&outcome);
        let of = |type_| said.iter().find(|c| c.type_ == type_).unwrap();
        assert_eq!(of(type_::READY).reason, "NoFreePCIePort");
        assert_eq!(of(type_::READY).status, ConditionStatus::False);
        assert_eq!(of(type_::PREPARED).status, ConditionStatus::True);
    }

    #[test]
    fn the_agent_speaks_of_what_was_granted_and_of_a_deletion() {
        let claim = |generation: i64, deleted: bool| -> VFClaim {
            let at = deleted.then_some("2026-01-01T00:00:00Z");
            let mut claim = serde_json::json!({
                "apiVersion": "sriov.harvesterhci.io/v1alpha1", "kind": "VFClaim",
                "metadata": {"name": "c", "generation": generation, "deletionTimestamp": at},
                "spec": {"className": "gold"},
            });
            claim["status"] = serde_json::to_value(granted(2, None)).unwrap();
            serde_json::from_value(claim).unwrap()
        };
        assert_eq!(observed(&claim(2, false)), Some(2));
        assert_eq!(observed(&claim(3, false)), Some(2), "an edit not granted");
        assert_eq!(observed(&claim(3, true)), Some(3));
    }

    #[test]
    fn a_grant_is_new_until_the_claim_was_reported_with_it() {
        assert!(newly_granted(&granted(2, Some(1))));
        for said in [Some(2), Some(3), None] {
            assert!(!newly_granted(&granted(2, said)), "{said:?}");
        }
    }

    #[test]
    fn a_degraded_claim_is_attached_and_not_ready() {
        let device = GuestDevice {
            pci_address: "0000:05:00.0".into(),
            mac_address: Some("02:00:00:00:00:01".into()),
        };
        let wait = Wait {
            reason: reason::DEGRADED,
            message: "the VLAN is gone".into(),
        };
        let said = conditions(&Outcome::Degraded(device, wait));
        let of = |type_| said.iter().find(|c| c.type_ == type_).unwrap();
        assert_eq!(of(type_::ATTACHED).status, ConditionStatus::True);
        assert_eq!(of(type_::READY).status, ConditionStatus::False);
        assert_eq!(of(type_::READY).reason, "Degraded");
    }
}
