//! The gates of a real host. Order and rollback; each gate itself is a module of its own.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::cgroup::CgroupGate;
use super::journal::{Device, Journal, Journals, MemlockRecord, NodeRecord};
use super::memlock::{self, Limit};
use super::nodes::{self, DevFolder, Present};
use super::usage::Usage;
use super::{GateError, Gates, Recovered};
use crate::hypervisor::GuestMemory;
use crate::hypervisor::launcher::{LauncherError, Proc, QemuProcess};
use crate::hypervisor::memory::{self, MemoryFacts};
use crate::hypervisor::plan::Unsupported;
use crate::hypervisor::root::ContainerRoot;
use crate::points::{Point, reach};

/// How often a change is tried again when another program changes the same thing.
const ATTEMPTS: usize = 5;
/// The node of VFIO's container device.
const CONTAINER: &str = "vfio";

/// Where things are; all paths are the host's.
#[derive(Clone, Debug)]
pub struct GatePaths {
    pub proc: PathBuf,
    pub dev: PathBuf,
    /// The cgroup v2 mount.
    pub cgroup: PathBuf,
    /// A folder in a bpffs that outlives this program.
    pub pins: PathBuf,
    /// A folder that outlives this program and not the boot.
    pub journal: PathBuf,
}

impl Default for GatePaths {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            dev: "/dev".into(),
            cgroup: "/sys/fs/cgroup".into(),
            pins: "/sys/fs/bpf/vf-provisioner".into(),
            journal: "/run/vf-provisioner/journal".into(),
        }
    }
}

/// Opens and closes gates on this host.
#[derive(Debug)]
pub struct HostGates {
    proc: Proc,
    proc_root: PathBuf,
    dev: PathBuf,
    cgroup: CgroupGate,
    journals: Journals,
    boot_id: String,
    /// By pod: one change at a time, for a journal is read, changed and written.
    turns: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl HostGates {
    /// Checks the host once: cgroup v2, a bpffs, a place for the journal.
    pub fn new(paths: GatePaths) -> Result<Self, GateError> {
        let boot = paths.proc.join("sys/kernel/random/boot_id");
        let boot_id = read(&boot)?.trim().to_owned();
        Ok(Self {
            proc: Proc::new(&paths.proc),
            proc_root: paths.proc,
            dev: paths.dev,
            cgroup: CgroupGate::new(paths.cgroup, paths.pins)?,
            journals: Journals::open(paths.journal)?,
            boot_id,
            turns: Mutex::default(),
        })
    }

    fn exclusively<T>(
        &self,
        pod_uid: &str,
        work: impl FnOnce() -> Result<T, GateError>,
    ) -> Result<T, GateError> {
        // A panic elsewhere poisons nothing that is not on disk.
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody else has, or waits for, a turn that only the map knows.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(pod_uid.to_owned()).or_default())
        };
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    fn save(&self, journal: &Journal) -> Result<(), GateError> {
        self.journals.write(journal)
    }

    fn host_device(&self, name: &str) -> Result<Device, GateError> {
        nodes::host_device(&self.dev.join("vfio").join(name))
    }

    fn limit(&self, pid: u32) -> Result<Limit, GateError> {
        let path = self.proc.file(pid, "limits");
        let text = read(&path)?;
        memlock::parse(&text).ok_or_else(|| GateError::Journal {
            path,
            reason: "it has no Max locked memory".to_owned(),
        })
    }

    fn set_limit(&self, pid: u32, start_time: u64, limit: Limit) -> Result<(), GateError> {
        if !self.proc.is_alive(pid, start_time)? {
            return Err(LauncherError::Gone { pid }.into());
        }
        memlock::set(pid, limit)
            .map_err(|e| GateError::io("set the memlock limit of", self.proc.file(pid, ""), e))
    }

    fn locked(&self, pid: u32) -> Result<u64, GateError> {
        Ok(memory::parse_status(&read(&self.proc.file(pid, "status"))?).locked)
    }

