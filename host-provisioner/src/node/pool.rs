//! The VF pool: which VF a claim gets, and when the number of VFs may change.
//! Pure: no I/O, no clock.
//!
//! Two rules are never broken here, whatever comes in: a VF that a claim names
//! goes to no other claim, and VFs are made or taken away by count only while
//! none of that PF's is in use (`sriov_numvfs` goes 0 -> N or N -> 0 only, and
//! the kernel does not ask who uses them).

mod claim;
mod rank;
mod refusal;
mod resize;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;

use common::api::{PfSelector, VfState};
use common::pci::PciAddress;

use crate::driver::Growth;
use crate::kernel::{PfFacts, VFIO_PCI};

pub use claim::{GrantError, Holder, Wish, WishError, granted_config, wanted_config};
use rank::Rank;
pub use refusal::{MacUser, NoChoice, NoNamespace, Refusal, claims_words};
pub use resize::{Change, Resize, resize};
pub use view::{
    ForeignReason, GroupConflict, GroupProbe, PfInput, PfView, VfView, groups_to_probe,
};

/// The VF for a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Name of the `PhysicalFunction` object.
    pub physical_function: String,
    pub pf: PciAddress,
    pub vf_index: u16,
    /// Absent while the VF does not exist.
    pub address: Option<PciAddress>,
    /// Where the claim asks for one.
    pub namespace: Option<u32>,
    /// Make VFs first, so that there are this many.
    pub create: Option<u16>,
}

/// What a class's selector asks of a PF; `None` is not known and matches no list.
#[derive(Clone, Copy, Debug)]
pub struct Traits<'a> {
    pub driver: Option<&'a str>,
    pub vendor: Option<&'a str>,
    pub device: Option<&'a str>,
    pub address: Option<&'a str>,
    pub interface: Option<&'a str>,
}

