//! The gates against this machine's kernel: a throwaway cgroup v2 with device programs as runc
//! attaches them, a bpffs of the test's own, real device nodes, a real process and its limits.
//! Needs root (CAP_BPF, CAP_SYS_ADMIN, CAP_MKNOD) and a cgroup v2 mount.
//!
//! VFIO's devices are played by `zero` (1:5) and `full` (1:7): what is tested is who may open.
// clippy knows functions marked as tests only, not their helpers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use host_provisioner::hypervisor::gates::bpf;
use host_provisioner::hypervisor::gates::filter::Instruction;
use host_provisioner::hypervisor::gates::host::{GatePaths, HostGates};
use host_provisioner::hypervisor::gates::memlock::{self, Limit};
use host_provisioner::hypervisor::gates::{GateError, Gates};
use host_provisioner::hypervisor::launcher::{Proc, QemuProcess};
use host_provisioner::hypervisor::root::ContainerRoot;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

const POD: &str = "0a1b2c3d-1111-2222-3333-444455556666";
const GROUP: u32 = 6;
const MEMLOCK: u64 = 512 << 10;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Lets character device 1:3 through and nothing else, as runc writes it.
fn deny_most() -> Vec<Instruction> {
    let i = Instruction::new;
    vec![
        i(0x61, 2, 1, 0, 0),
        i(0x54, 2, 0, 0, 0xffff),
        i(0x61, 3, 1, 0, 0),
        i(0x74, 3, 0, 0, 16),
        i(0x61, 4, 1, 4, 0),
        i(0x61, 5, 1, 8, 0),
        i(0x55, 2, 0, 4, 2),
        i(0x55, 4, 0, 3, 1),
        i(0x55, 5, 0, 2, 3),
        i(0xb4, 0, 0, 0, 1),
        i(0x95, 0, 0, 0, 0),
        i(0xb4, 0, 0, 0, 0),
        i(0x95, 0, 0, 0, 0),
    ]
}

/// A stage for one test: host folders, a container's root, a cgroup and a process in it.
struct Stage {
    folder: tempfile::TempDir,
    mount: PathBuf,
    cgroup: PathBuf,
    child: Child,
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        let _ = umount2(&self.folder.path().join("bpf"), MntFlags::MNT_DETACH);
        // The kernel lets a cgroup go only once its last process is reaped.
        drop(fs::remove_dir(self.mount.join(&self.cgroup)));
        if let Some(parent) = self.cgroup.parent() {
            drop(fs::remove_dir(self.mount.join(parent)));
        }
    }
}

fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts
        .lines()
        .find(|l| l.split(' ').nth(2) == Some("cgroup2"))
        .expect("this test needs a cgroup v2 mount");
    line.split(' ').nth(1).unwrap().into()
}

fn char_node(path: &Path, major: u64, minor: u64) {
    let mode = Mode::from_bits_truncate(0o666);
    mknod(path, SFlag::S_IFCHR, mode, makedev(major, minor))
        .expect("this test needs root to make device nodes");
}

