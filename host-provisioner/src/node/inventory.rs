//! From what the kernel says to what the API shows: `PhysicalFunction` objects
//! and `SriovNode`. Pure: no client, no clock.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use common::api::{
    ConditionStatus, IommuStatus, NewCondition, PhysicalFunctionSpec, PhysicalFunctionStatus,
    SriovNodeStatus, VfStatus, reason, set_condition, type_,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use sha2::{Digest as _, Sha256};

use crate::kernel::{NodeFacts, PfFacts};

use super::pool::{Change, ForeignReason, Holder, PfView, Resize, claims_words, resize};

/// The API's bound on `status.vfs`.
const MOST_VFS: usize = 256;
/// The longest name of an object (RFC 1123 subdomain).
const MOST_NAME: usize = 253;

/// Name of the object of this piece of hardware on this node.
///
/// The node's name is cut where both do not fit; the hash keeps names apart
/// within a node, and `spec.nodeName` says whose it is.
#[must_use]
pub fn physical_function_name(node: &str, identity: &str) -> String {
    let hash: String = Sha256::digest(identity.as_bytes())
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let room = MOST_NAME - hash.len() - 1;
    let node: String = node.chars().take(room).collect();
    let node = node.trim_end_matches(['-', '.']);
    format!("{node}-{hash}")
}

/// The objects that a node is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// By object name.
    pub functions: BTreeMap<String, PfFacts>,
    /// Hardware that gets no object, a sentence each: what cannot be told apart, because consent
    /// for one would be consent for the other; and, where there is nothing else, what cannot say
    /// who it is before it has a driver.
    pub left_out: Vec<String>,
}

/// Which object stands for which function of this node.
#[must_use]
pub fn inventory(node: &str, pfs: &[PfFacts]) -> Inventory {
    let mut by_name: BTreeMap<String, Vec<&PfFacts>> = BTreeMap::new();
    // Its driver will bring a MAC address, and with it another identity.
    let (nameless, named): (Vec<_>, Vec<_>) = pfs
        .iter()
        .partition(|pf| pf.driver.is_none() && pf.serial.is_none());
    for pf in named {
        let name = physical_function_name(node, &pf.identity);
        by_name.entry(name).or_default().push(pf);
    }
    let mut found = Inventory::default();
    for (name, same) in by_name {
        if let [one] = same.as_slice() {
            found.functions.insert(name, (*one).clone());
            continue;
        }
        let addresses: Vec<String> = same.iter().map(|pf| pf.address.to_string()).collect();
        let identity = same.first().map_or("", |pf| pf.identity.as_str());
        found.left_out.push(format!(
            "the functions {} say of themselves the same ({identity}), so they cannot be told \
             apart and are left alone; give each a serial number or MAC address of its own",
            addresses.join(" and ")
        ));
    }
    if found.functions.is_empty() && !nameless.is_empty() {
        let what = |pf: &&PfFacts| format!("{} ({}:{})", pf.address, pf.vendor, pf.device);
        let what: Vec<String> = nameless.iter().map(what).collect();
        found.left_out.push(format!(
            "Without a kernel driver nothing is known of {}: load it, for example by a HostDriver.",
            what.join(", ")
        ));
    }
    found
}

/// The spec that the agent makes an object with: not managed. Hardware is
/// never taken over unasked.
#[must_use]
pub fn new_spec(node: &str, pf: &PfFacts) -> PhysicalFunctionSpec {
    PhysicalFunctionSpec {
        node_name: node.to_owned(),
        identity: pf.identity.clone(),
        managed: false,
        num_vfs: None,
        withheld: Vec::new(),
    }
}

/// What the report of a PF depends on beside its view.
#[derive(Clone, Debug, Default)]
pub struct About<'a> {
    /// Those that the object has now.
    pub conditions: &'a [Condition],
    /// `metadata.generation` of the spec that the view is about.
    pub generation: Option<i64>,
    /// Why the number of VFs could not be changed.
    pub resize_failed: Option<String>,
}

/// The report of one PF.
#[must_use]
pub fn function_status(view: &PfView, about: About<'_>, now: &Time) -> PhysicalFunctionStatus {
    let facts = &view.facts;
    let mut conditions = about.conditions.to_vec();
    let resized = resized(view, about.resize_failed);
    if resized.is_none() {
        conditions.retain(|c| c.type_ != type_::RESIZED);
    }
    for new in [ready(view), in_use_by_host(facts)]
        .into_iter()
        .chain(resized)
    {
        set_condition(&mut conditions, &new, about.generation, now);
    }
    PhysicalFunctionStatus {
        pci_address: Some(facts.address.to_string()),
        vendor_id: Some(facts.vendor.to_string()),
        device_id: Some(facts.device.to_string()),
        driver: facts.driver.clone(),
        interface_name: facts.interface.clone(),
        mac_address: facts.mac.map(|mac| mac.to_string()),
        numa_node: facts.numa_node,
        iommu_group: facts.iommu_group,
        total_vfs: facts.total_vfs,
        num_vfs: facts.num_vfs,
        capabilities: view.capabilities.map(|can| can.settings),
        counts: view.counts(),
        resize: view.resize.clone(),
        vfs: vfs(view),
        conditions,
    }
}

