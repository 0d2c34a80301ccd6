//! Kernel writes that may not come back, each made by a process of its own.
//!
//! Taking a device from vfio-pci waits without end for whoever uses it
//! (drivers/vfio/vfio_main.c, `vfio_unregister_group_dev`), and a card's firmware makes VFs in
//! its own time. A thread that waits like that cannot be killed, and as long as it waits its
//! process does not end and its pod is not replaced. Such a write is therefore made by this
//! program started once more ([`run`]), in a cgroup outside of the pod: one for each PCI
//! function, named after it.
//!
//! The cgroups are the record. Who finds one with a process in it knows that a write to that
//! function has not come back, also when its predecessor made it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::pci::PciAddress;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{KernelError, sysfs};

/// The subcommand that makes one write.
pub const SUBCOMMAND: &str = "kernel-write";

/// Folder of the functions' cgroups, below the root of the cgroup file system.
const FOLDER: &str = "vf-provisioner";

/// A write to a function that has not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The process that waits in the kernel.
    pub pid: u32,
}

/// Makes writes in processes of their own; clones share what they know.
#[derive(Clone, Debug)]
pub struct Helpers {
    folder: PathBuf,
    program: PathBuf,
    /// Cgroups in which something is under way, not yet for too long.
    young: Arc<Mutex<BTreeSet<String>>>,
}

impl Helpers {
    /// `cgroups`: root of the host's cgroup v2 file system; `program`: this one.
    #[must_use]
    pub fn new(cgroups: &Path, program: PathBuf) -> Self {
        Self {
            folder: cgroups.join(FOLDER),
            program,
            young: Arc::default(),
        }
    }

    fn young(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.young.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `text` to `path`, an attribute of `function` or about it, and waits so long.
    ///
    /// # Errors
    /// [`KernelError::Stuck`] when the write has not come back by then, or an earlier one about
    /// this function has not; else the kernel's.
    pub fn write(
        &self,
        function: PciAddress,
        path: &Path,
        text: &str,
        limit: Duration,
    ) -> Result<(), KernelError> {
        let args = [SUBCOMMAND.as_ref(), path.as_os_str(), text.as_ref()];
        let helper = |detail: String| KernelError::Helper { function, detail };
        let ended = self.apart(&function.to_string(), &args, limit);
        let (status, said) = ended.map_err(|error| match error {
            Apart::Stuck(stuck) => KernelError::Stuck { function, stuck },
            Apart::Helper(detail) => helper(detail),
            Apart::Kernel(error) => error,
        })?;
        match (status.success(), said.trim().parse::<i32>()) {
            (true, _) => Ok(()),
            (false, Ok(errno)) => Err(KernelError::file(
                format!("write {text:?} to"),
                path,
                io::Error::from_raw_os_error(errno),
            )),
            (false, Err(_)) => Err(helper(format!("{status} {}", said.trim()))),
        }
    }

    /// Starts this program with `args` in the cgroup of that name, and waits so long for its
    /// end: how it ended, and what it said.
    pub(super) fn apart(
        &self,
        name: &str,
        args: &[&OsStr],
        limit: Duration,
    ) -> Result<(ExitStatus, String), Apart> {
        let _young = Young::enter(self, name)?;
        let cgroup = self.folder.join(name);
        if let Some(stuck) = occupant(&cgroup)? {
            return Err(Apart::Stuck(stuck));
        }
        fs::create_dir_all(&cgroup).map_err(|e| KernelError::file("make", &cgroup, e))?;
        let mut child = Command::new(&self.program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // The container's log would stay open as long as the helper waits.
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| KernelError::file("start", &self.program, e))?;
        // It begins when it is told to, and ends if nobody is left to tell it: what is not in
        // its cgroup yet is known to nobody.
        if let Err(error) = send(&mut child, &cgroup) {
            reap(child);
            return Err(error.into());
        }
        let said = match answer(&mut child, limit) {
            Ok(Some(said)) => said,
            Ok(None) => {
                let stuck = Stuck { pid: child.id() };
                reap(child);
                return Err(Apart::Stuck(stuck));
            }
            Err(error) => {
                reap(child);
                return Err(Apart::Helper(format!("its answer: {error}")));
            }
        };
        let ended = child.wait();
        let status = ended.map_err(|error| Apart::Helper(error.to_string()))?;
        // Empty now; one that stays is found empty.
        let _ = fs::remove_dir(&cgroup);
        Ok((status, said))
    }

    /// An error when a write about `function` has not come back: what the kernel shows of it
    /// is not what there is. A device whose driver waits is shown without one
    /// (drivers/base/dd.c, `__device_release_driver`).
    pub(super) fn check(&self, function: PciAddress) -> Result<(), KernelError> {
        match occupant(&self.folder.join(function.to_string()))? {
            Some(stuck) => Err(KernelError::Stuck { function, stuck }),
            None => Ok(()),
        }
    }

    /// The functions with a write that has not come back.
    pub fn stuck(&self) -> Result<BTreeMap<PciAddress, Stuck>, KernelError> {
        // Kept during the look: what ends meanwhile is not taken for stuck.
        let young = self.young();
        let mut found = BTreeMap::new();
        for name in sysfs::names(&self.folder)? {
            // The folder's own attributes are no addresses.
            let Ok(function) = name.parse::<PciAddress>() else {
                continue;
            };
            if young.contains(&name) {
                continue;
            }
            if let Some(stuck) = occupant(&self.folder.join(&name))? {
                found.insert(function, stuck);
            }
        }
        Ok(found)
    }
}

/// Why a helper did not come to its end.
#[derive(Debug)]
pub(super) enum Apart {
    /// It, or an earlier one of its cgroup, has not come back from the kernel.
    Stuck(Stuck),
    /// What is wrong with the process itself.
    Helper(String),
    Kernel(KernelError),
}

impl From<KernelError> for Apart {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

/// The mark of a cgroup in which something is under way; gone with its end, whatever that is.
struct Young<'h> {
    helpers: &'h Helpers,
    name: String,
}

impl<'h> Young<'h> {
    fn enter(helpers: &'h Helpers, name: &str) -> Result<Self, Apart> {
        let name = name.to_owned();
        if helpers.young().insert(name.clone()) {
            return Ok(Self { helpers, name });
        }
        // The caller has the turn, so this does not happen; it must not be two.
        Err(Apart::Helper("another one is under way".to_owned()))
    }
}

impl Drop for Young<'_> {
    fn drop(&mut self) {
        self.helpers.young().remove(&self.name);
    }
}

