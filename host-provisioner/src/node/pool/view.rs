//! What is known of a PF and its VFs, brought together: the kernel's facts,
//! the claims and the group probes. Pure.

use std::collections::BTreeMap;

use common::api::{ResizeStatus, VfCounts, VfState, WithheldReason, WithheldVf, withheld_in_force};
use common::pci::PciAddress;

use crate::driver::{Capabilities, Namespaces, driver_for, namespace_of};
use crate::kernel::{MacAddr, PfFacts, Stuck, VFIO_PCI, VfFacts};

use super::claim::Holder;

/// What opening `/dev/vfio/<group>` said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupProbe {
    /// It opened: nobody holds it.
    Free,
    /// EBUSY: somebody holds it.
    Busy,
    /// It has no node: no member is on vfio.
    NoDevice,
    /// It could not be told; the reason. Never taken for free.
    Unknown(String),
}

/// Why a VF that no claim names is not ours to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForeignReason {
    /// Bound to a driver of the host.
    Driver(String),
    /// Somebody has its vfio group open.
    HeldOpen(u32),
    /// Whether somebody has its group open could not be told.
    NotProven(String),
    /// A function that is no VF of this PF shares its IOMMU group.
    Stranger(PciAddress),
    /// It is in no IOMMU group.
    NoIommu,
    /// Its controller has a namespace that no claim has: its data is the last holder's.
    Namespace(u32),
}

/// One VF, existing or promised to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfView {
    pub index: u16,
    /// Absent while the VF does not exist: a claim was given it before the VFs
    /// are made, or the host was restarted.
    pub address: Option<PciAddress>,
    pub driver: Option<String>,
    pub iommu_group: Option<u32>,
    pub group_members: Vec<PciAddress>,
    pub state: VfState,
    /// Set if `state` is `Foreign`, and where a `Retired` one would be.
    pub foreign: Option<ForeignReason>,
    /// Set if and only if `state` is `Retired`.
    pub withheld: Option<WithheldReason>,
    /// The claims that name it: one, unless something broke the rule.
    pub holders: Vec<Holder>,
    /// The MAC that the kernel reports, where it was asked.
    pub mac: Option<MacAddr>,
}

/// What a PF's view is made from.
#[derive(Clone, Debug)]
pub struct PfInput {
    /// Name of the `PhysicalFunction` object.
    pub name: String,
    pub facts: PfFacts,
    pub vfs: Vec<VfFacts>,
    /// `spec.managed`.
    pub managed: bool,
    /// `spec.numVFs`.
    pub desired: Option<u16>,
    /// `spec.withheld`.
    pub withheld: Vec<WithheldVf>,
    /// The last change of the count.
    pub resize: Option<ResizeStatus>,
    /// The count is being changed at this moment.
    pub resizing: bool,
    /// The claims whose `status.device` names this PF.
    pub holders: Vec<Holder>,
    /// Probes of the groups that [`groups_to_probe`] asked for.
    pub probes: BTreeMap<u32, GroupProbe>,
    /// MACs that the kernel reports, by VF index; may be empty.
    pub macs: BTreeMap<u16, MacAddr>,
    /// Of an NVMe subsystem; may be empty.
    pub namespaces: Namespaces,
    /// Functions about which a write has not come back; may name others.
    pub stuck: BTreeMap<PciAddress, Stuck>,
}

/// A PF with its VFs, as the planners see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PfView {
    pub name: String,
    pub facts: PfFacts,
    pub managed: bool,
    pub desired: Option<u16>,
    /// The entries of `spec.withheld` that are in force, of VFs that exist and of others.
    pub withheld: Vec<WithheldVf>,
    /// The last change of the count; of the destroyed VFs those whose entries are still there.
    pub resize: Option<ResizeStatus>,
    /// The count is being changed at this moment: no claim gets a VF.
    pub resizing: bool,
    /// What its backend can; `None`: there is no backend for it.
    pub capabilities: Option<Capabilities>,
    /// Why its backend serves nobody with it, as it is set up.
    pub unserviceable: Option<&'static str>,
    /// Of an NVMe subsystem.
    pub namespaces: Namespaces,
    /// By index; VFs that exist and VFs that are promised.
    pub vfs: Vec<VfView>,
    /// A write about the PF itself has not come back.
    pub stuck: Option<Stuck>,
}

