//! What is open in which container, on disk before it is opened.
//!
//! One JSON file a pod in a folder below /run: it dies with the boot, as the gates do. A file is
//! replaced whole (write, fsync, rename, fsync of the folder), so it is never half written.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::GateError;

/// A character device that may be read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Device {
    pub major: u32,
    pub minor: u32,
}

/// A device node that we made in the container's `/dev/vfio`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRecord {
    /// `vfio`, or a group's number.
    pub name: String,
    pub device: Device,
}

/// A device program of ours that is, or is about to be, in the place of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OurProgram {
    pub id: u32,
    /// The kernel's hash of its instructions, hexadecimal: an id alone may be used again.
    pub tag: String,
    pub rules: Vec<Device>,
}

/// One replaced device program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgramRecord {
    /// The cgroup it is attached to, from the hierarchy's root.
    pub cgroup: PathBuf,
    /// The one that was there, and where it is pinned so that it lives on.
    pub old_id: u32,
    pub old_tag: String,
    pub pin: PathBuf,
    /// Ours; two while one of ours takes another's place.
    pub ours: Vec<OurProgram>,
}

/// QEMU's memlock limit before and after us. `None` is "unlimited".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemlockRecord {
    pub old_soft: Option<u64>,
    pub old_hard: Option<u64>,
    pub set: u64,
}

/// Everything that is open for one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Journal {
    pub pod_uid: String,
    pub boot_id: String,
    pub pid: u32,
    pub start_time: u64,
    /// QEMU's cgroup, from the hierarchy's root.
    pub cgroup: PathBuf,
    /// `VmLck` in bytes before the first VFIO device.
    pub locked_before: u64,
    /// Groups whose node and rule are, or are about to be, open.
    pub open_groups: Vec<u32>,
    /// True when `/dev/vfio` itself is ours.
    pub made_directory: bool,
    pub nodes: Vec<NodeRecord>,
    pub programs: Vec<ProgramRecord>,
    pub memlock: Option<MemlockRecord>,
    /// The least limit that the attached devices need, in bytes, whoever set it.
    #[serde(default)]
    pub memlock_needed: u64,
}

/// A pod's UID and its journal, or why that cannot be read.
pub type Entry = (String, Result<Journal, GateError>);

/// The folder of journals.
#[derive(Clone, Debug)]
pub struct Journals {
    directory: PathBuf,
}

impl Journals {
    /// Uses `directory`, and makes it if it is not there.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, GateError> {
        let directory = directory.into();
        fs::create_dir_all(&directory).map_err(|e| GateError::io("make", &directory, e))?;
        Ok(Self { directory })
    }

    fn path(&self, pod_uid: &str) -> Result<PathBuf, GateError> {
        let plain = !pod_uid.is_empty()
            && pod_uid
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !plain {
            return Err(GateError::Refused(format!(
                "{pod_uid:?} is no pod UID: it may hold letters, digits and dashes only"
            )));
        }
        Ok(self.directory.join(format!("{pod_uid}.json")))
    }

    /// The pod's journal, if it has one.
    pub fn read(&self, pod_uid: &str) -> Result<Option<Journal>, GateError> {
        read_file(&self.path(pod_uid)?)
    }

    /// All journals; a damaged one is an error of its own beside the others.
    pub fn read_all(&self) -> Result<Vec<Entry>, GateError> {
        let failed = |e| GateError::io("list", &self.directory, e);
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Some(pod_uid) = pod_of(&path) else {
                continue;
            };
            match read_file(&path) {
                Ok(Some(journal)) => all.push((pod_uid, Ok(journal))),
                Ok(None) => {}
                Err(e) => all.push((pod_uid, Err(e))),
            }
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Puts the journal on disk; when this returns it is there to stay.
    pub fn write(&self, journal: &Journal) -> Result<(), GateError> {
        let path = self.path(&journal.pod_uid)?;
        let scratch = path.with_extension("new");
        let text = serde_json::to_vec_pretty(journal).map_err(|e| GateError::Journal {
            path: path.clone(),
            reason: e.to_string(),
        })?;
        let put = || -> io::Result<()> {
            let mut file = File::create(&scratch)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&scratch, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        put().map_err(|e| GateError::io("write", &path, e))
    }

    /// Takes the pod's journal away; nothing of it may be open any more.
    pub fn remove(&self, pod_uid: &str) -> Result<(), GateError> {
        let path = self.path(pod_uid)?;
        match fs::remove_file(&path) {
            Ok(()) => File::open(&self.directory)
                .and_then(|d| d.sync_all())
                .map_err(|e| GateError::io("sync", &self.directory, e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(GateError::io("remove", &path, e)),
        }
    }
}

fn pod_of(path: &Path) -> Option<String> {
    (path.extension()? == "json")
        .then(|| path.file_stem()?.to_str().map(str::to_owned))
        .flatten()
}

fn read_file(path: &Path) -> Result<Option<Journal>, GateError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(GateError::io("read", path, e)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| GateError::Journal {
            path: path.to_owned(),
            reason: e.to_string(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn journal(pod_uid: &str) -> Journal {
        Journal {
            pod_uid: pod_uid.to_owned(),
            boot_id: "b".into(),
            pid: 1,
            start_time: 2,
            cgroup: "/x".into(),
            locked_before: 0,
            open_groups: vec![6],
            made_directory: true,
            nodes: vec![NodeRecord {
                name: "6".into(),
                device: Device {
                    major: 511,
                    minor: 6,
                },
            }],
            programs: Vec::new(),
            memlock: Some(MemlockRecord {
                old_soft: Some(65536),
                old_hard: None,
                set: 1 << 31,
            }),
            memlock_needed: 1 << 31,
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_can_be_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let journals = Journals::open(dir.path().join("a/b")).unwrap();
        assert_eq!(journals.read("p-1").unwrap(), None);
        journals.write(&journal("p-1")).unwrap();
        let mut second = journal("p-1");
        second.open_groups.clear();
        journals.write(&second).unwrap();
        assert_eq!(journals.read("p-1").unwrap(), Some(second));
        journals.remove("p-1").unwrap();
        journals.remove("p-1").unwrap();
        assert!(journals.read_all().unwrap().is_empty());
    }

    #[test]
    fn a_damaged_journal_is_said_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let journals = Journals::open(dir.path()).unwrap();
        journals.write(&journal("good")).unwrap();
        fs::write(dir.path().join("bad.json"), "{").unwrap();
        fs::write(dir.path().join("good.new"), "{").unwrap();
        let all = journals.read_all().unwrap();
        assert_eq!(all.len(), 2);
        assert!(matches!(all[0], (ref p, Err(GateError::Journal { .. })) if p == "bad"));
        assert!(all[1].1.is_ok());
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let journals = Journals::open(dir.path()).unwrap();
        assert!(journals.read("../x").is_err());
        assert!(journals.read("").is_err());
    }
}