    /// The journal of this very process; one of an earlier QEMU of the pod is closed first.
    fn journal_for(&self, qemu: &QemuProcess) -> Result<Journal, GateError> {
        if let Some(old) = self.journals.read(&qemu.pod_uid)? {
            if old.boot_id != self.boot_id {
                // Another boot: none of it is open any more, and its pids mean nothing.
                self.journals.remove(&old.pod_uid)?;
            } else if (old.pid, old.start_time) == (qemu.pid, qemu.start_time) {
                return Ok(old);
            } else {
                self.shut(old)?;
            }
        }
        Ok(Journal {
            pod_uid: qemu.pod_uid.clone(),
            boot_id: self.boot_id.clone(),
            pid: qemu.pid,
            start_time: qemu.start_time,
            cgroup: qemu.cgroup.clone(),
            locked_before: self.locked(qemu.pid)?,
            open_groups: Vec::new(),
            made_directory: false,
            nodes: Vec::new(),
            programs: Vec::new(),
            memlock: None,
            memlock_needed: 0,
        })
    }

    /// Makes the device programs let through `wanted` and nothing else of ours.
    fn set_rules(&self, journal: &mut Journal, wanted: &[Device]) -> Result<(), GateError> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.try_rules(journal, wanted) {
                Ok(true) => return Ok(()),
                // Something came in between: look again until nothing is left to do.
                Ok(false) => {}
                Err(e @ GateError::Busy(_)) => last = Some(e),
                Err(e) => return Err(e),
            }
        }
        Err(last.unwrap_or_else(|| {
            GateError::Busy(format!(
                "the device rules of cgroup {} do not stay as they are set; it is tried again",
                journal.cgroup.display()
            ))
        }))
    }

    /// One round; true when nothing was left to do.
    fn try_rules(&self, journal: &mut Journal, wanted: &[Device]) -> Result<bool, GateError> {
        let Some(levels) = self.cgroup.levels(&journal.cgroup, &journal.programs)? else {
            // No cgroup, no program: what was attached went with it.
            let gone: Vec<_> = journal.programs.drain(..).collect();
            gone.iter().try_for_each(|r| self.cgroup.forget(r))?;
            return Ok(true);
        };
        self.cgroup.prune(journal, &levels)?;
        let actions =
            super::cgroup::plan(&levels, &journal.programs, wanted).map_err(GateError::Refused)?;
        for action in &actions {
            self.cgroup.apply(action, journal, &|j| self.save(j))?;
        }
        Ok(actions.is_empty())
    }

    /// Devices that are to be let through: those of the open groups, and VFIO's own.
    fn wanted(&self, groups: &[u32]) -> Result<Vec<Device>, GateError> {
        let mut wanted = vec![self.host_device(CONTAINER)?];
        for group in groups {
            wanted.push(self.host_device(&group.to_string())?);
        }
        Ok(wanted)
    }

    fn open_nodes(
        &self,
        journal: &mut Journal,
        qemu: &QemuProcess,
        group: u32,
    ) -> Result<(), GateError> {
        let mut folder = DevFolder::open(&qemu.root)?;
        journal.made_directory |= !folder.has_folder();
        let mut due = Vec::new();
        for name in [CONTAINER.to_owned(), group.to_string()] {
            let device = self.host_device(&name)?;
            let node = NodeRecord { name, device };
            match (folder.present(&node)?, journal.nodes.contains(&node)) {
                (Present::Other, _) => {
                    return Err(GateError::Refused(format!(
                        "in the VM's launcher pod something else lies at /dev/vfio/{}; it was not touched: restart the VM",
                        node.name
                    )));
                }
                // Somebody else's: KubeVirt gives /dev/vfio/vfio to VMs with host devices.
                (Present::Same, false) => {}
                // Ours already; if it was left half made, it is made again.
                (Present::Same, true) => {
                    folder.remove(&node)?;
                    due.push(node);
                }
                (Present::Nothing, known) => {
                    if !known {
                        journal.nodes.push(node.clone());
                    }
                    due.push(node);
                }
            }
        }
        self.save(journal)?;
        if !due.is_empty() {
            folder.make_folder()?;
        }
        due.iter()
            .try_for_each(|node| folder.make(node, qemu.uid, qemu.gid))
    }

    fn raise(&self, journal: &mut Journal, needed: u64) -> Result<bool, GateError> {
        let now = self.limit(journal.pid)?;
        if now.suffices(needed) {
            return Ok(false);
        }
        let (old_soft, old_hard) = match &journal.memlock {
            // Still ours: what was before us stays what is put back.
            Some(r) if memlock::to_restore(r, now).is_some() => (r.old_soft, r.old_hard),
            _ => (now.soft, now.hard),
        };
        journal.memlock = Some(MemlockRecord {
            old_soft,
            old_hard,
            set: needed,
        });
        self.save(journal)?;
        self.set_limit(journal.pid, journal.start_time, now.raised(needed))?;
        Ok(true)
    }

    /// The container's root: QEMU's, or when QEMU is gone that of whoever is left in its cgroup.
    fn container(&self, journal: &Journal) -> Result<Option<ContainerRoot>, GateError> {
        let procs = self.cgroup.path(&journal.cgroup).join("cgroup.procs");
        let others = std::fs::read_to_string(procs).unwrap_or_default();
        let candidates = std::iter::once((journal.pid, Some(journal.start_time)))
            .chain(others.lines().filter_map(|l| Some((l.parse().ok()?, None))));
        for (pid, known) in candidates {
            let Some(start) = self.proc.start_time(pid)? else {
                continue;
            };
            if known.is_some_and(|k| k != start) {
                continue;
            }
            let root = ContainerRoot::open(&self.proc.file(pid, "root"));
            match root {
                Ok(root) if self.proc.is_alive(pid, start)? => return Ok(Some(root)),
                Ok(_) => {}
                Err(_) if !self.proc.is_alive(pid, start)? => {}
                Err(e) => {
                    return Err(GateError::io("open", self.proc.file(pid, "root"), e));
                }
            }
        }
        Ok(None)
    }

    fn remove_nodes(
        &self,
        journal: &mut Journal,
        which: &dyn Fn(&NodeRecord) -> bool,
        everything: bool,
    ) -> Result<(), GateError> {
        let anything = journal.nodes.iter().any(which) || (everything && journal.made_directory);
        if let (true, Some(root)) = (anything, self.container(journal)?) {
            let folder = DevFolder::open(&root)?;
            for node in journal.nodes.iter().filter(|n| which(n)) {
                folder.remove(node)?;
            }
            if everything && journal.made_directory {
                // What somebody else has put into it since stays, and so does the folder.
                folder.remove_folder()?;
            }
        }
        journal.nodes.retain(|n| !which(n));
        if everything {
            journal.made_directory = false;
        }
        self.save(journal)
    }

    fn restore_memlock(&self, journal: &mut Journal) -> Result<(), GateError> {
        if let Some(record) = journal.memlock
            && self.proc.is_alive(journal.pid, journal.start_time)?
            && let Some(old) = memlock::to_restore(&record, self.limit(journal.pid)?)
        {
            self.set_limit(journal.pid, journal.start_time, old)?;
        }
        journal.memlock = None;
        self.save(journal)
    }

    /// Closes all of it; every gate is tried, the first error is told and what is still open
    /// stays in the journal.
    fn shut(&self, mut journal: Journal) -> Result<(), GateError> {
        let nodes = self.remove_nodes(&mut journal, &|_| true, true);
        reach(Point::NodesRemoved);
        let rules = self.set_rules(&mut journal, &[]);
        reach(Point::RulesRestored);
        let limit = self.restore_memlock(&mut journal);
        reach(Point::MemlockRestored);
        nodes.and(rules).and(limit)?;
        self.journals.remove(&journal.pod_uid)
    }

    fn shut_group(&self, mut journal: Journal, group: u32) -> Result<(), GateError> {
        let name = group.to_string();
        let nodes = self.remove_nodes(&mut journal, &|n| n.name == name, false);
        let open: Vec<u32> = journal
            .open_groups
            .iter()
            .copied()
            .filter(|g| *g != group)
            .collect();
        let rules = self
            .wanted(&open)
            .and_then(|wanted| self.set_rules(&mut journal, &wanted));
        nodes.and(rules)?;
        journal.open_groups = open;
        self.save(&journal)
    }

    fn recover_one(&self, journal: Journal, attached: bool) -> (bool, Result<(), GateError>) {
        if journal.boot_id != self.boot_id {
            return (false, self.journals.remove(&journal.pod_uid));
        }
        let alive = self.proc.is_alive(journal.pid, journal.start_time);
        let keep = match alive {
            Ok(alive) => alive && attached,
            Err(e) => return (true, Err(e.into())),
        };
        if !keep {
            return (false, self.shut(journal));
        }
        let mut result = Ok(());
        for group in journal.open_groups.clone() {
            let now = self.journals.read(&journal.pod_uid);
            let closed = now.and_then(|j| j.map_or(Ok(()), |j| self.shut_group(j, group)));
            result = result.and(closed);
        }
        (true, result)
    }
}

