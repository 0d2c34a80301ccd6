//! What a `PhysicalFunction` withholds: which VFs are to be entered before their claims let go
//! of them, and which entries are settled. Pure.

use common::api::{ClaimRef, PhysicalFunction, VFClaim, WithheldReason, WithheldVf, withholds};
use kube::ResourceExt as _;

/// An entry that is due in the `PhysicalFunction` of this name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withhold {
    pub physical_function: String,
    pub entry: WithheldVf,
}

/// The entry that a claim needs: it is going, has a VF still, and was granted that the VF does
/// not go back to the pool.
///
/// It is due as soon as the claim is going, which is not taken back, so that its VF need not
/// wait once the guest has let go of it. Until then the claim itself has the VF.
#[must_use]
pub fn due(claim: &VFClaim) -> Option<Withhold> {
    claim.metadata.deletion_timestamp.as_ref()?;
    let status = claim.status.as_ref()?;
    let device = status.device.as_ref()?;
    let reason = status.admitted.as_ref()?.reclaim_policy.withholds()?;
    Some(Withhold {
        physical_function: device.physical_function.clone(),
        entry: WithheldVf {
            vf_index: device.vf_index,
            reason,
            claim: ClaimRef {
                namespace: claim.namespace().unwrap_or_default(),
                name: claim.name_any(),
                uid: claim.uid().unwrap_or_default(),
            },
        },
    })
}

/// `spec.withheld` with the entry in it, in the order of the indexes; `None` when the VF is
/// withheld so already. An index is there once: one that was to be destroyed and is to be
/// retained now is retained.
#[must_use]
pub fn entered(pf: &PhysicalFunction, entry: &WithheldVf) -> Option<Vec<WithheldVf>> {
    let mut all = pf.withheld();
    let resize = pf.status.as_ref().and_then(|status| status.resize.as_ref());
    // Its claim was written by an agent that died, and the VFs went before anybody saw it.
    let gone = entry.reason == WithheldReason::Destroyed
        && resize.is_some_and(|resize| resize.took(&entry.claim.uid));
    if gone || withholds(&all, entry.vf_index, entry.reason) {
        return None;
    }
    all.retain(|other| other.vf_index != entry.vf_index);
    all.push(entry.clone());
    all.sort_by_key(|vf| vf.vf_index);
    Some(all)
}

/// `spec.withheld` without the entries whose VFs are gone; `None` when there is none of them.
#[must_use]
pub fn settled(pf: &PhysicalFunction) -> Option<Vec<WithheldVf>> {
    let left = pf.withheld();
    (left.len() < pf.spec.withheld.len()).then_some(left)
}

#[cfg(test)]
#[path = "withhold_tests.rs"]
mod tests;
