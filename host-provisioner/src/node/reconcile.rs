//! One claim's reconcile: fetch, validate, plan, apply, report. `plan` decides,
//! `vf`, `attach` and `release` execute; this file carries the facts between them.

mod back;
mod end;
mod keep;

use std::sync::Arc;
use std::time::Duration;

use common::api::{Admitted, DeviceStatus, GuestDevice, VFClaim, VFClaimStatus, reason};
use common::kube::is_conflict;
use kube::Api;
use kube::runtime::controller::Action;
use tokio::sync::OwnedMutexGuard;

use super::agent::Agent;
use super::error::ReconcileError;
use super::plan::{ClaimFacts, InQemu, Qemu, Seen, Step, Vf, VfSeen, Wait, next_step};
use super::pool::granted_config;
use super::qemu::{self, Vm};
use super::report::Outcome;
use super::vf::{self, VfError};
use super::{allocate, attach, gone, inventory, left, listen, release};
use crate::kernel::{PfFacts, VfConfig};
use crate::points::{Point, reach};
use end::End;

/// No claim needs more steps than this in one reconcile: more is a defect, and
/// is reported rather than looped on.
const MAX_STEPS: usize = 40;

/// What is to be read and planned again at once.
const SOON: Duration = Duration::from_millis(50);

/// Reconciles a claim; never fails: what goes wrong is reported on the claim
/// and tried again.
pub async fn reconcile(cached: Arc<VFClaim>, agent: Arc<Agent>) -> Action {
    let Some(uid) = cached.metadata.uid.clone() else {
        return Action::await_change();
    };
    let mut walk = match fetch(&agent, &cached).await {
        Ok(Some(walk)) => walk,
        Ok(None) => return Action::await_change(),
        Err(error) => {
            tracing::warn!(claim = cached.metadata.name, %error, "cannot read the claim");
            return Action::requeue(agent.backoff.failed(uid));
        }
    };
    let walked = walk.run().await;
    // The turn is for the work, not for the report.
    walk.turn = None;
    match walked {
        Ok(end) => {
            agent.backoff.forget(&uid);
            if let Some(outcome) = &end.outcome
                && let Err(error) = walk.report(outcome).await
            {
                return walk.failed(&uid, &error);
            }
            end.next
        }
        Err(ReconcileError::Api(error)) if is_conflict(&error) => {
            // Somebody wrote meanwhile: read and plan again, nothing failed.
            Action::requeue(SOON)
        }
        Err(error) => {
            let action = walk.failed(&uid, &error);
            let outcome = walk.unknown(Wait {
                reason: reason::RETRYING,
                message: error.to_string(),
            });
            if let Err(error) = walk.report(&outcome).await {
                tracing::warn!(claim = cached.metadata.name, %error, "cannot report");
            }
            action
        }
    }
}

/// Reads the claim itself: a watch's cache may be behind, and a DELETED on a
/// field-selected watch can mean "no longer yours". `None`: nothing to do here.
async fn fetch(agent: &Arc<Agent>, cached: &VFClaim) -> Result<Option<Walk>, ReconcileError> {
    let uid = cached.metadata.uid.as_deref().unwrap_or_default();
    let namespace = cached.metadata.namespace.as_deref().unwrap_or_default();
    let api: Api<VFClaim> = Api::namespaced(agent.client.clone(), namespace);
    let name = cached.metadata.name.as_deref().unwrap_or_default();
    let Some(claim) = gone::read(agent, &api, name, uid).await? else {
        return Ok(None);
    };
    Ok(Some(Walk {
        agent: Arc::clone(agent),
        api,
        claim,
        doubled: false,
        seen: Seen::default(),
        vm: None,
        device: None,
        snapshots: Vec::new(),
        found: None,
        turn: None,
        gates_closed: false,
        erased: false,
    }))
}

/// A claim on its way, with the facts gathered so far.
struct Walk {
    agent: Arc<Agent>,
    api: Api<VFClaim>,
    claim: VFClaim,
    /// Another claim has the VF that this one names.
    doubled: bool,
    seen: Seen,
    vm: Option<Vm>,
    /// The device with what is known since the VF exists, to be recorded with
    /// the attachment.
    device: Option<DeviceStatus>,
    /// The node's PFs as they were when it was looked for what QEMU has of the claim.
    snapshots: Vec<allocate::PfSnapshot>,
    /// What was found then.
    found: Option<left::Found>,
    /// The VM's turn, from choosing a port until the device is in it.
    turn: Option<OwnedMutexGuard<()>>,
    /// What the attachment had opened was closed in this walk.
    gates_closed: bool,
    /// The VF was cleaned in this walk, and its namespace erased: nothing else tells a namespace
    /// that was erased from one that was forgotten by its controller.
    erased: bool,
}

