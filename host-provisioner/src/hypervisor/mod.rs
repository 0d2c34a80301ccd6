//! The hypervisor's side of a node: finding a VM's QEMU process, talking to it,
//! and opening what keeps it from a VF. Nothing here decides which VF a claim
//! gets, and nothing here writes to sysfs.
//!
//! `plan` and `memory` are plain functions over plain values; `launcher` and
//! `gates` make blocking system calls (call them where blocking is allowed);
//! `qmp` is asynchronous.

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod gates;
pub mod launcher;
pub mod memory;
pub mod plan;
pub mod qmp;
pub mod root;

use std::time::Duration;

use async_trait::async_trait;
use common::pci::PciAddress;
use serde_json::Value;
use thiserror::Error;
use tokio::sync::broadcast;

use launcher::QemuProcess;

/// What went wrong between us and a hypervisor.
#[derive(Clone, Debug, Error)]
pub enum HypervisorError {
    /// The monitor cannot be reached: no socket yet, nobody listens, or it is not this VM's.
    #[error("QEMU's monitor {socket} of pod process {pid} cannot be used: {reason}")]
    Unreachable {
        pid: u32,
        socket: String,
        reason: String,
    },
    /// The connection ended while a command was under way. Whether QEMU carried
    /// it out is unknown: look, never assume.
    #[error("the connection to QEMU ended during {command}: {reason}; its outcome is unknown")]
    Lost { command: String, reason: String },
    /// QEMU did not answer in time. It may still carry the command out: look.
    #[error("QEMU has not answered {command} within {seconds} s; its outcome is unknown")]
    TimedOut { command: String, seconds: u64 },
    /// QEMU refused. `class` is QMP's error class, `DeviceNotFound` being the one that matters.
    #[error("QEMU refused {command}: {description} ({class})")]
    Refused {
        command: String,
        class: String,
        description: String,
    },
    /// QEMU answered something that its schema does not allow.
    #[error("QEMU's answer to {command} makes no sense: {reason}")]
    Malformed { command: String, reason: String },
}

impl HypervisorError {
    /// True when the command may have been carried out all the same.
    #[must_use]
    pub const fn outcome_unknown(&self) -> bool {
        matches!(
            self,
            Self::Lost { .. } | Self::TimedOut { .. } | Self::Malformed { .. }
        )
    }

    /// True when QEMU does not know the device that the command named.
    #[must_use]
    pub fn is_device_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }
}

/// Something QEMU said unasked. `data` is kept raw: QEMU sends events that no
/// library knows, and none may end the stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub name: String,
    pub data: Value,
}

impl Event {
    /// The id of the device that a `DEVICE_DELETED` or `DEVICE_UNPLUG_GUEST_ERROR` names.
    #[must_use]
    pub fn device(&self) -> Option<&str> {
        self.data.get("device").and_then(Value::as_str)
    }
}

/// A PCIe root port that carries an id, so that a device can be put on it by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootPort {
    pub id: String,
    /// The port's own address in the guest, as QEMU's function 0 bus sees it.
    pub address: Option<PciAddress>,
    /// False when the machine forbids hotplug on it.
    pub hotplug: bool,
    pub occupied: bool,
    /// The number that the guest's firmware or kernel gave to the bus behind the port; 0: none yet.
    pub secondary_bus: u8,
}

/// What a VM is, as far as an attachment depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// QEMU's machine type, e.g. `pc-q35-10.0-machine`.
    pub machine_type: String,
    /// The domain's UUID, lower case.
    pub uuid: String,
    /// QMP's run state, e.g. `running`, `paused`, `inmigrate`.
    pub run_state: String,
    /// A vIOMMU in the guest, if there is one.
    pub viommu: Option<ViommuFacts>,
    /// SEV, TDX or the like.
    pub confidential: bool,
    pub memory: GuestMemory,
    pub ports: Vec<RootPort>,
    /// Ids below `/machine/peripheral`, with their QOM types.
    pub peripherals: Vec<Peripheral>,
}

