//! `host-provisioner`: reads the command line, sets up logs and signals, and
//! runs the part that was asked for.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Parser as _;
use common::kube::client::ClientOptions;
use common::kube::{KubeClient, LeaderConfig, install_crypto, run_as_leader};
use common::telemetry::{self, Health};
use host_provisioner::cli::{Cli, Command, ControllerArgs};
use host_provisioner::controller::{self, Settings};
use host_provisioner::kernel::{helper, modules};
use host_provisioner::node;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Nothing of the program is needed for a helper, and nothing is to hold it up.
    let helped = match &cli.command {
        Command::KernelWrite(args) => Some(helper::run(&args.path, &args.text)),
        Command::HostKmod(args) => Some(modules::run(&args.host, &args.program, &args.arguments)),
        Command::Controller(_) | Command::Node(_) => None,
    };
    match helped {
        Some(Ok(())) => return ExitCode::SUCCESS,
        // It was said.
        Some(Err(_)) => return ExitCode::FAILURE,
        None => {}
    }
    if let Err(error) = telemetry::init_logs(&cli.log) {
        eprintln!("host-provisioner: {error}");
        return ExitCode::FAILURE;
    }
    install_crypto();
    match start(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(async {
        let stop = stop_on_signal()?;
        match command {
            Command::Controller(args) => run_controller(args, stop).await,
            Command::Node(args) => Ok(node::run(args, stop).await?),
            Command::KernelWrite(_) | Command::HostKmod(_) => bail!("a helper has no runtime"),
        }
    })
}

/// SIGTERM and Ctrl-C ask for an orderly end; a second one ends at once.
fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let mut term = signal(SignalKind::terminate()).context("catching SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catching SIGINT")?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        for again in [false, true] {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
            if again {
                std::process::exit(130);
            }
            tracing::info!("stopping");
            token.cancel();
        }
    });
    Ok(stop)
}

async fn run_controller(args: ControllerArgs, stop: CancellationToken) -> anyhow::Result<()> {
    let kube = KubeClient::new(&ClientOptions::from(&args.kube)).await?;
    let client = kube.client();
    let (health, metrics) = (Health::default(), telemetry::metrics());
    let check = health.check("controller", "starting");
    let endpoint = telemetry::serve(&args.http, health, metrics.clone()).await?;
    if let Some(endpoint) = &endpoint {
        tracing::info!(address = %endpoint.address, "probes and metrics");
    }
    let settings = Settings {
        guest_cluster_role: args.guest_cluster_role,
        workers: args.worker_threads,
        timeout: args.kube.timeout,
        retry_start: args.retry.retry_interval_start,
        retry_max: args.retry.retry_interval_max,
        instance: args.leader.leader_election_identity.clone(),
    };
    let namespace = match args.kube.kubeconfig {
        // A kubeconfig's namespace is where its user works, not where we run.
        Some(_) => "",
        None => client.default_namespace(),
    };
    let lease = LeaderConfig::from_args(&args.leader, "host-provisioner-controller", namespace)?;
    let Some(lease) = lease else {
        controller::run(client, settings, &metrics, check, stop).await?;
        return Ok(());
    };
    // A standby is as ready as it can be: an update must not wait for it to lead.
    check.pass();
    let led = run_as_leader(client.clone(), lease, stop.clone(), |term| {
        controller::run(client, settings, &metrics, check, term)
    })
    .await?;
    match led {
        Some(Err(error)) => Err(error.into()),
        Some(Ok(())) | None if stop.is_cancelled() => Ok(()),
        _ => bail!("the controller ended unasked"),
    }
}
