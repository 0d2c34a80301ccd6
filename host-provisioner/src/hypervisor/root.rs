//! A container's root directory as an open descriptor, and the only way into it.
//!
//! Whoever runs in the container may make any symbolic link there. Every path is therefore
//! resolved by the kernel with the container's root as its root (`openat2`, RESOLVE_IN_ROOT),
//! and magic links of proc are never followed (RESOLVE_NO_MAGICLINKS).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

/// A root directory that stays the same one, whatever happens to the process it was taken from.
#[derive(Debug)]
pub struct ContainerRoot {
    fd: OwnedFd,
}

impl ContainerRoot {
    /// The directory at `path`, e.g. `/proc/123/root`. `path` itself is trusted.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = nix::fcntl::open(
            path,
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { fd })
    }

    /// A handle (O_PATH) on what `path` names inside, symbolic links resolved inside.
    pub fn handle(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, OFlag::O_PATH, ResolveFlag::empty())
    }

    /// A handle on a directory inside, no component of which may be a symbolic link.
    pub fn directory_no_links(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(
            path,
            OFlag::O_PATH | OFlag::O_DIRECTORY,
            ResolveFlag::RESOLVE_NO_SYMLINKS,
        )
    }

    /// A path by which this process, and no other, can name an open handle.
    #[must_use]
    pub fn path_of(handle: BorrowedFd<'_>) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()))
    }

    fn resolve(&self, path: &Path, flags: OFlag, extra: ResolveFlag) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | extra);
        // EAGAIN: something was renamed while the kernel walked the path (openat2(2)).
        for _ in 0..16 {
            match openat2(self.fd.as_fd(), path, how) {
                Err(nix::errno::Errno::EAGAIN) => {}
                other => return Ok(other?),
            }
        }
        Err(io::Error::from(nix::errno::Errno::EAGAIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_cannot_leave_the_root() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let inside = tempfile::tempdir().unwrap();
        std::fs::create_dir(inside.path().join("run")).unwrap();
        std::fs::write(inside.path().join("run/ours"), "o").unwrap();
        symlink(outside.path(), inside.path().join("away")).unwrap();
        symlink("/run", inside.path().join("var-run")).unwrap();
        symlink("../../../../../../etc", inside.path().join("up")).unwrap();

        let root = ContainerRoot::open(inside.path()).unwrap();
        assert!(root.handle(Path::new("/away/secret")).is_err());
        assert!(root.handle(Path::new("up/passwd")).is_err());
        let handle = root.handle(Path::new("/var-run/ours")).unwrap();
        let read = std::fs::read_to_string(ContainerRoot::path_of(handle.as_fd())).unwrap();
        assert_eq!(read, "o");
        assert!(root.directory_no_links(Path::new("var-run")).is_err());
        assert!(root.directory_no_links(Path::new("run")).is_ok());
    }
}
