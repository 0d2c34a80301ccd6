//! The machine image: one Debian root file system for L1 and for the VMs in it, with our
//! kubelet, the network plugins and the harness's own units. Works in the cache only; the
//! QEMU that runs L1 is this image's own, because Debian 12's has no igb.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::initramfs;
use crate::cache::{self, Key};
use crate::exec::Cmd;
use crate::paths::Paths;
use crate::tools::Tools;
use crate::{debian, programs, progress};

const SUITE: &str = "trixie";
const PACKAGES: &str = "linux-image-amd64,qemu-system-x86,qemu-utils,libvirt-daemon-system,\
    libvirt-clients,runc,containerd,busybox-static,iproute2,kmod,pciutils,iptables,nftables,\
    conntrack,ethtool,systemd-sysv,dbus,udev,ca-certificates,nvme-cli,bpftool,socat,procps,\
    iputils-ping,util-linux,mount";
/// Source packages that come from the suite's backports: what was seen to stay up ran with
/// their QEMU 11.1. Their Linux 7.3 cannot run the VM: docs/status.md says why.
const BACKPORTED: &str = "src:qemu src:seabios src:edk2 src:ipxe";
/// Counted up when this file changes what it makes from the same inputs.
const RECIPE: &str = "1";
/// Room for what a machine writes to its disk.
const DISK: &str = "10G";

/// Path in the image, permissions, content.
type File = (&'static str, u32, &'static str);
const FILES: [File; 14] = [
    (
        "usr/lib/harness/harness-network",
        0o755,
        include_str!("files/harness-network"),
    ),
    (
        "usr/lib/harness/harness-trace",
        0o755,
        include_str!("files/harness-trace"),
    ),
    (
        "usr/lib/harness/launcher",
        0o755,
        include_str!("files/launcher"),
    ),
    (
        "etc/systemd/system/harness-channel@.service",
        0o644,
        include_str!("files/harness-channel@.service"),
    ),
    (
        "etc/systemd/system/harness-network.service",
        0o644,
        include_str!("files/harness-network.service"),
    ),
    (
        "etc/systemd/system/harness-trace.service",
        0o644,
        include_str!("files/harness-trace.service"),
    ),
    (
        "etc/systemd/system/harness.mount",
        0o644,
        include_str!("files/harness.mount"),
    ),
    (
        "etc/systemd/system/kubelet.service",
        0o644,
        include_str!("files/kubelet.service"),
    ),
    (
        "etc/udev/rules.d/99-harness.rules",
        0o644,
        include_str!("files/99-harness.rules"),
    ),
    (
        "etc/containerd/config.toml",
        0o644,
        include_str!("files/containerd.toml"),
    ),
    (
        "etc/cni/conflist.tmpl",
        0o644,
        include_str!("files/cni-conflist.tmpl"),
    ),
    (
        "etc/systemd/system/containerd.service.d/gc.conf",
        0o644,
        include_str!("files/containerd-gc.conf"),
    ),
    (
        "etc/modprobe.d/harness.conf",
        0o644,
        include_str!("files/modprobe.conf"),
    ),
    (
        "etc/sysctl.d/90-harness.conf",
        0o644,
        include_str!("files/sysctl.conf"),
    ),
];
/// What the channel's agent is made from: its program is compiled only when they changed.
const AGENT: [&str; 4] = [
    include_str!("../../channel/src/main.rs"),
    include_str!("../../channel/src/port.rs"),
    include_str!("../../channel/src/protocol.rs"),
    include_str!("../../channel/src/serve.rs"),
];
/// Units that start at boot, and the target that wants them.
const ENABLED: [(&str, &str); 5] = [
    (
        "/etc/systemd/system/harness-network.service",
        "multi-user.target",
    ),
    ("/etc/systemd/system/harness.mount", "multi-user.target"),
    ("/etc/systemd/system/kubelet.service", "multi-user.target"),
    (
        "/usr/lib/systemd/system/containerd.service",
        "multi-user.target",
    ),
    ("/etc/systemd/system/harness-trace.service", "basic.target"),
];
/// What a test machine does not need: every unit less is a second less under emulation.
/// libvirt runs in the launcher's container only.
const MASKED: &str = "libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket \
    libvirt-guests.service virtlogd.service virtlogd.socket virtlogd-admin.socket \
    systemd-timesyncd.service systemd-networkd.service systemd-resolved.service \
    serial-getty@ttyS0.service getty@tty1.service console-getty.service \
    systemd-pcrmachine.service systemd-tpm2-setup.service systemd-tpm2-setup-early.service \
    tpm2.target systemd-update-utmp.service systemd-random-seed.service \
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount apt-daily.timer \
    apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_reap.service fstrim.timer \
    systemd-firstboot.service ldconfig.service systemd-journal-flush.service \
    nvmefc-boot-connections.service nvmf-autoconnect.service systemd-pstore.service \
    systemd-logind.service modprobe@drm.service modprobe@configfs.service \
    modprobe@fuse.service modprobe@efi_pstore.service sys-fs-fuse-connections.mount \
    sys-kernel-config.mount dev-hugepages.mount dev-mqueue.mount var-lib-machines.mount \
    machines.target getty.target systemd-user-sessions.service systemd-sysusers.service \
    systemd-udev-load-credentials.service systemd-journal-catalog-update.service \
    systemd-update-done.service systemd-machine-id-commit.service \
    systemd-ask-password-console.path systemd-ask-password-wall.path systemd-creds.socket \
    systemd-importd.socket systemd-sysext.socket systemd-hostnamed.socket \
    systemd-tmpfiles-clean.timer";

