//! The image of a kind node, from Debian packages, kind's own base files (of its Go
//! module) and our static programs, with the control plane's images inside. No registry.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cache::{self, Key};
use crate::docker::Docker;
use crate::exec::Cmd;
use crate::kubernetes_images;
use crate::paths::Paths;
use crate::tools::{KUBERNETES, Tools};
use crate::{debian, progress};

/// Bookworm's systemd 252 starts on cgroup v1 and v2; from 256 on it refuses v1.
const SUITE: &str = "bookworm";
const PACKAGES: &str = "systemd,dbus,conntrack,iptables,nftables,iproute2,ethtool,util-linux,\
    mount,kmod,libseccomp2,e2fsprogs,bash,ca-certificates,jq,procps,runc,socat";
/// Counted up when this file changes what it makes.
const RECIPE: &str = "1";

/// The Debian root file system of a node, as a tar in the cache.
pub fn rootfs(paths: &Paths) -> Result<PathBuf> {
    debian::ensure(paths, &["mmdebstrap", "tar"])?;
    let key = Key::new().text("suite", SUITE).text("packages", PACKAGES);
    let dir = cache::artefact(paths, "node-rootfs", &key, |out| {
        progress::step(
            "making the node's root file system from Debian packages",
            |_| {
                Cmd::new("mmdebstrap")
                    .args(["--mode=root", "--variant=minbase", "--components=main"])
                    .arg(format!("--include={PACKAGES}"))
                    .args(
                        ["man", "doc", "locale"]
                            .map(|d| format!("--dpkgopt=path-exclude=/usr/share/{d}/*")),
                    )
                    .arg("--aptopt=Acquire::Languages \"none\"")
                    .arg(SUITE)
                    .arg(out.join("rootfs.tar"))
                    .timeout(Duration::from_secs(1800))
                    .run()?;
                Ok(())
            },
        )
    })?;
    Ok(dir.join("rootfs.tar"))
}

/// The name of the node image, which is in `docker` afterwards.
pub fn ensure(paths: &Paths, tools: &Tools, docker: &Docker) -> Result<String> {
    let rootfs = rootfs(paths)?;
    let images = kubernetes_images::ensure(paths, tools, &rootfs)?;
    let own = paths.source().join("e2e/node");
    let key = tools
        .key()
        .text("rootfs", rootfs.to_string_lossy().as_bytes())
        .text("images", images.to_string_lossy().as_bytes())
        .text("recipe", RECIPE)
        .tree(&own)?;
    let name = format!("vf-e2e-node:{}", key.hex());
    let _lock = cache::lock(paths, "node-image")?;
    if docker
        .cmd()
        .args(["image", "inspect", "-f", "{{.Id}}", &name])
        .status()?
        .status
        .success()
    {
        return Ok(name);
    }
    progress::step("making the node image", |step| {
        let dir = tempfile::tempdir_in(paths.artefacts())?;
        let root = dir.path().join("root");
        std::fs::create_dir(&root)?;
        step.note("unpacking");
        Cmd::new("tar")
            .arg("-xf")
            .arg(&rootfs)
            .arg("-C")
            .arg(&root)
            .run()?;
        step.note("files of a node");
        furnish(&root, tools, &own)?;
        step.note("importing into Docker");
        import(docker, &root, &name, &images)
    })?;
    Ok(name)
}

fn furnish(root: &Path, tools: &Tools, own: &Path) -> Result<()> {
    let kind = tools
        .module_dir("kind", "sigs.k8s.io/kind")?
        .join("images/base/files");
    Cmd::new("cp")
        .args(["-r", "--no-preserve=mode,ownership"])
        .arg(kind.join("."))
        .arg(root)
        .run()
        .context("copying kind's base files")?;
    for dir in [
        "kind/manifests",
        "opt/cni/bin",
        "etc/cni/net.d",
        "etc/kubernetes/manifests",
    ] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    for dir in ["usr/local/bin", "kind/bin"] {
        for entry in std::fs::read_dir(root.join(dir))? {
            executable(&entry?.path())?;
        }
    }
    services(root)?;
    for (programs, into) in [
        (
            &["containerd", "containerd-shim-runc-v2", "ctr", "crictl"][..],
            "usr/local/bin",
        ),
        (&["kubelet", "kubeadm", "kubectl"][..], "usr/bin"),
        (
            &["host-local", "loopback", "ptp", "portmap"][..],
            "opt/cni/bin",
        ),
    ] {
        for p in programs {
            install(&tools.path(p)?, &root.join(into).join(p))?;
        }
    }
    configure(root, tools, own)
}

