//! Orphans, decided: copies on the host whose claim this cluster no longer has.
//!
//! Pure: what two looks saw and a clock's values in, a plan out; `orphan_pass`
//! looks and carries it out. A copy goes only when this cluster itself has said
//! twice that its claim is gone. Many at once are rather a cluster that was
//! restored from a backup than claims that went: then an administrator decides.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use common::api::{DELETE_ORPHANS_ANNOTATION, VFClaim, host_claim_name};
use kube::ResourceExt as _;
use sha2::{Digest as _, Sha256};

use super::up::GuestId;

/// So many orphans are deleted unasked, however few copies there are.
const FEW: usize = 5;
/// And of many copies this part: one in five.
const PART: usize = 5;
/// Bytes of the digest that stand for a set of orphans in its release.
const DIGEST_BYTES: usize = 8;

/// One of our copies on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCopy {
    pub name: String,
    pub uid: String,
    pub resource_version: String,
    /// It is being deleted already.
    pub going: bool,
    /// The guest's claim that it was made for.
    pub claim_namespace: String,
    pub claim_name: String,
    pub claim_uid: String,
}

/// What this cluster's API server says of a copy's claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There is a claim of that name, with this UID. One that is being deleted
    /// is there: its finalizer takes the copy down.
    Claim(String),
    /// There is none, in the API server's own words about that very name.
    NotFound,
    /// No such answer, or not asked.
    Unknown,
}

/// A complete list of our copies, and what was then heard of their claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    pub begun: Instant,
    pub ended: Instant,
    /// UID of the cluster that was asked, before the first question and after the last.
    pub clusters: [String; 2],
    /// By UID of the copy.
    pub sights: BTreeMap<String, Sight>,
}

/// One copy in a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    pub copy: HostCopy,
    pub answer: Answer,
}

/// More orphans than are deleted unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mass {
    pub orphans: Vec<HostCopy>,
    /// Copies of ours that are not being deleted, orphans or not.
    pub copies: usize,
    /// How many would have been deleted unasked.
    pub limit: usize,
    /// The word that releases this set and no other.
    pub word: String,
}

/// What is to be done after two looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// There is no orphan.
    Keep,
    /// Each if it is still as it was seen.
    Delete(Vec<HostCopy>),
    /// So many, but an administrator has confirmed this very set.
    DeleteReleased(Mass),
    Brake(Mass),
    /// Few orphans or none, and so many copies without a clear answer that there
    /// may be a mass of them.
    Unsure {
        orphans: usize,
        doubtful: usize,
    },
    /// Another cluster answered than the one that our copies are of.
    AnotherCluster,
}

/// What two looks say of a copy.
enum Standing {
    Lives,
    Orphan,
    Doubtful,
}

/// The copy, if we made it: anything else in the namespace is foreign, and
/// never touched.
#[must_use]
pub fn ours(found: &VFClaim, guest: &GuestId) -> Option<HostCopy> {
    let of = found.spec.guest.as_ref()?;
    let made_by_us = of.cluster == guest.cluster
        && of.cluster_uid == guest.cluster_uid
        && found.name_any() == host_claim_name(&of.uid);
    made_by_us.then(|| HostCopy {
        name: found.name_any(),
        uid: found.uid().unwrap_or_default(),
        resource_version: found.resource_version().unwrap_or_default(),
        going: found.metadata.deletion_timestamp.is_some(),
        claim_namespace: of.namespace.clone(),
        claim_name: of.name.clone(),
        claim_uid: of.uid.clone(),
    })
}

impl Look {
    /// Whether this look saw the claim of the copy `uid` alive.
    #[must_use]
    pub fn saw_alive(&self, uid: &str) -> bool {
        self.sights.get(uid).is_some_and(Sight::alive)
    }

    /// How many copies it did not see the claims of.
    #[must_use]
    pub fn suspects(&self) -> usize {
        let suspect = |s: &&Sight| !s.copy.going && !s.alive();
        self.sights.values().filter(suspect).count()
    }
}

impl Sight {
    fn alive(&self) -> bool {
        matches!(&self.answer, Answer::Claim(uid) if *uid == self.copy.claim_uid)
    }

    fn gone(&self) -> bool {
        match &self.answer {
            Answer::NotFound => true,
            Answer::Claim(uid) => *uid != self.copy.claim_uid,
            Answer::Unknown => false,
        }
    }
}

