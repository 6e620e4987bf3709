//! `ClusterRepository`: looks at the store, makes the repository when the location is empty, says how it is, has it maintained.

mod maintenance;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Api, ResourceExt};
use lifeboat_crds::cluster_repository::Mode;
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::{ClusterRepository, ClusterRepositoryStatus};
use lifeboat_process::access::AccessError;
use lifeboat_process::reconnect;
use lifeboat_repository::snapshot::Content;
use tracing::info;

use crate::context::{Context, ReconcileError, on_error, write_status};

/// A repository that is ready is looked at again after this.
const READY_INTERVAL: Duration = Duration::from_mins(5);
/// One that is not, after this.
const UNREADY_INTERVAL: Duration = Duration::from_secs(20);

/// Nothing is looked at more often.
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);

/// Runs the control loop.
pub(crate) async fn control(context: Arc<Context>) {
    let api: Api<ClusterRepository> = Api::all(context.client.clone());
    let controller =
        Controller::new(api, watcher::Config::default()).trigger_backoff(reconnect::backoff(reconnect::LONGEST));
    context.dispatch.repositories.get_or_init(|| controller.store());
    controller.run(reconcile, on_error, context).for_each(|_| async {}).await;
}

/// When stores were looked at last: opening a repository is dear, and much else starts a reconciliation.
#[derive(Debug, Default)]
pub(crate) struct Looked(Mutex<HashMap<String, (Option<i64>, Instant)>>);

impl Looked {
    fn key(repository: &ClusterRepository) -> String {
        repository.uid().unwrap_or_default()
    }

    /// How long the last look holds; `None`: it is time for another.
    fn holds(&self, repository: &ClusterRepository) -> Option<Duration> {
        let conditions = repository.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
        let interval =
            if conditions::is_true(conditions, ConditionType::Ready) { READY_INTERVAL } else { UNREADY_INTERVAL };
        let looked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (generation, at) = looked.get(&Self::key(repository))?;
        (*generation == repository.metadata.generation).then(|| interval.checked_sub(at.elapsed())).flatten()
    }

    fn note(&self, repository: &ClusterRepository) {
        let mut looked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        looked.retain(|_, (_, at)| at.elapsed() < READY_INTERVAL);
        looked.insert(Self::key(repository), (repository.metadata.generation, Instant::now()));
    }
}

/// What was found.
struct Observed {
    id: String,
    format: u32,
    recovery_points: u64,
}

async fn observe(repository: &ClusterRepository, context: &Context) -> Result<Observed, AccessError> {
    let spec = &repository.spec;
    let encryption = &spec.encryption.secret_ref;
    let opened = match spec.mode {
        Mode::ReadWrite => context.access.open_or_init(&spec.backend, encryption).await?,
        Mode::ReadOnly => context.access.open(&spec.backend, encryption, None).await?,
    };
    let id = opened.id().to_string();
    if let Some(known) = repository.status.as_ref().and_then(|status| status.id.as_ref())
        && *known != id
    {
        return Err(AccessError {
            reason: Reason::RepositoryDamaged,
            message: format!(
                "the location held the repository {known} and now holds {id}; somebody replaced it: bring the old one back or create another ClusterRepository"
            ),
        });
    }
    let snapshots = opened.snapshots().await.map_err(|error| AccessError::from_repository(&error))?;
    let recovery_points =
        snapshots.iter().filter(|snapshot| matches!(snapshot.content, Content::RecoveryPoint { .. })).count() as u64;
    Ok(Observed { id, format: opened.config().format, recovery_points })
}

