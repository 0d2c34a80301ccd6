//! Which VM a claim's guest node is, and where it runs. Pure.
//!
//! The node's systemUUID alone selects, among the VMs that the administrator
//! gave to this guest: names and addresses have attached to other tenants' VMs
//! in this field. The address may only contradict.

use std::net::IpAddr;

use common::api::{GuestCluster, GuestRef, Launcher, VmRef, reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt as _;
use kube::core::{Selector, SelectorExt as _};

use super::refusal::Refusal;
use super::vmi::Vmi;

/// Where a claim's VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It runs, and this pod has its QEMU.
    Running {
        vm: VmRef,
        node: String,
        launcher: Launcher,
    },
    /// It is known, but a VF cannot be plugged into it now.
    Waiting {
        vm: VmRef,
        why: Refusal,
    },
    Refused(Refusal),
}

/// True when the guest's selector takes the VM. A selector that cannot be read
/// takes nothing.
fn selects(cluster: &GuestCluster, vmi: &Vmi) -> bool {
    cluster.spec.vm_namespace == vmi.namespace
        && selector(&cluster.spec.vm_selector).is_ok_and(|s| s.matches(&vmi.labels))
}

/// The selector in a form that matches; the error is for the administrator.
pub fn selector(raw: &LabelSelector) -> Result<Selector, String> {
    Selector::try_from(raw.clone()).map_err(|e| e.to_string())
}

/// Finds the VM of `guest` among `vmis` (all that the host has, or at least all
/// whose firmware UUID is the node's).
#[must_use]
pub fn resolve(
    guest: &GuestRef,
    vm_ip: Option<&str>,
    cluster: &GuestCluster,
    clusters: &[&GuestCluster],
    vmis: &[Vmi],
) -> Resolution {
    let found: Vec<&Vmi> = vmis
        .iter()
        .filter(|vmi| {
            let uuid = vmi.firmware_uuid.as_deref();
            uuid.is_some_and(|u| u.eq_ignore_ascii_case(&guest.system_uuid))
        })
        .filter(|vmi| selects(cluster, vmi))
        .collect();
    match found.as_slice() {
        [] => Resolution::Refused(Refusal::new(
            reason::VM_NOT_FOUND,
            format!(
                "no VM of this cluster has the system UUID {} of node {}; is the node a VM of \
                 this host, and did the administrator give it to this cluster?",
                guest.system_uuid, guest.node_name
            ),
        )),
        [vmi] => check(vmi, guest, vm_ip, clusters),
        _ => Resolution::Refused(Refusal::new(
            reason::VM_AMBIGUOUS,
            format!(
                "{} VMs of this cluster have the system UUID {}; give each VM a firmware UUID of \
                 its own (spec.domain.firmware.uuid) and start it again",
                found.len(),
                guest.system_uuid
            ),
        )),
    }
}

fn check(
    vmi: &Vmi,
    guest: &GuestRef,
    vm_ip: Option<&str>,
    clusters: &[&GuestCluster],
) -> Resolution {
    let others = clusters
        .iter()
        .filter(|c| c.name_any() != guest.cluster && selects(c, vmi))
        .count();
    if others > 0 {
        return Resolution::Refused(Refusal::new(
            reason::VM_AMBIGUOUS,
            format!(
                "VM {} is given to more than one GuestCluster; the host's administrator has to \
                 narrow their vmSelectors",
                vmi.name
            ),
        ));
    }
    match cross_check(vmi, vm_ip) {
        Err(refusal) => Resolution::Refused(refusal),
        Ok(ip) => place(
            vmi,
            VmRef {
                namespace: vmi.namespace.clone(),
                name: vmi.name.clone(),
                uid: vmi.uid.clone(),
                ip,
            },
        ),
    }
}

/// The address, when it was checked and agrees. Nothing can be said when the
/// VM reports none, or is masqueraded and has another one inside.
fn cross_check(vmi: &Vmi, vm_ip: Option<&str>) -> Result<Option<String>, Refusal> {
    let Some(text) = vm_ip else { return Ok(None) };
    let Ok(ip) = text.parse::<IpAddr>() else {
        return Err(Refusal::new(
            reason::IP_CONTRADICTS,
            format!("the node's address {text} is not an IP address"),
        ));
    };
    if vmi.masqueraded || vmi.addresses.is_empty() {
        return Ok(None);
    }
    if vmi.addresses.contains(&ip) {
        return Ok(Some(ip.to_string()));
    }
    Err(Refusal::new(
        reason::IP_CONTRADICTS,
        format!(
            "the node says its address is {ip}, VM {} with that system UUID has others; two \
             machines may share one UUID",
            vmi.name
        ),
    ))
}

fn place(vmi: &Vmi, vm: VmRef) -> Resolution {
    let waiting = |vm: VmRef, message: String| Resolution::Waiting {
        vm,
        why: Refusal::new(reason::VM_NOT_RUNNING, message),
    };
    if vmi.deleting || vmi.phase != "Running" {
        let phase = if vmi.deleting {
            "stopping"
        } else {
            vmi.phase.as_str()
        };
        return waiting(
            vm,
            format!("VM {} is {phase}; the claim goes on when it runs", vmi.name),
        );
    }
    if vmi.migrating {
        let message = format!(
            "VM {} is being migrated; the claim goes on afterwards",
            vmi.name
        );
        return waiting(vm, message);
    }
    let Some(node) = &vmi.node else {
        return waiting(vm, format!("VM {} has no host node yet", vmi.name));
    };
    let here: Vec<&String> = vmi
        .active_pods
        .iter()
        .filter(|(_, at)| *at == node)
        .map(|(pod, _)| pod)
        .collect();
    match here.as_slice() {
        [pod] => Resolution::Running {
            node: node.clone(),
            launcher: Launcher {
                vmi_uid: vmi.uid.clone(),
                pod_uid: (*pod).clone(),
            },
            vm,
        },
        [] => waiting(
            vm,
            format!("VM {} has no active pod on its node yet", vmi.name),
        ),
        _ => waiting(
            vm,
            format!("VM {} has several active pods on its node", vmi.name),
        ),
    }
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
