//! Which VF a claim gets: brings the kernel, the PF objects and the ledger
//! together for the pool's planner, and records its choice in the claim.

use std::collections::BTreeMap;

use common::api::{DeviceStatus, VFClaim, reason};
use common::kube::status;
use common::pci::PciAddress;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource as _};
use serde_json::json;

use super::agent::{Agent, MANAGER};
use super::attach::StepResult;
use super::error::ReconcileError;
use super::inventory;
use super::ledger::Ledger;
use super::near;
use super::plan::Wait;
use super::pool::{Choice, GroupProbe, Holder, PfInput, PfView, Wish, choose, groups_to_probe};
use super::vf::{self, VfError};
use crate::driver::{Namespaces, driver_for};
use crate::hypervisor::launcher::QemuProcess;
use crate::kernel::{HoldError, Kernel, MacAddr, PfFacts, Stuck, VfFacts};
use crate::points::{Point, reach};

/// A PF with its VFs as the kernel has them.
#[derive(Clone, Debug)]
pub struct PfSnapshot {
    /// Name of the `PhysicalFunction` object.
    pub name: String,
    pub facts: PfFacts,
    pub vfs: Vec<VfFacts>,
    pub probes: BTreeMap<u32, GroupProbe>,
    pub macs: BTreeMap<u16, MacAddr>,
    /// Of an NVMe subsystem.
    pub namespaces: Namespaces,
    /// Functions of the node about which a write has not come back.
    pub stuck: BTreeMap<PciAddress, Stuck>,
}

/// All PFs of the node, and what cannot be told apart, from the kernel.
pub async fn snapshot(agent: &Agent) -> Result<(Vec<PfSnapshot>, Vec<String>), VfError> {
    let node = agent.node_name.clone();
    // The ledger's lock is not held while the kernel is asked.
    let known: BTreeMap<String, Vec<Holder>> = {
        let ledger = agent.ledger.lock();
        ledger
            .functions()
            .map(|name| (name.to_owned(), Holder::all(&ledger, name)))
            .collect()
    };
    let objects = agent.functions.clone();
    vf::blocking(&agent.kernel, move |kernel| {
        let managed = |name: &str| {
            let object = objects.get(&ObjectRef::new(name));
            object.is_some_and(|object| object.spec.managed)
        };
        let found = inventory::inventory(&node, &kernel.physical_functions()?);
        let stuck = kernel.stuck()?;
        let snapshots = found
            .functions
            .into_iter()
            .map(|(name, facts)| {
                let held = known.get(&name).map(Vec::as_slice).unwrap_or_default();
                let namespaces = if managed(&name) {
                    namespaces(kernel, &facts)
                } else {
                    // Its controller is asked nothing.
                    Namespaces::new()
                };
                one(kernel, name, facts, held, namespaces, &stuck)
            })
            .collect::<Result<_, _>>()?;
        Ok((snapshots, found.left_out))
    })
    .await
}

/// The PF's namespaces; none where its controller does not say, so that nobody gets one: it must
/// not keep VFs of other PFs from their claims.
fn namespaces(kernel: &dyn Kernel, pf: &PfFacts) -> Namespaces {
    let found = driver_for(pf).map(|driver| driver.namespaces(kernel, pf));
    found
        .transpose()
        .unwrap_or_else(|error| {
            tracing::warn!(pf = %pf.address, %error, "its namespaces are not known");
            None
        })
        .unwrap_or_default()
}

fn one(
    kernel: &dyn Kernel,
    name: String,
    facts: PfFacts,
    held: &[Holder],
    namespaces: Namespaces,
    stuck: &BTreeMap<PciAddress, Stuck>,
) -> Result<PfSnapshot, VfError> {
    let vfs = kernel.virtual_functions(facts.address)?;
    let probes = groups_to_probe(&vfs, held)
        .into_iter()
        .map(|group| {
            let probe = match kernel.probe_group(group) {
                Ok(()) => GroupProbe::Free,
                Err(HoldError::Busy { .. }) => GroupProbe::Busy,
                Err(HoldError::NoDevice { .. }) => GroupProbe::NoDevice,
                Err(other) => GroupProbe::Unknown(other.to_string()),
            };
            (group, probe)
        })
        .collect();
    let mut macs = BTreeMap::new();
    if facts.interface.is_some() {
        for vf in &vfs {
            macs.insert(vf.index, vf::settings(kernel, &facts, vf.index)?.mac);
        }
    }
    Ok(PfSnapshot {
        name,
        facts,
        vfs,
        probes,
        macs,
        namespaces,
        stuck: stuck.clone(),
    })
}

/// The planners' view of a snapshot, with the ledger as it is now.
#[must_use]
pub fn views(agent: &Agent, ledger: &Ledger, snapshots: &[PfSnapshot]) -> Vec<PfView> {
    snapshots
        .iter()
        .map(|snapshot| {
            let object = agent.function(&snapshot.name);
            let resize = agent.resizes.last(agent, &snapshot.name);
            PfView::new(PfInput {
                name: snapshot.name.clone(),
                facts: snapshot.facts.clone(),
                vfs: snapshot.vfs.clone(),
                managed: object.as_ref().is_some_and(|o| o.spec.managed),
                desired: object.as_ref().and_then(|o| o.spec.num_vfs),
                withheld: object.map(|o| o.spec.withheld.clone()).unwrap_or_default(),
                resize,
                resizing: ledger.resizing(&snapshot.name),
                holders: Holder::all(ledger, &snapshot.name),
                probes: snapshot.probes.clone(),
                macs: snapshot.macs.clone(),
                namespaces: snapshot.namespaces.clone(),
                stuck: snapshot.stuck.clone(),
            })
        })
        .collect()
}

