//! Makes claims, keeps them mounted by a pod that does nothing, and has agents fill them.

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, DynamicObject, ListParams, PostParams};
use kube::{Api, ResourceExt};
use lifeboat_crds::backup::Phase;
use lifeboat_crds::conditions::{ConditionType, Reason, State};
use lifeboat_crds::restore::VolumeRestoreStatus;
use lifeboat_crds::volume_task::{MountedVolume, Operation, RepositoryAccess, RestoreOperation};
use lifeboat_crds::{ClusterRepository, VolumeTask, labels};
use lifeboat_process::access::AccessError;
use lifeboat_repository::repository::Repository;
use tracing::info;

use super::Run;
use super::clones::cloned_form;
use super::plan::{Captured, captured};
use crate::child::Owner;
use crate::context::Context;
use crate::dispatch::{self, Kind, Need, Place, Verdict, Work};
use crate::holder::{self, Hold, is_block};
use crate::object::{ResourceName, restored_form};
use crate::recovery_point::Description;
use crate::storage;
use crate::task::{self, Order, Standing};

/// A volume's task ends by then.
const TASK_LIMIT: jiff::SignedDuration = jiff::SignedDuration::from_hours(12);

/// A clone must be mounted within this time.
const CLONE_LIMIT: jiff::SignedDuration = jiff::SignedDuration::from_mins(30);

/// Why a step is refused.
type Refused = (Reason, String);

fn claims_resource() -> ResourceName {
    ResourceName { plural: "persistentvolumeclaims".into(), group: String::new() }
}

fn pod_name(run: &Run, claim: &str) -> String {
    format!("restore-{}", task::name('p', &run.uid, claim))
}

/// One step towards filled volumes. `true`: all are filled, or the restore has ended.
pub(super) async fn fill(run: &mut Run, context: &Context) -> Result<bool> {
    if run.status.volumes.iter().any(|volume| volume.claim_uid.is_none()) {
        return make_claims(run, context).await;
    }
    let tasks = task::of_owner(&context.namespaced(&context.namespace), &run.uid).await?;
    let before = run.status.clone();
    let (mut failure, mut waits) = (None, None);
    for number in 0..run.status.volumes.len() {
        let volume = run.status.volumes[number].clone();
        let filled = match tasks.get(&task::name('r', &run.uid, &volume.claim)) {
            None if volume.phase == Phase::Succeeded => continue,
            None => begin(run, context, volume, &mut waits).await?,
            Some(task) => observe(volume, task),
        };
        match filled {
            Ok(volume) => run.status.volumes[number] = volume,
            Err(refused) => failure = failure.or(Some(refused)),
        }
    }
    if let Some((reason, message)) = failure {
        run.fail(context, reason, message).await?;
        return Ok(true);
    }
    run.note_waiting(waits);
    // Written down before the pods go: what is filled or cloned is not mounted again.
    if run.status != before {
        run.save(context).await?;
    }
    if !run.status.volumes.iter().all(|volume| matches!(volume.phase, Phase::Succeeded | Phase::Partial)) {
        return Ok(false);
    }
    if !remove_pods(run, context).await? {
        return Ok(false);
    }
    run.set(ConditionType::DataReady, State::True, Reason::Done, "every volume has its data");
    run.save(context).await?;
    Ok(true)
}

