//! Starts the node agent: lock, kernel, ledger, recovery, then the loops.
//!
//! The order matters: nothing is allocated before the ledger is filled from a
//! consistent LIST, and gates that a dead predecessor left open are closed
//! before new ones open.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use common::api::VFClaim;
use common::cli::{HttpArgs, KubeArgs, RetryArgs};
use common::kube::events::Events;
use common::kube::{Backoff, ClientOptions, KubeClient, client::ClientError};
use common::telemetry::{self, EndpointError, Health};
use futures::{StreamExt as _, stream};
use kube::api::ListParams;
use kube::runtime::controller::{self, Controller};
use kube::runtime::reflector;
use kube::runtime::watcher;
use kube::{Api, Client};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::agent::{Agent, Recent, SharedLedger, Turns};
use super::drivers::{self, Drivers};
use super::follow::follow;
use super::listen::Listeners;
use super::lock::{AgentLock, LockError};
use super::resize::Resizes;
use super::sessions::Sessions;
use super::vf::VfError;
use super::{gone, hold, publish, qemu, reconcile};
use crate::hypervisor::gates::GateError;
use crate::hypervisor::gates::host::{GatePaths, HostGates};
use crate::hypervisor::launcher::Proc;
use crate::hypervisor::qmp::{DEFAULT_SOCKET, QmpHypervisor};
use crate::kernel::{Helpers, Kernel, RealKernel, Roots};

/// `host-provisioner node`: creates VFs on this host and plugs them into VMs.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// Name of the node that this agent serves.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Folder on the host for the agent's lock and the journal of opened gates. It must not
    /// outlive the boot.
    #[arg(long, default_value = "/run/vf-provisioner")]
    pub state_dir: PathBuf,
    /// QEMU's QMP socket inside a launcher's compute container.
    #[arg(long, default_value = DEFAULT_SOCKET)]
    pub qmp_socket: PathBuf,
    /// Free PCIe root ports of a VM that are left to KubeVirt's own hotplugs.
    #[arg(long, default_value_t = 2)]
    pub reserved_ports: usize,
    /// Claims worked on at once; work on one PF or one VM takes turns all the same.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    pub worker_threads: u16,
    #[command(flatten)]
    pub kube: KubeArgs,
    #[command(flatten)]
    pub retry: RetryArgs,
    #[command(flatten)]
    pub http: HttpArgs,
}