/// The groups that tell whether an unclaimed VF is free: those of VFs on
/// vfio-pci, and of VFs without a driver (one that is being taken from vfio-pci, and
/// whose user has not let go, is shown without one), of which no member is claimed. A claimed VF's group is never
/// probed: the open is exclusive, so the probe could make QEMU's own fail.
#[must_use]
pub fn groups_to_probe(vfs: &[VfFacts], holders: &[Holder]) -> Vec<u32> {
    let claimed = |vf: &VfFacts| holders.iter().any(|holder| holder.vf_index == vf.index);
    let taken: Vec<u32> = vfs
        .iter()
        .filter(|vf| claimed(vf))
        .filter_map(|vf| vf.iommu_group)
        .collect();
    let mut groups: Vec<u32> = vfs
        .iter()
        .filter(|vf| vf.driver.as_deref().is_none_or(|driver| driver == VFIO_PCI))
        .filter_map(|vf| vf.iommu_group)
        .filter(|group| !taken.contains(group))
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

impl PfView {
    /// Whether VFs of it may be made and taken away: an administrator has given consent, the
    /// host does not use it, and its set-up is one that serves.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.managed && self.facts.in_use_by_host.is_none() && self.unserviceable.is_none()
    }

    #[must_use]
    pub fn new(mut input: PfInput) -> Self {
        let resize = input.resize.take().map(|mut last| {
            let entered = |uid: &String| input.withheld.iter().any(|vf| vf.claim.uid == *uid);
            last.destroyed.retain(entered);
            last
        });
        input.withheld = withheld_in_force(&input.withheld, resize.as_ref());
        let mut vfs: Vec<VfView> = input.vfs.iter().map(|vf| view(vf, &input)).collect();
        for holder in &input.holders {
            if !vfs.iter().any(|vf| vf.index == holder.vf_index) {
                vfs.push(promised(holder.vf_index, &input.holders));
            }
        }
        vfs.sort_by_key(|vf| vf.index);
        let driver = driver_for(&input.facts);
        Self {
            capabilities: driver.map(|driver| driver.capabilities(&input.facts)),
            unserviceable: driver.and_then(|driver| driver.unserviceable(&input.facts)),
            name: input.name,
            managed: input.managed,
            desired: input.desired,
            withheld: input.withheld,
            resize,
            resizing: input.resizing,
            stuck: input.stuck.get(&input.facts.address).copied(),
            namespaces: input.namespaces,
            facts: input.facts,
            vfs,
        }
    }

    /// VFs that exist.
    pub fn existing(&self) -> impl Iterator<Item = &VfView> {
        self.vfs.iter().filter(|vf| vf.address.is_some())
    }

    /// The claims on this PF.
    pub fn holders(&self) -> impl Iterator<Item = &Holder> {
        self.vfs.iter().flat_map(|vf| &vf.holders)
    }

    /// VFs by state.
    #[must_use]
    pub fn counts(&self) -> VfCounts {
        let count = |state| {
            let vfs = self.vfs.iter().filter(|vf| vf.state == state).count();
            u16::try_from(vfs).unwrap_or(u16::MAX)
        };
        VfCounts {
            free: count(VfState::Free),
            allocated: count(VfState::Allocated),
            attached: count(VfState::Attached),
            foreign: count(VfState::Foreign),
            broken: count(VfState::Broken),
            retired: count(VfState::Retired),
        }
    }

    /// Why an existing VF cannot go to this VM for the sake of its IOMMU group:
    /// a member that is no VF of this PF, or one that is another VM's.
    #[must_use]
    pub fn group_conflict(&self, vf: &VfView, vm_uid: &str) -> Option<GroupConflict> {
        if vf.iommu_group.is_none() {
            return Some(GroupConflict::NoIommu);
        }
        let others = vf
            .group_members
            .iter()
            .filter(|member| Some(**member) != vf.address);
        for member in others {
            let Some(other) = self.vfs.iter().find(|vf| vf.address == Some(*member)) else {
                return Some(GroupConflict::Stranger(*member));
            };
            if matches!(
                other.state,
                VfState::Foreign | VfState::Broken | VfState::Retired
            ) || other.holders.iter().any(|holder| holder.vm_uid != vm_uid)
            {
                return Some(GroupConflict::OtherUser(*member));
            }
        }
        None
    }
}

/// What in its IOMMU group keeps a VF from a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupConflict {
    NoIommu,
    /// Not a VF of this PF.
    Stranger(PciAddress),
    /// A VF of this PF that another VM or somebody else has.
    OtherUser(PciAddress),
}

