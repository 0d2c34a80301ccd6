//! The command line of `host-provisioner`. No work is done here.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::kernel::{helper, modules};
use crate::node::NodeArgs;
use clap::{Args, Parser, Subcommand};
use common::cli::{HttpArgs, KubeArgs, LeaderElectionArgs, LogArgs, RetryArgs};

/// Puts SR-IOV virtual functions into the running VMs of guest clusters.
#[derive(Debug, Parser)]
#[command(name = "host-provisioner", version, about)]
pub struct Cli {
    #[command(flatten)]
    pub log: LogArgs,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Admit claims and find their VMs; one leader in the host cluster.
    Controller(ControllerArgs),
    /// Create VFs on this host node and plug them into its VMs; one on each node.
    Node(NodeArgs),
    /// The node agent's own: makes one write that may not come back.
    #[command(name = helper::SUBCOMMAND, hide = true)]
    KernelWrite(KernelWriteArgs),
    /// The node agent's own: becomes a program of the host's kmod.
    #[command(name = modules::SUBCOMMAND, hide = true)]
    HostKmod(HostKmodArgs),
}

/// Arguments of the helper that runs kmod.
#[derive(Args, Clone, Debug)]
pub struct HostKmodArgs {
    /// Root of the host's file system.
    pub host: PathBuf,
    /// The program: modprobe or modinfo.
    pub program: String,
    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

/// Arguments of the helper.
#[derive(Args, Clone, Debug)]
pub struct KernelWriteArgs {
    /// File to write to.
    pub path: PathBuf,
    /// What to write, in one write.
    pub text: String,
}

/// Flags of `host-provisioner controller`.
#[derive(Args, Clone, Debug)]
pub struct ControllerArgs {
    #[command(flatten)]
    pub kube: KubeArgs,
    #[command(flatten)]
    pub leader: LeaderElectionArgs,
    #[command(flatten)]
    pub retry: RetryArgs,
    #[command(flatten)]
    pub http: HttpArgs,
    /// Claims, and guest clusters, worked on at once.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    pub worker_threads: u16,
    /// ClusterRole that says what a guest may do in its own claim namespace.
    #[arg(long, default_value = "vf-provisioner-guest")]
    pub guest_cluster_role: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_flags_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn csi_users_find_their_flags() {
        let args = [
            "host-provisioner",
            "controller",
            "--kubeconfig=/k",
            "--leader-election",
            "--leader-election-namespace=ns",
            "--leader-election-lease-duration=15s",
            "--leader-election-renew-deadline=10s",
            "--leader-election-retry-period=5s",
            "--kube-api-qps=20",
            "--kube-api-burst=40",
            "--http-endpoint=127.0.0.1:0",
            "--metrics-path=/m",
            "--retry-interval-start=1s",
            "--retry-interval-max=5m",
            "--worker-threads=10",
            "--timeout=15s",
        ];
        let Command::Controller(args) = Cli::try_parse_from(args).unwrap().command else {
            panic!("another command");
        };
        assert_eq!(args.worker_threads, 10);
        assert_eq!(args.retry.retry_interval_max.as_secs(), 300);
    }
}
