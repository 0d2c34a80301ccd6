//! The images of a control plane, each one layer with one static program, as archives in
//! the cache. kube-proxy also gets iptables, nft and conntrack out of the node's root.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::archive::{self, Image};
use crate::cache;
use crate::exec::Cmd;
use crate::node_image::install;
use crate::paths::Paths;
use crate::progress;
use crate::tools::{KUBERNETES, Tools};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const REPOSITORY: &str = "registry.k8s.io";
/// The tags kubeadm 1.36 asks for (cmd/kubeadm/app/constants) and kind's containerd uses.
const ETCD: &str = "3.6.8-0";
const COREDNS: &str = "v1.14.2";
const PAUSE: &str = "3.10";
const RECIPE: &str = "1";

/// The folder of archives, `<program>.tar` each.
pub fn ensure(paths: &Paths, tools: &Tools, rootfs: &Path) -> Result<PathBuf> {
    let key = tools
        .key()
        .text("rootfs", rootfs.to_string_lossy().as_bytes())
        .text("tags", format!("{ETCD} {COREDNS} {PAUSE}"))
        .text("recipe", RECIPE);
    cache::artefact(paths, "kubernetes-images", &key, |out| {
        progress::step("making the control plane's images", |step| {
            for (program, name) in names() {
                step.note(program);
                let dir = tempfile::tempdir_in(out)?;
                let root = dir.path().join("root");
                fill(&root, tools, program, rootfs, dir.path())?;
                let start = start(program);
                let image = Image {
                    name: &name,
                    entrypoint: &[&start],
                    env: &[PATH],
                    user: "",
                };
                archive::write(&root, &image, &out.join(format!("{program}.tar")))?;
            }
            Ok(())
        })
    })
}

/// Program and image name of each.
fn names() -> Vec<(&'static str, String)> {
    let core = [
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kube-proxy",
    ];
    let mut all: Vec<_> = core
        .map(|c| (c, format!("{REPOSITORY}/{c}:{KUBERNETES}")))
        .into_iter()
        .collect();
    all.push(("etcd", format!("{REPOSITORY}/etcd:{ETCD}")));
    all.push(("coredns", format!("{REPOSITORY}/coredns/coredns:{COREDNS}")));
    all.push(("pause", format!("{REPOSITORY}/pause:{PAUSE}")));
    all
}

fn start(program: &str) -> String {
    if program == "pause" {
        "/pause".into()
    } else {
        format!("/usr/local/bin/{program}")
    }
}

fn fill(root: &Path, tools: &Tools, program: &str, rootfs: &Path, scratch: &Path) -> Result<()> {
    std::fs::create_dir(root)?;
    std::fs::set_permissions(root, PermissionsExt::from_mode(0o755))?;
    install(
        &tools.path(program)?,
        &root.join(start(program).trim_start_matches('/')),
    )?;
    for dir in ["tmp", "etc", "run"] {
        std::fs::create_dir(root.join(dir))?;
    }
    std::fs::set_permissions(root.join("tmp"), PermissionsExt::from_mode(0o1777))?;
    if program == "kube-proxy" {
        firewall(root, rootfs, scratch)?;
    }
    Ok(())
}

/// The firewall programs and every library they and iptables' extensions need.
fn firewall(root: &Path, rootfs: &Path, scratch: &Path) -> Result<()> {
    const PROGRAMS: &[&str] = &[
        "/usr/sbin/xtables-nft-multi",
        "/usr/sbin/nft",
        "/usr/sbin/conntrack",
        "/usr/bin/dash",
    ];
    const EXTENSIONS: &str = "/usr/lib/x86_64-linux-gnu/xtables";
    let debian = scratch.join("debian");
    std::fs::create_dir(&debian)?;
    Cmd::new("tar")
        .arg("-xf")
        .arg(rootfs)
        .arg("-C")
        .arg(&debian)
        .run()?;
    let inside = |p: &str| debian.join(p.trim_start_matches('/'));

    let mut wanted: Vec<String> = PROGRAMS.iter().map(|p| (*p).to_owned()).collect();
    for entry in std::fs::read_dir(inside(EXTENSIONS))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".so") {
            wanted.push(format!("{EXTENSIONS}/{name}"));
        }
    }
    // ldd(1) of many files prints each file's libraries after its name.
    let listing = Cmd::new("chroot")
        .arg(&debian)
        .arg("ldd")
        .args(&wanted)
        .text()?;
    let mut files: BTreeSet<String> = wanted.into_iter().collect();
    files.extend(libraries(&listing));
    for file in &files {
        install(
            &inside(file),
            &root.join(merged(file).trim_start_matches('/')),
        )?;
    }
    for (link, target) in [
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
        ("sbin", "usr/sbin"),
    ] {
        std::fs::create_dir_all(root.join(target))?;
        symlink(target, root.join(link))?;
    }
    symlink("usr/bin", root.join("bin"))?;
    symlink("dash", root.join("usr/bin/sh"))?;
    for family in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            symlink(
                "xtables-nft-multi",
                root.join(format!("usr/sbin/{family}{verb}")),
            )?;
        }
    }
    for program in ["iptables", "nft", "conntrack"] {
        let run = Cmd::new("chroot")
            .arg(root)
            .arg(format!("/usr/sbin/{program}"));
        run.arg("--version")
            .run()
            .context("a program of the kube-proxy image")?;
    }
    Ok(())
}

fn libraries(ldd: &str) -> BTreeSet<String> {
    ldd.split_ascii_whitespace()
        .filter(|w| (w.starts_with("/lib") || w.starts_with("/usr/lib")) && !w.ends_with(':'))
        .map(String::from)
        .collect()
}

/// Debian's `/lib` is a link to `/usr/lib`; so is the image's.
fn merged(path: &str) -> String {
    if path.starts_with("/usr/") {
        path.to_owned()
    } else {
        format!("/usr{path}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_ldd() {
        let text = "/usr/sbin/nft:\n\tlinux-vdso.so.1 (0x1)\n\tlibm.so.6 => /lib/x/libm.so.6 (0x2)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x3)\n/usr/lib/x/xtables/a.so:\n\tstatically linked\n";
        let found: Vec<String> = libraries(text).into_iter().collect();
        assert_eq!(found, ["/lib/x/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(merged("/lib64/a"), "/usr/lib64/a");
        assert_eq!(merged("/usr/lib/a"), "/usr/lib/a");
    }
}
