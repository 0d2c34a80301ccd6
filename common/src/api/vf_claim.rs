//! `VFClaim`: one VF for one VM, in the guest cluster and as its copy on the host.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    GrantedNetwork, GrantedStorage, NetworkRequest, PfSelector, Placement, ReclaimPolicy,
    StorageRequest, schema,
};

/// A request for one SR-IOV virtual function in a running VM.
///
/// A tenant writes `className`, `nodeName` and `network` or `storage`. `guest`
/// and `vmIP` are on host copies only, written by the guest-syncer.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "sriov.harvesterhci.io",
    version = "v1alpha1",
    kind = "VFClaim",
    plural = "vfclaims",
    shortname = "vfc",
    category = "sriov",
    namespaced,
    status = "VFClaimStatus",
    derive = "PartialEq",
    doc = "VFClaim asks for one SR-IOV virtual function to be plugged into a running VM.",
    selectable = ".status.hostNode",
    printcolumn(name = "Host-Node", type_ = "string", json_path = ".status.hostNode"),
    printcolumn(name = "VF", type_ = "string", json_path = ".status.device.pciAddress"),
    printcolumn(name = "Guest-Address", type_ = "string", json_path = ".status.guestDevice.pciAddress"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Resolved", type_ = "string", json_path = ".status.conditions[?(@.type==\"Resolved\")].reason", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.device) || has(self.status)").message("status cannot be removed while a device is set"),
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.device) || !has(self.status) || (has(self.status.hostNode) && has(oldSelf.status.hostNode) && self.status.hostNode == oldSelf.status.hostNode)").message("hostNode cannot change while a device is set")
)]
#[x_kube(
    validation = Rule::new("has(self.nodeName) != has(self.guest)").message("name exactly one target: nodeName (a node of this guest cluster); guest is for copies that the guest-syncer makes on a host cluster"),
    validation = Rule::new("has(self.guest) || !has(self.vmIP)").message("vmIP belongs to host copies, beside guest"),
    validation = Rule::new("has(self.className) == has(oldSelf.className) && (!has(self.className) || self.className == oldSelf.className)").message("className is immutable; delete the claim and make another"),
    validation = Rule::new("has(self.nodeName) == has(oldSelf.nodeName) && (!has(self.nodeName) || self.nodeName == oldSelf.nodeName)").message("nodeName is immutable; delete the claim and make another"),
    validation = Rule::new("!has(self.storage) || !has(self.network)").message("network and storage do not mix: a VF is a network interface or an NVMe controller"),
    validation = Rule::new("has(self.storage) == has(oldSelf.storage) && (!has(self.storage) || self.storage == oldSelf.storage)").message("storage is immutable; delete the claim and make another"),
    validation = Rule::new("has(self.guest) == has(oldSelf.guest) && (!has(self.guest) || self.guest == oldSelf.guest)").message("guest is immutable")
)]
#[serde(rename_all = "camelCase")]
pub struct VFClaimSpec {
    /// The `VFClass` to take a VF from. Left out: the default class in force on
    /// the host, recorded in `status.admitted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub class_name: Option<String>,
    /// The node of the guest cluster, that is the VM, that gets the VF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub node_name: Option<String>,
    /// Host copies: whose claim this is and which machine its node says it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestRef>,
    /// Host copies: the guest node's InternalIP, which may change; a cross-check only.
    #[serde(default, rename = "vmIP", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 45))]
    pub vm_ip: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRequest>,
    /// Which of its class's NVMe namespaces the claim gets. Left out with such a
    /// class: a free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageRequest>,
}

/// The guest's side of a host copy; immutable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestRef {
    /// Name of the `GuestCluster` object.
    #[schemars(length(min = 1, max = 63))]
    pub cluster: String,
    /// UID of the guest's kube-system namespace.
    #[serde(rename = "clusterUID")]
    #[schemars(length(min = 1, max = 64))]
    pub cluster_uid: String,
    /// Namespace of the guest's claim.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Name of the guest's claim.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// UID of the guest's claim.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
    /// The guest's node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The guest node's `status.nodeInfo.systemUUID`: the identity that selects the VM.
    #[serde(rename = "systemUUID")]
    #[schemars(length(min = 36, max = 36))]
    pub system_uuid: String,
    /// The guest node's `spec.providerID`: may only agree, never select.
    #[serde(
        default,
        rename = "providerID",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 512))]
    pub provider_id: Option<String>,
}

