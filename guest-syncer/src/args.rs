//! The command line, in the style of the CSI sidecars.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use common::cli::{HttpArgs, KubeArgs, LeaderElectionArgs, LogArgs, RetryArgs, parse_duration};

/// Each pass asks both API servers for every claim, so not more often than this.
const LEAST_ORPHAN_INTERVAL: Duration = Duration::from_secs(60);

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
    /// How often the host is looked through for copies of claims that this
    /// cluster no longer has; at least 1m.
    #[arg(long, default_value = "10m", value_parser = orphan_interval)]
    pub orphan_interval: Duration,
    #[command(flatten)]
    pub leader_election: LeaderElectionArgs,
    #[command(flatten)]
    pub retry: RetryArgs,
    #[command(flatten)]
    pub http: HttpArgs,
    #[command(flatten)]
    pub log: LogArgs,
}

fn orphan_interval(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Ok(interval) if interval >= LEAST_ORPHAN_INTERVAL => Ok(interval),
        Ok(_) => Err("give at least 1m".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orphan_interval_has_a_least_value() {
        let read = |interval: &str| {
            Args::try_parse_from([
                "guest-syncer",
                "--host-kubeconfig=h",
                "--guest-cluster=blue",
                &format!("--orphan-interval={interval}"),
            ])
            .map(|args| args.orphan_interval)
        };
        assert_eq!(read("1m").unwrap(), LEAST_ORPHAN_INTERVAL);
        for text in ["59s", "0s", "often"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
