//! Keeps `PhysicalFunction` and `SriovNode` objects true: a debounced report
//! that can be rebuilt from the kernel and the claims at any time. Decides
//! nothing; `inventory` says what the objects are, and `resize` is asked to bring the numbers of
//! VFs to what they are to be before they are reported.

use std::sync::Arc;
use std::time::Duration;

use common::api::{PhysicalFunction, SriovNode, SriovNodeSpec, SriovNodeStatus};
use common::kube::is_conflict;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::agent::{Agent, MANAGER};
use super::allocate::{PfSnapshot, snapshot, views};
use super::error::ReconcileError;
use super::inventory;
use super::pool::PfView;
use super::resize;
use super::vf::{self, VfError};

/// Changes within this time are one report.
const DEBOUNCE: Duration = Duration::from_secs(1);
/// What the kernel changes without telling us is seen within this time.
const RESYNC: Duration = Duration::from_secs(30);

/// Publishes until stopped.
pub async fn run(agent: Arc<Agent>, stop: CancellationToken) {
    let mut pool = agent.pool_changed.subscribe();
    let mut due = agent.report_due.subscribe();
    let key = "publish".to_owned();
    loop {
        let again = match publish(&agent).await {
            Ok(()) => {
                agent.backoff.forget(&key);
                RESYNC
            }
            Err(error) => {
                tracing::warn!(%error, "cannot publish this node's functions");
                agent.backoff.failed(key.clone())
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(again) => continue,
            Ok(()) = pool.changed() => {}
            Ok(()) = due.changed() => {}
        }
        tokio::time::sleep(DEBOUNCE).await;
        pool.mark_unchanged();
        due.mark_unchanged();
    }
}

/// Publishes once.
pub async fn publish(agent: &Agent) -> Result<(), ReconcileError> {
    let (mut snapshots, left_out) = snapshot(agent).await?;
    let mut views = self::views(agent, &agent.ledger.lock(), &snapshots);
    let resized = resized(agent, &mut views).await;
    if !matches!(resized, Ok(false)) {
        (snapshots, _) = snapshot(agent).await?;
        views = self::views(agent, &agent.ledger.lock(), &snapshots);
    }
    let api: Api<PhysicalFunction> = Api::all(agent.client.clone());
    for view in &views {
        function(agent, &api, view).await?;
    }
    let objects = agent.functions.state();
    let gone = objects.iter().filter(|o| {
        !views
            .iter()
            .any(|v| o.metadata.name.as_ref() == Some(&v.name))
    });
    for object in gone {
        let last = object.status.clone().unwrap_or_default();
        let status = inventory::absent_status(&last, object.metadata.generation, &now());
        if object.status.as_ref() != Some(&status) {
            let name = object.metadata.name.clone().unwrap_or_default();
            apply(&api, &name, "PhysicalFunction", json!(status)).await?;
        }
    }
    node(agent, &snapshots, left_out).await?;
    resized.map(drop)
}

/// Does what is due about the numbers of VFs; whether there are others now. One PF that fails
/// keeps no other from its change.
async fn resized(agent: &Agent, views: &mut [PfView]) -> Result<bool, ReconcileError> {
    let mut all = Ok(false);
    for view in views {
        match (resize::run(agent, view).await, &mut all) {
            (Ok(changed), Ok(any)) => *any |= changed,
            (Err(error), _) => all = Err(error),
            (Ok(_), Err(_)) => {}
        }
    }
    all
}

/// Reports one PF; whether its object is this PF's.
pub(super) async fn function(
    agent: &Agent,
    api: &Api<PhysicalFunction>,
    view: &PfView,
) -> Result<bool, ReconcileError> {
    let object = match agent.function(&view.name) {
        Some(object) => Arc::unwrap_or_clone(object),
        None => {
            let spec = inventory::new_spec(&agent.node_name, &view.facts);
            let new = PhysicalFunction::new(&view.name, spec);
            match api.create(&PostParams::default(), &new).await {
                Ok(object) => object,
                // The watch is behind, or the name is somebody else's: see below.
                Err(error) if is_conflict(&error) => api.get(&view.name).await?,
                Err(error) => return Err(error.into()),
            }
        }
    };
    if object.spec.node_name != agent.node_name || object.spec.identity != view.facts.identity {
        tracing::error!(
            object = view.name,
            identity = object.spec.identity,
            ours = view.facts.identity,
            "a PhysicalFunction of this name stands for other hardware; it is left alone: delete it if it is not wanted"
        );
        return Ok(false);
    }
    let conditions = object
        .status
        .as_ref()
        .map(|s| s.conditions.clone())
        .unwrap_or_default();
    let about = inventory::About {
        conditions: &conditions,
        generation: object.metadata.generation,
        resize_failed: agent.resizes.failed(&view.name),
    };
    let status = inventory::function_status(view, about, &now());
    if object.status.as_ref() != Some(&status) {
        apply(api, &view.name, "PhysicalFunction", json!(status)).await?;
    }
    Ok(true)
}

async fn node(
    agent: &Agent,
    snapshots: &[PfSnapshot],
    left_out: Vec<String>,
) -> Result<(), ReconcileError> {
    let facts = vf::blocking(&agent.kernel, |kernel| Ok(kernel.node_facts()?)).await?;
    let found = inventory::Inventory {
        functions: snapshots
            .iter()
            .map(|s| (s.name.clone(), s.facts.clone()))
            .collect(),
        left_out,
    };
    let api: Api<SriovNode> = Api::all(agent.client.clone());
    let object = match api.get_opt(&agent.node_name).await? {
        Some(object) => object,
        None => {
            let new = SriovNode::new(&agent.node_name, SriovNodeSpec {});
            api.create(&PostParams::default(), &new).await?
        }
    };
    let conditions = object
        .status
        .as_ref()
        .map(|s| s.conditions.clone())
        .unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION");
    let status = inventory::node_status(&facts, &found, version, &conditions, &now());
    // Told by `drivers`, under a name of its own.
    let said = object.status.map(|said| SriovNodeStatus {
        drivers: Vec::new(),
        ..said
    });
    if said.as_ref() == Some(&status) {
        return Ok(());
    }
    apply(&api, &agent.node_name, "SriovNode", json!(status)).await
}

/// Applies a whole status: every field of it is this agent's.
async fn apply<K>(
    api: &Api<K>,
    name: &str,
    kind: &str,
    status: serde_json::Value,
) -> Result<(), ReconcileError>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let patch = json!({
        "apiVersion": format!("{}/{}", common::api::GROUP, common::api::VERSION),
        "kind": kind,
        "metadata": {"name": name},
        "status": status,
    });
    let params = PatchParams::apply(MANAGER).force();
    api.patch_status(name, &params, &Patch::Apply(patch))
        .await?;
    Ok(())
}

fn now() -> Time {
    Time(Timestamp::now())
}

/// The boot that this agent runs in.
pub async fn boot_id(kernel: &Arc<dyn crate::kernel::Kernel>) -> Result<String, VfError> {
    vf::blocking(kernel, |kernel| Ok(kernel.node_facts()?.boot_id)).await
}
