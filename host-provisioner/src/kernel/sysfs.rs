//! Reading and writing the small text files of sysfs and procfs, and waiting
//! for links. Every error keeps path and errno.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use common::pci::PciAddress;

use super::{Helpers, KernelError};

/// Between two looks at a file for which sysfs sends no event: inotify does not
/// see what the kernel itself does in sysfs.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The file's text without surrounding white space.
pub(super) fn read(path: &Path) -> Result<String, KernelError> {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .map_err(|source| KernelError::file("read", path, source))
}

/// As [`read`]; `None` when there is no such file.
pub(super) fn read_if_there(path: &Path) -> Result<Option<String>, KernelError> {
    absent_is_none(read(path))
}

/// The file's text as a value.
pub(super) fn parse<T: FromStr>(path: &Path, expected: &'static str) -> Result<T, KernelError> {
    let text = read(path)?;
    text.parse().map_err(|_| KernelError::Content {
        path: path.to_owned(),
        text,
        expected,
    })
}

/// Writes attributes. Apart from the reads because a test's folder needs
/// somebody who does what the kernel does upon a write.
pub trait Attributes: Send + Sync + fmt::Debug + 'static {
    /// Writes `text` in one write(2), which is what an attribute wants.
    fn put(&self, path: &Path, text: &str) -> io::Result<()>;
}

/// The running kernel's attributes.
#[derive(Clone, Copy, Debug)]
pub struct Files;

impl Attributes for Files {
    /// The file is never made: an absent attribute is an error.
    fn put(&self, path: &Path, text: &str) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
        file.write_all(text.as_bytes())
    }
}

/// A sysfs to write to: its folder and who writes.
#[derive(Clone, Copy)]
pub(super) struct Sysfs<'a> {
    pub root: &'a Path,
    pub attributes: &'a dyn Attributes,
    /// Who makes the writes that may not come back; they are made here without.
    pub helpers: Option<&'a Helpers>,
}

impl Sysfs<'_> {
    /// Folder of a PCI function.
    pub(super) fn device(&self, address: PciAddress) -> PathBuf {
        self.root.join("bus/pci/devices").join(address.to_string())
    }

    pub(super) fn write(&self, path: &Path, text: &str) -> Result<(), KernelError> {
        self.attributes
            .put(path, text)
            .map_err(|source| KernelError::file(format!("write {text:?} to"), path, source))
    }

    /// As [`Self::write`], where the kernel may wait for whoever uses `function`: no longer
    /// than `limit` if there are helpers.
    pub(super) fn write_apart(
        &self,
        function: PciAddress,
        path: &Path,
        text: &str,
        limit: Duration,
    ) -> Result<(), KernelError> {
        match self.helpers {
            Some(helpers) => helpers.write(function, path, text, limit),
            None => self.write(path, text),
        }
    }

    /// An error when a write about `function` has not come back.
    pub(super) fn not_stuck(&self, function: PciAddress) -> Result<(), KernelError> {
        self.helpers
            .map_or(Ok(()), |helpers| helpers.check(function))
    }
}

/// The last part of a link's target, the way sysfs names drivers and groups;
/// `None` when there is no such link.
pub(super) fn link_name(path: &Path) -> Result<Option<String>, KernelError> {
    let target = absent_is_none(
        fs::read_link(path).map_err(|source| KernelError::file("read link", path, source)),
    )?;
    let Some(target) = target else {
        return Ok(None);
    };
    match target.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(Some(name.to_owned())),
        None => Err(KernelError::Content {
            path: path.to_owned(),
            text: target.to_string_lossy().into_owned(),
            expected: "a link to a named object",
        }),
    }
}

/// The names in a folder, sorted; empty when there is no such folder.
pub(super) fn names(path: &Path) -> Result<Vec<String>, KernelError> {
    let fail = |source| KernelError::file("list", path, source);
    let Some(entries) = absent_is_none(fs::read_dir(path).map_err(fail))? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(fail)?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Looks until `found` answers, at most `limit`.
pub(super) fn wait_for<T>(
    what: impl Fn() -> String,
    limit: Duration,
    mut found: impl FnMut() -> Result<Option<T>, KernelError>,
) -> Result<T, KernelError> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = found()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            return Err(KernelError::Timeout {
                what: what(),
                millis: limit.as_millis(),
            });
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// Whether a path exists; a broken link does.
pub(super) fn exists(path: &Path) -> Result<bool, KernelError> {
    let there = absent_is_none(
        fs::symlink_metadata(path).map_err(|source| KernelError::file("look at", path, source)),
    )?;
    Ok(there.is_some())
}

fn absent_is_none<T>(result: Result<T, KernelError>) -> Result<Option<T>, KernelError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(KernelError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
