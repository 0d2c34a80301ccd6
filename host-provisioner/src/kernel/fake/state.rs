//! What the fake kernel remembers.

use std::collections::{BTreeMap, BTreeSet};

use common::pci::{PciAddress, PciId};

use crate::cpus::CpuList;
use crate::kernel::{KernelError, MacAddr, PfFacts, Stuck, VFIO_PCI, VfConfig, VfFacts, Watcher};

use crate::kernel::netlink::VfSetting;

use super::{manners, nvme, refused};

/// The first group number of VFs; PFs have those below it.
const FIRST_VF_GROUP: u32 = 1000;
/// First VF and stride of the 82576: PF + 0x80, then every second function.
const VF_OFFSET: u32 = 0x80;
const VF_STRIDE: u32 = 2;

/// Speed of a PF's link in Mbit/s, where a test says no other.
const SPEED: u32 = 1000;

/// Who waits for a write that does not come back.
pub(super) const HELPER: Stuck = Stuck { pid: 4711 };

/// A root port that does not isolate.
const PORT: Option<PciAddress> = PciAddress::new(0, 0, 0x1c, 0);

/// A write that the kernel obeyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    NumVfs {
        pf: PciAddress,
        count: u16,
    },
    VfSetting {
        vf: PciAddress,
        setting: &'static str,
        value: String,
    },
    LinkUp(String),
    Bind(PciAddress),
    Unbind(PciAddress),
    Reset(PciAddress),
    /// An NVMe admin command that changes something, by its name.
    Nvme {
        pf: PciAddress,
        command: String,
    },
}

#[derive(Debug)]
pub(super) struct Vf {
    pub facts: VfFacts,
    pub config: VfConfig,
    /// The MAC was set while the PF's interface was up.
    pub mac_delivered: bool,
    /// So often it still answers that it is being reset.
    pub resetting: u32,
}

#[derive(Debug)]
pub(super) struct Pf {
    pub facts: PfFacts,
    pub vfs: Vec<Vf>,
    /// Speed of its link in Mbit/s while it is up.
    pub speed: u32,
    /// See [`manners::Pf::double_vlan`].
    pub double_vlan: bool,
    /// So often a VF that was reset answers that it is not ready.
    pub slow_resets: u32,
}

impl Pf {
    /// What the driver goes by now.
    pub fn manners(&self) -> manners::Pf<'_> {
        manners::Pf::of(&self.facts, self.speed, self.double_vlan)
    }
}

/// Those who want to be told; they have nothing to show.
#[derive(Default)]
pub(super) struct Watchers(pub Vec<Watcher>);

impl std::fmt::Debug for Watchers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} watchers", self.0.len())
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub pfs: BTreeMap<PciAddress, Pf>,
    /// NUMA nodes with their CPUs.
    pub cpus: BTreeMap<u16, CpuList>,
    /// Open groups, each with the number of its opening.
    pub held: BTreeMap<u32, u64>,
    pub openings: u64,
    /// Functions about which a write has not come back.
    pub stuck: BTreeMap<PciAddress, Stuck>,
    /// Calls of which the next does not come back.
    pub sticking: BTreeSet<&'static str>,
    pub boots: u64,
    pub failures: Vec<(&'static str, i32)>,
    /// Who wants to be told of changes.
    pub watchers: Watchers,
    pub at_most: BTreeMap<PciAddress, u16>,
    /// Makes so many, whatever it was asked for.
    pub exactly: BTreeMap<PciAddress, u16>,
    pub shared: BTreeSet<PciAddress>,
    /// The subsystems of NVMe PFs.
    pub nvme: BTreeMap<PciAddress, nvme::Card>,
    /// VFs that guests have.
    pub guests: BTreeSet<PciAddress>,
    pub writes: Vec<Write>,
    pub violations: Vec<String>,
}

impl State {
    pub fn add(&mut self, facts: PfFacts) {
        let (address, count) = (facts.address, facts.num_vfs);
        self.nvme
            .extend(nvme::Card::of(&facts).map(|card| (address, card)));
        let pf = Pf {
            facts: PfFacts {
                num_vfs: 0,
                ..facts
            },
            vfs: Vec::new(),
            speed: SPEED,
            double_vlan: false,
            slow_resets: 0,
        };
        self.pfs.insert(address, pf);
        if count > 0 {
            self.resize(address, count);
        }
    }

