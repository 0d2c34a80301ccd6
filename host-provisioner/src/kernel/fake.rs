//! A kernel in memory with the real one's errno manners, for tests.
//!
//! It is as unforgiving as the real one and remembers more: every write is in
//! [`FakeKernel::writes`], and a write that would have pulled a device from
//! under its user is in [`FakeKernel::violations`], as the real kernel obeys it
//! or hangs without a word.

mod manners;
mod nvme;
mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::pci::{PciAddress, PciId};

use super::netlink::VfSetting;
use super::{
    Change, GroupHold, HoldError, Kernel, KernelError, MacAddr, NodeFacts, Nvme, PfFacts, Stuck,
    TxRate, VFIO_PCI, VfConfig, VfFacts, Watcher,
};
use crate::cpus::CpuList;

pub use nvme::{Formats, PRIMARY, nvme_pf};
pub use state::Write;
use state::{HELPER, State};

/// [`Kernel`] in memory; clones share it.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel {
    state: Arc<Mutex<State>>,
}

/// An igb PF at `address` with seven VFs to have, in an IOMMU group of its own
/// (numbered as its bus), its interface named after the bus and down.
#[must_use]
pub fn igb_pf(address: PciAddress) -> PfFacts {
    let mac = MacAddr([0x52, 0x54, 0, 0, address.bus(), 1]);
    let mut facts = PfFacts {
        address,
        vendor: PciId(0x8086),
        device: PciId(0x10c9),
        driver: Some("igb".to_owned()),
        interface: Some(format!("ens{}f{}", address.bus(), address.function())),
        mac: Some(mac),
        permanent_mac: Some(mac),
        serial: None,
        slot: None,
        total_vfs: 7,
        num_vfs: 0,
        numa_node: None,
        iommu_group: Some(u32::from(address.bus())),
        group_members: vec![address],
        in_use_by_host: None,
        up: false,
        eswitch: None,
        identity: String::new(),
    };
    facts.identity = facts.identify();
    facts
}

impl FakeKernel {
    /// A kernel with these PFs and a working IOMMU.
    #[must_use]
    pub fn new(pfs: impl IntoIterator<Item = PfFacts>) -> Self {
        let fake = Self::default();
        for pf in pfs {
            fake.lock().add(pf);
        }
        fake
    }