/// Where a claim stands. One writer per field: see `docs/architecture.md`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(oldSelf.device) || !has(self.device) || (self.device.nodeName == oldSelf.device.nodeName && self.device.physicalFunction == oldSelf.device.physicalFunction && self.device.vfIndex == oldSelf.device.vfIndex && (!has(oldSelf.device.pciAddress) || (has(self.device.pciAddress) && self.device.pciAddress == oldSelf.device.pciAddress)) && has(self.device.namespaceID) == has(oldSelf.device.namespaceID) && (!has(self.device.namespaceID) || self.device.namespaceID == oldSelf.device.namespaceID))").message("device is set once until it is cleared"),
    validation = Rule::new("!has(self.device) || has(self.hostNode)").message("a device needs a hostNode"),
    validation = Rule::new("!has(self.attachment) || has(self.device)").message("an attachment needs a device")
)]
#[serde(rename_all = "camelCase")]
pub struct VFClaimStatus {
    /// Controller: what was granted. Everything downstream acts on this alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admitted: Option<Admitted>,
    /// Controller: the VM, pinned once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmRef>,
    /// Controller: the host node that runs the VM; its agent has the claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub host_node: Option<String>,
    /// Controller: the pod in which the VM's QEMU runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launcher: Option<Launcher>,
    /// Node agent: the VF, recorded before anything is done to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceStatus>,
    /// Node agent: the attachment, recorded before `device_add`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<AttachmentStatus>,
    /// Node agent: the device as the guest sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_device: Option<GuestDevice>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

/// What the controller granted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.network) != has(self.storage)").message("a grant is of a network interface or of storage")
)]
#[serde(rename_all = "camelCase")]
pub struct Admitted {
    /// `metadata.generation` of the spec that was granted.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    #[schemars(length(max = 63))]
    pub class_name: String,
    #[serde(rename = "classUID")]
    #[schemars(length(max = 64))]
    pub class_uid: String,
    /// The class's selector as it stood; later edits of the class do not reach the claim.
    #[serde(default)]
    pub pf_selector: PfSelector,
    /// The class's count for an idle PF that says nothing itself.
    #[serde(default, rename = "numVFs", skip_serializing_if = "Option::is_none")]
    pub num_vfs: Option<u16>,
    /// The class's, as it stood.
    #[serde(default)]
    pub reclaim_policy: ReclaimPolicy,
    /// The class's, as it stood. A grant of an earlier version does not say it: Pack.
    #[serde(default)]
    pub placement: Placement,
    /// Of a VF that is a network interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<GrantedNetwork>,
    /// Of a VF that is an NVMe controller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<GrantedStorage>,
}

/// A `VirtualMachineInstance`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmRef {
    #[schemars(length(max = 63))]
    pub namespace: String,
    #[schemars(length(max = 253))]
    pub name: String,
    #[schemars(length(max = 64))]
    pub uid: String,
    /// The VM's address as the guest reported it, when it was cross-checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub ip: Option<String>,
}

/// The pod in which a VM's QEMU runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Launcher {
    #[serde(rename = "vmiUID")]
    #[schemars(length(max = 64))]
    pub vmi_uid: String,
    #[serde(rename = "podUID")]
    #[schemars(length(max = 64))]
    pub pod_uid: String,
}

/// A VF. The first four fields choose it; the rest is known once it exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    #[schemars(length(max = 253))]
    pub node_name: String,
    /// Name of the `PhysicalFunction` object.
    #[schemars(length(max = 253))]
    pub physical_function: String,
    /// Index as in the kernel's `virtfn<index>`.
    pub vf_index: u16,
    /// The NVMe namespace that the VF's controller gets, of all that were granted.
    #[serde(
        default,
        rename = "namespaceID",
        skip_serializing_if = "Option::is_none"
    )]
    pub namespace_id: Option<u32>,
    /// PCI address on the host node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 12))]
    pub pci_address: Option<String>,
    #[serde(default, rename = "vendorID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4))]
    pub vendor_id: Option<String>,
    #[serde(default, rename = "deviceID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4))]
    pub device_id: Option<String>,
    /// Number of the IOMMU group, as in `/dev/vfio/<group>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
}

/// How commands reach QEMU; one for a VM's whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Transport {
    /// A QMP UNIX socket of our own in the launcher.
    QmpSocket,
}

/// The VF inside one QEMU process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttachmentStatus {
    #[serde(rename = "vmiUID")]
    #[schemars(length(max = 64))]
    pub vmi_uid: String,
    #[serde(rename = "podUID")]
    #[schemars(length(max = 64))]
    pub pod_uid: String,
    /// The device's id in QEMU: a function of the guest claim's UID.
    #[serde(rename = "qemuDeviceID")]
    #[schemars(length(max = 128))]
    pub qemu_device_id: String,
    /// QEMU's id of the root port that the device is plugged into.
    #[schemars(length(max = 128))]
    pub port: String,
    pub transport: Transport,
    /// The host node's boot (`/proc/sys/kernel/random/boot_id`): after another
    /// boot nothing of this attachment is left.
    #[serde(rename = "bootID")]
    #[schemars(length(max = 64))]
    pub boot_id: String,
    /// Start of the QEMU process in clock ticks after boot (field 22 of
    /// `/proc/<pid>/stat`, proc(5)).
    #[schemars(range(min = 0))]
    pub qemu_start_time: i64,
}

/// The device as the guest has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestDevice {
    /// PCI address inside the guest.
    #[schemars(length(max = 12))]
    pub pci_address: String,
    /// Absent for a VF that is no network interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 17))]
    pub mac_address: Option<String>,
}
