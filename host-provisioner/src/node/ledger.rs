//! Which claim has which VF, in this process: the point where allocation is
//! serialized, so that one VF never goes to two claims however stale a cache
//! is. Pure; the caller holds it behind a mutex and does no I/O meanwhile.
//!
//! An entry is made before the claim is written and leaves only on a positive
//! answer: the API server showed the claim without a device, or without that
//! UID. A timed-out write leaves its entry in place.

use std::collections::{BTreeSet, HashMap};

use common::api::{ClaimRef, VFClaim};
use thiserror::Error;

use super::pool::granted_config;
use crate::kernel::VfConfig;

/// A VF by the PF it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VfKey {
    /// Name of the `PhysicalFunction` object.
    pub physical_function: String,
    pub index: u16,
}

/// A claim's hold on a VF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub vf: VfKey,
    pub claim: ClaimRef,
    /// The granted MAC, lower case: one MAC is used once on a PF.
    pub mac_address: String,
    /// The namespace of its VF: one namespace is used once on a PF.
    pub namespace: Option<u32>,
    /// The granted settings; `None` when they cannot be read.
    pub wanted: Option<VfConfig>,
    /// The VM (`status.vm.uid`): claims may share an IOMMU group only in one VM.
    pub vm_uid: String,
    /// The launcher's pod.
    pub pod_uid: String,
    /// The claim is being deleted: its VF is being given up.
    pub going: bool,
    /// The recorded attachment's root port; `None`: no attachment is recorded.
    pub port: Option<String>,
    /// The claim's resourceVersion under which `status.device` was sent and not
    /// answered: until the claim has another one the write may still land.
    pub unanswered: Option<String>,
}

impl Entry {
    /// An attachment is recorded.
    #[must_use]
    pub const fn attached(&self) -> bool {
        self.port.is_some()
    }
}

/// Two claims that name one VF, or one namespace: neither may be acted on.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{what} of {physical_function} is named by claim {holder} and by claim {other}; the one that is not attached lets go of it"
)]
pub struct Doubled {
    pub physical_function: String,
    /// `VF 0`, or `namespace 1`.
    pub what: String,
    pub holder: String,
    pub other: String,
}

/// What the API server's answer about a claim is to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The claim is there and this node's.
    Mine,
    /// That UID is gone; whether a VF went back with it.
    Gone { freed: bool },
    /// It is another node's, or no node's yet.
    Elsewhere,
}

/// The ledger: claims by UID.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: HashMap<String, Entry>,
    /// PFs whose VFs are about to be made anew.
    resizing: BTreeSet<String>,
}

impl Ledger {
    /// The entry that a claim's own status asks for; `None` when it has no device.
    #[must_use]
    pub fn entry_of(claim: &VFClaim) -> Option<Entry> {
        let status = claim.status.as_ref()?;
        let device = status.device.as_ref()?;
        Some(Entry {
            vf: VfKey {
                physical_function: device.physical_function.clone(),
                index: device.vf_index,
            },
            claim: claim_ref(claim),
            mac_address: status
                .admitted
                .as_ref()
                .and_then(|a| a.network.as_ref())
                .map(|network| network.mac_address.to_ascii_lowercase())
                .unwrap_or_default(),
            namespace: device.namespace_id,
            wanted: status
                .admitted
                .as_ref()
                .and_then(|a| granted_config(a, device.namespace_id).ok()),
            vm_uid: status
                .vm
                .as_ref()
                .map(|vm| vm.uid.clone())
                .unwrap_or_default(),
            pod_uid: status
                .launcher
                .as_ref()
                .map(|l| l.pod_uid.clone())
                .unwrap_or_default(),
            going: claim.metadata.deletion_timestamp.is_some(),
            port: status.attachment.as_ref().map(|a| a.port.clone()),
            unanswered: None,
        })
    }

    /// Enters what the API server says of a claim, or takes it out when the
    /// claim has no device. The claim must come from a consistent read: it also says that
    /// an earlier claim of its name is gone.
    pub fn observe(&mut self, claim: &VFClaim) -> Result<(), Doubled> {
        let Some(uid) = claim.metadata.uid.as_deref() else {
            return Ok(());
        };
        self.forget_earlier(claim);
        match Self::entry_of(claim) {
            None => {
                let may_land = self.entries.get(uid).is_some_and(|entry| {
                    entry.unanswered.is_some()
                        && entry.unanswered == claim.metadata.resource_version
                });
                if !may_land {
                    self.entries.remove(uid);
                }
                Ok(())
            }
            Some(entry) => self.enter(entry),
        }
    }