/// Creates the claims that are still to be made, and notes their UIDs.
async fn make_claims(run: &mut Run, context: &Context) -> Result<bool> {
    let (repository, _) = match run.open_repository(context).await? {
        Ok(opened) => opened,
        Err(error) => return run.fail(context, error.reason, error.message).await.map(|()| true),
    };
    let point = run.status.recovery_point.clone().context("no recovery point is pinned")?;
    let objects = match captured_objects(&repository, &point.id).await {
        Ok(objects) => objects,
        Err((reason, message)) => return run.fail(context, reason, message).await.map(|()| true),
    };
    let api = context.namespaced::<PersistentVolumeClaim>(&run.namespace);
    for number in 0..run.status.volumes.len() {
        let volume = &run.status.volumes[number];
        if volume.claim_uid.is_some() {
            continue;
        }
        let found =
            objects.iter().find(|captured| captured.resource == claims_resource() && captured.name == volume.claim);
        let object = found.map(|captured| captured.object.clone()).context("the plan was checked for this claim")?;
        let source = match &volume.clone_of {
            Some(name) => source_of(run, context, name).await?,
            None => None,
        };
        let object = if let Some(snapshot) = &source {
            cloned_form(object, snapshot)
        } else {
            // Its snapshot may have gone meanwhile: the repository has the data as well.
            run.status.volumes[number].clone_of = None;
            object
        };
        let is_cloned = source.is_some();
        match make_claim(run, &api, object, &point.id, is_cloned).await? {
            Ok(uid) => run.status.volumes[number].claim_uid = Some(uid),
            Err((reason, message)) => return run.fail(context, reason, message).await.map(|()| true),
        }
        run.save(context).await?;
    }
    Ok(false)
}

/// The snapshot that a claim is to be cloned from, if it is still there.
async fn source_of(run: &Run, context: &Context, name: &str) -> Result<Option<DynamicObject>> {
    let found = storage::snapshots(&context.client, &run.namespace).get_opt(name).await;
    Ok(found.context("cannot read a snapshot")?.filter(|snapshot| snapshot.metadata.deletion_timestamp.is_none()))
}

/// The objects of the pinned recovery point.
pub(super) async fn captured_objects(repository: &Repository, point: &str) -> Result<Vec<Captured>, Refused> {
    let refused = |error: AccessError| (error.reason, error.message);
    let snapshots = repository.snapshots().await.map_err(|error| refused(AccessError::from_repository(&error)))?;
    let missing =
        || (Reason::RecoveryPointNotFound, format!("the recovery point {point} is not in the repository any more"));
    let snapshot = snapshots.iter().find(|snapshot| snapshot.id.to_string() == point).ok_or_else(missing)?;
    let description = Description::of(snapshot).map_err(|error| (Reason::SourceUnusable, error.to_string()))?;
    captured(repository, &snapshots, description.objects).await.map_err(refused)
}

async fn make_claim(
    run: &Run,
    api: &Api<PersistentVolumeClaim>,
    object: serde_json::Value,
    point: &str,
    is_cloned: bool,
) -> Result<Result<String, Refused>> {
    let source = object.pointer("/spec/dataSource").filter(|_| is_cloned).cloned();
    let mut object = restored_form(&claims_resource(), object, &run.namespace, point);
    if let Some(source) = source {
        object["spec"]["dataSource"] = source;
    }
    // A restart of the controller knows its own claim again by this.
    object["metadata"]["annotations"][labels::OWNER_UID] = run.uid.clone().into();
    let claim: PersistentVolumeClaim = match serde_json::from_value(object) {
        Ok(claim) => claim,
        Err(error) => return Ok(Err((Reason::RepositoryDamaged, format!("a captured claim is malformed: {error}")))),
    };
    let name = claim.name_any();
    match api.create(&PostParams::default(), &claim).await {
        Ok(made) => Ok(Ok(made.uid().unwrap_or_default())),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let found = api.get(&name).await.context("cannot read a claim")?;
            let found_cloned = found.spec.as_ref().is_some_and(|spec| spec.data_source.is_some());
            if found.annotations().get(labels::OWNER_UID) == Some(&run.uid) && found_cloned == is_cloned {
                return Ok(Ok(found.uid().unwrap_or_default()));
            }
            Ok(Err((
                Reason::VolumeExists,
                format!(
                    "somebody made the claim {name} meanwhile, or its snapshot went; existing volumes are never overwritten: delete it and restore again"
                ),
            )))
        }
        Err(kube::Error::Api(status)) => {
            Ok(Err((Reason::ApplyFailed, format!("the claim {name} was refused: {}", status.message))))
        }
        Err(error) => Err(error).context("cannot create a claim"),
    }
}