    /// One more PF.
    pub fn add(&self, pf: PfFacts) {
        self.lock().add(pf);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next calls of this name (`set_num_vfs`, `bind_vfio`, ...) fail with
    /// this errno, before they do anything.
    pub fn fail_next(&self, call: &'static str, errno: i32) {
        self.lock().failures.push((call, errno));
    }

    /// From now on the PF's driver makes at most so many VFs, and the write to
    /// `sriov_numvfs` succeeds all the same.
    pub fn make_at_most(&self, pf: PciAddress, count: u16) {
        self.lock().at_most.insert(pf, count);
    }

    /// From now on the PF's driver makes so many VFs, whatever number but 0 it is asked for.
    pub fn make_exactly(&self, pf: PciAddress, count: u16) {
        self.lock().exactly.insert(pf, count);
    }

    /// The PF's link has another speed, in Mbit/s; 0: it has none.
    pub fn give_link(&self, pf: PciAddress, speed: u32) {
        if let Some(pf) = self.lock().pfs.get_mut(&pf) {
            let before = std::mem::replace(&mut pf.speed, speed);
            // Without a link they wait for the next one.
            if manners::forgets_rates(pf.manners().driver) && speed != 0 && speed != before {
                pf.vfs
                    .iter_mut()
                    .for_each(|vf| vf.config.rate = TxRate::default());
            }
        }
    }

    /// ice: the card's package does 802.1ad.
    pub fn double_vlan(&self, pf: PciAddress) {
        if let Some(pf) = self.lock().pfs.get_mut(&pf) {
            pf.double_vlan = true;
        }
    }

    /// So often a VF of this PF that was reset answers that it is not ready.
    pub fn slow_resets(&self, pf: PciAddress, answers: u32) {
        if let Some(pf) = self.lock().pfs.get_mut(&pf) {
            pf.slow_resets = answers;
        }
    }

    /// The PF lies below a port without ACS: port, PF and VFs share one IOMMU
    /// group. Its VFs are made anew.
    pub fn without_isolation(&self, pf: PciAddress) {
        let mut state = self.lock();
        state.shared.insert(pf);
        let count = state.pfs.get(&pf).map_or(0, |pf| pf.facts.num_vfs);
        state.resize(pf, count);
    }

    /// The PF is on this NUMA node.
    pub fn give_numa_node(&self, pf: PciAddress, node: Option<u16>) {
        if let Some(pf) = self.lock().pfs.get_mut(&pf) {
            pf.facts.numa_node = node;
        }
    }

    /// The host has these NUMA nodes, with their CPUs.
    pub fn give_cpus(&self, nodes: BTreeMap<u16, CpuList>) {
        self.lock().cpus = nodes;
    }

    /// The words for `in_use_by_host`, or none.
    pub fn use_by_host(&self, pf: PciAddress, words: Option<&str>) {
        if let Some(pf) = self.lock().pfs.get_mut(&pf) {
            pf.facts.in_use_by_host = words.map(str::to_owned);
        }
    }

    /// Binds a VF to any driver behind everybody's back, or to none.
    pub fn give_driver(&self, vf: PciAddress, driver: Option<&str>) {
        if let Some(vf) = self.lock().vf_mut(vf) {
            vf.facts.driver = driver.map(str::to_owned);
        }
    }

    /// A guest has this VF from now on; nothing may be taken from it.
    pub fn give_to_guest(&self, vf: PciAddress, has: bool) {
        let mut state = self.lock();
        if has {
            state.guests.insert(vf);
        } else {
            state.guests.remove(&vf);
        }
    }

    /// Changes a VF's settings behind everybody's back.
    pub fn give_config(&self, vf: PciAddress, config: VfConfig) {
        if let Some(vf) = self.lock().vf_mut(vf) {
            vf.config = config;
        }
    }

    /// Gives the PF another number of VFs behind everybody's back, whoever uses them.
    pub fn give_vfs(&self, pf: PciAddress, count: u16) {
        self.lock().resize(pf, count);
    }

    /// A write about this function does not come back, or does so now.
    pub fn stick(&self, function: PciAddress, stuck: bool) {
        let mut state = self.lock();
        if stuck {
            state.stuck.insert(function, HELPER);
        } else {
            state.stuck.remove(&function);
        }
    }

    /// The next call of this name, `unbind` or `set_num_vfs`, does not come back until
    /// [`FakeKernel::stick`] ends it: somebody has taken the VF a moment before, and the kernel
    /// shows no driver any more; or the card has not made its VFs yet.
    pub fn stick_next(&self, call: &'static str) {
        self.lock().sticking.insert(call);
    }

    /// How many watch.
    #[must_use]
    pub fn watchers(&self) -> usize {
        self.lock().watchers.0.len()
    }

    /// Tells all who watch.
    pub fn announce(&self, change: &Change) {
        self.lock().watchers.0.retain(|told| told(change.clone()));
    }

    /// The MAC that a guest's driver would find: `None` when it was set while
    /// the PF's interface was down, and then igbvf makes one up.
    #[must_use]
    pub fn guest_mac(&self, vf: PciAddress) -> Option<MacAddr> {
        let mut state = self.lock();
        let vf = state.vf_mut(vf)?;
        (vf.mac_delivered && !vf.config.mac.is_zero()).then_some(vf.config.mac)
    }

    /// Every write so far, in order.
    #[must_use]
    pub fn writes(&self) -> Vec<Write> {
        self.lock().writes.clone()
    }

    /// Writes that touched a device in use, in words. Empty in a right program.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Ends the boot: no VFs, no settings, another boot id. Open groups close.
    pub fn reboot(&self) {
        self.lock().reboot();
    }
}

/// Closes the group when the hold is dropped.
struct Mark {
    kernel: FakeKernel,
    group: u32,
    opening: u64,
}

impl Drop for Mark {
    fn drop(&mut self) {
        let mut state = self.kernel.lock();
        // A reboot closed it already, and somebody else may have it by now.
        if state.held.get(&self.group) == Some(&self.opening) {
            state.held.remove(&self.group);
        }
    }
}

fn refused(action: &str, path: String, errno: i32) -> KernelError {
    KernelError::File {
        action: action.to_owned(),
        path: PathBuf::from(path),
        source: io::Error::from_raw_os_error(errno),
    }
}

fn device_file(address: PciAddress, file: &str) -> String {
    format!("/sys/bus/pci/devices/{address}/{file}")
}

impl Kernel for FakeKernel {
    fn node_facts(&self) -> Result<NodeFacts, KernelError> {
        let mut state = self.lock();
        state.due_failure("node_facts", "/proc/sys/kernel/random/boot_id")?;
        let groups = state.group_count();
        Ok(NodeFacts {
            kernel_release: "6.12.0-fake".to_owned(),
            boot_id: format!("00000000-0000-4000-8000-{:012}", state.boots),
            iommu_groups: groups,
            lockdown: None,
            vfio_pci: true,
            vfio_container: true,
        })
    }

