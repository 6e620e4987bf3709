//! Which recovery point is brought back, and whether anything stands in its way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::TryStreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::DynamicObject;
use kube::core::PartialObjectMeta;
use kube::{Api, ResourceExt};
use lifeboat_crds::backup::{Phase, PinnedRepository};
use lifeboat_crds::conditions::{ConditionType, Reason, State};
use lifeboat_crds::restore::{
    ExistingResources, PinnedRecoveryPoint, RepositorySource, RestoreSource, VolumeRestoreStatus,
};
use lifeboat_crds::{Backup, ClusterRepository};
use lifeboat_process::access::AccessError;
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::repository::Repository;
use lifeboat_repository::snapshot::{Content, Snapshot};
use lifeboat_repository::tree;
use serde_json::Value;
use tracing::info;

use super::{Run, clones, streams};
use crate::backup::each_object;
use crate::backup::refusal::{Refusal, repository as usable_repository, unready_message};
use crate::context::Context;
use crate::object::ResourceName;
use crate::recovery_point::{CLUSTER_FOLDER, Description, tags};
use crate::restore::apply::Resources;
use crate::storage::Storage;

/// A restore waits this long for a repository that is not ready.
const REPOSITORY_PATIENCE: jiff::SignedDuration = jiff::SignedDuration::from_mins(5);
const PAUSE: Duration = Duration::from_secs(5);
/// So many objects of a resource are asked for by name; when there are more, the names that exist are listed.
const FEW: usize = 4;

/// One object as it was captured.
#[derive(Debug, Clone)]
pub(super) struct Captured {
    pub(super) resource: ResourceName,
    /// The version that it was captured in.
    pub(super) version: String,
    pub(super) name: String,
    /// Whether it lies in no namespace.
    pub(super) cluster: bool,
    pub(super) object: Value,
}

impl Captured {
    /// As people read it: `deployments.apps web`.
    pub(super) fn shown(&self) -> String {
        format!("{} {}", self.resource.qualified(), self.name)
    }
}

/// A path of the objects' snapshot: `deployments.apps/v1/web.json`, of a cluster-scoped object in a folder of its own.
fn parse_path(path: &[u8], object: Value) -> Option<Captured> {
    let path = std::str::from_utf8(path).ok()?;
    let of_cluster = path.strip_prefix(CLUSTER_FOLDER).and_then(|rest| rest.strip_prefix('/'));
    let mut parts = of_cluster.unwrap_or(path).splitn(3, '/');
    let (plural, group) = parts.next()?.split_once('.')?;
    let (version, name) = (parts.next()?, parts.next()?.strip_suffix(".json")?);
    let group = if group == "core" { String::new() } else { group.to_owned() };
    Some(Captured {
        resource: ResourceName { plural: plural.to_owned(), group },
        version: version.to_owned(),
        name: name.to_owned(),
        cluster: of_cluster.is_some(),
        object,
    })
}

/// The objects of a recovery point.
pub(super) async fn captured(
    repository: &Repository,
    snapshots: &[Snapshot],
    id: SnapshotId,
) -> Result<Vec<Captured>, AccessError> {
    let damaged = |message: String| AccessError { reason: Reason::RepositoryDamaged, message };
    let snapshot = snapshots
        .iter()
        .find(|snapshot| snapshot.id == id)
        .ok_or_else(|| damaged(format!("the snapshot {id} of the objects is missing in the repository")))?;
    let files = tree::read_files(repository, snapshot).await.map_err(|error| AccessError::from_repository(&error))?;
    let files: Vec<_> = files.try_collect().await.map_err(|error| AccessError::from_repository(&error))?;
    files
        .into_iter()
        .map(|(path, bytes)| {
            let shown = String::from_utf8_lossy(&path).into_owned();
            let object = serde_json::from_slice(&bytes)
                .map_err(|error| damaged(format!("the captured object `{shown}` is malformed: {error}")))?;
            parse_path(&path, object)
                .ok_or_else(|| damaged(format!("the captured object `{shown}` has an unknown name")))
        })
        .collect()
}

