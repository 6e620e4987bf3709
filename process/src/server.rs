//! `/healthz`, `/readyz` and `/metrics`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Whether the process may be given work.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Says so from now on.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }
}

struct Metrics {
    registry: Registry,
    resident: Gauge,
}

/// Serves health on one address and metrics on another until the process ends.
pub async fn serve(
    health: SocketAddr,
    metrics: SocketAddr,
    readiness: Readiness,
    mut registry: Registry,
) -> Result<()> {
    let resident = Gauge::default();
    registry.register("process_resident_memory_bytes", "Resident memory of the process", resident.clone());
    let metrics_state = Arc::new(Metrics { registry, resident });
    let health_routes =
        Router::new().route("/healthz", get(|| async { "ok" })).route("/readyz", get(ready)).with_state(readiness);
    let metrics_routes = Router::new().route("/metrics", get(show_metrics)).with_state(metrics_state);
    let health = tokio::net::TcpListener::bind(health).await.with_context(|| format!("cannot listen on {health}"))?;
    let metrics =
        tokio::net::TcpListener::bind(metrics).await.with_context(|| format!("cannot listen on {metrics}"))?;
    tokio::try_join!(axum::serve(health, health_routes), axum::serve(metrics, metrics_routes))?;
    Ok(())
}

async fn ready(State(readiness): State<Readiness>) -> StatusCode {
    if readiness.0.load(Ordering::Relaxed) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn show_metrics(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    if let Some(bytes) = resident_bytes() {
        metrics.resident.set(bytes);
    }
    let mut text = String::new();
    match encode(&mut text, &metrics.registry) {
        Ok(()) => {
            (StatusCode::OK, [(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, [(CONTENT_TYPE, "text/plain")], error.to_string()),
    }
}

/// Resident memory of this process.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read() {
        assert!(resident_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