/// What kind's own Dockerfile does to systemd: only what a node in a container needs.
fn services(root: &Path) -> Result<()> {
    for dir in [
        "lib/systemd/system/multi-user.target.wants",
        "lib/systemd/system/local-fs.target.wants",
        "lib/systemd/system/basic.target.wants",
    ] {
        empty(&root.join(dir), |_| true)?;
    }
    for entry in std::fs::read_dir(root.join("etc/systemd/system"))? {
        let path = entry?.path();
        if path.is_dir() && path.extension().is_some_and(|e| e == "wants") {
            empty(&path, |_| true)?;
        }
    }
    let wants = root.join("lib/systemd/system");
    empty(&wants.join("sysinit.target.wants"), |n| {
        n == "systemd-tmpfiles-setup.service"
    })?;
    empty(&wants.join("sockets.target.wants"), |n| {
        n.contains("udev") || n.contains("initctl")
    })?;
    append(&root.join("etc/systemd/journald.conf"), "ReadKMsg=no\n")?;
    let init = root.join("sbin/init");
    if init.symlink_metadata().is_ok() {
        std::fs::remove_file(&init)?;
    }
    symlink("/usr/lib/systemd/systemd", &init)?;
    let systemctl = |verb: &str, units: &[&str]| {
        Cmd::new("systemctl")
            .arg("--root")
            .arg(root)
            .arg(verb)
            .args(units)
            .run()
    };
    let enabled = [
        "kubelet.service",
        "containerd.service",
        "undo-mount-hacks.service",
    ];
    systemctl("enable", &enabled)?;
    systemctl("mask", &["systemd-binfmt.service"])?;
    Ok(())
}

fn configure(root: &Path, tools: &Tools, own: &Path) -> Result<()> {
    let containerd = root.join("etc/containerd/config.toml");
    // Without CAP_SYS_RESOURCE containerd must not lower an oom_score_adj below its own.
    replace(
        &containerd,
        "restrict_oom_score_adj = false",
        "restrict_oom_score_adj = true",
    )?;
    append(
        &containerd,
        &std::fs::read_to_string(own.join("containerd-cni.toml"))?,
    )?;
    std::fs::copy(
        own.join("cni.conflist.tmpl"),
        root.join("kind/cni.conflist.tmpl"),
    )?;
    for f in ["default-cni.yaml", "default-storage.yaml"] {
        std::fs::copy(own.join(f), root.join("kind/manifests").join(f))?;
    }
    std::fs::write(root.join("kind/version"), KUBERNETES)?;
    // From 1.35 on the kubelet refuses cgroup v1 unless told; on v2 the flag does nothing.
    let args = "--runtime-cgroups=/system.slice/containerd.service";
    replace(
        &root.join("etc/default/kubelet"),
        args,
        &format!("{args} --fail-cgroupv1=false"),
    )?;
    let spec = tools.cmd("ctr")?.args(["oci", "spec"]).run()?.stdout;
    let spec = base_spec(&spec)?;
    std::fs::write(root.join("etc/containerd/cri-base.json"), spec)?;
    Ok(())
}

