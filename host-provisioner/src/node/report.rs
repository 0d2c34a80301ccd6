//! What the node agent says of a claim: its conditions, from the outcome of a
//! reconcile. Pure.
//!
//! `Ready` repeats the first thing that is not good, because it is the column
//! that people read.

use common::api::{ConditionStatus, GuestDevice, NewCondition, reason, type_};

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
    fn a_degraded_claim_is_attached_and_not_ready() {
        let device = GuestDevice {
            pci_address: "0000:05:00.0".into(),
            mac_address: "02:00:00:00:00:01".into(),
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
