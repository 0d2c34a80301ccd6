//! `PhysicalFunction`: one SR-IOV-capable function of one host node.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// The node agent makes the object; an administrator decides in `managed`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "sriov.harvesterhci.io",
    version = "v1alpha1",
    kind = "PhysicalFunction",
    plural = "physicalfunctions",
    shortname = "pf",
    category = "sriov",
    status = "PhysicalFunctionStatus",
    derive = "PartialEq",
    doc = "PhysicalFunction is an SR-IOV-capable PCI function of a host node and the pool of its VFs.",
    selectable = ".spec.nodeName",
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Address", type_ = "string", json_path = ".status.pciAddress"),
    printcolumn(
        name = "Interface",
        type_ = "string",
        json_path = ".status.interfaceName"
    ),
    printcolumn(name = "Driver", type_ = "string", json_path = ".status.driver"),
    printcolumn(name = "Managed", type_ = "boolean", json_path = ".spec.managed"),
    printcolumn(name = "VFs", type_ = "integer", json_path = ".status.numVFs"),
    printcolumn(name = "Free", type_ = "integer", json_path = ".status.counts.free"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[x_kube(
    validation = Rule::new("self.nodeName == oldSelf.nodeName").message("nodeName is immutable"),
    validation = Rule::new("self.identity == oldSelf.identity").message("identity is immutable: consent must not move to other hardware")
)]
#[serde(rename_all = "camelCase")]
pub struct PhysicalFunctionSpec {
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The device's stable identity (serial number or permanent MAC, and slot),
    /// because PCI addresses renumber when a card is added.
    #[schemars(length(min = 1, max = 256))]
    pub identity: String,
    /// An administrator's consent. Hardware is never taken over unasked.
    #[serde(default)]
    pub managed: bool,
    /// The number of VFs to have, applied while none of them is in use. Left
    /// out: the class's, or as many as the device can have. VFs that are
    /// destroyed are missing from it until it is changed or there are none left.
    #[serde(default, rename = "numVFs", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub num_vfs: Option<u16>,
    /// VFs that nobody gets though no claim has them, by index. Written by the
    /// controller as their claims go; an administrator takes an entry out to
    /// give the VF back, which is reset before anybody gets it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["vfIndex"])
    )]
    pub withheld: Vec<WithheldVf>,
}

impl ResizeStatus {
    /// Whether the VF of that claim was destroyed and has gone.
    #[must_use]
    pub fn took(&self, claim_uid: &str) -> bool {
        self.complete && self.destroyed.iter().any(|uid| uid == claim_uid)
    }
}

impl PhysicalFunction {
    /// The entries of `spec.withheld` that are in force, as far as `status` says.
    #[must_use]
    pub fn withheld(&self) -> Vec<WithheldVf> {
        let status = self.status.as_ref();
        withheld_in_force(&self.spec.withheld, status.and_then(|s| s.resize.as_ref()))
    }
}

/// The entries that keep their VFs from everybody: all but those whose VFs went
/// with a change of the count that is complete. Their indexes are other VFs' by now.
#[must_use]
pub fn withheld_in_force(
    withheld: &[WithheldVf],
    resize: Option<&ResizeStatus>,
) -> Vec<WithheldVf> {
    let settled = |vf: &WithheldVf| {
        vf.reason == WithheldReason::Destroyed && resize.is_some_and(|r| r.took(&vf.claim.uid))
    };
    withheld.iter().filter(|vf| !settled(vf)).cloned().collect()
}

/// Whether the VF of that index is withheld for this reason, or is retained,
/// which keeps it from more. The claim does not matter: an index is withheld
/// once, also where two claims named it.
#[must_use]
pub fn withholds(withheld: &[WithheldVf], vf_index: u16, reason: WithheldReason) -> bool {
    withheld.iter().any(|vf| {
        vf.vf_index == vf_index && (vf.reason == reason || vf.reason == WithheldReason::Retained)
    })
}

/// A VF that nobody gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WithheldVf {
    /// Index as in the kernel's `virtfn<index>`.
    pub vf_index: u16,
    pub reason: WithheldReason,
    /// The claim that had it last.
    pub claim: ClaimRef,
}

