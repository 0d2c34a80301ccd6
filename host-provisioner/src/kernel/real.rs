//! The running kernel: sysfs below injected roots, and rtnetlink.

mod modules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::pci::{PciAddress, PciId};

use super::netlink::{NetUse, Netlink, RtNetlink, VfSetting};
use super::nvme::{Blocks, Command, Lent, Nvme, device};
use super::sysfs::{Attributes, Files, Sysfs};
use super::{
    GroupHold, Helpers, HoldError, Kernel, KernelError, NodeFacts, PfFacts, Roots, Stuck, VFIO_PCI,
    VfConfig, VfFacts, Watcher, changes, config_space, host_use, sysfs, vfio,
};
use crate::cpus::CpuList;

/// Enabling VFs sleeps 100 ms in the kernel and disabling 1 s (drivers/pci/iov.c);
/// their links follow when udev and the driver core have run.
const VF_LINKS: Duration = Duration::from_secs(10);

/// Longest that the making of VFs is waited for: a card's firmware may make one after another.
const NUM_VFS: Duration = Duration::from_secs(180);

/// [`Kernel`] on the real thing.
#[derive(Clone, Debug)]
pub struct RealKernel {
    roots: Roots,
    netlink: Arc<dyn Netlink>,
    attributes: Arc<dyn Attributes>,
    openings: vfio::Openings,
    helpers: Option<Helpers>,
    lending: device::Lending,
}

impl RealKernel {
    /// The kernel of this host, its file systems below `roots`.
    #[must_use]
    pub fn new(roots: Roots) -> Self {
        Self {
            roots,
            netlink: Arc::new(RtNetlink),
            attributes: Arc::new(Files),
            openings: vfio::Openings::default(),
            helpers: None,
            lending: device::Lending::default(),
        }
    }

    /// As it is, but writes that may not come back are made by helpers.
    #[must_use]
    pub fn with_helpers(self, helpers: Helpers) -> Self {
        Self {
            helpers: Some(helpers),
            ..self
        }
    }

