//! Kernel modules of the host: what is loaded and who uses it, and loading by the host's own
//! kmod, which knows the host's module folders, dependencies and settings.
//!
//! The programs of kmod are run by this program started once more ([`run`]), outside of the
//! pod: a module's own start may not come back.

#[cfg(any(test, feature = "fake-kernel"))]
pub mod fake;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::pci::PciAddress;
use thiserror::Error;

use super::{KernelError, Stuck, helper};

/// The subcommand that runs a program of kmod on the host.
pub const SUBCOMMAND: &str = "host-kmod";

/// Where hosts have kmod's programs.
const FOLDERS: [&str; 4] = ["/sbin", "/usr/sbin", "/bin", "/usr/bin"];

/// A module's name as the kernel has it, with `_` for `-` (kmod treats both as one).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleName(String);

impl ModuleName {
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.replace('-', "_"))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModuleState {
    #[default]
    Absent,
    /// Part of the kernel itself.
    BuiltIn,
    Live,
    /// It is being loaded or unloaded by somebody.
    Changing,
}

/// A module as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleFacts {
    pub state: ModuleState,
    /// The parameters that the kernel shows; a module may hide any.
    pub parameters: BTreeMap<String, String>,
    /// What uses it, in words; without any it can be unloaded and nobody misses it.
    pub users: Vec<String>,
    /// The PCI functions that its drivers have.
    pub functions: BTreeSet<PciAddress>,
}

/// Why kmod did not do what it was asked to.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum KmodError {
    /// Its own words, or why it did not come to it.
    #[error("{program}: {words}")]
    Failed {
        program: &'static str,
        words: String,
    },
    /// The module's start or end has not come back.
    #[error(
        "{program} has not come back: process {} of the host waits in the kernel",
        .stuck.pid
    )]
    Stuck { program: &'static str, stuck: Stuck },
}

/// What the node agent asks about the modules of its host. Everything blocks.
pub trait Modules: Send + Sync + 'static {
    /// The module as it is.
    ///
    /// # Errors
    /// A file of sysfs that cannot be read.
    fn module(&self, name: &ModuleName) -> Result<ModuleFacts, KernelError>;

    /// The parameters that the host's module file has.
    ///
    /// # Errors
    /// There is no such file for the running kernel.
    fn parameters(&self, name: &ModuleName) -> Result<BTreeSet<String>, KmodError>;

    /// Whether the module is part of the running kernel; kmod is content with loading one.
    ///
    /// # Errors
    /// There is no such module.
    fn built_in(&self, name: &ModuleName) -> Result<bool, KmodError>;

    /// Loads the module, and what it depends on before.
    ///
    /// # Errors
    /// kmod's words.
    fn load(
        &self,
        name: &ModuleName,
        parameters: &BTreeMap<String, String>,
    ) -> Result<(), KmodError>;

    /// Unloads the module, and what it alone used. The caller has seen that nothing uses it, and
    /// sees to it that nothing of ours begins to; the kernel refuses a module with references,
    /// but not one whose devices are in use.
    ///
    /// # Errors
    /// kmod's words.
    fn unload(&self, name: &ModuleName) -> Result<(), KmodError>;
}

/// The parameters in what `modinfo -0 -F parm` says: `name:words` each.
pub(super) fn named(said: &str) -> BTreeSet<String> {
    said.split('\0')
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .filter(|name| !name.is_empty())
        .collect()
}

/// The arguments that load a module.
pub(super) fn load_arguments(
    name: &ModuleName,
    parameters: &BTreeMap<String, String>,
) -> Vec<OsString> {
    let parameters = parameters
        .iter()
        .map(|(key, value)| format!("{key}={value}"));
    std::iter::once(name.to_string())
        .chain(parameters)
        .map(OsString::from)
        .collect()
}

/// The helper's part: waits for the word, then becomes a program of kmod in the host's file
/// system. Does not return unless it cannot.
///
/// # Errors
/// Why not; it was said.
pub fn run(host: &Path, program: &str, arguments: &[OsString]) -> Result<(), io::Error> {
    helper::wait_for_word()?;
    let failed = become_program(host, program, arguments);
    println!("{failed}");
    Err(failed)
}

fn become_program(host: &Path, program: &str, arguments: &[OsString]) -> io::Error {
    let enter = || {
        std::os::unix::fs::chroot(host)?;
        std::env::set_current_dir("/")
    };
    if let Err(error) = enter() {
        return io::Error::other(format!("entering {}: {error}", host.display()));
    }
    let Some(path) = found(program) else {
        return io::Error::other(format!(
            "the host has no {program} in {}; install its package kmod",
            FOLDERS.join(", ")
        ));
    };
    // What it complains of is its answer.
    match io::stdout().as_fd().try_clone_to_owned() {
        Ok(out) => Command::new(path)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::from(out))
            .env_clear()
            .env("LC_ALL", "C")
            .exec(),
        Err(error) => error,
    }
}

fn found(program: &str) -> Option<PathBuf> {
    let mut paths = FOLDERS.iter().map(|folder| Path::new(folder).join(program));
    paths.find(|path| path.exists())
}
