//! `Restore`: finds a recovery point, checks the whole plan, prepares the cluster, makes claims, has agents fill them, then
//! applies objects and gives streams to their commands.
//!
//! Nothing is changed before everything is checked; a claim that exists is never written to.

mod apply;
mod claims;
mod clones;
mod cluster;
mod plan;
mod streams;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, ResourceExt};
use lifeboat_crds::backup::Phase;
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::{ClusterRepository, Restore, RestoreStatus, VolumeTask, labels};
use lifeboat_process::access::AccessError;
use lifeboat_process::reconnect;
use lifeboat_repository::repository::Repository;
use serde_json::json;
use tracing::{Instrument, info_span, warn};

use crate::context::{Context, ReconcileError, on_error};
use crate::task;

/// A running restore is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Runs the control loop.
pub(crate) async fn control(context: Arc<Context>) {
    let restores: Api<Restore> = Api::all(context.client.clone());
    let tasks: Api<VolumeTask> = Api::namespaced(context.client.clone(), &context.namespace);
    let controller =
        Controller::new(restores, watcher::Config::default()).trigger_backoff(reconnect::backoff(reconnect::LONGEST));
    context.dispatch.restores.get_or_init(|| controller.store());
    controller
        .watches(tasks, watcher::Config::default(), |task| {
            let (namespace, name) = task::owner(&task, "Restore")?;
            Some(ObjectRef::new(&name).within(&namespace))
        })
        .run(reconcile, on_error, context)
        .for_each(|_| async {})
        .await;
}

/// One restore while it is worked on.
pub(crate) struct Run {
    pub(crate) restore: Restore,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) status: RestoreStatus,
}

impl Run {
    fn new(restore: Restore) -> Self {
        Self {
            namespace: restore.namespace().unwrap_or_default(),
            name: restore.name_any(),
            uid: restore.uid().unwrap_or_default(),
            status: restore.status.clone().unwrap_or_default(),
            restore,
        }
    }

    pub(crate) fn set(&mut self, type_: ConditionType, state: State, reason: Reason, message: impl Into<String>) {
        let generation = self.restore.metadata.generation;
        self.status.observed_generation = generation;
        conditions::set(&mut self.status.conditions, type_, state, reason, message, generation, Timestamp::now());
    }

    /// Shows what the restore waits for, or that it does not wait any more.
    pub(crate) fn note_waiting(&mut self, waits: Option<(Reason, String)>) {
        match waits {
            Some((reason, message)) => self.set(ConditionType::Waiting, State::True, reason, message),
            None if conditions::is_true(&self.status.conditions, ConditionType::Waiting) => {
                self.set(ConditionType::Waiting, State::False, Reason::Done, "it has its turn");
            }
            None => {}
        }
    }

    pub(crate) async fn save(&mut self, context: &Context) -> Result<()> {
        self.restore = context.write_status(&self.restore, &self.status).await?;
        Ok(())
    }

    /// Ends the restore badly.
    pub(crate) async fn fail(&mut self, context: &Context, reason: Reason, message: String) -> Result<()> {
        warn!(reason = reason.as_str(), message, "failed");
        self.status.phase = Phase::Failed;
        self.status.completion_time = Some(Time(Timestamp::now()));
        self.note_waiting(None);
        self.set(ConditionType::Succeeded, State::False, reason, message.clone());
        self.save(context).await?;
        context.metrics.restores_failed.inc();
        context.events.warning(&self.restore, reason, message).await;
        Ok(())
    }

    /// The pinned repository and its `ClusterRepository`.
    pub(crate) async fn open_repository(
        &self,
        context: &Context,
    ) -> Result<Result<(Repository, ClusterRepository), AccessError>> {
        let pinned = self.status.repository.as_ref().context("no repository is pinned")?;
        let api: Api<ClusterRepository> = Api::all(context.client.clone());
        let Some(object) = api.get_opt(&pinned.name).await.context("cannot read the ClusterRepository")? else {
            let message = format!("the ClusterRepository `{}` was deleted", pinned.name);
            return Ok(Err(AccessError { reason: Reason::RepositoryNotFound, message }));
        };
        let opened =
            context.access.open(&object.spec.backend, &object.spec.encryption.secret_ref, Some(&pinned.id)).await;
        Ok(opened.map(|repository| (repository, object)))
    }
}

async fn reconcile(seen: Arc<Restore>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let span = info_span!("restore", namespace = seen.namespace(), restore = seen.name_any());
    Ok(work(&seen, &context).instrument(span).await?)
}

/// What is done next, by the facts in the object.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Hold,
    Plan,
    Prepare,
    Fill,
    Apply,
    Feed,
    Clean,
    Nothing,
}

