//! L1's QEMU: its command line as a plain function over plain values.

use std::path::{Path, PathBuf};

use super::image::Image;

/// Channel ports into L1: as many commands can run at once.
pub(super) const PORTS: usize = 4;

/// The managed PF, the node's own, the one that is not isolated, and a second one to manage.
pub(super) const MANAGED_MAC: &str = "52:54:00:aa:00:01";
pub(super) const NODE_MAC: &str = "52:54:00:aa:00:02";
pub(super) const SHARED_GROUP_MAC: &str = "52:54:00:aa:00:03";
pub(super) const SECOND_MAC: &str = "52:54:00:aa:00:04";
pub(super) const UUID: &str = "11111111-0000-4000-8000-000000000001";

/// What distinguishes one L1 from another.
#[derive(Clone, Debug)]
pub(super) struct Spec<'a> {
    pub(super) name: &'a str,
    /// What is loaded before QEMU.
    pub(super) mend: &'a Path,
    /// Folder of sockets, console log and lock files; short, because of socket paths.
    pub(super) dir: &'a Path,
    /// Folder that L1 sees read-only as /harness.
    pub(super) share: &'a Path,
    /// qcow2 above the image's disk.
    pub(super) overlay: &'a Path,
    pub(super) tap: &'a str,
    /// `ADDRESS/PREFIX`, and the gateway.
    pub(super) address: &'a str,
    pub(super) gateway: &'a str,
    /// `NAME=IP` pairs for /etc/hosts.
    pub(super) hosts: &'a [(String, String)],
    pub(super) memory_mib: u32,
    /// Files of its namespaces.
    pub(super) disks: &'a [PathBuf],
    /// One PF whose driver does not load by itself, and none for the node's own traffic.
    pub(super) bare: bool,
}

/// What every emulated kernel is told.
///
/// - `no_timer_check`: on a busy machine the emulated timer misses the kernel's deadline of
///   a few ticks, and the kernel panics ("IO-APIC + timer doesn't work").
/// - `mitigations`, `init_on_alloc`, `cryptomgr.notests`: under emulation a retpoline is a
///   lookup of a translated block, a page that is zeroed twice costs twice, and nobody here
///   doubts the ciphers.
/// - `highres`: a timer of the VM in L1 is an exit to set it and one to take it, and after an
///   exit the emulator walks the nested page tables anew. Timers on the tick's grid come
///   together.
/// - `transparent_hugepage`: nothing moves a VM's memory while it runs; see docs/status.md.
/// - `systemd.show_status`: each character on the serial line is two exits.
pub(super) const KERNEL_ARGS: &str = "console=ttyS0 quiet panic=1 no_timer_check mitigations=off \
     init_on_alloc=0 cryptomgr.notests nowatchdog tsc=nowatchdog audit=0 highres=off edd=off \
     transparent_hugepage=never systemd.show_status=false systemd.default_timeout_start_sec=600 \
     systemd.default_device_timeout_sec=600";
/// What a node's network needs, loaded at boot.
pub(super) const NODE_MODULES: &str = "overlay,br_netfilter,nf_conntrack";

/// Slot of the root port whose requests the kernel is told not to redirect: all below it
/// share one IOMMU group, as behind a port without access control services.
const SHARED_PORT: u8 = 3;

/// The kernel's command line.
pub(super) fn kernel_args(s: &Spec<'_>) -> String {
    let hosts: Vec<String> = s.hosts.iter().map(|(n, ip)| format!("{n}={ip}")).collect();
    // KVM's polling for a wake-up would take the core from what is to wake it.
    let bare = if s.bare {
        " modprobe.blacklist=igb"
    } else {
        ""
    };
    format!(
        "{KERNEL_ARGS}{bare} modules_load={NODE_MODULES},vfio-pci,kvm-amd kvm.halt_poll_ns=0 \
         intel_iommu=on iommu=pt pci=disable_acs_redir=0000:00:{SHARED_PORT:02x}.0 \
         harness.role=l1 systemd.hostname={} systemd.machine_id={} \
         harness.net={NODE_MAC},{},{} harness.hosts={}",
        s.name,
        UUID.replace('-', ""),
        s.address,
        s.gateway,
        hosts.join(",")
    )
}

