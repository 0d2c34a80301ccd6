//! The API `sriov.harvesterhci.io/v1alpha1`: one file a kind, types only, no I/O.
//!
//! Everything that can be refused at the API server is refused there, by
//! patterns, bounds and CEL rules in the generated schema; `cargo run -p common
//! --bin crdgen` writes the CRDs that `manifests/vf-crds` ships.

mod condition;
mod guest_cluster;
mod host_driver;
mod network;
mod physical_function;
mod schema;
mod sriov_node;
mod storage;
mod vf_claim;
mod vf_class;

pub use condition::{ConditionStatus, NewCondition, condition, reason, set_condition, type_};
pub use guest_cluster::{
    ClaimQuota, ClassSummary, GuestCluster, GuestClusterSpec, GuestClusterStatus,
};
pub use host_driver::{HostDriver, HostDriverSpec, HostDriverStatus, NodeCounts};
pub use network::{
    ClassNetwork, GrantedNetwork, LinkState, NetworkField, NetworkRequest, Vlan, VlanProtocol,
};
pub use physical_function::{
    ClaimRef, PhysicalFunction, PhysicalFunctionSpec, PhysicalFunctionStatus, ResizeStatus,
    VfCapabilities, VfCounts, VfState, VfStatus, WithheldReason, WithheldVf, withheld_in_force,
    withholds,
};
pub use sriov_node::{DriverStatus, IommuStatus, SriovNode, SriovNodeSpec, SriovNodeStatus};
pub use storage::{ClassStorage, GrantedStorage, StorageRequest};
pub use vf_claim::{
    Admitted, AttachmentStatus, DeviceStatus, GuestDevice, GuestRef, Launcher, Transport, VFClaim,
    VFClaimSpec, VFClaimStatus, VmRef,
};
pub use vf_class::{
    NodeCapacity, PfSelector, Placement, ReclaimPolicy, VFClass, VFClassSpec, VFClassStatus,
};

/// The API group of every kind here; the one place that names it.
pub const GROUP: &str = "sriov.harvesterhci.io";
/// The served and stored version.
pub const VERSION: &str = "v1alpha1";

/// Finalizer of the guest-syncer on a guest's claim: the host copy is gone
/// before the guest's claim may go.
pub const GUEST_FINALIZER: &str = "sriov.harvesterhci.io/guest-syncer";
/// Finalizer of the controller on a host claim: the VF is back before the
/// claim may go.
pub const HOST_FINALIZER: &str = "sriov.harvesterhci.io/host-provisioner";
/// Annotation on a `VFClass`: `"true"` makes it the class of claims that name none.
pub const DEFAULT_CLASS_ANNOTATION: &str = "sriov.harvesterhci.io/is-default-class";
/// Annotation on a host copy: `metadata.generation` of the guest's claim whose
/// spec the copy carries, so that a condition of the host is mapped to the
/// guest's generation only when it is about that spec.
pub const GUEST_GENERATION_ANNOTATION: &str = "sriov.harvesterhci.io/guest-generation";
/// Annotation on a guest's namespace kube-system: the word for a set of orphaned
/// copies, with which an administrator has the guest-syncer delete them all.
pub const DELETE_ORPHANS_ANNOTATION: &str = "sriov.harvesterhci.io/delete-orphans";
/// Label on objects that the guest-syncer made in a guest cluster (mirrored classes).
pub const MIRRORED_LABEL: &str = "sriov.harvesterhci.io/mirrored-by";
/// A guest's client certificate has the CN `<prefix><name of its GuestCluster>`.
pub const GUEST_USER_PREFIX: &str = "sriov.harvesterhci.io:guest:";

/// The name of the host copy of a guest's claim: a function of the guest
/// claim's UID alone, so that a retry finds what an earlier try made.
#[must_use]
pub fn host_claim_name(guest_claim_uid: &str) -> String {
    format!("vfc-{guest_claim_uid}")
}

/// Every CRD of the group, in the order in which they are shipped.
#[must_use]
pub fn crds()
-> Vec<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition>
{
    use kube::CustomResourceExt as _;
    vec![
        GuestCluster::crd(),
        HostDriver::crd(),
        PhysicalFunction::crd(),
        SriovNode::crd(),
        VFClaim::crd(),
        VFClass::crd(),
    ]
}
