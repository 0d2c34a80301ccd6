//! What to do next about one claim: the attach and release state machine, as a
//! plain function over what is known. No I/O, no clock.
//!
//! The claim's status is the write-ahead log: `device` is recorded before a VF
//! is touched, `attachment` before `device_add`. The planner asks for facts
//! (`Step::LookAt…`) only when the decision depends on them, so that an idle
//! claim costs no syscall. After every step the executor forgets what the step
//! may have changed and asks again, which is also how a restarted agent finds
//! its place.

use common::api::{ReclaimPolicy, reason};

use super::hold::Drift;

/// What the claim itself says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimFacts {
    /// It has a deletionTimestamp.
    pub deleting: bool,
    /// The controller granted it and found its VM and launcher.
    pub bound: bool,
    pub device: bool,
    pub attachment: bool,
    /// It says that the guest has the device.
    pub reported: bool,
    /// The ledger says that another claim has the VF that this one names.
    pub doubled: bool,
    /// What becomes of its VF, as it was granted.
    pub reclaim: ReclaimPolicy,
    /// The PhysicalFunction says that nobody gets its VF, as `reclaim` asks for.
    pub withheld: bool,
    /// It says so because of another claim, which had the VF before.
    pub withheld_from_it: bool,
    /// It has a namespace, with data that are its as long as it lives.
    pub storage: bool,
}

/// The claim's VF as the host kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vf {
    /// The PF has no VF of that index.
    Absent,
    /// No driver: free.
    Driverless,
    /// On vfio-pci and its group opened for us: free.
    VfioFree,
    /// Somebody holds its group: it is on vfio-pci, or is just being taken from it.
    VfioHeld,
    /// Another driver has it.
    OtherDriver(String),
    /// A write about it, or about its PF, has not come back from the kernel; the words of the
    /// error. What the kernel shows of it is not what there is.
    Stuck(String),
}

/// The VF and how far it is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfSeen {
    pub vf: Vf,
    /// The kernel's readback equals what was granted.
    pub configured: bool,
    /// Driverless, or not there, and nothing of a holder is left on it or in its namespace.
    pub clean: bool,
}

/// The device inside QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InQemu {
    Absent,
    /// QEMU has it, the guest has not given it addresses yet.
    Plugged,
    /// The guest gave it addresses; its PCI address there.
    Configured(String),
}

/// The QEMU process that the claim is about: the attachment's when there is
/// one, else the launcher's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Qemu {
    /// No such process: another boot, the pod is gone, or QEMU ended.
    Gone,
    /// It runs, but a VF must not be plugged into it.
    Unsupported {
        reason: &'static str,
        message: String,
    },
    Running(InQemu),
}

/// What the VM's QEMU has of this claim when the claim records nothing: a device that an
/// earlier copy of it was attached with, whose record is lost (`node/left.rs`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    Nothing,
    /// The claim's device, on a VF that no other claim names.
    Device,
    /// A device under the claim's id of which more is not known; what to say.
    Unknown(Wait),
}

/// What the kernel does for a VF that the guest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// What was granted.
    AsGranted,
    Drifted(Drift),
}

/// Facts gathered so far; `None` is "not looked yet".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub vf: Option<VfSeen>,
    pub qemu: Option<Qemu>,
    pub service: Option<Service>,
    pub left: Option<Left>,
}

/// Why a claim has to wait; becomes a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    pub reason: &'static str,
    pub message: String,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    LookAtVf,
    LookAtQemu,
    /// See whether QEMU has the claim's device already.
    LookForLeft,
    /// Record in the claim the device that QEMU has of it, and its attachment.
    TakeOver,
    /// Choose a VF and record it in the claim.
    Allocate,
    /// Make the PF's VFs; the PF has none.
    CreateVfs,
    /// Configure the VF and bind it to vfio-pci.
    Prepare,
    /// Choose a port and record the attachment in the claim.
    RecordAttachment,
    /// Open the gates, `device_add`, close the gates.
    Plug,
    /// Wait for the guest to configure the device.
    AwaitGuest,
    /// See whether the kernel still does for the guest's VF what was granted.
    LookAtService,
    /// Make it do so again.
    Repair(Drift),
    /// Report the attached device.
    ReportAttached {
        guest_address: String,
    },
    /// The QEMU of the attachment is gone: clear it and begin again.
    ForgetAttachment,
    /// The guest had the device and QEMU has it no more: say so, clear the attachment and
    /// begin again. The VF may be another by now, in another IOMMU group.
    Lose(Wait),
    /// `device_del` and wait for DEVICE_DELETED.
    Unplug,
    /// Close what is left of the gates, reset the VF and leave it driverless.
    Clean,
    /// Wait until the PhysicalFunction says that nobody gets the VF.
    AwaitWithheld,
    /// Clear device and attachment in the claim.
    ClearDevice,
    /// Report why nothing can be done now; something will change it.
    Wait(Wait),
    /// Nothing to do.
    Rest,
}