/// Why the agent cannot run.
#[derive(Debug, Error)]
pub enum NodeError {
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the API server: {0}")]
    Api(#[from] kube::Error),
    #[error("the host's kernel: {0}")]
    Kernel(#[from] VfError),
    #[error("gates that an earlier agent left: {0}")]
    Gates(#[from] GateError),
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error("the watch of this node's PhysicalFunctions ended before it began")]
    NoFunctions,
    #[error("where this program is, to start its helpers: {0}")]
    Program(io::Error),
    #[error("a thread ended unexpectedly: {0}")]
    Thread(String),
}

/// Runs the agent until `stop`.
pub async fn run(args: NodeArgs, stop: CancellationToken) -> Result<(), NodeError> {
    let _lock = AgentLock::acquire(&args.state_dir.join("agent.lock"))?;
    let kube = KubeClient::new(&ClientOptions::from(&args.kube)).await?;
    let health = Health::default();
    let ready = health.check("ledger", "the claims of this node are not read yet");
    let endpoint = telemetry::serve(&args.http, health.clone(), telemetry::metrics()).await?;

    let (woken, wakes) = mpsc::unbounded_channel();
    let program = std::env::current_exe().map_err(NodeError::Program)?;
    let helpers = Helpers::new(Path::new("/sys/fs/cgroup"), program);
    let kernel = RealKernel::new(Roots::default()).with_helpers(helpers);
    let modules = Arc::new(kernel.clone());
    let agent = Arc::new(build(&args, kube.client(), kernel, woken, &stop).await?);
    fill_ledger(&agent).await?;
    recover_gates(&agent).await?;
    ready.pass();
    tracing::info!(node = agent.node_name, "serving");

    let publisher = tokio::spawn(publish::run(Arc::clone(&agent), stop.clone()));
    let holder = tokio::spawn(hold::run(Arc::clone(&agent), stop.clone()));
    let record = args.state_dir.join("modules.json");
    let drivers = Drivers::new(Arc::clone(&agent), modules, record, stop.clone());
    let drivers = tokio::spawn(drivers::run(drivers, stop.clone()));
    claims(&agent, &args, wakes, stop).await;
    let thread = |e: tokio::task::JoinError| NodeError::Thread(e.to_string());
    publisher.await.map_err(thread)?;
    holder.await.map_err(thread)?;
    drivers.await.map_err(thread)?;
    drop(endpoint);
    Ok(())
}

async fn build(
    args: &NodeArgs,
    client: Client,
    kernel: RealKernel,
    woken: mpsc::UnboundedSender<reflector::ObjectRef<VFClaim>>,
    stop: &CancellationToken,
) -> Result<Agent, NodeError> {
    let kernel: Arc<dyn Kernel> = Arc::new(kernel);
    let boot_id = publish::boot_id(&kernel).await?;
    let (pool_changed, _) = watch::channel(());
    let mine = watcher::Config::default().fields(&format!("spec.nodeName={}", args.node_name));
    let functions = follow(&client, mine, pool_changed.clone(), stop.clone());
    functions
        .wait_until_ready()
        .await
        .map_err(|_| NodeError::NoFunctions)?;
    let gates = HostGates::new(GatePaths {
        journal: args.state_dir.join("journal"),
        ..GatePaths::default()
    })?;
    Ok(Agent {
        events: Events::new(
            client.clone(),
            "host-provisioner-node",
            Some(args.node_name.clone()),
        ),
        client,
        node_name: args.node_name.clone(),
        boot_id,
        kernel,
        hypervisor: Arc::new(QmpHypervisor::new(args.qmp_socket.clone())),
        sessions: Sessions::default(),
        listeners: Listeners::default(),
        recent: Recent::default(),
        gates: Arc::new(gates),
        proc: Proc::new("/proc"),
        reserved_ports: args.reserved_ports,
        backoff: Backoff::new(
            args.retry.retry_interval_start,
            args.retry.retry_interval_max,
        ),
        pf_turns: Turns::default(),
        vm_turns: Turns::default(),
        pool_changed,
        woken,
        report_due: watch::channel(()).0,
        functions,
        ledger: SharedLedger::default(),
        resizes: Resizes::default(),
    })
}

/// Enters every claim of this node from a consistent LIST.
async fn fill_ledger(agent: &Agent) -> Result<(), NodeError> {
    let api: Api<VFClaim> = Api::all(agent.client.clone());
    // No resourceVersion: the API server answers from a quorum read.
    let mine = ListParams::default().fields(&format!("status.hostNode={}", agent.node_name));
    let claims = api.list(&mine).await?;
    for doubled in agent.ledger.lock().fill(&claims.items) {
        // Planned for when that claim is reconciled; until then it is not acted on.
        tracing::error!(%doubled, "two claims name one VF");
    }
    tracing::info!(claims = claims.items.len(), "ledger filled");
    Ok(())
}

/// Closes what an earlier agent left open, all but what attached VFs need.
async fn recover_gates(agent: &Arc<Agent>) -> Result<(), NodeError> {
    let shared = Arc::clone(agent);
    let recovered = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Handle::current();
        shared.gates.recover(&|journal| {
            let pod_uid = &journal.pod_uid;
            let attached = shared.ledger.lock().attached_in(pod_uid) > 0;
            // A claim may have been torn off a device that is still in use.
            attached || runtime.block_on(qemu::may_have_ours(&shared, pod_uid))
        })
    })
    .await
    .map_err(|e| NodeError::Thread(e.to_string()))??;
    for one in recovered {
        match one.result {
            Ok(()) => tracing::info!(pod = one.pod_uid, kept = one.kept, "gates recovered"),
            Err(error) => tracing::error!(pod = one.pod_uid, %error, "gates not recovered"),
        }
    }
    Ok(())
}

/// Reconciles this node's claims until stopped.
async fn claims(
    agent: &Arc<Agent>,
    args: &NodeArgs,
    mut woken: mpsc::UnboundedReceiver<reflector::ObjectRef<VFClaim>>,
    stop: CancellationToken,
) {
    let api: Api<VFClaim> = Api::all(agent.client.clone());
    let mine = watcher::Config::default().fields(&format!("status.hostNode={}", agent.node_name));
    let pool = changes_of(agent.pool_changed.subscribe());
    Controller::new(api, mine)
        .with_config(controller::Config::default().concurrency(args.worker_threads))
        .reconcile_all_on(pool)
        .reconcile_on(stream::poll_fn(move |cx| woken.poll_recv(cx)))
        .graceful_shutdown_on(async move { stop.cancelled().await })
        .run(
            |claim, agent| async move {
                Ok::<_, std::convert::Infallible>(reconcile::reconcile(claim, agent).await)
            },
            |_, error, _| match *error {},
            Arc::clone(agent),
        )
        .for_each(|done| {
            match done {
                Ok(_) => {}
                Err(controller::Error::ObjectNotFound(claim)) => {
                    // Not awaited here: it would hold up the others.
                    tokio::spawn(gone::follow_up(Arc::clone(agent), *claim));
                }
                Err(error) => tracing::warn!(%error, "claims"),
            }
            std::future::ready(())
        })
        .await;
}

/// A stream that yields once for each change of the pool.
fn changes_of(changed: watch::Receiver<()>) -> impl futures::Stream<Item = ()> {
    stream::unfold(changed, |mut changed| async move {
        changed.changed().await.ok().map(|()| ((), changed))
    })
}