/// Where the parts of an image lie.
#[derive(Clone, Debug)]
pub(super) struct Image {
    /// Unpacked root, for the QEMU in it.
    pub(super) root: PathBuf,
    /// ext4, raw, sparse.
    pub(super) disk: PathBuf,
    pub(super) kernel: PathBuf,
    /// Also `/boot/initrd-harness` in the image.
    pub(super) initrd: PathBuf,
    /// Name of the kernel in the image's /boot.
    pub(super) kernel_name: String,
}

impl Image {
    /// A program of the image, run in place with the image's own libraries.
    pub(super) fn command(&self, program: &str) -> Vec<String> {
        let root = self.root.display();
        vec![
            format!("{root}/lib64/ld-linux-x86-64.so.2"),
            "--library-path".into(),
            format!("{root}/usr/lib/x86_64-linux-gnu"),
            format!("{root}/{program}"),
        ]
    }
}

/// The image, made unless it is in the cache. `images` are container image archives that
/// its containerd shall hold.
pub(super) fn ensure(paths: &Paths, tools: &Tools, images: &[PathBuf]) -> Result<Image> {
    debian::ensure(paths, &["mmdebstrap", "tar", "e2fsprogs", "xz-utils"])?;
    let debian = debian_root(paths)?;
    let mut key = tools
        .key()
        .text("debian", debian.to_string_lossy().as_bytes())
        .text("masked", MASKED)
        .text("init", initramfs::SOURCE)
        .text("recipe", RECIPE);
    for (path, _, content) in FILES {
        key = key.text(path, content);
    }
    for source in AGENT {
        key = key.text("agent", source);
    }
    for archive in images {
        // Archives are artefacts: their paths carry their key.
        key = key.text("image", archive.to_string_lossy().as_bytes());
    }
    let dir = cache::artefact(paths, "machine-image", &key, |out| {
        let agent = programs::compile(paths, &["channel"], &[])?.join("channel-agent");
        progress::step("making the machine image", |_| {
            fill(out, &debian, tools, &agent, images)
        })
    })?;
    open(&dir)
}

fn open(dir: &Path) -> Result<Image> {
    let root = dir.join("root");
    let kernel = boot_file(&root, "vmlinuz-")?;
    Ok(Image {
        disk: dir.join("disk.ext4"),
        initrd: root.join("boot/initrd-harness"),
        kernel_name: kernel
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        kernel,
        root,
    })
}

/// Shell for mmdebstrap's setup hook: the suite's mirror serves its backports too, and they
/// are preferred for `BACKPORTED` alone.
fn backports_hook() -> String {
    let sources = r#""$1"/etc/apt/sources.list"#;
    let list = format!("{sources}.d/backports.list");
    format!(
        "set -e\n\
         sed -n 's/ {SUITE} / {SUITE}-backports /p' {sources} >{list}\n\
         test -s {list}\n\
         printf 'Package: {BACKPORTED}\\nPin: release n={SUITE}-backports\\nPin-Priority: 900\\n' \
         >\"$1\"/etc/apt/preferences.d/backports"
    )
}

fn debian_root(paths: &Paths) -> Result<PathBuf> {
    let hook = backports_hook();
    let key = Key::new()
        .text("suite", SUITE)
        .text("packages", PACKAGES)
        .text("backports", &hook);
    let dir = cache::artefact(paths, "machine-debian", &key, |out| {
        progress::step("making the machine's root from Debian packages", |_| {
            Cmd::new("mmdebstrap")
                .args(["--mode=root", "--variant=apt", "--components=main"])
                .arg(format!("--include={PACKAGES}"))
                .arg(format!("--setup-hook={hook}"))
                .args(
                    ["man", "doc", "locale"]
                        .map(|d| format!("--dpkgopt=path-exclude=/usr/share/{d}/*")),
                )
                .arg("--aptopt=Acquire::Languages \"none\"")
                .arg("--aptopt=APT::Install-Recommends \"false\"")
                .arg(SUITE)
                .arg(out.join("root.tar"))
                .timeout(Duration::from_secs(1800))
                .run()?;
            Ok(())
        })
    })?;
    Ok(dir.join("root.tar"))
}

