//! `Backup`: resolves a plan, captures objects, freezes, cuts snapshots, thaws, has volumes and streams read, commits the recovery
//! point.
//!
//! Every step relies only on facts that were written down before it: a controller that starts anywhere in between
//! reads them and goes on.

mod capture;
mod cluster;
mod commit;
mod cut;
mod decide;
mod erase;
mod expose;
mod lists;
mod method;
mod quiesce;
mod resolve;
mod streams;
mod sweep;
mod turn;

pub(crate) use capture::{each_object, offered as capture_resources};
pub(crate) use decide::{STEPS, reading_key};

/// What a namespace may do with a repository, for backups and restores alike.
pub(crate) mod refusal {
    pub(crate) use super::resolve::{Refusal, repository, unready_message};
}

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, ResourceExt};
use lifeboat_crds::backup::{DeletionPolicy, Phase, StreamBackupStatus, Transfer, VolumeBackupStatus};
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::plan::VolumeMethod;
use lifeboat_crds::volume_task::{BackupOperation, MountedVolume, Operation, RepositoryAccess};
use lifeboat_crds::{Backup, BackupStatus, ClusterRepository, VolumeTask, labels};
use lifeboat_process::reconnect;
use serde_json::json;
use tracing::{Instrument, debug, info, info_span, warn};

use self::decide::{Facts, Step, next_step};
use crate::context::{Context, ReconcileError, on_error};
use crate::recovery_point::{backup_tags, tags, volume_lineage};
use crate::task::{self, Order, Standing};

/// A volume's task ends by then.
const TASK_LIMIT: jiff::SignedDuration = jiff::SignedDuration::from_hours(4);
/// A running backup is looked at again at the latest after this: pods may vanish without a word.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// While an application may be frozen.
const SOON: Duration = Duration::from_millis(20);
/// While snapshots are mounted or their mounts removed, which nothing need tell about.
const MOUNT_PAUSE: Duration = Duration::from_millis(500);
/// What is told about mounts within this time is looked at together.
const MOUNTS_GATHERED: Duration = Duration::from_millis(50);

/// Runs the control loop.
pub(crate) async fn control(context: Arc<Context>) {
    let backups: Api<Backup> = Api::all(context.client.clone());
    let tasks: Api<VolumeTask> = Api::namespaced(context.client.clone(), &context.namespace);
    let controller =
        Controller::new(backups, watcher::Config::default()).trigger_backoff(reconnect::backoff(reconnect::LONGEST));
    // Open before the first freeze waits for it.
    drop(context.watches.leases());
    context.dispatch.backups.get_or_init(|| controller.store());
    controller
        .watches(tasks, watcher::Config::default(), |task| {
            let (namespace, name) = task::owner(&task, "Backup")?;
            Some(ObjectRef::new(&name).within(&namespace))
        })
        .run(reconcile, on_error, context)
        .for_each(|_| async {})
        .await;
}

/// One backup while it is worked on: the object, and the status as it will be written next.
pub(crate) struct Run {
    pub(crate) backup: Backup,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) status: BackupStatus,
}

impl Run {
    fn new(backup: Backup) -> Self {
        Self {
            namespace: backup.namespace().unwrap_or_default(),
            name: backup.name_any(),
            uid: backup.uid().unwrap_or_default(),
            status: backup.status.clone().unwrap_or_default(),
            backup,
        }
    }

    pub(crate) fn set(&mut self, type_: ConditionType, state: State, reason: Reason, message: impl Into<String>) {
        let generation = self.backup.metadata.generation;
        self.status.observed_generation = generation;
        conditions::set(&mut self.status.conditions, type_, state, reason, message, generation, Timestamp::now());
    }

    /// Writes the status.
    pub(crate) async fn save(&mut self, context: &Context) -> Result<()> {
        self.backup = context.write_status(&self.backup, &self.status).await?;
        Ok(())
    }

    /// Ends the backup badly.
    pub(crate) async fn fail(&mut self, context: &Context, reason: Reason, message: String) -> Result<()> {
        warn!(reason = reason.as_str(), message, "failed");
        self.status.phase = Phase::Failed;
        self.status.completion_time = Some(Time(Timestamp::now()));
        self.note_waiting(None);
        self.set(ConditionType::Succeeded, State::False, reason, message.clone());
        self.save(context).await?;
        context.metrics.backups_failed.inc();
        context.events.warning(&self.backup, reason, message).await;
        Ok(())
    }

    /// The tags of everything that this backup writes.
    pub(crate) fn tags(&self, cluster: &str) -> BTreeMap<String, String> {
        let policy = self.backup.spec.policy_ref.as_ref().map(|policy| policy.name.as_str());
        backup_tags(cluster, &self.namespace, &self.name, &self.uid, policy)
    }
}

