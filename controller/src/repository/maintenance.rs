//! Maintenance of a repository on its schedule: an agent is asked to give the space of what expired back, and what came of it is shown.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt};
use lifeboat_crds::backup_policy::{Concurrency, Schedule};
use lifeboat_crds::cluster_repository::{Maintenance, MaintenanceStatus, Mode};
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::volume_task::{MaintainOperation, Operation, RepositoryAccess};
use lifeboat_crds::{ClusterRepository, ClusterRepositoryStatus, DurationString, VolumeTask};
use tracing::info;

use crate::child::remove;
use crate::context::Context;
use crate::policy::schedule::{Plan, ScheduleError};
use crate::task::{self, Order, Standing};

/// A run ends by then; the next one goes on where it ended.
const TASK_LIMIT: SignedDuration = SignedDuration::from_hours(6);
/// A run waits this long for backups that began before, then leaves them to the next.
const PATIENCE: Duration = Duration::from_mins(2);
/// The next run after one that had to leave something, or that failed.
const AGAIN: SignedDuration = SignedDuration::from_mins(15);
/// The next run after one whose agent was lost.
const ELSEWHERE: SignedDuration = SignedDuration::from_secs(10);
/// While a run is under way it is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How the runs of several repositories are spread, unless the spec says otherwise.
const JITTER: &str = "1h";

/// What is done next.
#[derive(Debug, PartialEq)]
enum Step {
    /// Nothing until then.
    Wait(Option<Timestamp>),
    Look,
    Start,
    /// The run under this name ended.
    End(Box<VolumeTask>),
    /// The run was lost: another agent is asked.
    GiveUp(String),
}

/// The schedule, with the repository's own part of the jitter.
fn plan(maintenance: &Maintenance, key: &str) -> Result<Plan, ScheduleError> {
    let schedule = Schedule {
        cron: maintenance.cron.clone(),
        time_zone: maintenance.time_zone.clone(),
        jitter: Some(maintenance.jitter.clone().unwrap_or_else(|| DurationString(JITTER.to_owned()))),
        starting_deadline: None,
        concurrency: Concurrency::Forbid,
    };
    Plan::new(&schedule, key)
}

/// What is done next. `next`: when the schedule, as it stands now, comes due next.
fn decide(
    status: &MaintenanceStatus,
    tasks: &BTreeMap<String, VolumeTask>,
    is_suspended: bool,
    next: Option<Timestamp>,
    now: Timestamp,
) -> Step {
    if let Some(name) = &status.task {
        let Some(task) = tasks.get(name) else { return Step::GiveUp("its task was deleted".to_owned()) };
        return match task::standing(task, now) {
            Standing::Succeeded | Standing::Failed(..) => Step::End(Box::new(task.clone())),
            Standing::Waiting(Some(why)) | Standing::Running(Some(why)) => Step::GiveUp(why),
            Standing::Waiting(None) | Standing::Running(None) => Step::Look,
        };
    }
    if is_suspended {
        return Step::Wait(None);
    }
    match status.next_run_time.as_ref().map(|time| time.0) {
        Some(due) if due <= now => Step::Start,
        // The schedule may have been changed since.
        due => Step::Wait(due.into_iter().chain(next).min()),
    }
}

/// What a run that ended leads to.
fn end(status: &mut ClusterRepositoryStatus, task: &VolumeTask, next: Option<Timestamp>, now: Timestamp) {
    let generation = status.observed_generation;
    let shown = status.maintenance.get_or_insert_default();
    shown.task = None;
    shown.last_completion_time = Some(Time(now));
    let soon = now.checked_add(AGAIN).ok();
    let result = task.status.as_ref().and_then(|status| status.result.as_ref()).and_then(|result| result.reclaimed);
    let (state, reason, message) = match (task::standing(task, now), result) {
        (Standing::Succeeded, Some(result)) => {
            shown.last_success_time = Some(Time(now));
            shown.last_result = Some(result);
            let message = match result.waiting_for {
                0 => format!("{} expired snapshots removed, {} bytes deleted", result.snapshots, result.deleted_bytes),
                count => {
                    format!("{} bytes deleted; {count} backups that began before are waited for", result.deleted_bytes)
                }
            };
            (State::True, Reason::Done, message)
        }
        (Standing::Failed(reason, message), _) => (State::False, Reason::from_text(&reason), message),
        _ => (State::False, Reason::InternalError, "the agent did not say what it did".to_owned()),
    };
    let is_done = state == State::True && result.is_some_and(|result| result.waiting_for == 0);
    shown.next_run_time = if is_done { next } else { soon.into_iter().chain(next).min() }.map(Time);
    conditions::set(&mut status.conditions, ConditionType::MaintenanceHealthy, state, reason, message, generation, now);
}