fn wait(reason: &'static str, message: impl Into<String>) -> Step {
    Step::Wait(Wait {
        reason,
        message: message.into(),
    })
}

/// The next step for a claim.
#[must_use]
pub fn next_step(claim: ClaimFacts, seen: &Seen) -> Step {
    if claim.doubled {
        doubled(claim, seen)
    } else if claim.device && !claim.attachment && claim.withheld_from_it {
        // A predecessor's request was carried out late. Nothing is done to the VF.
        Step::ClearDevice
    } else if claim.deleting {
        release(claim, seen)
    } else {
        attach(claim, seen)
    }
}

/// Two claims name one VF, and the other one has it: a predecessor's request was carried out
/// after this agent had read the claims, or a record was made by hand. One that no QEMU has a
/// device of lets go, and nothing is done to the VF.
fn doubled(claim: ClaimFacts, seen: &Seen) -> Step {
    if !claim.device {
        return Step::Rest;
    }
    if !claim.attachment {
        return Step::ClearDevice;
    }
    match &seen.qemu {
        None => Step::LookAtQemu,
        Some(Qemu::Gone | Qemu::Running(InQemu::Absent)) => Step::ClearDevice,
        Some(Qemu::Unsupported { reason, message }) => wait(reason, message.clone()),
        Some(Qemu::Running(_)) if claim.deleting => Step::Unplug,
        Some(Qemu::Running(_)) => wait(
            reason::CONFLICT,
            "another claim names the VF that this one has; delete the claim that does not work",
        ),
    }
}

fn attach(claim: ClaimFacts, seen: &Seen) -> Step {
    if !claim.bound {
        return Step::Rest;
    }
    if !claim.device {
        return unless_left(seen, choose(seen));
    }
    let Some(vf) = &seen.vf else {
        if claim.attachment && seen.qemu.is_none() {
            // An attached claim is judged by QEMU first: its group is held and
            // must not be probed needlessly.
            return Step::LookAtQemu;
        }
        return match &seen.qemu {
            Some(Qemu::Running(InQemu::Plugged)) => Step::AwaitGuest,
            Some(Qemu::Running(InQemu::Configured(address))) => keep(seen, address),
            _ => Step::LookAtVf,
        };
    };
    if claim.attachment {
        attach_recorded(claim, vf, seen)
    } else {
        attach_new(claim, vf, seen)
    }
}

/// A claim that records no device, or none in a VM and somebody has its VF: before anything else
/// it is seen whether its VM has one, which must neither get a second one nor be forgotten.
fn unless_left(seen: &Seen, otherwise: Step) -> Step {
    match &seen.left {
        None => Step::LookForLeft,
        Some(Left::Device) => Step::TakeOver,
        Some(Left::Unknown(why)) => Step::Wait(why.clone()),
        Some(Left::Nothing) => otherwise,
    }
}

/// A VF is taken from the pool only for a VM that can have one: what waits for a port, perhaps
/// for days, must not keep a VF from others. One whose QEMU does not run yet is prepared for.
fn choose(seen: &Seen) -> Step {
    match &seen.qemu {
        None => Step::LookAtQemu,
        Some(Qemu::Unsupported { reason, message }) => wait(reason, message.clone()),
        Some(Qemu::Gone | Qemu::Running(_)) => Step::Allocate,
    }
}

