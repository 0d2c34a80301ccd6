//! Logs, and the HTTP endpoint with probes and metrics.

mod health;
mod http;

pub use health::{Check, Health};
pub use http::{Endpoint, EndpointError, serve};
/// Metrics are registered here; names get the prefix `vf_provisioner`.
pub use prometheus_client;

use std::sync::{Arc, Mutex};

use prometheus_client::registry::Registry;
use thiserror::Error;
use tracing_subscriber::EnvFilter;

use crate::cli::{LogArgs, LogFormat};

/// Why logging could not be set up.
#[derive(Debug, Error)]
pub enum LogError {
    #[error("--log-level: {0}")]
    Level(#[from] tracing_subscriber::filter::ParseError),
    #[error("logging is set up already: {0}")]
    Twice(String),
}

/// Sends logs to standard error. Once in a process.
pub fn init_logs(args: &LogArgs) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(&args.log_level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let done = match args.log_format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    done.map_err(|e| LogError::Twice(e.to_string()))
}

/// The metrics of the process.
pub type Metrics = Arc<Mutex<Registry>>;

/// An empty set of metrics.
#[must_use]
pub fn metrics() -> Metrics {
    Arc::new(Mutex::new(Registry::with_prefix("vf_provisioner")))
}
