//! The machine's initial root: busybox, the kernel modules that reach the disk, and a
//! script of a few lines. Small, because every boot under emulation unpacks it. Reads
//! the image's root folder; writes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::newc::Archive;
use crate::exec::Cmd;

/// What the root needs before its own udev runs: the disk and its file system. What is
/// built into the kernel is left out.
const MODULES: [&str; 3] = ["virtio_blk", "ext4", "crc32c_intel"];
pub(super) const SOURCE: &str = include_str!("files/initramfs-init");

/// The archive for the kernel whose modules are in `modules` (`/lib/modules/VERSION`).
pub(super) fn build(busybox: &Path, modules: &Path) -> Result<Vec<u8>> {
    let dep = read(&modules.join("modules.dep"))?;
    let builtin = read(&modules.join("modules.builtin"))?;
    let order = load_order(&dep, &builtin, &MODULES)?;
    let mut a = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "root", "modules"] {
        a.dir(dir);
    }
    let data = std::fs::read(busybox).with_context(|| format!("reading {}", busybox.display()))?;
    a.file("bin/busybox", 0o755, &data);
    a.symlink("bin/sh", "busybox");
    a.file("init", 0o755, SOURCE.as_bytes());
    let mut names = String::new();
    for path in &order {
        let name = module_name(path);
        a.file(
            &format!("modules/{name}.ko"),
            0o644,
            &plain(&modules.join(path))?,
        );
        names.push_str(&name);
        names.push('\n');
    }
    a.file("modules/order", 0o644, names.as_bytes());
    Ok(a.finish())
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// busybox's insmod takes no compressed modules; Debian ships them as .ko.xz.
fn plain(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|e| e == "xz") {
        return Ok(Cmd::new("xz").arg("-dc").arg(path).unlogged().run()?.stdout);
    }
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// Paths of `wanted` and all they depend on, each after its dependencies.
fn load_order(dep: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let mut by_name = BTreeMap::new();
    for line in dep.lines() {
        let (path, needs) = line
            .split_once(':')
            .with_context(|| format!("modules.dep has a line without a colon: {line}"))?;
        by_name.insert(
            module_name(Path::new(path)),
            (path, needs.split_whitespace().collect::<Vec<_>>()),
        );
    }
    let builtin: Vec<String> = builtin.lines().map(|l| module_name(Path::new(l))).collect();
    let mut order: Vec<PathBuf> = Vec::new();
    for name in wanted {
        let Some((path, needs)) = by_name.get(*name) else {
            if builtin.iter().any(|b| b == name) {
                continue;
            }
            bail!("the kernel has no module {name}");
        };
        // modules.dep lists all dependencies, the deepest last.
        for p in needs.iter().rev().chain(std::iter::once(path)) {
            if !order.iter().any(|o| o == Path::new(p)) {
                order.push(PathBuf::from(p));
            }
        }
    }
    Ok(order)
}

/// `kernel/fs/mbcache.ko.xz` is module `mbcache`; dashes count as underscores.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let name = file.split_once(".ko").map_or(&*file, |(n, _)| n);
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz\n\
                       kernel/fs/jbd2/jbd2.ko.xz:\nkernel/lib/crc16.ko.xz:\n\
                       kernel/drivers/block/virtio-blk.ko.xz:\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let order = load_order(
            DEP,
            "kernel/drivers/virtio/virtio_pci.ko\n",
            &["virtio_pci", "ext4", "virtio_blk", "jbd2"],
        )
        .unwrap();
        let names: Vec<String> = order.iter().map(|p| module_name(p)).collect();
        assert_eq!(names, ["crc16", "jbd2", "ext4", "virtio_blk"]);
    }

    #[test]
    fn a_missing_module_is_named() {
        let err = load_order(DEP, "", &["nothere"]).unwrap_err().to_string();
        assert!(err.contains("nothere"), "{err}");
    }
}
