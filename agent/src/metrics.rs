//! What the agent counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The agent's metrics.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Tasks being done.
    pub(crate) running: Gauge,
    /// Tasks that ended well.
    pub(crate) succeeded: Counter,
    /// Tasks that ended badly.
    pub(crate) failed: Counter,
    /// Bytes read from volumes.
    pub(crate) read_bytes: Counter,
    /// Bytes that repositories grew by.
    pub(crate) stored_bytes: Counter,
    /// Files that could not be read or restored.
    pub(crate) skipped_files: Counter,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("tasks_running", "Volume tasks being done", metrics.running.clone());
        registry.register("tasks_succeeded", "Volume tasks that ended well", metrics.succeeded.clone());
        registry.register("tasks_failed", "Volume tasks that ended badly", metrics.failed.clone());
        registry.register("read_bytes", "Bytes read from volumes", metrics.read_bytes.clone());
        registry.register("stored_bytes", "Bytes that repositories grew by", metrics.stored_bytes.clone());
        registry.register("skipped_files", "Files that could not be read or restored", metrics.skipped_files.clone());
        metrics
    }
}