/// The status that what was found leads to.
fn report(
    before: Option<&ClusterRepositoryStatus>,
    generation: Option<i64>,
    found: Result<Observed, AccessError>,
    now: jiff::Timestamp,
) -> ClusterRepositoryStatus {
    let mut status = before.cloned().unwrap_or_default();
    status.observed_generation = generation;
    let mut set = |type_, state, reason, message: String| {
        conditions::set(&mut status.conditions, type_, state, reason, message, generation, now);
    };
    match found {
        Ok(found) => {
            set(ConditionType::Reachable, State::True, Reason::Available, "the store answers".into());
            set(
                ConditionType::Ready,
                State::True,
                Reason::Available,
                format!("{} recovery points", found.recovery_points),
            );
            status.id = Some(found.id);
            status.format = Some(found.format);
            status.recovery_points = Some(found.recovery_points);
            status.last_contact = Some(Time(now));
        }
        Err(error) => {
            let reached = if is_about_the_way(error.reason) { State::False } else { State::Unknown };
            set(ConditionType::Reachable, reached, error.reason, error.message.clone());
            set(ConditionType::Ready, State::False, error.reason, error.message);
        }
    }
    status
}

/// Whether the store itself could not be spoken to.
fn is_about_the_way(reason: Reason) -> bool {
    matches!(reason, Reason::Unreachable | Reason::AccessDenied | Reason::BucketNotFound)
}

async fn reconcile(seen: Arc<ClusterRepository>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let api: Api<ClusterRepository> = Api::all(context.client.clone());
    // What the watch shows may be older than what this controller wrote last.
    let found = api.get_opt(&seen.name_any()).await.context("cannot read the ClusterRepository")?;
    let Some(repository) = found.filter(|found| found.metadata.deletion_timestamp.is_none()) else {
        return Ok(Action::await_change());
    };
    let (mut status, mut pause) = match context.looked.holds(&repository) {
        Some(left) => (repository.status.clone().unwrap_or_default(), left),
        None => look(&repository, &context).await,
    };
    if let Some(sooner) = maintenance::maintain(&repository, &mut status, &context).await? {
        pause = pause.min(sooner);
    }
    // A status that says nothing new is not written: the write itself would start the next round.
    let same = repository.status.as_ref().is_some_and(|before| {
        let mut before = before.clone();
        before.last_contact.clone_from(&status.last_contact);
        before == status
    });
    if !same {
        write_status(&api, &repository, &status).await?;
    }
    Ok(Action::requeue(pause.max(SHORTEST_PAUSE)))
}

/// Asks the store, tells what changed, and returns the status and when to look again.
async fn look(repository: &ClusterRepository, context: &Context) -> (ClusterRepositoryStatus, Duration) {
    let found = observe(repository, context).await;
    context.looked.note(repository);
    let before = repository.status.as_ref();
    let was_ready = before.is_some_and(|status| conditions::is_true(&status.conditions, ConditionType::Ready));
    let old_reason =
        before.and_then(|status| conditions::get(&status.conditions, ConditionType::Ready)).map(|c| c.reason.clone());
    match &found {
        Ok(found) if !was_ready => {
            info!(repository = repository.name_any(), id = found.id, "ready");
            context.events.normal(repository, Reason::Available, "the repository is ready").await;
        }
        Err(error) if old_reason.as_deref() != Some(error.reason.as_str()) => {
            context.events.warning(repository, error.reason, error.message.clone()).await;
        }
        _ => {}
    }
    let pause = if found.is_ok() { READY_INTERVAL } else { UNREADY_INTERVAL };
    let status = report(before, repository.metadata.generation, found, jiff::Timestamp::now());
    (status, pause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_what_was_known_and_says_why() {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let ready = report(None, Some(1), Ok(Observed { id: "ab".into(), format: 1, recovery_points: 3 }), now);
        assert!(conditions::is_true(&ready.conditions, ConditionType::Ready));
        let error = AccessError { reason: Reason::Unreachable, message: "no route".into() };
        let lost = report(Some(&ready), Some(2), Err(error), now);
        let condition = conditions::get(&lost.conditions, ConditionType::Ready).unwrap();
        assert_eq!(
            (condition.status.as_str(), condition.reason.as_str(), condition.message.as_str()),
            ("False", "Unreachable", "no route")
        );
        assert_eq!((lost.id.as_deref(), lost.recovery_points), (Some("ab"), Some(3)));
    }
}