/// Whether a class's selector takes a PF with these traits, of a node with these labels.
#[must_use]
pub fn selects_traits(
    selector: &PfSelector,
    labels: &BTreeMap<String, String>,
    pf: Traits<'_>,
) -> bool {
    let any = |list: &[String], value: Option<&str>| {
        list.is_empty() || value.is_some_and(|value| list.iter().any(|entry| entry == value))
    };
    any(&selector.drivers, pf.driver)
        && any(&selector.vendor_ids, pf.vendor)
        && any(&selector.device_ids, pf.device)
        && any(&selector.pci_addresses, pf.address)
        && any(&selector.interface_names, pf.interface)
        && selector
            .node_selector
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a class's selector takes this PF of a node with these labels.
#[must_use]
pub fn selects(selector: &PfSelector, labels: &BTreeMap<String, String>, pf: &PfFacts) -> bool {
    let (vendor, device) = (pf.vendor.to_string(), pf.device.to_string());
    let address = pf.address.to_string();
    let traits = Traits {
        driver: pf.driver.as_deref(),
        vendor: Some(&vendor),
        device: Some(&device),
        address: Some(&address),
        interface: pf.interface.as_deref(),
    };
    selects_traits(selector, labels, traits)
}

/// Chooses a VF. A claim that has one gets the same again.
///
/// Of several PFs one near the VM's CPUs goes first, and then the granted placement says which
/// (`rank`). On that PF existing free VFs go before making new ones; VFs that are on vfio-pci
/// already go first, they save the bind.
///
/// # Errors
/// [`NoChoice`] with the reason of every PF that the selector takes.
pub fn choose(pfs: &[PfView], wish: &Wish) -> Result<Choice, NoChoice> {
    if let Some(kept) = pfs.iter().find_map(|pf| kept(pf, wish)) {
        return Ok(kept);
    }
    let mut best: Option<(Rank<'_>, Choice)> = None;
    let mut refusals = Vec::new();
    for pf in pfs {
        if !selects(&wish.selector, &wish.node_labels, &pf.facts) {
            continue;
        }
        match offer(pf, wish) {
            Ok(choice) => {
                let rank = Rank::of(pf, wish, &choice);
                if best.as_ref().is_none_or(|(found, _)| rank < *found) {
                    best = Some((rank, choice));
                }
            }
            Err(refusal) => refusals.push((pf.name.clone(), refusal)),
        }
    }
    match best {
        Some((_, choice)) => Ok(choice),
        None => Err(NoChoice {
            namespace: wish.claim.namespace.clone(),
            seen: pfs.len(),
            refusals,
        }),
    }
}

/// The VF that this claim has already.
fn kept(pf: &PfView, wish: &Wish) -> Option<Choice> {
    let holds = |vf: &&VfView| vf.holders.iter().any(|h| h.claim.uid == wish.claim.uid);
    let vf = pf.vfs.iter().find(holds)?;
    let create = match vf.address {
        Some(_) => None,
        None => creation(pf, wish, vf.index),
    };
    let own = vf.holders.iter().find(|h| h.claim.uid == wish.claim.uid);
    let choice = choice(pf, vf.index, vf.address, create);
    Some(Choice {
        namespace: own.and_then(|own| own.namespace),
        ..choice
    })
}

fn choice(pf: &PfView, vf_index: u16, address: Option<PciAddress>, create: Option<u16>) -> Choice {
    Choice {
        physical_function: pf.name.clone(),
        pf: pf.facts.address,
        vf_index,
        address,
        namespace: None,
        create,
    }
}

/// The namespace that this PF has for the claim: the first of those that it may have that exists
/// and that nobody has, neither by a claim nor by a controller. One that a controller still has
/// was not erased.
fn namespace(pf: &PfView, wish: &Wish) -> Result<Option<u32>, Refusal> {
    let Some(allowed) = &wish.namespaces else {
        return Ok(None);
    };
    let mut none = NoNamespace::default();
    for nsid in allowed {
        let holder = pf.holders().find(|holder| holder.namespace == Some(*nsid));
        match (holder, pf.namespaces.get(nsid)) {
            (Some(holder), _) => none.claimed.push((*nsid, holder.clone())),
            (None, None) => none.absent.push(*nsid),
            (None, Some(users)) if !users.is_empty() => none.attached.push(*nsid),
            (None, Some(_)) => return Ok(Some(*nsid)),
        }
    }
    Err(Refusal::NoNamespace(none))
}

/// The VF that this PF has for the claim, or why it has none.
fn offer(pf: &PfView, wish: &Wish) -> Result<Choice, Refusal> {
    if !pf.managed {
        return Err(Refusal::NotManaged);
    }
    if let Some(words) = &pf.facts.in_use_by_host {
        return Err(Refusal::InUseByHost(words.clone()));
    }
    if let Some(stuck) = pf.stuck {
        return Err(Refusal::Stuck(stuck));
    }
    if pf.resizing {
        return Err(Refusal::Resizing);
    }
    let Some(capabilities) = pf.capabilities else {
        return Err(Refusal::NoBackend(pf.facts.driver.clone()));
    };
    if let Some(words) = pf.unserviceable {
        return Err(Refusal::Unserviceable(words));
    }
    capabilities
        .supports(&wish.config)
        .map_err(Refusal::Unsupported)?;
    if let Some(by) = mac_user(pf, wish) {
        let mac = wish.config.mac;
        return Err(Refusal::MacInUse { mac, by });
    }
    let namespace = namespace(pf, wish)?;
    let choice = match free_vf(pf, wish) {
        Ok(Some(vf)) => Ok(choice(pf, vf.index, vf.address, None)),
        // An isolated VF may still be made where the existing ones are not.
        Err(conflict) => {
            new_vf(pf, wish, capabilities.growth).map_err(|_| Refusal::NotIsolated(conflict))
        }
        Ok(None) => new_vf(pf, wish, capabilities.growth),
    }?;
    Ok(Choice {
        namespace,
        ..choice
    })
}

/// Who has the wished MAC on this PF's wire.
fn mac_user(pf: &PfView, wish: &Wish) -> Option<MacUser> {
    let mac = wish.config.mac;
    if mac.is_zero() {
        return None;
    }
    if [pf.facts.mac, pf.facts.permanent_mac].contains(&Some(mac)) {
        return Some(MacUser::Host);
    }
    if let Some(holder) = pf.holders().find(|holder| holder.mac == Some(mac)) {
        return Some(MacUser::Claim(Box::new(holder.clone())));
    }
    others(pf)
        .find(|vf| vf.mac == Some(mac))
        .map(|vf| MacUser::Foreign(vf.index))
}

/// A free VF that may go to this VM; an error when there are free ones, or ones
/// that only their group keeps from being free, and none may.
fn free_vf<'a>(pf: &'a PfView, wish: &Wish) -> Result<Option<&'a VfView>, GroupConflict> {
    let mut conflict = None;
    let mut found: Option<&VfView> = None;
    let cold = |vf: &VfView| vf.driver.as_deref() != Some(VFIO_PCI);
    for vf in pf.existing().filter(|vf| vf.holders.is_empty()) {
        match (&vf.foreign, vf.state) {
            (Some(ForeignReason::Stranger(member)), _) => {
                conflict = Some(GroupConflict::Stranger(*member));
            }
            (Some(ForeignReason::NoIommu), _) => conflict = Some(GroupConflict::NoIommu),
            (None, VfState::Free) => match pf.group_conflict(vf, &wish.vm_uid) {
                Some(why) => conflict = Some(why),
                None if found.is_none_or(|best| !cold(vf) && cold(best)) => found = Some(vf),
                None => {}
            },
            _ => {}
        }
    }
    match (found, conflict) {
        (Some(vf), _) => Ok(Some(vf)),
        (None, Some(conflict)) => Err(conflict),
        (None, None) => Ok(None),
    }
}