impl Walk {
    fn status(&self) -> Option<&VFClaimStatus> {
        self.claim.status.as_ref()
    }

    fn admitted(&self) -> Result<&Admitted, ReconcileError> {
        self.status()
            .and_then(|s| s.admitted.as_ref())
            .ok_or(ReconcileError::Incomplete("status.admitted"))
    }

    fn recorded_device(&self) -> Result<&DeviceStatus, ReconcileError> {
        self.status()
            .and_then(|s| s.device.as_ref())
            .ok_or(ReconcileError::Incomplete("status.device"))
    }

    /// The namespace that the claim has.
    fn namespace(&self) -> Option<u32> {
        self.status()?.device.as_ref()?.namespace_id
    }

    /// What was granted, in the kernel's terms.
    fn granted(&self) -> Result<VfConfig, ReconcileError> {
        let granted = granted_config(self.admitted()?, self.namespace());
        Ok(granted.map_err(VfError::from)?)
    }

    /// The MAC that was granted, of a network interface.
    fn granted_mac(&self) -> Option<String> {
        let network = self.status()?.admitted.as_ref()?.network.as_ref()?;
        Some(network.mac_address.clone())
    }

    fn facts(&self) -> ClaimFacts {
        let status = self.status();
        ClaimFacts {
            deleting: self.claim.metadata.deletion_timestamp.is_some(),
            bound: status.is_some_and(|s| s.admitted.is_some() && s.launcher.is_some()),
            device: status.is_some_and(|s| s.device.is_some()),
            attachment: status.is_some_and(|s| s.attachment.is_some()),
            reported: status.is_some_and(|s| s.guest_device.is_some()),
            doubled: self.doubled,
            reclaim: self.reclaim(),
            withheld: self.withheld(),
            withheld_from_it: self.withheld_from_it(),
            storage: self.namespace().is_some(),
        }
    }

    async fn run(&mut self) -> Result<End, ReconcileError> {
        if self.agent.ledger.lock().forget_earlier(&self.claim) {
            tracing::info!(claim = self.claim.metadata.name, "it was made anew");
            listen::prune(&self.agent);
            self.agent.tell_pool_changed();
        }
        if let Err(doubled) = self.agent.ledger.lock().observe(&self.claim) {
            tracing::error!(claim = self.claim.metadata.name, %doubled, "not acted on");
            self.doubled = true;
        }
        let mut step = Step::Rest;
        for _ in 0..MAX_STEPS {
            step = next_step(self.facts(), &self.seen);
            tracing::debug!(claim = self.claim.metadata.name, ?step, "step");
            if let Some(end) = self.apply(&step).await? {
                return Ok(end);
            }
        }
        Err(ReconcileError::NoEnd {
            steps: MAX_STEPS,
            last: format!("{step:?}"),
        })
    }

