//! How a walk ends: what the claim is told, and when it is looked at again.

use std::time::Duration;

use common::api::reason;
use common::kube::status::{Report, report};
use kube::Resource as _;
use kube::runtime::controller::Action;
use serde_json::{Map, json};

use super::Walk;
use crate::node::agent::MANAGER;
use crate::node::error::ReconcileError;
use crate::node::plan::{ClaimFacts, Vf, VfSeen, Wait};
use crate::node::report::{OWN, Outcome, conditions, observed, waits_for};

/// What waits for something that announces itself to nobody.
pub(super) const WAITING: Duration = Duration::from_secs(10);
/// What waits for the guest is looked at sooner.
const GUEST: Duration = Duration::from_secs(2);

/// How a walk ended.
pub(super) struct End {
    pub outcome: Option<Outcome>,
    pub next: Action,
}

impl Walk {
    /// Where a wait leaves the claim.
    pub(super) fn outcome(&self, wait: Wait) -> Outcome {
        let facts = self.facts();
        let ready = matches!(
            self.seen.vf,
            Some(VfSeen {
                vf: Vf::VfioFree,
                configured: true,
                ..
            })
        );
        match facts {
            ClaimFacts { deleting: true, .. } => Outcome::Releasing(wait),
            ClaimFacts { device: false, .. } => Outcome::NotAllocated(wait),
            ClaimFacts {
                attachment: true, ..
            } => Outcome::NotAttached(wait),
            _ if ready => Outcome::NotAttached(wait),
            _ => Outcome::NotPrepared(wait),
        }
    }

    pub(super) fn wait(&self, wait: Wait) -> End {
        let again = match wait.reason {
            reason::GUEST_NOT_CONFIGURED | reason::UNPLUG_PENDING | reason::RETRYING => GUEST,
            _ => WAITING,
        };
        End {
            outcome: Some(self.outcome(wait)),
            next: Action::requeue(again),
        }
    }

    pub(super) fn failed(&self, uid: &str, error: &ReconcileError) -> Action {
        let class = error.class();
        let again = self.agent.backoff.failed(uid.to_owned());
        tracing::warn!(
            claim = self.claim.metadata.name,
            class = class.as_str(),
            %error,
            again_in = ?again,
            "reconcile failed"
        );
        Action::requeue(again)
    }

    /// Writes the conditions and the guest's device, when they differ from what
    /// is there, and an event for what a person should know.
    pub(super) async fn report(&self, outcome: &Outcome) -> Result<(), ReconcileError> {
        let status = self.claim.status.clone().unwrap_or_default();
        let mut fields = Map::new();
        let mut seen = Map::new();
        if let Outcome::Attached(device) | Outcome::Degraded(device, _) = outcome {
            fields.insert("guestDevice".to_owned(), json!(device));
        }
        if let Some(device) = &status.guest_device {
            seen.insert("guestDevice".to_owned(), json!(device));
        }
        let said = Report {
            manager: MANAGER,
            owned: &OWN,
            conditions: conditions(outcome),
            observed_generation: observed(&self.claim),
            fields,
        };
        let written = report(&self.api, &self.claim, &status.conditions, &seen, &said).await?;
        if written.is_none() {
            return Ok(());
        }
        let on = self.claim.object_ref(&());
        match (waits_for(outcome), outcome) {
            (Some(wait), _) => {
                self.agent
                    .events
                    .warning(&on, "Attach", wait.reason, &wait.message)
                    .await;
            }
            (None, Outcome::Attached(device)) => {
                let note = format!("the VM has the VF at PCI address {}", device.pci_address);
                self.agent
                    .events
                    .normal(&on, "Attach", reason::ATTACHED, &note)
                    .await;
            }
            (None, _) => {}
        }
        Ok(())
    }
}
