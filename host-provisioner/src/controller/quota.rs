//! Grants under way: claims whose first grant may have been written and is not
//! in the cache yet. In memory only: after a restart the cache has them all.
//!
//! Two leaders at once may each give the last places, to different claims: each
//! grant is a compare-and-swap on its own claim, and none of them on the quota.
//! What was granted too much stays until claims go, as after a quota was lowered,
//! and no place is given before the guest is below its quota. The Lease makes
//! that rare, and nothing but a bound depends on it.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use common::api::VFClaim;
use kube::ResourceExt as _;

/// UIDs of claims with a place in their guest's quota, with their namespaces.
pub(super) type Reserved = HashSet<(String, String)>;

#[derive(Default)]
pub(super) struct Ledger(Mutex<Reserved>);

fn key(claim: &VFClaim) -> (String, String) {
    (
        claim.namespace().unwrap_or_default(),
        claim.uid().unwrap_or_default(),
    )
}

impl Ledger {
    /// Runs `f`, which must not block, with the ledger locked.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Reserved) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many claims of `claim`'s namespace, other than it, have a grant: by
    /// the cache, or under way.
    pub(super) fn others(reserved: &mut Reserved, claim: &VFClaim, cached: &[&VFClaim]) -> usize {
        let own = key(claim);
        for other in cached {
            // The cache has caught up with it.
            if granted(other) {
                reserved.remove(&key(other));
            }
        }
        let under_way = reserved
            .iter()
            .filter(|k| k.0 == own.0 && **k != own)
            .count();
        let cached = cached.iter().filter(|c| granted(c) && key(c) != own);
        cached.count() + under_way
    }

    pub(super) fn reserve(reserved: &mut Reserved, claim: &VFClaim) {
        reserved.insert(key(claim));
    }

    /// The grant was not written, or the claim goes.
    pub(super) fn forget(&self, claim: &VFClaim) {
        self.with(|reserved| reserved.remove(&key(claim)));
    }
}

fn granted(claim: &VFClaim) -> bool {
    claim.status.as_ref().is_some_and(|s| s.admitted.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::api::{VFClaimSpec, VFClaimStatus};

    fn claim(uid: &str, granted: bool) -> VFClaim {
        let mut claim = VFClaim::new(uid, VFClaimSpec::default());
        claim.metadata.uid = Some(uid.to_owned());
        claim.metadata.namespace = Some("ns".to_owned());
        let admitted = serde_json::from_value(serde_json::json!({
            "observedGeneration": 1, "className": "c", "classUID": "u",
            "network": {"macAddress": "02:00:00:00:00:01", "spoofCheck": true, "trust": false},
        }));
        claim.status = Some(VFClaimStatus {
            admitted: granted.then(|| admitted.unwrap()),
            ..VFClaimStatus::default()
        });
        claim
    }

    #[test]
    fn a_place_is_taken_once_from_decision_to_cache() {
        let ledger = Ledger::default();
        let (a, b) = (claim("a", false), claim("b", false));
        ledger.with(|r| Ledger::reserve(r, &a));
        let cold = [&a, &b];
        assert_eq!(ledger.with(|r| Ledger::others(r, &b, &cold)), 1);
        assert_eq!(ledger.with(|r| Ledger::others(r, &a, &cold)), 0);
        let now = claim("a", true);
        let warm = [&now, &b];
        assert_eq!(ledger.with(|r| Ledger::others(r, &b, &warm)), 1);
        // The claim went and its finalizer with it: its place is free.
        ledger.forget(&a);
        assert_eq!(ledger.with(|r| Ledger::others(r, &b, &[])), 0);
    }
}