/// One step; changes `status` and returns when to look again.
pub(super) async fn maintain(
    repository: &ClusterRepository,
    status: &mut ClusterRepositoryStatus,
    context: &Context,
) -> Result<Option<Duration>> {
    let now = Timestamp::now();
    let uid = repository.uid().unwrap_or_default();
    let spec = &repository.spec.maintenance;
    let generation = repository.metadata.generation;
    let next = match plan(spec, &uid) {
        Ok(plan) => plan.due(now, now).next,
        Err(error) => {
            let message = format!("maintenance: {error}");
            conditions::set(
                &mut status.conditions,
                ConditionType::MaintenanceHealthy,
                State::False,
                error.reason(),
                message,
                generation,
                now,
            );
            return Ok(None);
        }
    };
    let tasks_api = context.namespaced::<VolumeTask>(&context.namespace);
    let tasks = task::of_owner(&tasks_api, &uid).await?;
    let is_ready = conditions::is_true(&status.conditions, ConditionType::Ready);
    let is_suspended = spec.suspend || repository.spec.mode == Mode::ReadOnly || !is_ready;
    let shown = status.maintenance.get_or_insert_default();
    let current = shown.task.clone().or_else(|| shown.next_run_time.as_ref().map(|due| task_name(&uid, due.0)));
    for (name, task) in tasks.iter().filter(|(name, _)| current.as_ref() != Some(*name)) {
        info!(task = name, "a run of maintenance is cleared away");
        remove(&tasks_api, task).await?;
    }
    Ok(match decide(shown, &tasks, is_suspended, next, now) {
        Step::Wait(until) => {
            shown.next_run_time = until.map(Time);
            until.and_then(|until| Duration::try_from(until.duration_since(now)).ok())
        }
        Step::Look => Some(LOOK_AGAIN),
        Step::Start => start(repository, status, context, now).await?,
        Step::End(task) => {
            end(status, &task, next, now);
            info!(repository = repository.name_any(), task = task.name_any(), "maintenance ended");
            Some(LOOK_AGAIN)
        }
        Step::GiveUp(why) => {
            info!(repository = repository.name_any(), why, "maintenance is begun again elsewhere");
            shown.task = None;
            shown.next_run_time = now.checked_add(ELSEWHERE).ok().map(Time);
            Some(LOOK_AGAIN)
        }
    })
}

/// The same for the same due time, so that a run is never made twice.
fn task_name(uid: &str, due: Timestamp) -> String {
    task::name('m', uid, &due.as_second().to_string())
}