/// A VF to be made, where the backend can make one now.
fn new_vf(pf: &PfView, wish: &Wish, growth: Growth) -> Result<Choice, Refusal> {
    let existing = pf.existing().count();
    let may_grow = match growth {
        Growth::AllAtOnce => pf.facts.num_vfs == 0 && existing == 0,
        Growth::OneByOne => existing < usize::from(pool_size(pf, wish)),
    };
    let limit = match growth {
        Growth::AllAtOnce => pool_size(pf, wish),
        Growth::OneByOne => pf.facts.total_vfs,
    };
    let taken = |index: u16| {
        pf.vfs.iter().any(|vf| vf.index == index)
            || pf.withheld.iter().any(|entry| entry.vf_index == index)
    };
    let index = (0..limit).find(|index| !taken(*index));
    let Some(index) = index.filter(|_| may_grow) else {
        return Err(no_free_vf(pf));
    };
    if pf.facts.iommu_group.is_none() {
        return Err(Refusal::NotIsolated(GroupConflict::NoIommu));
    }
    // Which of them share an IOMMU group is known when they exist; until then they are
    // promised to one VM alone.
    if growth == Growth::AllAtOnce && pf.holders().any(|holder| holder.vm_uid != wish.vm_uid) {
        return Err(Refusal::BeingMade);
    }
    let ours: Vec<PciAddress> = pf.existing().filter_map(|vf| vf.address).collect();
    let strangers: Vec<PciAddress> = pf
        .facts
        .group_members
        .iter()
        .copied()
        .filter(|member| !ours.contains(member))
        .collect();
    if let Some(conflict) = refusal::foreseen(pf.facts.address, &strangers) {
        return Err(Refusal::NotIsolated(conflict));
    }
    match creation(pf, wish, index) {
        Some(count) => Ok(choice(pf, index, None, Some(count))),
        None => Err(no_free_vf(pf)),
    }
}

/// How many VFs there are to be so that the one with this index exists; `None`
/// when they cannot be made now.
fn creation(pf: &PfView, wish: &Wish, index: u16) -> Option<u16> {
    let growth = pf.capabilities?.growth;
    let needed = index.checked_add(1)?;
    if needed > pf.facts.total_vfs {
        return None;
    }
    let existing = u16::try_from(pf.existing().count()).ok()?;
    match growth {
        Growth::AllAtOnce if pf.facts.num_vfs != 0 || existing != 0 => None,
        Growth::AllAtOnce => {
            // After a restart of the host claims may name indexes above the wish.
            let promised = pf.vfs.iter().map(|vf| vf.index.saturating_add(1)).max();
            let count = pool_size(pf, wish).max(promised.unwrap_or(0)).max(needed);
            Some(count.min(pf.facts.total_vfs))
        }
        Growth::OneByOne => existing.checked_add(1),
    }
}

/// The number of VFs that this PF is to have: its own wish, else the class's,
/// else as many as it can.
fn pool_size(pf: &PfView, wish: &Wish) -> u16 {
    let total = pf.facts.total_vfs;
    pf.desired.or(wish.num_vfs).unwrap_or(total).min(total)
}

fn no_free_vf(pf: &PfView) -> Refusal {
    Refusal::NoFreeVf {
        existing: pf.existing().count(),
        foreign: foreign(pf),
        withheld: usize::from(pf.counts().retired),
        total: pf.facts.total_vfs,
        holders: pf.holders().cloned().collect(),
    }
}

/// VFs that no claim names and that are not ours to give.
fn others(pf: &PfView) -> impl Iterator<Item = &VfView> {
    let unclaimed = pf.vfs.iter().filter(|vf| vf.holders.is_empty());
    unclaimed.filter(|vf| vf.state != VfState::Free)
}

/// VFs that somebody else on the host keeps from being free.
fn foreign(pf: &PfView) -> usize {
    others(pf).filter(|vf| vf.state != VfState::Retired).count()
}