fn promised(index: u16, holders: &[Holder]) -> VfView {
    let holders = named(index, holders);
    VfView {
        index,
        address: None,
        driver: None,
        iommu_group: None,
        group_members: Vec::new(),
        state: claimed_state(&holders),
        foreign: None,
        withheld: None,
        holders,
        mac: None,
    }
}

fn named(index: u16, holders: &[Holder]) -> Vec<Holder> {
    holders
        .iter()
        .filter(|holder| holder.vf_index == index)
        .cloned()
        .collect()
}

fn claimed_state(holders: &[Holder]) -> VfState {
    if holders.iter().any(|holder| holder.attached) {
        VfState::Attached
    } else {
        VfState::Allocated
    }
}

fn view(vf: &VfFacts, input: &PfInput) -> VfView {
    let holders = named(vf.index, &input.holders);
    let stuck = |function| input.stuck.contains_key(function);
    let broken = stuck(&vf.address) || stuck(&input.facts.address);
    let foreign = if holders.is_empty() && !broken {
        foreign_reason(vf, input)
    } else {
        None
    };
    let withheld = input
        .withheld
        .iter()
        .find(|entry| entry.vf_index == vf.index && holders.is_empty() && !broken)
        .map(|entry| entry.reason);
    let state = match &foreign {
        _ if broken => VfState::Broken,
        _ if withheld.is_some() => VfState::Retired,
        Some(_) => VfState::Foreign,
        None if holders.is_empty() => VfState::Free,
        None => claimed_state(&holders),
    };
    VfView {
        index: vf.index,
        address: Some(vf.address),
        driver: vf.driver.clone(),
        iommu_group: vf.iommu_group,
        group_members: vf.group_members.clone(),
        state,
        foreign,
        withheld,
        holders,
        mac: input.macs.get(&vf.index).copied(),
    }
}

/// Free is proven or it is foreign: driverless with a group that nobody has
/// open, or on vfio-pci with a group that opens; and nobody but VFs of this PF in the group.
fn foreign_reason(vf: &VfFacts, input: &PfInput) -> Option<ForeignReason> {
    let Some(group) = vf.iommu_group else {
        return Some(ForeignReason::NoIommu);
    };
    let ours = |member: &PciAddress| input.vfs.iter().any(|vf| vf.address == *member);
    if let Some(stranger) = vf.group_members.iter().find(|member| !ours(member)) {
        return Some(ForeignReason::Stranger(*stranger));
    }
    if let Some(nsid) = namespace_of(&input.namespaces, vf.index) {
        return Some(ForeignReason::Namespace(nsid));
    }
    match vf.driver.as_deref() {
        None => match input.probes.get(&group) {
            Some(GroupProbe::Busy) => Some(ForeignReason::HeldOpen(group)),
            Some(GroupProbe::Unknown(why)) => Some(ForeignReason::NotProven(why.clone())),
            Some(GroupProbe::Free | GroupProbe::NoDevice) | None => None,
        },
        Some(VFIO_PCI) => match input.probes.get(&group) {
            Some(GroupProbe::Free) => None,
            Some(GroupProbe::Busy) => Some(ForeignReason::HeldOpen(group)),
            Some(GroupProbe::NoDevice) => {
                Some(ForeignReason::NotProven("its group has no node".to_owned()))
            }
            Some(GroupProbe::Unknown(why)) => Some(ForeignReason::NotProven(why.clone())),
            // Not probed, because a member of the group is claimed. A VM that has the group may
            // have this VF too, of a claim whose record was lost.
            None if shares_a_claim(vf, input, |holder| holder.attached) => Some(
                ForeignReason::NotProven("its group is in use by a claim's VM".to_owned()),
            ),
            // Whoever has the group is that claim's VM, and only it may get this VF.
            None if shares_a_claim(vf, input, |_| true) => None,
            None => Some(ForeignReason::NotProven("not probed".to_owned())),
        },
        Some(other) => Some(ForeignReason::Driver(other.to_owned())),
    }
}

fn shares_a_claim(vf: &VfFacts, input: &PfInput, such: impl Fn(&Holder) -> bool) -> bool {
    input.vfs.iter().any(|other| {
        other.iommu_group == vf.iommu_group
            && input
                .holders
                .iter()
                .any(|holder| holder.vf_index == other.index && such(holder))
    })
}