async fn reconcile(seen: Arc<Backup>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let span = info_span!("backup", namespace = seen.namespace(), backup = seen.name_any());
    Ok(Box::pin(work(&seen, &context)).instrument(span).await?)
}

/// Takes steps until there is nothing to do but wait.
async fn work(seen: &Backup, context: &Context) -> Result<Action> {
    let api = context.namespaced::<Backup>(&seen.namespace().unwrap_or_default());
    // What the watch shows may be older than what this controller wrote last; a freeze must not happen twice.
    let Some(backup) = api.get_opt(&seen.name_any()).await.context("cannot read the Backup")? else {
        return Ok(Action::await_change());
    };
    let mut run = Run::new(backup);
    loop {
        let tasks = if decide::may_have_tasks(&run.status) {
            task::of_owner(&context.namespaced(&context.namespace), &run.uid).await?
        } else {
            BTreeMap::new()
        };
        if run.status.plan.is_some() && !conditions::is_finished(&run.status.conditions) {
            observe_tasks(&mut run, &tasks);
        }
        let (vanished, lost) = vanished(&run, context).await?;
        let facts = Facts {
            is_deleted: run.backup.metadata.deletion_timestamp.is_some(),
            has_finalizer: has_finalizer(&run.backup, labels::FINALIZER),
            has_data_finalizer: has_finalizer(&run.backup, labels::DATA_FINALIZER),
            status: &run.status,
            tasks: &tasks,
            uid: &run.uid,
            vanished,
            lost,
        };
        let step = next_step(&facts, Timestamp::now());
        debug!(step = step.name(), "next");
        match Box::pin(perform(&mut run, step, context)).await? {
            Next::Look => {}
            Next::Wait(pause) => return Ok(Action::requeue(pause)),
            Next::Over => return Ok(Action::await_change()),
        }
    }
}

/// What follows a step.
enum Next {
    Look,
    Wait(Duration),
    Over,
}

async fn perform(run: &mut Run, step: Step, context: &Context) -> Result<Next> {
    match step {
        Step::Hold => {
            if run.backup.spec.deletion_policy == DeletionPolicy::Delete {
                run.backup = set_finalizer(&run.backup, context, labels::DATA_FINALIZER, true).await?;
            }
            run.backup = set_finalizer(&run.backup, context, labels::FINALIZER, true).await?;
        }
        Step::Resolve => {
            if let Some(pause) = resolve::resolve(run, context).await? {
                return Ok(Next::Wait(pause));
            }
        }
        Step::Admit => {
            if let Some(pause) = turn::admit(run, context).await? {
                return Ok(Next::Wait(pause));
            }
        }
        Step::Capture => Box::pin(capture::capture(run, context)).await?,
        Step::Freeze => quiesce::freeze(run, context).await?,
        Step::NoteFreezeFailure(reason, message) => {
            run.set(ConditionType::Quiesced, State::False, reason, message.clone());
            run.save(context).await?;
            context.events.warning(&run.backup, reason, message).await;
        }
        Step::Thaw => {
            if !quiesce::thaw(run, context).await? {
                return Ok(Next::Wait(LOOK_AGAIN));
            }
        }
        Step::StartTasks => start_tasks(run, context).await?,
        Step::Cut => {
            if !cut::cut(run, context).await? {
                // The next look reads the object anew: it may be deleted meanwhile.
                return Ok(Next::Wait(SOON));
            }
        }
        Step::Expose => {
            let mut changes = context.watches.exposures();
            expose::retire(run, context).await?;
            let pause = turn::dispatch(run, context).await?;
            if conditions::is_finished(&run.status.conditions) {
                return Ok(Next::Look);
            }
            if let Some(pause) = pause {
                return Ok(Next::Wait(pause));
            }
            if Box::pin(expose::expose(run, context)).await? {
                changes.next(MOUNTS_GATHERED, MOUNT_PAUSE).await;
            }
            // The next look reads the object anew: it may be deleted meanwhile.
            return Ok(Next::Wait(SOON));
        }
        Step::Dump => streams::start(run, context).await?,
        Step::Renew(claim) => expose::renew(run, context, &claim).await?,
        Step::Wait(until) => {
            run.status.phase = Phase::Running;
            expose::retire(run, context).await?;
            if run.backup.status.as_ref() != Some(&run.status) {
                run.save(context).await?;
            }
            let left = until.and_then(|until| Duration::try_from(until.duration_since(Timestamp::now())).ok());
            return Ok(Next::Wait(left.unwrap_or(LOOK_AGAIN).clamp(SOON, LOOK_AGAIN)));
        }
        Step::Commit => commit::commit(run, context).await?,
        Step::Fail(reason, message) => run.fail(context, reason, message).await?,
        Step::Clean => {
            context.dispatch.forget(context, &run.uid);
            quiesce::remove_leases(&run.uid, context).await?;
            task::delete_of(&context.namespaced(&context.namespace), &run.uid).await?;
            if !sweep::sweep(run, context).await? {
                return Ok(Next::Wait(MOUNT_PAUSE));
            }
            run.backup = set_finalizer(&run.backup, context, labels::FINALIZER, false).await?;
            let is_last = run.backup.metadata.deletion_timestamp.is_none() || run.backup.finalizers().is_empty();
            return Ok(if is_last { Next::Over } else { Next::Look });
        }
        Step::Erase => {
            let pause = erase::erase(run, context).await?;
            return Ok(pause.map_or(Next::Over, Next::Wait));
        }
        Step::Nothing => return Ok(Next::Over),
    }
    Ok(Next::Look)
}