fn next_step(restore: &Restore, status: &RestoreStatus) -> Step {
    let is_held = restore.finalizers().iter().any(|one| one == labels::FINALIZER);
    if restore.metadata.deletion_timestamp.is_some() || conditions::is_finished(&status.conditions) {
        return if is_held { Step::Clean } else { Step::Nothing };
    }
    if !is_held {
        Step::Hold
    } else if !conditions::is_true(&status.conditions, ConditionType::Planned) {
        Step::Plan
    } else if status.cluster_objects.is_none() {
        Step::Prepare
    } else if !conditions::is_true(&status.conditions, ConditionType::DataReady) {
        Step::Fill
    } else if status.objects.is_none() {
        Step::Apply
    } else {
        Step::Feed
    }
}

async fn work(seen: &Restore, context: &Context) -> Result<Action> {
    let api = context.namespaced::<Restore>(&seen.namespace().unwrap_or_default());
    // What the watch shows may be older than what this controller wrote last.
    let Some(restore) = api.get_opt(&seen.name_any()).await.context("cannot read the Restore")? else {
        return Ok(Action::await_change());
    };
    let mut run = Run::new(restore);
    loop {
        match next_step(&run.restore, &run.status) {
            Step::Hold => run.restore = set_finalizer(&run.restore, context, true).await?,
            Step::Plan => {
                if let Some(pause) = plan::plan(&mut run, context).await? {
                    return Ok(Action::requeue(pause));
                }
            }
            Step::Prepare => cluster::prepare(&mut run, context).await?,
            Step::Fill => {
                if !claims::fill(&mut run, context).await? {
                    return Ok(Action::requeue(LOOK_AGAIN));
                }
            }
            Step::Apply => apply::apply(&mut run, context).await?,
            Step::Feed => {
                if !streams::feed(&mut run, context).await? {
                    return Ok(Action::requeue(LOOK_AGAIN));
                }
            }
            Step::Clean => {
                context.dispatch.forget(context, &run.uid);
                task::delete_of(&context.namespaced(&context.namespace), &run.uid).await?;
                if !claims::remove_pods(&run, context).await? {
                    return Ok(Action::requeue(LOOK_AGAIN));
                }
                run.restore = set_finalizer(&run.restore, context, false).await?;
                return Ok(Action::await_change());
            }
            Step::Nothing => return Ok(Action::await_change()),
        }
    }
}

/// Adds or removes Lifeboat's finalizer.
async fn set_finalizer(restore: &Restore, context: &Context, present: bool) -> Result<Restore> {
    let mut finalizers: Vec<_> = restore.finalizers().iter().filter(|one| *one != labels::FINALIZER).cloned().collect();
    if present {
        finalizers.push(labels::FINALIZER.to_owned());
    }
    let api = context.namespaced::<Restore>(&restore.namespace().unwrap_or_default());
    let metadata =
        json!({"resourceVersion": restore.resource_version(), "uid": restore.uid(), "finalizers": finalizers});
    let written =
        api.patch(&restore.name_any(), &PatchParams::default(), &Patch::Merge(json!({"metadata": metadata}))).await;
    match written {
        Ok(written) => Ok(written),
        Err(kube::Error::Api(status)) if status.code == 404 && !present => Ok(restore.clone()),
        Err(error) => Err(error).context("cannot write the finalizer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_crds::restore::ObjectsRestoreStatus;

    fn restore(finalizers: &[&str], conditions: &[(&str, &str)]) -> Restore {
        let conditions: Vec<_> = conditions
            .iter()
            .map(|(type_, status)| json!({"type": type_, "status": status, "reason": "Done", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}))
            .collect();
        serde_json::from_value(json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "Restore", "metadata": {"name": "r", "finalizers": finalizers},
            "spec": {"source": {"backupRef": {"name": "b"}}}, "status": {"conditions": conditions}
        }))
        .unwrap()
    }

    fn step(restore: &Restore) -> Step {
        next_step(restore, restore.status.as_ref().unwrap())
    }

    #[test]
    fn a_restore_goes_from_step_to_step_and_runs_once() {
        let held = &[labels::FINALIZER];
        assert_eq!(step(&restore(&[], &[])), Step::Hold);
        assert_eq!(step(&restore(held, &[])), Step::Plan);
        let mut prepared = restore(held, &[("Planned", "True")]);
        assert_eq!(step(&prepared), Step::Prepare);
        prepared.status.as_mut().unwrap().cluster_objects = Some(ObjectsRestoreStatus::default());
        assert_eq!(step(&prepared), Step::Fill);
        let mut filled = restore(held, &[("Planned", "True"), ("DataReady", "True")]);
        filled.status.as_mut().unwrap().cluster_objects = Some(ObjectsRestoreStatus::default());
        assert_eq!(step(&filled), Step::Apply);
        let mut applied = filled;
        applied.status.as_mut().unwrap().objects = Some(ObjectsRestoreStatus::default());
        assert_eq!(step(&applied), Step::Feed);
        for ended in ["True", "False"] {
            let all = &[("Planned", "True"), ("DataReady", "True"), ("Succeeded", ended)];
            assert_eq!(step(&restore(held, all)), Step::Clean);
            assert_eq!(step(&restore(&[], all)), Step::Nothing, "it does not run again");
        }
    }
}
