//! What one node agent has for its whole life: its clients, its kernel, its
//! hypervisor and the ledger, and the turns that keep two claims from touching
//! one PF or one VM at once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::api::{ClaimRef, PhysicalFunction, VFClaim, WithheldVf, withheld_in_force};
use common::kube::Backoff;
use common::kube::events::Events;
use kube::Client;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, mpsc, watch};

use super::ledger::Ledger;
use super::listen::Listeners;
use super::resize::Resizes;
use super::sessions::Sessions;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::gates::Gates;
use crate::hypervisor::launcher::Proc;
use crate::kernel::Kernel;

/// Field manager of the node agent's reports and decisions.
pub const MANAGER: &str = "host-provisioner-node";

/// As long as a moment is for [`Recent`]; device_del must not be repeated sooner.
const MOMENT: Duration = Duration::from_secs(10);

/// Everything that the reconciles of one agent share.
pub struct Agent {
    pub client: Client,
    pub node_name: String,
    /// This boot: an attachment of another boot is gone.
    pub boot_id: String,
    pub kernel: Arc<dyn Kernel>,
    pub hypervisor: Arc<dyn Hypervisor>,
    pub sessions: Sessions,
    pub listeners: Listeners,
    pub recent: Recent,
    pub gates: Arc<dyn Gates>,
    pub proc: Proc,
    /// Root ports of a VM that are left to KubeVirt's own hotplugs.
    pub reserved_ports: usize,
    pub events: Events,
    pub backoff: Backoff<String>,
    pub pf_turns: Turns,
    pub vm_turns: Turns,
    /// Told when a VF became free or a PF changed: claims that wait look again.
    pub pool_changed: watch::Sender<()>,
    /// Claims that are to be looked at, though nothing was written to them.
    pub woken: mpsc::UnboundedSender<ObjectRef<VFClaim>>,
    /// Told when a `PhysicalFunction`'s report is due.
    pub report_due: watch::Sender<()>,
    /// This node's `PhysicalFunction` objects, as watched.
    pub functions: Store<PhysicalFunction>,
    pub ledger: SharedLedger,
    /// How far the changes of the PFs' counts are.
    pub resizes: Resizes,
}

impl Agent {
    /// The `PhysicalFunction` of this node that has this name, as the watch knows it.
    #[must_use]
    pub fn function(&self, name: &str) -> Option<Arc<PhysicalFunction>> {
        self.functions.get(&ObjectRef::new(name))
    }

    /// The VFs of that PF that nobody gets, by its object and what was done since.
    #[must_use]
    pub fn withheld(&self, name: &str) -> Vec<WithheldVf> {
        let last = self.resizes.last(self, name);
        self.function(name)
            .map(|pf| withheld_in_force(&pf.spec.withheld, last.as_ref()))
            .unwrap_or_default()
    }

    /// Tells what waits for the pool that it changed.
    pub fn tell_pool_changed(&self) {
        self.pool_changed.send_replace(());
    }

    /// Has a claim looked at.
    pub fn wake(&self, claim: &ClaimRef) {
        let mut reference = ObjectRef::new(&claim.name).within(&claim.namespace);
        // Without it nobody could tell, once the claim is gone, whose VF that was.
        reference.extra.uid = Some(claim.uid.clone());
        // Nobody takes it in only when the agent is stopping.
        let _ = self.woken.send(reference);
    }

    /// Tells who publishes that a claim took a VF, or came further with it.
    pub fn tell_report_due(&self) {
        self.report_due.send_replace(());
    }
}

/// What was done a moment ago, so that a fight with somebody else stays a slow one.
#[derive(Default)]
pub struct Recent(Mutex<HashMap<String, Instant>>);

impl Recent {
    /// Whether `what` was done within the last [`MOMENT`]; if not, it is done now.
    pub fn just_did(&self, what: String) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, at| at.elapsed() < MOMENT);
        match all.entry(what) {
            Entry::Occupied(_) => true,
            Entry::Vacant(entry) => {
                entry.insert(Instant::now());
                false
            }
        }
    }
}

/// The ledger behind its lock; never held across an await.
#[derive(Default)]
pub struct SharedLedger(Mutex<Ledger>);

impl SharedLedger {
    pub fn lock(&self) -> MutexGuard<'_, Ledger> {
        // The ledger's methods leave it whole even if one of them panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One turn at a time for each key: a PF, or a VM.
#[derive(Default)]
pub struct Turns {
    keys: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
}

impl Turns {
    /// Waits for the key's turn; it ends when the guard is dropped.
    pub async fn take(&self, key: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody holds or awaits a turn that only the map knows.
            keys.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(keys.entry(key.to_owned()).or_default())
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thing_was_just_done_once_it_has_been_done() {
        let recent = Recent::default();
        assert!(!recent.just_did("unplug a".into()));
        assert!(recent.just_did("unplug a".into()));
        assert!(!recent.just_did("unplug b".into()));
    }
}