impl Machine {
    /// Ids of the VFIO devices that this VM has.
    pub fn vfio_devices(&self) -> impl Iterator<Item = &str> {
        self.peripherals
            .iter()
            .filter(|p| p.type_ == "vfio-pci")
            .map(|p| p.id.as_str())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViommuFacts {
    pub type_: String,
    /// Whether it tells the host of every mapping the guest makes; without it VFIO cannot work.
    pub caching_mode: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peripheral {
    pub id: String,
    /// The QOM type, e.g. `pcie-root-port`, `vfio-pci`.
    pub type_: String,
}

/// Guest memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestMemory {
    /// What the guest has now: base plus plugged.
    pub present: u64,
    /// What it may grow to by memory hotplug; at least `present`.
    pub maximum: u64,
    /// Memory that VFIO maps beyond RAM: video memory, ROMs, device memory.
    pub device: u64,
}

/// How far a device has come in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestView {
    /// QEMU has no such device.
    Absent,
    /// QEMU has it, the guest has not configured it: `missing` says what is lacking.
    Plugged { missing: String },
    /// The guest uses it, at this address.
    Configured { address: PciAddress },
}

/// A device that QEMU has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// The host's function behind it; `None` for a device that is no VFIO one.
    pub host: Option<PciAddress>,
    /// Id of the port that it is on.
    pub port: String,
}

/// How a request to take a device out ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unplug {
    /// `DEVICE_DELETED` was seen, or QEMU does not know the device.
    Deleted,
    /// The guest has not let go within the time; the request stands and may be repeated.
    Pending { reason: String },
}

/// Reaches the hypervisor of a VM.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// A session with this process. Nothing is remembered between sessions but
    /// what QEMU itself knows.
    async fn connect(
        &self,
        qemu: &QemuProcess,
    ) -> Result<std::sync::Arc<dyn Session>, HypervisorError>;
}

/// A conversation with one QEMU. It survives a lost socket: the next call connects again.
#[async_trait]
pub trait Session: Send + Sync + 'static {
    /// What the VM is and which ports it has, read anew.
    async fn machine(&self) -> Result<Machine, HypervisorError>;

    /// Adds the host's function `host` as a vfio-pci device on `port`. `timeout` must allow
    /// for pinning all guest memory (`memory::attach_timeout`). An error for which
    /// `outcome_unknown` holds means: ask `guest_view`.
    async fn device_add(
        &self,
        id: &str,
        host: PciAddress,
        port: &str,
        timeout: Duration,
    ) -> Result<(), HypervisorError>;

    /// Asks the guest to let the device go and waits for `DEVICE_DELETED` until `deadline` has
    /// passed. Repeating it while it is pending is allowed, at least 10 s apart.
    async fn device_del(&self, id: &str, deadline: Duration) -> Result<Unplug, HypervisorError>;

    /// How far the device has come.
    async fn guest_view(&self, id: &str) -> Result<GuestView, HypervisorError>;

    /// The host's function behind a device: `None` when QEMU has no device of that id, or one
    /// that is no VFIO device.
    async fn host(&self, id: &str) -> Result<Option<PciAddress>, HypervisorError>;

    /// What a device of that id is, if QEMU has one.
    async fn plugged(&self, id: &str) -> Result<Option<Plugged>, HypervisorError>;

    /// Events from now on. `None` items never end it; a lost connection closes it, and the next
    /// call of `events` starts anew.
    async fn events(&self) -> Result<broadcast::Receiver<Event>, HypervisorError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_tells_that_nothing_happened() {
        let refused = HypervisorError::Refused {
            command: "device_add".into(),
            class: "GenericError".into(),
            description: "no".into(),
        };
        assert!(!refused.outcome_unknown());
        let lost = HypervisorError::Lost {
            command: "device_add".into(),
            reason: "EOF".into(),
        };
        assert!(lost.outcome_unknown());
    }
}
