//! Finds the QEMU process of a launcher pod. Reads /proc only (root injected).
//!
//! A pod is known by its UID, which kubelet writes into the cgroup path of each of its
//! containers; nothing that a process says of itself decides.

pub(super) mod vcpus;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use super::root::ContainerRoot;

/// The inode of the first user namespace (PROC_USER_INIT_INO, include/linux/proc_ns.h).
const INIT_USER_NS: &str = "user:[4026531837]";

#[derive(Debug, Error)]
pub enum LauncherError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} cannot be understood: {reason}")]
    Malformed { path: PathBuf, reason: String },
    /// No process of this pod is on this node, or none of them is a QEMU that runs a VM.
    #[error("pod {pod_uid} runs no QEMU on this node{hint}")]
    NotFound { pod_uid: String, hint: &'static str },
    #[error("pod {pod_uid} runs {count} QEMU processes; which one is the VM cannot be told")]
    Ambiguous { pod_uid: String, count: usize },
    #[error("process {pid} has ended and its number is used again")]
    Gone { pid: u32 },
    #[error(
        "the cgroup of process {pid} is {cgroup}, outside what this program can see; it must run in the host's cgroup namespace"
    )]
    CgroupOutOfSight { pid: u32, cgroup: String },
    #[error("process {pid} is in no cgroup v2 hierarchy; a node with cgroup v1 cannot be served")]
    CgroupV1 { pid: u32 },
}

/// A running QEMU, fixed by pid and start time.
#[derive(Clone, Debug)]
pub struct QemuProcess {
    pub pod_uid: String,
    pub pid: u32,
    /// Clock ticks since boot, field 22 of /proc/PID/stat: with it a pid means one process.
    pub start_time: u64,
    /// Its cgroup v2 path from the hierarchy's root, e.g. `/kubepods.slice/.../x.scope`.
    pub cgroup: PathBuf,
    pub uid: u32,
    pub gid: u32,
    /// Effective capabilities as a mask.
    pub cap_eff: u64,
    pub user_ns_is_init: bool,
    pub root: Arc<ContainerRoot>,
}

/// A /proc to look in.
#[derive(Clone, Debug)]
pub struct Proc {
    root: PathBuf,
}

impl Proc {
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The file `name` of a process, e.g. `status`.
    #[must_use]
    pub fn file(&self, pid: u32, name: &str) -> PathBuf {
        self.root.join(pid.to_string()).join(name)
    }

    fn read(&self, pid: u32, name: &str) -> Result<String, LauncherError> {
        let path = self.file(pid, name);
        std::fs::read_to_string(&path).map_err(|source| LauncherError::Io { path, source })
    }