/// What the claim was granted, for the planner.
async fn wish(agent: &Agent, claim: &VFClaim) -> Result<Wish, ReconcileError> {
    let selects_nodes = claim
        .status
        .as_ref()
        .and_then(|s| s.admitted.as_ref())
        .is_some_and(|admitted| !admitted.pf_selector.node_selector.is_empty());
    let labels = if selects_nodes {
        let nodes: Api<Node> = Api::all(agent.client.clone());
        nodes
            .get(&agent.node_name)
            .await?
            .metadata
            .labels
            .unwrap_or_default()
    } else {
        BTreeMap::new()
    };
    Ok(Wish::of(claim, &labels)?)
}

/// Chooses a VF and records it in the claim. `process` is the QEMU of its VM, where one runs.
///
/// The ledger has the choice before the write, in the same critical section in
/// which it was made, so that two claims never choose one VF.
pub async fn allocate(
    agent: &Agent,
    api: &Api<VFClaim>,
    claim: &VFClaim,
    process: Option<&QemuProcess>,
    snapshots: &[PfSnapshot],
) -> StepResult<VFClaim> {
    let of_pfs = snapshots.iter().map(|pf| pf.facts.numa_node);
    let wish = Wish {
        near: near::nodes(&agent.proc, &agent.kernel, process, of_pfs).await,
        ..wish(agent, claim).await?
    };
    let chosen = {
        let mut ledger = agent.ledger.lock();
        let chosen = choose(&views(agent, &ledger, snapshots), &wish);
        if let Ok(choice) = &chosen {
            ledger.enter(wish.entry(claim, choice))?;
        }
        chosen
    };
    let choice = match chosen {
        Ok(choice) => choice,
        Err(none) => {
            let detail = none.message_for_administrator();
            tracing::info!(
                claim = claim.metadata.name,
                reason = none.reason(),
                detail,
                "no VF"
            );
            return Ok(Err(Wait {
                reason: none.reason(),
                message: none.message(),
            }));
        }
    };
    let device = DeviceStatus {
        node_name: agent.node_name.clone(),
        physical_function: choice.physical_function,
        vf_index: choice.vf_index,
        namespace_id: choice.namespace,
        pci_address: choice.address.map(|address| address.to_string()),
        vendor_id: None,
        device_id: None,
        iommu_group: None,
    };
    reach(Point::Chosen);
    tracing::info!(
        claim = claim.meta().name,
        pf = device.physical_function,
        vf = device.vf_index,
        "allocated"
    );
    let fields = json!({"device": device});
    let claim = status::decide(api, claim, MANAGER, &fields).await?;
    reach(Point::Allocated);
    Ok(Ok(claim))
}

/// Whether the PF is still ours to write to for a claim's sake: consent may have gone, and the
/// host may have begun to use it, since the claim chose it.
pub fn may_write(agent: &Agent, name: &str, pf: &PfFacts) -> Result<(), Wait> {
    if !agent.function(name).is_some_and(|o| o.spec.managed) {
        return Err(Wait {
            reason: reason::NOT_MANAGED,
            message: format!(
                "{name} is no longer managed; nothing more is done to its VFs until an \
                 administrator sets spec.managed again"
            ),
        });
    }
    match &pf.in_use_by_host {
        Some(words) => Err(Wait {
            reason: reason::IN_USE_BY_HOST,
            message: format!("{name} carries the host's own traffic ({words}); it is left alone"),
        }),
        None => Ok(()),
    }
}

/// How many VFs the claim's PF is to be given so that the claim's VF exists, by
/// the planner; `None` when it exists by now; a wait when the count cannot change
/// now. The caller has the PF's turn.
pub async fn creation(agent: &Agent, claim: &VFClaim) -> StepResult<Option<(PfFacts, u16)>> {
    let wish = wish(agent, claim).await?;
    let (snapshots, _) = snapshot(agent).await?;
    let views = views(agent, &agent.ledger.lock(), &snapshots);
    let device = claim
        .status
        .as_ref()
        .and_then(|s| s.device.as_ref())
        .ok_or(ReconcileError::Incomplete("status.device"))?;
    let name = device.physical_function.clone();
    let facts = snapshots
        .into_iter()
        .find(|s| s.name == name)
        .map(|s| s.facts)
        .ok_or_else(|| VfError::UnknownPf(name.clone()))?;
    let view = views.iter().find(|view| view.name == name);
    if view.is_some_and(|view| view.existing().any(|vf| vf.index == device.vf_index)) {
        return Ok(Ok(None));
    }
    if let Err(wait) = may_write(agent, &name, &facts) {
        return Ok(Err(wait));
    }
    match choose(&views, &wish) {
        Ok(Choice {
            create: Some(count),
            physical_function,
            ..
        }) if physical_function == name => Ok(Ok(Some((facts, count)))),
        Ok(_) => Ok(Err(Wait {
            reason: reason::NO_FREE_VF,
            message: format!(
                "{name} has {} VFs and the one of this claim is not among them; the count can change only while none of them is in use",
                facts.num_vfs
            ),
        })),
        Err(none) => Ok(Err(Wait {
            reason: none.reason(),
            message: none.message(),
        })),
    }
}