fn fill(out: &Path, debian: &Path, tools: &Tools, agent: &Path, images: &[PathBuf]) -> Result<()> {
    let root = out.join("root");
    std::fs::create_dir(&root)?;
    Cmd::new("tar")
        .arg("-xf")
        .arg(debian)
        .arg("-C")
        .arg(&root)
        .timeout(Duration::from_secs(300))
        .run()?;
    trim(&root)?;
    for (path, permissions, content) in FILES {
        write(&root, path, permissions, content.as_bytes())?;
    }
    install(agent, &root.join("usr/lib/harness/channel-agent"))?;
    units(&root)?;
    for (name, place) in [
        ("kubelet", "usr/bin"),
        ("kubeadm", "usr/bin"),
        ("kubectl", "usr/bin"),
        ("host-local", "opt/cni/bin"),
        ("loopback", "opt/cni/bin"),
        ("ptp", "opt/cni/bin"),
        ("portmap", "opt/cni/bin"),
    ] {
        install(&tools.path(name)?, &root.join(place).join(name))?;
    }
    for archive in images {
        let name = archive.file_name().context("an archive has no name")?;
        install(archive, &root.join("usr/lib/harness/images").join(name))?;
    }
    let release = boot_file(&root, "vmlinuz-")?;
    let release = release.to_string_lossy();
    let release = release.rsplit_once("vmlinuz-").context("no kernel")?.1;
    let initrd = initramfs::build(
        &root.join("usr/bin/busybox"),
        &root.join("usr/lib/modules").join(release),
    )?;
    write(&root, "boot/initrd-harness", 0o644, &initrd)?;
    // No journal: a machine of one test run has nothing to recover.
    Cmd::new("mkfs.ext4")
        .args(["-q", "-F", "-O", "^has_journal", "-d"])
        .arg(&root)
        .arg(out.join("disk.ext4"))
        .arg(DISK)
        .timeout(Duration::from_secs(300))
        .run()?;
    Ok(())
}

/// Takes away what only costs time: indices of apt, an initrd we replace, the emulators
/// that libvirt would probe one by one at its start.
fn trim(root: &Path) -> Result<()> {
    for name in ["qemu-system-i386", "qemu-system-x86_64-microvm"] {
        remove(&root.join("usr/bin").join(name))?;
    }
    for wants in ["timers", "getty", "default", "sockets"] {
        let dir = root.join(format!("etc/systemd/system/{wants}.target.wants"));
        if dir.is_dir() {
            std::fs::remove_dir_all(&dir)?;
        }
    }
    if let Ok(initrd) = boot_file(root, "initrd.img-") {
        remove(&initrd)?;
    }
    // Empty, not "uninitialized": the machine takes its id from the kernel command line
    // and does not run first-boot presets, which would enable units again.
    std::fs::write(root.join("etc/machine-id"), "")?;
    for dir in [
        "harness",
        "opt/cni/bin",
        "etc/kubernetes/manifests",
        "var/lib/kubelet",
    ] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    Ok(())
}

fn units(root: &Path) -> Result<()> {
    let system = root.join("etc/systemd/system");
    for unit in MASKED.split_ascii_whitespace() {
        let link = system.join(unit);
        remove(&link)?;
        symlink("/dev/null", &link)?;
    }
    for (unit, target) in ENABLED {
        let wants = system.join(format!("{target}.wants"));
        std::fs::create_dir_all(&wants)?;
        let name = Path::new(unit).file_name().context("a unit has no name")?;
        remove(&wants.join(name))?;
        symlink(unit, wants.join(name))?;
    }
    Ok(())
}

fn boot_file(root: &Path, prefix: &str) -> Result<PathBuf> {
    let dir = root.join("boot");
    for entry in std::fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("{} has no {prefix}*", dir.display())
}

fn write(root: &Path, path: &str, permissions: u32, data: &[u8]) -> Result<()> {
    let path = root.join(path);
    let dir = path.parent().context("a file needs a folder")?;
    std::fs::create_dir_all(dir)?;
    // Debian's file may be a link out of the root.
    remove(&path)?;
    std::fs::write(&path, data).with_context(|| format!("writing {}", path.display()))?;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(permissions))?;
    Ok(())
}

fn install(from: &Path, to: &Path) -> Result<()> {
    let dir = to.parent().context("a file needs a folder")?;
    std::fs::create_dir_all(dir)?;
    std::fs::copy(from, to)
        .with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}
