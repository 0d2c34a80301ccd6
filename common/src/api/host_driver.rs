//! `HostDriver`: a kernel module that the host's nodes are to have.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// An administrator's wish; what became of it on a node is said in that node's `SriovNode`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "sriov.harvesterhci.io",
    version = "v1alpha1",
    kind = "HostDriver",
    plural = "hostdrivers",
    category = "sriov",
    status = "HostDriverStatus",
    derive = "PartialEq",
    doc = "HostDriver is a kernel module that the host's nodes are to have loaded, with its parameters. Deleting it unloads nothing.",
    printcolumn(name = "Module", type_ = "string", json_path = ".spec.module"),
    printcolumn(
        name = "Selected",
        type_ = "integer",
        json_path = ".status.nodes.selected"
    ),
    printcolumn(name = "Loaded", type_ = "integer", json_path = ".status.nodes.loaded"),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.nodes.failed"),
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
    validation = Rule::new("self.module == oldSelf.module").message("module is immutable: make another HostDriver"),
    validation = Rule::new("!has(self.parameters) || self.parameters.all(name, name.matches('^[A-Za-z0-9_]{1,64}$'))").message("a parameter's name consists of letters, digits and _")
)]
#[serde(rename_all = "camelCase")]
pub struct HostDriverSpec {
    /// The module's name, as modprobe takes it; of the host's own modules for the kernel that
    /// runs. What it depends on is loaded before it.
    #[schemars(
        length(min = 1, max = 55),
        regex(pattern = "^[A-Za-z0-9_][A-Za-z0-9_-]*$")
    )]
    pub module: String,
    /// The module's parameters. A loaded module is given others only by being loaded again,
    /// which is done when nothing uses it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "parameters")]
    pub parameters: BTreeMap<String, String>,
    /// Modules of a lower order are loaded first; within one order by the objects' names.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub order: i32,
    /// Labels of the nodes that are to have it; empty: all that run a node agent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::labels")]
    pub node_selector: BTreeMap<String, String>,
}

/// Values have no white space and no quotes: the kernel would part or join them
/// (kernel/params.c, `next_arg`).
fn parameters(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "maxProperties": 32,
        "additionalProperties": {"type": "string", "maxLength": 256, "pattern": "^[^\\s\"]*$"}
    })
}

/// Counts alone: the truth about a node is in its `SriovNode`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostDriverStatus {
    #[serde(default)]
    pub nodes: NodeCounts,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

/// Nodes whose agents have said something about a `HostDriver`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeCounts {
    /// Nodes that are to have it.
    #[serde(default)]
    pub selected: u32,
    /// Nodes that have it as asked for.
    #[serde(default)]
    pub loaded: u32,
    /// Nodes that have it not, or not as asked for.
    #[serde(default)]
    pub failed: u32,
}
