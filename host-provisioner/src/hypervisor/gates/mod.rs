//! A launcher container's three gates: the device node, the device cgroup, and QEMU's memlock
//! limit. Each keeps an unprivileged QEMU from a VF; each is opened for one attachment and
//! closed again, after a crash of ours too.
//!
//! Order is everything: what is about to be opened is in the journal, on disk, before it is
//! opened (`journal`), so that whatever kills us, the next start closes it.

pub mod bpf;
pub mod cgroup;
pub mod filter;
pub mod host;
pub mod journal;
pub mod memlock;
pub mod nodes;
pub mod usage;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::GuestMemory;
use super::launcher::{LauncherError, QemuProcess};
use super::memory::MemoryFacts;
use journal::Journal;

/// Why a gate could not be opened, closed or looked at.
#[derive(Debug, Error)]
pub enum GateError {
    #[error("{action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    /// The node or the pod is of a kind that is never served; a sentence for its owner.
    #[error("{0}")]
    Refused(String),
    /// Another program changes the same thing; nothing is left half done, try again.
    #[error("{0}")]
    Busy(String),
    #[error("{path} is damaged: {reason}")]
    Journal { path: PathBuf, reason: String },
}

impl GateError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.into(),
            source,
        }
    }
}

/// What happened to one journal at start.
#[derive(Debug)]
pub struct Recovered {
    pub pod_uid: String,
    /// True when the VM still holds a VF, so that memlock and `/dev/vfio/vfio` stay.
    pub kept: bool,
    pub result: Result<(), GateError>,
}

/// Opens and closes a launcher's gates. Blocking; calls about one pod take turns.
pub trait Gates: Send + Sync + 'static {
    /// Reads what the memory decision needs (`memory::check`).
    fn memory_facts(
        &self,
        qemu: &QemuProcess,
        guest: GuestMemory,
        vfio_devices: u32,
    ) -> Result<MemoryFacts, GateError>;

    /// Opens everything that this QEMU needs for VFIO group `group`: the nodes `/dev/vfio/vfio`
    /// and `/dev/vfio/<group>`, device rules for both, and a memlock limit of at least `memlock`
    /// bytes. Idempotent. On an error some gates may be open: call `close_device`.
    fn open(&self, qemu: &QemuProcess, group: u32, memlock: u64) -> Result<(), GateError>;

    /// Closes what belongs to `group` alone: its node and its rule. `/dev/vfio/vfio` and memlock
    /// stay. To be called right after `device_add`, however it ended. Idempotent.
    fn close_device(&self, pod_uid: &str, group: u32) -> Result<(), GateError>;

    /// Closes everything, once the VM's last VFIO device is gone or the VM itself is. Idempotent.
    fn close_all(&self, pod_uid: &str) -> Result<(), GateError>;

    /// Raises memlock again if somebody lowered it below what the pod's attached devices need:
    /// KubeVirt writes the same limit, and QEMU, which maps all memory again at a reboot, ends
    /// when a map fails. True when it had to. Cheap: asks no monitor.
    fn keep_memlock(&self, pod_uid: &str) -> Result<bool, GateError>;

    /// `VmLck` of this QEMU before its first VFIO device, as recorded; else what it is now.
    /// Part of `memory::needed_memlock`.
    fn locked_before(&self, qemu: &QemuProcess) -> Result<u64, GateError>;

    /// At start: closes what a dead predecessor left open. `still_attached` says whether that
    /// QEMU holds a VF now; nodes and rules of groups are closed even then.
    fn recover(
        &self,
        still_attached: &dyn Fn(&Journal) -> bool,
    ) -> Result<Vec<Recovered>, GateError>;
}
