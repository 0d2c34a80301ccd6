//! What the node agent says of a claim: its conditions, from the outcome of a
//! reconcile. Pure.
//!
//! `Ready` repeats the first thing that is not good, because it is the column
//! that people read.

use common::api::{ConditionStatus, GuestDevice, NewCondition, VFClaim, reason, set_condition, type_};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::plan::Wait;

/// The conditions that the node agent alone writes.
pub const OWN: [&str; 4] = [type_::ALLOCATED, type_::PREPARED, type_::ATTACHED, type_::READY];

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
    /// It is going, and something has to be waited for.
    Releasing(Wait),
}

/// The agent's conditions for an outcome, in the order of a claim's way.
#[must_use]
pub fn conditions(outcome: &Outcome) -> Vec<NewCondition> {
    use ConditionStatus::{False, True};
    let done = |type_, reason, message: &str| NewCondition::new(type_, True, reason, message);
    let not = |type_, wait: &Wait| NewCondition::new(type_, False, wait.reason, &*wait.message);
    let allocated = done(type_::ALLOCATED, reason::ALLOCATED, "a VF is reserved for this claim");
    let prepared =
        done(type_::PREPARED, reason::PREPARED, "the VF is configured and bound to vfio-pci");
    match outcome {
        Outcome::NotAllocated(wait) => {
            vec![not(type_::ALLOCATED, wait), not(type_::READY, wait)]
        }
        Outcome::NotPrepared(wait) => {
            vec![allocated, not(type_::PREPARED, wait), not(type_::READY, wait)]
        }
        Outcome::NotAttached(wait) => {
            vec![allocated, prepared, not(type_::ATTACHED, wait), not(type_::READY, wait)]
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
        Outcome::Releasing(wait) => {
            vec![not(type_::ATTACHED, wait), not(type_::READY, wait)]
        }
    }
}

/// The agent's own conditions after `outcome`, and whether they differ from
/// what the claim has: an unchanged report is not written.
#[must_use]
pub fn own_conditions(claim: &VFClaim, outcome: &Outcome, now: &Time) -> (Vec<Condition>, bool) {
    let mut own: Vec<Condition> = claim
        .status
        .iter()
        .flat_map(|status| &status.conditions)
        .filter(|c| OWN.contains(&c.type_.as_str()))
        .cloned()
        .collect();
    let mut changed = false;
    for new in conditions(outcome) {
        changed |= set_condition(&mut own, &new, claim.metadata.generation, now);
    }
    (own, changed)
}

/// Whether an outcome is worth an event, and of which kind.
#[must_use]
pub const fn is_refusal(outcome: &Outcome) -> bool {
    matches!(
        outcome,
        Outcome::NotAllocated(_)
            | Outcome::NotPrepared(_)
            | Outcome::NotAttached(_)
            | Outcome::Releasing(_)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Time {
        serde_json::from_value(serde_json::json!("2026-01-01T00:00:00Z")).unwrap()
    }

    #[test]
    fn ready_repeats_what_is_not_good() {
        let outcome = Outcome::NotAttached(Wait {
            reason: reason::NO_FREE_PORT,
            message: "no port".into(),
        });
        let (own, changed) = own_conditions(&VFClaim::default(), &outcome, &now());
        assert!(changed);
        let ready = own.iter().find(|c| c.type_ == type_::READY).unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "NoFreePCIePort"));
        assert_eq!(own.iter().find(|c| c.type_ == type_::PREPARED).unwrap().status, "True");
    }

    #[test]
    fn an_unchanged_report_is_no_report() {
        let mut claim = VFClaim::default();
        let outcome = Outcome::Attached(GuestDevice {
            pci_address: "0000:05:00.0".into(),
            mac_address: "02:00:00:00:00:01".into(),
        });
        let (own, changed) = own_conditions(&claim, &outcome, &now());
        assert!(changed);
        claim.status.get_or_insert_default().conditions = own;
        assert!(!own_conditions(&claim, &outcome, &now()).1);
    }
}