/// Program and arguments.
pub(super) fn command(image: &Image, s: &Spec<'_>) -> Vec<String> {
    let dir = s.dir.display();
    let root = image.root.display();
    let mut c = image.command("usr/bin/qemu-system-x86_64");
    // To the loader, which is the command's first word: a variable would be inherited.
    c.splice(1..1, ["--preload".into(), s.mend.display().to_string()]);
    let mut arg = |flag: &str, value: &str| {
        c.push(flag.to_owned());
        c.push(value.to_owned());
    };
    arg("-L", &format!("{root}/usr/share/qemu"));
    arg("-L", &format!("{root}/usr/share/seabios"));
    arg("-name", s.name);
    arg("-uuid", UUID);
    arg("-M", "q35,kernel-irqchip=split");
    arg("-accel", "tcg,thread=multi");
    // "max" emulates SVM, which gives L1 a kvm of its own. What is off makes the emulator
    // forget its translations oftener (pku, smap) or read more to make one (la57).
    arg("-cpu", "max,la57=off,pku=off,pks=off,smap=off");
    arg("-m", &s.memory_mib.to_string());
    // With two, the emulator loses its place at a #VMEXIT within minutes; see docs/status.md.
    arg("-smp", "1");
    arg("-display", "none");
    for flag in ["-no-user-config", "-nodefaults"] {
        arg(flag, "");
    }
    arg(
        "-chardev",
        &format!("file,id=console,path={dir}/console.log,append=on"),
    );
    arg("-serial", "chardev:console");
    arg("-qmp", &format!("unix:{dir}/qmp.sock,server=on,wait=off"));
    arg("-device", "intel-iommu,intremap=on,caching-mode=on");
    arg("-device", "pcie-root-port,id=rp0,chassis=1");
    arg("-device", "pcie-root-port,id=rp1,chassis=2");
    arg(
        "-device",
        &format!("pcie-root-port,id=rp2,chassis=3,addr={SHARED_PORT}"),
    );
    // For the disks.
    arg("-device", "pcie-root-port,id=rp3,chassis=4");
    arg("-device", "pcie-root-port,id=rp4,chassis=5");
    arg(
        "-netdev",
        &format!(
            "dgram,id=wire,local.type=unix,local.path={dir}/wire-machine.sock,\
             remote.type=unix,remote.path={dir}/wire-switch.sock"
        ),
    );
    arg("-device", &igb("rp0", "wire", MANAGED_MAC));
    arg(
        "-netdev",
        &format!("tap,id=node,ifname={},script=no,downscript=no", s.tap),
    );
    if s.bare {
        let plain = format!("virtio-net-pci,bus=rp1,netdev=node,mac={NODE_MAC},romfile=");
        arg("-device", &plain);
    } else {
        arg("-device", &igb("rp1", "node", NODE_MAC));
        arg("-netdev", "hubport,id=shared,hubid=1");
        arg("-device", &igb("rp2", "shared", SHARED_GROUP_MAC));
        // On no wire.
        arg("-netdev", "hubport,id=second,hubid=2");
        arg("-device", &igb("rp4", "second", SECOND_MAC));
        disks(&mut arg, s.disks);
    }
    arg("-device", "virtio-serial-pci,id=vs,max_ports=16");
    for n in 0..PORTS {
        arg(
            "-chardev",
            &format!("socket,id=port{n},path={dir}/port{n}.sock,server=on,wait=off"),
        );
        arg(
            "-device",
            &format!("virtserialport,bus=vs.0,chardev=port{n},name=harness.{n}"),
        );
    }
    arg(
        "-virtfs",
        &format!(
            "local,path={},mount_tag=harness,security_model=none,readonly=on,multidevs=remap",
            s.share.display()
        ),
    );
    arg(
        "-drive",
        &format!(
            "file={},if=virtio,format=qcow2,cache=unsafe,file.locking=off",
            s.overlay.display()
        ),
    );
    // The VMs' disk: the same image, below an overlay of each VM.
    arg(
        "-drive",
        &format!(
            "file={},if=virtio,format=raw,readonly=on,file.locking=off",
            image.disk.display()
        ),
    );
    arg("-kernel", &image.kernel.display().to_string());
    arg("-initrd", &image.initrd.display().to_string());
    arg("-append", &kernel_args(s));
    c.retain(|a| !a.is_empty());
    c
}

