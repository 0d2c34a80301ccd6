//! Where the harness keeps things: a cache outside the checkout, the state of the one
//! running data centre, and a folder of logs for each run. Creates folders, nothing else.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

/// The folders of this run.
#[derive(Clone, Debug)]
pub struct Paths {
    cache: PathBuf,
    source: PathBuf,
    run_logs: PathBuf,
}

impl Paths {
    /// Reads `VF_E2E_CACHE`, `XDG_CACHE_HOME` and `HOME`, and creates the folders.
    /// `run` names the log folder: the subcommand that runs.
    pub fn discover(run: &str) -> Result<Self> {
        let cache = cache_dir(|name| std::env::var_os(name).map(PathBuf::from))?;
        let source = source_dir()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let run_logs = cache
            .join("logs")
            .join(format!("{now}-{run}-{}", std::process::id()));
        let paths = Self {
            cache,
            source,
            run_logs,
        };
        for dir in [
            &paths.cache,
            &paths.run_logs,
            &paths.state(),
            &paths.artefacts(),
            &paths.locks(),
        ] {
            std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        Ok(paths)
    }

    /// Everything that survives a run.
    #[must_use]
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Root of the workspace the harness was built from.
    #[must_use]
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Logs of this run.
    #[must_use]
    pub fn run_logs(&self) -> &Path {
        &self.run_logs
    }

    /// State of the running data centre: pid files, sockets, kubeconfigs.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.cache.join("state")
    }

    /// Artefacts by key; see [`crate::cache`].
    #[must_use]
    pub fn artefacts(&self) -> PathBuf {
        self.cache.join("artefacts")
    }

    /// Lock files.
    #[must_use]
    pub fn locks(&self) -> PathBuf {
        self.cache.join("locks")
    }
}

fn cache_dir(var: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    let set = |name| var(name).filter(|p| !p.as_os_str().is_empty());
    let dir = if let Some(dir) = set("VF_E2E_CACHE") {
        dir
    } else if let Some(dir) = set("XDG_CACHE_HOME") {
        dir.join("vf-provisioner-e2e")
    } else if let Some(home) = set("HOME") {
        home.join(".cache/vf-provisioner-e2e")
    } else {
        bail!("none of VF_E2E_CACHE, XDG_CACHE_HOME and HOME is set: nowhere to keep the cache");
    };
    if !dir.is_absolute() {
        bail!("the cache folder {} is not an absolute path", dir.display());
    }
    Ok(dir)
}

fn source_dir() -> Result<PathBuf> {
    // cargo sets the variable for `cargo run`; a binary started by hand falls back to
    // the place it was built from.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let root = manifest
        .parent()
        .context("the e2e crate has no parent folder")?;
    if !root.join("e2e/tools").is_dir() {
        bail!(
            "{} is not the workspace: it has no e2e/tools",
            root.display()
        );
    }
    Ok(root.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(vars: &'static [(&'static str, &'static str)]) -> Result<PathBuf> {
        cache_dir(|n| {
            vars.iter()
                .find(|(k, _)| *k == n)
                .map(|(_, v)| PathBuf::from(v))
        })
    }

    #[test]
    fn cache_dir_prefers_the_most_specific() {
        let all = &[
            ("VF_E2E_CACHE", "/a"),
            ("XDG_CACHE_HOME", "/b"),
            ("HOME", "/c"),
        ];
        assert_eq!(with(all).unwrap(), Path::new("/a"));
        assert_eq!(
            with(&[("XDG_CACHE_HOME", "/b"), ("HOME", "/c")]).unwrap(),
            Path::new("/b/vf-provisioner-e2e")
        );
        assert_eq!(
            with(&[("XDG_CACHE_HOME", ""), ("HOME", "/c")]).unwrap(),
            Path::new("/c/.cache/vf-provisioner-e2e")
        );
    }

    #[test]
    fn cache_dir_refuses_none_and_relative() {
        assert!(with(&[]).is_err());
        assert!(with(&[("VF_E2E_CACHE", "x")]).is_err());
    }
}