/// Mounts a claim by a pod that does nothing, and makes the task when it is mounted.
async fn begin(
    run: &Run,
    context: &Context,
    mut volume: VolumeRestoreStatus,
    waits: &mut Option<Refused>,
) -> Result<Result<VolumeRestoreStatus, Refused>> {
    let claims = context.namespaced::<PersistentVolumeClaim>(&run.namespace);
    let claim = claims.get_opt(&volume.claim).await.context("cannot read a claim")?;
    let Some(claim) = claim.filter(|claim| claim.uid() == volume.claim_uid) else {
        return Ok(Err((
            Reason::VolumeUnavailable,
            format!("the claim {} was deleted while it was being restored", volume.claim),
        )));
    };
    let pods = context.namespaced::<Pod>(&run.namespace);
    let name = pod_name(run, &volume.claim);
    let Some(pod) = pods.get_opt(&name).await.context("cannot read a pod")? else {
        return match pods.create(&PostParams::default(), &holder::pod(context, &hold(run, &name, &claim))?).await {
            Ok(_) => Ok(Ok(volume)),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Ok(volume)),
            Err(kube::Error::Api(status)) if status.code == 403 || status.code == 422 => Ok(Err((
                Reason::ApplyFailed,
                format!("the pod that mounts the claim {} was refused: {}", volume.claim, status.message),
            ))),
            Err(error) => Err(error).context("cannot create a pod"),
        };
    };
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
    let pv = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
    let (Some(node), Some(pv), "Running") = (&node, &pv, phase.as_str()) else {
        if let Some(refused) = overdue_clone(run, &volume) {
            return Ok(Err(refused));
        }
        volume.message = Some(format!("waiting for the pod {name} to mount the claim; it is {phase}"));
        return Ok(Ok(volume));
    };
    if volume.clone_of.is_some() {
        // The storage copied the data before the claim could be mounted.
        info!(claim = volume.claim, "the volume is cloned");
        (volume.node, volume.phase, volume.message) = (Some(node.clone()), Phase::Succeeded, None);
        return Ok(Ok(volume));
    }
    let object = match run.open_repository(context).await? {
        Ok((_, object)) => object,
        Err(error) => return Ok(Err((error.reason, error.message))),
    };
    if let Some((reason, message)) = turn(run, context, &volume.claim, node).await? {
        volume.message = Some(format!("waiting for its turn: {message}"));
        waits.get_or_insert_with(|| (reason, format!("the volume of the claim {} waits: {message}", volume.claim)));
        return Ok(Ok(volume));
    }
    order(run, context, &volume, &pod, node, pv, object).await?;
    info!(claim = volume.claim, node, "the volume is being filled");
    volume.node = Some(node.clone());
    volume.phase = Phase::Running;
    volume.message = None;
    Ok(Ok(volume))
}

/// What the filling of a claim waits for, if it does not have its turn.
async fn turn(run: &Run, context: &Context, claim: &str, node: &str) -> Result<Option<Refused>> {
    let made = run.restore.metadata.creation_timestamp.as_ref().map_or_else(Timestamp::now, |made| made.0);
    let work = Work {
        key: dispatch::volume_key(&run.uid, claim),
        kind: Kind::Restore,
        repository: run.status.repository.as_ref().map(|repository| repository.name.clone()).unwrap_or_default(),
        namespace: run.namespace.clone(),
        due: made,
        need: Need::Volume(Place::On(node.to_owned())),
    };
    Ok(match context.dispatch.ask(context, work).await? {
        Verdict::Start(_) => None,
        Verdict::Wait { reason, message, .. } => Some((reason, message)),
    })
}

