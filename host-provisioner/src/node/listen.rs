//! Listens to the QEMUs that have devices of ours: a device that leaves unasked, a guest that
//! is reset, and a QEMU that ends, are looked at at once. A message is a hint; what is done
//! about it is `plan`'s.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;

use super::agent::Agent;
use super::qemu::Vm;
use crate::hypervisor::Session;

/// By launcher pod: who listens to its QEMU.
#[derive(Default)]
pub struct Listeners(Mutex<HashMap<String, Listener>>);

struct Listener {
    /// The process, by pid and start time.
    process: (u32, u64),
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Listens to the VM's QEMU from now on, if nobody does yet.
pub fn follow(agent: &Arc<Agent>, vm: &Vm) {
    let process = (vm.process.pid, vm.process.start_time);
    let mut all = agent.listeners.lock();
    let pod_uid = &vm.process.pod_uid;
    if all
        .get(pod_uid)
        .is_some_and(|l| l.process == process && !l.task.is_finished())
    {
        return;
    }
    let task = tokio::spawn(listen(
        Arc::clone(agent),
        pod_uid.clone(),
        Arc::clone(&vm.session),
    ));
    all.insert(pod_uid.clone(), Listener { process, task });
}

/// Stops listening where no claim is attached any more.
pub fn prune(agent: &Agent) {
    let ledger = agent.ledger.lock();
    let attached = |pod_uid: &String| ledger.attached_in(pod_uid) > 0;
    agent
        .listeners
        .lock()
        .retain(|pod_uid, _| attached(pod_uid));
}

impl Listeners {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Listener>> {
        // The map is whole even if an insertion panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Until the monitor's connection is lost; whoever then looks at a claim and finds its QEMU
/// alive listens again.
async fn listen(agent: Arc<Agent>, pod_uid: String, session: Arc<dyn Session>) {
    let mut events = match session.events().await {
        Ok(events) => events,
        Err(error) => {
            tracing::warn!(pod = pod_uid, %error, "cannot listen to QEMU");
            return;
        }
    };
    // What happened between the last look and now was not heard.
    wake(&agent, &pod_uid, "listening from now on");
    loop {
        match events.recv().await {
            Ok(event) if matters(&event.name) => wake(&agent, &pod_uid, &event.name),
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => wake(&agent, &pod_uid, "missed messages"),
            Err(RecvError::Closed) => {
                wake(&agent, &pod_uid, "the monitor was closed");
                return;
            }
        }
    }
}

/// What can change what a guest has of its devices.
fn matters(event: &str) -> bool {
    matches!(event, "DEVICE_DELETED" | "RESET" | "SHUTDOWN")
}

fn wake(agent: &Agent, pod_uid: &str, what: &str) {
    let claims = agent.ledger.lock().kept_in(pod_uid);
    tracing::debug!(pod = pod_uid, what, claims = claims.len(), "QEMU says");
    for claim in claims {
        agent.wake(&claim);
    }
}
