//! What a claim says to the pool. Pure.

use std::collections::{BTreeMap, BTreeSet};

use common::api::{Admitted, ClaimRef, GrantedNetwork, PfSelector, Placement, VFClaim};
use thiserror::Error;

use crate::kernel::{MacAddr, MacError, Storage, TxRate, VfConfig, VlanTag};
use crate::node::ledger::{Entry, Ledger, VfKey, claim_ref};

use super::Choice;

/// A claim that names a VF in `status.device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub claim: ClaimRef,
    /// UID of the VM (`status.vm.uid`): an IOMMU group is shared within one VM
    /// only. Empty when the claim names none, which is nobody's.
    pub vm_uid: String,
    /// Index of the VF on its PF.
    pub vf_index: u16,
    /// The MAC that was granted.
    pub mac: Option<MacAddr>,
    /// The namespace of its VF, `status.device.namespaceID`.
    pub namespace: Option<u32>,
    /// `status.attachment` is set.
    pub attached: bool,
}

impl Holder {
    /// The claim as the holder of a VF, with the name of the PF's object;
    /// `None` when it holds none.
    #[must_use]
    pub fn of(claim: &VFClaim) -> Option<(String, Self)> {
        let status = claim.status.as_ref()?;
        let device = status.device.as_ref()?;
        let admitted = status.admitted.as_ref();
        let mac = admitted.and_then(|granted| granted.network.as_ref());
        let holder = Self {
            claim: claim_ref(claim),
            vm_uid: status
                .vm
                .as_ref()
                .map_or_else(String::new, |vm| vm.uid.clone()),
            vf_index: device.vf_index,
            mac: mac.and_then(|network| network.mac_address.parse().ok()),
            namespace: device.namespace_id,
            attached: status.attachment.is_some(),
        };
        Some((device.physical_function.clone(), holder))
    }

    /// The claims on a PF, from the ledger.
    #[must_use]
    pub fn all(ledger: &Ledger, physical_function: &str) -> Vec<Self> {
        ledger
            .on(physical_function)
            .map(|entry| Self {
                claim: entry.claim.clone(),
                vm_uid: entry.vm_uid.clone(),
                vf_index: entry.vf.index,
                mac: entry.mac_address.parse().ok(),
                namespace: entry.namespace,
                attached: entry.attached(),
            })
            .collect()
    }
}

/// What a claim was granted, as far as the choice of a VF goes.
#[derive(Clone, Debug)]
pub struct Wish {
    pub claim: ClaimRef,
    /// UID of the claim's VM.
    pub vm_uid: String,
    pub selector: PfSelector,
    /// Labels of this node.
    pub node_labels: BTreeMap<String, String>,
    pub config: VfConfig,
    /// The namespaces of which it is to get one; `None`: it asks for a network interface.
    pub namespaces: Option<Vec<u32>>,
    /// The class's `numVFs`.
    pub num_vfs: Option<u16>,
    /// Which of several PFs goes first.
    pub placement: Placement,
    /// The NUMA nodes on which the VM runs. Empty: not known, or no PF is nearer than another.
    pub near: BTreeSet<u16>,
}

/// Why a claim is not to be given a VF yet.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WishError {
    #[error("the claim is not admitted yet")]
    NotAdmitted,
    #[error("the claim's VM is not known yet")]
    NoVm,
    #[error("the grant cannot be read: {0}")]
    Grant(#[from] GrantError),
}

/// Why a grant cannot be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GrantError {
    #[error(transparent)]
    Mac(#[from] MacError),
    #[error("it is neither of a network interface nor of storage alone")]
    Kind,
}

impl Wish {
    /// What the claim was granted; never what it asked for. Where its VM runs is not known yet.
    ///
    /// # Errors
    /// While the controller has not admitted it or found its VM.
    pub fn of(claim: &VFClaim, node_labels: &BTreeMap<String, String>) -> Result<Self, WishError> {
        let status = claim.status.as_ref().ok_or(WishError::NotAdmitted)?;
        let admitted = status.admitted.as_ref().ok_or(WishError::NotAdmitted)?;
        let vm = status.vm.as_ref().ok_or(WishError::NoVm)?;
        Ok(Self {
            claim: claim_ref(claim),
            vm_uid: vm.uid.clone(),
            selector: admitted.pf_selector.clone(),
            node_labels: node_labels.clone(),
            config: granted_config(admitted, None)?,
            namespaces: admitted.storage.as_ref().map(|s| s.namespaces.clone()),
            num_vfs: admitted.num_vfs,
            placement: admitted.placement,
            near: BTreeSet::new(),
        })
    }

    /// What the ledger is to have of a choice before it is written onto `claim`.
    #[must_use]
    pub fn entry(&self, claim: &VFClaim, choice: &Choice) -> Entry {
        let launcher = claim.status.as_ref().and_then(|s| s.launcher.as_ref());
        Entry {
            vf: VfKey {
                physical_function: choice.physical_function.clone(),
                index: choice.vf_index,
            },
            claim: self.claim.clone(),
            mac_address: self.config.mac.to_string(),
            namespace: choice.namespace,
            wanted: Some(match choice.namespace {
                Some(nsid) => VfConfig::of_storage(Storage::Namespace(nsid)),
                None => self.config,
            }),
            vm_uid: self.vm_uid.clone(),
            pod_uid: launcher.map(|l| l.pod_uid.clone()).unwrap_or_default(),
            going: false,
            port: None,
            unanswered: claim.metadata.resource_version.clone(),
        }
    }
}

/// What was granted in the kernel's terms, with the namespace that was chosen of it.
///
/// # Errors
/// [`GrantError`] when nothing of it, or not one thing alone, can be made of it.
pub fn granted_config(admitted: &Admitted, namespace: Option<u32>) -> Result<VfConfig, GrantError> {
    match (&admitted.network, &admitted.storage, namespace) {
        (Some(network), None, None) => Ok(wanted_config(network)?),
        (None, Some(_), None) => Ok(VfConfig::of_storage(Storage::Nothing)),
        (None, Some(_), Some(nsid)) => Ok(VfConfig::of_storage(Storage::Namespace(nsid))),
        _ => Err(GrantError::Kind),
    }
}

/// The granted settings in the kernel's terms.
///
/// # Errors
/// [`MacError`] when the granted MAC is none.
pub fn wanted_config(granted: &GrantedNetwork) -> Result<VfConfig, MacError> {
    Ok(VfConfig {
        mac: granted.mac_address.parse()?,
        vlan: granted.vlan.as_ref().map(|vlan| VlanTag {
            id: vlan.id,
            qos: vlan.qos.unwrap_or(0),
            protocol: vlan.protocol.unwrap_or_default(),
        }),
        spoof_check: granted.spoof_check,
        trust: granted.trust,
        link_state: granted.link_state,
        rate: TxRate {
            min: granted.min_tx_rate_mbps.unwrap_or(0),
            max: granted.max_tx_rate_mbps.unwrap_or(0),
        },
        ..VfConfig::CLEAN
    })
}