/// What a helper is told when it is where it belongs.
const GO: &[u8] = b"go";

/// Moves the helper into its cgroup and has it write.
fn send(child: &mut Child, cgroup: &Path) -> Result<(), KernelError> {
    let procs = cgroup.join("cgroup.procs");
    fs::OpenOptions::new()
        .write(true)
        .open(&procs)
        .and_then(|mut file| file.write_all(child.id().to_string().as_bytes()))
        .map_err(|e| KernelError::file("move a helper by", &procs, e))?;
    let told = match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(GO),
        None => Err(io::Error::other("it has no input")),
    };
    told.map_err(|e| KernelError::file("have a helper of", cgroup, e))
}

/// Waits for the helper's end, on a thread of its own: it may come much later.
fn reap(mut child: Child) {
    // Its input is closed with this: one that was not told to write ends.
    drop(child.stdin.take());
    let waits = std::thread::Builder::new().name("helper".to_owned());
    if let Err(error) = waits.spawn(move || child.wait()) {
        tracing::warn!(%error, "nobody waits for a helper; it stays a zombie when it ends");
    }
}

/// Who is in a cgroup; nobody when there is none.
fn occupant(cgroup: &Path) -> Result<Option<Stuck>, KernelError> {
    let path = cgroup.join("cgroup.procs");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // Taken away while it was open.
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(KernelError::file("read", &path, e)),
    };
    let Some(line) = text.lines().next() else {
        return Ok(None);
    };
    let pid = line.parse().map_err(|_| KernelError::Content {
        path,
        text: line.to_owned(),
        expected: "the id of a process",
    })?;
    Ok(Some(Stuck { pid }))
}

/// What the helper wrote until it ended; `None` when it has not ended in time. Its end of the
/// pipe is closed by its end alone.
fn answer(child: &mut Child, limit: Duration) -> io::Result<Option<String>> {
    let Some(mut pipe) = child.stdout.take() else {
        return Err(io::Error::other("it has no output"));
    };
    let deadline = Instant::now() + limit;
    let mut said = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], wait) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let mut part = [0; 256];
        match pipe.read(&mut part)? {
            0 => return Ok(Some(String::from_utf8_lossy(&said).into_owned())),
            n => said.extend(part.iter().take(n)),
        }
    }
}

/// The helper's part: waits for the word, then writes. Says the errno of a refused write, or
/// words if it did not come to it.
///
/// # Errors
/// Whatever failed; it was said.
pub fn run(path: &Path, text: &str) -> Result<(), io::Error> {
    wait_for_word()?;
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).open(path)?;
        file.write_all(text.as_bytes())
    };
    write().inspect_err(|error: &io::Error| {
        let words = match error.raw_os_error() {
            Some(errno) => errno.to_string(),
            None => error.to_string(),
        };
        // Whoever asked may be gone.
        let _ = io::stdout().write_all(words.as_bytes());
    })
}

/// A helper begins when it is told that it is in its cgroup.
///
/// # Errors
/// Nobody is left to tell it.
pub(super) fn wait_for_word() -> Result<(), io::Error> {
    io::stdin().read_exact(&mut [0; GO.len()])
}
