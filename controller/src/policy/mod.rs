//! `BackupPolicy`: checks what it says, starts backups when they are due, shows when the last one went well.

mod retention;
pub(crate) mod schedule;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, ResourceExt};
use lifeboat_crds::backup::{DeletionPolicy, PolicyRef};
use lifeboat_crds::backup_policy::Concurrency;
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::{Backup, BackupPolicy, BackupPolicyStatus, BackupSpec, ClusterRepository, labels};
use lifeboat_process::reconnect;
use tracing::info;

use self::schedule::{Due, Plan};
use crate::context::{Context, ReconcileError, on_error};
use crate::task::label_value;

/// A policy without a schedule, or one that waits long, is looked at again after this.
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

/// Runs the control loop.
pub(crate) async fn control(context: Arc<Context>) {
    let policies: Api<BackupPolicy> = Api::all(context.client.clone());
    let backups: Api<Backup> = Api::all(context.client.clone());
    Controller::new(policies, watcher::Config::default())
        .trigger_backoff(reconnect::backoff(reconnect::LONGEST))
        .watches(backups, watcher::Config::default(), |backup| {
            let policy = backup.spec.policy_ref.as_ref()?.name.clone();
            Some(ObjectRef::new(&policy).within(&backup.namespace()?))
        })
        .run(reconcile, on_error, context)
        .for_each(|_| async {})
        .await;
}

/// What a policy has been seen to be.
struct Observed {
    repository_exists: bool,
    /// Backups that follow the policy.
    backups: Vec<Backup>,
}

/// What is to be done.
#[derive(Debug, Default, PartialEq)]
struct Decision {
    /// Start a backup for this due time.
    start: Option<Timestamp>,
    /// Cancel these first.
    cancel: Vec<String>,
    /// A due run is left out because another still runs.
    skipped: Option<Timestamp>,
    missed: usize,
    next: Option<Timestamp>,
}

fn is_running(backup: &Backup) -> bool {
    !backup.status.as_ref().is_some_and(|status| conditions::is_finished(&status.conditions))
}

/// What to do about a schedule that is understood.
fn decide(policy: &BackupPolicy, plan: &Plan, observed: &Observed, now: Timestamp) -> Decision {
    let made = policy.metadata.creation_timestamp.as_ref().map_or(now, |made| made.0);
    let since =
        policy.status.as_ref().and_then(|status| status.last_schedule_time.as_ref()).map_or(made, |last| last.0);
    let Due { start, missed, next } = plan.due(since, now);
    let mut decision = Decision { missed, next, ..Decision::default() };
    let Some(due) = start else { return decision };
    let running: Vec<_> =
        observed.backups.iter().filter(|backup| is_running(backup)).map(ResourceExt::name_any).collect();
    let replace = policy.spec.schedule.as_ref().is_some_and(|schedule| schedule.concurrency == Concurrency::Replace);
    if !running.is_empty() && !replace {
        decision.skipped = Some(due);
    } else {
        decision.start = Some(due);
        decision.cancel = running;
    }
    decision
}

/// The name of the backup for a due time: the same after every restart, so that a run is never made twice.
fn backup_name(policy: &str, due: Timestamp) -> String {
    let stamp = due.strftime("%Y%m%d-%H%M%S");
    format!("{}-{stamp}", policy[..policy.floor_char_boundary(230)].trim_end_matches(['.', '-']))
}

async fn observe(policy: &BackupPolicy, namespace: &str, context: &Context) -> anyhow::Result<Observed> {
    let name = policy.name_any();
    let repositories: Api<ClusterRepository> = Api::all(context.client.clone());
    let repository_exists = match policy.spec.plan.repository() {
        Some(reference) => {
            repositories.get_opt(&reference.name).await.context("cannot read the ClusterRepository")?.is_some()
        }
        None => false,
    };
    let backups =
        context.namespaced::<Backup>(namespace).list(&ListParams::default()).await.context("cannot list backups")?;
    let follows = |backup: &Backup| backup.spec.policy_ref.as_ref().is_some_and(|reference| reference.name == name);
    Ok(Observed { repository_exists, backups: backups.into_iter().filter(follows).collect() })
}

