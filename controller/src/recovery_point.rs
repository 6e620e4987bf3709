//! What a recovery point says about its members: written by a backup, read by a restore, maybe in another cluster.

use std::collections::BTreeMap;

use lifeboat_crds::backup::Consistency;
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::snapshot::{Content, Snapshot};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The version of [`Description`] that this program writes.
pub(crate) const SCHEMA: u32 = 1;

/// The folder of cluster-scoped objects in a snapshot of objects. It sorts behind every resource: which of them belong to the
/// application is known only when its own objects are written.
pub(crate) const CLUSTER_FOLDER: &str = "~cluster";

/// Tags of snapshots and recovery points.
pub(crate) mod tags {
    pub(crate) const CLUSTER: &str = "cluster";
    pub(crate) const NAMESPACE: &str = "namespace";
    pub(crate) const CLAIM: &str = "claim";
    pub(crate) const BACKUP: &str = "backup";
    pub(crate) const BACKUP_UID: &str = "backup-uid";
    pub(crate) const POLICY: &str = "policy";
}

/// What a recovery point contains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Description {
    pub(crate) schema: u32,
    pub(crate) cluster: String,
    pub(crate) namespace: String,
    pub(crate) namespace_uid: String,
    pub(crate) backup: String,
    pub(crate) backup_uid: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) policy: Option<String>,
    pub(crate) consistency: Consistency,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) freeze_millis: Option<u64>,
    /// The snapshot of the objects.
    pub(crate) objects: SnapshotId,
    pub(crate) volumes: Vec<Volume>,
    /// Files that could not be read, in all volumes.
    pub(crate) skipped: u64,
}

/// One claim of a recovery point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Volume {
    pub(crate) claim: String,
    pub(crate) snapshot: SnapshotId,
}

/// A recovery point that this program cannot read.
#[derive(Debug, Error)]
pub(crate) enum DescriptionError {
    #[error("the snapshot {0} is no recovery point of an application")]
    NotARecoveryPoint(SnapshotId),
    #[error("the recovery point was written by a newer version of Lifeboat (schema {0}); use that version")]
    Newer(u64),
    #[error("the recovery point's description is malformed")]
    Malformed(#[from] serde_json::Error),
}

/// The lineage of a namespace's recovery points.
pub(crate) fn lineage(cluster: &str, namespace: &str) -> String {
    format!("{cluster}/{namespace}/.recovery")
}

/// The lineage of a namespace's objects.
pub(crate) fn objects_lineage(cluster: &str, namespace: &str) -> String {
    format!("{cluster}/{namespace}/.objects")
}

/// The lineage of a claim. Names of claims cannot begin with a dot, so the lineages never meet.
pub(crate) fn volume_lineage(cluster: &str, namespace: &str, claim: &str) -> String {
    format!("{cluster}/{namespace}/{claim}")
}

impl Description {
    /// Reads the description of a snapshot that should be a recovery point.
    pub(crate) fn of(snapshot: &Snapshot) -> Result<Self, DescriptionError> {
        let Content::RecoveryPoint { description, .. } = &snapshot.content else {
            return Err(DescriptionError::NotARecoveryPoint(snapshot.id));
        };
        let schema = description.get("schema").and_then(serde_json::Value::as_u64);
        match schema {
            Some(found) if found > u64::from(SCHEMA) => Err(DescriptionError::Newer(found)),
            _ => Ok(serde_json::from_value(description.clone())?),
        }
    }

    /// All snapshots that the recovery point names.
    pub(crate) fn members(&self) -> Vec<SnapshotId> {
        std::iter::once(self.objects).chain(self.volumes.iter().map(|volume| volume.snapshot)).collect()
    }

    /// The tags of the recovery point and of its members.
    pub(crate) fn tags(&self) -> BTreeMap<String, String> {
        backup_tags(&self.cluster, &self.namespace, &self.backup, &self.backup_uid, self.policy.as_deref())
    }
}

/// The tags of everything that a backup writes.
pub(crate) fn backup_tags(
    cluster: &str,
    namespace: &str,
    backup: &str,
    uid: &str,
    policy: Option<&str>,
) -> BTreeMap<String, String> {
    let all = [
        (tags::CLUSTER, Some(cluster)),
        (tags::NAMESPACE, Some(namespace)),
        (tags::BACKUP, Some(backup)),
        (tags::BACKUP_UID, Some(uid)),
        (tags::POLICY, policy),
    ];
    all.into_iter().filter_map(|(tag, value)| Some((tag.to_owned(), value?.to_owned()))).collect()
}
