//! Command-line flags that every program here shares, with the names and
//! defaults that users of CSI sidecars know. No I/O.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use thiserror::Error;

/// Which API server, and how hard it may be worked.
#[derive(Args, Clone, Debug)]
pub struct KubeArgs {
    /// Kubeconfig of the cluster; read again when it or a file it names changes. Left out: the
    /// pod's ServiceAccount.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Requests a second to the API server, 0 for no limit.
    #[arg(long, default_value_t = 250.0, value_parser = rate)]
    pub kube_api_qps: f64,
    /// Requests to the API server that may come at once, above the rate.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    pub kube_api_burst: u32,
    /// How long one step of work may take before it is tried again.
    #[arg(long, default_value = "15s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// Leader election through a Lease.
#[derive(Args, Clone, Debug)]
pub struct LeaderElectionArgs {
    /// Work only while holding the Lease, so that several replicas may run.
    #[arg(long)]
    pub leader_election: bool,
    /// Namespace of the Lease. Left out: the pod's own.
    #[arg(long, env = "POD_NAMESPACE")]
    pub leader_election_namespace: Option<String>,
    /// How long the others wait before they take over from a silent leader.
    #[arg(long, default_value = "15s", value_parser = parse_duration)]
    pub leader_election_lease_duration: Duration,
    /// How long a leader tries to renew before it stops its work; shorter than the lease.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub leader_election_renew_deadline: Duration,
    /// Time between tries to get or renew the Lease.
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    pub leader_election_retry_period: Duration,
    /// Name in the Lease, unique to this process. Left out: the host name and a random part.
    #[arg(long, env = "POD_NAME")]
    pub leader_election_identity: Option<String>,
}

/// Back-off of failed work, for each object of its own.
#[derive(Args, Clone, Copy, Debug)]
pub struct RetryArgs {
    /// Wait after a first failure; it doubles with each further one.
    #[arg(long, default_value = "1s", value_parser = parse_duration)]
    pub retry_interval_start: Duration,
    /// The longest wait between two tries.
    #[arg(long, default_value = "5m", value_parser = parse_duration)]
    pub retry_interval_max: Duration,
}

/// The endpoint for probes and metrics.
#[derive(Args, Clone, Debug)]
pub struct HttpArgs {
    /// Address for /healthz, /readyz and metrics, such as 0.0.0.0:8080. Left out: none.
    #[arg(long)]
    pub http_endpoint: Option<SocketAddr>,
    /// Path of the metrics.
    #[arg(long, default_value = "/metrics", value_parser = absolute_path)]
    pub metrics_path: String,
}

/// How logs look.
#[derive(Args, Clone, Debug)]
pub struct LogArgs {
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// What to log, as in `info` or `info,host_provisioner=debug`.
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for a person.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why a duration was not understood.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a duration; write it as 500ms, 15s, 5m or 1h30m")]
pub struct BadDuration(String);

/// Reads a duration in Go's manner: numbers with a unit of ms, s, m or h.
pub fn parse_duration(text: &str) -> Result<Duration, BadDuration> {
    let bad = || BadDuration(text.to_owned());
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(bad)?;
        let (number, tail) = rest.split_at(digits);
        let number: f64 = number.parse().map_err(|_| bad())?;
        let unit = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(bad()),
        };
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| bad())?;
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = tail;
    }
    Ok(total)
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate >= 0.0 => Ok(rate),
        _ => Err("give requests a second, such as 250 or 0.5, or 0 for no limit".to_owned()),
    }
}

fn absolute_path(text: &str) -> Result<String, String> {
    if text.starts_with('/') && !matches!(text, "/" | "/healthz" | "/readyz") {
        Ok(text.to_owned())
    } else {
        Err("give a path that starts with / and is not /healthz or /readyz".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, millis) in [
            ("0s", 0),
            ("500ms", 500),
            ("15s", 15_000),
            ("1.5s", 1_500),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("5m0s", 300_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(millis)),
                "{text}"
            );
        }
        for text in [
            "",
            "15",
            "s",
            "-1s",
            "1d",
            "1s1",
            "1..s",
            "99999999999999999999h",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