    /// Takes out what an earlier claim of that name had: of this one a consistent read was made,
    /// and one name is one claim's at a time. Whether there was anything.
    pub fn forget_earlier(&mut self, claim: &VFClaim) -> bool {
        let (read, before) = (claim_ref(claim), self.entries.len());
        self.entries.retain(|uid, entry| {
            *uid == read.uid
                || entry.claim.name != read.name
                || entry.claim.namespace != read.namespace
        });
        self.entries.len() < before
    }

    /// Takes in what the API server answered when it was asked for the claim of that UID:
    /// `found` is what has the claim's name now. The one place where a VF is let go without
    /// its claim having been seen to give it up.
    pub fn answered(&mut self, found: Option<&VFClaim>, uid: &str, node: &str) -> Answer {
        let Some(claim) = found.filter(|c| c.metadata.uid.as_deref() == Some(uid)) else {
            let freed = self.entries.remove(uid).is_some();
            return Answer::Gone { freed };
        };
        let status = claim.status.as_ref();
        if status.and_then(|s| s.host_node.as_deref()) == Some(node) {
            return Answer::Mine;
        }
        // Another node's has no device of this one: a choice that was not written is given up.
        if status.is_none_or(|s| s.device.is_none()) {
            self.entries.remove(uid);
        }
        Answer::Elsewhere
    }

    /// Enters the claims of a consistent LIST. An attached one goes before any other on the
    /// same VF, because its VF may be in a QEMU; those who come too late are told.
    pub fn fill(&mut self, claims: &[VFClaim]) -> Vec<Doubled> {
        let attached = |claim: &&VFClaim| Self::entry_of(claim).is_some_and(|e| e.attached());
        let (first, rest): (Vec<_>, Vec<_>) = claims.iter().partition(attached);
        first
            .into_iter()
            .chain(rest)
            .filter_map(|claim| self.observe(claim).err())
            .collect()
    }

    /// Enters a choice before it is written.
    pub fn enter(&mut self, entry: Entry) -> Result<(), Doubled> {
        if let Some(doubled) = self.doubled(&entry) {
            return Err(doubled);
        }
        self.entries.insert(entry.claim.uid.clone(), entry);
        Ok(())
    }

    /// What another claim has already of what this one names.
    fn doubled(&self, entry: &Entry) -> Option<Doubled> {
        let mut others = self
            .on(&entry.vf.physical_function)
            .filter(|other| other.claim.uid != entry.claim.uid);
        others.find_map(|other| {
            let what = if other.vf == entry.vf {
                format!("VF {}", entry.vf.index)
            } else {
                let same = other.namespace == entry.namespace;
                format!("namespace {}", entry.namespace.filter(|_| same)?)
            };
            Some(Doubled {
                physical_function: entry.vf.physical_function.clone(),
                what,
                holder: name(&other.claim),
                other: name(&entry.claim),
            })
        })
    }

    /// Takes a claim out: a consistent read showed that this UID is gone.
    pub fn forget(&mut self, claim_uid: &str) {
        self.entries.remove(claim_uid);
    }

    /// The entry of a claim.
    #[must_use]
    pub fn of(&self, claim_uid: &str) -> Option<&Entry> {
        self.entries.get(claim_uid)
    }

    /// Who has a VF.
    #[must_use]
    pub fn holder(&self, vf: &VfKey) -> Option<&Entry> {
        self.entries.values().find(|entry| entry.vf == *vf)
    }

    /// The PFs that claims name.
    pub fn functions(&self) -> impl Iterator<Item = &str> {
        let names: BTreeSet<&str> = self
            .entries
            .values()
            .map(|e| e.vf.physical_function.as_str())
            .collect();
        names.into_iter()
    }

