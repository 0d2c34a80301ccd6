//! The claim's QEMU as the agent sees it: which process, what it has, whether a
//! VF may go into it. Asks, never changes.

use std::collections::BTreeSet;
use std::sync::Arc;

use common::api::{AttachmentStatus, VFClaim, reason};
use common::pci::PciAddress;
use thiserror::Error;

use super::agent::Agent;
use super::attach::claim_identity;
use super::plan::{InQemu, Qemu};
use crate::hypervisor::gates::GateError;
use crate::hypervisor::launcher::{LauncherError, QemuProcess};
use crate::hypervisor::plan::{self as vm_plan, Unsupported};
use crate::hypervisor::{GuestView, HypervisorError, Machine, Session};

/// What can go wrong on the way to a VM.
#[derive(Debug, Error)]
pub enum VmError {
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    Gate(#[from] GateError),
    #[error("the thread that looks for QEMU ended unexpectedly: {0}")]
    Thread(String),
}

/// A QEMU process with a session to its monitor.
#[derive(Clone)]
pub struct Vm {
    pub process: QemuProcess,
    pub session: Arc<dyn Session>,
}

/// The QEMU of a launcher pod and the VFIO groups that it has open, by the kernel's word, or
/// `None` when the pod runs none. Its monitor is not asked.
pub async fn groups(
    agent: &Agent,
    pod_uid: &str,
) -> Result<Option<(QemuProcess, BTreeSet<u32>)>, VmError> {
    let (proc, pod) = (agent.proc.clone(), pod_uid.to_owned());
    look_in_proc(move || {
        let process = proc.find_qemu(&pod)?;
        let groups = proc.vfio_groups(process.pid)?;
        Ok((process, groups))
    })
    .await
}

/// Looks at processes off the async threads; `None` when the pod runs no QEMU.
async fn look_in_proc<T: Send + 'static>(
    look: impl FnOnce() -> Result<T, LauncherError> + Send + 'static,
) -> Result<Option<T>, VmError> {
    let found = tokio::task::spawn_blocking(look).await;
    match found.map_err(|e| VmError::Thread(e.to_string()))? {
        Ok(found) => Ok(Some(found)),
        Err(LauncherError::NotFound { .. } | LauncherError::Gone { .. }) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

/// The QEMU of a launcher pod, or `None` when the pod runs none.
pub async fn find(agent: &Agent, pod_uid: &str) -> Result<Option<Vm>, VmError> {
    let (proc, pod) = (agent.proc.clone(), pod_uid.to_owned());
    match look_in_proc(move || proc.find_qemu(&pod)).await? {
        Some(process) => monitored(agent, process).await.map(Some),
        None => Ok(None),
    }
}

/// A process with a session to its monitor.
pub async fn monitored(agent: &Agent, process: QemuProcess) -> Result<Vm, VmError> {
    let session = agent
        .sessions
        .of(agent.hypervisor.as_ref(), &process)
        .await?;
    Ok(Vm { process, session })
}

/// Whether the launcher's QEMU has a device of ours, or does not say.
pub async fn may_have_ours(agent: &Agent, pod_uid: &str) -> bool {
    let machine = match find(agent, pod_uid).await {
        Ok(None) => return false,
        Ok(Some(vm)) => vm.session.machine().await.map_err(VmError::from),
        Err(error) => Err(error),
    };
    match machine {
        Ok(machine) => vm_plan::our_devices(&machine) > 0,
        Err(error) => {
            tracing::warn!(pod = pod_uid, %error, "QEMU does not say what it has; its memlock stays");
            true
        }
    }
}

/// True when this is the process that the attachment was made in.
#[must_use]
pub fn is_same(process: &QemuProcess, attachment: &AttachmentStatus, boot_id: &str) -> bool {
    attachment.boot_id == boot_id
        && attachment.pod_uid == process.pod_uid
        && u64::try_from(attachment.qemu_start_time).is_ok_and(|t| t == process.start_time)
}

/// The claim's QEMU: the attachment's when one is recorded, else its launcher's.
pub async fn look(agent: &Agent, claim: &VFClaim) -> Result<(Qemu, Option<Vm>), VmError> {
    let status = claim.status.as_ref();
    let attachment = status.and_then(|s| s.attachment.as_ref());
    let launcher = status.and_then(|s| s.launcher.as_ref());
    let pod_uid = match (attachment, launcher) {
        (Some(attachment), _) if attachment.boot_id != agent.boot_id => {
            return Ok((Qemu::Gone, None));
        }
        (Some(attachment), _) => &attachment.pod_uid,
        (None, Some(launcher)) => &launcher.pod_uid,
        (None, None) => return Ok((Qemu::Gone, None)),
    };
    let Some(vm) = find(agent, pod_uid).await? else {
        return Ok((Qemu::Gone, None));
    };
    if let Some(attachment) = attachment {
        if !is_same(&vm.process, attachment, &agent.boot_id) {
            return Ok((Qemu::Gone, None));
        }
        let id = &attachment.qemu_device_id;
        let view = in_qemu(vm.session.guest_view(id).await?);
        let recorded = status.and_then(|s| s.device.as_ref()?.pci_address.as_deref());
        // One question more where all is as recorded, which is nearly always.
        if view == InQemu::Absent || is_recorded(recorded, vm.session.host(id).await?) {
            return Ok((Qemu::Running(view), Some(vm)));
        }
        let seen = match vm.session.plugged(id).await? {
            // It went between the questions.
            None => Qemu::Running(InQemu::Absent),
            Some(plugged) if is_recorded(recorded, plugged.host) => Qemu::Running(view),
            Some(plugged) => another(recorded, plugged.host),
        };
        return Ok((seen, Some(vm)));
    }
    if !vm.process.user_ns_is_init {
        return Ok((unsupported(&Unsupported::UserNamespace), Some(vm)));
    }
    let mut machine = vm.session.machine().await?;
    let id = vm_plan::device_id(&claim_identity(claim));
    let uid = claim.metadata.uid.as_deref().unwrap_or_default();
    let fit = vm_plan::check(&machine)
        .and_then(|()| vm_plan::id_is_free(&machine, &id))
        .and_then(|()| choose_port(agent, &vm, &mut machine, uid));
    let seen = match fit {
        Ok(_) => Qemu::Running(InQemu::Absent),
        Err(why) => unsupported(&why),
    };
    Ok((seen, Some(vm)))
}

/// Whether the device that QEMU has under the claim's id is what the claim records.
fn is_recorded(recorded: Option<&str>, host: Option<PciAddress>) -> bool {
    host.is_some_and(|host| recorded == Some(host.to_string().as_str()))
}

/// A device under the claim's id that is not what the claim records: its record is of another
/// time. Nothing may then be done to the VF that it names.
fn another(recorded: Option<&str>, host: Option<PciAddress>) -> Qemu {
    let host = host.map_or_else(|| "none".to_owned(), |host| host.to_string());
    Qemu::Unsupported {
        reason: reason::CONFLICT,
        message: format!(
            "the claim records the host device {}, and its VM has {host} in its place; nothing is \
             done to either: restart the VM, or have an administrator take the device out of it",
            recorded.unwrap_or("none")
        ),
    }
}

fn in_qemu(view: GuestView) -> InQemu {
    match view {
        GuestView::Absent => InQemu::Absent,
        GuestView::Plugged { .. } => InQemu::Plugged,
        GuestView::Configured { address } => InQemu::Configured(address.to_string()),
    }
}

/// A VM that cannot have a VF, in the claim's words.
#[must_use]
pub fn unsupported(why: &Unsupported) -> Qemu {
    let reason = match why {
        Unsupported::NoFreePort { .. } | Unsupported::NoPorts => reason::NO_FREE_PORT,
        Unsupported::NotRunning(_) => reason::VM_NOT_RUNNING,
        _ => reason::UNSUPPORTED_VM,
    };
    Qemu::Unsupported {
        reason,
        message: why.to_string(),
    }
}

/// Chooses a port for the claim of that UID, leaving those that other claims have recorded but
/// not used yet.
pub fn choose_port(
    agent: &Agent,
    vm: &Vm,
    machine: &mut Machine,
    claim_uid: &str,
) -> Result<String, Unsupported> {
    let taken = agent.ledger.lock().ports_in(&vm.process.pod_uid, claim_uid);
    for port in &mut machine.ports {
        if taken.contains(&port.id) {
            port.occupied = true;
        }
    }
    vm_plan::choose_port(machine, agent.reserved_ports).map(|port| port.id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_recorded_device_is_the_claims() {
        let at = |address: &str| address.parse().ok();
        let recorded = Some("0000:01:10.0");
        assert!(is_recorded(recorded, at("0000:01:10.0")));
        for (recorded, host) in [
            (recorded, at("0000:01:10.2")),
            (recorded, None),
            (None, at("0000:01:10.0")),
        ] {
            assert!(!is_recorded(recorded, host), "{recorded:?} {host:?}");
            let Qemu::Unsupported { reason, .. } = another(recorded, host) else {
                panic!("{recorded:?} {host:?}")
            };
            assert_eq!(reason, reason::CONFLICT);
        }
    }
}
