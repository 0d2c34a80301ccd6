//! Device nodes in a container's `/dev/vfio`, made and removed through its root, never through a
//! symbolic link.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, fstatat, major, makedev, minor, mkdirat, mknodat, stat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, unlinkat};

use super::GateError;
use super::journal::{Device, NodeRecord};
use crate::hypervisor::root::ContainerRoot;

/// The folder of VFIO's nodes below `/dev`.
const FOLDER: &str = "vfio";

/// What lies under a node's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Present {
    Nothing,
    /// The very device.
    Same,
    /// Something else: another device, a file, a link.
    Other,
}

/// The numbers of a character device on the host, e.g. `/dev/vfio/6`.
pub fn host_device(path: &Path) -> Result<Device, GateError> {
    let found = stat(path).map_err(|e| GateError::io("look at", path, e.into()))?;
    if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT != SFlag::S_IFCHR {
        return Err(GateError::io(
            "use",
            path,
            io::Error::other("it is no character device"),
        ));
    }
    device_of(found.st_rdev).ok_or_else(|| {
        GateError::io(
            "use",
            path,
            io::Error::other("its device number is out of range"),
        )
    })
}

fn device_of(rdev: libc::dev_t) -> Option<Device> {
    Some(Device {
        major: u32::try_from(major(rdev)).ok()?,
        minor: u32::try_from(minor(rdev)).ok()?,
    })
}

/// A container's `/dev`, and its `/dev/vfio` where there is one.
#[derive(Debug)]
pub struct DevFolder {
    dev: OwnedFd,
    vfio: Option<OwnedFd>,
}

impl DevFolder {
    pub fn open(root: &ContainerRoot) -> Result<Self, GateError> {
        let dev = root
            .directory_no_links(Path::new("/dev"))
            .map_err(|e| GateError::io("open the container's", "/dev", e))?;
        let vfio = below(&dev)?;
        Ok(Self { dev, vfio })
    }

    /// Whether `/dev/vfio` is there.
    #[must_use]
    pub const fn has_folder(&self) -> bool {
        self.vfio.is_some()
    }

    /// Makes `/dev/vfio` if it is not there.
    pub fn make_folder(&mut self) -> Result<(), GateError> {
        if self.vfio.is_none() {
            let mode = Mode::from_bits_truncate(0o755);
            match mkdirat(&self.dev, FOLDER, mode) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(GateError::io("make the container's", "/dev/vfio", e.into())),
            }
            self.vfio = below(&self.dev)?;
        }
        Ok(())
    }

    /// Removes `/dev/vfio`; false when something is still in it, which stays.
    pub fn remove_folder(&self) -> Result<bool, GateError> {
        match unlinkat(&self.dev, FOLDER, UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(true),
            Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::EBUSY) => Ok(false),
            Err(e) => Err(GateError::io(
                "remove the container's",
                "/dev/vfio",
                e.into(),
            )),
        }
    }

    /// What lies under this node's name now.
    pub fn present(&self, node: &NodeRecord) -> Result<Present, GateError> {
        let Some(vfio) = &self.vfio else {
            return Ok(Present::Nothing);
        };
        match fstatat(vfio, node.name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => Ok(Present::Nothing),
            Err(e) => Err(GateError::io(
                "look at the container's",
                path(node),
                e.into(),
            )),
            Ok(found) => {
                let kind = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT;
                let same = kind == SFlag::S_IFCHR && device_of(found.st_rdev) == Some(node.device);
                Ok(if same { Present::Same } else { Present::Other })
            }
        }
    }

    /// Makes the node, for `uid` and `gid` alone. `/dev/vfio` must be there.
    pub fn make(&self, node: &NodeRecord, uid: u32, gid: u32) -> Result<(), GateError> {
        let failed = |action, e: Errno| GateError::io(action, path(node), e.into());
        let vfio = self
            .vfio
            .as_ref()
            .ok_or_else(|| failed("make the container's", Errno::ENOENT))?;
        let name = node.name.as_str();
        let number = makedev(node.device.major.into(), node.device.minor.into());
        mknodat(
            vfio,
            name,
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o600),
            number,
        )
        .map_err(|e| failed("make the container's", e))?;
        fchownat(
            vfio,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(|e| failed("give to QEMU the container's", e))
    }

    /// Removes the node if it is still this device; what somebody put in its place is theirs.
    pub fn remove(&self, node: &NodeRecord) -> Result<(), GateError> {
        let (Some(vfio), Present::Same) = (&self.vfio, self.present(node)?) else {
            return Ok(());
        };
        match unlinkat(vfio, node.name.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(GateError::io(
                "remove the container's",
                path(node),
                e.into(),
            )),
        }
    }
}

fn path(node: &NodeRecord) -> PathBuf {
    Path::new("/dev").join(FOLDER).join(&node.name)
}

fn below(dev: &OwnedFd) -> Result<Option<OwnedFd>, GateError> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    match openat2(dev.as_fd(), FOLDER, how) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(GateError::io("open the container's", "/dev/vfio", e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

    fn node() -> NodeRecord {
        NodeRecord {
            name: "6".into(),
            device: Device { major: 1, minor: 3 },
        }
    }

    #[test]
    fn a_node_is_made_for_qemu_alone_and_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("dev")).unwrap();
        let root = ContainerRoot::open(dir.path()).unwrap();
        let mut dev = DevFolder::open(&root).unwrap();
        assert!(!dev.has_folder());
        assert!(dev.make(&node(), 107, 107).is_err());
        dev.make_folder().unwrap();
        assert_eq!(dev.present(&node()).unwrap(), Present::Nothing);
        dev.make(&node(), 107, 108)
            .expect("making a device node needs root (CAP_MKNOD)");
        let made = std::fs::symlink_metadata(dir.path().join("dev/vfio/6")).unwrap();
        assert!(made.file_type().is_char_device());
        assert_eq!(
            (made.uid(), made.gid(), made.permissions().mode() & 0o7777),
            (107, 108, 0o600)
        );
        assert_eq!(dev.present(&node()).unwrap(), Present::Same);
        assert!(!dev.remove_folder().unwrap());
        dev.remove(&node()).unwrap();
        dev.remove(&node()).unwrap();
        assert!(dev.remove_folder().unwrap());
        assert!(!dir.path().join("dev/vfio").exists());
    }

    #[test]
    fn links_are_not_followed_and_strange_things_stay() {
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("dev")).unwrap();
        symlink(elsewhere.path(), dir.path().join("dev/vfio")).unwrap();
        let root = ContainerRoot::open(dir.path()).unwrap();
        assert!(DevFolder::open(&root).is_err());
        std::fs::remove_file(dir.path().join("dev/vfio")).unwrap();
        std::fs::create_dir(dir.path().join("dev/vfio")).unwrap();
        std::fs::write(dir.path().join("dev/vfio/6"), "mine").unwrap();
        let dev = DevFolder::open(&root).unwrap();
        assert_eq!(dev.present(&node()).unwrap(), Present::Other);
        dev.remove(&node()).unwrap();
        assert!(dir.path().join("dev/vfio/6").exists());
        assert!(
            std::fs::read_dir(elsewhere.path())
                .unwrap()
                .next()
                .is_none()
        );
    }

    #[test]
    fn the_hosts_numbers_are_read() {
        assert_eq!(
            host_device(Path::new("/dev/null")).unwrap(),
            Device { major: 1, minor: 3 }
        );
        assert!(host_device(Path::new("/etc/passwd")).is_err());
        assert!(host_device(Path::new("/nonexistent")).is_err());
    }
}
