//! The far end on the host node: what L1's kernel and the VM's QEMU say, asked of them
//! directly, never of our own status.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::far::{Shell, sh};
use crate::machine::L2;

/// A VF as sysfs has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelVf {
    pub index: u16,
    pub address: String,
    pub driver: Option<String>,
    pub group: Option<u32>,
    /// Every device of that group.
    pub members: Vec<String>,
}

/// A PF as sysfs has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelPf {
    pub num_vfs: u16,
    pub interface: Option<String>,
    pub vfs: Vec<KernelVf>,
}

/// What the kernel says of the PF at `address`.
pub async fn pf(l1: &dyn Shell, address: &str) -> Result<KernelPf> {
    read_pf(&sh(l1, &pf_script(address)).await?)
}

/// Asks for a PF; [`read_pf`] reads the answer.
pub(super) fn pf_script(address: &str) -> String {
    // Bash alone: every process costs an emulated machine dearly.
    format!(
        r#"shopt -s nullglob; cd /sys/bus/pci/devices/{address}
echo "numvfs $(<sriov_numvfs)"
for n in net/*; do echo "net ${{n#net/}}"; done
for l in virtfn*; do
    d=$(readlink -f $l); driver=-; group=-; members=
    [[ -e $d/driver ]] && driver=$(readlink $d/driver)
    [[ -e $d/iommu_group ]] && group=$(readlink $d/iommu_group) &&
        for m in $d/iommu_group/devices/*; do members+=" ${{m##*/}}"; done
    echo "vf ${{l#virtfn}} ${{d##*/}} ${{driver##*/}} ${{group##*/}}$members"
done"#
    )
}

pub(super) fn read_pf(text: &str) -> Result<KernelPf> {
    let mut found = KernelPf {
        num_vfs: 0,
        interface: None,
        vfs: Vec::new(),
    };
    let some = |s: &str| (s != "-").then(|| s.to_owned());
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["numvfs", n] => found.num_vfs = n.parse()?,
            ["net", name] => found.interface = Some((*name).to_owned()),
            ["vf", index, address, driver, group, members @ ..] => found.vfs.push(KernelVf {
                index: index.parse()?,
                address: (*address).to_owned(),
                driver: some(driver),
                group: some(group).map(|g| g.parse()).transpose()?,
                members: members.iter().map(|m| (*m).to_owned()).collect(),
            }),
            _ => bail!("not a line about a PF: {line:?}"),
        }
    }
    found.vfs.sort_by_key(|v| v.index);
    Ok(found)
}

/// A VF's settings as `ip link show` reads them back over netlink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfSettings {
    pub mac: String,
    /// 0: none.
    pub vlan: u16,
    pub spoof_check: bool,
    pub trust: bool,
    /// In Mbit/s; 0: none.
    pub max_rate: u32,
}

/// Settings of every VF of the PF whose interface is `interface`, by VF index.
pub async fn vf_settings(l1: &dyn Shell, interface: &str) -> Result<BTreeMap<u16, VfSettings>> {
    read_settings(&sh(l1, &settings_script(interface)).await?)
}

/// Asks for VFs' settings; [`read_settings`] reads the answer.
pub(super) fn settings_script(interface: &str) -> String {
    format!("ip -json -details link show dev {interface}")
}

pub(super) fn read_settings(text: &str) -> Result<BTreeMap<u16, VfSettings>> {
    let links: Value =
        serde_json::from_str(text).with_context(|| format!("ip link said {text:?}"))?;
    let vfs = links.pointer("/0/vfinfo_list").and_then(Value::as_array);
    let mut all = BTreeMap::new();
    for vf in vfs.into_iter().flatten() {
        let index = vf.get("vf").and_then(Value::as_u64).context("no index")?;
        let vlan = vf.pointer("/vlan_list/0/vlan").or_else(|| vf.get("vlan"));
        let rate = vf.pointer("/rate/max_tx");
        let flag = |name| {
            vf.get(name)
                .and_then(Value::as_bool)
                .with_context(|| format!("no {name}"))
        };
        all.insert(
            u16::try_from(index)?,
            VfSettings {
                mac: vf
                    .get("address")
                    .and_then(Value::as_str)
                    .context("no address")?
                    .to_owned(),
                vlan: u16::try_from(vlan.and_then(Value::as_u64).unwrap_or(0))?,
                spoof_check: flag("spoofchk")?,
                trust: flag("trust")?,
                max_rate: u32::try_from(rate.and_then(Value::as_u64).unwrap_or(0))?,
            },
        );
    }
    Ok(all)
}

