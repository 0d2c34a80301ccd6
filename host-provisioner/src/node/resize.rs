//! Changes the number of a PF's VFs when nobody has any: keeps claims off it, looks again,
//! records what is to be done, and does it. `pool` decides what is due.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::api::{PhysicalFunction, ResizeStatus};
use kube::Api;

use super::agent::Agent;
use super::allocate::{snapshot, views};
use super::error::ReconcileError;
use super::pool::{PfView, Resize, resize};
use super::publish;
use super::vf::{self, VfError};
use crate::driver::DriverError;
use crate::kernel::KernelError;

/// The last change of each PF's count, as this agent knows it: its own reports come back to it
/// late, and an earlier one must not be taken for the last word.
#[derive(Default)]
pub struct Resizes(Mutex<HashMap<String, Known>>);

#[derive(Clone, Default)]
struct Known {
    last: Option<ResizeStatus>,
    /// Why the last try failed.
    failed: Option<String>,
}

impl Resizes {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        // The map is whole even if an insertion panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last change of that PF's count: of this agent, else what its predecessor recorded.
    #[must_use]
    pub fn last(&self, agent: &Agent, name: &str) -> Option<ResizeStatus> {
        let known = self.lock().get(name).and_then(|known| known.last.clone());
        known.or_else(|| agent.function(name)?.status.as_ref()?.resize.clone())
    }

    /// Why the last change that was tried failed.
    #[must_use]
    pub fn failed(&self, name: &str) -> Option<String> {
        self.lock().get(name)?.failed.clone()
    }

    fn set(&self, name: &str, last: ResizeStatus) {
        let (last, failed) = (Some(last), None);
        self.lock().insert(name.to_owned(), Known { last, failed });
    }

    fn fail(&self, name: &str, error: &ReconcileError) {
        self.lock().entry(name.to_owned()).or_default().failed = Some(error.to_string());
    }
}

/// While it lives no claim is given a VF of that PF.
struct KeptOff<'a> {
    agent: &'a Agent,
    name: &'a str,
}

impl<'a> KeptOff<'a> {
    /// `None` when a claim has a VF of it.
    fn begin(agent: &'a Agent, name: &'a str) -> Option<Self> {
        let begun = agent.ledger.lock().begin_resize(name);
        begun.then_some(Self { agent, name })
    }
}

impl Drop for KeptOff<'_> {
    fn drop(&mut self) {
        self.agent.ledger.lock().end_resize(self.name);
    }
}

/// Does what is due about the number of this PF's VFs; whether they are others than `view` has.
///
/// # Errors
/// The API server's or the kernel's. The change is begun again; the PF's condition says why.
pub async fn run(agent: &Agent, view: &mut PfView) -> Result<bool, ReconcileError> {
    match resize(view) {
        Resize::Keep | Resize::Pending { .. } => Ok(false),
        Resize::Settle(change) => {
            let settled = change.status(true);
            agent.resizes.set(&view.name, settled.clone());
            view.resize = Some(settled);
            Ok(false)
        }
        Resize::Apply(_) => {
            let done = apply(agent, &view.name).await;
            if let Err(error) = &done {
                tracing::warn!(pf = view.name, %error, "the number of VFs was not changed");
                agent.resizes.fail(&view.name, error);
            }
            done
        }
    }
}

/// From the choice to keep claims off until the VFs are there, it is this PF's turn.
async fn apply(agent: &Agent, name: &str) -> Result<bool, ReconcileError> {
    let _turn = agent.pf_turns.take(name).await;
    let Some(kept_off) = KeptOff::begin(agent, name) else {
        return Ok(false);
    };
    // Looked at again: from here on no claim can come in between.
    let (snapshots, _) = snapshot(agent).await?;
    let views = views(agent, &agent.ledger.lock(), &snapshots);
    let Some(mut view) = views.into_iter().find(|view| view.name == name) else {
        return Ok(false);
    };
    let Resize::Apply(change) = resize(&view) else {
        return Ok(false);
    };
    let begun = change.status(false);
    view.resize = Some(begun.clone());
    let api: Api<PhysicalFunction> = Api::all(agent.client.clone());
    if !publish::function(agent, &api, &view).await? {
        return Ok(false);
    }
    agent.resizes.set(name, begun);
    tracing::info!(
        pf = name,
        from = change.from,
        to = change.to,
        "changing the number of VFs"
    );
    let (facts, to) = (view.facts, change.to);
    let done = vf::blocking(&agent.kernel, move |kernel| vf::resize(kernel, &facts, to)).await;
    let made = match done {
        Ok(()) => Some(to),
        // The driver has no more, and will not have more by being asked again.
        Err(VfError::Driver(
            DriverError::Kernel(KernelError::VfCount { got, wanted, .. })
            | DriverError::Explained {
                error: KernelError::VfCount { got, wanted, .. },
                ..
            },
        )) => {
            tracing::error!(
                pf = name,
                wanted,
                got,
                "the driver made another number of VFs"
            );
            Some(got)
        }
        Err(error) => vf::unless_stuck(Err(error))?,
    };
    if let Some(made) = made {
        let complete = ResizeStatus {
            num_vfs: made,
            ..change.status(true)
        };
        agent.resizes.set(name, complete);
    }
    drop(kept_off);
    agent.tell_pool_changed();
    Ok(true)
}

#[cfg(test)]
mod tests;