/// The report of an object whose hardware is not there any more. What was last
/// known stays; a VF count of a card that is gone would be a lie.
#[must_use]
pub fn absent_status(
    last: &PhysicalFunctionStatus,
    generation: Option<i64>,
    now: &Time,
) -> PhysicalFunctionStatus {
    let mut status = PhysicalFunctionStatus {
        num_vfs: 0,
        counts: common::api::VfCounts::default(),
        vfs: Vec::new(),
        ..last.clone()
    };
    let gone = NewCondition::new(
        type_::READY,
        ConditionStatus::False,
        reason::NOT_PRESENT,
        "no function of this node has this identity: the card was taken out, changed, or has no \
         driver that tells its address; delete this object when it will not come back",
    );
    set_condition(&mut status.conditions, &gone, generation, now);
    status
}

fn vfs(view: &PfView) -> Vec<VfStatus> {
    let entry = |vf: &super::pool::VfView| {
        Some(VfStatus {
            index: vf.index,
            pci_address: vf.address?.to_string(),
            state: vf.state,
            claim_ref: vf.holders.first().map(|holder| holder.claim.clone()),
            iommu_group: vf.iommu_group,
        })
    };
    view.vfs.iter().filter_map(entry).take(MOST_VFS).collect()
}

fn in_use_by_host(facts: &PfFacts) -> NewCondition {
    match &facts.in_use_by_host {
        Some(words) => NewCondition::new(
            type_::IN_USE_BY_HOST,
            ConditionStatus::True,
            reason::IN_USE_BY_HOST,
            format!("{}: {words}; it is never written to", hosts_own(facts)),
        ),
        None => NewCondition::new(
            type_::IN_USE_BY_HOST,
            ConditionStatus::False,
            reason::NOT_IN_USE,
            match facts.interface {
                Some(_) => "no default route, no address and no bond or bridge on it",
                None => "it has no network interface, and no namespace of it is the host's",
            },
        ),
    }
}

/// What of a PF is the host's, for a sentence.
fn hosts_own(facts: &PfFacts) -> &'static str {
    match facts.interface {
        Some(_) => "the host's own traffic",
        None => "the host's own storage",
    }
}

/// Whether claims can be served from this PF.
fn ready(view: &PfView) -> NewCondition {
    let no = |reason: &str, message: String| {
        NewCondition::new(type_::READY, ConditionStatus::False, reason, message)
    };
    let facts = &view.facts;
    if let Some(words) = &facts.in_use_by_host {
        let refused = if view.managed {
            "; managed is set and refused"
        } else {
            ""
        };
        return no(
            reason::IN_USE_BY_HOST,
            format!("it carries {}: {words}{refused}", hosts_own(facts)),
        );
    }
    if let Some(stuck) = view.stuck {
        return no(
            reason::BROKEN,
            format!(
                "the kernel has not come back from a change of its VFs; process {} of the host \
                 waits for it. End what uses them, or restart the host",
                stuck.pid
            ),
        );
    }
    if view.capabilities.is_none() {
        let driver = facts.driver.as_deref().unwrap_or("none");
        return no(
            reason::UNSUPPORTED_DRIVER,
            format!("its kernel driver is {driver}, for which there is no backend"),
        );
    }
    if let Some(words) = view.unserviceable {
        return no(reason::UNSUPPORTED_DRIVER, words.to_owned());
    }
    if !view.managed {
        return no(
            reason::NOT_MANAGED,
            "an administrator can give consent by setting spec.managed to true".to_owned(),
        );
    }
    if let Some(why) = not_isolated(view) {
        return no(reason::NOT_ISOLATED, why);
    }
    NewCondition::new(
        type_::READY,
        ConditionStatus::True,
        reason::READY,
        pool_words(view),
    )
}

/// Whether the number of VFs is as it is to be; `None` where nothing is done about it.
fn resized(view: &PfView, failed: Option<String>) -> Option<NewCondition> {
    if !view.is_ours() || view.capabilities.is_none() {
        return None;
    }
    let no = |reason: &str, message: String| {
        NewCondition::new(type_::RESIZED, ConditionStatus::False, reason, message)
    };
    Some(match resize(view) {
        Resize::Keep | Resize::Settle(_) => NewCondition::new(
            type_::RESIZED,
            ConditionStatus::True,
            reason::RESIZED,
            "no change of the number of VFs is due",
        ),
        Resize::Apply(change) => {
            let mut words = format!("going from {} VFs to {}", change.from, change.to);
            if let Some(failed) = failed {
                words += &format!("; it is tried again: {failed}");
            }
            no(reason::RESIZING, words)
        }
        Resize::Pending {
            change,
            holders,
            retained,
            foreign,
        } => no(
            reason::IN_USE,
            waits_words(&change, &holders, &retained, foreign),
        ),
    })
}

