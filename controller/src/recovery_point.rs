//! What a recovery point says about its members: written by a backup, read by a restore, maybe in another cluster.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use lifeboat_crds::backup::Consistency;
use lifeboat_crds::plan::StreamRestore;
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::snapshot::{Content, Snapshot};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The newest version of [`Description`] that this program knows: 2 has streams.
const NEWEST_SCHEMA: u32 = 2;

/// The folder of cluster-scoped objects in a snapshot of objects. It sorts behind every resource: which of them belong to the
/// application is known only when its own objects are written.
pub(crate) const CLUSTER_FOLDER: &str = "~cluster";

/// Tags of snapshots and recovery points.
pub(crate) mod tags {
    pub(crate) const CLUSTER: &str = "cluster";
    pub(crate) const NAMESPACE: &str = "namespace";
    pub(crate) const CLAIM: &str = "claim";
    pub(crate) const STREAM: &str = "stream";
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) streams: Vec<Stream>,
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

/// One stream of a recovery point, and how it is restored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Stream {
    pub(crate) name: String,
    pub(crate) snapshot: SnapshotId,
    pub(crate) selector: LabelSelector,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) container: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) restore: Option<StreamRestore>,
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

/// The lineage of a stream.
pub(crate) fn stream_lineage(cluster: &str, namespace: &str, stream: &str) -> String {
    format!("{cluster}/{namespace}/.streams/{stream}")
}

/// The oldest version that can tell of these streams: whoever knows only an older one must not pass over them.
pub(crate) fn schema(streams: &[Stream]) -> u32 {
    if streams.is_empty() { 1 } else { NEWEST_SCHEMA }
}

impl Description {
    /// Reads the description of a snapshot that should be a recovery point.
    pub(crate) fn of(snapshot: &Snapshot) -> Result<Self, DescriptionError> {
        let Content::RecoveryPoint { description, .. } = &snapshot.content else {
            return Err(DescriptionError::NotARecoveryPoint(snapshot.id));
        };
        let schema = description.get("schema").and_then(serde_json::Value::as_u64);
        match schema {
            Some(found) if found > u64::from(NEWEST_SCHEMA) => Err(DescriptionError::Newer(found)),
            _ => Ok(serde_json::from_value(description.clone())?),
        }
    }

    /// All snapshots that the recovery point names.
    pub(crate) fn members(&self) -> Vec<SnapshotId> {
        let volumes = self.volumes.iter().map(|volume| volume.snapshot);
        let streams = self.streams.iter().map(|stream| stream.snapshot);
        std::iter::once(self.objects).chain(volumes).chain(streams).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn description(schema: u32, streams: Vec<Stream>) -> Description {
        Description {
            schema,
            cluster: "c".into(),
            namespace: "n".into(),
            namespace_uid: "u".into(),
            backup: "b".into(),
            backup_uid: "bu".into(),
            policy: None,
            consistency: Consistency::None,
            freeze_millis: None,
            objects: SnapshotId::random(),
            volumes: Vec::new(),
            streams,
            skipped: 0,
        }
    }

    fn point(description: serde_json::Value) -> Snapshot {
        Snapshot {
            id: SnapshotId::random(),
            session: lifeboat_repository::id::SessionId::random(),
            time: jiff::Timestamp::UNIX_EPOCH,
            lineage: "l".into(),
            tags: BTreeMap::new(),
            host: String::new(),
            parent: None,
            content: Content::RecoveryPoint { members: vec![], description },
            counts: lifeboat_repository::snapshot::Counts::default(),
            stats: lifeboat_repository::snapshot::WriteStats::default(),
        }
    }

    #[test]
    fn streams_are_members_and_older_programs_do_not_pass_over_them() {
        let restore = Some(StreamRestore { command: vec!["psql".into()], timeout: None });
        let selector = serde_json::from_value(json!({"matchLabels": {"app": "db"}})).unwrap();
        let stream =
            Stream { name: "a.sql".into(), snapshot: SnapshotId::random(), selector, container: None, restore };
        let streams = vec![stream.clone()];
        assert_eq!((schema(&[]), schema(&streams)), (1, 2));
        let written = description(schema(&streams), streams);
        assert_eq!(written.members(), [written.objects, stream.snapshot]);
        let json = serde_json::to_value(&written).unwrap();
        assert_eq!(Description::of(&point(json.clone())).unwrap(), written);
        let mut newer = json;
        newer["schema"] = json!(3);
        assert!(matches!(Description::of(&point(newer)), Err(DescriptionError::Newer(3))));
        // One that was written before there were streams.
        let old = serde_json::to_value(description(schema(&[]), Vec::new())).unwrap();
        assert!(old.get("streams").is_none() && Description::of(&point(old)).unwrap().streams.is_empty());
    }
}
