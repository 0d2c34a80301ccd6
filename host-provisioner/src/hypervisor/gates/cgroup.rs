//! The device cgroup gate. `plan` decides over plain values which programs to replace by what;
//! `CgroupGate` reads the hierarchy and carries it out.
//!
//! Every program between a process and the root must allow an access, so it widens only by
//! replacing each one that denies. Ours are known by the journal; what somebody else has put in
//! our place since is theirs and stays.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::GateError;
use super::bpf;
use super::filter::{self, Instruction};
use super::journal::{Device, Journal, OurProgram, ProgramRecord};

/// BPF_FS_MAGIC (uapi linux/magic.h); nix keeps it for glibc targets only.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// A device program that is attached and in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub id: u32,
    pub tag: String,
    /// Whether it may be replaced alone (BPF_F_ALLOW_MULTI).
    pub multi: bool,
    /// Whether it is instructions only: no maps.
    pub plain: bool,
    pub instructions: Vec<Instruction>,
    /// When it is one of ours: the instructions of the one it replaced.
    pub base: Option<Vec<Instruction>>,
}

/// A cgroup with the programs attached to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// From the hierarchy's root, `/` for the root itself.
    pub cgroup: PathBuf,
    pub programs: Vec<Program>,
}

/// One replacement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Load `instructions` and put them in the place of program `id`.
    Widen {
        cgroup: PathBuf,
        id: u32,
        tag: String,
        rules: Vec<Device>,
        instructions: Vec<Instruction>,
    },
    /// Put the pinned program back in the place of ours, `id`.
    Restore { cgroup: PathBuf, id: u32 },
}

fn record_of<'a>(
    records: &'a [ProgramRecord],
    cgroup: &Path,
    id: u32,
    tag: &str,
) -> Option<(&'a ProgramRecord, &'a OurProgram)> {
    records.iter().filter(|r| r.cgroup == cgroup).find_map(|r| {
        let ours = r.ours.iter().find(|o| o.id == id && o.tag == tag)?;
        Some((r, ours))
    })
}

/// What must be replaced so that exactly `wanted` is let through by us: programs that deny are
/// widened, ours that are no longer needed are taken out. The error is a sentence.
pub fn plan(
    levels: &[Level],
    records: &[ProgramRecord],
    wanted: &[Device],
) -> Result<Vec<Action>, String> {
    let mut actions = Vec::new();
    for level in levels {
        for program in &level.programs {
            let ours = record_of(records, &level.cgroup, program.id, &program.tag);
            let original = match (&ours, &program.base) {
                (Some(_), Some(base)) => base,
                (Some(_), None) => {
                    return Err(format!(
                        "the device program that was replaced on {} cannot be read back from where it is pinned",
                        level.cgroup.display()
                    ));
                }
                (None, _) => &program.instructions,
            };
            let rules = denied(level, program, original, wanted)?;
            let (cgroup, id) = (level.cgroup.clone(), program.id);
            match ours {
                Some((_, own)) if own.rules == rules => {}
                Some(_) if rules.is_empty() => actions.push(Action::Restore { cgroup, id }),
                None if rules.is_empty() => {}
                _ => actions.push(Action::Widen {
                    instructions: filter::widen(original, &rules),
                    tag: program.tag.clone(),
                    cgroup,
                    id,
                    rules,
                }),
            }
        }
    }
    Ok(actions)
}

/// Which of `wanted` the program denies.
fn denied(
    level: &Level,
    program: &Program,
    original: &[Instruction],
    wanted: &[Device],
) -> Result<Vec<Device>, String> {
    let said = |what: &str| {
        format!(
            "device program {} of cgroup {} {what}; it cannot be widened safely, so this VM cannot be given a VF",
            program.id,
            level.cgroup.display()
        )
    };
    let mut rules = Vec::new();
    for device in wanted {
        let allowed = filter::allows(original, *device)
            .map_err(|e| said(&format!("is not a plain device filter: {e}")))?;
        if !allowed {
            rules.push(*device);
        }
    }
    if !rules.is_empty() && !program.plain {
        return Err(said("uses maps"));
    }
    if !rules.is_empty() && !program.multi {
        return Err(said("is attached so that it cannot be replaced alone"));
    }
    Ok(rules)
}

/// Reads and changes device programs below a cgroup v2 mount.
#[derive(Clone, Debug)]
pub struct CgroupGate {
    mount: PathBuf,
    pins: PathBuf,
}

/// Puts the journal on disk before a change takes effect.
pub type Save<'a> = &'a dyn Fn(&Journal) -> Result<(), GateError>;

