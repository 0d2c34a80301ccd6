//! A claim whose guest has its device: what the device needs is kept as it is, and what the
//! kernel does for it as it was granted.

use std::time::Duration;

use common::api::{GuestDevice, reason};
use kube::Resource as _;
use kube::runtime::controller::Action;

use super::Walk;
use super::end::{End, WAITING};
use crate::node::error::ReconcileError;
use crate::node::hold::Drift;
use crate::node::plan::{InQemu, Qemu, Service, Wait};
use crate::node::report::{Outcome, newly_granted};
use crate::node::vf;
use crate::node::{attach, listen, release};

/// An attached claim is looked at again, in case something was missed.
const RESYNC: Duration = Duration::from_secs(300);

impl Walk {
    /// Keeps what an attached device needs as it is; when to look again. The device works
    /// whether or not that succeeds, so the claim stays Ready.
    pub(super) async fn keep(&self) -> Duration {
        if let Some(vm) = &self.vm {
            listen::follow(&self.agent, vm);
        }
        match attach::keep_memlock(&self.agent, &self.claim).await {
            Ok(()) => RESYNC,
            Err(error) => {
                tracing::warn!(claim = self.claim.metadata.name, %error, "memlock");
                WAITING
            }
        }
    }

    pub(super) async fn look_at_service(&mut self) -> Result<Option<End>, ReconcileError> {
        match self.drift().await {
            Ok(drift) => {
                self.seen.service = Some(drift.map_or(Service::AsGranted, Service::Drifted));
                Ok(None)
            }
            // The guest has its device; whether that does what was granted is not known.
            Err(error) => Ok(Some(self.degraded(&error.to_string()).await)),
        }
    }

    async fn drift(&self) -> Result<Option<Drift>, ReconcileError> {
        let pf = self.pf().await?;
        let index = self.recorded_device()?.vf_index;
        let want = self.granted()?;
        Ok(vf::blocking(&self.agent.kernel, move |kernel| {
            vf::drift(kernel, &pf, index, &want)
        })
        .await?)
    }

    /// Makes the kernel do again what was granted. What lets the guest reach, or be taken
    /// for, what it was not granted and cannot be repaired is taken out of the VM.
    pub(super) async fn repair(&mut self, drift: &Drift) -> Result<Option<End>, ReconcileError> {
        let device = self.recorded_device()?.clone();
        let want = self.granted()?;
        let repaired = {
            let _turn = self.agent.pf_turns.take(&device.physical_function).await;
            let pf = self.pf().await?;
            tracing::warn!(pf = %pf.address, vf = device.vf_index, %drift, "repairing");
            vf::blocking(&self.agent.kernel, move |kernel| {
                vf::repair(kernel, &pf, device.vf_index, &want)
            })
            .await
        };
        let error = match repaired {
            Ok(()) => {
                self.tell_repaired(drift).await;
                self.seen.service = Some(Service::AsGranted);
                return Ok(None);
            }
            Err(error) => error,
        };
        if !drift.is_breach() {
            let why = format!("{drift}, and it cannot be repaired: {error}");
            return Ok(Some(self.degraded(&why).await));
        }
        let why = format!(
            "{drift}, and it cannot be repaired: {error}; the device is taken out of the VM until it can"
        );
        if self.agent.recent.just_did(format!("unplug {}", self.uid())) {
            return Ok(Some(self.degraded(&why).await));
        }
        let vm = self.vm()?;
        Ok(Some(match release::unplug(&self.claim, &vm).await? {
            Ok(()) => self.wait(Wait {
                reason: reason::DEGRADED,
                message: why,
            }),
            Err(pending) => self.degraded(&format!("{why}. {}", pending.message)).await,
        }))
    }

    /// Tells of a repair that somebody made necessary, or of an edit of the claim that has
    /// reached the VF.
    async fn tell_repaired(&self, drift: &Drift) {
        let (on, events) = (self.claim.object_ref(&()), &self.agent.events);
        if self.status().is_some_and(newly_granted) && !drift.pf_down {
            let changed = drift.settings.join(" and ");
            let note = format!("the VF in use has the {changed} that the claim was changed to");
            events.normal(&on, "Apply", reason::APPLIED, &note).await;
            return;
        }
        if !self
            .agent
            .recent
            .just_did(format!("repaired {}", self.uid()))
        {
            let note = format!("the VF is served as granted again: {drift}");
            events.warning(&on, "Repair", reason::REPAIRED, &note).await;
        }
    }

    /// The guest keeps its device, and the claim says what is wrong with it.
    async fn degraded(&self, message: &str) -> End {
        let wait = Wait {
            reason: reason::DEGRADED,
            message: message.to_owned(),
        };
        End {
            outcome: Some(self.unknown(wait)),
            next: Action::requeue(self.keep().await.min(WAITING)),
        }
    }

    /// Where a wait leaves a claim of which nothing was seen: a device that the guest had is
    /// not known to be gone.
    pub(super) fn unknown(&self, wait: Wait) -> Outcome {
        match self.reported() {
            Some(device) if self.claim.metadata.deletion_timestamp.is_none() => {
                Outcome::Degraded(device, wait)
            }
            _ => self.outcome(wait),
        }
    }

    fn uid(&self) -> &str {
        self.claim.metadata.uid.as_deref().unwrap_or_default()
    }

    /// The device that the guest has: as it was reported, or as QEMU has just said.
    fn reported(&self) -> Option<GuestDevice> {
        let reported = self.status().and_then(|s| s.guest_device.clone());
        reported.or_else(|| match &self.seen.qemu {
            Some(Qemu::Running(InQemu::Configured(address))) => Some(GuestDevice {
                pci_address: address.clone(),
                mac_address: self.granted_mac(),
            }),
            _ => None,
        })
    }
}
