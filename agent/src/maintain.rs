//! Maintenance of a repository: deletes what no recovery point refers to any more, beside running backups.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lifeboat_crds::backup::Transfer;
use lifeboat_crds::cluster_repository::Reclaimed;
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::volume_task::{Operation, TaskResult};
use lifeboat_repository::expire::{ExpireOptions, ExpireReport};
use lifeboat_repository::progress::Progress;
use lifeboat_repository::repository::Repository;
use tracing::info;

use crate::outcome::Failure;
use crate::report::Reporter;
use crate::task::stopped;

/// Expires within the time that is left. Stopped at any point, another run goes on where this one ended.
pub(crate) async fn maintain(
    repository: &Repository,
    operation: &Operation,
    left: Duration,
    reporter: &Reporter,
    progress: &Arc<Progress>,
) -> Result<TaskResult, Failure> {
    let Operation::Maintain(operation) = operation else {
        return Err(Failure::new(Reason::InternalError, "the task names no volume"));
    };
    let began = Instant::now();
    let options =
        ExpireOptions { patience: Duration::from_secs(operation.patience_seconds), ..ExpireOptions::default() };
    let reporting = tokio::spawn(reporter.clone().keep_reporting(Arc::clone(progress)));
    let expired = tokio::time::timeout(left, repository.expire(options, Arc::clone(progress))).await;
    reporting.abort();
    let report = expired
        .map_err(|_| Failure::new(Reason::TimedOut, "maintenance did not end by its deadline; the next run goes on"))?
        .map_err(|error| stopped(progress).unwrap_or_else(|| Failure::of(&error, Reason::InternalError)))?;
    info!(bytes = report.bytes_deleted, snapshots = report.snapshots_removed, "maintained");
    let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(TaskResult {
        transfer: Transfer { millis, ..Transfer::default() },
        reclaimed: Some(reclaimed(&report)),
        ..TaskResult::default()
    })
}

fn reclaimed(report: &ExpireReport) -> Reclaimed {
    Reclaimed {
        snapshots: report.snapshots_removed,
        deleted_bytes: report.bytes_deleted,
        copied_bytes: report.bytes_copied,
        aborted: report.aborted.len() as u64,
        waiting_for: report.waiting_for.len() as u64,
    }
}
