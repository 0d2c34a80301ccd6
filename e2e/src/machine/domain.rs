//! A tenant's VM as libvirt sees it: its domain XML as a plain function over plain values.

use serde::{Deserialize, Serialize};

use super::qemu::{KERNEL_ARGS, NODE_MODULES};

/// Namespace of the tenant's VMs in the host's cluster.
pub const NAMESPACE: &str = "tenant-vms";
/// Channel ports into a VM.
const PORTS: usize = 2;
/// Root ports: two for libvirt's own devices, two spares for KubeVirt, four for VFs. Firmware
/// and kernel look at each in turn, which is a second of emulation.
const ROOT_PORTS: usize = 8;
/// One: a second only adds interrupts between the two, each an exit into L1.
const VCPUS: u32 = 1;
/// Where the launcher keeps the sockets of the channel, in its container.
const CHANNEL_DIR: &str = "/var/run/harness-channel";
/// The same without the link /var/run, which from outside the container would lead out of it.
pub(super) const CHANNEL_DIR_REAL: &str = "/run/harness-channel";
/// The harness's own monitor, beside libvirt's and the one that the agent uses.
const MONITOR: &str = "/var/run/harness-channel/monitor.qmp";
pub(super) const MONITOR_REAL: &str = "/run/harness-channel/monitor.qmp";
/// The disk that lies below the VM's overlay, in its container.
pub(super) const DISK: &str = "/dev/disk0";

/// What distinguishes one VM from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Name of the VM and of its node.
    pub name: String,
    /// Firmware UUID: the VM's identity in its cluster.
    pub uuid: String,
    /// Third byte of its user network 10.0.X.0/24, so that two VMs differ in address.
    pub network: u8,
    pub memory_mib: u32,
    /// Whether it joins the guest's cluster; else it runs no containers.
    pub join: bool,
}

impl Vm {
    /// The VM of the main story.
    #[must_use]
    pub fn first() -> Self {
        Self {
            name: "l2a".into(),
            uuid: "5d307ca9-b3ef-428c-8861-06e72d69f223".into(),
            network: 2,
            memory_mib: 2048,
            join: true,
        }
    }

    /// A second one, for the scenarios that need two. The one core of the emulated host is the
    /// first one's already: two kubelets on it needed ten minutes until both nodes were Ready.
    #[must_use]
    pub fn second() -> Self {
        Self {
            name: "l2b".into(),
            uuid: "8c2b65e0-0d0f-4a55-9a0e-3c6a4f3f1b77".into(),
            network: 3,
            memory_mib: 768,
            join: false,
        }
    }

    /// Its address in its user network.
    #[must_use]
    pub fn address(&self) -> String {
        format!("10.0.{}.15", self.network)
    }

    /// Its card's hardware address.
    #[must_use]
    pub fn mac(&self) -> String {
        format!("52:54:00:00:{:02x}:15", self.network)
    }
}

/// `hosts` are `NAME=IP` pairs for the VM's /etc/hosts; `kernel` is a file of /boot.
pub(super) fn xml(vm: &Vm, kernel: &str, hosts: &[(String, String)]) -> String {
    let hosts: Vec<String> = hosts.iter().map(|(n, ip)| format!("{n}={ip}")).collect();
    // lastbus: the kernel would look for forgotten bridges on all 256 buses, which are
    // 16384 exits into L1 (pcibios_fixup_peer_bridges in arch/x86/pci/legacy.c).
    //
    // notscdeadline, and cpu-pm below: the emulated SVM does not save the next instruction's
    // address, so KVM skips an instruction by reading it through the guest's page tables. For
    // a write of the deadline and for HLT a kernel before 6.17 does so with the CR3 of an
    // earlier exit. It fits the triple faults that were seen; it is not proven (docs/status.md).
    let of_node = if vm.join {
        format!("modules_load={NODE_MODULES}")
    } else {
        "systemd.mask=containerd.service systemd.mask=kubelet.service".to_owned()
    };
    let cmdline = format!(
        "{KERNEL_ARGS} pci=lastbus=0 lapic=notscdeadline idle=halt \
         {of_node} harness.role=l2 systemd.hostname={} systemd.machine_id={} \
         harness.net={},{}/24,10.0.{}.2 harness.hosts={}",
        vm.name,
        vm.uuid.replace('-', ""),
        vm.mac(),
        vm.address(),
        vm.network,
        hosts.join(",")
    );
    let ports: String = (1..=ROOT_PORTS)
        .map(|n| format!("    <controller type='pci' index='{n}' model='pcie-root-port'/>\n"))
        .collect();
    let channels: String = (0..PORTS)
        .map(|n| {
            format!(
                "    <channel type='unix'><source mode='bind' path='{CHANNEL_DIR}/{n}.sock'/>\
                 <target type='virtio' name='harness.{n}'/></channel>\n"
            )
        })
        .collect();
    // The card and its network by the command line: libvirt's user interface has no
    // address range, and every VM must have its own.
    format!(
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{NAMESPACE}_{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>{VCPUS}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>/boot/{kernel}</kernel>
    <initrd>/boot/initrd-harness</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='pci' index='0' model='pcie-root'/>
{ports}    <controller type='usb' model='none'/>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='unsafe'/>
      <source file='/var/run/kubevirt-ephemeral-disks/disk.qcow2'/>
      <backingStore type='block'><format type='raw'/><source dev='{DISK}'/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='/var/run/kubevirt-private/console.log'/><target port='0'/></serial>
{channels}    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-netdev'/>
    <qemu:arg value='user,id=tenant,net=10.0.{network}.0/24,host=10.0.{network}.2'/>
    <qemu:arg value='-device'/>
    <qemu:arg value='virtio-net-pci,netdev=tenant,mac={mac},romfile=,bus=pcie.0,addr=0x10'/>
    <qemu:arg value='-overcommit'/>
    <qemu:arg value='cpu-pm=on'/>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:/var/run/kubevirt/vf-provisioner/qmp.sock,server=on,wait=off'/>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{MONITOR},server=on,wait=off'/>
  </qemu:commandline>
</domain>
",
        name = vm.name,
        uuid = vm.uuid,
        memory = vm.memory_mib,
        network = vm.network,
        mac = vm.mac(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_vms_share_nothing_that_identifies() {
        let a = Vm::first();
        let b = Vm::second();
        assert_ne!(a.uuid, b.uuid);
        assert_ne!(a.address(), b.address());
        assert_ne!(a.mac(), b.mac());
        let x = xml(&b, "vmlinuz-1", &[("api".into(), "1.2.3.4".into())]);
        assert!(x.contains("net=10.0.3.0/24") && x.contains("tenant-vms_l2b"));
        assert!(x.contains("harness.hosts=api=1.2.3.4"));
        assert!(x.contains("systemd.mask=kubelet.service"));
        let first = xml(&a, "vmlinuz-1", &[]);
        assert!(first.contains(NODE_MODULES) && !first.contains("systemd.mask"));
        assert_eq!(x.matches("pcie-root-port").count(), ROOT_PORTS);
    }
}