pub(super) fn read(path: &Path) -> Result<String, GateError> {
    std::fs::read_to_string(path).map_err(|e| GateError::io("read", path, e))
}

impl Gates for HostGates {
    fn memory_facts(
        &self,
        qemu: &QemuProcess,
        guest: GuestMemory,
        vfio_devices: u32,
    ) -> Result<MemoryFacts, GateError> {
        let usage = Usage {
            proc: &self.proc_root,
            cgroup: &self.cgroup,
        };
        usage.facts(qemu, guest, vfio_devices)
    }

    fn open(&self, qemu: &QemuProcess, group: u32, needed: u64) -> Result<(), GateError> {
        if !qemu.user_ns_is_init {
            return Err(GateError::Refused(Unsupported::UserNamespace.to_string()));
        }
        self.exclusively(&qemu.pod_uid, || {
            if !self.proc.is_alive(qemu.pid, qemu.start_time)? {
                return Err(LauncherError::Gone { pid: qemu.pid }.into());
            }
            let mut journal = self.journal_for(qemu)?;
            let groups: BTreeSet<u32> =
                journal.open_groups.iter().copied().chain([group]).collect();
            journal.open_groups = groups.into_iter().collect();
            let wanted = self.wanted(&journal.open_groups)?;
            journal.memlock_needed = journal.memlock_needed.max(needed);
            self.save(&journal)?;
            reach(Point::JournalWritten);
            self.raise(&mut journal, needed)?;
            reach(Point::MemlockRaised);
            self.set_rules(&mut journal, &wanted)?;
            reach(Point::RulesSet);
            self.open_nodes(&mut journal, qemu, group)?;
            reach(Point::NodesMade);
            self.save(&journal)
        })
    }