    /// The PF's facts as they are now.
    pub fn facts(&self, pf: &Pf) -> PfFacts {
        let mut facts = pf.facts.clone();
        let card = self.nvme.get(&facts.address);
        if let Some(words) = card.and_then(nvme::Card::in_use) {
            facts.in_use_by_host.get_or_insert(words);
        }
        facts
    }

    pub fn take_failure(&mut self, call: &str) -> Option<i32> {
        let at = self.failures.iter().position(|(name, _)| *name == call)?;
        Some(self.failures.remove(at).1)
    }

    pub fn due_failure(&mut self, call: &str, path: &str) -> Result<(), KernelError> {
        match self.take_failure(call) {
            Some(errno) => Err(refused(call, path.to_owned(), errno)),
            None => Ok(()),
        }
    }

    pub fn due_stick(&mut self, call: &str, function: PciAddress) -> Result<(), KernelError> {
        if !self.sticking.remove(call) {
            return Ok(());
        }
        self.stuck.insert(function, HELPER);
        Err(KernelError::Stuck {
            function,
            stuck: HELPER,
        })
    }

    pub fn pf(&mut self, pf: PciAddress) -> Result<&mut Pf, KernelError> {
        self.pfs.get_mut(&pf).ok_or(KernelError::NoSuchFunction(pf))
    }

    pub fn vf_mut(&mut self, vf: PciAddress) -> Option<&mut Vf> {
        self.pfs
            .values_mut()
            .flat_map(|pf| &mut pf.vfs)
            .find(|known| known.facts.address == vf)
    }

    pub fn vf(&mut self, vf: PciAddress) -> Result<&mut Vf, KernelError> {
        if self.pfs.contains_key(&vf) {
            return Err(KernelError::NotAVirtualFunction(vf));
        }
        self.vf_mut(vf).ok_or(KernelError::NoSuchFunction(vf))
    }

    pub fn vf_by_index(
        &mut self,
        pf: PciAddress,
        interface: &str,
        index: u16,
    ) -> Result<&mut Vf, KernelError> {
        self.pf(pf)?
            .vfs
            .iter_mut()
            .find(|vf| vf.facts.index == index)
            .ok_or_else(|| KernelError::NoSuchVf {
                interface: interface.to_owned(),
                index,
            })
    }

    /// Makes one setting of a VF as the driver does, or answers as it does.
    pub fn set(
        &mut self,
        pf: PciAddress,
        interface: &str,
        index: u16,
        setting: VfSetting,
    ) -> Result<(), KernelError> {
        let due = self.take_failure("set_vf_config");
        let refused = |errno| {
            let source = std::io::Error::from_raw_os_error(errno);
            KernelError::setting(interface, index, setting, source)
        };
        if let Some(errno) = due {
            return Err(refused(errno));
        }
        let known = self.pf(pf)?;
        let manners = manners::Pf::of(&known.facts, known.speed, known.double_vlan);
        let vf = known.vfs.iter_mut().find(|vf| vf.facts.index == index);
        let vf = vf.ok_or_else(|| KernelError::NoSuchVf {
            interface: interface.to_owned(),
            index,
        })?;
        let address = vf.facts.address;
        let done = if vf.resetting > 0 {
            vf.resetting -= 1;
            Err(manners::in_reset(manners.driver))
        } else {
            manners::set(manners, &mut vf.config, setting)
        };
        if matches!(setting, VfSetting::Mac(_)) && done.is_ok() {
            vf.mac_delivered = known.facts.up;
        }
        done.map_err(refused)?;
        self.writes.push(Write::VfSetting {
            vf: address,
            setting: setting.name(),
            value: setting.value(),
        });
        Ok(())
    }

