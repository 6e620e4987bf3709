//! What the controller counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
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
    pub(crate) backups_waiting: Gauge,
    pub(crate) restores_waiting: Gauge,
    pub(crate) dispatch_wait_seconds: Histogram,
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
            backups_waiting: Gauge::default(),
            restores_waiting: Gauge::default(),
            dispatch_wait_seconds: Histogram::new(exponential_buckets(0.1, 2.0, 18)),
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
        registry.register(
            "backups_waiting",
            "Volumes to be backed up and applications to be brought to rest that wait for their turn",
            metrics.backups_waiting.clone(),
        );
        registry.register(
            "restores_waiting",
            "Volumes to be restored that wait for their turn",
            metrics.restores_waiting.clone(),
        );
        registry.register(
            "dispatch_wait_seconds",
            "How long after its due time work had its turn",
            metrics.dispatch_wait_seconds.clone(),
        );
        metrics
    }
}