/// containerd's default OCI specification with kind's hook and without rlimits.
fn base_spec(default: &[u8]) -> Result<Vec<u8>> {
    let mut spec: Value = serde_json::from_slice(default).context("`ctr oci spec`")?;
    if let Some(Value::Object(process)) = spec.get_mut("process") {
        process.remove("rlimits");
    }
    let hook = serde_json::json!([{"path": "/kind/bin/mount-product-files.sh"}]);
    let fields = spec
        .as_object_mut()
        .context("`ctr oci spec` is no object")?;
    let hooks = fields
        .entry("hooks")
        .or_insert_with(|| serde_json::json!({}));
    hooks
        .as_object_mut()
        .context("hooks is no object")?
        .insert("createContainer".into(), hook);
    Ok(serde_json::to_vec_pretty(&spec)?)
}

/// Puts the folder into Docker, lets containerd inside it take in the images, commits.
fn import(docker: &Docker, root: &Path, name: &str, images: &Path) -> Result<()> {
    let long = Duration::from_secs(600);
    let entry = "ENTRYPOINT [\"/usr/local/bin/entrypoint\",\"/sbin/init\"]";
    let base = format!("{name}-base");
    let tar = root.with_extension("tar");
    Cmd::new("tar")
        .arg("-cf")
        .arg(&tar)
        .arg("-C")
        .arg(root)
        .arg(".")
        .timeout(long)
        .run()?;
    docker
        .cmd()
        .args(["import", "-c", "ENV container=docker", "-c", entry])
        .arg(&tar)
        .arg(&base)
        .timeout(long)
        .run()?;
    let container = format!("vf-e2e-node-build-{}", std::process::id());
    docker
        .cmd()
        .args([
            "run",
            "-d",
            "--name",
            &container,
            "--network=none",
            "--entrypoint=sleep",
        ])
        .args(["--security-opt", "seccomp=unconfined", "-v"])
        .arg(format!("{}:/images:ro", images.display()))
        .args([base.as_str(), "infinity"])
        .run()?;
    let made = docker
        .exec(&container)
        .args(["bash", "-euc", PRELOAD])
        .timeout(long)
        .run()
        .context("importing the control plane's images")
        .and_then(|_| {
            let cmd = docker
                .cmd()
                .args(["commit", "--change", entry, &container, name]);
            cmd.timeout(long).run().context("committing the node image")
        });
    let removed = docker.cmd().args(["rm", "-f", &container]).run();
    made?;
    removed?;
    Ok(())
}

/// Pinned, so that the kubelet's image collection leaves them. The loop waits for the
/// daemon's socket, for which containerd gives no other event.
const PRELOAD: &str = r#"
containerd >/tmp/containerd.log 2>&1 &
daemon=$!
for _ in $(seq 300); do ctr version >/dev/null 2>&1 && break; sleep 0.1; done
ctr version >/dev/null || { cat /tmp/containerd.log >&2; exit 1; }
for f in /images/*.tar; do
    ctr -n k8s.io images import --label=io.cri-containerd.pinned=pinned \
        --all-platforms --no-unpack --digests "$f"
done
kill "$daemon"; wait "$daemon" || true
rm /tmp/containerd.log
"#;

fn empty(dir: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("reading {}", dir.display())),
    };
    for entry in entries {
        let entry = entry?;
        if which(&entry.file_name().to_string_lossy()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn append(path: &Path, text: &str) -> Result<()> {
    let old = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(std::fs::write(path, format!("{old}{text}"))?)
}

fn replace(path: &Path, from: &str, to: &str) -> Result<()> {
    let old = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    anyhow::ensure!(
        old.contains(from),
        "{} no longer says {from:?}",
        path.display()
    );
    Ok(std::fs::write(path, old.replace(from, to))?)
}

pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    if let Some(dir) = to.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::copy(from, to)
        .with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    executable(to)
}

fn executable(path: &Path) -> Result<()> {
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(path, mode).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_spec_has_the_hook_and_no_rlimits() {
        let spec = base_spec(br#"{"process": {"rlimits": [1], "cwd": "/"}, "root": {}}"#).unwrap();
        let spec: Value = serde_json::from_slice(&spec).unwrap();
        assert_eq!(spec["process"], serde_json::json!({"cwd": "/"}));
        assert_eq!(
            spec["hooks"]["createContainer"][0]["path"],
            "/kind/bin/mount-product-files.sh"
        );
    }
}
