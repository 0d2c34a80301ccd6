//! A device that the VM's QEMU has of a claim that records none. The claim's copy on the host
//! was lost while its device was attached (somebody tore its finalizer off, or the host's API
//! was restored from a backup) and was made anew. Nothing is plugged a second time and nothing
//! is taken out: the new copy records what there is. QEMU's device id is the guest claim's UID,
//! so it cannot be another's.

use std::collections::BTreeSet;

use common::api::{AttachmentStatus, DeviceStatus, VFClaim, reason};
use common::kube::status;
use common::pci::PciAddress;
use kube::Api;
use serde_json::json;

use super::agent::{Agent, MANAGER};
use super::allocate::PfSnapshot;
use super::attach::{attachment, claim_identity};
use super::error::ReconcileError;
use super::ledger::Ledger;
use super::plan::{Left, Wait};
use super::pool::{GroupProbe, Holder};
use super::qemu::{self, Vm, VmError};
use super::vf;
use crate::driver::namespace_of;
use crate::hypervisor::Plugged;
use crate::hypervisor::plan::device_id;
use crate::kernel::VFIO_PCI;

/// The claim's device in QEMU, and on which VF it is.
pub struct Found {
    vm: Vm,
    plugged: Plugged,
    device: DeviceStatus,
}

/// The other claims that have VFs of that PF. This one's own entry in the ledger may be of a
/// write that was not answered.
fn others(ledger: &Ledger, physical_function: &str, claim: &VFClaim) -> Vec<Holder> {
    let own = claim.metadata.uid.as_deref();
    let mut holders = Holder::all(ledger, physical_function);
    holders.retain(|holder| Some(holder.claim.uid.as_str()) != own);
    holders
}

/// Groups of VFs that no other claim names and that somebody may use: on vfio-pci, or just
/// being taken from it. Only if the VM's QEMU has one of them open can it have a device of a
/// claim that records none.
fn unclaimed_in_use(snapshot: &PfSnapshot, holders: &[Holder]) -> BTreeSet<u32> {
    let claimed = |index| holders.iter().any(|holder| holder.vf_index == index);
    let vfs = snapshot.vfs.iter().filter(|vf| !claimed(vf.index));
    vfs.filter_map(|vf| {
        let group = vf.iommu_group?;
        let probe = snapshot.probes.get(&group);
        let in_use = match vf.driver.as_deref() {
            Some(VFIO_PCI) => probe != Some(&GroupProbe::Free),
            Some(_) => false,
            None => matches!(probe, Some(GroupProbe::Busy | GroupProbe::Unknown(_))),
        };
        in_use.then_some(group)
    })
    .collect()
}

/// Looks; `snapshots` are the node's PFs as the kernel has them.
pub async fn look(
    agent: &Agent,
    claim: &VFClaim,
    snapshots: &[PfSnapshot],
) -> Result<(Left, Option<Found>), ReconcileError> {
    let suspicious = suspicious(&agent.ledger.lock(), claim, snapshots);
    let launcher = claim.status.as_ref().and_then(|s| s.launcher.as_ref());
    let Some(launcher) = launcher.filter(|_| !suspicious.is_empty()) else {
        return Ok((Left::Nothing, None));
    };
    // Most are somebody else's. A VM with none of them is not asked: its monitor may not answer,
    // and its claim could neither come nor go for it.
    let Some((process, open)) = qemu::groups(agent, &launcher.pod_uid).await? else {
        return Ok((Left::Nothing, None));
    };
    let had: BTreeSet<u32> = open.intersection(&suspicious).copied().collect();
    if had.is_empty() {
        return Ok((Left::Nothing, None));
    }
    let vm = qemu::monitored(agent, process).await?;
    let id = device_id(&claim_identity(claim));
    let Some(plugged) = vm.session.plugged(&id).await.map_err(VmError::from)? else {
        return Ok((Left::Nothing, None));
    };
    let ledger = agent.ledger.lock();
    let device = of_no_other(&ledger, claim, &agent.node_name, snapshots, plugged.host);
    // QEMU's word about the VF counts only where the kernel says the same of its group.
    let device = device.filter(|d| d.iommu_group.is_some_and(|group| had.contains(&group)));
    let recorded = claim.status.as_ref().and_then(|s| s.device.as_ref());
    let same = |d: &DeviceStatus| {
        recorded.is_none_or(|r| {
            (&r.physical_function, r.vf_index) == (&d.physical_function, d.vf_index)
        })
    };
    Ok(match device {
        Some(device) if same(&device) => {
            let found = Found {
                vm,
                plugged,
                device,
            };
            (Left::Device, Some(found))
        }
        _ => (Left::Unknown(unknown(&id, plugged.host)), None),
    })
}

fn suspicious(ledger: &Ledger, claim: &VFClaim, snapshots: &[PfSnapshot]) -> BTreeSet<u32> {
    snapshots
        .iter()
        .flat_map(|pf| unclaimed_in_use(pf, &others(ledger, &pf.name, claim)))
        .collect()
}

/// The VF at that address, if it is one of the node's PFs' and no other claim's.
fn of_no_other(
    ledger: &Ledger,
    claim: &VFClaim,
    node: &str,
    snapshots: &[PfSnapshot],
    host: Option<PciAddress>,
) -> Option<DeviceStatus> {
    let (pf, vf) = snapshots.iter().find_map(|pf| {
        let vf = pf.vfs.iter().find(|vf| Some(vf.address) == host)?;
        Some((pf, vf))
    })?;
    let holders = others(ledger, &pf.name, claim);
    if holders.iter().any(|holder| holder.vf_index == vf.index) {
        return None;
    }
    let device = DeviceStatus {
        node_name: node.to_owned(),
        physical_function: pf.name.clone(),
        vf_index: vf.index,
        namespace_id: namespace_of(&pf.namespaces, vf.index),
        pci_address: None,
        vendor_id: None,
        device_id: None,
        iommu_group: None,
    };
    Some(vf::described(&device, vf))
}

fn unknown(id: &str, host: Option<PciAddress>) -> Wait {
    let host = host.map_or_else(
        || "no host device that is known".to_owned(),
        |host| host.to_string(),
    );
    Wait {
        reason: reason::CONFLICT,
        message: format!(
            "the VM has a device {id} of this claim already, on {host}, which is no VF that this \
             claim can have; nothing was changed: an administrator has to take that device out of \
             the VM, or restart the VM"
        ),
    }
}

/// Records in the claim what was found: device and attachment, in one write. The ledger has it
/// before, so that the VF goes to nobody else meanwhile.
pub async fn take_over(
    agent: &Agent,
    api: &Api<VFClaim>,
    claim: &VFClaim,
    found: Found,
) -> Result<VFClaim, ReconcileError> {
    let Found {
        vm,
        plugged,
        device,
    } = found;
    let attachment: AttachmentStatus = attachment(agent, claim, &vm, plugged.port);
    tracing::warn!(
        claim = claim.metadata.name,
        id = attachment.qemu_device_id,
        host = device.pci_address,
        "the VM has the claim's device already; it is taken over"
    );
    let mut recorded = claim.clone();
    let status = recorded.status.get_or_insert_default();
    status.device = Some(device.clone());
    status.attachment = Some(attachment.clone());
    if let Some(mut entry) = Ledger::entry_of(&recorded) {
        entry
            .unanswered
            .clone_from(&claim.metadata.resource_version);
        agent.ledger.lock().enter(entry)?;
    }
    let fields = json!({"device": device, "attachment": attachment});
    Ok(status::decide(api, claim, MANAGER, &fields).await?)
}

#[cfg(test)]
mod tests;
