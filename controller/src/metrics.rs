//! What the controller counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// The controller's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) backups_succeeded: Counter,
    pub(crate) backups_failed: Counter,
    pub(crate) restores_succeeded: Counter,
    pub(crate) restores_failed: Counter,
    pub(crate) reconcile_errors: Counter,
    pub(crate) backup_seconds: Histogram,
    pub(crate) freeze_seconds: Histogram,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            backups_succeeded: Counter::default(),
            backups_failed: Counter::default(),
            restores_succeeded: Counter::default(),
            restores_failed: Counter::default(),
            reconcile_errors: Counter::default(),
            backup_seconds: Histogram::new(exponential_buckets(1.0, 2.0, 16)),
            freeze_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 16)),
        };
        registry.register("backups_succeeded", "Backups that ended well", metrics.backups_succeeded.clone());
        registry.register("backups_failed", "Backups that ended badly", metrics.backups_failed.clone());
        registry.register("restores_succeeded", "Restores that ended well", metrics.restores_succeeded.clone());
        registry.register("restores_failed", "Restores that ended badly", metrics.restores_failed.clone());
        registry.register(
            "reconcile_errors",
            "Reconciliations that failed and are tried again",
            metrics.reconcile_errors.clone(),
        );
        registry.register("backup_seconds", "How long backups took", metrics.backup_seconds.clone());
        registry.register("freeze_seconds", "How long applications were frozen", metrics.freeze_seconds.clone());
        metrics
    }
}