/// The QEMU process of the VM, seen from L1.
#[derive(Clone, Debug)]
pub struct Qemu {
    pub pid: u32,
    pub domain: String,
    vm: L2,
}

impl Qemu {
    #[must_use]
    pub fn of(vm: &L2, domain: &str) -> Self {
        Self {
            pid: vm.qemu_pid(),
            domain: domain.to_owned(),
            vm: vm.clone(),
        }
    }

    /// `virsh` as the launcher's own user inside its mount namespace.
    #[must_use]
    pub fn virsh(&self, command: &str) -> String {
        let socket = "qemu+unix:///session?socket=/var/run/libvirt/libvirt-sock";
        format!(
            "nsenter -t {} -m -S 107 -G 107 -- env HOME=/tmp virsh -q -c '{socket}' {command}",
            self.pid
        )
    }

    /// One QMP command over the harness's own monitor, which is not the agent's.
    pub async fn qmp(&self, execute: &str, arguments: &Value) -> Result<Value> {
        self.vm.qmp(execute, arguments).await
    }

    /// Every PCI device QEMU has: qdev id (may be empty) and what `query-pci` says.
    pub async fn pci(&self) -> Result<Vec<PciDevice>> {
        let buses = self.qmp("query-pci", &serde_json::json!({})).await?;
        let mut all = Vec::new();
        for bus in buses.as_array().into_iter().flatten() {
            collect(bus.get("devices"), &mut all);
        }
        Ok(all)
    }

    /// Those that the project plugged in.
    pub async fn ours(&self) -> Result<Vec<PciDevice>> {
        Ok(ours(self.pci().await?))
    }

    /// Soft and hard limit of locked memory, in bytes or `unlimited`.
    pub async fn memlock(&self, l1: &dyn Shell) -> Result<String> {
        sh(l1, &self.memlock_script()).await
    }

    pub(super) fn memlock_script(&self) -> String {
        format!("grep '^Max locked memory' /proc/{}/limits", self.pid)
    }

    /// Nodes below /dev/vfio as the container has them, with device numbers.
    pub async fn vfio_nodes(&self, l1: &dyn Shell) -> Result<Vec<String>> {
        Ok(read_nodes(&sh(l1, &self.nodes_script()).await?))
    }

    /// Asks for the nodes; [`read_nodes`] reads the answer.
    pub(super) fn nodes_script(&self) -> String {
        format!(
            "d=/proc/{}/root/dev/vfio; [[ -d $d ]] && stat -c '%n %F %t:%T' $d/* 2>/dev/null; true",
            self.pid
        )
    }

    /// Whether a process in QEMU's cgroup is let through to device `name` of /dev/vfio, by
    /// trying: the device cgroup answers EPERM at open, before the driver is asked.
    pub async fn cgroup_allows(&self, l1: &dyn Shell, name: &str) -> Result<bool> {
        let script = format!(
            r#"cg=$(sed -n 's/^0:://p' /proc/{}/cgroup)
LC_ALL=C bash -c 'echo $$ >/sys/fs/cgroup'"$cg"'/cgroup.procs && exec 3<>/dev/vfio/{name}' 2>&1 && echo opened; true"#,
            self.pid
        );
        let text = sh(l1, &script).await?;
        if text.contains("Operation not permitted") {
            Ok(false)
        } else if text.contains("opened") || text.contains("busy") {
            Ok(true)
        } else {
            bail!("opening /dev/vfio/{name} in QEMU's cgroup said {text:?}")
        }
    }
}

pub(super) fn read_nodes(text: &str) -> Vec<String> {
    let name = |l: &str| l.rsplit("/dev/vfio/").next().unwrap_or(l).to_owned();
    text.lines().map(name).collect()
}