fn has_finalizer(backup: &Backup, finalizer: &str) -> bool {
    backup.finalizers().iter().any(|one| one == finalizer)
}

/// Adds or removes a finalizer of Lifeboat's.
async fn set_finalizer(backup: &Backup, context: &Context, finalizer: &str, present: bool) -> Result<Backup> {
    let mut finalizers: Vec<_> = backup.finalizers().iter().filter(|one| *one != finalizer).cloned().collect();
    if present {
        finalizers.push(finalizer.to_owned());
    }
    let api = context.namespaced::<Backup>(&backup.namespace().unwrap_or_default());
    // The resource version makes the write fail instead of removing what another added meanwhile.
    let metadata = json!({"resourceVersion": backup.resource_version(), "uid": backup.uid(), "finalizers": finalizers});
    let written =
        api.patch(&backup.name_any(), &PatchParams::default(), &Patch::Merge(json!({"metadata": metadata}))).await;
    match written {
        Ok(written) => Ok(written),
        Err(kube::Error::Api(status)) if status.code == 404 && !present => Ok(backup.clone()),
        Err(error) => Err(error).context("cannot write the finalizer"),
    }
}

/// Takes over what the tasks say.
fn observe_tasks(run: &mut Run, tasks: &BTreeMap<String, VolumeTask>) {
    let now = Timestamp::now();
    observe_streams(run, tasks, now);
    for volume in &mut run.status.volumes {
        let Some(task) = tasks.get(&decide::task_name(&run.uid, volume)) else { continue };
        if take_standing(task, now, &mut volume.phase, &mut volume.message) {
            take_result(volume, task);
        }
        if volume.snapshot.is_none() {
            take_progress(task, &mut volume.transfer);
        }
    }
}

/// Takes over how a task stands; whether it has succeeded.
fn take_standing(task: &VolumeTask, now: Timestamp, phase: &mut Phase, message: &mut Option<String>) -> bool {
    *message = None;
    match task::standing(task, now) {
        Standing::Waiting(why) => *message = why,
        Standing::Running(what) => {
            *phase = Phase::Running;
            *message = what;
        }
        Standing::Failed(_, why) => {
            *phase = Phase::Failed;
            *message = Some(why);
        }
        Standing::Succeeded => return true,
    }
    false
}

fn take_progress(task: &VolumeTask, transfer: &mut Option<Transfer>) {
    if let Some(progress) = task.status.as_ref().and_then(|status| status.progress) {
        transfer.get_or_insert_default().read_bytes = progress.bytes_done;
    }
}

/// Takes over what the tasks of streams say.
fn observe_streams(run: &mut Run, tasks: &BTreeMap<String, VolumeTask>, now: Timestamp) {
    for stream in &mut run.status.streams {
        let Some(task) = tasks.get(&decide::stream_task(&run.uid, stream)) else { continue };
        if take_standing(task, now, &mut stream.phase, &mut stream.message) {
            take_stream(stream, task);
        }
        if stream.snapshot.is_none() {
            take_progress(task, &mut stream.transfer);
        }
    }
}

fn take_stream(stream: &mut StreamBackupStatus, task: &VolumeTask) {
    let Some(result) = task.status.as_ref().and_then(|status| status.result.as_ref()) else { return };
    stream.phase = Phase::Succeeded;
    stream.snapshot = Some(result.snapshot.clone());
    stream.transfer = Some(result.transfer);
}

fn take_result(volume: &mut VolumeBackupStatus, task: &VolumeTask) {
    let Some(result) = task.status.as_ref().and_then(|status| status.result.as_ref()) else { return };
    volume.phase = if result.skipped == 0 { Phase::Succeeded } else { Phase::Partial };
    volume.snapshot = Some(result.snapshot.clone());
    volume.transfer = Some(result.transfer);
    volume.block_read.clone_from(&result.block);
    volume.skipped = result.skipped;
    volume.skipped_sample.clone_from(&result.skipped_sample);
}

