//! What is read from outside, as functions that a fuzzer calls: each takes any bytes, reads
//! them as the programs do, and panics when something that is promised does not hold.
//!
//! Nothing here ships. `cargo e2e fuzz` runs the targets under libFuzzer; `tests/corpus.rs`
//! replays the kept inputs (`corpus/TARGET/`) in every `cargo test`, and then changed ones.
// A panic is how a target says that it has found something.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod json;
pub mod short;
mod targets;

use std::path::{Path, PathBuf};

/// A group of parsers.
#[derive(Debug)]
pub struct Target {
    pub name: &'static str,
    /// Inputs are JSON, and are changed as such.
    pub json: bool,
    pub run: fn(&[u8]),
}

/// Every target; each has a folder of its name in `corpus`.
pub const TARGETS: [Target; 8] = [
    target("controller", true, targets::controller::run),
    target("filter", false, targets::filter::run),
    target("kernel", false, targets::kernel::run),
    target("kubeconfig", false, targets::kubeconfig::run),
    target("mirror", true, targets::mirror::run),
    target("procfs", false, targets::procfs::run),
    target("qmp", true, targets::qmp::run),
    target("values", false, targets::values::run),
];

const fn target(name: &'static str, json: bool, run: fn(&[u8])) -> Target {
    Target { name, json, run }
}

/// The target of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|t| t.name == name)
}

/// The kept inputs of all targets.
#[must_use]
pub fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// Runs a target on a file, or on all files of a folder; answers on how many.
pub fn replay(target: &Target, path: &Path) -> std::io::Result<usize> {
    if !path.is_dir() {
        (target.run)(&std::fs::read(path)?);
        return Ok(1);
    }
    let files = files(path)?;
    for file in &files {
        // Shown by the test harness when the next line panics.
        println!("{}", file.display());
        (target.run)(&std::fs::read(file)?);
    }
    Ok(files.len())
}

/// The files of a folder, by name.
fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    files.sort();
    Ok(files)
}
