//! `GuestCluster`: a tenant's cluster, as the host's administrator knows it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ClassNetwork, ClassStorage, NetworkField, Placement, ReclaimPolicy, schema};

/// The administrator's word on which VMs, classes and how many VFs a guest has.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "sriov.harvesterhci.io",
    version = "v1alpha1",
    kind = "GuestCluster",
    plural = "guestclusters",
    shortname = "vfgc",
    category = "sriov",
    status = "GuestClusterStatus",
    derive = "PartialEq",
    doc = "GuestCluster names a tenant's cluster: its namespace for claims, its VMs, its classes and its quota.",
    printcolumn(name = "Claim-Namespace", type_ = "string", json_path = ".spec.claimNamespace"),
    printcolumn(name = "Claims", type_ = "integer", json_path = ".status.claims"),
    printcolumn(name = "Cordoned", type_ = "boolean", json_path = ".spec.cordoned"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("size(self.metadata.name) <= 63").message("a GuestCluster's name has at most 63 characters")
)]
#[x_kube(
    validation = Rule::new("self.claimNamespace == oldSelf.claimNamespace").message("claimNamespace is immutable; claims live there")
)]
#[serde(rename_all = "camelCase")]
pub struct GuestClusterSpec {
    /// The namespace of this guest's claims: its own, nothing else in it.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub claim_namespace: String,
    /// The namespace of this guest's VMs.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub vm_namespace: String,
    /// Which VirtualMachineInstances of that namespace are this guest's nodes.
    /// Empty selects all of them.
    #[serde(default)]
    pub vm_selector: LabelSelector,
    /// The `VFClass`es that this guest may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 63)))]
    pub classes: Vec<String>,
    #[serde(default)]
    pub quota: ClaimQuota,
    /// No new claims are admitted; what is attached stays.
    #[serde(default)]
    pub cordoned: bool,
}

/// Upper bounds of one guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimQuota {
    /// The most claims admitted at once. Left out: no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claims: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestClusterStatus {
    /// UID of the guest's kube-system namespace, pinned by its first claim; a
    /// claim with another one is refused.
    #[serde(
        default,
        rename = "clusterUID",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 64))]
    pub cluster_uid: Option<String>,
    /// Admitted claims.
    #[serde(default)]
    pub claims: u32,
    /// What the guest may know of its classes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub classes: Vec<ClassSummary>,
    /// When a claim of this guest was last seen to change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_time: Option<Time>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

/// A class without its selectors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClassSummary {
    #[schemars(length(max = 63))]
    pub name: String,
    #[schemars(length(max = 64))]
    pub uid: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub description: Option<String>,
    #[serde(default)]
    pub network: ClassNetwork,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<ClassStorage>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub allowed_overrides: Vec<NetworkField>,
    #[serde(default)]
    pub reclaim_policy: ReclaimPolicy,
    #[serde(default)]
    pub placement: Placement,
    /// `VFClass.status.free`: a number, and not on which nodes or who has the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<u32>,
    /// The class of claims that name none.
    #[serde(default)]
    pub default: bool,
}
