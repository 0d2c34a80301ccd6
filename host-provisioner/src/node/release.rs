//! The way down: take the device out of QEMU, close what is left of the gates,
//! clear the claim. Executes; what comes next is `plan`'s.

use std::time::Duration;

use common::api::{VFClaim, reason};
use common::kube::status;
use kube::Api;
use serde_json::json;

use super::agent::{Agent, MANAGER};
use super::attach::{StepResult, gates, recorded};
use super::error::ReconcileError;
use super::plan::{Close, Wait, close_after_release};
use super::qemu::{self, Vm, VmError};
use crate::hypervisor::Unplug;
use crate::hypervisor::plan::our_devices;
use crate::points::{Point, reach};

/// How long one request to unplug is waited for. QEMU forgets none, and
/// repeating it sooner than 10 s can cancel it (ACPI and native hotplug differ).
const UNPLUG: Duration = Duration::from_secs(15);

/// Asks the guest to let the device go and waits for DEVICE_DELETED.
pub async fn unplug(claim: &VFClaim, vm: &Vm) -> StepResult<()> {
    let attachment = recorded(claim)?.attachment;
    tracing::info!(id = attachment.qemu_device_id, "device_del");
    let unplugged = vm
        .session
        .device_del(&attachment.qemu_device_id, UNPLUG)
        .await
        .map_err(VmError::from)?;
    match unplugged {
        Unplug::Deleted => {
            tracing::info!(id = attachment.qemu_device_id, "DEVICE_DELETED");
            reach(Point::Unplugged);
            Ok(Ok(()))
        }
        Unplug::Pending { reason } => Ok(Err(Wait {
            reason: reason::UNPLUG_PENDING,
            message: format!(
                "the guest was asked to let the device go and has not yet ({reason}); it is asked again. The VF stays reserved until then"
            ),
        })),
    }
}

/// Closes what the claim's attachment opened in its launcher: the group's gates
/// always, the shared ones when QEMU has no device of ours any more. The caller
/// has the VM's turn, so none is being plugged in meanwhile.
pub async fn close_gates(agent: &Agent, claim: &VFClaim) -> Result<(), ReconcileError> {
    let Ok(recorded) = recorded(claim) else {
        return Ok(());
    };
    let pod_uid = recorded.attachment.pod_uid.clone();
    let group = recorded.group;
    let left = match qemu::find(agent, &pod_uid).await? {
        Some(vm) => our_devices(&vm.session.machine().await.map_err(VmError::from)?),
        None => 0,
    };
    gates(agent, move |gates| {
        gates.close_device(&pod_uid, group)?;
        match close_after_release(left) {
            Close::All => gates.close_all(&pod_uid),
            Close::Group => Ok(()),
        }
    })
    .await?;
    reach(Point::GatesClosed);
    Ok(())
}

/// Clears the attachment and what the guest had of it; the device stays.
pub async fn forget_attachment(
    api: &Api<VFClaim>,
    claim: &VFClaim,
) -> Result<VFClaim, ReconcileError> {
    let fields = json!({"attachment": null, "guestDevice": null});
    Ok(status::decide(api, claim, MANAGER, &fields).await?)
}

/// Clears device and attachment: the VF is back. One write.
pub async fn clear_device(api: &Api<VFClaim>, claim: &VFClaim) -> Result<VFClaim, ReconcileError> {
    let fields = json!({"attachment": null, "device": null, "guestDevice": null});
    let claim = status::decide(api, claim, MANAGER, &fields).await?;
    reach(Point::DeviceCleared);
    Ok(claim)
}