    fn close_device(&self, pod_uid: &str, group: u32) -> Result<(), GateError> {
        self.exclusively(pod_uid, || match self.journals.read(pod_uid)? {
            Some(journal) => self.shut_group(journal, group),
            None => Ok(()),
        })
    }

    fn close_all(&self, pod_uid: &str) -> Result<(), GateError> {
        self.exclusively(pod_uid, || match self.journals.read(pod_uid)? {
            Some(journal) => self.shut(journal),
            None => Ok(()),
        })
    }

    fn keep_memlock(&self, pod_uid: &str) -> Result<bool, GateError> {
        self.exclusively(pod_uid, || {
            let Some(mut journal) = self.journals.read(pod_uid)? else {
                return Ok(false);
            };
            let this_boot = journal.boot_id == self.boot_id;
            if !this_boot || !self.proc.is_alive(journal.pid, journal.start_time)? {
                return Ok(false);
            }
            let needed = journal.memlock_needed;
            self.raise(&mut journal, needed)
        })
    }

    fn locked_before(&self, qemu: &QemuProcess) -> Result<u64, GateError> {
        match self.journals.read(&qemu.pod_uid)? {
            Some(j) if (j.pid, j.start_time) == (qemu.pid, qemu.start_time) => Ok(j.locked_before),
            _ => self.locked(qemu.pid),
        }
    }

    fn recover(
        &self,
        still_attached: &dyn Fn(&Journal) -> bool,
    ) -> Result<Vec<Recovered>, GateError> {
        let mut recovered = Vec::new();
        let mut pods = Vec::new();
        for (pod_uid, journal) in self.journals.read_all()? {
            pods.push(pod_uid.clone());
            let (kept, result) = match journal {
                Ok(journal) => {
                    let attached = still_attached(&journal);
                    let mut kept = true;
                    let result = self.exclusively(&pod_uid, || {
                        let (keep, result) = self.recover_one(journal, attached);
                        kept = keep;
                        result
                    });
                    (kept, result)
                }
                Err(e) => (true, Err(e)),
            };
            recovered.push(Recovered {
                pod_uid,
                kept,
                result,
            });
        }
        self.cgroup.sweep(&pods)?;
        Ok(recovered)
    }
}