/// A process that is in this cgroup when this returns, with a soft memlock limit of 64 KiB.
fn resident(cgroup: &Path) -> Child {
    let mut child = Command::new("sh")
        .args([
            "-c",
            "ulimit -S -l 64 && echo 0 > \"$0\" && echo ready && exec sleep 600",
        ])
        .arg(cgroup.join("cgroup.procs"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut ready).unwrap();
    assert_eq!(ready, "ready\n");
    child
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["dev/vfio", "container/dev", "bpf", "proc/sys/kernel/random"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        char_node(&at("dev/vfio/vfio"), 1, 5);
        char_node(&at("dev/vfio/6"), 1, 7);
        let none: Option<&str> = None;
        mount(none, &at("bpf"), Some("bpf"), MsFlags::empty(), none)
            .expect("this test needs root to mount a bpffs");

        let mount = cgroup2_mount();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let cgroup = PathBuf::from(format!("vf-gates-{}-{number}/pod", std::process::id()));
        fs::create_dir_all(mount.join(&cgroup)).expect("this test needs root to make a cgroup");
        let child = resident(&mount.join(&cgroup));
        let stage = Self {
            folder,
            mount,
            cgroup,
            child,
        };
        stage.show_process(stage.child.id());
        for (link, to) in [
            (
                "proc/sys/kernel/random/boot_id",
                "/proc/sys/kernel/random/boot_id",
            ),
            ("proc/meminfo", "/proc/meminfo"),
        ] {
            symlink(to, stage.at(link)).unwrap();
        }
        stage
    }

    /// Puts a process into the stage's own /proc, with the container as its root.
    fn show_process(&self, pid: u32) {
        let shown = self.at("proc").join(pid.to_string());
        fs::create_dir_all(&shown).unwrap();
        for name in ["stat", "status", "limits", "cgroup"] {
            symlink(format!("/proc/{pid}/{name}"), shown.join(name)).unwrap();
        }
        symlink(self.at("container"), shown.join("root")).unwrap();
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn gates(&self) -> HostGates {
        HostGates::new(GatePaths {
            proc: self.at("proc"),
            dev: self.at("dev"),
            cgroup: self.mount.clone(),
            pins: self.at("bpf/vf-provisioner"),
            journal: self.at("journal"),
        })
        .unwrap()
    }

    fn qemu(&self) -> QemuProcess {
        let pid = self.child.id();
        QemuProcess {
            pod_uid: POD.to_owned(),
            pid,
            start_time: Proc::new("/proc").start_time(pid).unwrap().unwrap(),
            cgroup: Path::new("/").join(&self.cgroup),
            uid: 107,
            gid: 108,
            cap_eff: 0,
            user_ns_is_init: true,
            root: Arc::new(ContainerRoot::open(&self.at("container")).unwrap()),
        }
    }

    fn leaf(&self) -> PathBuf {
        self.mount.join(&self.cgroup)
    }

    /// Attaches a program as a container runtime does, and gives its id.
    fn attach(&self, cgroup: &Path, program: &[Instruction]) -> u32 {
        let fd = fs::File::open(cgroup).unwrap();
        let program = bpf::load(program).expect("this test needs CAP_BPF");
        bpf::attach(fd.as_fd(), program.as_fd()).unwrap();
        bpf::info(program.as_fd()).unwrap().id
    }

    fn attached(&self, cgroup: &Path) -> Vec<u32> {
        bpf::attached(fs::File::open(cgroup).unwrap().as_fd())
            .unwrap()
            .ids
    }

    /// Whether a process of the cgroup may open the device for reading and writing.
    fn may_open(&self, name: &str) -> bool {
        Command::new("sh")
            .args(["-c", "echo 0 > \"$0\" || exit 9; exec 3<>\"$1\""])
            .arg(self.leaf().join("cgroup.procs"))
            .arg(self.at("dev/vfio").join(name))
            .stderr(Stdio::null())
            .status()
            .map(|s| {
                assert_ne!(s.code(), Some(9), "the cgroup could not be entered");
                s.success()
            })
            .unwrap()
    }

    fn node(&self, name: &str) -> PathBuf {
        self.at("container/dev/vfio").join(name)
    }

    fn limit(&self) -> Limit {
        let path = format!("/proc/{}/limits", self.child.id());
        memlock::parse(&fs::read_to_string(path).unwrap()).unwrap()
    }

    fn pins(&self) -> usize {
        fs::read_dir(self.at("bpf/vf-provisioner")).unwrap().count()
    }

    fn assert_shut(&self, program: u32) {
        assert_eq!(
            self.attached(&self.leaf()),
            [program],
            "the program of before"
        );
        assert!(!self.may_open("6") && !self.may_open("vfio"));
        assert!(!self.at("container/dev/vfio").exists());
        assert_eq!(
            (
                self.pins(),
                fs::read_dir(self.at("journal")).unwrap().count()
            ),
            (0, 0)
        );
    }
}

#[test]
fn gates_open_for_one_device_and_close_without_a_trace() {
    let stage = Stage::new();
    let program = stage.attach(&stage.leaf(), &deny_most());
    let before = stage.limit();
    assert!(!stage.may_open("6") && !stage.may_open("vfio"));

    let gates = stage.gates();
    gates.open(&stage.qemu(), GROUP, MEMLOCK).unwrap();
    assert!(stage.may_open("6") && stage.may_open("vfio"));
    for name in ["6", "vfio"] {
        let node = fs::symlink_metadata(stage.node(name)).unwrap();
        assert!(node.file_type().is_char_device());
        assert_eq!(
            (node.uid(), node.gid(), node.mode() & 0o7777),
            (107, 108, 0o600)
        );
    }
    assert_eq!(stage.limit().soft, Some(MEMLOCK));
    let ours = stage.attached(&stage.leaf());
    gates.open(&stage.qemu(), GROUP, MEMLOCK).unwrap();
    assert_eq!(
        stage.attached(&stage.leaf()),
        ours,
        "opening twice changes nothing"
    );

    gates.close_device(POD, GROUP).unwrap();
    assert!(!stage.may_open("6") && stage.may_open("vfio"));
    assert!(!stage.node("6").exists() && stage.node("vfio").exists());
    assert_eq!(
        stage.limit().soft,
        Some(MEMLOCK),
        "memlock stays while a VF is attached"
    );
    gates.close_device(POD, GROUP).unwrap();

    gates.open(&stage.qemu(), GROUP, MEMLOCK).unwrap();
    assert!(stage.may_open("6"));
    gates.close_all(POD).unwrap();
    stage.assert_shut(program);
    assert_eq!(stage.limit(), before);
    gates.close_all(POD).unwrap();
}

#[test]
fn memlock_that_somebody_lowered_is_raised_again_while_a_device_is_attached() {
    let stage = Stage::new();
    stage.attach(&stage.leaf(), &deny_most());
    let gates = stage.gates();
    assert!(!gates.keep_memlock(POD).unwrap(), "nothing is attached");
    gates.open(&stage.qemu(), GROUP, MEMLOCK).unwrap();
    gates.close_device(POD, GROUP).unwrap();
    assert!(!gates.keep_memlock(POD).unwrap(), "it is as we set it");

    let lowered = Limit {
        soft: Some(MEMLOCK / 2),
        ..stage.limit()
    };
    memlock::set(stage.qemu().pid, lowered).unwrap();
    assert!(gates.keep_memlock(POD).unwrap());
    assert_eq!(stage.limit().soft, Some(MEMLOCK));

    // An agent that was started since knows it too.
    memlock::set(stage.qemu().pid, lowered).unwrap();
    assert!(stage.gates().keep_memlock(POD).unwrap());
    gates.close_all(POD).unwrap();
    // What is put back is theirs, the last that somebody else set.
    assert_eq!(stage.limit(), lowered);
    assert!(!gates.keep_memlock(POD).unwrap(), "nothing is attached");
}

#[test]
fn every_program_on_the_way_is_widened_and_put_back() {
    let stage = Stage::new();
    let parent = stage.leaf().parent().unwrap().to_owned();
    let outer = stage.attach(&parent, &deny_most());
    let first = stage.attach(&stage.leaf(), &deny_most());
    let second = stage.attach(&stage.leaf(), &deny_most());
    let gates = stage.gates();
    gates.open(&stage.qemu(), GROUP, 0).unwrap();
    assert!(stage.may_open("6") && stage.may_open("vfio"));
    gates.close_all(POD).unwrap();
    assert!(!stage.may_open("6") && !stage.may_open("vfio"));
    assert_eq!(stage.attached(&parent), [outer]);
    let mut inner = stage.attached(&stage.leaf());
    inner.sort_unstable();
    assert_eq!(inner, [first, second]);
    assert_eq!(stage.pins(), 0);
}

#[test]
fn a_program_added_meanwhile_is_widened_too_and_one_put_in_our_place_stays() {
    let stage = Stage::new();
    stage.attach(&stage.leaf(), &deny_most());
    let gates = stage.gates();
    gates.open(&stage.qemu(), GROUP, 0).unwrap();
    gates.close_device(POD, GROUP).unwrap();
    // systemd adds its own beside ours at daemon-reload.
    stage.attach(&stage.leaf(), &deny_most());
    assert!(!stage.may_open("vfio"));
    gates.open(&stage.qemu(), GROUP, 0).unwrap();
    assert!(stage.may_open("6") && stage.may_open("vfio"));

    // KubeVirt replaces wholesale at its own hotplugs.
    let fd = fs::File::open(stage.leaf()).unwrap();
    let mut theirs = Vec::new();
    for id in stage.attached(&stage.leaf()) {
        let new = bpf::load(&deny_most()).unwrap();
        theirs.push(bpf::info(new.as_fd()).unwrap().id);
        bpf::replace(fd.as_fd(), new.as_fd(), bpf::by_id(id).unwrap().as_fd()).unwrap();
    }
    gates.close_all(POD).unwrap();
    assert_eq!(stage.attached(&stage.leaf()), theirs);
    assert_eq!(stage.pins(), 0);
    assert!(!stage.at("container/dev/vfio").exists());
}

#[test]
fn a_successor_closes_what_a_dead_agent_left_open() {
    let stage = Stage::new();
    let program = stage.attach(&stage.leaf(), &deny_most());
    let before = stage.limit();
    stage.gates().open(&stage.qemu(), GROUP, MEMLOCK).unwrap();

    // The VM has the VF: its group's gates close, the rest stays.
    let told = stage.gates().recover(&|_| true).unwrap();
    assert!(
        told.len() == 1 && told[0].kept && told[0].result.is_ok(),
        "{told:?}"
    );
    assert!(!stage.may_open("6") && stage.may_open("vfio"));
    assert!(!stage.node("6").exists() && stage.node("vfio").exists());
    assert_eq!(stage.limit().soft, Some(MEMLOCK));

    // It has none: all of it closes.
    let told = stage.gates().recover(&|_| false).unwrap();
    assert!(!told[0].kept && told[0].result.is_ok(), "{told:?}");
    stage.assert_shut(program);
    assert_eq!(stage.limit(), before);
}

#[test]
fn nodes_are_removed_when_qemu_is_gone_and_its_container_is_not() {
    let mut stage = Stage::new();
    let program = stage.attach(&stage.leaf(), &deny_most());
    let gates = stage.gates();
    let other = resident(&stage.leaf());
    stage.show_process(other.id());
    gates.open(&stage.qemu(), GROUP, MEMLOCK).unwrap();
    stage.child.kill().unwrap();
    stage.child.wait().unwrap();
    let told = gates.recover(&|_| true).unwrap();
    // Ends `other` with the stage.
    stage.child = other;
    assert!(!told[0].kept && told[0].result.is_ok(), "{told:?}");
    stage.assert_shut(program);
}

#[test]
fn what_is_not_ours_is_neither_used_nor_removed() {
    let stage = Stage::new();
    stage.attach(&stage.leaf(), &deny_most());
    let gates = stage.gates();
    fs::create_dir(stage.at("container/dev/vfio")).unwrap();
    fs::write(stage.node("6"), "theirs").unwrap();
    let refused = gates.open(&stage.qemu(), GROUP, 0).unwrap_err();
    assert!(matches!(refused, GateError::Refused(_)), "{refused}");
    gates.close_all(POD).unwrap();
    assert_eq!(fs::read_to_string(stage.node("6")).unwrap(), "theirs");
    assert!(!stage.may_open("6") && !stage.may_open("vfio"));

    let mut namespaced = stage.qemu();
    namespaced.user_ns_is_init = false;
    let refused = gates.open(&namespaced, GROUP, 0).unwrap_err();
    assert!(refused.to_string().contains("user namespace"), "{refused}");
    let mut gone = stage.qemu();
    gone.start_time += 1;
    assert!(gates.open(&gone, GROUP, 0).is_err());
}

#[test]
fn a_pod_without_device_programs_needs_no_rule() {
    let stage = Stage::new();
    let gates = stage.gates();
    gates.open(&stage.qemu(), GROUP, 0).unwrap();
    assert!(stage.attached(&stage.leaf()).is_empty());
    assert!(stage.may_open("6"));
    let facts = gates
        .memory_facts(&stage.qemu(), Default::default(), 0)
        .unwrap();
    assert!(facts.node_available > 0);
    gates.close_all(POD).unwrap();
}