/// The recovery point that a source means, among those of this namespace.
fn choose<'a>(snapshots: &'a [Snapshot], namespace: &str, source: &RepositorySource) -> Result<&'a Snapshot, Refusal> {
    let is_ours = |snapshot: &&Snapshot| {
        matches!(snapshot.content, Content::RecoveryPoint { .. })
            && snapshot.tags.get(tags::NAMESPACE).is_some_and(|found| found == namespace)
            && source.policy.as_ref().is_none_or(|policy| snapshot.tags.get(tags::POLICY) == Some(policy))
            && source.recovery_point.as_ref().is_none_or(|id| snapshot.id.to_string().starts_with(id.as_str()))
            && source.as_of.as_ref().is_none_or(|as_of| snapshot.time.as_second() <= as_of.0.as_second())
    };
    let fitting: Vec<_> = snapshots.iter().filter(is_ours).collect();
    let refuse = |message: String| Refusal::new(Reason::RecoveryPointNotFound, message);
    match (&source.recovery_point, fitting.as_slice()) {
        (Some(id), [_, _, ..]) => {
            Err(refuse(format!("{} recovery points begin with {id}; write more digits", fitting.len())))
        }
        (_, []) => Err(refuse(format!(
            "the repository `{}` has no such recovery point of the namespace `{namespace}`; see `lifeboat snapshots --tag namespace={namespace}`",
            source.reference.name
        ))),
        (_, all) => Ok(all[all.len() - 1]),
    }
}

/// The source as a place in a repository.
async fn source(run: &Run, context: &Context) -> Result<Result<RepositorySource, Refusal>> {
    let reference = match &run.restore.spec.source {
        RestoreSource::Repository(source) => return Ok(Ok(source.clone())),
        RestoreSource::BackupRef(reference) => reference,
    };
    let name = &reference.name;
    let backup = context.namespaced::<Backup>(&run.namespace).get_opt(name).await.context("cannot read the Backup")?;
    let Some(backup) = backup else {
        return Ok(Err(Refusal::new(
            Reason::SourceUnusable,
            format!("there is no Backup `{name}` in this namespace; name another, or use source.repository"),
        )));
    };
    let status = backup.status.unwrap_or_default();
    let (Some(point), Some(repository)) = (status.recovery_point, status.repository) else {
        return Ok(Err(Refusal::new(
            Reason::SourceUnusable,
            format!("the Backup `{name}` has no recovery point: it did not succeed"),
        )));
    };
    Ok(Ok(RepositorySource {
        reference: lifeboat_crds::plan::RepositoryRef { name: repository.name },
        policy: None,
        recovery_point: Some(point),
        as_of: None,
    }))
}

/// Claims and objects that stand in the way.
async fn obstacle(
    run: &Run,
    context: &Context,
    description: &Description,
    objects: &[Captured],
    resources: &Resources,
) -> Result<Option<Refusal>> {
    let claims = context.namespaced::<PersistentVolumeClaim>(&run.namespace);
    let mut existing = Vec::new();
    for volume in &description.volumes {
        if claims.get_opt(&volume.claim).await.context("cannot read a claim")?.is_some() {
            existing.push(volume.claim.clone());
        }
    }
    if !existing.is_empty() {
        let message = format!(
            "these claims exist, and existing volumes are never overwritten: {}; delete them first, or restore in a cluster where they do not exist",
            existing.join(", ")
        );
        return Ok(Some(Refusal::new(Reason::VolumeExists, message)));
    }
    for volume in &description.volumes {
        if !objects
            .iter()
            .any(|captured| captured.resource.plural == "persistentvolumeclaims" && captured.name == volume.claim)
        {
            let message = format!("the recovery point has data of the claim {} but not the claim itself", volume.claim);
            return Ok(Some(Refusal::new(Reason::RepositoryDamaged, message)));
        }
    }
    if run.restore.spec.existing.resources != ExistingResources::Fail {
        return Ok(None);
    }
    let mut of_resources: BTreeMap<String, Vec<&Captured>> = BTreeMap::new();
    for captured in objects.iter().filter(|captured| !captured.cluster) {
        of_resources.entry(captured.resource.folder()).or_default().push(captured);
    }
    for of_one in of_resources.into_values() {
        let Some(resource) = resources.find(of_one[0]) else { continue };
        let api = Api::namespaced_with(context.client.clone(), &run.namespace, resource);
        existing.extend(that_exist(&api, &of_one).await?.map(Captured::shown));
    }
    if existing.is_empty() {
        return Ok(None);
    }
    existing.truncate(10);
    Ok(Some(Refusal::new(
        Reason::ObjectExists,
        format!("these objects exist and spec.existing.resources is Fail: {}", existing.join(", ")),
    )))
}

/// Those of the captured objects of one resource that are there.
async fn that_exist<'a>(
    api: &Api<PartialObjectMeta<DynamicObject>>,
    captured: &'a [&'a Captured],
) -> Result<impl Iterator<Item = &'a Captured>> {
    let mut found = BTreeSet::new();
    if captured.len() <= FEW {
        for one in captured {
            let there = api.get_opt(&one.name).await.context("cannot look for an existing object")?;
            found.extend(there.map(|there| there.name_any()));
        }
    } else {
        let note = |there: PartialObjectMeta<DynamicObject>| {
            found.insert(there.name_any());
            Ok(())
        };
        each_object(api, note).await.context("cannot list existing objects")?;
    }
    Ok(captured.iter().copied().filter(move |one| found.contains(&one.name)))
}

