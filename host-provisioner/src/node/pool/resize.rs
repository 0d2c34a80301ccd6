//! When the number of a PF's VFs changes while no claim asks for more of them, and to which. Pure.
//!
//! The kernel's count goes 0 -> N or N -> 0 only, and going through 0 takes every VF from whoever
//! has it. So a change waits until each VF is proven free and no claim names any, and a VF is
//! never destroyed by itself. What is due is measured from the last change that was recorded:
//! the count alone does not say whether it is less than was asked for because VFs were destroyed.

use common::api::{ResizeStatus, VfState, WithheldReason};

use crate::driver::Growth;

use super::claim::Holder;
use super::foreign;
use super::view::{PfView, VfView};

/// A change of the number of VFs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The kernel's count.
    pub from: u16,
    pub to: u16,
    /// The `spec.numVFs` that it takes in.
    desired: Option<u16>,
    /// UIDs of the claims whose destroyed VFs go with it, and of those that went before and
    /// whose entries are still there.
    destroyed: Vec<String>,
}

impl Change {
    /// What the PF's status says of it.
    #[must_use]
    pub fn status(&self, complete: bool) -> ResizeStatus {
        ResizeStatus {
            num_vfs: self.to,
            desired_vfs: self.desired,
            destroyed: self.destroyed.clone(),
            complete,
        }
    }
}

/// What is to be done about a PF's number of VFs now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resize {
    /// The number is as it is to be, or the PF is not ours.
    Keep,
    /// It is so already: only the record of it is due.
    Settle(Change),
    /// To 0 first when there are any, then to the new number when that is not 0.
    Apply(Change),
    /// Wished, and waiting until nobody has a VF.
    Pending {
        change: Change,
        holders: Vec<Holder>,
        /// Indexes of the VFs that are retained.
        retained: Vec<u16>,
        /// VFs that somebody else on the host keeps from being free.
        foreign: usize,
    },
}

/// Whether the number of VFs is to change, and can. Only when each existing VF
/// is proven free and no claim names any, existing or not.
#[must_use]
pub fn resize(pf: &PfView) -> Resize {
    let Some((change, written)) = due(pf) else {
        return Resize::Keep;
    };
    if written {
        return Resize::Settle(change);
    }
    if is_idle(pf) {
        return Resize::Apply(change);
    }
    let retained = |vf: &&VfView| vf.withheld == Some(WithheldReason::Retained);
    Resize::Pending {
        change,
        holders: pf.holders().cloned().collect(),
        retained: pf.vfs.iter().filter(retained).map(|vf| vf.index).collect(),
        foreign: foreign(pf),
    }
}

/// Nobody has a VF of it: every one that the kernel counts is seen, and may go.
pub(super) fn is_idle(pf: &PfView) -> bool {
    let all_seen = pf.existing().count() == usize::from(pf.facts.num_vfs);
    all_seen && pf.vfs.iter().all(may_go)
}

/// Nobody has it, and nobody wants to look at it.
fn may_go(vf: &VfView) -> bool {
    match vf.state {
        VfState::Free => true,
        VfState::Retired => vf.withheld == Some(WithheldReason::Destroyed) && vf.foreign.is_none(),
        _ => false,
    }
}

/// The change that is due, whoever has VFs, and whether the kernel is as it asks for already.
fn due(pf: &PfView) -> Option<(Change, bool)> {
    let by_count = pf
        .capabilities
        .is_some_and(|capabilities| capabilities.growth == Growth::AllAtOnce);
    if !pf.is_ours() || pf.stuck.is_some() || !by_count {
        return None;
    }
    let (from, total) = (pf.facts.num_vfs, pf.facts.total_vfs);
    let last = pf.resize.as_ref();
    if let Some(begun) = last.filter(|last| !last.complete) {
        // Whoever began it did not come to its end.
        let to = begun.num_vfs.min(total);
        let change = Change {
            from,
            to,
            desired: begun.desired_vfs,
            destroyed: begun.destroyed.clone(),
        };
        return Some((change, from == to));
    }
    let asked_anew = last.and_then(|last| last.desired_vfs) != pf.desired;
    // A claim that has not let go of its VF yet waits for its entry.
    let has_it = |uid: &str| pf.holders().any(|holder| holder.claim.uid == uid);
    let destroyed: Vec<String> = pf
        .withheld
        .iter()
        .filter(|vf| vf.reason == WithheldReason::Destroyed && !has_it(&vf.claim.uid))
        .map(|vf| vf.claim.uid.clone())
        .collect();
    let most = pf.desired.map_or(total, |asked| asked.min(total));
    if !asked_anew && destroyed.is_empty() && from <= most {
        return None;
    }
    // One that was asked for before is not grown again by itself: VFs were destroyed.
    let base = match pf.desired {
        Some(_) if asked_anew => most,
        _ => from.min(most),
    };
    // Where there are no VFs a claim makes them, as many as are asked for then.
    let less = u16::try_from(destroyed.len()).unwrap_or(u16::MAX);
    let to = if from == 0 {
        0
    } else {
        base.saturating_sub(less)
    };
    let written = from == to && (from == 0 || destroyed.is_empty());
    let before = last.map(|last| last.destroyed.clone()).unwrap_or_default();
    let change = Change {
        from,
        to,
        desired: pf.desired,
        destroyed: before.into_iter().chain(destroyed).collect(),
    };
    Some((change, written))
}
