//! `SriovNode`: what a host node can do, written by its agent.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// Named as the node; there is nothing to wish for here.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "sriov.harvesterhci.io",
    version = "v1alpha1",
    kind = "SriovNode",
    plural = "sriovnodes",
    category = "sriov",
    status = "SriovNodeStatus",
    derive = "PartialEq",
    doc = "SriovNode is a node agent's report of what its host can do and what it lacks.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Kernel", type_ = "string", json_path = ".status.kernelVersion"),
    printcolumn(name = "Agent", type_ = "string", json_path = ".status.agentVersion"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct SriovNodeSpec {}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SriovNodeStatus {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub kernel_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub agent_version: Option<String>,
    #[serde(default, rename = "bootID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub boot_id: Option<String>,
    #[serde(default)]
    pub iommu: IommuStatus,
    /// Mode of the kernel's lockdown (`/sys/kernel/security/lockdown`), absent when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub lockdown: Option<String>,
    /// What keeps this node from serving claims, a sentence each, with what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 1024)))]
    pub missing: Vec<String>,
    /// What became of the `HostDriver`s that this node is to have, in the order in which they
    /// are loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub drivers: Vec<DriverStatus>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IommuStatus {
    /// The kernel has IOMMU groups.
    #[serde(default)]
    pub enabled: bool,
    /// Number of IOMMU groups.
    #[serde(default)]
    pub groups: u32,
}

/// A `HostDriver` on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DriverStatus {
    /// The `HostDriver`'s name.
    #[schemars(length(max = 253))]
    pub name: String,
    #[schemars(length(max = 55))]
    pub module: String,
    /// The kernel has the module, with the parameters asked for.
    #[serde(default)]
    pub ready: bool,
    /// A stable word: `Loaded`, `BuiltIn`, or why not.
    #[schemars(length(max = 64))]
    pub reason: String,
    #[schemars(length(max = 1024))]
    pub message: String,
    /// Generation of the `HostDriver` that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}
