//! The QMP way to a hypervisor: a unix socket of the domain's own (an extra `-qmp`), reached
//! through the launcher container's root.

use std::path::PathBuf;

/// Where the socket lies in the launcher container unless the node agent is told otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/kubevirt/vf-provisioner/qmp.sock";

/// Reaches QEMU by a QMP unix socket inside its container.
#[derive(Clone, Debug)]
pub struct QmpHypervisor {
    socket: PathBuf,
}

impl QmpHypervisor {
    /// `socket` is a path inside the launcher's container.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }
}
