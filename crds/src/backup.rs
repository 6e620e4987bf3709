//! `Backup`: one recovery point, made once.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::plan::{BackupPlan, VolumeMethod};
use crate::quiesce_lease::Watchdog;

/// What one backup covers: a policy of the same namespace, or a plan of its own. Immutable.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lifeboat.dev",
    version = "v1alpha1",
    kind = "Backup",
    shortname = "bkp",
    category = "lifeboat",
    namespaced,
    status = "BackupStatus",
    derive = "PartialEq",
    doc = "One recovery point of an application, made once.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Consistency", type_ = "string", json_path = ".status.consistency"),
    printcolumn(name = "Objects", type_ = "integer", json_path = ".status.objects.count"),
    printcolumn(name = "Read", type_ = "integer", json_path = ".status.readBytes"),
    printcolumn(name = "Stored", type_ = "integer", json_path = ".status.storedBytes"),
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
#[x_kube(
    validation = Rule::new("has(self.policyRef) != has(self.plan)").message("write exactly one of policyRef and plan"),
    validation = Rule::new("self == oldSelf").message("a Backup runs once and its spec cannot be changed; create another Backup")
)]
pub struct BackupSpec {
    /// The policy to follow, as it stands when the backup starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_ref: Option<PolicyRef>,
    /// What to back up without a policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<BackupPlan>,
    /// What the deletion of this object does to the data.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// What the deletion of a `Backup` does to its recovery point in the repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// It stays until retention or somebody with access to the repository removes it.
    #[default]
    Retain,
    /// It goes as well, unless the whole namespace is being deleted.
    Delete,
}

/// Names a `BackupPolicy` of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRef {
    /// The policy's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// How far a run-once object is. Derived from its conditions, for people; programs read the conditions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Not started.
    #[default]
    Pending,
    /// Under way.
    Running,
    /// Ended well.
    Succeeded,
    /// Ended, but not everything could be read or restored; conditions and status name what.
    Partial,
    /// Ended badly.
    Failed,
}

/// What a backup's content may be relied upon for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Consistency {
    /// The policy's quiesce steps held the application at rest from before the first volume was cut or read until after the last.
    Application,
    /// All volumes show the same instant, as after a power cut: one snapshot, or one group snapshot.
    Crash,
    /// Each volume shows one instant, but not all the same.
    CrashPerVolume,
    /// Files were read one after the other while the application ran.
    None,
}

/// What became of a backup.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// How far it is; derived from the conditions.
    #[serde(default)]
    pub phase: Phase,
    /// `Resolved`, `Waiting`, `Quiesced`, `Cut`, `Captured`, `Succeeded`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// When work began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the backup ended, well or badly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The plan that was followed, pinned when the backup started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<BackupPlan>,
    /// The repository's name and id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<PinnedRepository>,
    /// The id of the recovery point in the repository. Set when it is committed, never before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_point: Option<String>,
    /// What the content may be relied upon for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// The freeze: what was frozen, since when, until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesce: Option<QuiesceStatus>,
    /// The moment before the first snapshot was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_started_at: Option<MicroTime>,
    /// How long it took until the last snapshot was made, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_millis: Option<u64>,
    /// When it had its turn to bring the application to rest, or to read volumes where they are mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admitted_at: Option<Time>,
    /// The captured objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<ObjectsStatus>,
    /// One entry a claim.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeBackupStatus>,
    /// One entry a stream of the plan.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<StreamBackupStatus>,
    /// Bytes read from volumes and streams, of all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bytes: Option<u64>,
    /// Bytes that the repository grew by, compressed and encrypted, for volumes, streams and objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
}

/// A repository as it was found when a run started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PinnedRepository {
    /// The `ClusterRepository`'s name.
    pub name: String,
    /// The repository's id, in hexadecimal.
    pub id: String,
}

/// The freeze of an application.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuiesceStatus {
    /// The moment before the first freeze command was sent. Written before it is sent, so that a restarted controller knows what to thaw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_at: Option<MicroTime>,
    /// When the application is thawed at the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// The moment after the last thaw command ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thawed_at: Option<Time>,
    /// How long the application was frozen, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_millis: Option<u64>,
    /// One entry a pod and step, in the order of freezing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<QuiescedWorkload>,
}

/// The way to a workload that is held at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Through {
    /// The guardian on its node.
    Guardian,
    /// Commands by way of the API server.
    ApiServer,
}

