//! Conditions: their types, reasons, and the rule by which one is replaced.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Condition types; who writes each is said in `docs/architecture.md`.
pub mod type_ {
    /// Controller: the claim was granted what `status.admitted` says.
    pub const ADMITTED: &str = "Admitted";
    /// Controller: the claim's VM and host node are known.
    pub const RESOLVED: &str = "Resolved";
    /// Node agent: a VF was chosen and recorded in `status.device`.
    pub const ALLOCATED: &str = "Allocated";
    /// Node agent: the VF exists, is configured and bound to vfio-pci.
    pub const PREPARED: &str = "Prepared";
    /// Node agent: QEMU has the device and the guest has configured it.
    pub const ATTACHED: &str = "Attached";
    /// Node agent on the host, guest-syncer in the guest: the claim can be used.
    pub const READY: &str = "Ready";
    /// Node agent, on a PhysicalFunction: it carries the host's own traffic.
    pub const IN_USE_BY_HOST: &str = "InUseByHost";
    /// Node agent, on a managed PhysicalFunction: its number of VFs is as asked.
    pub const RESIZED: &str = "Resized";
    /// guest-syncer, in the guest: the host has this spec of the claim.
    pub const SYNCED: &str = "Synced";
}

/// Condition reasons: stable words that scripts may match.
pub mod reason {
    pub const ADMITTED: &str = "Admitted";
    pub const ALLOCATED: &str = "Allocated";
    pub const APPLIED: &str = "Applied";
    pub const ATTACHED: &str = "Attached";
    pub const BROKEN: &str = "Broken";
    pub const BUILT_IN: &str = "BuiltIn";
    pub const CLASS_NOT_ALLOWED: &str = "ClassNotAllowed";
    pub const CLASS_NOT_FOUND: &str = "ClassNotFound";
    pub const CONFLICT: &str = "Conflict";
    pub const CORDONED: &str = "Cordoned";
    pub const DEGRADED: &str = "Degraded";
    pub const DETACHING: &str = "Detaching";
    pub const GUEST_NOT_CONFIGURED: &str = "GuestNotConfigured";
    pub const GUEST_CLUSTER_NOT_FOUND: &str = "GuestClusterNotFound";
    pub const GUEST_IDENTITY_MISMATCH: &str = "GuestIdentityMismatch";
    pub const HANDED_OVER: &str = "HandedOver";
    pub const HOST_UNREACHABLE: &str = "HostUnreachable";
    pub const IN_USE: &str = "InUse";
    pub const IN_USE_BY_HOST: &str = "InUseByHost";
    pub const INSUFFICIENT_MEMORY: &str = "InsufficientMemory";
    pub const IP_CONTRADICTS: &str = "IPContradicts";
    pub const LOADED: &str = "Loaded";
    pub const LOAD_FAILED: &str = "LoadFailed";
    pub const LOST: &str = "Lost";
    pub const MAC_IN_USE: &str = "MACAddressInUse";
    pub const MASS_ORPHAN: &str = "MassOrphan";
    pub const MODULE_IN_USE: &str = "ModuleInUse";
    pub const MODULE_KEPT: &str = "ModuleKept";
    pub const MODULE_NOT_FOUND: &str = "ModuleNotFound";
    pub const MODULE_REFUSED: &str = "ModuleRefused";
    pub const NODE_NOT_FOUND: &str = "NodeNotFound";
    pub const NODE_WITHOUT_UUID: &str = "NodeWithoutSystemUUID";
    pub const NO_FREE_NAMESPACE: &str = "NoFreeNamespace";
    pub const NO_FREE_PORT: &str = "NoFreePCIePort";
    pub const NO_FREE_VF: &str = "NoFreeVF";
    pub const NO_MANAGED_PF: &str = "NoManagedPF";
    pub const NO_MATCHING_PF: &str = "NoMatchingPF";
    pub const NOT_ISOLATED: &str = "NotIsolated";
    pub const NOT_IN_USE: &str = "NotInUse";
    pub const NOT_MANAGED: &str = "NotManaged";
    pub const NOT_PRESENT: &str = "NotPresent";
    pub const OVERRIDE_NOT_ALLOWED: &str = "OverrideNotAllowed";
    pub const PARAMETER_UNKNOWN: &str = "ParameterUnknown";
    pub const PENDING: &str = "Pending";
    pub const PREPARED: &str = "Prepared";
    pub const PREREQUISITES_MISSING: &str = "PrerequisitesMissing";
    pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";
    pub const READY: &str = "Ready";
    pub const REFUSED: &str = "RefusedByHost";
    pub const RELEASED: &str = "Released";
    pub const RELEASING: &str = "Releasing";
    pub const REPAIRED: &str = "Repaired";
    pub const RESIZED: &str = "Resized";
    pub const RESIZING: &str = "Resizing";
    pub const RESOLVED: &str = "Resolved";
    pub const RETRYING: &str = "Retrying";
    pub const SYNCED: &str = "Synced";
    pub const UNPLUG_PENDING: &str = "UnplugPending";
    pub const UNSUPPORTED_DRIVER: &str = "UnsupportedDriver";
    pub const UNSUPPORTED_SETTING: &str = "UnsupportedSetting";
    pub const UNSUPPORTED_VM: &str = "UnsupportedVM";
    pub const VM_AMBIGUOUS: &str = "VMAmbiguous";
    pub const VM_MOVED: &str = "VMMoved";
    pub const VM_NOT_FOUND: &str = "VMNotFound";
    pub const VM_NOT_RUNNING: &str = "VMNotRunning";
}

/// A condition's truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionStatus {
    True,
    False,
    Unknown,
}

impl ConditionStatus {
    /// The word in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// What a writer wants a condition to say; the transition time is not its to choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewCondition {
    pub type_: &'static str,
    pub status: ConditionStatus,
    pub reason: String,
    /// For a person: what is so and, when it is not good, what to do.
    pub message: String,
}

impl NewCondition {
    #[must_use]
    pub fn new(
        type_: &'static str,
        status: ConditionStatus,
        reason: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            type_,
            status,
            reason: reason.into(),
            message: message.into(),
        }
    }
}

/// The condition of this type, if there is one.
#[must_use]
pub fn condition<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// Puts `new` among `conditions`; true when that changed anything.
///
/// `lastTransitionTime` moves only when the status does (Kubernetes API
/// conventions), so an unchanged report is an unchanged list and costs no write.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    new: &NewCondition,
    observed_generation: Option<i64>,
    now: &Time,
) -> bool {
    let built = |since: Time| Condition {
        last_transition_time: since,
        message: new.message.clone(),
        observed_generation,
        reason: new.reason.clone(),
        status: new.status.as_str().to_owned(),
        type_: new.type_.to_owned(),
    };
    match conditions.iter_mut().find(|c| c.type_ == new.type_) {
        None => {
            conditions.push(built(now.clone()));
            true
        }
        Some(old) => {
            let since = if old.status == new.status.as_str() {
                old.last_transition_time.clone()
            } else {
                now.clone()
            };
            let next = built(since);
            let changed = *old != next;
            *old = next;
            changed
        }
    }
}
