//! What the deployment is called: the names a tenant and an administrator would see.

/// Namespace of the project's programs, in both clusters.
pub const SYSTEM: &str = "vf-provisioner-system";
/// The `GuestCluster` of the guest kind cluster.
pub const GUEST_CLUSTER: &str = "tenant-a";
/// Where that guest's host copies live.
pub const CLAIM_NAMESPACE: &str = "guest-tenant-a";
/// Where its VMs live.
pub const VM_NAMESPACE: &str = "tenant-vms";
/// The tenant's own namespace in the guest cluster: where scenarios make claims.
pub const TENANT_NAMESPACE: &str = "workloads";
/// A class that lets claims choose everything and selects the managed igb PFs.
pub const CLASS: &str = "fast";
/// The class of claims that name none: a MAC may be asked for, nothing else.
pub const DEFAULT_CLASS: &str = "standard";
/// Secret in [`SYSTEM`] of the guest cluster that holds the host's kubeconfig.
pub const HOST_KUBECONFIG_SECRET: &str = "host-kubeconfig";
