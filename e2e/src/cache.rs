//! Artefacts keyed by the SHA-256 of what they are made from. An artefact is a folder;
//! it is built under a temporary name and renamed when whole, under a lock, so that a
//! crash leaves nothing half-made and two runs do not build one thing twice.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::paths::Paths;

/// Collects what an artefact is made from.
#[derive(Clone, Debug, Default)]
pub struct Key {
    hash: Sha256,
}

impl Key {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a named value. Names and lengths are hashed too, so parts cannot run together.
    #[must_use]
    pub fn text(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.hash.update(format!("{name}\0{}\0", value.len()));
        self.hash.update(value);
        self
    }

    /// Adds a file's content under its file name.
    pub fn file(self, path: &Path) -> Result<Self> {
        let data = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        Ok(self.text(&name, data))
    }

    /// Adds every file below `dir`, in a fixed order, with paths relative to it.
    pub fn tree(mut self, dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        walk(dir, &mut files)?;
        files.sort();
        for f in files {
            let rel = f
                .strip_prefix(dir)
                .unwrap_or(&f)
                .to_string_lossy()
                .into_owned();
            let data = std::fs::read(&f).with_context(|| format!("reading {}", f.display()))?;
            self = self.text(&rel, data);
        }
        Ok(self)
    }

    /// The first 20 hex digits of the hash: enough to never meet another by chance.
    #[must_use]
    pub fn hex(&self) -> String {
        let mut s = String::with_capacity(20);
        for b in self.hash.clone().finalize().iter().take(10) {
            // Writing to a String cannot fail.
            let _ = write!(s, "{b:02x}");
        }
        s
    }
}

fn walk(dir: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, into)?;
        } else {
            into.push(path);
        }
    }
    Ok(())
}

/// Holds an exclusive lock until dropped.
pub struct Lock {
    _file: File,
}

/// Takes the lock called `name`, waiting for another run that holds it.
pub fn lock(paths: &Paths, name: &str) -> Result<Lock> {
    let path = paths.locks().join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    file.lock()
        .with_context(|| format!("locking {}", path.display()))?;
    Ok(Lock { _file: file })
}

/// Where the artefact is or would be.
#[must_use]
pub fn place(paths: &Paths, name: &str, key: &Key) -> PathBuf {
    paths.artefacts().join(format!("{name}-{}", key.hex()))
}

/// The folder of artefact `name` for `key`, built by `build` (which fills the folder it
/// is given) unless it is there already.
pub fn artefact(
    paths: &Paths,
    name: &str,
    key: &Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let target = place(paths, name, key);
    if target.is_dir() {
        return Ok(target);
    }
    let _lock = lock(paths, &format!("{name}-{}", key.hex()))?;
    if target.is_dir() {
        return Ok(target);
    }
    let tmp = tempfile::Builder::new()
        .prefix(&format!(".{name}-"))
        .tempdir_in(paths.artefacts())
        .context("creating a temporary folder in the cache")?;
    build(tmp.path()).with_context(|| format!("making {name}"))?;
    let tmp = tmp.keep();
    // tempfile makes folders for the owner only; artefacts may be read by a container's user.
    std::fs::set_permissions(&tmp, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    std::fs::rename(&tmp, &target)
        .with_context(|| format!("moving {} to {}", tmp.display(), target.display()))?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cannot_run_together() {
        let a = Key::new().text("a", "bc").hex();
        assert_ne!(a, Key::new().text("ab", "c").hex());
        assert_ne!(a, Key::new().text("a", "b").text("", "c").hex());
        assert_eq!(a, Key::new().text("a", "bc").hex());
        assert_eq!(a.len(), 20);
    }
}