/// The guest has the device. What was granted was read back before it got it; what somebody
/// did to it since, and what was granted to the copy of which it was taken over, is seen by
/// looking again.
fn keep(seen: &Seen, address: &str) -> Step {
    match &seen.service {
        None => Step::LookAtService,
        Some(Service::Drifted(drift)) => Step::Repair(drift.clone()),
        Some(Service::AsGranted) => Step::ReportAttached {
            guest_address: address.to_owned(),
        },
    }
}

/// The way up to the recorded attachment: nothing of QEMU's is touched yet.
fn attach_new(claim: ClaimFacts, vf: &VfSeen, seen: &Seen) -> Step {
    // A namespace does not go back for want of a port: it would be erased.
    if let Some(Qemu::Unsupported { reason, .. }) = &seen.qemu
        && *reason == reason::NO_FREE_PORT
        && !claim.storage
        && let Some(step) = give_back(vf)
    {
        return step;
    }
    match make_ready(vf) {
        Some(step) if vf.vf == Vf::VfioHeld => return unless_left(seen, step),
        Some(step) => return step,
        None => {}
    }
    match &seen.qemu {
        None => Step::LookAtQemu,
        Some(Qemu::Gone) => wait(
            reason::VM_NOT_RUNNING,
            "the VM's QEMU process is not running on this node; the VF is attached when it runs",
        ),
        Some(Qemu::Unsupported { reason, message }) => wait(reason, message.clone()),
        Some(Qemu::Running(_)) => Step::RecordAttachment,
    }
}

/// The VF goes back to the pool unused; `None` while it is not ours to write to.
fn give_back(vf: &VfSeen) -> Option<Step> {
    match vf.vf {
        Vf::Driverless if vf.clean => Some(Step::ClearDevice),
        Vf::Driverless | Vf::VfioFree => Some(Step::Clean),
        Vf::Absent if vf.clean => Some(Step::ClearDevice),
        // Its namespace is still to be erased.
        Vf::Absent => Some(Step::Clean),
        Vf::VfioHeld | Vf::OtherDriver(_) | Vf::Stuck(_) => None,
    }
}

/// What is still to be done to the VF before a QEMU may have it.
fn make_ready(vf: &VfSeen) -> Option<Step> {
    match &vf.vf {
        Vf::Absent => Some(Step::CreateVfs),
        Vf::VfioHeld => Some(wait(
            reason::PENDING,
            "another process holds the VF's vfio group open; it is left alone until that process closes it",
        )),
        Vf::OtherDriver(driver) => Some(wait(
            reason::PENDING,
            format!(
                "the kernel driver {driver} has the VF; it is left alone until it is unbound from {driver}"
            ),
        )),
        Vf::Stuck(words) => Some(stuck(words)),
        Vf::Driverless => Some(Step::Prepare),
        Vf::VfioFree if !vf.configured => Some(Step::Prepare),
        Vf::VfioFree => None,
    }
}

fn stuck(words: &str) -> Step {
    wait(
        reason::BROKEN,
        format!(
            "{words}. The VF is kept from everybody until it has; an administrator has to end what uses it on the host, or restart the host"
        ),
    )
}

fn attach_recorded(claim: ClaimFacts, vf: &VfSeen, seen: &Seen) -> Step {
    match &seen.qemu {
        None => Step::LookAtQemu,
        Some(Qemu::Gone) => match vf.vf {
            // vhost threads of a dead QEMU may still hold the group.
            Vf::VfioHeld => wait(
                reason::VM_NOT_RUNNING,
                "the VM's QEMU ended and the kernel still holds the VF's vfio group; waiting for it to be let go",
            ),
            Vf::Stuck(ref words) => stuck(words),
            _ => Step::ForgetAttachment,
        },
        Some(Qemu::Unsupported { reason, message }) => wait(reason, message.clone()),
        Some(Qemu::Running(InQemu::Absent)) if claim.reported => Step::Lose(Wait {
            reason: reason::LOST,
            message: lost(vf),
        }),
        Some(Qemu::Running(InQemu::Absent)) => make_ready(vf).unwrap_or(Step::Plug),
        Some(Qemu::Running(InQemu::Plugged)) => Step::AwaitGuest,
        Some(Qemu::Running(InQemu::Configured(address))) => keep(seen, address),
    }
}