    /// All entries of one PF.
    pub fn on<'a>(&'a self, physical_function: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.entries
            .values()
            .filter(move |e| e.vf.physical_function == physical_function)
    }

    /// Keeps new choices off a PF whose VFs are to be made anew. False, and nothing is kept off,
    /// when a claim has one of them or it is being done already.
    pub fn begin_resize(&mut self, physical_function: &str) -> bool {
        let claimed = self.on(physical_function).next().is_some();
        !claimed && self.resizing.insert(physical_function.to_owned())
    }

    /// Lets claims have VFs of that PF again.
    pub fn end_resize(&mut self, physical_function: &str) {
        self.resizing.remove(physical_function);
    }

    /// Whether new choices are kept off that PF.
    #[must_use]
    pub fn resizing(&self, physical_function: &str) -> bool {
        self.resizing.contains(physical_function)
    }

    /// The claims with a recorded attachment in a launcher that are to keep it.
    #[must_use]
    pub fn kept_in(&self, pod_uid: &str) -> Vec<ClaimRef> {
        let all = self.entries.values();
        all.filter(|e| e.attached() && !e.going && e.pod_uid == pod_uid)
            .map(|e| e.claim.clone())
            .collect()
    }

    /// Claims with a recorded attachment in that launcher.
    #[must_use]
    pub fn attached_in(&self, pod_uid: &str) -> usize {
        self.entries
            .values()
            .filter(|e| e.attached() && e.pod_uid == pod_uid)
            .count()
    }

    /// Ports that other claims have recorded in the same launcher.
    #[must_use]
    pub fn ports_in(&self, pod_uid: &str, except_claim: &str) -> Vec<String> {
        self.entries
            .values()
            .filter(|e| e.pod_uid == pod_uid && e.claim.uid != except_claim)
            .filter_map(|e| e.port.clone())
            .collect()
    }
}

/// The reference of a claim.
#[must_use]
pub fn claim_ref(claim: &VFClaim) -> ClaimRef {
    ClaimRef {
        namespace: claim.metadata.namespace.clone().unwrap_or_default(),
        name: claim.metadata.name.clone().unwrap_or_default(),
        uid: claim.metadata.uid.clone().unwrap_or_default(),
    }
}

