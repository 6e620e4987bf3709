//! Makes a snapshot readable for an agent: a copy of it as a claim in Lifeboat's own namespace, kept mounted by a pod that
//! does nothing.
//!
//! Nothing of it lies in the application's namespace: not its quota, its selectors, its policies.

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::DynamicObject;
use kube::{Api, ResourceExt};
use lifeboat_crds::VolumeTask;
use lifeboat_crds::backup::{Phase, VolumeBackupStatus};
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::plan::VolumeMethod;
use lifeboat_crds::volume_task::MountedVolume;
use serde_json::json;
use tracing::{info, warn};

use super::{Run, decide, order};
use crate::child::{Owner, force, make, remove};
use crate::context::Context;
use crate::holder::{self, Hold};
use crate::storage::{self, Kind, error_of};
use crate::task;

/// The name of everything that makes one snapshot readable.
pub(super) fn name(run: &Run, volume: &VolumeBackupStatus) -> String {
    format!("lifeboat-{}", task::name('x', &run.uid, &decide::reading_key(volume)))
}

fn owner(run: &Run) -> Owner<'_> {
    Owner { kind: "Backup", name: &run.name, uid: &run.uid }
}

/// The objects by which one snapshot becomes readable.
struct Exposure {
    content: DynamicObject,
    snapshot: DynamicObject,
    claim: PersistentVolumeClaim,
    pod: Pod,
}

fn exposure(run: &Run, context: &Context, volume: &VolumeBackupStatus) -> Result<Exposure> {
    let cut = volume.cut.as_ref().context("the volume has no snapshot")?;
    let name = name(run, volume);
    let metadata = owner(run).metadata(&name, &volume.claim);
    let mode = if volume.block { "Block" } else { "Filesystem" };
    // Whoever asks for lists of blocks finds the driver's secrets by the class. A group's class is of another kind: then the
    // driver's default class counts.
    let class = Some(&cut.class).filter(|_| volume.method == VolumeMethod::Snapshot);
    let pointer = json!({
        "metadata": metadata,
        "spec": {
            "volumeSnapshotClassName": class,
            // The snapshot belongs to the object in the application's namespace; this one only points to it.
            "deletionPolicy": "Retain",
            "driver": cut.driver,
            "source": {"snapshotHandle": cut.handle},
            "sourceVolumeMode": mode,
            "volumeSnapshotRef": {"name": name, "namespace": context.namespace},
        },
    });
    let source = json!({"volumeSnapshotContentName": name});
    let snapshot = json!({"metadata": metadata, "spec": {"volumeSnapshotClassName": class, "source": source}});
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata,
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": cut.storage_class,
            "volumeMode": mode,
            "resources": {"requests": {"storage": cut.size}},
            "dataSource": {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": name},
        },
    });
    let hold = Hold {
        owner: owner(run),
        pod: &name,
        claim: &volume.claim,
        mounted: &name,
        read_only: true,
        block: volume.block,
        beside_agent: true,
        node: volume.node.as_deref(),
    };
    Ok(Exposure {
        content: storage::object(Kind::Content, pointer)?,
        snapshot: storage::object(Kind::Snapshot, snapshot)?,
        claim: serde_json::from_value(claim)?,
        pod: holder::pod(context, &hold)?,
    })
}