/// How many orphans of so many copies are deleted unasked.
#[must_use]
pub fn limit(copies: usize) -> usize {
    FEW.max(copies / PART)
}

/// What to do after two looks, at least `apart` from each other, into the
/// cluster `cluster_uid`; `release` is the word that an administrator has given.
#[must_use]
pub fn plan(
    cluster_uid: &str,
    apart: Duration,
    first: &Look,
    second: &Look,
    release: Option<&str>,
) -> Plan {
    let mut asked = first.clusters.iter().chain(&second.clusters);
    if !asked.all(|c| c == cluster_uid) {
        return Plan::AnotherCluster;
    }
    // A look that is too close is none: it may have met the same moment.
    let first = (second.begun.saturating_duration_since(first.ended) >= apart).then_some(first);
    let copies: Vec<&Sight> = second.sights.values().filter(|s| !s.copy.going).collect();
    let (mut orphans, mut doubtful) = (Vec::new(), 0);
    for sight in &copies {
        let before = first.and_then(|look| look.sights.get(&sight.copy.uid));
        match standing(before, sight) {
            Standing::Lives => {}
            Standing::Orphan => orphans.push(sight.copy.clone()),
            Standing::Doubtful => doubtful += 1,
        }
    }
    let limit = limit(copies.len());
    if orphans.len() > limit {
        let mass = Mass {
            word: word(cluster_uid, &orphans),
            copies: copies.len(),
            orphans,
            limit,
        };
        if release == Some(mass.word.as_str()) {
            Plan::DeleteReleased(mass)
        } else {
            Plan::Brake(mass)
        }
    } else if orphans.len() + doubtful > limit {
        Plan::Unsure {
            orphans: orphans.len(),
            doubtful,
        }
    } else if orphans.is_empty() {
        Plan::Keep
    } else {
        Plan::Delete(orphans)
    }
}

fn standing(before: Option<&Sight>, now: &Sight) -> Standing {
    match before {
        _ if now.alive() => Standing::Lives,
        Some(before) if before.gone() && now.gone() => Standing::Orphan,
        // The second look asks only after what the first did not see alive.
        Some(before) if before.alive() && now.answer == Answer::Unknown => Standing::Lives,
        _ => Standing::Doubtful,
    }
}

/// The word for a set of orphans. Of their UIDs, so that one that was given for
/// a set releases no other, and none a second time: what was deleted is never
/// met again under its UID.
fn word(cluster_uid: &str, orphans: &[HostCopy]) -> String {
    let mut uids: Vec<&str> = orphans.iter().map(|c| c.uid.as_str()).collect();
    uids.sort_unstable();
    let mut digest = Sha256::new_with_prefix(cluster_uid);
    for uid in &uids {
        digest.update([b'\n']);
        digest.update(uid);
    }
    let digest = digest.finalize();
    let hex: String = digest
        .iter()
        .take(DIGEST_BYTES)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{}-{hex}", uids.len())
}

impl Mass {
    /// What an administrator of this cluster is told.
    #[must_use]
    pub fn message(&self) -> String {
        let (orphans, word) = (self.orphans.len(), &self.word);
        format!(
            "{orphans} of this cluster's {} copies on the host are of VFClaims that this cluster no \
             longer has; more than {} are not deleted unasked, so none was. Was the cluster restored \
             from a backup? VFClaims that are restored with their UIDs keep their copies. The log \
             of the guest-syncer names the claims. If their VFs may be taken out of the VMs: \
             kubectl annotate namespace kube-system --overwrite {DELETE_ORPHANS_ANNOTATION}={word} \
             (this word is for these {orphans} alone; it is taken up at once, after two more looks)",
            self.copies, self.limit
        )
    }
}

/// Objects by name, with their resourceVersions.
pub type Versions = HashMap<String, String>;

/// Whether a cache is deaf: it says the same before and after the host was
/// listed, and other than the list. A host restored from a backup counts its
/// versions anew from an earlier one, and tells a watch from a later one nothing.
#[must_use]
pub fn deaf(before: &Versions, listed: &Versions, after: &Versions) -> bool {
    let names = before.keys().chain(listed.keys());
    names.into_iter().any(|name| {
        let cached = before.get(name);
        cached == after.get(name) && cached != listed.get(name)
    })
}

#[cfg(test)]
#[path = "orphans_tests.rs"]
mod tests;