async fn start(policy: &BackupPolicy, namespace: &str, due: Timestamp, context: &Context) -> anyhow::Result<()> {
    let policy_name = policy.name_any();
    let name = backup_name(&policy_name, due);
    let backup = Backup {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            labels: Some([(labels::POLICY.to_owned(), label_value(&policy_name))].into()),
            annotations: Some([(labels::SCHEDULED_AT.to_owned(), due.to_string())].into()),
            ..ObjectMeta::default()
        },
        spec: BackupSpec {
            policy_ref: Some(PolicyRef { name: policy_name }),
            plan: None,
            deletion_policy: DeletionPolicy::Retain,
        },
        status: None,
    };
    match context.namespaced::<Backup>(namespace).create(&PostParams::default(), &backup).await {
        Ok(_) => {
            info!(namespace, backup = name, "a scheduled backup is started");
            context.events.normal(policy, Reason::RunCreated, format!("started the backup {name}")).await;
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot create the backup {name}")),
    }
}

async fn apply(policy: &BackupPolicy, namespace: &str, decision: &Decision, context: &Context) -> anyhow::Result<()> {
    for name in &decision.cancel {
        info!(namespace, backup = name, "cancelled for its successor");
        context
            .namespaced::<Backup>(namespace)
            .delete(name, &DeleteParams::default())
            .await
            .context("cannot cancel a backup")?;
    }
    if let Some(due) = decision.start {
        start(policy, namespace, due, context).await?;
    }
    if let Some(due) = decision.skipped {
        context
            .events
            .warning(
                policy,
                Reason::RunSkipped,
                format!("the run due at {due} is left out: the one before it still runs"),
            )
            .await;
    }
    if decision.missed > 0 {
        context
            .events
            .warning(
                policy,
                Reason::RunMissed,
                format!("{} runs were due while no controller worked and are left out", decision.missed),
            )
            .await;
    }
    Ok(())
}

/// What the policy's `Ready` condition says.
fn readiness(
    policy: &BackupPolicy,
    plan: &Result<Option<Plan>, schedule::ScheduleError>,
    observed: &Observed,
) -> (State, Reason, String) {
    match plan {
        Err(error) => (State::False, error.reason(), error.to_string()),
        Ok(_) if !observed.repository_exists => {
            let name = policy.spec.plan.repository().map_or("", |reference| reference.name.as_str());
            (
                State::False,
                Reason::RepositoryNotFound,
                format!("there is no ClusterRepository `{name}`; create it or correct the name"),
            )
        }
        Ok(_) if policy.spec.suspend => {
            (State::True, Reason::Suspended, "no scheduled runs while spec.suspend is true".into())
        }
        Ok(None) => (State::True, Reason::Available, "backups on demand; there is no schedule".into()),
        Ok(Some(_)) => (State::True, Reason::Available, "scheduled".into()),
    }
}

fn newest_success(backups: &[Backup]) -> Option<(Time, String)> {
    let succeeded = |backup: &Backup| {
        let status = backup.status.as_ref()?;
        conditions::is_true(&status.conditions, ConditionType::Succeeded)
            .then(|| status.completion_time.clone())
            .flatten()
    };
    backups.iter().filter_map(|backup| Some((succeeded(backup)?, backup.name_any()))).max_by_key(|(time, _)| time.0)
}

async fn reconcile(policy: Arc<BackupPolicy>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    if policy.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let namespace = policy.namespace().unwrap_or_default();
    let now = Timestamp::now();
    let observed = observe(&policy, &namespace, &context).await?;
    let key = format!("{namespace}/{}", policy.name_any());
    let plan = policy.spec.schedule.as_ref().map(|schedule| Plan::new(schedule, &key)).transpose();
    let decision = match &plan {
        Ok(Some(plan)) if !policy.spec.suspend => decide(&policy, plan, &observed, now),
        _ => Decision::default(),
    };
    apply(&policy, &namespace, &decision, &context).await?;

    let mut status = policy.status.clone().unwrap_or_default();
    let generation = policy.metadata.generation;
    let (state, reason, message) = readiness(&policy, &plan, &observed);
    let old_reason =
        conditions::get(&status.conditions, ConditionType::Ready).map(|condition| condition.reason.clone());
    if state == State::False && old_reason.as_deref() != Some(reason.as_str()) {
        context.events.warning(&*policy, reason, message.clone()).await;
    }
    conditions::set(&mut status.conditions, ConditionType::Ready, state, reason, message, generation, now);
    status.observed_generation = generation;
    if let Some(due) = decision.start.or(decision.skipped) {
        status.last_schedule_time = Some(Time(due));
    }
    if decision.missed > 0 && decision.start.is_none() {
        status.last_schedule_time = Some(Time(now));
    }
    status.next_run_time = decision.next.map(Time);
    if let Some((time, name)) = newest_success(&observed.backups)
        && status.last_success_time.as_ref().is_none_or(|last| last.0 <= time.0)
    {
        status.last_success_time = Some(time);
        status.last_successful_backup = Some(name);
    }
    keep_to_rules(&policy, &observed.backups, &mut status, &context).await?;
    write_if_changed(&policy, &status, &context).await?;
    let wait =
        decision.next.and_then(|next| Duration::try_from(next.duration_since(now)).ok()).unwrap_or(LONGEST_PAUSE);
    Ok(Action::requeue(wait.clamp(Duration::from_millis(200), LONGEST_PAUSE)))
}

