//! `VolumeTask`: one unit of work for one node's agent, with a volume or a stream. Internal; lives in Lifeboat's namespace.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    backup::{BlockRead, Phase, SkippedFile, Transfer},
    cluster_repository::{Backend, ClusterRepositorySpec, CompressionLevel, Reclaimed, SecretRef},
    quiesce_lease::LeasedWorkload,
};

/// One unit of work for one node's agent. Made by the controller; not for people to write.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lifeboat.dev",
    version = "v1alpha1",
    kind = "VolumeTask",
    shortname = "vtask",
    namespaced,
    status = "VolumeTaskStatus",
    derive = "PartialEq",
    selectable = ".spec.nodeName",
    doc = "One unit of work for one node's agent. Internal to Lifeboat.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Repository", type_ = "string", json_path = ".spec.repository.name"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".spec.volume.namespace"),
    printcolumn(name = "Claim", type_ = "string", json_path = ".spec.volume.claim"),
    printcolumn(name = "Pod", type_ = "string", json_path = ".spec.workload.pod", priority = "1"),
    printcolumn(name = "Bytes", type_ = "integer", json_path = ".status.progress.bytesDone"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        priority = "1",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].message"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self == oldSelf").message("a VolumeTask cannot be changed"),
    validation = Rule::new("has(self.volume) == (has(self.operation.backup) || has(self.operation.restore))")
        .message("backup and restore need a volume, and nothing else does"),
    validation = Rule::new("has(self.workload) == (has(self.operation.dump) || has(self.operation.feed))")
        .message("dump and feed need a workload, and nothing else does"))]
pub struct VolumeTaskSpec {
    /// The node whose agent does the work.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The volume, as a pod on that node has it mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<MountedVolume>,
    /// The container in which a stream's command runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<LeasedWorkload>,
    /// The repository and how to open it.
    pub repository: RepositoryAccess,
    /// What is done.
    pub operation: Operation,
    /// The task fails when it has not ended by then.
    pub deadline: Time,
}

/// A volume that a pod has mounted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MountedVolume {
    /// The namespace of pod and claim.
    pub namespace: String,
    /// The claim's name.
    pub claim: String,
    /// The claim's UID.
    pub claim_uid: String,
    /// The persistent volume's name: the last part of the directory below the pod's directory.
    pub volume: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID: kubelet's directory is named by it.
    pub pod_uid: String,
    /// Whether it is a raw block device, which the guardian of the node opens.
    #[serde(default)]
    pub block: bool,
}

/// How an agent opens a repository. Secrets lie in Lifeboat's namespace; the agent reads these two and no others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RepositoryAccess {
    /// The `ClusterRepository`'s name, for messages.
    pub name: String,
    /// The id that the repository must have, in hexadecimal.
    pub id: String,
    /// The store.
    pub backend: Backend,
    /// The Secret with the repository's password.
    pub encryption_secret: SecretRef,
    /// How hard data is compressed.
    #[serde(default)]
    pub compression_level: CompressionLevel,
}

impl RepositoryAccess {
    /// As the repository's specification says.
    pub fn new(name: String, id: String, spec: ClusterRepositorySpec) -> Self {
        let ClusterRepositorySpec { backend, encryption, compression_level, .. } = spec;
        Self { name, id, backend, encryption_secret: encryption.secret_ref, compression_level }
    }
}

/// What a task does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Operation {
    /// Reads the volume into the repository.
    Backup(BackupOperation),
    /// Writes a snapshot into the volume, which must be empty but for `lost+found`.
    Restore(RestoreOperation),
    /// Stores what a command writes to its standard output.
    Dump(DumpOperation),
    /// Gives a stored file to a command as its standard input. It is never begun a second time.
    Feed(FeedOperation),
    /// Deletes what no recovery point of the repository refers to any more.
    Maintain(MaintainOperation),
}

/// Gives space of what expired back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MaintainOperation {
    /// How long to wait for backups that began before, in seconds.
    pub patience_seconds: u64,
}

/// Reads a volume into the repository.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupOperation {
    /// The chain of snapshots that this one continues; the newest committed one of it is the parent.
    pub lineage: String,
    /// Put on the snapshot.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// What a block device shows, and who knows what changed of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Box<ImageSource>>,
}

/// The snapshot on the storage that a block device shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageSource {
    /// The CSI driver.
    pub driver: String,
    /// The driver's name of the volume.
    pub volume_handle: String,
    /// The driver's name of the snapshot.
    pub snapshot_handle: String,
    /// Every so many backups all is read, and compared with what the storage says.
    pub audit_every: u32,
    /// Who lists what is allocated and what changed. Without it everything is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lists: Option<BlockLists>,
    /// Why nobody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_lists: Option<String>,
}

/// A driver's service for lists of blocks, as its `SnapshotMetadataService` names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlockLists {
    /// Host and port.
    pub address: String,
    /// The audience of the token that it takes.
    pub audience: String,
    /// The certificates that its own must come from, as PEM.
    pub ca_certificate: String,
    /// The `VolumeSnapshot` that points to the snapshot, in Lifeboat's namespace.
    pub snapshot: String,
}

/// Writes a snapshot into a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreOperation {
    /// The snapshot's id in the repository.
    pub snapshot: String,
}

/// Stores what a command writes to its standard output as the one file of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DumpOperation {
    /// The chain of snapshots that this one continues.
    pub lineage: String,
    /// Put on the snapshot.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// The file's name in the snapshot.
    pub file: String,
    /// What runs in the container.
    pub command: StreamCommand,
}

/// Gives the file of a snapshot to a command as its standard input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FeedOperation {
    /// The snapshot's id in the repository.
    pub snapshot: String,
    /// The file's name in the snapshot.
    pub file: String,
    /// What runs in the container.
    pub command: StreamCommand,
}

/// A command whose standard output or input is a stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StreamCommand {
    /// Its words.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub words: Vec<String>,
    /// It is ended after this, in milliseconds.
    pub limit_millis: u64,
}

/// How far a task is, and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeTaskStatus {
    /// How far it is; derived from the conditions.
    #[serde(default)]
    pub phase: Phase,
    /// `Succeeded`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The agent pod's UID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The repository session in which it writes, in hexadecimal, so that a successor can abort it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// How often the work was begun.
    #[serde(default)]
    pub attempts: u32,
    /// When the agent began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the agent last said that it works. At least every 10 s while running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_time: Option<Time>,
    /// When the work ended, well or badly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What came of it, when it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TaskResult>,
}

/// How far a task is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Entries (files, directories and others) done.
    pub entries_done: u64,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all; 0 while unknown.
    pub bytes_total: u64,
    /// Bytes per second over the last interval.
    pub bytes_per_second: u64,
}

/// What came of a task that succeeded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskResult {
    /// The snapshot that was committed (backup) or restored; empty after maintenance.
    pub snapshot: String,
    /// The parent that unchanged files were taken from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The figures.
    pub transfer: Transfer,
    /// How a block device was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<BlockRead>,
    /// How many files could not be read or restored in full.
    pub skipped: u64,
    /// The first of these, 20 at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_sample: Vec<SkippedFile>,
    /// What maintenance did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaimed: Option<Reclaimed>,
}

impl VolumeTaskSpec {
    /// The namespace of the application that it works for; none for maintenance.
    pub fn namespace(&self) -> Option<&str> {
        let of_volume = self.volume.as_ref().map(|volume| volume.namespace.as_str());
        of_volume.or_else(|| self.workload.as_ref().map(|workload| workload.namespace.as_str()))
    }
}
