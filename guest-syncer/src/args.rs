//! The command line, in the style of the CSI sidecars.

use std::path::PathBuf;

use clap::Parser;
use common::cli::{HttpArgs, KubeArgs, LeaderElectionArgs, LogArgs, RetryArgs};

/// Carries this cluster's VFClaims to its host and their status back.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    #[command(flatten)]
    pub kube: KubeArgs,
    /// Kubeconfig of the host cluster, with the client certificate that its
    /// administrator signed for this guest (CN
    /// `sriov.harvesterhci.io:guest:<name of the GuestCluster>`). Read again
    /// when it, or a file that it names, changes.
    #[arg(long)]
    pub host_kubeconfig: PathBuf,
    /// Name of this cluster's GuestCluster on the host.
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub guest_cluster: String,
    /// How many claims are worked on at once.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    pub worker_threads: u16,
    #[command(flatten)]
    pub leader_election: LeaderElectionArgs,
    #[command(flatten)]
    pub retry: RetryArgs,
    #[command(flatten)]
    pub http: HttpArgs,
    #[command(flatten)]
    pub log: LogArgs,
}
