//! The controller's metrics. Labels are of fixed sets, never object names.

use std::sync::PoisonError;
use std::time::Duration;

use common::telemetry::Metrics;
use common::telemetry::prometheus_client::metrics::counter::Counter;
use common::telemetry::prometheus_client::metrics::family::Family;
use common::telemetry::prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

type Label = Vec<(&'static str, &'static str)>;

pub(super) struct ControllerMetrics {
    reconciles: Family<Label, Counter>,
    refusals: Family<Label, Counter>,
    seconds: Histogram,
}

impl ControllerMetrics {
    pub(super) fn register(metrics: &Metrics) -> Self {
        let made = Self {
            reconciles: Family::default(),
            refusals: Family::default(),
            seconds: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
        };
        let mut registry = metrics.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register(
            "controller_reconciles",
            "Reconciles by kind and outcome (ok, or the class of the error)",
            made.reconciles.clone(),
        );
        registry.register(
            "controller_refusals",
            "Refused claims by reason, counted when the refusal is new",
            made.refusals.clone(),
        );
        registry.register(
            "controller_reconcile_seconds",
            "Time of a reconcile",
            made.seconds.clone(),
        );
        made
    }

    pub(super) fn reconciled(&self, kind: &'static str, outcome: &'static str, took: Duration) {
        let label = vec![("kind", kind), ("outcome", outcome)];
        self.reconciles.get_or_create(&label).inc();
        self.seconds.observe(took.as_secs_f64());
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&vec![("reason", reason)]).inc();
    }
}