    fn sysfs(&self) -> Sysfs<'_> {
        Sysfs {
            root: &self.roots.sys,
            attributes: self.attributes.as_ref(),
            helpers: self.helpers.as_ref(),
        }
    }

    fn device(&self, address: PciAddress) -> PathBuf {
        self.sysfs().device(address)
    }

    /// Folder of a function that can have VFs.
    fn pf_device(&self, pf: PciAddress) -> Result<PathBuf, KernelError> {
        let device = self.device(pf);
        if !sysfs::exists(&device)? {
            return Err(KernelError::NoSuchFunction(pf));
        }
        if !sysfs::exists(&device.join("sriov_totalvfs"))? {
            return Err(KernelError::NotAPhysicalFunction(pf));
        }
        Ok(device)
    }

    fn pf_facts(&self, pf: PciAddress, usage: &NetUse) -> Result<PfFacts, KernelError> {
        let device = self.pf_device(pf)?;
        let (iommu_group, group_members) = group(&device)?;
        let interface = sysfs::names(&device.join("net"))?.into_iter().next();
        let link = interface
            .as_deref()
            .and_then(|name| usage.links.iter().find(|link| link.name == name));
        let config = config_space(&device)?;
        let num_vfs = match config_space::num_vfs(&config) {
            Some(count) => count,
            None => sysfs::parse(&device.join("sriov_numvfs"), "a number of VFs")?,
        };
        let mut facts = PfFacts {
            address: pf,
            vendor: id(&device.join("vendor"))?,
            device: id(&device.join("device"))?,
            driver: sysfs::link_name(&device.join("driver"))?,
            mac: link.and_then(|link| link.mac),
            permanent_mac: link.and_then(|link| link.permanent_mac),
            serial: match config_space::serial_number(&config) {
                Some(serial) => Some(serial),
                None => device::serial(self.sysfs(), pf)?,
            },
            slot: self.slot(pf)?,
            total_vfs: sysfs::parse(&device.join("sriov_totalvfs"), "a number of VFs")?,
            num_vfs,
            numa_node: numa_node(&device)?,
            iommu_group,
            group_members,
            in_use_by_host: match interface.as_deref() {
                Some(name) => host_use::reason(usage, name),
                None => device::in_use(self.sysfs(), pf, &self.lending)?,
            },
            up: link.is_some_and(|link| link.up),
            eswitch: self.netlink.eswitch(pf)?,
            interface,
            identity: String::new(),
        };
        facts.identity = facts.identify();
        Ok(facts)
    }

    /// The slot whose address is this function's device.
    fn slot(&self, pf: PciAddress) -> Result<Option<String>, KernelError> {
        let slots = self.roots.sys.join("bus/pci/slots");
        let text = pf.to_string();
        let device = text
            .split_once('.')
            .map_or(text.as_str(), |(device, _)| device);
        for name in sysfs::names(&slots)? {
            let address = sysfs::read_if_there(&slots.join(&name).join("address"))?;
            if address.as_deref() == Some(device) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    fn vf_facts(&self, index: u16, address: PciAddress) -> Result<VfFacts, KernelError> {
        let device = self.device(address);
        let (iommu_group, group_members) = group(&device)?;
        Ok(VfFacts {
            index,
            address,
            vendor: id(&device.join("vendor"))?,
            device: id(&device.join("device"))?,
            driver: sysfs::link_name(&device.join("driver"))?,
            iommu_group,
            group_members,
        })
    }

    /// The VF's links in both directions and its folder exist, or it is not
    /// ready to be worked on.
    fn vf_is_there(&self, device: &Path, index: u16) -> Result<bool, KernelError> {
        let Some(name) = sysfs::link_name(&device.join(format!("virtfn{index}")))? else {
            return Ok(false);
        };
        let vf = self.roots.sys.join("bus/pci/devices").join(name);
        sysfs::exists(&vf.join("physfn"))
    }

    fn wait_for_vfs(&self, pf: PciAddress, device: &Path, count: u16) -> Result<(), KernelError> {
        let what = || format!("the links of the {count} VFs of {pf}");
        sysfs::wait_for(what, VF_LINKS, || {
            for index in 0..count {
                if !self.vf_is_there(device, index)? {
                    return Ok(None);
                }
            }
            // With fewer VFs than before, the first one too many is gone.
            let beyond = device.join(format!("virtfn{count}"));
            Ok((!sysfs::exists(&beyond)?).then_some(()))
        })
    }
}

impl Kernel for RealKernel {
    fn node_facts(&self) -> Result<NodeFacts, KernelError> {
        let proc = self.roots.proc.join("sys/kernel");
        let sys = &self.roots.sys;
        let groups = sysfs::names(&sys.join("kernel/iommu_groups"))?.len();
        Ok(NodeFacts {
            kernel_release: sysfs::read(&proc.join("osrelease"))?,
            boot_id: sysfs::read(&proc.join("random/boot_id"))?,
            iommu_groups: u32::try_from(groups).unwrap_or(u32::MAX),
            lockdown: sysfs::read_if_there(&sys.join("kernel/security/lockdown"))?
                .and_then(|text| chosen(&text)),
            vfio_pci: sysfs::exists(&sys.join("bus/pci/drivers").join(VFIO_PCI))?,
            vfio_container: sysfs::exists(&self.roots.dev.join("vfio/vfio"))?,
        })
    }

    fn numa_nodes(&self) -> Result<BTreeMap<u16, CpuList>, KernelError> {
        let folder = self.roots.sys.join("devices/system/node");
        let mut nodes = BTreeMap::new();
        for name in sysfs::names(&folder)? {
            let number = name.strip_prefix("node").and_then(|n| n.parse().ok());
            if let Some(number) = number {
                let cpus = folder.join(&name).join("cpulist");
                nodes.insert(number, sysfs::parse(&cpus, "a list of CPUs")?);
            }
        }
        Ok(nodes)
    }

    fn physical_functions(&self) -> Result<Vec<PfFacts>, KernelError> {
        let usage = self.netlink.net_use()?;
        let devices = self.roots.sys.join("bus/pci/devices");
        let mut found = Vec::new();
        for name in sysfs::names(&devices)? {
            let total = devices.join(&name).join("sriov_totalvfs");
            if !matches!(sysfs::read_if_there(&total)?.as_deref(), Some(text) if text != "0") {
                continue;
            }
            let address = address(&devices.join(&name), &name)?;
            match self.pf_facts(address, &usage) {
                Ok(facts) => found.push(facts),
                // Pulled out between the list and the look.
                Err(_) if !sysfs::exists(&devices.join(&name))? => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    fn physical_function(&self, pf: PciAddress) -> Result<PfFacts, KernelError> {
        self.pf_device(pf)?;
        self.pf_facts(pf, &self.netlink.net_use()?)
    }

    fn virtual_functions(&self, pf: PciAddress) -> Result<Vec<VfFacts>, KernelError> {
        let device = self.pf_device(pf)?;
        let mut found = Vec::new();
        for name in sysfs::names(&device)? {
            let Some(index) = name.strip_prefix("virtfn") else {
                continue;
            };
            let link = device.join(&name);
            let index = index.parse().map_err(|_| KernelError::Content {
                path: link.clone(),
                text: name.clone(),
                expected: "virtfn and a number",
            })?;
            if let Some(target) = sysfs::link_name(&link)? {
                found.push(self.vf_facts(index, address(&link, &target)?)?);
            }
        }
        found.sort_by_key(|vf| vf.index);
        Ok(found)
    }

    fn set_num_vfs(&self, pf: PciAddress, count: u16) -> Result<(), KernelError> {
        let device = self.pf_device(pf)?;
        let numvfs = device.join("sriov_numvfs");
        self.sysfs().not_stuck(pf)?;
        if count > 0 {
            // Else the host's own VF driver takes each one, and gives it an interface.
            self.sysfs()
                .write(&device.join("sriov_drivers_autoprobe"), "0")?;
        }
        if sysfs::parse::<u16>(&numvfs, "a number of VFs")? != count {
            self.sysfs()
                .write_apart(pf, &numvfs, &count.to_string(), NUM_VFS)?;
        }
        let got = sysfs::parse(&numvfs, "a number of VFs")?;
        if got != count {
            return Err(KernelError::VfCount {
                pf,
                wanted: count,
                got,
            });
        }
        self.wait_for_vfs(pf, &device, count)
    }

    fn watch(&self, told: Watcher) -> Result<(), KernelError> {
        changes::watch(&self.roots.sys, &told)
    }

    fn vf_config(&self, pf: &PfFacts, index: u16) -> Result<VfConfig, KernelError> {
        self.netlink.vf(interface(pf)?, index)
    }

    fn set_vf_config(&self, pf: &PfFacts, index: u16, want: &VfConfig) -> Result<(), KernelError> {
        let interface = interface(pf)?;
        let have = self.netlink.vf(interface, index)?;
        for (setting, now) in VfSetting::all(want).into_iter().zip(VfSetting::all(&have)) {
            if setting != now {
                self.netlink.set_vf(interface, index, setting)?;
            }
        }
        let got = self.netlink.vf(interface, index)?;
        for (setting, now) in VfSetting::all(want).into_iter().zip(VfSetting::all(&got)) {
            if setting != now {
                return Err(KernelError::Readback {
                    interface: interface.to_owned(),
                    index,
                    setting: setting.name(),
                    wanted: setting.value(),
                    got: now.value(),
                });
            }
        }
        Ok(())
    }

    fn set_link_up(&self, interface: &str) -> Result<(), KernelError> {
        if self.netlink.is_up(interface)? {
            return Ok(());
        }
        // The PF is up for its VFs' sake: a router on the wire must not give the
        // host an address and a default route by it. Absent without IPv6.
        let accept_ra = self
            .roots
            .proc
            .join("sys/net/ipv6/conf")
            .join(interface)
            .join("accept_ra");
        if sysfs::exists(&accept_ra)? {
            self.sysfs().write(&accept_ra, "0")?;
        }
        self.netlink.set_up(interface)
    }

    fn bind_vfio(&self, vf: PciAddress) -> Result<(), KernelError> {
        vfio::bind(self.sysfs(), vf)
    }

    fn unbind(&self, vf: PciAddress) -> Result<(), KernelError> {
        vfio::unbind(self.sysfs(), vf)
    }

    fn stuck(&self) -> Result<BTreeMap<PciAddress, Stuck>, KernelError> {
        match &self.helpers {
            Some(helpers) => helpers.stuck(),
            None => Ok(BTreeMap::new()),
        }
    }

    fn reset_function(&self, vf: PciAddress) -> Result<(), KernelError> {
        vfio::must_be_vf(self.sysfs(), vf)?;
        // It would wait behind the other write, for the device's lock.
        self.sysfs().not_stuck(vf)?;
        self.sysfs().write(&self.device(vf).join("reset"), "1")
    }

    fn hold_group(&self, group: u32) -> Result<GroupHold, HoldError> {
        self.openings.hold(&self.roots.dev, group)
    }

    fn probe_group(&self, group: u32) -> Result<(), HoldError> {
        self.openings.probe(&self.roots.dev, group)
    }

    fn nvme(&self) -> &dyn Nvme {
        self
    }
}

impl Nvme for RealKernel {
    fn admin(&self, pf: PciAddress, command: &Command) -> Result<Vec<u8>, KernelError> {
        self.pf_device(pf)?;
        device::admin(self.sysfs(), &self.roots.dev, pf, command)
    }

    fn reset(&self, pf: PciAddress) -> Result<(), KernelError> {
        self.pf_device(pf)?;
        device::reset(self.sysfs(), pf)
    }

    fn lend(&self, pf: PciAddress, nsid: u32) -> Lent {
        self.lending.lend(pf, nsid)
    }

    fn open(&self, pf: PciAddress, nsid: u32) -> Result<Box<dyn Blocks>, KernelError> {
        device::open(self.sysfs(), &self.roots.dev, pf, nsid)
    }
}

fn interface(pf: &PfFacts) -> Result<&str, KernelError> {
    pf.interface
        .as_deref()
        .ok_or(KernelError::NoInterface(pf.address))
}

fn address(path: &Path, name: &str) -> Result<PciAddress, KernelError> {
    name.parse().map_err(|_| KernelError::Content {
        path: path.to_owned(),
        text: name.to_owned(),
        expected: "a PCI address",
    })
}

fn id(path: &Path) -> Result<PciId, KernelError> {
    sysfs::parse(path, "a PCI id")
}

/// Number and members of a function's IOMMU group; none without an IOMMU.
fn group(device: &Path) -> Result<(Option<u32>, Vec<PciAddress>), KernelError> {
    let link = device.join("iommu_group");
    let Some(name) = sysfs::link_name(&link)? else {
        return Ok((None, Vec::new()));
    };
    let number = name.parse().map_err(|_| KernelError::Content {
        path: link.clone(),
        text: name,
        expected: "the number of an IOMMU group",
    })?;
    let folder = link.join("devices");
    let mut members = Vec::new();
    for name in sysfs::names(&folder)? {
        members.push(address(&folder, &name)?);
    }
    members.sort();
    Ok((Some(number), members))
}

/// -1 is the kernel's "not known".
fn numa_node(device: &Path) -> Result<Option<u16>, KernelError> {
    let text = sysfs::read_if_there(&device.join("numa_node"))?;
    Ok(text.and_then(|text| text.parse().ok()))
}

/// As much of the configuration space as may be read; nothing without the file.
fn config_space(device: &Path) -> Result<Vec<u8>, KernelError> {
    let path = device.join("config");
    match fs::read(&path) {
        Ok(config) => Ok(config),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(KernelError::file("read", &path, error)),
    }
}

/// The word in brackets, the way sysfs shows a choice: `none [integrity] confidentiality`.
pub(super) fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (word, _) = rest.split_once(']')?;
    Some(word.to_owned())
}