/// Removes recovery points that the policy's rules do not hold, when there may be some.
async fn keep_to_rules(
    policy: &BackupPolicy,
    backups: &[Backup],
    status: &mut BackupPolicyStatus,
    context: &Context,
) -> anyhow::Result<()> {
    if !retention::is_due(policy, backups) {
        return Ok(());
    }
    let now = Timestamp::now();
    let (state, reason, message) = match retention::retain(policy, backups, context).await? {
        Ok(mut done) => {
            let message = format!("{} recovery points stay", done.kept);
            if done.removed > 0 {
                let note = format!("{} recovery points are removed, {} stay", done.removed, done.kept);
                context.events.normal(policy, Reason::Expired, note).await;
            }
            // It runs again when a backup ended within the same second: what it did for that one stays shown.
            let before = status.retention.take().filter(|before| before.after_backup == done.after_backup);
            done.removed +=
                before.filter(|before| before.generation == done.generation).map_or(0, |before| before.removed);
            status.retention = Some(done);
            (State::True, Reason::Done, message)
        }
        Err((reason, message)) => (State::False, reason, format!("nothing expires: {message}")),
    };
    let generation = policy.metadata.generation;
    conditions::set(&mut status.conditions, ConditionType::MaintenanceHealthy, state, reason, message, generation, now);
    Ok(())
}

async fn write_if_changed(policy: &BackupPolicy, status: &BackupPolicyStatus, context: &Context) -> anyhow::Result<()> {
    if policy.status.as_ref() != Some(status) {
        context.write_status(policy, status).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn policy(concurrency: &str) -> BackupPolicy {
        serde_json::from_value(json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "BackupPolicy",
            "metadata": {"name": "p", "namespace": "n", "creationTimestamp": "2026-05-01T00:30:00Z"},
            "spec": {"schedule": {"cron": "0 * * * *", "concurrency": concurrency}, "tiers": [{"repository": {"ref": {"name": "r"}}}]}
        }))
        .unwrap()
    }

    fn decided(policy: &BackupPolicy, running: bool) -> Decision {
        let plan = Plan::new(policy.spec.schedule.as_ref().unwrap(), "k").unwrap();
        let backups =
            if running { vec![Backup::new("old", serde_json::from_value(json!({})).unwrap())] } else { Vec::new() };
        decide(policy, &plan, &Observed { repository_exists: true, backups }, "2026-05-01T01:00:05Z".parse().unwrap())
    }

    #[test]
    fn a_due_run_starts_is_left_out_or_replaces() {
        let due: Timestamp = "2026-05-01T01:00:00Z".parse().unwrap();
        assert_eq!(decided(&policy("Forbid"), false).start, Some(due));
        let left_out = decided(&policy("Forbid"), true);
        assert_eq!((left_out.start, left_out.skipped), (None, Some(due)));
        let replacing = decided(&policy("Replace"), true);
        assert_eq!((replacing.start, replacing.cancel), (Some(due), vec!["old".to_owned()]));
    }

    #[test]
    fn names_of_runs_are_stable_and_valid() {
        let due: Timestamp = "2026-05-01T01:00:00Z".parse().unwrap();
        assert_eq!(backup_name("nightly", due), "nightly-20260501-010000");
        assert!(backup_name(&"x".repeat(253), due).len() <= 253);
    }
}