    /// Does one step; an end when there is nothing more to do now.
    async fn apply(&mut self, step: &Step) -> Result<Option<End>, ReconcileError> {
        match step {
            Step::Rest => {
                return Ok(Some(End {
                    outcome: None,
                    next: Action::await_change(),
                }));
            }
            Step::Wait(wait) => return Ok(Some(self.wait(wait.clone()))),
            Step::LookAtVf => self.look_at_vf().await?,
            Step::LookAtQemu => self.look_at_qemu().await?,
            Step::LookForLeft => self.look_for_left().await?,
            Step::TakeOver => self.take_over().await?,
            Step::Allocate => return self.allocate().await,
            Step::CreateVfs => return self.create_vfs().await,
            Step::Prepare => return self.prepare().await,
            Step::RecordAttachment => return self.record_attachment().await,
            Step::Plug => return self.plug().await,
            Step::AwaitGuest => {
                let vm = self.vm()?;
                match attach::await_guest(&self.claim, &vm).await? {
                    Ok(address) => {
                        self.seen.qemu = Some(Qemu::Running(InQemu::Configured(address)));
                    }
                    Err(wait) => return Ok(Some(self.wait(wait))),
                }
            }
            Step::LookAtService => return self.look_at_service().await,
            Step::Repair(drift) => return self.repair(drift).await,
            Step::ReportAttached { guest_address } => {
                reach(Point::GuestConfigured);
                let device = GuestDevice {
                    pci_address: guest_address.clone(),
                    mac_address: self.granted_mac(),
                };
                return Ok(Some(End {
                    outcome: Some(Outcome::Attached(device)),
                    next: Action::requeue(self.keep().await),
                }));
            }
            Step::ForgetAttachment => self.forget_attachment().await?,
            Step::Lose(wait) => {
                // First, so that nothing is ever added by what was recorded of a lost VF.
                self.forget_attachment().await?;
                return Ok(Some(End {
                    outcome: Some(Outcome::NotAttached(wait.clone())),
                    next: Action::requeue(SOON),
                }));
            }
            Step::Unplug => {
                let vm = self.vm()?;
                match release::unplug(&self.claim, &vm).await? {
                    Ok(()) => self.seen = Seen::default(),
                    Err(wait) => return Ok(Some(self.wait(wait))),
                }
            }
            Step::Clean => self.clean().await?,
            Step::AwaitWithheld => return self.await_withheld().await,
            Step::ClearDevice => {
                self.close_gates().await?;
                self.clear_device().await?;
            }
        }
        Ok(None)
    }

    /// Takes over what a write answered.
    fn renew(&mut self, claim: VFClaim) -> Result<(), ReconcileError> {
        self.agent.ledger.lock().observe(&claim)?;
        self.doubled = false;
        self.claim = claim;
        self.agent.tell_report_due();
        Ok(())
    }

    fn vm(&self) -> Result<Vm, ReconcileError> {
        self.vm
            .clone()
            .ok_or(ReconcileError::Incomplete("QEMU process"))
    }

    async fn pf(&self) -> Result<PfFacts, ReconcileError> {
        let name = self.recorded_device()?.physical_function.clone();
        let node = self.agent.node_name.clone();
        Ok(vf::blocking(&self.agent.kernel, move |kernel| {
            kernel
                .physical_functions()?
                .into_iter()
                .find(|pf| inventory::physical_function_name(&node, &pf.identity) == name)
                .ok_or(VfError::UnknownPf(name))
        })
        .await?)
    }

    async fn look_at_vf(&mut self) -> Result<(), ReconcileError> {
        let pf = self.pf().await?;
        let index = self.recorded_device()?.vf_index;
        let want = self.granted()?;
        let mut seen = vf::blocking(&self.agent.kernel, move |kernel| {
            vf::look(kernel, &pf, index, &want)
        })
        .await?;
        seen.clean &= self.erased || self.namespace().is_none();
        self.seen.vf = Some(seen);
        Ok(())
    }

    async fn look_at_qemu(&mut self) -> Result<(), ReconcileError> {
        let (seen, vm) = qemu::look(&self.agent, &self.claim).await?;
        self.seen.qemu = Some(seen);
        self.vm = vm;
        Ok(())
    }

    async fn look_for_left(&mut self) -> Result<(), ReconcileError> {
        let (snapshots, _) = allocate::snapshot(&self.agent).await?;
        let (seen, found) = left::look(&self.agent, &self.claim, &snapshots).await?;
        self.seen.left = Some(seen);
        self.found = found;
        self.snapshots = snapshots;
        Ok(())
    }

    async fn take_over(&mut self) -> Result<(), ReconcileError> {
        let found = self.found.take();
        let found = found.ok_or(ReconcileError::Incomplete("device in QEMU"))?;
        let claim = left::take_over(&self.agent, &self.api, &self.claim, found).await?;
        self.renew(claim)?;
        self.agent.tell_pool_changed();
        self.seen = Seen::default();
        Ok(())
    }

    async fn allocate(&mut self) -> Result<Option<End>, ReconcileError> {
        let snapshots = std::mem::take(&mut self.snapshots);
        let process = self.vm.as_ref().map(|vm| &vm.process);
        let done = allocate::allocate(&self.agent, &self.api, &self.claim, process, &snapshots);
        match done.await? {
            Ok(claim) => {
                self.renew(claim)?;
                Ok(None)
            }
            Err(wait) => Ok(Some(self.wait(wait))),
        }
    }

