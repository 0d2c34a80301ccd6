//! One agent per node for sure: an exclusive lock on a host path, held for the
//! process's whole life. Touches only that file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why the agent's lock could not be taken.
#[derive(Debug, Error)]
pub enum LockError {
    #[error(
        "another node agent holds {path}; only one may run on a node: wait for it to end, or remove the second one"
    )]
    Held { path: PathBuf },
    #[error("cannot lock {path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// The lock; the kernel lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct AgentLock {
    _file: File,
}

impl AgentLock {
    /// Takes the lock at `path`, or says who cannot have it. Does not wait.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        let io = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held {
                    path: path.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        // For the person who looks; the lock itself does not depend on it.
        file.set_len(0).map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_until_the_first_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/agent.lock");
        let first = AgentLock::acquire(&path).unwrap();
        assert!(matches!(
            AgentLock::acquire(&path),
            Err(LockError::Held { .. })
        ));
        drop(first);
        AgentLock::acquire(&path).unwrap();
    }
}