/// Why the VM no longer has a device that nobody here took, from what became of its VF.
fn lost(vf: &VfSeen) -> String {
    let cause = match &vf.vf {
        Vf::Absent => {
            "its VF was taken away on the host: somebody changed the number of VFs of the physical function or reloaded its driver"
        }
        Vf::Driverless | Vf::OtherDriver(_) => {
            "its VF was taken from vfio-pci on the host by somebody else"
        }
        Vf::VfioHeld => {
            "the guest ejected it, somebody unplugged it at QEMU's monitor, or its VF is being taken from vfio-pci on the host"
        }
        Vf::VfioFree | Vf::Stuck(_) => {
            "the guest ejected it, or somebody unplugged it at QEMU's monitor"
        }
    };
    format!("the VM lost the device unasked: {cause}. It is attached again")
}

fn release(claim: ClaimFacts, seen: &Seen) -> Step {
    if !claim.device {
        return if claim.bound {
            unless_left(seen, Step::Rest)
        } else {
            Step::Rest
        };
    }
    if claim.attachment {
        match &seen.qemu {
            None => return Step::LookAtQemu,
            Some(Qemu::Running(InQemu::Plugged | InQemu::Configured(_))) => return Step::Unplug,
            // A VM that would be refused today may hold what it got yesterday;
            // nothing is known of the device, so nothing is done to the VF.
            Some(Qemu::Unsupported { reason, message }) => return wait(reason, message.clone()),
            Some(Qemu::Gone | Qemu::Running(InQemu::Absent)) => {}
        }
    }
    let Some(vf) = &seen.vf else {
        return Step::LookAtVf;
    };
    match &vf.vf {
        Vf::Stuck(words) => stuck(words),
        Vf::VfioHeld if claim.attachment => wait(
            reason::UNPLUG_PENDING,
            "the device left QEMU and the kernel still holds the VF's vfio group; the VF is freed when it is let go",
        ),
        // Unless it is the VM's it was never ours in deed: whoever has it keeps it, the claim
        // lets go.
        Vf::VfioHeld => unless_left(seen, let_go(claim)),
        Vf::OtherDriver(_) | Vf::Absent | Vf::Driverless | Vf::VfioFree => match give_back(vf) {
            // A retained one is left as its holder left it: nothing is written to it.
            Some(Step::Clean) if claim.reclaim != ReclaimPolicy::Retain => Step::Clean,
            _ => let_go(claim),
        },
    }
}

/// The claim's record is all that keeps its VF from others. Where it is not to go back to the
/// pool, the PhysicalFunction has to say so before the record goes.
const fn let_go(claim: ClaimFacts) -> Step {
    match claim.reclaim {
        ReclaimPolicy::Return => Step::ClearDevice,
        ReclaimPolicy::Destroy | ReclaimPolicy::Retain if claim.withheld => Step::ClearDevice,
        ReclaimPolicy::Destroy | ReclaimPolicy::Retain => Step::AwaitWithheld,
    }
}

/// How a `device_add` ended, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    Yes,
    No,
    /// Neither it nor the question what became of it was answered.
    Unknown,
}

/// Which of a launcher's gates are to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// The group's node and rule: nobody opens it a second time.
    Group,
    /// Those, and what all VFs of the VM share: `/dev/vfio/vfio` and memlock.
    All,
}

/// What is closed after `device_add`; `others` is how many VFIO devices QEMU had before.
///
/// A QEMU that may have the device must be able to lock its memory again at its guest's next
/// reboot, so what is shared is closed only when it is sure that there is no device.
#[must_use]
pub const fn close_after_add(added: Added, others: u32) -> Close {
    match added {
        Added::No if others == 0 => Close::All,
        Added::Yes | Added::No | Added::Unknown => Close::Group,
    }
}

/// What is closed when a claim's device has left QEMU, which has `left` devices of ours now.
///
/// QEMU is asked, not the claims: of two that are released at once each would be told of the
/// other. A claim that is still to be plugged in opens the gates itself.
#[must_use]
pub const fn close_after_release(left: usize) -> Close {
    match left {
        0 => Close::All,
        _ => Close::Group,
    }
}

#[cfg(test)]
mod tests;