    async fn create_vfs(&mut self) -> Result<Option<End>, ReconcileError> {
        let _turn = self
            .agent
            .pf_turns
            .take(&self.recorded_device()?.physical_function)
            .await;
        match allocate::creation(&self.agent, &self.claim).await? {
            Ok(None) => {}
            Ok(Some((pf, count))) => {
                tracing::info!(pf = %pf.address, count, "creating VFs");
                let made = vf::blocking(&self.agent.kernel, move |kernel| {
                    vf::create(kernel, &pf, count)
                })
                .await;
                vf::unless_stuck(made)?;
                self.agent.tell_pool_changed();
            }
            Err(wait) => return Ok(Some(self.wait(wait))),
        }
        self.seen.vf = None;
        Ok(None)
    }

    async fn prepare(&mut self) -> Result<Option<End>, ReconcileError> {
        let device = self.recorded_device()?.clone();
        let _turn = self.agent.pf_turns.take(&device.physical_function).await;
        let pf = self.pf().await?;
        if let Err(wait) = allocate::may_write(&self.agent, &device.physical_function, &pf) {
            return Ok(Some(self.wait(wait)));
        }
        let want = self.granted()?;
        tracing::info!(pf = %pf.address, vf = device.vf_index, config = %want, "preparing");
        let done = vf::blocking(&self.agent.kernel, move |kernel| {
            vf::prepare(kernel, &pf, &device, &want)
        })
        .await?;
        self.device = Some(done);
        // That took a while, and it may run by now.
        self.seen.qemu.take_if(|qemu| *qemu == Qemu::Gone);
        // Read back under the held group just now.
        self.seen.vf = Some(VfSeen {
            vf: Vf::VfioFree,
            configured: true,
            clean: false,
        });
        Ok(None)
    }

    /// The device as the claim is to record it, from the kernel when this
    /// reconcile has not prepared it itself.
    async fn known_device(&self) -> Result<DeviceStatus, ReconcileError> {
        if let Some(device) = &self.device {
            return Ok(device.clone());
        }
        let pf = self.pf().await?;
        let device = self.recorded_device()?.clone();
        Ok(vf::blocking(&self.agent.kernel, move |kernel| {
            let index = device.vf_index;
            let vf = vf::find(kernel, &pf, index)?.ok_or(VfError::NoVf {
                pf: pf.address,
                index,
            })?;
            Ok(vf::described(&device, &vf))
        })
        .await?)
    }

    async fn take_vm_turn(&mut self) {
        if self.turn.is_none() {
            let pod_uid = self
                .status()
                .and_then(|s| {
                    let attached = s.attachment.as_ref().map(|a| a.pod_uid.clone());
                    attached.or_else(|| s.launcher.as_ref().map(|l| l.pod_uid.clone()))
                })
                .unwrap_or_default();
            self.turn = Some(self.agent.vm_turns.take(&pod_uid).await);
        }
    }

    async fn record_attachment(&mut self) -> Result<Option<End>, ReconcileError> {
        self.take_vm_turn().await;
        let vm = self.vm()?;
        let device = self.known_device().await?;
        let recorded = self.recorded_device()?.pci_address.as_ref();
        if recorded.is_some_and(|known| device.pci_address.as_ref() != Some(known)) {
            // The host renumbered it, and a claim's device does not change: it is given up
            // for another, or for itself.
            self.device = None;
            self.seen = Seen::default();
            self.clear_device().await?;
            return Ok(None);
        }
        match attach::record(&self.agent, &self.api, &self.claim, &vm, &device).await? {
            Ok(claim) => {
                self.renew(claim)?;
                Ok(None)
            }
            Err(wait) => Ok(Some(self.wait(wait))),
        }
    }

    async fn plug(&mut self) -> Result<Option<End>, ReconcileError> {
        self.take_vm_turn().await;
        if self.known_device().await? != *self.recorded_device()? {
            // Its VFs were made anew since: the recorded group may be another's by now.
            self.forget_attachment().await?;
            return Ok(None);
        }
        let vm = self.vm()?;
        let plugged = attach::plug(&self.agent, &self.claim, &vm).await?;
        self.turn = None;
        self.seen = Seen::default();
        match plugged {
            Ok(()) => Ok(None),
            Err(wait) => Ok(Some(self.wait(wait))),
        }
    }
}

#[cfg(test)]
mod storage_tests;
#[cfg(test)]
mod tests;
