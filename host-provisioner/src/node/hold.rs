//! Keeps what the kernel does for an attached VF what was granted: listens to what the
//! kernel tells of PFs, and wakes the claims whose VF is not served as it should be. What
//! then is to be done is `plan`'s.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use common::api::ClaimRef;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use super::inventory;
use super::ledger::Entry;
use super::vf::{self, VfError};
use crate::driver::driver_for;
use crate::kernel::{Change, Kernel, PfFacts, VFIO_PCI, VfConfig, Watcher};

/// What belongs together is looked at together: a driver that is loaded anew tells of each
/// VF several times.
const SETTLE: Duration = Duration::from_millis(100);

/// The kernel did not answer: nobody tells when it does again.
const AGAIN: Duration = Duration::from_secs(1);

/// How a VF in use differs from what was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// The PF's interface is down: no VF of it has a link.
    pub pf_down: bool,
    /// The settings that differ.
    pub settings: Vec<&'static str>,
    pub got: VfConfig,
}

impl Drift {
    /// The difference, if there is one.
    #[must_use]
    pub fn of(up: bool, want: &VfConfig, got: VfConfig) -> Option<Self> {
        let settings = want.drift(&got);
        (!up || !settings.is_empty()).then_some(Self {
            pf_down: !up,
            settings,
            got,
        })
    }

    /// Whether the guest may reach, or be taken for, what it was not granted.
    #[must_use]
    pub fn is_breach(&self) -> bool {
        // With a link it did not ask for, or without a bound, it still reaches its own network
        // alone.
        self.settings
            .iter()
            .any(|s| !matches!(*s, "MAC" | "link state" | "transmit rate"))
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut causes = Vec::new();
        if self.pf_down {
            causes.push("its PF's interface was down".to_owned());
        }
        if !self.settings.is_empty() {
            let changed = self.settings.join(" and ");
            causes.push(format!(
                "its {changed} was not as granted: the kernel had {}",
                self.got
            ));
        }
        f.write_str(&causes.join(", and "))
    }
}

/// A PF as it serves its VFs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    pub up: bool,
    /// By VF index: its driver and settings.
    pub vfs: BTreeMap<u16, (Option<String>, VfConfig)>,
}

/// The claims that are to keep their VF and are not served as granted; all of them when the
/// PF is gone.
#[must_use]
pub fn disturbed(entries: &[Entry], serving: Option<&Serving>) -> Vec<ClaimRef> {
    let served = |entry: &Entry| {
        let (Some(want), Some(pf)) = (&entry.wanted, serving) else {
            return false;
        };
        pf.vfs.get(&entry.vf.index).is_some_and(|(driver, got)| {
            driver.as_deref() == Some(VFIO_PCI) && Drift::of(pf.up, want, *got).is_none()
        })
    };
    // What is being given up is changed by us.
    let kept = entries.iter().filter(|e| e.attached() && !e.going);
    kept.filter(|entry| !served(entry))
        .map(|entry| entry.claim.clone())
        .collect()
}

/// Listens until stopped.
pub async fn run(agent: Arc<Agent>, stop: CancellationToken) {
    let (tell, mut changes) = mpsc::unbounded_channel();
    let told: Watcher = Arc::new(move |change| tell.send(change).is_ok());
    if let Err(error) = agent.kernel.watch(told) {
        tracing::error!(%error, "what the kernel changes is not heard, only seen when a claim is looked at");
        return;
    }
    loop {
        // Also before the first message: what came before it was not heard.
        while let Err(error) = look(&agent).await {
            tracing::warn!(%error, "cannot look at the VFs in use");
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
        let first = tokio::select! {
            () = stop.cancelled() => return,
            change = changes.recv() => change,
        };
        let Some(first) = first else {
            return;
        };
        tokio::time::sleep(SETTLE).await;
        let mut functions = matches!(first, Change::Function(_) | Change::Anything);
        while let Ok(change) = changes.try_recv() {
            functions |= !matches!(change, Change::Interface(_));
        }
        if functions {
            agent.tell_report_due();
        }
    }
}

/// Looks at every PF with attached claims, and wakes those that are disturbed.
async fn look(agent: &Arc<Agent>) -> Result<(), VfError> {
    let by_function: BTreeMap<String, Vec<Entry>> = {
        let ledger = agent.ledger.lock();
        let names = ledger.functions();
        names
            .map(|name| (name.to_owned(), ledger.on(name).cloned().collect()))
            .filter(|(_, entries): &(_, Vec<Entry>)| entries.iter().any(Entry::attached))
            .collect()
    };
    if by_function.is_empty() {
        return Ok(());
    }
    let node = agent.node_name.clone();
    let disturbed = vf::blocking(&agent.kernel, move |kernel| {
        let pfs = kernel.physical_functions()?;
        let mut all = Vec::new();
        for (name, entries) in by_function {
            let pf = pfs
                .iter()
                .find(|pf| inventory::physical_function_name(&node, &pf.identity) == name);
            // One that cannot be read must not hide what is done to the others.
            let serving = pf.and_then(|pf| {
                serving(kernel, pf, &entries)
                    .inspect_err(|error| tracing::warn!(pf = name, %error, "cannot read a PF"))
                    .ok()
            });
            all.extend(disturbed(&entries, serving.as_ref()));
        }
        Ok(all)
    })
    .await?;
    for claim in disturbed {
        tracing::info!(claim = claim.name, "its VF is not served as granted");
        agent.wake(&claim);
    }
    Ok(())
}

/// How the PF serves these claims' VFs; a network card without an interface serves none.
fn serving(kernel: &dyn Kernel, pf: &PfFacts, entries: &[Entry]) -> Result<Serving, VfError> {
    let mut vfs = BTreeMap::new();
    let driver = driver_for(pf);
    let storage = driver.is_some_and(|driver| driver.capabilities(pf).settings.namespaces);
    let readable = pf.interface.is_some() || storage;
    let all = kernel.virtual_functions(pf.address)?.into_iter();
    for vf in all.filter(|vf| entries.iter().any(|entry| entry.vf.index == vf.index)) {
        if !readable {
            break;
        }
        let config = vf::settings(kernel, pf, vf.index)?;
        vfs.insert(vf.index, (vf.driver, config));
    }
    let up = driver.map_or(pf.up, |driver| driver.is_up(pf));
    Ok(Serving { up, vfs })
}

#[cfg(test)]
mod tests;