    fn numa_nodes(&self) -> Result<BTreeMap<u16, CpuList>, KernelError> {
        let mut state = self.lock();
        state.due_failure("numa_nodes", "/sys/devices/system/node")?;
        Ok(state.cpus.clone())
    }

    fn physical_functions(&self) -> Result<Vec<PfFacts>, KernelError> {
        let mut state = self.lock();
        state.due_failure("physical_functions", "/sys/bus/pci/devices")?;
        let all = state.pfs.values().map(|pf| state.facts(pf));
        Ok(all.collect())
    }

    fn physical_function(&self, pf: PciAddress) -> Result<PfFacts, KernelError> {
        let mut state = self.lock();
        state.due_failure("physical_function", &device_file(pf, ""))?;
        state.pf(pf)?;
        let known = state.pfs.get(&pf);
        known
            .map(|pf| state.facts(pf))
            .ok_or(KernelError::NoSuchFunction(pf))
    }

    fn virtual_functions(&self, pf: PciAddress) -> Result<Vec<VfFacts>, KernelError> {
        let mut state = self.lock();
        state.due_failure("virtual_functions", &device_file(pf, ""))?;
        Ok(state
            .pf(pf)?
            .vfs
            .iter()
            .map(|vf| vf.facts.clone())
            .collect())
    }

    fn set_num_vfs(&self, pf: PciAddress, count: u16) -> Result<(), KernelError> {
        let mut state = self.lock();
        let path = device_file(pf, "sriov_numvfs");
        state.due_failure("set_num_vfs", &path)?;
        let (total, have, driver) = {
            let facts = &state.pf(pf)?.facts;
            (facts.total_vfs, facts.num_vfs, facts.driver.is_some())
        };
        let action = format!("write \"{count}\" to");
        // In the order of drivers/pci/iov.c, sriov_numvfs_store.
        if count > total {
            return Err(refused(&action, path, libc::ERANGE));
        }
        if count == have {
            return Ok(());
        }
        if !driver {
            return Err(refused(&action, path, libc::ENOENT));
        }
        if count != 0 && have != 0 {
            return Err(refused(&action, path, libc::EBUSY));
        }
        state.writes.push(Write::NumVfs { pf, count });
        state.due_stick("set_num_vfs", pf)?;
        let got = state.resize(pf, count);
        if got == count {
            return Ok(());
        }
        Err(KernelError::VfCount {
            pf,
            wanted: count,
            got,
        })
    }

    fn vf_config(&self, pf: &PfFacts, index: u16) -> Result<VfConfig, KernelError> {
        let mut state = self.lock();
        state.due_failure("vf_config", "netlink")?;
        let interface = interface(pf)?;
        let vf = state.vf_by_index(pf.address, interface, index)?;
        if vf.resetting > 0 {
            // Its driver does not answer for it (rtnl_fill_vfinfo in net/core/rtnetlink.c).
            vf.resetting -= 1;
            return Err(KernelError::NoSuchVf {
                interface: interface.to_owned(),
                index,
            });
        }
        Ok(vf.config)
    }

