//! The way up inside QEMU: record the attachment, open the gates, `device_add`,
//! close the gates, wait for the guest. Executes; what comes next is `plan`'s.

use std::time::Duration;

use common::api::{AttachmentStatus, DeviceStatus, Transport, VFClaim, reason};
use common::kube::status;
use common::pci::PciAddress;
use kube::Api;
use serde_json::json;
use tokio::time::Instant;

use super::agent::{Agent, MANAGER};
use super::error::ReconcileError;
use super::plan::{Added, Close, Qemu, Wait, close_after_add};
use super::qemu::{self, Vm, VmError};
use crate::hypervisor::gates::GateError;
use crate::hypervisor::plan::device_id;
use crate::hypervisor::{GuestView, HypervisorError, memory};
use crate::points::{Point, reach};

/// How long a reconcile waits for the guest to configure a device that QEMU
/// has; afterwards the claim says so and is looked at again.
const GUEST_CONFIGURES: Duration = Duration::from_secs(10);
/// QEMU has no event for "the guest gave the device its addresses".
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The result of a step that may have to wait.
pub type StepResult<T> = Result<Result<T, Wait>, ReconcileError>;

/// The guest claim's UID where there is one, else the claim's own: the part of
/// the QEMU device id that survives a lost host copy.
#[must_use]
pub fn claim_identity(claim: &VFClaim) -> String {
    match &claim.spec.guest {
        Some(guest) => guest.uid.clone(),
        None => claim.metadata.uid.clone().unwrap_or_default(),
    }
}

/// Chooses the port and records the attachment, and with it what is now known
/// of the VF: the intent of `device_add`, in one write. The caller has the VM's turn.
pub async fn record(
    agent: &Agent,
    api: &Api<VFClaim>,
    claim: &VFClaim,
    vm: &Vm,
    device: &DeviceStatus,
) -> StepResult<VFClaim> {
    let uid = claim.metadata.uid.as_deref().unwrap_or_default();
    let mut machine = vm.session.machine().await.map_err(VmError::from)?;
    let port = match qemu::choose_port(agent, vm, &mut machine, uid) {
        Ok(port) => port,
        Err(why) => return Ok(Err(refusal(&why))),
    };
    let attachment = attachment(agent, claim, vm, port);
    let fields = json!({"device": device, "attachment": attachment});
    let claim = status::decide(api, claim, MANAGER, &fields).await?;
    reach(Point::AttachmentRecorded);
    Ok(Ok(claim))
}

/// The claim's attachment to this QEMU, on that port.
#[must_use]
pub fn attachment(agent: &Agent, claim: &VFClaim, vm: &Vm, port: String) -> AttachmentStatus {
    let launcher = claim.status.as_ref().and_then(|s| s.launcher.as_ref());
    AttachmentStatus {
        vmi_uid: launcher.map(|l| l.vmi_uid.clone()).unwrap_or_default(),
        pod_uid: vm.process.pod_uid.clone(),
        qemu_device_id: device_id(&claim_identity(claim)),
        port,
        transport: Transport::QmpSocket,
        boot_id: agent.boot_id.clone(),
        qemu_start_time: i64::try_from(vm.process.start_time).unwrap_or(i64::MAX),
    }
}

fn refusal(why: &crate::hypervisor::plan::Unsupported) -> Wait {
    match qemu::unsupported(why) {
        Qemu::Unsupported { reason, message } => Wait { reason, message },
        Qemu::Gone | Qemu::Running(_) => Wait {
            reason: reason::UNSUPPORTED_VM,
            message: why.to_string(),
        },
    }
}

/// Opens the gates, adds the device, closes the gates. The caller has the VM's
/// turn, and the claim records the attachment.
pub async fn plug(agent: &Agent, claim: &VFClaim, vm: &Vm) -> StepResult<()> {
    let Recorded {
        attachment,
        host,
        group,
    } = recorded(claim)?;
    let machine = vm.session.machine().await.map_err(VmError::from)?;
    let present = u32::try_from(machine.vfio_devices().count()).unwrap_or(u32::MAX);
    let process = vm.process.clone();
    let guest = machine.memory;
    let facts = gates(agent, move |gates| {
        gates.memory_facts(&process, guest, present)
    })
    .await?;
    if let Err(why) = memory::check(&facts) {
        return Ok(Err(Wait {
            reason: reason::INSUFFICIENT_MEMORY,
            message: why.to_string(),
        }));
    }
    let process = vm.process.clone();
    let viommu = machine.viommu.is_some();
    let opened = gates(agent, move |gates| {
        let locked = gates.locked_before(&process)?;
        let limit = memory::needed_memlock(guest, viommu, present.saturating_add(1), locked);
        gates.open(&process, group, limit)
    })
    .await;
    let added = match opened {
        Ok(()) => {
            let timeout = memory::attach_timeout(memory::not_yet_resident(&facts), guest);
            let id = &attachment.qemu_device_id;
            tracing::info!(id, %host, port = attachment.port, "device_add");
            let added = vm
                .session
                .device_add(id, host, &attachment.port, timeout)
                .await;
            settle(vm, id, added).await
        }
        Err(error) => Err((Added::No, error)),
    };
    reach(Point::DeviceAdded);
    // However it ended: the node of this group must not stay in the container.
    let pod_uid = vm.process.pod_uid.clone();
    let closed = gates(agent, move |gates| gates.close_device(&pod_uid, group)).await;
    reach(Point::GroupClosed);
    let end = added.as_ref().map_or_else(|(end, _)| *end, |()| Added::Yes);
    if close_after_add(end, present) == Close::All {
        let pod_uid = vm.process.pod_uid.clone();
        gates(agent, move |gates| gates.close_all(&pod_uid)).await?;
    }
    added.map_err(|(_, error)| error)?;
    closed?;
    Ok(Ok(()))
}