/// Pods whose volumes or streams are still to be read and that are gone or going: the first one of the application, and the
/// claims whose snapshots pods of ours had mounted.
async fn vanished(run: &Run, context: &Context) -> Result<(Option<String>, Vec<String>)> {
    let (mut vanished, mut lost) = (None, Vec::new());
    if conditions::is_finished(&run.status.conditions) {
        return Ok((vanished, lost));
    }
    let unread = |volume: &&VolumeBackupStatus| matches!(volume.phase, Phase::Pending | Phase::Running);
    for volume in run.status.volumes.iter().filter(unread) {
        let Some(name) = &volume.pod else { continue };
        let is_ours = volume.method.is_snapshot();
        let namespace = if is_ours { &context.namespace } else { &run.namespace };
        let found = context.namespaced::<Pod>(namespace).get_opt(name).await.context("cannot read a pod")?;
        if found.is_some_and(|pod| pod.uid() == volume.pod_uid && resolve::is_readable(&pod)) {
            continue;
        }
        if is_ours {
            lost.push(volume.claim.clone());
        } else {
            vanished.get_or_insert_with(|| name.clone());
        }
    }
    let unread = |stream: &&StreamBackupStatus| stream.dispatched_at.is_some() && stream.snapshot.is_none();
    for stream in run.status.streams.iter().filter(unread) {
        let Some(name) = &stream.pod else { continue };
        let found = context.namespaced::<Pod>(&run.namespace).get_opt(name).await.context("cannot read a pod")?;
        if found.is_none_or(|pod| pod.uid() != stream.pod_uid || !resolve::is_readable(&pod)) {
            vanished.get_or_insert_with(|| name.clone());
        }
    }
    Ok((vanished, lost))
}

/// How a task gets at the pinned repository. `Err`: why the backup cannot go on.
async fn access(run: &Run, context: &Context) -> Result<Result<RepositoryAccess, (Reason, String)>> {
    let pinned = run.status.repository.clone().context("no repository is pinned")?;
    let repositories: Api<ClusterRepository> = Api::all(context.client.clone());
    let Some(repository) = repositories.get_opt(&pinned.name).await.context("cannot read the ClusterRepository")?
    else {
        return Ok(Err((Reason::RepositoryNotFound, format!("the ClusterRepository `{}` was deleted", pinned.name))));
    };
    Ok(Ok(RepositoryAccess::new(pinned.name, pinned.id, repository.spec)))
}

/// What a task that reads a volume is made of. `Err`: why the backup cannot go on.
async fn order(
    run: &Run,
    context: &Context,
    volume: &VolumeBackupStatus,
    node: &str,
    mount: MountedVolume,
) -> Result<Result<Order, (Reason, String)>> {
    let repository = match access(run, context).await? {
        Ok(repository) => repository,
        Err(refused) => return Ok(Err(refused)),
    };
    let cluster = context.cluster().await?;
    let mut tags = run.tags(cluster);
    tags.insert(tags::CLAIM.to_owned(), volume.claim.clone());
    Ok(Ok(Order {
        name: decide::task_name(&run.uid, volume),
        owner: format!("Backup/{}", run.name),
        owner_uid: run.uid.clone(),
        node: node.to_owned(),
        volume: Some(mount),
        workload: None,
        repository,
        operation: Operation::Backup(BackupOperation {
            lineage: volume_lineage(cluster, &run.namespace, &volume.claim),
            tags,
            image: lists::source(run, context, volume).await?.map(Into::into),
        }),
        deadline: Timestamp::now() + TASK_LIMIT,
    }))
}

/// Makes one task a volume that is read live.
async fn start_tasks(run: &mut Run, context: &Context) -> Result<()> {
    let api = context.namespaced::<VolumeTask>(&context.namespace);
    for number in 0..run.status.volumes.len() {
        let volume = &run.status.volumes[number];
        let (VolumeMethod::Live, Some(node), Some(pod), Some(pod_uid), Some(pv)) =
            (volume.method, &volume.node, &volume.pod, &volume.pod_uid, &volume.volume)
        else {
            continue;
        };
        let mount = MountedVolume {
            namespace: run.namespace.clone(),
            claim: volume.claim.clone(),
            claim_uid: volume.claim_uid.clone(),
            volume: pv.clone(),
            pod: pod.clone(),
            pod_uid: pod_uid.clone(),
            block: volume.block,
        };
        match order(run, context, volume, node, mount).await? {
            Ok(order) => task::create(&api, order).await?,
            Err((reason, message)) => return run.fail(context, reason, message).await,
        }
    }
    info!(volumes = run.status.volumes.len(), "volumes are being read");
    run.status.phase = Phase::Running;
    run.set(ConditionType::Captured, State::Unknown, Reason::InProgress, "volumes are being read");
    run.save(context).await
}