/// An NVMe subsystem whose controller can have four VFs with two queues and two interrupts each,
/// and its namespaces, which no controller has at first.
fn disks(arg: &mut impl FnMut(&str, &str), files: &[PathBuf]) {
    arg("-device", "nvme-subsys,id=disks");
    arg(
        "-device",
        "nvme,serial=e2e-disks,subsys=disks,bus=rp3,sriov_max_vfs=4,sriov_vq_flexible=8,\
         sriov_vi_flexible=8,max_ioqpairs=12,msix_qsize=18",
    );
    for (index, file) in files.iter().enumerate() {
        let nsid = index + 1;
        let file = file.display();
        arg(
            "-drive",
            &format!("file={file},if=none,id=disk{nsid},format=raw,cache=unsafe,file.locking=off"),
        );
        arg(
            "-device",
            &format!("nvme-ns,drive=disk{nsid},nsid={nsid},shared=on,detached=on"),
        );
    }
}

fn igb(port: &str, netdev: &str, mac: &str) -> String {
    // Without romfile= QEMU wants a boot ROM that the image does not ship.
    format!("igb,bus={port},netdev={netdev},mac={mac},romfile=")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_functions_each_on_a_port_of_its_own() {
        let image = Image {
            root: "/r".into(),
            disk: "/d".into(),
            kernel: "/k".into(),
            initrd: "/i".into(),
            kernel_name: "k".into(),
        };
        let dir = PathBuf::from("/s");
        let hosts = [("a".to_owned(), "1.2.3.4".to_owned())];
        let spec = Spec {
            name: "l1",
            mend: &dir,
            dir: &dir,
            share: &dir,
            overlay: &dir,
            tap: "t0",
            address: "10.0.0.2/24",
            gateway: "10.0.0.1",
            hosts: &hosts,
            memory_mib: 7168,
            disks: std::slice::from_ref(&dir),
            bare: false,
        };
        let c = command(&image, &spec);
        let igbs: Vec<_> = c.iter().filter(|a| a.starts_with("igb,")).collect();
        assert_eq!(igbs.len(), 4);
        let namespaces = c.iter().filter(|a| a.starts_with("nvme-ns,drive=disk1,"));
        assert_eq!(namespaces.count(), 1);
        assert!(
            c.iter().any(|a| a.contains("bus=rp3,sriov_max_vfs=4")),
            "{c:?}"
        );
        assert!(
            c.iter()
                .any(|a| a.contains("id=rp2") && a.ends_with(&format!("addr={SHARED_PORT}")))
        );
        assert!(c.iter().all(|a| !a.is_empty()));
        let k = kernel_args(&spec);
        assert!(
            k.contains("harness.hosts=a=1.2.3.4") && k.contains("no_timer_check"),
            "{k}"
        );
        assert!(!k.contains("blacklist"), "{k}");

        let bare = Spec { bare: true, ..spec };
        let c = command(&image, &bare);
        let igbs: Vec<_> = c.iter().filter(|a| a.starts_with("igb,")).collect();
        assert_eq!(igbs.len(), 1, "{igbs:?}");
        let k = kernel_args(&bare);
        assert!(k.contains(" modprobe.blacklist=igb "), "{k}");
    }
}
