//! The objects around a VM in the host's cluster, as plain values: the launcher pod in
//! the shape of KubeVirt's virt-launcher, its block volume, and the
//! VirtualMachineInstance with the fields that KubeVirt's virt-controller writes.

use serde_json::{Value, json};

use super::domain::{self, NAMESPACE, Vm};
use super::l1::NODE;

/// Tag of the launcher's image: folders and links only, L1's own /usr is mounted into it.
pub(super) const LAUNCHER_IMAGE: &str = "vf-e2e/launcher:1";
/// The user of QEMU in every KubeVirt launcher.
const USER: u32 = 107;

/// Name of the launcher pod.
pub(super) fn pod_name(vm: &str) -> String {
    format!("virt-launcher-{vm}")
}

/// The definition of VirtualMachineInstance: everything preserved, status apart.
pub(super) fn definition() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "virtualmachineinstances.kubevirt.io"},
        "spec": {
            "group": "kubevirt.io",
            "scope": "Namespaced",
            "names": {
                "kind": "VirtualMachineInstance",
                "listKind": "VirtualMachineInstanceList",
                "plural": "virtualmachineinstances",
                "singular": "virtualmachineinstance",
                "shortNames": ["vmi", "vmis"],
            },
            "versions": [{
                "name": "v1",
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": [
                    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
                    {"name": "NodeName", "type": "string", "jsonPath": ".status.nodeName"},
                ],
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": true,
                }},
            }],
        },
    })
}

/// The VMI as its VirtualMachine's controller creates it.
pub(super) fn vmi(vm: &Vm) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {
            "name": vm.name,
            "namespace": NAMESPACE,
            "labels": {"guest-cluster": "tenant-a", "vm.kubevirt.io/name": vm.name},
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1",
                "kind": "VirtualMachine",
                "name": vm.name,
                // The machine's test has no VirtualMachine; KubeVirt's has its uid here.
                "uid": vm.uuid,
                "controller": true,
                "blockOwnerDeletion": true,
            }],
        },
        "spec": {"domain": {
            "firmware": {"uuid": vm.uuid},
            "machine": {"type": "q35"},
            "cpu": {"cores": 2, "model": "host-passthrough"},
            "memory": {"guest": format!("{}Mi", vm.memory_mib)},
            "resources": {"requests": {"memory": format!("{}Mi", vm.memory_mib)}},
            "devices": {
                "disks": [{"name": "root", "disk": {"bus": "virtio"}}],
                // Not masqueraded: the address that the VMI reports is the guest's own, so
                // that it can be compared with its node's.
                "interfaces": [{"name": "default", "bridge": {}}],
            },
        }},
    })
}

/// What virt-controller and virt-handler report of a running VM.
pub(super) fn vmi_status(vm: &Vm, pod_uid: &str) -> Value {
    json!({"status": {
        "phase": "Running",
        "nodeName": NODE,
        "activePods": {pod_uid: NODE},
        "interfaces": [{
            "name": "default",
            "mac": vm.mac(),
            "ipAddress": vm.address(),
            "ipAddresses": [vm.address()],
        }],
        "machine": {"type": "pc-q35-10.0"},
        "conditions": [{"type": "Ready", "status": "True"}],
    }})
}

/// The VM's block volume: L1's second disk, claimed by name.
pub(super) fn volume(vm: &Vm) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": format!("{NAMESPACE}-{}", vm.name)},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "volumeMode": "Block",
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {"namespace": NAMESPACE, "name": vm.name},
            "local": {"path": "/dev/vdb"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]},
            ]}]}},
        },
    })
}

pub(super) fn volume_claim(vm: &Vm) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": vm.name, "namespace": NAMESPACE},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "volumeMode": "Block",
            "storageClassName": "",
            "volumeName": format!("{NAMESPACE}-{}", vm.name),
            "resources": {"requests": {"storage": "10Gi"}},
        },
    })
}

/// The domain's XML, which the pod mounts.
pub(super) fn config(vm: &Vm, xml: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": vm.name, "namespace": NAMESPACE},
        "data": {"domain.xml": xml},
    })
}

/// The launcher pod: KubeVirt's labels, user, capabilities and no way to the host's /dev.
pub(super) fn pod(vm: &Vm, vmi_uid: &str) -> Value {
    let empty = ["run", "tmp"].map(|n| json!({"name": n, "emptyDir": {}}));
    let host = [("usr", "/usr"), ("boot", "/boot")]
        .map(|(n, p)| json!({"name": n, "hostPath": {"path": p, "type": "Directory"}}));
    let mut volumes = Vec::from(empty);
    volumes.extend(host);
    volumes.push(json!({"name": "domain", "configMap": {"name": vm.name}}));
    volumes.push(json!({"name": "disk", "persistentVolumeClaim": {"claimName": vm.name}}));
    // KubeVirt's rule of thumb: the guest's memory and what QEMU and libvirt need. No
    // 1 GiB for VFIO: it adds that only to VMs whose spec has such devices.
    let limit = format!("{}Mi", vm.memory_mib + 768);
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(&vm.name),
            "namespace": NAMESPACE,
            "labels": {
                "kubevirt.io": "virt-launcher",
                "kubevirt.io/created-by": vmi_uid,
                "vm.kubevirt.io/name": vm.name,
            },
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1",
                "kind": "VirtualMachineInstance",
                "name": vm.name,
                "uid": vmi_uid,
                "controller": true,
                "blockOwnerDeletion": true,
            }],
        },
        "spec": {
            "nodeName": NODE,
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 15,
            "securityContext": {
                "runAsUser": USER,
                "runAsGroup": USER,
                "runAsNonRoot": true,
                "fsGroup": USER,
            },
            "containers": [{
                "name": "compute",
                "image": LAUNCHER_IMAGE,
                "imagePullPolicy": "Never",
                "command": ["/usr/lib/harness/launcher"],
                "env": [
                    {"name": "PATH", "value": "/usr/sbin:/usr/bin"},
                    {"name": "DISK", "value": domain::DISK},
                ],
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "privileged": false,
                    "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
                },
                "resources": {
                    "requests": {"cpu": "200m", "memory": limit},
                    "limits": {"memory": limit, "devices.kubevirt.io/kvm": "1"},
                },
                "volumeDevices": [{"name": "disk", "devicePath": domain::DISK}],
                "volumeMounts": [
                    {"name": "run", "mountPath": "/run"},
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "usr", "mountPath": "/usr", "readOnly": true},
                    {"name": "boot", "mountPath": "/boot", "readOnly": true},
                    {"name": "domain", "mountPath": "/etc/harness-vm", "readOnly": true},
                ],
            }],
            "volumes": volumes,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launcher_has_no_rights_and_no_way_to_devices() {
        let pod = pod(&Vm::first(), "u");
        let text = pod.to_string();
        assert!(!text.contains("\"/dev\"") && !text.contains("\"/sys\""));
        let c = &pod["spec"]["containers"][0];
        assert_eq!(c["name"], "compute");
        assert_eq!(c["securityContext"]["capabilities"]["drop"][0], "ALL");
        assert_eq!(pod["spec"]["securityContext"]["runAsUser"], 107);
        assert_eq!(pod["metadata"]["labels"]["kubevirt.io"], "virt-launcher");
    }
}