fn waits_words(change: &Change, holders: &[Holder], retained: &[u16], foreign: usize) -> String {
    let mut words = format!(
        "{} VFs are wanted and there are {}; the number can change only while none of them is in use",
        change.to, change.from
    );
    if !holders.is_empty() {
        words += &format!("; held by {}", claims_words(holders));
    }
    if !retained.is_empty() {
        let indexes: Vec<String> = retained.iter().map(ToString::to_string).collect();
        words += &format!(
            "; retained until taken out of spec.withheld: VF {}",
            indexes.join(", ")
        );
    }
    if foreign > 0 {
        words += &format!("; {foreign} in use by something else on the host");
    }
    words
}

/// Set when not one VF, or the PF while it has none, is isolated.
fn not_isolated(view: &PfView) -> Option<String> {
    if view.facts.iommu_group.is_none() {
        return Some(
            "it is in no IOMMU group; turn on the IOMMU (firmware, and intel_iommu=on or \
             amd_iommu=on on the kernel command line)"
                .to_owned(),
        );
    }
    let mut stranger = None;
    for vf in view.existing() {
        match &vf.foreign {
            Some(ForeignReason::Stranger(member)) => stranger = Some((vf.index, *member)),
            _ => return None,
        }
    }
    let (index, member) = stranger?;
    Some(format!(
        "VF {index}, and every other, shares its IOMMU group with {member}; put the card below a \
         port that isolates (ACS)"
    ))
}

fn pool_words(view: &PfView) -> String {
    let counts = view.counts();
    let mut words = format!(
        "{} of {} VFs exist: {} free, {} allocated, {} attached, {} foreign",
        view.facts.num_vfs,
        view.facts.total_vfs,
        counts.free,
        counts.allocated,
        counts.attached,
        counts.foreign
    );
    if counts.broken > 0 {
        words += &format!(
            ", {} broken: the kernel has not come back from a write about them",
            counts.broken
        );
    }
    if counts.retired > 0 {
        words += &format!(", {} withheld", counts.retired);
    }
    if let Some(asked) = view.desired.filter(|asked| *asked > view.facts.total_vfs) {
        words += &format!(
            "; numVFs asks for {asked}, the device can have {}",
            view.facts.total_vfs
        );
    }
    let doubled: Vec<String> = view
        .vfs
        .iter()
        .filter(|vf| vf.holders.len() > 1)
        .map(|vf| vf.index.to_string())
        .collect();
    if !doubled.is_empty() {
        words += &format!("; more than one claim names VF {}", doubled.join(", "));
    }
    words
}

/// What keeps the node from serving claims, a sentence each, with what to do.
#[must_use]
pub fn missing(facts: &NodeFacts, found: &Inventory) -> Vec<String> {
    let mut missing = Vec::new();
    if facts.iommu_groups == 0 {
        missing.push(
            "The kernel has no IOMMU groups: turn on VT-d or AMD-Vi in the firmware, and \
             intel_iommu=on or amd_iommu=on on the kernel command line."
                .to_owned(),
        );
    }
    if !facts.vfio_pci {
        missing.push(
            "The driver vfio-pci is not there: load its module (modprobe vfio-pci).".to_owned(),
        );
    }
    if !facts.vfio_container {
        missing.push(
            "There is no /dev/vfio/vfio: load the module vfio_iommu_type1, and mount the host's \
             /dev into the node agent."
                .to_owned(),
        );
    }
    if found.functions.is_empty() {
        missing.push(
            "No PCI function of this host can have virtual functions: turn on SR-IOV in the \
             firmware, and load the card's driver."
                .to_owned(),
        );
    }
    missing.extend(found.left_out.iter().cloned());
    missing
}

/// The node's report. `conditions` are those that the object has now.
#[must_use]
pub fn node_status(
    facts: &NodeFacts,
    found: &Inventory,
    agent_version: &str,
    conditions: &[Condition],
    now: &Time,
) -> SriovNodeStatus {
    let missing = missing(facts, found);
    let mut conditions = conditions.to_vec();
    let ready = match missing.first() {
        None => NewCondition::new(
            type_::READY,
            ConditionStatus::True,
            reason::READY,
            format!("{} physical functions", found.functions.len()),
        ),
        Some(first) => NewCondition::new(
            type_::READY,
            ConditionStatus::False,
            reason::PREREQUISITES_MISSING,
            first.clone(),
        ),
    };
    set_condition(&mut conditions, &ready, None, now);
    SriovNodeStatus {
        kernel_version: Some(facts.kernel_release.clone()),
        agent_version: Some(agent_version.to_owned()),
        boot_id: Some(facts.boot_id.clone()),
        iommu: IommuStatus {
            enabled: facts.iommu_groups > 0,
            groups: facts.iommu_groups,
        },
        lockdown: facts.lockdown.clone(),
        missing,
        drivers: Vec::new(),
        conditions,
    }
}