/// One workload that was brought to rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuiescedWorkload {
    /// The index of the step in the plan; hooks that pods declare by annotations count on from there.
    pub step: u32,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: String,
    /// The container's name. Empty when volumes were frozen.
    #[serde(default)]
    pub container: String,
    /// Whether it may be at rest: that was begun, and its end was not confirmed.
    pub frozen: bool,
    /// Who holds it at rest: `Guardian` on its node, or `ApiServer` where no guardian can reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<Through>,
    /// What thaws it when all of Lifeboat has died.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// How long it was held at rest, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_millis: Option<u64>,
    /// What failed, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The captured objects.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectsStatus {
    /// How many of the namespace.
    pub count: u64,
    /// How many cluster-scoped ones that belong to them.
    #[serde(default)]
    pub cluster_scoped: u64,
    /// The id of their snapshot in the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Resources that could not be listed, with the reason. A backup with such is not `Succeeded`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

/// What became of one claim in a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeBackupStatus {
    /// The claim's name.
    pub claim: String,
    /// The claim's UID.
    pub claim_uid: String,
    /// The persistent volume's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// How it is read.
    pub method: VolumeMethod,
    /// Why it is not read as the plan asks for or as its driver would allow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// Whether it is a raw block device, read as one image.
    #[serde(default)]
    pub block: bool,
    /// How the block device was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_read: Option<BlockRead>,
    /// The snapshot that it is read from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<VolumeCut>,
    /// How often the snapshot was mounted anew, because the node of its pod was lost.
    #[serde(default)]
    pub attempt: u32,
    /// The pod whose mount or device is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// That pod's UID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// The node that it is read on, or is to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// When its snapshot had its turn to be mounted and read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatched_at: Option<Time>,
    /// How far it is.
    #[serde(default)]
    pub phase: Phase,
    /// The id of its snapshot in the repository, once committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// What was read and stored, so far or in the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// How many files could not be read.
    #[serde(default)]
    pub skipped: u64,
    /// The first of the files that could not be read. The repository has the full list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_sample: Vec<SkippedFile>,
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What became of one stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StreamBackupStatus {
    /// The stream's name, and that of its file.
    pub name: String,
    /// The pod that the command runs in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// That pod's UID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// The container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The pod's node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// When it had its turn to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatched_at: Option<Time>,
    /// How far it is.
    #[serde(default)]
    pub phase: Phase,
    /// The id of its snapshot in the repository, once committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// What was read and stored, so far or in the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// What it waits for, or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What told which parts of a block device need not be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReadBy {
    /// The storage's list of what changed since the snapshot that the parent shows.
    Delta,
    /// The storage's list of what is allocated.
    Allocated,
    /// Nothing: all of it was read and compared with the parent.
    #[default]
    Full,
}

/// How a block device was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlockRead {
    /// What told which parts need not be read.
    pub by: ReadBy,
    /// Why nothing better did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Bytes that the list names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listed_bytes: Option<u64>,
    /// Bytes that the list leaves out and that were read to see whether it is right.
    #[serde(default)]
    pub audited_bytes: u64,
    /// What is wrong with the list, if that was found. Then everything was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrong_list: Option<String>,
}

/// A snapshot of a volume on its storage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeCut {
    /// The CSI driver.
    pub driver: String,
    /// The `VolumeSnapshotClass` or `VolumeGroupSnapshotClass`.
    pub class: String,
    /// The driver's name of the volume.
    pub volume_handle: String,
    /// The storage class in which the snapshot is made readable.
    pub storage_class: String,
    /// The size of the volume, as a quantity.
    pub size: String,
    /// The longest time until it can be read, in seconds, from its turn.
    pub ready_within_seconds: u64,
    /// At least one in so many backups of a raw block volume reads everything, whatever the storage lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit_every: Option<u32>,
    /// The driver's name of the snapshot. Set when the snapshot is made, never before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
    /// When it was made, by the storage's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Time>,
}

/// Figures of a transfer between a volume and a repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Transfer {
    /// Regular files.
    pub files: u64,
    /// Bytes of regular files in the snapshot, holes not counted.
    pub bytes: u64,
    /// Bytes read from the volume (backup) or the repository (restore). Unchanged files are not read.
    pub read_bytes: u64,
    /// Bytes that the repository did not have before.
    pub new_bytes: u64,
    /// The same, compressed and encrypted: what the repository grew by.
    pub stored_bytes: u64,
    /// Duration in milliseconds.
    pub millis: u64,
}

/// A file that could not be read or restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SkippedFile {
    /// The path within the volume; bytes that are not UTF-8 are shown as `\xNN`.
    pub path: String,
    /// Why.
    pub reason: String,
}
