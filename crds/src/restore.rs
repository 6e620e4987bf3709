//! `Restore`: brings a recovery point back into the namespace, once.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    backup::{Phase, PinnedRepository, SkippedFile, Transfer},
    plan::RepositoryRef,
};

/// Which recovery point is brought back, and what happens to what exists. Immutable.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lifeboat.dev",
    version = "v1alpha1",
    kind = "Restore",
    shortname = "rst",
    category = "lifeboat",
    namespaced,
    status = "RestoreStatus",
    derive = "PartialEq",
    doc = "Brings a recovery point of an application back into its namespace, once.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Recovery Point", type_ = "string", json_path = ".status.recoveryPoint.id"),
    printcolumn(name = "Objects", type_ = "integer", json_path = ".status.objects.created"),
    printcolumn(name = "Completed", type_ = "date", json_path = ".status.completionTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        priority = "1",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].message"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self == oldSelf").message("a Restore runs once and its spec cannot be changed; create another Restore"))]
pub struct RestoreSpec {
    /// Where the data comes from: exactly one of `backupRef` and `repository`.
    #[x_kube(validation = Rule::new("has(self.backupRef) != has(self.repository)")
        .message("write exactly one of source.backupRef and source.repository"))]
    pub source: RestoreSource,
    /// What happens to what exists.
    #[serde(default)]
    pub existing: Existing,
    /// What happens to streams.
    #[serde(default)]
    pub streams: StreamsRestore,
    /// What happens to objects outside of the namespace. Default: they stay as they are, and those that are missing are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_resources: Option<ClusterRestore>,
}

/// What happens to streams in a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StreamsRestore {
    /// Each that has a restore command is given to it, once objects and volumes are back and its pod is ready.
    #[default]
    Restore,
    /// No command runs. The files can be read with `lifeboat cat`.
    Ignore,
}

/// How cluster-scoped objects are brought back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRestore {
    /// A `ServiceAccount` of this namespace. Cluster-scoped objects that are missing are created with its rights and no others, so the
    /// installation must allow its name. What exists is never changed.
    #[schemars(length(min = 1, max = 253))]
    pub create_as: String,
}

/// Where the data of a restore comes from. Exactly one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum RestoreSource {
    /// A `Backup` of this namespace.
    BackupRef(BackupRef),
    /// A recovery point of this namespace's name in a repository, whether or not its `Backup` object still exists.
    Repository(RepositorySource),
}

/// Names a `Backup` of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupRef {
    /// The backup's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Chooses a recovery point in a repository: the newest of this namespace unless something else is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.recoveryPoint) && has(self.asOf))").message("write at most one of recoveryPoint and asOf"))]
pub struct RepositorySource {
    /// The repository.
    #[serde(rename = "ref")]
    pub reference: RepositoryRef,
    /// Only recovery points that this policy made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub policy: Option<String>,
    /// The id of the recovery point, or its first characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 4, max = 32), regex(pattern = "^[0-9a-f]+$"))]
    pub recovery_point: Option<String>,
    /// The newest recovery point that is not younger than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub as_of: Option<Time>,
}

/// What happens to what exists.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Existing {
    /// Objects of the same name. Claims are never overwritten: an existing claim fails the restore before anything is changed.
    #[serde(default)]
    pub resources: ExistingResources,
}

/// What happens to objects that exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ExistingResources {
    /// They stay as they are and are counted and listed.
    #[default]
    Skip,
    /// They are made to look like the captured ones.
    Update,
    /// The restore fails before anything is changed.
    Fail,
}

/// What became of a restore.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// How far it is; derived from the conditions.
    #[serde(default)]
    pub phase: Phase,
    /// `Planned`, `Waiting`, `DataReady`, `StreamsRestored`, `Succeeded`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// When work began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the restore ended, well or badly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The repository's name and id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<PinnedRepository>,
    /// The recovery point that was chosen, pinned when the restore started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_point: Option<PinnedRecoveryPoint>,
    /// One entry a claim.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeRestoreStatus>,
    /// One entry a stream of the recovery point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<StreamRestoreStatus>,
    /// What became of cluster-scoped objects that have to be there before the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_objects: Option<ObjectsRestoreStatus>,
    /// What became of the objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<ObjectsRestoreStatus>,
}

/// A recovery point as it was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PinnedRecoveryPoint {
    /// Its id in the repository.
    pub id: String,
    /// The time that it shows.
    pub time: Time,
    /// The policy that made it, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

/// What became of one claim in a restore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeRestoreStatus {
    /// The claim's name.
    pub claim: String,
    /// The id of the snapshot in the repository.
    pub snapshot: String,
    /// The `VolumeSnapshot` of this namespace that the claim is cloned from, when the storage still has it. Else it is filled from
    /// the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
    /// The UID of the claim that was created. Set at creation, so that a claim that somebody else made is never written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim_uid: Option<String>,
    /// The node that it is written on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How far it is.
    #[serde(default)]
    pub phase: Phase,
    /// What was written, so far or in the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// How many files could not be restored in full.
    #[serde(default)]
    pub failed: u64,
    /// The first of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_sample: Vec<SkippedFile>,
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What became of one stream in a restore.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StreamRestoreStatus {
    /// The stream's name, and that of its file.
    pub name: String,
    /// The id of the snapshot in the repository.
    pub snapshot: String,
    /// Why no command is given the file, if none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_restored: Option<String>,
    /// Labels of the pod that the command runs in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// The pod that the command runs in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The pod's node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How far it is.
    #[serde(default)]
    pub phase: Phase,
    /// What the command was given, so far or in the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// What it waits for, or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What became of the objects in a restore.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectsRestoreStatus {
    /// Created.
    pub created: u64,
    /// Existed and were changed.
    pub updated: u64,
    /// Existed and were left as they were.
    pub skipped: u64,
    /// Could not be applied.
    pub failed: u64,
    /// The first of those that were skipped or failed, with the reason: `apps/v1 Deployment web: …`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}