impl CgroupGate {
    /// `mount` is the cgroup v2 mount, `pins` a folder in a bpffs, made if it is not there.
    pub fn new(mount: PathBuf, pins: PathBuf) -> Result<Self, GateError> {
        if !is_fs(&mount, CGROUP2_SUPER_MAGIC)? {
            return Err(GateError::Refused(
                super::super::plan::Unsupported::CgroupV1.to_string(),
            ));
        }
        std::fs::create_dir_all(&pins).map_err(|e| GateError::io("make", &pins, e))?;
        if !is_fs(&pins, magic(BPF_FS_MAGIC))? {
            return Err(GateError::Refused(format!(
                "{} is not in a bpf file system; mount the host's /sys/fs/bpf there",
                pins.display()
            )));
        }
        Ok(Self { mount, pins })
    }

    /// Where `cgroup` lies in the mount.
    #[must_use]
    pub fn path(&self, cgroup: &Path) -> PathBuf {
        self.mount.join(cgroup.strip_prefix("/").unwrap_or(cgroup))
    }

    fn open(&self, cgroup: &Path) -> Result<OwnedFd, GateError> {
        let path = self.path(cgroup);
        std::fs::File::open(&path)
            .map(OwnedFd::from)
            .map_err(|e| GateError::io("open", path, e))
    }

    /// All programs in force for a process in `cgroup`, from there to the root. `None` when the
    /// cgroup is gone.
    pub fn levels(
        &self,
        cgroup: &Path,
        records: &[ProgramRecord],
    ) -> Result<Option<Vec<Level>>, GateError> {
        let leaf = match self.open(cgroup) {
            Err(GateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let effective = bpf::effective(leaf.as_fd())
            .map_err(|e| GateError::io("list the device programs of", self.path(cgroup), e))?;
        let mut levels = Vec::new();
        for cgroup in cgroup.ancestors().filter(|a| a.is_absolute()) {
            levels.push(self.level(cgroup, &effective, records)?);
        }
        Ok(Some(levels))
    }

    fn level(
        &self,
        cgroup: &Path,
        effective: &[u32],
        records: &[ProgramRecord],
    ) -> Result<Level, GateError> {
        let fd = self.open(cgroup)?;
        let attached = bpf::attached(fd.as_fd())
            .map_err(|e| GateError::io("list the device programs of", self.path(cgroup), e))?;
        let mut programs = Vec::new();
        // A program that an outer cgroup does not pass on is not in force.
        for id in attached.ids.iter().filter(|id| effective.contains(id)) {
            let info = self.by_id(cgroup, *id).and_then(|p| self.info(&p))?;
            let base = match record_of(records, cgroup, info.id, &info.tag) {
                Some((record, _)) => Some(self.info(&self.pinned(record)?)?.instructions),
                None => None,
            };
            programs.push(Program {
                id: info.id,
                tag: info.tag,
                multi: attached.flags & bpf::ALLOW_MULTI != 0,
                plain: info.maps == 0 && info.type_ == bpf::TYPE_CGROUP_DEVICE,
                instructions: info.instructions,
                base,
            });
        }
        Ok(Level {
            cgroup: cgroup.to_owned(),
            programs,
        })
    }

    fn by_id(&self, cgroup: &Path, id: u32) -> Result<OwnedFd, GateError> {
        bpf::by_id(id).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => busy(cgroup),
            _ => GateError::io("open the device program of", self.path(cgroup), e),
        })
    }

    fn info(&self, program: &OwnedFd) -> Result<bpf::Info, GateError> {
        bpf::info(program.as_fd())
            .map_err(|e| GateError::io("read a device program of", &self.mount, e))
    }

    fn pinned(&self, record: &ProgramRecord) -> Result<OwnedFd, GateError> {
        bpf::pinned(&record.pin).map_err(|e| GateError::io("open the pinned", &record.pin, e))
    }