/// Why a VF is withheld.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WithheldReason {
    /// It is to go: the PF has one VF less as soon as none of them is in use.
    Destroyed,
    /// It is kept as its last holder left it, until an administrator takes the
    /// entry out. Nor is the number of VFs changed before that.
    Retained,
}

/// A debounced report: it can be rebuilt from the kernel and the claims.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PhysicalFunctionStatus {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 12))]
    pub pci_address: Option<String>,
    #[serde(default, rename = "vendorID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4))]
    pub vendor_id: Option<String>,
    #[serde(default, rename = "deviceID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4))]
    pub device_id: Option<String>,
    /// The kernel driver, absent when none is bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub driver: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15))]
    pub interface_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 17))]
    pub mac_address: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// The NUMA node that it is next to; absent where the kernel does not say (`numa_node` is -1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u16>,
    /// The most VFs that the device can have (`sriov_totalvfs`).
    #[serde(default, rename = "totalVFs")]
    pub total_vfs: u16,
    /// The kernel's count (`sriov_numvfs`).
    #[serde(default, rename = "numVFs")]
    pub num_vfs: u16,
    /// What its driver can set on a VF; absent while there is no backend for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<VfCapabilities>,
    #[serde(default)]
    pub counts: VfCounts,
    /// The last change of the count that the agent has begun by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<ResizeStatus>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub vfs: Vec<VfStatus>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

/// What the kernel driver of a PF can set on a VF. A claim that asks for more gets no VF of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VfCapabilities {
    #[serde(default)]
    pub vlan: bool,
    /// A VLAN with a priority.
    #[serde(default)]
    pub vlan_qos: bool,
    /// A VLAN of protocol 802.1ad.
    #[serde(default, rename = "vlan8021ad")]
    pub vlan_8021ad: bool,
    #[serde(default)]
    pub spoof_check: bool,
    #[serde(default)]
    pub trust: bool,
    /// Link state Enable.
    #[serde(default)]
    pub link_enable: bool,
    /// Link state Disable.
    #[serde(default)]
    pub link_disable: bool,
    /// A minimum transmit rate.
    #[serde(default)]
    pub min_tx_rate: bool,
    /// The least maximum transmit rate that it can limit to, in Mbit/s; absent: it limits none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tx_rate_from_mbps: Option<u32>,
    /// NVMe namespaces, and no network interface.
    #[serde(default)]
    pub namespaces: bool,
}

/// A change of the number of VFs. Recorded before the kernel is written, since
/// afterwards nothing else would tell whose VFs went with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResizeStatus {
    /// The count that is made.
    #[serde(rename = "numVFs")]
    pub num_vfs: u16,
    /// The `spec.numVFs` that has been taken in with it; absent: there was none.
    #[serde(
        default,
        rename = "desiredVFs",
        skip_serializing_if = "Option::is_none"
    )]
    pub desired_vfs: Option<u16>,
    /// UIDs of the claims whose destroyed VFs go with it. When it is complete
    /// the controller takes their entries out of `spec.withheld`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 64)))]
    pub destroyed: Vec<String>,
    /// The kernel has been written.
    pub complete: bool,
}

/// VFs by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VfCounts {
    #[serde(default)]
    pub free: u16,
    #[serde(default)]
    pub allocated: u16,
    #[serde(default)]
    pub attached: u16,
    #[serde(default)]
    pub foreign: u16,
    #[serde(default)]
    pub broken: u16,
    #[serde(default)]
    pub retired: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VfStatus {
    pub index: u16,
    #[schemars(length(max = 12))]
    pub pci_address: String,
    pub state: VfState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim_ref: Option<ClaimRef>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VfState {
    /// No claim names it and nobody holds it.
    Free,
    /// A claim names it.
    Allocated,
    /// A claim names it and QEMU has it.
    Attached,
    /// No claim names it but somebody holds it, or another driver has it, or
    /// its IOMMU group has a stranger: never used.
    Foreign,
    /// The kernel has not come back from a write about it: nobody gets it until it has.
    Broken,
    /// No claim names it and `spec.withheld` does: nobody gets it.
    Retired,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimRef {
    #[schemars(length(max = 63))]
    pub namespace: String,
    #[schemars(length(max = 253))]
    pub name: String,
    #[schemars(length(max = 64))]
    pub uid: String,
}