/// Asks an agent. Another node has its turn each time.
async fn start(
    repository: &ClusterRepository,
    status: &mut ClusterRepositoryStatus,
    context: &Context,
    now: Timestamp,
) -> Result<Option<Duration>> {
    let uid = repository.uid().unwrap_or_default();
    let id = status.id.clone().unwrap_or_default();
    let generation = repository.metadata.generation;
    let shown = status.maintenance.get_or_insert_default();
    let due = shown.next_run_time.as_ref().map_or(now, |due| due.0);
    let name = task_name(&uid, due);
    let Some(node) = context.dispatch.any_node(context, &name).await? else {
        let message = "there is no node with a running agent that could do it".to_owned();
        conditions::set(
            &mut status.conditions,
            ConditionType::MaintenanceHealthy,
            State::False,
            Reason::NoAgent,
            message,
            generation,
            now,
        );
        return Ok(Duration::try_from(ELSEWHERE).ok());
    };
    info!(repository = repository.name_any(), node, "maintenance begins");
    let order = Order {
        name: name.clone(),
        owner: format!("{}/{}", ClusterRepository::kind(&()), repository.name_any()),
        owner_uid: uid,
        node,
        volume: None,
        workload: None,
        repository: RepositoryAccess::new(repository.name_any(), id, repository.spec.clone()),
        operation: Operation::Maintain(MaintainOperation { patience_seconds: PATIENCE.as_secs() }),
        deadline: now.checked_add(TASK_LIMIT).unwrap_or(now),
    };
    task::create(&context.namespaced(&context.namespace), order).await?;
    shown.task = Some(name);
    shown.last_schedule_time = Some(Time(due));
    Ok(Some(LOOK_AGAIN))
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json!(..) as an argument reads better without a borrow
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_767_225_600 + second).unwrap()
    }

    fn status(value: Value) -> MaintenanceStatus {
        serde_json::from_value(value).unwrap()
    }

    fn task(status: Value) -> VolumeTask {
        serde_json::from_value(json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "VolumeTask", "metadata": {"name": "m", "creationTimestamp": at(0).to_string()},
            "spec": {
                "nodeName": "n", "deadline": at(9999).to_string(), "operation": {"maintain": {"patienceSeconds": 1}},
                "repository": {"name": "r", "id": "ab", "backend": {"filesystem": {"path": "/x"}}, "encryptionSecret": {"name": "s"}}
            },
            "status": status
        }))
        .unwrap()
    }

    fn ended(state: &str, waiting_for: u64) -> VolumeTask {
        let condition = json!({"type": "Succeeded", "status": state, "reason": "Unreachable", "message": "no route", "lastTransitionTime": at(0).to_string()});
        let reclaimed =
            json!({"snapshots": 3, "deletedBytes": 9, "copiedBytes": 0, "aborted": 0, "waitingFor": waiting_for});
        let transfer = json!({"files": 0, "bytes": 0, "readBytes": 0, "newBytes": 0, "storedBytes": 0, "millis": 1});
        task(
            json!({"conditions": [condition], "result": {"snapshot": "", "transfer": transfer, "skipped": 0, "reclaimed": reclaimed}}),
        )
    }

    fn decided(shown: Value, task: Option<VolumeTask>, is_suspended: bool, now: i64) -> Step {
        let tasks = task.into_iter().map(|task| ("m".to_owned(), task)).collect();
        decide(&status(shown), &tasks, is_suspended, Some(at(1000)), at(now))
    }

    #[test]
    fn a_run_starts_when_it_is_due_and_never_while_suspended() {
        assert_eq!(decided(json!({}), None, false, 0), Step::Wait(Some(at(1000))));
        let due = json!({"nextRunTime": at(50).to_string()});
        assert_eq!(decided(due.clone(), None, false, 49), Step::Wait(Some(at(50))));
        assert_eq!(decided(due.clone(), None, false, 50), Step::Start);
        assert_eq!(decided(due.clone(), None, false, 90_000), Step::Start, "a run that was missed is made up for");
        assert_eq!(decided(due, None, true, 50), Step::Wait(None));
        let later = json!({"nextRunTime": at(5000).to_string()});
        assert_eq!(decided(later, None, false, 0), Step::Wait(Some(at(1000))), "the schedule was changed");
    }

    #[test]
    fn a_run_under_way_is_followed_and_a_lost_one_is_begun_again() {
        let running = json!({"task": "m", "nextRunTime": at(0).to_string()});
        let beats = |second: i64| task(json!({"heartbeatTime": at(second).to_string()}));
        assert_eq!(decided(running.clone(), Some(beats(0)), false, 30), Step::Look);
        assert!(matches!(decided(running.clone(), Some(beats(0)), false, 90), Step::GiveUp(_)));
        assert!(
            matches!(decided(running.clone(), Some(task(Value::Null)), false, 600), Step::GiveUp(_)),
            "no agent took it"
        );
        assert!(matches!(decided(running.clone(), None, false, 30), Step::GiveUp(_)));
        assert!(matches!(decided(running, Some(ended("True", 0)), true, 30), Step::End(_)));
    }

    #[test]
    fn what_a_run_did_is_shown_and_one_that_failed_or_left_something_is_followed_soon() {
        let after = |task: &VolumeTask| {
            let mut status = ClusterRepositoryStatus::default();
            end(&mut status, task, Some(at(86_400)), at(0));
            let healthy = conditions::get(&status.conditions, ConditionType::MaintenanceHealthy).unwrap();
            let shown = status.maintenance.clone().unwrap();
            (healthy.status.clone(), healthy.message.clone(), shown)
        };
        let (state, _, shown) = after(&ended("True", 0));
        assert_eq!((state.as_str(), shown.next_run_time.map(|time| time.0)), ("True", Some(at(86_400))));
        assert_eq!(shown.last_result.map(|result| result.deleted_bytes), Some(9));
        let (state, message, shown) = after(&ended("True", 2));
        assert_eq!((state.as_str(), shown.next_run_time.map(|time| time.0)), ("True", at(0).checked_add(AGAIN).ok()));
        assert!(message.contains("2 backups"), "{message}");
        let (state, message, shown) = after(&ended("False", 0));
        assert_eq!((state.as_str(), message.as_str()), ("False", "no route"));
        assert_eq!(
            (shown.last_success_time, shown.next_run_time.map(|time| time.0)),
            (None, at(0).checked_add(AGAIN).ok())
        );
    }

    #[test]
    fn a_schedule_has_a_default_and_nonsense_is_refused() {
        let maintenance = |value: Value| serde_json::from_value::<Maintenance>(value).unwrap();
        assert!(plan(&maintenance(json!({})), "k").is_ok());
        assert!(plan(&maintenance(json!({"cron": "61 * * * *"})), "k").is_err());
        assert!(plan(&maintenance(json!({"timeZone": "Nowhere/Land"})), "k").is_err());
    }
}
