//! Writes that do not come back, made by the program's own helpers in real cgroups. What
//! waits is a write to a FIFO that nobody reads.
//! Needs root and a cgroup v2 mount.
// clippy knows functions marked as tests only, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::pci::PciAddress;
use host_provisioner::kernel::{Helpers, KernelError};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

const SOON: Duration = Duration::from_millis(300);
/// So long is waited for what must come.
const COMES: Duration = Duration::from_secs(30);

struct Stage {
    folder: tempfile::TempDir,
    cgroups: PathBuf,
}

impl Stage {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let line = mounts
            .lines()
            .find(|l| l.split(' ').nth(2) == Some("cgroup2"))
            .expect("this test needs a cgroup v2 mount");
        let mount = Path::new(line.split(' ').nth(1).unwrap());
        let cgroups = mount.join(format!("vf-helper-{}-{name}", std::process::id()));
        fs::create_dir(&cgroups).expect("this test needs root to make a cgroup");
        Self {
            folder: tempfile::tempdir().unwrap(),
            cgroups,
        }
    }

    /// As an agent has them.
    fn helpers(&self) -> Helpers {
        let program = PathBuf::from(env!("CARGO_BIN_EXE_host-provisioner"));
        Helpers::new(&self.cgroups, program)
    }

    fn fifo(&self) -> PathBuf {
        let path = self.folder.path().join("unbind");
        mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        path
    }

    fn cgroup(&self, function: PciAddress) -> PathBuf {
        self.cgroups
            .join("vf-provisioner")
            .join(function.to_string())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let folder = self.cgroups.join("vf-provisioner");
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let _ = fs::write(entry.path().join("cgroup.kill"), "1");
            let deadline = Instant::now() + COMES;
            while fs::remove_dir(entry.path()).is_err() && entry.path().is_dir() {
                if Instant::now() > deadline {
                    break;
                }
                std::thread::yield_now();
            }
        }
        let _ = fs::remove_dir(folder);
        let _ = fs::remove_dir(&self.cgroups);
    }
}

fn function(n: u8) -> PciAddress {
    format!("0000:01:10.{n}").parse().unwrap()
}

fn stuck_pid(done: Result<(), KernelError>) -> u32 {
    match done {
        Err(KernelError::Stuck { stuck, .. }) => stuck.pid,
        other => panic!("not stuck: {other:?}"),
    }
}

fn until_none_is_stuck(helpers: &Helpers) {
    let deadline = Instant::now() + COMES;
    while !helpers.stuck().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", helpers.stuck());
        std::thread::yield_now();
    }
}

#[test]
fn what_comes_back_leaves_nothing_and_a_refusal_keeps_its_errno() {
    let stage = Stage::new("ends");
    let helpers = stage.helpers();
    let file = stage.folder.path().join("sriov_numvfs");
    fs::write(&file, "0").unwrap();
    helpers.write(function(0), &file, "7", COMES).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "7");
    assert!(!stage.cgroup(function(0)).exists());

    let absent = stage.folder.path().join("absent");
    let error = helpers.write(function(0), &absent, "7", COMES).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOENT), "{error}");
    assert!(!absent.exists(), "an attribute is never made");
    // The kernel's own refusal: a negative number of huge pages, say, or here of a limit.
    let attribute = stage.cgroups.join("cgroup.max.depth");
    let error = helpers
        .write(function(0), &attribute, "no number", COMES)
        .unwrap_err();
    assert_eq!(error.errno(), Some(libc::EINVAL), "{error}");
    assert!(helpers.stuck().unwrap().is_empty());
}

#[test]
fn what_does_not_come_back_is_left_alone_and_known_to_a_successor() {
    let stage = Stage::new("waits");
    let fifo = stage.fifo();
    let helpers = stage.helpers();
    let pid = stuck_pid(helpers.write(function(0), &fifo, "0000:01:10.0", SOON));
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(
        cgroup.trim().ends_with("/vf-provisioner/0000:01:10.0"),
        "{cgroup}"
    );
    let log = fs::read_link(format!("/proc/{pid}/fd/2")).unwrap();
    assert_eq!(
        log,
        Path::new("/dev/null"),
        "it keeps a container's log open"
    );

    // A second write does not wait behind the first, and starts nobody.
    assert_eq!(
        pid,
        stuck_pid(helpers.write(function(0), &fifo, "x", COMES))
    );
    let successor = stage.helpers();
    assert_eq!(
        pid,
        stuck_pid(successor.write(function(0), &fifo, "x", COMES))
    );
    let stuck = successor.stuck().unwrap();
    assert_eq!(
        stuck
            .into_iter()
            .map(|(f, s)| (f, s.pid))
            .collect::<Vec<_>>(),
        [(function(0), pid)]
    );

    // Another function is written to meanwhile.
    let file = stage.folder.path().join("other");
    fs::write(&file, "").unwrap();
    successor.write(function(1), &file, "1", COMES).unwrap();

    // Who reads lets it come back, with what it was to write.
    assert_eq!(fs::read_to_string(&fifo).unwrap(), "0000:01:10.0");
    until_none_is_stuck(&successor);
    successor.write(function(0), &file, "0", COMES).unwrap();
}

#[test]
fn a_helper_that_is_killed_is_no_success() {
    let stage = Stage::new("killed");
    let fifo = stage.fifo();
    let helpers = stage.helpers();
    let killer = {
        let procs = stage.cgroup(function(0)).join("cgroup.procs");
        std::thread::spawn(move || {
            let deadline = Instant::now() + COMES;
            loop {
                let text = fs::read_to_string(&procs).unwrap_or_default();
                if let Ok(pid) = text.trim().parse() {
                    return kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
                }
                assert!(Instant::now() < deadline, "no helper came");
                std::thread::yield_now();
            }
        })
    };
    let error = helpers.write(function(0), &fifo, "1", COMES).unwrap_err();
    killer.join().unwrap();
    assert!(matches!(error, KernelError::Helper { .. }), "{error}");
    assert!(error.to_string().contains("signal"), "{error}");
    assert!(helpers.stuck().unwrap().is_empty());
}

#[test]
fn a_host_without_its_cgroups_is_told_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let program = PathBuf::from(env!("CARGO_BIN_EXE_host-provisioner"));
    let helpers = Helpers::new(folder.path(), program);
    let file = folder.path().join("sriov_numvfs");
    fs::write(&file, "0").unwrap();
    let error = helpers
        .write(function(0), &file, "7", COMES)
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot move a helper"), "{error}");
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "0",
        "written in the pod after all"
    );
}

#[test]
fn a_helper_that_nobody_tells_to_write_ends_without() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sriov_numvfs");
    fs::write(&file, "0").unwrap();
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_host-provisioner"))
        .args([Path::new("kernel-write"), &file, Path::new("7")])
        .stdin(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success());
    assert_eq!(fs::read_to_string(&file).unwrap(), "0");
}