/// One step towards agents that read all snapshots: makes what is missing, and gives out tasks for what is mounted. `true`: something
/// that was made is waited for.
pub(super) async fn expose(run: &mut Run, context: &Context) -> Result<bool> {
    let tasks = task::of_owner(&context.namespaced(&context.namespace), &run.uid).await?;
    let before = run.status.clone();
    let is_due =
        |volume: &VolumeBackupStatus| volume.dispatched_at.is_some() && decide::is_unexposed(&run.uid, volume, &tasks);
    let due: Vec<_> = (0..run.status.volumes.len()).filter(|at| is_due(&run.status.volumes[*at])).collect();
    let all = try_join_all(due.iter().map(|at| mounted(run, context, &run.status.volumes[*at]))).await?;
    let is_waiting = all.iter().any(Result::is_err);
    for (number, found) in due.into_iter().zip(all) {
        let volume = &run.status.volumes[number];
        match found {
            Ok((pod, mount)) => {
                let node = pod.spec.and_then(|spec| spec.node_name).unwrap_or_default();
                match order(run, context, volume, &node, mount.clone()).await? {
                    Ok(order) => task::create(&context.namespaced(&context.namespace), order).await?,
                    Err((reason, message)) => {
                        run.fail(context, reason, message).await?;
                        return Ok(false);
                    }
                }
                info!(claim = volume.claim, node, "the snapshot is being read");
                let volume = &mut run.status.volumes[number];
                volume.node = Some(node);
                volume.pod = Some(mount.pod);
                volume.pod_uid = Some(mount.pod_uid);
                volume.phase = Phase::Running;
                volume.message = None;
            }
            Err(message) => run.status.volumes[number].message = Some(message),
        }
    }
    if run.status != before {
        run.save(context).await?;
    }
    Ok(is_waiting)
}

/// The pod that has the snapshot mounted, or what is waited for.
async fn mounted(
    run: &Run,
    context: &Context,
    volume: &VolumeBackupStatus,
) -> Result<Result<(Pod, MountedVolume), String>> {
    let wanted = exposure(run, context, volume)?;
    let snapshots = storage::snapshots(&context.client, &context.namespace);
    if let Err(why) = make(&storage::contents(&context.client), &wanted.content, &run.uid).await? {
        return Ok(Err(refused(&why)));
    }
    let snapshot = match make(&snapshots, &wanted.snapshot, &run.uid).await? {
        Ok(snapshot) => snapshot,
        Err(why) => return Ok(Err(refused(&why))),
    };
    // Asked for a copy of a snapshot that is not ready, provisioners try again only after a second or more.
    if !storage::is_ready(&snapshot) {
        return Ok(Err(waits_for(&snapshot, None)));
    }
    let claims = context.namespaced::<PersistentVolumeClaim>(&context.namespace);
    let pods = context.namespaced::<Pod>(&context.namespace);
    let claim = match make(&claims, &wanted.claim, &run.uid).await? {
        Ok(claim) => claim,
        Err(why) => return Ok(Err(refused(&why))),
    };
    let bound = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
    // And so do schedulers with a pod whose volume is not there, unless it is the pod that the volume waits for.
    if bound.is_none() && !waits_for_pod(context, &claim).await? {
        return Ok(Err("waiting until the storage has copied the snapshot".to_owned()));
    }
    let pod = match make(&pods, &wanted.pod, &run.uid).await? {
        Ok(pod) => pod,
        Err(why) => return Ok(Err(refused(&why))),
    };
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    if matches!(phase, "Failed" | "Succeeded") {
        warn!(claim = volume.claim, phase, "the pod that was to mount a snapshot ended; it is made again");
        remove(&pods, &pod).await?;
    }
    let is_up = phase == "Running" && pod.metadata.deletion_timestamp.is_none();
    let Some(bound) = bound.filter(|_| is_up) else {
        return Ok(Err(waits_for(&snapshot, Some(&pod))));
    };
    let mount = MountedVolume {
        namespace: run.namespace.clone(),
        claim: volume.claim.clone(),
        claim_uid: volume.claim_uid.clone(),
        volume: bound,
        pod: pod.name_any(),
        pod_uid: pod.uid().unwrap_or_default(),
        block: volume.block,
    };
    Ok(Ok((pod, mount)))
}

