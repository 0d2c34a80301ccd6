//! The QMP way to a hypervisor: a unix socket of the domain's own (an extra `-qmp`), reached
//! through the launcher container's root.
//!
//! `transport` moves messages, `inspect` reads answers, `session` is the conversation.

pub mod inspect;
mod session;
pub mod transport;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::UnixStream;

use super::launcher::QemuProcess;
use super::root::ContainerRoot;
use super::{Hypervisor, HypervisorError, Session};
use session::QmpSession;
use transport::Connection;

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

#[async_trait]
impl Hypervisor for QmpHypervisor {
    async fn connect(&self, qemu: &QemuProcess) -> Result<Arc<dyn Session>, HypervisorError> {
        let session = QmpSession::new(Address {
            pid: qemu.pid,
            root: Arc::clone(&qemu.root),
            socket: self.socket.clone(),
        });
        session.ensure_connected().await?;
        Ok(Arc::new(session))
    }
}

/// Where a QEMU listens.
#[derive(Debug)]
struct Address {
    pid: u32,
    root: Arc<ContainerRoot>,
    socket: PathBuf,
}

impl Address {
    fn unreachable(&self, reason: impl Into<String>) -> HypervisorError {
        HypervisorError::Unreachable {
            pid: self.pid,
            socket: self.socket.display().to_string(),
            reason: reason.into(),
        }
    }

    async fn connect(&self) -> Result<Connection, HypervisorError> {
        let stream = open(&self.root, &self.socket)
            .await
            .map_err(|e| self.unreachable(e.to_string()))?;
        // Anybody in the pod can put a socket there. The kernel says who listens on this one.
        let peer = stream
            .peer_cred()
            .map_err(|e| self.unreachable(e.to_string()))?
            .pid();
        if peer.and_then(|pid| u32::try_from(pid).ok()) != Some(self.pid) {
            return Err(self.unreachable(match peer {
                Some(0) | None => {
                    "the listener's process cannot be seen; the node agent needs hostPID".to_owned()
                }
                Some(other) => format!("process {other} listens there, which is not the VM's QEMU"),
            }));
        }
        Connection::start(stream)
            .await
            .map_err(|e| self.unreachable(e.to_string()))
    }
}

async fn open(root: &ContainerRoot, socket: &Path) -> std::io::Result<UnixStream> {
    let handle = root.handle(socket)?;
    // The handle names the socket itself: no path is walked again.
    UnixStream::connect(ContainerRoot::path_of(handle.as_fd())).await
}