/// Why a clone that did not come in time is given up.
fn overdue_clone(run: &Run, volume: &VolumeRestoreStatus) -> Option<Refused> {
    let snapshot = volume.clone_of.as_ref()?;
    let since = Timestamp::now().duration_since(run.status.start_time.as_ref()?.0);
    (since > CLONE_LIMIT).then(|| {
        let message = format!(
            "the claim {} was not cloned from the snapshot {snapshot} within {CLONE_LIMIT:#}; look at its events, or delete the claim and the VolumeSnapshot and restore again from the repository",
            volume.claim
        );
        (Reason::SnapshotNotReady, message)
    })
}

async fn order(
    run: &Run,
    context: &Context,
    volume: &VolumeRestoreStatus,
    pod: &Pod,
    node: &str,
    pv: &str,
    repository: ClusterRepository,
) -> Result<()> {
    let pinned = run.status.repository.clone().context("no repository is pinned")?;
    let order = Order {
        name: task::name('r', &run.uid, &volume.claim),
        owner: format!("Restore/{}", run.name),
        owner_uid: run.uid.clone(),
        node: node.to_owned(),
        volume: Some(MountedVolume {
            namespace: run.namespace.clone(),
            claim: volume.claim.clone(),
            claim_uid: volume.claim_uid.clone().unwrap_or_default(),
            volume: pv.to_owned(),
            pod: pod.name_any(),
            pod_uid: pod.uid().unwrap_or_default(),
            block: pod.spec.iter().flat_map(|spec| &spec.containers).any(|one| one.volume_devices.is_some()),
        }),
        workload: None,
        repository: RepositoryAccess::new(pinned.name, pinned.id, repository.spec),
        operation: Operation::Restore(RestoreOperation { snapshot: volume.snapshot.clone() }),
        deadline: Timestamp::now() + TASK_LIMIT,
    };
    task::create(&context.namespaced(&context.namespace), order).await
}

/// A claim that is filled is mounted where its application's pods could run, by a pod of the application's namespace.
fn hold<'a>(run: &'a Run, pod: &'a str, claim: &'a PersistentVolumeClaim) -> Hold<'a> {
    let owner = Owner { kind: "Restore", name: &run.name, uid: &run.uid };
    let (name, block) = (claim.metadata.name.as_deref().unwrap_or_default(), is_block(claim));
    Hold { owner, pod, claim: name, mounted: name, read_only: false, block, beside_agent: false, node: None }
}

/// Takes over what a task says.
fn observe(mut volume: VolumeRestoreStatus, task: &VolumeTask) -> Result<VolumeRestoreStatus, Refused> {
    volume.message = None;
    match task::standing(task, Timestamp::now()) {
        Standing::Waiting(message) | Standing::Running(message) => {
            volume.phase = Phase::Running;
            volume.message = message;
            if let Some(progress) = task.status.as_ref().and_then(|status| status.progress) {
                volume.transfer.get_or_insert_default().bytes = progress.bytes_done;
            }
        }
        Standing::Failed(reason, message) => {
            let message = format!("the volume of the claim {} was not filled: {message}", volume.claim);
            return Err((Reason::from_text(&reason), message));
        }
        Standing::Succeeded => {
            let result = task.status.as_ref().and_then(|status| status.result.clone()).unwrap_or_default();
            volume.phase = if result.skipped == 0 { Phase::Succeeded } else { Phase::Partial };
            volume.transfer = Some(result.transfer);
            volume.failed = result.skipped;
            volume.failed_sample = result.skipped_sample;
        }
    }
    Ok(volume)
}

/// Deletes the pods that kept claims mounted. `true`: all are gone, so that the application's own pods can mount them.
pub(super) async fn remove_pods(run: &Run, context: &Context) -> Result<bool> {
    let pods = context.namespaced::<Pod>(&run.namespace);
    let ours = ListParams::default().labels(&format!("{}={}", labels::OWNER_UID, run.uid));
    let found = pods.list(&ours).await.context("cannot list pods")?;
    for pod in found.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
        match pods.delete(&pod.name_any(), &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).context("cannot delete a pod"),
        }
    }
    Ok(found.items.is_empty())
}
