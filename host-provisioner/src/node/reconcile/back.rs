//! The way back: what is done to a claim's VF when the claim is to have it no more, and what
//! its PhysicalFunction has to say before the claim forgets it.

use common::api::{ReclaimPolicy, WithheldReason, WithheldVf, reason, withholds};

use super::end::End;
use super::{Walk, listen, release};
use crate::node::error::ReconcileError;
use crate::node::plan::{Left, Seen, Wait};
use crate::node::vf;

impl Walk {
    /// What was granted; a claim that was granted nothing has no VF.
    pub(super) fn reclaim(&self) -> ReclaimPolicy {
        self.admitted()
            .map(|a| a.reclaim_policy)
            .unwrap_or_default()
    }

    /// Whether the claim's VF is withheld as was granted, as far as the watch knows. What it
    /// knows later is no less: an entry goes on an administrator's word, or with the VF.
    pub(super) fn withheld(&self) -> bool {
        let (Ok(device), Some(reason)) = (self.recorded_device(), self.reclaim().withholds())
        else {
            return false;
        };
        let (agent, name) = (&self.agent, &device.physical_function);
        let uid = self.claim.metadata.uid.as_deref().unwrap_or_default();
        // A choice of a dead agent, seen only after the VFs were made anew: it went with them.
        let gone = reason == WithheldReason::Destroyed
            && agent
                .resizes
                .last(agent, name)
                .is_some_and(|last| last.took(uid));
        gone || withholds(&agent.withheld(name), device.vf_index, reason)
    }

    /// Whether the claim's VF is withheld because of another claim.
    pub(super) fn withheld_from_it(&self) -> bool {
        let Ok(device) = self.recorded_device() else {
            return false;
        };
        let own = self.claim.metadata.uid.as_deref();
        let withheld = self.agent.withheld(&device.physical_function);
        let of_another = |vf: &WithheldVf| Some(vf.claim.uid.as_str()) != own;
        let mut all = withheld.iter();
        all.any(|vf| vf.vf_index == device.vf_index && of_another(vf))
    }

    /// The controller writes the entry when it sees that the claim is going, mostly long before
    /// the guest has let the device go. The watch of PhysicalFunctions tells of it.
    pub(super) async fn await_withheld(&mut self) -> Result<Option<End>, ReconcileError> {
        self.close_gates().await?;
        let device = self.recorded_device()?;
        let what = match self.reclaim().withholds() {
            Some(WithheldReason::Retained) => "kept as it is",
            Some(WithheldReason::Destroyed) | None => "taken away",
        };
        let message = format!(
            "VF {} of {} is out of the VM and is to be {what}; the claim goes when the host's \
             controller has recorded that in the PhysicalFunction",
            device.vf_index, device.physical_function
        );
        Ok(Some(self.wait(Wait {
            reason: reason::RELEASING,
            message,
        })))
    }

    /// Before the claim forgets where its attachment was; once in a walk.
    pub(super) async fn close_gates(&mut self) -> Result<(), ReconcileError> {
        if self.facts().attachment && !self.gates_closed {
            self.take_vm_turn().await;
            release::close_gates(&self.agent, &self.claim).await?;
            self.gates_closed = true;
            self.turn = None;
        }
        Ok(())
    }

    pub(super) async fn clear_device(&mut self) -> Result<(), ReconcileError> {
        let attached = self.facts().attachment;
        let claim = release::clear_device(&self.api, &self.claim).await?;
        self.renew(claim)?;
        // Of an attachment it was seen that QEMU has nothing; else it was looked, or is yet.
        let left = self.seen.left.take().or(attached.then_some(Left::Nothing));
        self.seen = Seen {
            left,
            ..Seen::default()
        };
        self.vm = None;
        listen::prune(&self.agent);
        self.agent.tell_pool_changed();
        Ok(())
    }

    pub(super) async fn forget_attachment(&mut self) -> Result<(), ReconcileError> {
        self.take_vm_turn().await;
        release::close_gates(&self.agent, &self.claim).await?;
        let claim = release::forget_attachment(&self.api, &self.claim).await?;
        self.renew(claim)?;
        self.turn = None;
        self.seen = Seen::default();
        listen::prune(&self.agent);
        Ok(())
    }

    pub(super) async fn clean(&mut self) -> Result<(), ReconcileError> {
        self.close_gates().await?;
        let device = self.recorded_device()?.clone();
        let _turn = self.agent.pf_turns.take(&device.physical_function).await;
        let pf = self.pf().await?;
        tracing::info!(pf = %pf.address, vf = device.vf_index, "cleaning");
        let cleaned = vf::blocking(&self.agent.kernel, move |kernel| {
            vf::clean(kernel, &pf, device.vf_index, device.namespace_id)
        })
        .await;
        if vf::unless_stuck(cleaned)?.is_some() {
            self.erased = true;
        } else {
            // The VF is Broken now.
            self.agent.tell_report_due();
        }
        self.seen.vf = None;
        Ok(())
    }
}

#[cfg(test)]
#[path = "back_tests.rs"]
mod tests;
