//! How many VFs are left of each class, by host node: what the node agents report of their PFs,
//! added up. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use common::api::{
    ConditionStatus, NodeCapacity, PhysicalFunction, PhysicalFunctionStatus, VFClass, VFClassSpec,
    VFClassStatus, VfCounts, condition, type_,
};
use kube::ResourceExt as _;

use super::admit::defaults;
use crate::driver::supports;
use crate::node::pool::{Traits, selects_traits, wanted_config};

/// The API's bound on `VFClass.status.nodes`.
const MOST_NODES: usize = 1024;

/// Labels of the host's nodes, by name.
pub type Nodes = BTreeMap<String, BTreeMap<String, String>>;

/// VFs that are left of each class, by the class's UID.
pub type Totals = BTreeMap<String, u32>;

/// What is left of a class. A node that the cluster does not have counts for nothing, whatever
/// objects are left of it.
#[must_use]
pub fn capacity(class: &VFClass, functions: &[&PhysicalFunction], nodes: &Nodes) -> VFClassStatus {
    let mut free: BTreeMap<&str, u32> = BTreeMap::new();
    for pf in functions {
        let labels = nodes.get(&pf.spec.node_name);
        let status = pf.status.as_ref().filter(|status| serves(pf, status));
        let (Some(labels), Some(status)) = (labels, status) else {
            continue;
        };
        if selects_traits(&class.spec.pf_selector, labels, traits(status))
            && can_do(&class.spec, status)
        {
            let node = free.entry(&pf.spec.node_name).or_default();
            *node = node.saturating_add(left(pf, status, &class.spec).into());
        }
    }
    let total = free.values().fold(0_u32, |sum, n| sum.saturating_add(*n));
    let mut nodes: Vec<NodeCapacity> = free
        .into_iter()
        .map(|(name, free)| NodeCapacity {
            name: name.to_owned(),
            free,
        })
        .collect();
    if nodes.len() > MOST_NODES {
        nodes.sort_by(|a, b| (Reverse(a.free), &a.name).cmp(&(Reverse(b.free), &b.name)));
        nodes.truncate(MOST_NODES);
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
    }
    VFClassStatus {
        free: Some(total),
        nodes,
        observed_generation: class.metadata.generation,
    }
}

/// What is left of every class, by its UID. A class that is going has no claims to come.
#[must_use]
pub fn capacities<'a>(
    classes: &[&'a VFClass],
    functions: &[&PhysicalFunction],
    nodes: &Nodes,
) -> Vec<(&'a VFClass, VFClassStatus)> {
    let staying = |class: &&&VFClass| class.metadata.deletion_timestamp.is_none();
    let counted = |class: &&'a VFClass| (*class, capacity(class, functions, nodes));
    classes.iter().filter(staying).map(counted).collect()
}

/// The totals of what is left of each class.
#[must_use]
pub fn totals(capacities: &[(&VFClass, VFClassStatus)]) -> Totals {
    let total = |(class, status): &(&VFClass, VFClassStatus)| Some((class.uid()?, status.free?));
    capacities.iter().filter_map(total).collect()
}

/// Whether the PF serves claims, as an administrator wants it and its agent reports it.
fn serves(pf: &PhysicalFunction, status: &PhysicalFunctionStatus) -> bool {
    let ready = condition(&status.conditions, type_::READY);
    pf.spec.managed
        && pf.metadata.deletion_timestamp.is_none()
        && ready.is_some_and(|c| c.status == ConditionStatus::True.as_str())
}

fn traits(status: &PhysicalFunctionStatus) -> Traits<'_> {
    Traits {
        driver: status.driver.as_deref(),
        vendor: status.vendor_id.as_deref(),
        device: status.device_id.as_deref(),
        address: status.pci_address.as_deref(),
        interface: status.interface_name.as_deref(),
    }
}

/// Whether a claim that asks for nothing gets a VF of it: what its driver lacks of the class's
/// defaults makes it none of this class's.
fn can_do(class: &VFClassSpec, status: &PhysicalFunctionStatus) -> bool {
    let Some(can) = &status.capabilities else {
        return false;
    };
    if class.storage.is_some() || can.namespaces {
        return class.storage.is_some() && can.namespaces;
    }
    let driver = status.driver.as_deref().unwrap_or_default();
    let want = wanted_config(&defaults(&class.network, ""));
    want.is_ok_and(|want| supports(driver, can, &want).is_ok())
}

/// VFs of the PF that a claim of the class could get. Of a class of NVMe namespaces no more than
/// it has namespaces beside those that somebody may have: each claim of the PF has one, which
/// need not be of this class, so it may be some more in truth.
fn left(pf: &PhysicalFunction, status: &PhysicalFunctionStatus, class: &VFClassSpec) -> u16 {
    let vfs = vfs_left(pf, status, class);
    let Some(storage) = &class.storage else {
        return vfs;
    };
    let all = u16::try_from(storage.namespaces.len()).unwrap_or(u16::MAX);
    let counts = &status.counts;
    let had = counts.allocated.saturating_add(counts.attached);
    vfs.min(all.saturating_sub(had))
}

/// The free ones; where it has none, those that it would be given and that are promised to
/// nobody.
fn vfs_left(pf: &PhysicalFunction, status: &PhysicalFunctionStatus, class: &VFClassSpec) -> u16 {
    if status.num_vfs > 0 {
        return status.counts.free;
    }
    let total = status.total_vfs;
    let size = pf
        .spec
        .num_vfs
        .or(class.num_vfs)
        .unwrap_or(total)
        .min(total);
    let VfCounts {
        allocated,
        attached,
        ..
    } = status.counts;
    let withheld = u16::try_from(pf.withheld().len()).unwrap_or(u16::MAX);
    size.saturating_sub(allocated)
        .saturating_sub(attached)
        .saturating_sub(withheld)
}

#[cfg(test)]
#[path = "capacity_tests.rs"]
mod tests;