    fn set_vf_config(&self, pf: &PfFacts, index: u16, want: &VfConfig) -> Result<(), KernelError> {
        let mut state = self.lock();
        let interface = interface(pf)?.to_owned();
        let have = state.vf_by_index(pf.address, &interface, index)?.config;
        for (setting, now) in VfSetting::all(want).into_iter().zip(VfSetting::all(&have)) {
            if setting != now {
                state.set(pf.address, &interface, index, setting)?;
            }
        }
        // Read back as the real one does: some drivers take a setting and do nothing.
        let got = state.vf_by_index(pf.address, &interface, index)?.config;
        for (setting, now) in VfSetting::all(want).into_iter().zip(VfSetting::all(&got)) {
            if setting != now {
                return Err(KernelError::Readback {
                    interface,
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
        let mut state = self.lock();
        state.due_failure("set_link_up", "netlink")?;
        let found = state
            .pfs
            .values_mut()
            .find(|pf| pf.facts.interface.as_deref() == Some(interface));
        let Some(pf) = found else {
            return Err(KernelError::Netlink {
                request: format!("read interface {interface}"),
                source: io::Error::from_raw_os_error(libc::ENODEV),
            });
        };
        if !pf.facts.up {
            pf.facts.up = true;
            state.writes.push(Write::LinkUp(interface.to_owned()));
        }
        Ok(())
    }

    fn bind_vfio(&self, vf: PciAddress) -> Result<(), KernelError> {
        let mut state = self.lock();
        state.due_failure("bind_vfio", "/sys/bus/pci/drivers_probe")?;
        let found = state.vf(vf)?.facts.driver.clone();
        match found.as_deref() {
            Some(VFIO_PCI) => Ok(()),
            Some(_) => Err(KernelError::WrongDriver {
                vf,
                found,
                wanted: Some(VFIO_PCI.to_owned()),
            }),
            None => {
                state.vf(vf)?.facts.driver = Some(VFIO_PCI.to_owned());
                state.writes.push(Write::Bind(vf));
                Ok(())
            }
        }
    }

    fn unbind(&self, vf: PciAddress) -> Result<(), KernelError> {
        let mut state = self.lock();
        state.due_failure("unbind", &device_file(vf, "driver/unbind"))?;
        if state.vf(vf)?.facts.driver.is_none() {
            return Ok(());
        }
        state.note_use(vf, "unbind");
        state.vf(vf)?.facts.driver = None;
        state.writes.push(Write::Unbind(vf));
        state.due_stick("unbind", vf)
    }

    fn stuck(&self) -> Result<BTreeMap<PciAddress, Stuck>, KernelError> {
        let mut state = self.lock();
        state.due_failure("stuck", "/sys/fs/cgroup/vf-provisioner")?;
        Ok(state.stuck.clone())
    }

    fn reset_function(&self, vf: PciAddress) -> Result<(), KernelError> {
        let mut state = self.lock();
        state.due_failure("reset_function", &device_file(vf, "reset"))?;
        state.vf(vf)?;
        let slow = state
            .pfs
            .values()
            .find(|pf| pf.vfs.iter().any(|v| v.facts.address == vf));
        let slow = slow.map_or(0, |pf| pf.slow_resets);
        state.vf(vf)?.resetting = slow;
        state.writes.push(Write::Reset(vf));
        Ok(())
    }

    fn watch(&self, told: Watcher) -> Result<(), KernelError> {
        self.lock().watchers.0.push(told);
        Ok(())
    }

    fn hold_group(&self, group: u32) -> Result<GroupHold, HoldError> {
        let mut state = self.lock();
        state.due_failure("hold_group", &format!("/dev/vfio/{group}"))?;
        // It keeps its node until its last device has left, and that waits for the user.
        if state.group_stuck(group) {
            return Err(HoldError::Busy { group });
        }
        if !state.group_on_vfio(group) {
            return Err(HoldError::NoDevice { group });
        }
        if state.held.contains_key(&group) {
            return Err(HoldError::Busy { group });
        }
        state.openings += 1;
        let opening = state.openings;
        state.held.insert(group, opening);
        let kernel = self.clone();
        Ok(GroupHold::new(
            group,
            Mark {
                kernel,
                group,
                opening,
            },
        ))
    }

    fn nvme(&self) -> &dyn Nvme {
        self
    }
}

fn interface(pf: &PfFacts) -> Result<&str, KernelError> {
    pf.interface
        .as_deref()
        .ok_or(KernelError::NoInterface(pf.address))
}