/// Whether the volume of a claim is made only for a pod that has a node.
async fn waits_for_pod(context: &Context, claim: &PersistentVolumeClaim) -> Result<bool> {
    let name = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref()).unwrap_or_default();
    let classes: Api<StorageClass> = Api::all(context.client.clone());
    let class = classes.get_opt(name).await.context("cannot read a storage class")?;
    Ok(class.is_none_or(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer")))
}

fn refused(why: &str) -> String {
    format!("what makes the snapshot readable was refused: {why}")
}

/// What stands between a snapshot and its reading, in words for the status.
fn waits_for(snapshot: &DynamicObject, pod: Option<&Pod>) -> String {
    if let Some(error) = error_of(snapshot) {
        return format!("the snapshot cannot be read yet: {error}");
    }
    let Some(pod) = pod else { return "waiting until the snapshot is ready".to_owned() };
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let unscheduled = conditions
        .filter(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
        .find_map(|condition| condition.message.clone());
    match unscheduled {
        Some(why) => format!("waiting for a node that can mount the snapshot: {why}"),
        None => "waiting until the snapshot is mounted".to_owned(),
    }
}

/// Takes away the mounts of snapshots that are read, while others are still to be: a node has room for so many pods, and a storage
/// for so many copies. What only points to them goes at the end, with all.
pub(super) async fn retire(run: &mut Run, context: &Context) -> Result<()> {
    let is_done = |volume: &VolumeBackupStatus| {
        volume.method.is_snapshot() && volume.snapshot.is_some() && volume.pod_uid.is_some()
    };
    let pods = context.namespaced::<Pod>(&context.namespace);
    let claims = context.namespaced::<PersistentVolumeClaim>(&context.namespace);
    for number in 0..run.status.volumes.len() {
        let volume = &run.status.volumes[number];
        if !is_done(volume) {
            continue;
        }
        let name = name(run, volume);
        if let Some(pod) = pods.get_opt(&name).await.context("cannot read a pod")? {
            remove(&pods, &pod).await?;
        }
        if let Some(claim) = claims.get_opt(&name).await.context("cannot read a claim")? {
            super::sweep::remove_claim(context, &claims, &claim).await?;
        }
        let volume = &mut run.status.volumes[number];
        (volume.pod, volume.pod_uid) = (None, None);
    }
    Ok(())
}

/// Gives up a mount whose node or pod was lost; the next step mounts the snapshot anew, under other names.
///
/// The old objects are not waited for: a claim on a node that is gone can take long. The sweep at the end waits.
pub(super) async fn renew(run: &mut Run, context: &Context, claim: &str) -> Result<()> {
    let Some(number) = run.status.volumes.iter().position(|volume| volume.claim == claim) else { return Ok(()) };
    let old = name(run, &run.status.volumes[number]);
    let task_name = decide::task_name(&run.uid, &run.status.volumes[number]);
    warn!(claim, "the mount of a snapshot was lost; it is mounted again");
    let tasks: Api<VolumeTask> = context.namespaced(&context.namespace);
    if let Some(task) = tasks.get_opt(&task_name).await.context("cannot read a task")? {
        remove(&tasks, &task).await?;
    }
    let pods = context.namespaced::<Pod>(&context.namespace);
    if let Some(pod) = pods.get_opt(&old).await.context("cannot read a pod")? {
        force(&pods, &pod).await?;
    }
    let claims = context.namespaced::<PersistentVolumeClaim>(&context.namespace);
    if let Some(claim) = claims.get_opt(&old).await.context("cannot read a claim")? {
        super::sweep::remove_claim(context, &claims, &claim).await?;
    }
    let volume = &mut run.status.volumes[number];
    volume.attempt += 1;
    (volume.pod, volume.pod_uid, volume.node, volume.transfer) = (None, None, None, None);
    volume.dispatched_at = None;
    volume.phase = Phase::Pending;
    volume.message = Some("the node or the pod that had the snapshot mounted was lost; it is mounted again".into());
    run.save(context).await?;
    context
        .events
        .warning(
            &run.backup,
            Reason::PodVanished,
            format!("the snapshot of the claim {claim} is mounted again: its pod was lost"),
        )
        .await;
    Ok(())
}