/// A `device_add` whose outcome is unknown is looked up, never repeated blindly.
async fn settle(
    vm: &Vm,
    id: &str,
    added: Result<(), HypervisorError>,
) -> Result<(), (Added, VmError)> {
    match added {
        Ok(()) => Ok(()),
        Err(error) if error.outcome_unknown() => match vm.session.guest_view(id).await {
            Ok(GuestView::Absent) => Err((Added::No, error.into())),
            Ok(GuestView::Plugged { .. } | GuestView::Configured { .. }) => Ok(()),
            Err(look) => Err((Added::Unknown, look.into())),
        },
        Err(error) => Err((Added::No, error.into())),
    }
}

/// Sees to it that QEMU may still lock what its attached devices need.
pub async fn keep_memlock(agent: &Agent, claim: &VFClaim) -> Result<(), ReconcileError> {
    let pod_uid = recorded(claim)?.attachment.pod_uid.clone();
    let pod = pod_uid.clone();
    if gates(agent, move |gates| gates.keep_memlock(&pod)).await? {
        tracing::warn!(
            pod = pod_uid,
            "QEMU's memlock limit had been lowered and is raised again"
        );
    }
    Ok(())
}

/// Waits until the guest has given the device its addresses.
pub async fn await_guest(claim: &VFClaim, vm: &Vm) -> StepResult<String> {
    let Recorded { attachment, .. } = recorded(claim)?;
    let deadline = Instant::now() + GUEST_CONFIGURES;
    loop {
        let view = vm
            .session
            .guest_view(&attachment.qemu_device_id)
            .await
            .map_err(VmError::from)?;
        match view {
            GuestView::Configured { address } => return Ok(Ok(address.to_string())),
            GuestView::Absent => {
                return Ok(Err(Wait {
                    reason: reason::RETRYING,
                    message: "the device left QEMU while the guest was to configure it".to_owned(),
                }));
            }
            GuestView::Plugged { missing } if Instant::now() >= deadline => {
                return Ok(Err(Wait {
                    reason: reason::GUEST_NOT_CONFIGURED,
                    message: format!(
                        "the device is plugged, the guest has not configured it ({missing}); is the guest's kernel up, with PCI hotplug?"
                    ),
                }));
            }
            GuestView::Plugged { .. } => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}

/// What the claim records of its attachment.
pub struct Recorded<'a> {
    pub attachment: &'a AttachmentStatus,
    pub host: PciAddress,
    pub group: u32,
}

/// The recorded attachment with its host device, complete.
pub fn recorded(claim: &VFClaim) -> Result<Recorded<'_>, ReconcileError> {
    let status = claim.status.as_ref();
    let attachment = status.and_then(|s| s.attachment.as_ref());
    let device = status.and_then(|s| s.device.as_ref());
    let (Some(attachment), Some(device)) = (attachment, device) else {
        return Err(ReconcileError::Incomplete("status.attachment"));
    };
    let address = device
        .pci_address
        .as_deref()
        .ok_or(ReconcileError::Incomplete("device.pciAddress"))?;
    let host = address
        .parse()
        .map_err(|_| ReconcileError::Incomplete("device.pciAddress"))?;
    let group = device
        .iommu_group
        .ok_or(ReconcileError::Incomplete("device.iommuGroup"))?;
    Ok(Recorded {
        attachment,
        host,
        group,
    })
}

/// Runs blocking gate work off the async threads.
pub async fn gates<T, F>(agent: &Agent, work: F) -> Result<T, VmError>
where
    T: Send + 'static,
    F: FnOnce(&dyn crate::hypervisor::gates::Gates) -> Result<T, GateError> + Send + 'static,
{
    let gates = std::sync::Arc::clone(&agent.gates);
    let done = tokio::task::spawn_blocking(move || work(gates.as_ref()))
        .await
        .map_err(|e| VmError::Thread(e.to_string()))?;
    Ok(done?)
}