async fn refuse(run: &mut Run, context: &Context, refusal: Refusal) -> Result<Option<Duration>> {
    run.set(ConditionType::Planned, State::False, refusal.reason, refusal.message.clone());
    run.fail(context, refusal.reason, refusal.message).await?;
    Ok(None)
}

impl From<AccessError> for Refusal {
    fn from(error: AccessError) -> Self {
        Self::new(error.reason, error.message)
    }
}

/// Chooses the recovery point and pins the plan. `Some`: wait this long and try again.
pub(super) async fn plan(run: &mut Run, context: &Context) -> Result<Option<Duration>> {
    let source = match source(run, context).await? {
        Ok(source) => source,
        Err(refusal) => return refuse(run, context, refusal).await,
    };
    let object = match usable_repository(context, &source.reference.name, &run.namespace).await? {
        Ok(object) => object,
        Err(refusal) => return refuse(run, context, refusal).await,
    };
    if let Some(message) = unready_message(&object) {
        let made = run.restore.metadata.creation_timestamp.as_ref().map_or_else(Timestamp::now, |made| made.0);
        if Timestamp::now().duration_since(made) > REPOSITORY_PATIENCE {
            return refuse(run, context, Refusal::new(Reason::RepositoryNotReady, message)).await;
        }
        run.set(ConditionType::Planned, State::Unknown, Reason::RepositoryNotReady, message);
        run.save(context).await?;
        return Ok(Some(PAUSE));
    }
    if let Err(refusal) = super::cluster::account(run, context).await? {
        return refuse(run, context, refusal).await;
    }
    match prepare(run, context, &source, &object).await? {
        Ok(()) => Ok(None),
        Err(refusal) => refuse(run, context, refusal).await,
    }
}

