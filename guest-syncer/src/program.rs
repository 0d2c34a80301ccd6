//! The process: clients, probes, signals, leadership; then the syncer.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use common::kube::{ClientOptions, KubeClient, LeaderConfig, install_crypto, run_as_leader};
use common::telemetry;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::args::Args;
use crate::host_link::HostLink;
use crate::mirror::orphan_pass::{BETWEEN_LOOKS, Pace};
use crate::syncer::{self, Options};

/// Between two tries to read who this cluster is.
const RETRY: Duration = Duration::from_secs(2);

/// Runs until a signal, or until the Lease is lost.
pub async fn run(args: Args) -> anyhow::Result<()> {
    install_crypto();
    telemetry::init_logs(&args.log)?;
    let (health, metrics) = (telemetry::Health::default(), telemetry::metrics());
    let started = health.check("guest", "this cluster's API server has not answered yet");
    let _endpoint = telemetry::serve(&args.http, health, metrics.clone()).await?;
    let stop = stop_on_signal()?;

    let own = ClientOptions::from(&args.kube);
    let guest = KubeClient::new(&own).await.context("this cluster")?;
    let to_host = ClientOptions {
        kubeconfig: Some(args.host_kubeconfig.clone()),
        ..own
    };
    let host = KubeClient::new(&to_host)
        .await
        .context("the host cluster (--host-kubeconfig)")?;
    let Some(cluster_uid) = identify(&guest.client(), &stop).await else {
        return Ok(());
    };
    started.pass();

    let link = Arc::new(HostLink::new(host.client(), args.kube.timeout));
    let options = Options {
        guest_cluster: args.guest_cluster.clone(),
        workers: args.worker_threads,
        timeout: args.kube.timeout,
        retry_start: args.retry.retry_interval_start,
        retry_max: args.retry.retry_interval_max,
        orphans: Pace {
            interval: args.orphan_interval,
            between_looks: BETWEEN_LOOKS,
            timeout: args.kube.timeout,
        },
        identity: args.leader_election.leader_election_identity.clone(),
    };
    let client = guest.client();
    let namespace = client.default_namespace().to_owned();
    let work = |term| async move {
        syncer::run(client, link, cluster_uid, &options, &metrics, term).await
    };
    match LeaderConfig::from_args(&args.leader_election, "guest-syncer", &namespace)? {
        Some(config) => {
            run_as_leader(guest.client(), config, stop, work)
                .await?
                .transpose()?;
        }
        None => work(stop).await?,
    }
    Ok(())
}

async fn identify(guest: &Client, stop: &CancellationToken) -> Option<String> {
    loop {
        match syncer::cluster_uid(guest).await {
            Ok(uid) => return Some(uid),
            Err(error) => tracing::warn!(%error, "reading the namespace kube-system"),
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to stop");
        told.cancel();
    });
    Ok(stop)
}
