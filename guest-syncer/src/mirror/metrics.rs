//! Metrics of the orphan pass. Labels are of fixed sets, never object names.

use std::sync::PoisonError;

use common::telemetry::Metrics;
use common::telemetry::prometheus_client::metrics::counter::Counter;
use common::telemetry::prometheus_client::metrics::family::Family;
use common::telemetry::prometheus_client::metrics::gauge::Gauge;

type Label = Vec<(&'static str, &'static str)>;

pub struct OrphanMetrics {
    passes: Family<Label, Counter>,
    pub(super) suspects: Gauge,
    pub(super) held: Gauge,
    pub(super) deleted: Counter,
}

impl OrphanMetrics {
    #[must_use]
    pub fn register(metrics: &Metrics) -> Self {
        let made = Self {
            passes: Family::default(),
            suspects: Gauge::default(),
            held: Gauge::default(),
            deleted: Counter::default(),
        };
        let mut registry = metrics.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register(
            "syncer_orphan_passes",
            "Looks for copies on the host without a claim here, by outcome",
            made.passes.clone(),
        );
        registry.register(
            "syncer_orphan_suspects",
            "Copies whose claims the last first look did not see",
            made.suspects.clone(),
        );
        registry.register(
            "syncer_orphans_held",
            "Orphans that wait for an administrator's word (MassOrphan); 0 when there is no such",
            made.held.clone(),
        );
        registry.register(
            "syncer_orphans_deleted",
            "Orphaned copies deleted on the host",
            made.deleted.clone(),
        );
        made
    }

    pub(super) fn passed(&self, outcome: &'static str) {
        self.passes.get_or_create(&vec![("outcome", outcome)]).inc();
    }
}