async fn prepare(
    run: &mut Run,
    context: &Context,
    source: &RepositorySource,
    object: &ClusterRepository,
) -> Result<Result<(), Refusal>> {
    let repository = match context.access.open(&object.spec.backend, &object.spec.encryption.secret_ref, None).await {
        Ok(repository) => repository,
        Err(error) => return Ok(Err(error.into())),
    };
    let snapshots = match repository.snapshots().await {
        Ok(snapshots) => snapshots,
        Err(error) => return Ok(Err(AccessError::from_repository(&error).into())),
    };
    let point = match choose(&snapshots, &run.namespace, source) {
        Ok(point) => point,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let description = match Description::of(point) {
        Ok(description) => description,
        Err(error) => return Ok(Err(Refusal::new(Reason::SourceUnusable, lifeboat_process::telemetry::chain(&error)))),
    };
    let objects = match captured(&repository, &snapshots, description.objects).await {
        Ok(objects) => objects,
        Err(error) => return Ok(Err(error.into())),
    };
    if let Some(volume) =
        description.volumes.iter().find(|volume| !snapshots.iter().any(|snapshot| snapshot.id == volume.snapshot))
    {
        let message =
            format!("the snapshot {} of the claim {} is missing in the repository", volume.snapshot, volume.claim);
        return Ok(Err(Refusal::new(Reason::RepositoryDamaged, message)));
    }
    if let Some(stream) =
        description.streams.iter().find(|stream| !snapshots.iter().any(|snapshot| snapshot.id == stream.snapshot))
    {
        let message =
            format!("the snapshot {} of the stream {} is missing in the repository", stream.snapshot, stream.name);
        return Ok(Err(Refusal::new(Reason::RepositoryDamaged, message)));
    }
    let resources = Resources::discover(&context.client).await?;
    if let Some(refusal) = obstacle(run, context, &description, &objects, &resources).await? {
        return Ok(Err(refusal));
    }
    info!(recovery_point = %point.id, volumes = description.volumes.len(), objects = objects.len(), "planned");
    let clones = clones(run, context, &description, &objects).await?;
    pin(run, context, &repository, source, point, &description, &clones).await.map(Ok)
}

/// The volumes that the storage itself can bring back: the name of the snapshot, by claim.
async fn clones(
    run: &Run,
    context: &Context,
    description: &Description,
    objects: &[Captured],
) -> Result<BTreeMap<String, String>> {
    let kept = clones::kept(context, &run.namespace, &description.backup_uid).await?;
    if kept.is_empty() {
        return Ok(BTreeMap::new());
    }
    let storage = Storage::observe(&context.client).await?;
    let claims = objects.iter().filter(|captured| captured.resource.plural == "persistentvolumeclaims");
    Ok(claims
        .filter_map(|claim| {
            let found = clones::fitting(kept.get(&claim.name), &claim.object, &storage)?;
            Some((claim.name.clone(), found.name.clone()))
        })
        .collect())
}

async fn pin(
    run: &mut Run,
    context: &Context,
    repository: &Repository,
    source: &RepositorySource,
    point: &Snapshot,
    description: &Description,
    clones: &BTreeMap<String, String>,
) -> Result<()> {
    run.status.repository =
        Some(PinnedRepository { name: source.reference.name.clone(), id: repository.id().to_string() });
    run.status.recovery_point = Some(PinnedRecoveryPoint {
        id: point.id.to_string(),
        time: Time(point.time),
        policy: description.policy.clone(),
    });
    run.status.volumes = description
        .volumes
        .iter()
        .map(|volume| VolumeRestoreStatus {
            claim: volume.claim.clone(),
            snapshot: volume.snapshot.to_string(),
            clone_of: clones.get(&volume.claim).cloned(),
            claim_uid: None,
            node: None,
            phase: Phase::Pending,
            transfer: None,
            failed: 0,
            failed_sample: Vec::new(),
            message: None,
        })
        .collect();
    run.status.streams = streams::noted(&description.streams, run.restore.spec.streams);
    run.status.start_time = Some(Time(Timestamp::now()));
    run.status.phase = Phase::Running;
    run.set(
        ConditionType::Planned,
        State::True,
        Reason::Done,
        format!("recovery point {} of {}", point.id, point.time),
    );
    run.set(ConditionType::Succeeded, State::Unknown, Reason::InProgress, "under way");
    run.save(context).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_repository::id::SessionId;
    use lifeboat_repository::snapshot::{Counts, WriteStats};

    fn point(seconds: i64, namespace: &str, policy: Option<&str>) -> Snapshot {
        let tags = [(tags::NAMESPACE, Some(namespace)), (tags::POLICY, policy)];
        Snapshot {
            id: SnapshotId::random(),
            session: SessionId::random(),
            time: Timestamp::from_second(seconds).unwrap(),
            lineage: "l".into(),
            tags: tags.into_iter().filter_map(|(tag, value)| Some((tag.to_owned(), value?.to_owned()))).collect(),
            host: String::new(),
            parent: None,
            content: Content::RecoveryPoint { members: vec![], description: Value::Null },
            counts: Counts::default(),
            stats: WriteStats::default(),
        }
    }

    fn source(policy: Option<&str>, id: Option<String>, as_of: Option<i64>) -> RepositorySource {
        RepositorySource {
            reference: lifeboat_crds::plan::RepositoryRef { name: "main".into() },
            policy: policy.map(str::to_owned),
            recovery_point: id,
            as_of: as_of.map(|seconds| Time(Timestamp::from_second(seconds).unwrap())),
        }
    }

    #[test]
    fn the_newest_that_fits_is_chosen_and_never_another_namespaces() {
        let all = [point(10, "shop", Some("p")), point(20, "shop", None), point(30, "bank", None)];
        let chosen = |source| choose(&all, "shop", &source).map(|point| point.time.as_second());
        assert_eq!(chosen(source(None, None, None)), Ok(20));
        assert_eq!(chosen(source(Some("p"), None, None)), Ok(10));
        assert_eq!(chosen(source(None, None, Some(19))), Ok(10));
        assert_eq!(chosen(source(None, Some(all[0].id.to_string()[..8].to_owned()), None)), Ok(10));
        for none in [
            source(None, None, Some(9)),
            source(Some("q"), None, None),
            source(None, Some(all[2].id.to_string()), None),
        ] {
            assert_eq!(chosen(none).unwrap_err().reason, Reason::RecoveryPointNotFound);
        }
    }

    #[test]
    fn names_of_captured_objects_are_read_back() {
        let parse = |path: &[u8]| parse_path(path, Value::Null);
        let found = parse(b"deployments.apps/v1/web.json").unwrap();
        assert_eq!(
            (found.shown().as_str(), found.version.as_str(), found.cluster),
            ("deployments.apps web", "v1", false)
        );
        let secret = parse(b"secrets.core/v1/a.b.json").unwrap();
        assert_eq!((secret.resource.group.as_str(), secret.name.as_str()), ("", "a.b"));
        let role = parse(b"~cluster/clusterroles.rbac.authorization.k8s.io/v1/system:x.json").unwrap();
        assert_eq!((role.shown().as_str(), role.cluster), ("clusterroles.rbac.authorization.k8s.io system:x", true));
        for strange in [&b"strange"[..], b"a.b/v1/x", b"\xff.b/v1/x.json", b"~cluster", b"~cluster/a.b/x.json"] {
            assert!(parse(strange).is_none());
        }
    }
}
