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
    /// out: the class's, or as many as the device can have.
    #[serde(default, rename = "numVFs", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub num_vfs: Option<u16>,
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
