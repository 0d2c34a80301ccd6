//! `VFClass`: from which PFs a claim's VF comes and what a claim may choose.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ClassNetwork, ClassStorage, NetworkField, WithheldReason, schema};

/// A kind of VF that tenants can ask for. On the host it decides; its copies in
/// guest clusters carry no selector and are for information.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "sriov.harvesterhci.io",
    version = "v1alpha1",
    kind = "VFClass",
    plural = "vfclasses",
    shortname = "vfcl",
    category = "sriov",
    status = "VFClassStatus",
    derive = "PartialEq",
    doc = "VFClass says which physical functions VFs come from, their network defaults, and what a claim may choose.",
    printcolumn(
        name = "Description",
        type_ = "string",
        json_path = ".spec.description"
    ),
    printcolumn(
        name = "Default",
        type_ = "string",
        json_path = ".metadata.annotations.sriov\\.harvesterhci\\.io/is-default-class"
    ),
    printcolumn(name = "Free", type_ = "integer", json_path = ".status.free"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[x_kube(
    validation = Rule::new("!has(self.storage) || !has(self.network) || !(has(self.network.vlan) || has(self.network.spoofCheck) || has(self.network.trust) || has(self.network.linkState) || has(self.network.minTxRateMbps) || has(self.network.maxTxRateMbps))").message("network and storage do not mix: a class hands out network interfaces or NVMe namespaces")
)]
#[serde(rename_all = "camelCase")]
pub struct VFClassSpec {
    /// For the people who choose among classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub description: Option<String>,
    /// Which PFs. Empty: every managed PF.
    #[serde(default)]
    pub pf_selector: PfSelector,
    /// Defaults of the VF's network settings.
    #[serde(default)]
    pub network: ClassNetwork,
    /// The NVMe namespaces to hand out, where the class is for storage. Its
    /// claims have no network settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<ClassStorage>,
    /// The network settings that a claim may choose; asking for another is
    /// refused. A tenant must not grant itself trust, so the default is MacAddress alone.
    #[serde(default = "default_overrides")]
    #[schemars(length(max = 8))]
    pub allowed_overrides: Vec<NetworkField>,
    /// The number of VFs an idle PF of this class is given when its
    /// `PhysicalFunction` says nothing. Left out: as many as it can have.
    #[serde(default, rename = "numVFs", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub num_vfs: Option<u16>,
    /// What becomes of a claim's VF when the claim goes. Recorded when the claim
    /// is granted; later edits do not reach it.
    #[serde(default)]
    pub reclaim_policy: ReclaimPolicy,
    /// From which of several PFs of its VM's node a claim's VF comes. A PF on the
    /// NUMA node of the VM's CPUs goes first, where they are known and not on all
    /// nodes: a far one costs its VM with each packet. Among near PFs, and among
    /// the others when no near one has a VF, the placement decides. Recorded when
    /// the claim is granted; later edits do not reach it.
    #[serde(default)]
    pub placement: Placement,
}

/// What is left of a class. A report, which can be made from nothing at any time and is a
/// moment behind: nobody is promised a VF by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VFClassStatus {
    /// VFs that claims of this class could get now, on all host nodes together:
    /// free ones, and those that a PF without VFs would be given. Classes that
    /// select the same PFs count the same VFs. Absent: not counted yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<u32>,
    /// The same by host node, of the nodes that have PFs for the class: all of
    /// them, or the 1024 with the most free VFs. Not told to guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 1024),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub nodes: Vec<NodeCapacity>,
    /// `metadata.generation` of the spec that was counted by. Not told to guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
}

/// What is left of a class on one host node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeCapacity {
    /// The host node.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// VFs that claims of this class could get there now.
    pub free: u32,
}

/// From which of several PFs of a node a VF comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Placement {
    /// From one that is in use already, and of those from the one with the fewest
    /// free VFs: the others stay idle, and only an idle PF's number of VFs can change.
    #[default]
    Pack,
    /// From the one with the most free VFs, counting those that an idle PF would
    /// be given: claims share the bandwidth of all PFs, and fewer of them fail
    /// together.
    Spread,
}

/// What becomes of a VF when its claim goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ReclaimPolicy {
    /// It is reset and goes back to the pool.
    #[default]
    Return,
    /// It is reset, nobody gets it, and the PF has one VF less as soon as none
    /// of them is in use.
    Destroy,
    /// It is taken out of the VM and left as it is, and nobody gets it until an
    /// administrator takes it out of the PhysicalFunction's `spec.withheld`.
    Retain,
}

impl ReclaimPolicy {
    /// Why a VF is withheld that is reclaimed so; `None` where it goes back to the pool.
    #[must_use]
    pub const fn withholds(self) -> Option<WithheldReason> {
        match self {
            Self::Return => None,
            Self::Destroy => Some(WithheldReason::Destroyed),
            Self::Retain => Some(WithheldReason::Retained),
        }
    }
}

fn default_overrides() -> Vec<NetworkField> {
    vec![NetworkField::MacAddress]
}

/// All given fields must match; within a list any entry matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PfSelector {
    /// Kernel drivers of the PF, such as `igb`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 64)))]
    pub drivers: Vec<String>,
    /// PCI vendor ids of the PF, four hex digits.
    #[serde(default, rename = "vendorIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(max = 4), regex(pattern = r"^[0-9a-f]{4}$"))
    )]
    pub vendor_ids: Vec<String>,
    /// PCI device ids of the PF, four hex digits.
    #[serde(default, rename = "deviceIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(max = 4), regex(pattern = r"^[0-9a-f]{4}$"))
    )]
    pub device_ids: Vec<String>,
    /// PCI addresses of the PF, as in `0000:03:00.0`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        inner(
            length(max = 12),
            regex(pattern = r"^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$")
        )
    )]
    pub pci_addresses: Vec<String>,
    /// Network interfaces of the PF.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 15)))]
    pub interface_names: Vec<String>,
    /// Labels of the host node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::labels")]
    pub node_selector: BTreeMap<String, String>,
}