/// Those devices that the project plugged in.
#[must_use]
pub fn ours(mut devices: Vec<PciDevice>) -> Vec<PciDevice> {
    devices.retain(is_ours);
    devices
}

pub(super) fn is_ours(device: &PciDevice) -> bool {
    device.id.starts_with("vfc-")
}

/// A PCI device in `query-pci`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    pub id: String,
    pub vendor: u64,
    pub device: u64,
    pub bus: u64,
    pub slot: u64,
    pub function: u64,
    /// Addresses of its regions; -1 where the guest gave none.
    pub regions: Vec<i64>,
}

impl PciDevice {
    /// The guest's name of it; QEMU's PCs have one PCI domain.
    #[must_use]
    pub fn guest_address(&self) -> String {
        format!(
            "0000:{:02x}:{:02x}.{:x}",
            self.bus, self.slot, self.function
        )
    }
}

fn collect(devices: Option<&Value>, into: &mut Vec<PciDevice>) {
    for d in devices.and_then(Value::as_array).into_iter().flatten() {
        let number = |path: &str| d.pointer(path).and_then(Value::as_u64).unwrap_or(0);
        let regions = d.get("regions").and_then(Value::as_array);
        into.push(PciDevice {
            id: d
                .get("qdev_id")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            vendor: number("/id/vendor"),
            device: number("/id/device"),
            bus: number("/bus"),
            slot: number("/slot"),
            function: number("/function"),
            regions: regions
                .into_iter()
                .flatten()
                .map(|r| r.get("address").and_then(Value::as_i64).unwrap_or(-1))
                .collect(),
        });
        collect(d.pointer("/pci_bridge/devices"), into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pf_lines() {
        let text = "numvfs 2\nnet enp1s0\nvf 1 0000:01:10.4 - 14 0000:01:10.4\nvf 0 0000:01:10.0 vfio-pci 13 0000:01:10.0";
        let pf = read_pf(text).unwrap();
        assert_eq!((pf.num_vfs, pf.interface.as_deref()), (2, Some("enp1s0")));
        assert_eq!(pf.vfs[0].driver.as_deref(), Some("vfio-pci"));
        assert_eq!(
            (pf.vfs[1].driver.as_deref(), pf.vfs[1].group),
            (None, Some(14))
        );
        assert!(read_pf("bash: no such file").is_err());
    }

    #[test]
    fn settings_of_ip() {
        let text = r#"[{"ifname":"e","vfinfo_list":[
            {"vf":0,"link_type":"ether","address":"02:00:00:00:00:01","vlan_list":[{"vlan":100}],
             "rate":{"max_tx":500,"min_tx":0},"spoofchk":true,"link_state":"auto","trust":false},
            {"vf":1,"link_type":"ether","address":"00:00:00:00:00:00","spoofchk":true,"trust":true}]}]"#;
        let all = read_settings(text).unwrap();
        assert_eq!((all[&0].vlan, all[&0].max_rate), (100, 500));
        let bare = &all[&1];
        assert_eq!((bare.vlan, bare.trust, bare.max_rate), (0, true, 0));
        assert_eq!(read_settings(r#"[{"ifname":"e"}]"#).unwrap().len(), 0);
    }

    #[test]
    fn devices_behind_ports() {
        let buses: Value = serde_json::from_str(
            r#"[{"bus":0,"devices":[{"bus":0,"slot":2,"function":0,"qdev_id":"pci.1",
            "id":{"device":12,"vendor":6966},"regions":[],
            "pci_bridge":{"bus":{},"devices":[{"bus":1,"slot":0,"function":0,"qdev_id":"vfc-x",
            "id":{"device":4298,"vendor":32902},"regions":[{"bar":0,"address":-1},{"bar":3,"address":4096}]}]}}]}]"#,
        )
        .unwrap();
        let mut all = Vec::new();
        collect(buses.pointer("/0/devices"), &mut all);
        assert_eq!(all.len(), 2);
        assert_eq!(all[1].guest_address(), "0000:01:00.0");
        assert_eq!(all[1].regions, [-1, 4096]);
    }
}