fn name(claim: &ClaimRef) -> String {
    format!("{}/{}", claim.namespace, claim.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uid: &str, index: u16) -> Entry {
        Entry {
            vf: VfKey {
                physical_function: "n-1".into(),
                index,
            },
            claim: ClaimRef {
                namespace: "ns".into(),
                name: uid.into(),
                uid: uid.into(),
            },
            mac_address: String::new(),
            namespace: None,
            wanted: None,
            vm_uid: "vm".into(),
            pod_uid: "pod".into(),
            going: false,
            port: None,
            unanswered: None,
        }
    }

    #[test]
    fn a_vf_goes_to_one_claim() {
        let mut ledger = Ledger::default();
        ledger.enter(entry("a", 0)).unwrap();
        ledger.enter(entry("a", 0)).unwrap();
        assert_eq!(ledger.enter(entry("b", 0)).unwrap_err().holder, "ns/a");
        ledger.enter(entry("b", 1)).unwrap();
        ledger.forget("a");
        ledger.enter(entry("c", 0)).unwrap();
        assert_eq!(ledger.on("n-1").count(), 2);
    }

    #[test]
    fn a_namespace_goes_to_one_claim() {
        let mut ledger = Ledger::default();
        let of = |uid, index, namespace| Entry {
            namespace,
            ..entry(uid, index)
        };
        ledger.enter(of("a", 0, Some(1))).unwrap();
        ledger.enter(of("a", 0, Some(1))).unwrap();
        let twice = ledger.enter(of("b", 1, Some(1))).unwrap_err();
        assert!(
            twice.to_string().starts_with("namespace 1 of n-1"),
            "{twice}"
        );
        ledger.enter(of("b", 1, Some(2))).unwrap();
        ledger.enter(of("c", 2, None)).unwrap();
        ledger.enter(of("d", 3, None)).unwrap();
        // That of another subsystem is another one.
        let mut elsewhere = of("e", 0, Some(1));
        elsewhere.vf.physical_function = "n-2".into();
        ledger.enter(elsewhere).unwrap();
    }

    #[test]
    fn a_write_that_may_still_land_keeps_its_vf() {
        let mut ledger = Ledger::default();
        ledger
            .enter(Entry {
                unanswered: Some("7".into()),
                ..entry("a", 0)
            })
            .unwrap();
        let mut claim = VFClaim::new("a", common::api::VFClaimSpec::default());
        claim.metadata.uid = Some("a".into());
        claim.metadata.resource_version = Some("7".into());
        ledger.observe(&claim).unwrap();
        assert!(ledger.of("a").is_some());
        claim.metadata.resource_version = Some("8".into());
        ledger.observe(&claim).unwrap();
        assert!(ledger.of("a").is_none());
    }

    #[test]
    fn one_name_is_one_claims_at_a_time() {
        let mut ledger = Ledger::default();
        let of = |uid: &str, name: &str| {
            let mut entry = entry(uid, 0);
            entry.claim.name = name.into();
            entry
        };
        let read = |uid: &str, name: &str, namespace: &str| {
            let mut claim = VFClaim::new(name, common::api::VFClaimSpec::default());
            claim.metadata.uid = Some(uid.into());
            claim.metadata.namespace = Some(namespace.into());
            claim
        };
        ledger.enter(of("a", "fast")).unwrap();
        ledger.observe(&read("b", "slow", "ns")).unwrap();
        ledger.observe(&read("b", "fast", "elsewhere")).unwrap();
        assert!(ledger.of("a").is_some());
        ledger.observe(&read("b", "fast", "ns")).unwrap();
        assert!(ledger.of("a").is_none());
    }

    #[test]
    fn an_attached_claim_is_entered_before_another_on_its_vf() {
        let claim = |uid: &str, attached: bool| {
            let mut claim = VFClaim::new(uid, common::api::VFClaimSpec::default());
            claim.metadata.uid = Some(uid.into());
            let attachment = serde_json::json!({
                "vmiUID": "v", "podUID": "pod", "qemuDeviceID": "d", "port": "rp9",
                "transport": "QmpSocket", "bootID": "b", "qemuStartTime": 1,
            });
            let status = serde_json::json!({
                "device": {"nodeName": "n", "physicalFunction": "n-1", "vfIndex": 0},
                "attachment": attached.then_some(attachment),
            });
            claim.status = Some(serde_json::from_value(status).unwrap());
            claim
        };
        let mut ledger = Ledger::default();
        let late = ledger.fill(&[claim("a", false), claim("b", true)]);
        assert_eq!(late.len(), 1);
        assert!(ledger.of("a").is_none() && ledger.of("b").is_some());
    }

    #[test]
    fn what_the_api_server_answers_frees_a_vf_only_of_a_claim_that_is_gone_or_elsewhere() {
        let mut claim = VFClaim::new("a", common::api::VFClaimSpec::default());
        claim.metadata.uid = Some("a".into());
        let node = |host: &str| {
            let status = serde_json::json!({ "hostNode": host });
            Some(serde_json::from_value(status).unwrap())
        };
        let mut ledger = Ledger::default();
        ledger.enter(entry("a", 0)).unwrap();
        claim.status = node("here");
        assert_eq!(ledger.answered(Some(&claim), "a", "here"), Answer::Mine);
        assert!(ledger.of("a").is_some());
        assert_eq!(
            ledger.answered(Some(&claim), "earlier", "here"),
            Answer::Gone { freed: false }
        );
        claim.status = node("there");
        assert_eq!(
            ledger.answered(Some(&claim), "a", "here"),
            Answer::Elsewhere
        );
        assert!(ledger.of("a").is_none());
        ledger.enter(entry("a", 0)).unwrap();
        assert_eq!(
            ledger.answered(None, "a", "here"),
            Answer::Gone { freed: true }
        );
    }

    #[test]
    fn a_pf_is_kept_from_new_choices_only_while_no_claim_has_a_vf_of_it() {
        let mut ledger = Ledger::default();
        ledger.enter(entry("a", 0)).unwrap();
        assert!(!ledger.begin_resize("n-1") && !ledger.resizing("n-1"));
        assert!(ledger.begin_resize("n-2"), "another PF");
        ledger.forget("a");
        assert!(ledger.begin_resize("n-1") && ledger.resizing("n-1"));
        assert!(!ledger.begin_resize("n-1"), "it is being done");
        ledger.end_resize("n-1");
        assert!(!ledger.resizing("n-1") && ledger.resizing("n-2"));
    }

    #[test]
    fn claims_in_one_launcher_are_counted_when_attached() {
        let mut ledger = Ledger::default();
        ledger.enter(entry("a", 0)).unwrap();
        ledger
            .enter(Entry {
                port: Some("rp9".into()),
                ..entry("b", 1)
            })
            .unwrap();
        assert_eq!(ledger.attached_in("pod"), 1);
        assert_eq!(ledger.ports_in("pod", "a"), ["rp9"]);
        assert_eq!(ledger.attached_in("elsewhere"), 0);
    }
}