    /// Makes or takes away VFs as the driver pleases; how many there are then.
    pub fn resize(&mut self, pf: PciAddress, count: u16) -> u16 {
        let made = self.pfs.get(&pf);
        let count = made.map_or(count, |known| {
            manners::made(known.manners().driver, known.facts.up, count)
        });
        let count = self
            .exactly
            .get(&pf)
            .copied()
            .filter(|_| count > 0)
            .unwrap_or(count);
        let count = count.min(self.at_most.get(&pf).copied().unwrap_or(u16::MAX));
        let gone: Vec<PciAddress> = match self.pfs.get(&pf) {
            Some(known) => known.vfs.iter().map(|vf| vf.facts.address).collect(),
            None => return 0,
        };
        for vf in gone {
            self.note_use(vf, "numvfs write");
        }
        let shared = self.shared.contains(&pf);
        let Some(known) = self.pfs.get_mut(&pf) else {
            return 0;
        };
        let made = (0..count).filter_map(|index| new_vf(&known.facts, index, shared));
        known.vfs = made.collect();
        known.facts.num_vfs = count;
        if let Some(card) = self.nvme.get_mut(&pf) {
            card.resized(count);
        }
        if shared {
            // The port above, the PF and all its VFs.
            let mut members: Vec<PciAddress> = PORT.into_iter().chain([pf]).collect();
            members.extend(known.vfs.iter().map(|vf| vf.facts.address));
            known.facts.group_members.clone_from(&members);
            for vf in &mut known.vfs {
                vf.facts.group_members.clone_from(&members);
            }
        }
        count
    }

    /// Remembers a write to a VF whose group is open.
    pub fn note_use(&mut self, vf: PciAddress, what: &str) {
        let group = self.vf_mut(vf).and_then(|vf| vf.facts.iommu_group);
        if let Some(group) = group.filter(|group| self.held.contains_key(group)) {
            self.violations
                .push(format!("{what} of {vf} while group {group} was open"));
        }
    }

    /// Remembers a command that takes something from a VF that a guest has.
    pub fn note_guest(&mut self, vf: PciAddress, what: &str) {
        if self.guests.contains(&vf) {
            self.violations.push(format!("{what}, which a guest has"));
        }
    }

    /// A device of the group is being taken from vfio and its user has not let go.
    pub fn group_stuck(&self, group: u32) -> bool {
        let vfs = self.pfs.values().flat_map(|pf| &pf.vfs);
        vfs.filter(|vf| vf.facts.iommu_group == Some(group))
            .any(|vf| self.stuck.contains_key(&vf.facts.address))
    }

    pub fn group_on_vfio(&self, group: u32) -> bool {
        self.pfs.values().flat_map(|pf| &pf.vfs).any(|vf| {
            vf.facts.iommu_group == Some(group) && vf.facts.driver.as_deref() == Some(VFIO_PCI)
        })
    }

    pub fn group_count(&self) -> u32 {
        let groups: BTreeSet<u32> = self
            .pfs
            .values()
            .flat_map(|pf| {
                let vfs = pf.vfs.iter().map(|vf| vf.facts.iommu_group);
                vfs.chain([pf.facts.iommu_group])
            })
            .flatten()
            .collect();
        u32::try_from(groups.len()).unwrap_or(u32::MAX)
    }

    pub fn reboot(&mut self) {
        self.boots += 1;
        self.held.clear();
        self.guests.clear();
        for pf in self.pfs.values_mut() {
            pf.vfs.clear();
            pf.facts.up = false;
            pf.facts.num_vfs = 0;
        }
        for card in self.nvme.values_mut() {
            card.resized(0);
        }
    }
}

fn new_vf(pf: &PfFacts, index: u16, shared: bool) -> Option<Vf> {
    let base = (u32::from(pf.address.bus()) << 8)
        + (u32::from(pf.address.slot()) << 3)
        + u32::from(pf.address.function());
    let id = base + VF_OFFSET + VF_STRIDE * u32::from(index);
    let address = PciAddress::new(
        pf.address.domain(),
        u8::try_from(id >> 8).ok()?,
        u8::try_from((id >> 3) & 0x1f).ok()?,
        u8::try_from(id & 7).ok()?,
    )?;
    let own = FIRST_VF_GROUP + base + VF_STRIDE * u32::from(index);
    Some(Vf {
        facts: VfFacts {
            index,
            address,
            vendor: pf.vendor,
            device: PciId(pf.device.0 + 1),
            driver: None,
            iommu_group: match pf.iommu_group {
                Some(group) if shared => Some(group),
                Some(_) => Some(own),
                None => None,
            },
            group_members: vec![address],
        },
        config: VfConfig {
            mac: MacAddr::ZERO,
            ..VfConfig::CLEAN
        },
        mac_delivered: false,
        resetting: 0,
    })
}