    /// Carries out one action; the journal is on disk before each change.
    pub fn apply(
        &self,
        action: &Action,
        journal: &mut Journal,
        save: Save<'_>,
    ) -> Result<(), GateError> {
        match action {
            Action::Widen {
                cgroup,
                id,
                tag,
                rules,
                instructions,
            } => {
                let fd = self.open(cgroup)?;
                let old = self.by_id(cgroup, *id)?;
                let new = bpf::load(instructions).map_err(|e| {
                    GateError::io("load a device program for", self.path(cgroup), e)
                })?;
                let info = self.info(&new)?;
                let ours = OurProgram {
                    id: info.id,
                    tag: info.tag,
                    rules: rules.clone(),
                };
                self.note(journal, cgroup, (*id, tag), &old, &ours)?;
                save(journal)?;
                self.replace(cgroup, &fd, &new, &old)?;
                for record in journal.programs.iter_mut().filter(|r| r.cgroup == *cgroup) {
                    if record.ours.contains(&ours) {
                        record.ours = vec![ours.clone()];
                    }
                }
                save(journal)
            }
            Action::Restore { cgroup, id } => {
                let fd = self.open(cgroup)?;
                let ours = self.by_id(cgroup, *id)?;
                let record = journal
                    .programs
                    .iter()
                    .find(|r| r.cgroup == *cgroup && r.ours.iter().any(|o| o.id == *id))
                    .cloned()
                    .ok_or_else(|| busy(cgroup))?;
                let old = self.pinned(&record)?;
                self.replace(cgroup, &fd, &old, &ours)?;
                self.forget(&record)?;
                journal.programs.retain(|r| *r != record);
                save(journal)
            }
        }
    }

    /// Enters a replacement into the journal, and pins the old program if it is not ours.
    fn note(
        &self,
        journal: &mut Journal,
        cgroup: &Path,
        (id, tag): (u32, &str),
        old: &OwnedFd,
        ours: &OurProgram,
    ) -> Result<(), GateError> {
        let known = journal
            .programs
            .iter_mut()
            .find(|r| r.cgroup == cgroup && r.ours.iter().any(|o| o.id == id && o.tag == tag));
        if let Some(record) = known {
            record.ours.push(ours.clone());
            return Ok(());
        }
        let pin = self.pins.join(format!("{}-{id}", journal.pod_uid));
        // A pin of that name without a record is from a crash before the journal was written.
        remove_if_there(&pin)?;
        bpf::pin(old.as_fd(), &pin).map_err(|e| GateError::io("pin a program as", &pin, e))?;
        journal.programs.push(ProgramRecord {
            cgroup: cgroup.to_owned(),
            old_id: id,
            old_tag: tag.to_owned(),
            pin,
            ours: vec![ours.clone()],
        });
        Ok(())
    }

    fn replace(
        &self,
        cgroup: &Path,
        fd: &OwnedFd,
        new: &OwnedFd,
        old: &OwnedFd,
    ) -> Result<(), GateError> {
        bpf::replace(fd.as_fd(), new.as_fd(), old.as_fd()).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => busy(cgroup),
            _ => GateError::io("replace the device program of", self.path(cgroup), e),
        })
    }

    /// Lets go of replaced programs whose replacement somebody else has taken out.
    pub fn prune(&self, journal: &mut Journal, levels: &[Level]) -> Result<(), GateError> {
        let (kept, stale): (Vec<_>, Vec<_>) = journal.programs.drain(..).partition(|record| {
            levels
                .iter()
                .filter(|l| l.cgroup == record.cgroup)
                .any(|level| {
                    let ours =
                        |p: &Program| record.ours.iter().any(|o| (o.id, &o.tag) == (p.id, &p.tag));
                    level.programs.iter().any(ours)
                })
        });
        journal.programs = kept;
        stale.iter().try_for_each(|record| self.forget(record))
    }

    /// Unpins a replaced program.
    pub fn forget(&self, record: &ProgramRecord) -> Result<(), GateError> {
        remove_if_there(&record.pin)
    }

    /// Removes pins of pods that have no journal: left by a crash before it was written.
    pub fn sweep(&self, pods: &[String]) -> Result<(), GateError> {
        let failed = |e| GateError::io("list", &self.pins, e);
        for entry in std::fs::read_dir(&self.pins).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let owner = path
                .file_name()
                .and_then(|n| n.to_str()?.rsplit_once('-'))
                .map(|(pod, _)| pod.to_owned());
            if owner.is_some_and(|pod| !pods.contains(&pod)) {
                remove_if_there(&path)?;
            }
        }
        Ok(())
    }
}

fn busy(cgroup: &Path) -> GateError {
    GateError::Busy(format!(
        "another program changes the device rules of cgroup {} at the same time; it is tried again",
        cgroup.display()
    ))
}

fn remove_if_there(path: &Path) -> Result<(), GateError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(GateError::io("remove", path, e)),
        _ => Ok(()),
    }
}

#[allow(clippy::cast_lossless)]
const fn magic(number: u32) -> FsType {
    FsType(number as _)
}

fn is_fs(path: &Path, kind: FsType) -> Result<bool, GateError> {
    statfs(path)
        .map(|found| found.filesystem_type() == kind)
        .map_err(|e| GateError::io("look at", path, e.into()))
}

#[cfg(test)]
mod tests;