    /// When the process was started; `Ok(None)` when there is none.
    pub fn start_time(&self, pid: u32) -> Result<Option<u64>, LauncherError> {
        match self.read(pid, "stat") {
            Ok(text) => parse_start_time(&text)
                .map(Some)
                .ok_or_else(|| LauncherError::Malformed {
                    path: self.file(pid, "stat"),
                    reason: "it has no start time".to_owned(),
                }),
            Err(LauncherError::Io { source, .. }) if is_gone(&source) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether the process that `pid` and `start_time` name is still there.
    pub fn is_alive(&self, pid: u32, start_time: u64) -> Result<bool, LauncherError> {
        Ok(self.start_time(pid)? == Some(start_time))
    }

    /// The VFIO groups that a process has open; none when it is gone.
    pub fn vfio_groups(&self, pid: u32) -> Result<BTreeSet<u32>, LauncherError> {
        let path = self.file(pid, "fd");
        let failed = |source| LauncherError::Io {
            path: path.clone(),
            source,
        };
        let entries = match std::fs::read_dir(&path) {
            Err(e) if is_gone(&e) => return Ok(BTreeSet::new()),
            entries => entries.map_err(failed)?,
        };
        let mut groups = BTreeSet::new();
        for entry in entries {
            match entry.and_then(|entry| std::fs::read_link(entry.path())) {
                Ok(link) => groups.extend(link.to_str().and_then(vfio_group)),
                // Closed since the folder was read.
                Err(e) if is_gone(&e) => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(groups)
    }

    /// Names in a folder that are numbers: processes, or the threads of one.
    fn numbers(&self, folder: &Path) -> Result<Vec<u32>, LauncherError> {
        let failed = |source| LauncherError::Io {
            path: folder.to_owned(),
            source,
        };
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(number) = name.to_str().and_then(|n| n.parse().ok()) {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Finds the one QEMU that runs the VM of the pod with this UID.
    pub fn find_qemu(&self, pod_uid: &str) -> Result<QemuProcess, LauncherError> {
        let mut found = Vec::new();
        let mut in_pod = 0usize;
        for pid in self.numbers(&self.root)? {
            // Processes end while we look: what cannot be read any more is not the VM.
            let Ok(cgroups) = self.read(pid, "cgroup") else {
                continue;
            };
            if !cgroups.lines().any(|line| names_pod(line, pod_uid)) {
                continue;
            }
            in_pod += 1;
            if self.is_vm(pid) {
                found.push(pid);
            }
        }
        match found.as_slice() {
            [pid] => self.process(pod_uid, *pid),
            [] => Err(LauncherError::NotFound {
                pod_uid: pod_uid.to_owned(),
                hint: if in_pod == 0 {
                    ": the pod has no process here"
                } else {
                    ": the pod runs, but no VM in it"
                },
            }),
            many => Err(LauncherError::Ambiguous {
                pod_uid: pod_uid.to_owned(),
                count: many.len(),
            }),
        }
    }

    fn is_vm(&self, pid: u32) -> bool {
        let exe = std::fs::read_link(self.file(pid, "exe")).ok();
        let name = exe
            .as_deref()
            .and_then(Path::file_name)
            .and_then(|n| n.to_str());
        // A replaced binary (package upgrade) reads "... (deleted)".
        let is_qemu = name.is_some_and(|n| {
            let n = n.trim_end_matches(" (deleted)");
            n.starts_with("qemu-system-") || n == "qemu-kvm" || n == "kvm"
        });
        // libvirt asks each QEMU binary what it can do by starting it with `-machine none`.
        is_qemu
            && std::fs::read(self.file(pid, "cmdline"))
                .is_ok_and(|cmdline| !is_capability_probe(&cmdline))
    }

    /// What is known of process `pid`, taken to be the QEMU of pod `pod_uid`.
    pub fn process(&self, pod_uid: &str, pid: u32) -> Result<QemuProcess, LauncherError> {
        let gone = || LauncherError::Gone { pid };
        let start_time = self.start_time(pid)?.ok_or_else(gone)?;
        let status = self.read(pid, "status")?;
        let malformed = |reason: &str| LauncherError::Malformed {
            path: self.file(pid, "status"),
            reason: reason.to_owned(),
        };
        let uid = effective_id(&status, "Uid").ok_or_else(|| malformed("it has no Uid"))?;
        let gid = effective_id(&status, "Gid").ok_or_else(|| malformed("it has no Gid"))?;
        let cap_eff = status_field(&status, "CapEff")
            .and_then(|mask| u64::from_str_radix(mask, 16).ok())
            .ok_or_else(|| malformed("it has no CapEff"))?;
        let link = self.file(pid, "ns/user");
        let user_ns =
            std::fs::read_link(&link).map_err(|source| LauncherError::Io { path: link, source })?;
        let cgroup = unified_cgroup(&self.read(pid, "cgroup")?, pid)?;
        let path = self.file(pid, "root");
        let root =
            ContainerRoot::open(&path).map_err(|source| LauncherError::Io { path, source })?;
        // All of the above is about one process only if it is the same one now.
        if !self.is_alive(pid, start_time)? {
            return Err(gone());
        }
        Ok(QemuProcess {
            pod_uid: pod_uid.to_owned(),
            pid,
            start_time,
            cgroup,
            uid,
            gid,
            cap_eff,
            user_ns_is_init: user_ns.as_os_str() == INIT_USER_NS,
            root: Arc::new(root),
        })
    }
}

/// The group of an open `/dev/vfio/N`; its node is taken away once it is open.
pub(super) fn vfio_group(link: &str) -> Option<u32> {
    let name = link.strip_prefix("/dev/vfio/")?;
    name.trim_end_matches(" (deleted)").parse().ok()
}

fn is_gone(e: &io::Error) -> bool {
    // ESRCH: the process ended between open and read.
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

/// Field 22 of /proc/PID/stat. The second field is the command in parentheses and may hold
/// anything, parentheses too: counting starts after the last one.
pub(super) fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// The effective id of a `Uid:` or `Gid:` line: real, effective, saved, file system.
pub(super) fn effective_id(status: &str, name: &str) -> Option<u32> {
    status_field(status, name)?
        .split_ascii_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

/// The v2 line of /proc/PID/cgroup is `0::/path`.
pub(super) fn unified_cgroup(text: &str, pid: u32) -> Result<PathBuf, LauncherError> {
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .ok_or(LauncherError::CgroupV1 { pid })?;
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(LauncherError::CgroupOutOfSight {
            pid,
            cgroup: path.to_owned(),
        });
    }
    Ok(PathBuf::from(path))
}

/// Whether a line of /proc/PID/cgroup lies in the pod's cgroup: a path component `pod<uid>`
/// (cgroupfs driver) or `kubepods-...-pod<uid with _>.slice` (systemd driver).
///
/// The first component that names any pod decides: what comes below it was named by whoever
/// runs in that pod.
pub(super) fn names_pod(line: &str, pod_uid: &str) -> bool {
    let path = line.splitn(3, ':').nth(2).unwrap_or_default();
    let first = path.split('/').find_map(|part| {
        let slice = part
            .strip_prefix("kubepods")
            .and_then(|rest| rest.strip_suffix(".slice"))
            .and_then(|rest| rest.rsplit_once("-pod"));
        match slice {
            Some((_, uid)) => Some(uid.replace('_', "-")),
            None => part.strip_prefix("pod").map(str::to_owned),
        }
    });
    !pod_uid.is_empty() && first.as_deref() == Some(pod_uid)
}

pub(super) fn is_capability_probe(cmdline: &[u8]) -> bool {
    let mut arguments = cmdline.split(|b| *b == 0);
    while let Some(argument) = arguments.next() {
        if matches!(argument, b"-machine" | b"-M" | b"--machine") {
            let value = arguments.next().unwrap_or_default();
            let kind = value.split(|b| *b == b',').next().unwrap_or_default();
            return matches!(kind, b"none" | b"type=none");
        }
    }
    false
}

/// Processes of a made-up /proc.
#[cfg(test)]
pub mod fixture {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::INIT_USER_NS;

    /// The VM's command line as far as it is read.
    pub const VM: &str =
        "/usr/bin/qemu-system-x86_64\0-name\0guest=a\0-machine\0pc-q35-10.0,usb=off\0";

    /// A process of that number in the folder `proc_`.
    pub fn process(proc_: &Path, pid: u32, exe: &str, cmdline: &str, cgroup: &str) {
        let dir = proc_.join(pid.to_string());
        std::fs::create_dir_all(dir.join("ns")).unwrap();
        symlink(exe, dir.join("exe")).unwrap();
        symlink("/", dir.join("root")).unwrap();
        symlink(INIT_USER_NS, dir.join("ns/user")).unwrap();
        std::fs::write(dir.join("cmdline"), cmdline).unwrap();
        std::fs::write(dir.join("cgroup"), cgroup).unwrap();
        std::fs::write(
            dir.join("stat"),
            format!(
                "{pid} (qemu) x) (y) S 1 1 1 0 -1 4194560 1 0 0 0 1 1 0 0 20 0 4 0 {pid}77 1 1"
            ),
        )
        .unwrap();
        std::fs::write(
            dir.join("status"),
            "Name:\tq\nUid:\t107\t107\t107\t107\nGid:\t107\t108\t107\t107\nCapEff:\t0000000000000400\n",
        )
        .unwrap();
    }

    /// The CPUs on which a process may run.
    pub fn may_run_on(proc_: &Path, pid: u32, cpus: &str) {
        let status = proc_.join(pid.to_string()).join("status");
        let mut text = std::fs::read_to_string(&status).unwrap();
        text.push_str(&format!("Cpus_allowed_list:\t{cpus}\n"));
        std::fs::write(status, text).unwrap();
    }

    /// A thread of that process.
    pub fn thread(proc_: &Path, pid: u32, thread: u32, comm: &str, cpus: &str) {
        let dir = proc_.join(pid.to_string()).join(format!("task/{thread}"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("comm"), format!("{comm}\n")).unwrap();
        let status = format!("Name:\t{comm}\nCpus_allowed_list:\t{cpus}\n");
        std::fs::write(dir.join("status"), status).unwrap();
    }

    /// The QEMU of pod `pod_uid`, with these VFIO groups open.
    pub fn qemu(proc_: &Path, pid: u32, pod_uid: &str, groups: &[u32]) {
        let pod = pod_uid.replace('-', "_");
        let cgroup = format!("0::/kubepods.slice/kubepods-burstable-pod{pod}.slice/cri.scope\n");
        process(proc_, pid, "/usr/bin/qemu-system-x86_64", VM, &cgroup);
        let open = proc_.join(pid.to_string()).join("fd");
        std::fs::create_dir(&open).unwrap();
        symlink("/dev/vfio/vfio", open.join("3")).unwrap();
        for (n, group) in groups.iter().enumerate() {
            let link = format!("/dev/vfio/{group} (deleted)");
            symlink(link, open.join((n + 4).to_string())).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fixture::{VM, process};
    use super::*;

    const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";
    const SLICE: &str = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a1b2c3d_1111_2222_3333_444455556666.slice/cri-containerd-ab.scope\n";

    #[test]
    fn the_groups_of_a_process_are_what_it_has_open() {
        let dir = tempfile::tempdir().unwrap();
        let proc_ = Proc::new(dir.path());
        fixture::qemu(dir.path(), 12, UID, &[65, 7]);
        assert_eq!(proc_.find_qemu(UID).unwrap().pid, 12);
        assert_eq!(proc_.vfio_groups(12).unwrap(), [7, 65].into());
        assert!(proc_.vfio_groups(99).unwrap().is_empty());
    }

    #[test]
    fn the_vm_of_a_pod_is_found_by_its_uid() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path();
        process(p, 10, "/usr/bin/virtqemud", "virtqemud\0", SLICE);
        process(
            p,
            11,
            "/usr/bin/qemu-system-x86_64",
            "qemu\0-machine\0none,accel=kvm\0",
            SLICE,
        );
        process(p, 12, "/usr/bin/qemu-system-x86_64", VM, SLICE);
        let other = SLICE.replace("0a1b2c3d", "0a1b2c3e");
        process(p, 13, "/usr/bin/qemu-system-x86_64", VM, &other);
        let proc_ = Proc::new(p);
        let qemu = proc_.find_qemu(UID).unwrap();
        assert_eq!((qemu.pid, qemu.start_time), (12, 1277));
        assert_eq!(
            (qemu.uid, qemu.gid, qemu.cap_eff, qemu.user_ns_is_init),
            (107, 108, 0x400, true)
        );
        assert!(qemu.cgroup.ends_with("cri-containerd-ab.scope"));
        assert!(proc_.is_alive(12, 1277).unwrap());
        assert!(!proc_.is_alive(12, 1278).unwrap());
        assert!(!proc_.is_alive(99, 1).unwrap());

        process(p, 14, "/usr/libexec/qemu-kvm (deleted)", VM, SLICE);
        assert!(matches!(
            proc_.find_qemu(UID),
            Err(LauncherError::Ambiguous { count: 2, .. })
        ));
        let none = proc_.find_qemu("ffffffff-1111-2222-3333-444455556666");
        assert!(matches!(none, Err(LauncherError::NotFound { .. })));
        assert!(matches!(
            proc_.find_qemu(""),
            Err(LauncherError::NotFound { .. })
        ));
    }

    #[test]
    fn both_cgroup_drivers_name_the_pod_and_nothing_else_does() {
        assert!(names_pod(
            &format!("0::/kubepods/besteffort/pod{UID}/ab"),
            UID
        ));
        assert!(names_pod(
            &format!("5:devices:/kubepods/pod{UID}/ab:x"),
            UID
        ));
        assert!(names_pod(SLICE.trim(), UID));
        assert!(!names_pod(
            &format!("0::/kubepods/besteffort/podx{UID}/ab"),
            UID
        ));
        assert!(!names_pod("0::/system.slice/x.service", UID));
        // A VM's owner names their own cgroups at will below their container's.
        assert!(!names_pod(&format!("0::/a/x-pod{UID}.slice"), UID));
        assert!(!names_pod(
            &format!("0::/kubepods/podother/ab/pod{UID}"),
            UID
        ));
    }

    #[test]
    fn a_cgroup_out_of_sight_is_said() {
        assert!(matches!(
            unified_cgroup("0::/../../x\n", 1),
            Err(LauncherError::CgroupOutOfSight { .. })
        ));
        assert!(matches!(
            unified_cgroup("3:devices:/x\n", 1),
            Err(LauncherError::CgroupV1 { .. })
        ));
    }

    #[test]
    fn this_process_can_be_described() {
        let me = std::process::id();
        let q = Proc::new("/proc").process("x", me).unwrap();
        assert_eq!(q.pid, me);
        assert!(q.user_ns_is_init);
        assert!(q.root.handle(Path::new("/proc/self/root/etc")).is_err());
    }
}
