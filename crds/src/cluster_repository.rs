//! `ClusterRepository`: a backup repository that the namespaces of a cluster share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::DurationString;

/// Where a repository lies, how it is encrypted and which namespaces may use it.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lifeboat.dev",
    version = "v1alpha1",
    kind = "ClusterRepository",
    plural = "clusterrepositories",
    shortname = "crepo",
    category = "lifeboat",
    status = "ClusterRepositoryStatus",
    derive = "PartialEq",
    doc = "A backup repository that the namespaces of a cluster share.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Recovery Points", type_ = "integer", json_path = ".status.recoveryPoints"),
    printcolumn(name = "Maintained", type_ = "date", json_path = ".status.maintenance.lastSuccessTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        priority = "1",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRepositorySpec {
    /// The store that holds the repository: exactly one of `s3` and `filesystem`.
    #[x_kube(
        validation = Rule::new("has(self.s3) != has(self.filesystem)").message("write exactly one of backend.s3 and backend.filesystem"),
        validation = Rule::new("self == oldSelf").message("backend cannot be changed, because backups would seem to be lost; create another ClusterRepository")
    )]
    pub backend: Backend,
    /// The key that opens the repository.
    pub encryption: Encryption,
    /// Which namespaces may back up to this repository and restore their own backups from it. Default: none.
    #[serde(default)]
    pub allowed_namespaces: AllowedNamespaces,
    /// `ReadOnly` allows restores only.
    #[serde(default)]
    pub mode: Mode,
    /// How hard data is compressed: from 1 (fast) to 19 (small, slow), or 0: not at all. It is for new data; what is stored
    /// stays as it is. Default: 1.
    #[serde(default)]
    pub compression_level: CompressionLevel,
    /// How much goes on at once.
    #[serde(default)]
    pub limits: Limits,
    /// When space of what expired is given back.
    #[serde(default)]
    pub maintenance: Maintenance,
}

/// A level of zstd from 1 to 19; 0: none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct CompressionLevel(#[schemars(range(min = 0, max = 19))] pub u8);

impl Default for CompressionLevel {
    fn default() -> Self {
        Self(1)
    }
}

/// How many volumes are read into a repository at once. Restores count among themselves and are never held up by backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// In all. Default: 32.
    #[serde(default = "default_volumes")]
    #[schemars(range(min = 1, max = 4096))]
    pub volumes: u32,
    /// Of one namespace. Default: 8.
    #[serde(default = "default_volumes_per_namespace")]
    #[schemars(range(min = 1, max = 4096))]
    pub volumes_per_namespace: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { volumes: default_volumes(), volumes_per_namespace: default_volumes_per_namespace() }
    }
}

fn default_volumes() -> u32 {
    32
}

fn default_volumes_per_namespace() -> u32 {
    8
}

/// When an agent looks for what no recovery point refers to any more, and deletes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Maintenance {
    /// No maintenance while true: nothing is deleted, and the repository grows.
    #[serde(default)]
    pub suspend: bool,
    /// Five fields: minute, hour, day of month, month, day of week; or `@hourly`, `@daily`, `@weekly`, `@monthly`. Default: `@daily`.
    #[serde(default = "default_maintenance_cron")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new("self.matches('^(@(hourly|daily|weekly|monthly|yearly)|[^ ]+( +[^ ]+){4})$')")
        .message("cron must have five fields, such as '0 3 * * *', or be @hourly, @daily, @weekly, @monthly or @yearly"))]
    pub cron: String,
    /// A name of the IANA time zone database, such as `Europe/Berlin`. Default: `UTC`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub time_zone: Option<String>,
    /// Runs of several repositories are spread over this time after the due time. Default: `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<DurationString>,
}

impl Default for Maintenance {
    fn default() -> Self {
        Self { suspend: false, cron: default_maintenance_cron(), time_zone: None, jitter: None }
    }
}

fn default_maintenance_cron() -> String {
    "@daily".to_owned()
}

/// The store that holds a repository. Exactly one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Backend {
    /// A bucket of an S3 service.
    S3(S3Backend),
    /// A folder. It must be the same shared file system on every node; the chart's `filesystemRepositories` mounts it.
    Filesystem(FilesystemBackend),
}

/// A bucket of an S3 service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct S3Backend {
    /// The bucket's name. It must exist.
    #[schemars(length(min = 3, max = 63), regex(pattern = "^[a-z0-9][a-z0-9.-]*[a-z0-9]$"))]
    pub bucket: String,
    /// What all object keys begin with, without a slash at either end. Several repositories can share a bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = "^[^/].*[^/]$|^[^/]$"))]
    pub prefix: Option<String>,
    /// The service's URL, such as `https://minio.example.com:9000`. Default: AWS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new("self.startsWith('https://') || self.startsWith('http://')")
        .message("endpoint must begin with https:// or http://"))]
    pub endpoint: Option<String>,
    /// The region. Default: `us-east-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub region: Option<String>,
    /// Where the access key comes from.
    pub credentials: Credentials,
}

/// Where the access key of a store comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Credentials {
    /// A Secret in Lifeboat's namespace with the keys `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
    pub secret_ref: SecretRef,
}

/// A folder on a file system that all nodes share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct FilesystemBackend {
    /// The folder's absolute path inside Lifeboat's pods.
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new("self.startsWith('/') && !self.contains('/../') && !self.endsWith('/..')")
        .message("path must be absolute and must not contain .."))]
    pub path: String,
}

/// How a repository is encrypted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Encryption {
    /// A Secret in Lifeboat's namespace with the key `password`. Keep a copy elsewhere: without it no backup can be read.
    pub secret_ref: SecretRef,
}

/// A Secret in the namespace that Lifeboat is installed in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Which namespaces may use a repository.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(self.from == 'Selector') == has(self.selector)")
    .message("write allowedNamespaces.selector if and only if allowedNamespaces.from is Selector"))]
pub struct AllowedNamespaces {
    /// `All`, those that `Selector` matches by their labels, or `None`.
    #[serde(default)]
    pub from: NamespacesFrom,
    /// Matches labels of namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}

/// How the namespaces that may use a repository are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NamespacesFrom {
    /// Every namespace.
    All,
    /// Namespaces whose labels match the selector.
    Selector,
    /// No namespace.
    #[default]
    None,
}

/// Whether a repository accepts new backups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Backups and restores.
    #[default]
    ReadWrite,
    /// Restores only.
    ReadOnly,
}

/// What was seen of a repository.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRepositoryStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `Reachable`, `MaintenanceHealthy`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The repository's id, from its `config` object, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The version of the repository's format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<u32>,
    /// How many recovery points the repository holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_points: Option<u64>,
    /// When the store was last spoken to with success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_contact: Option<Time>,
    /// What came of maintenance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maintenance: Option<MaintenanceStatus>,
}

/// What came of the maintenance of a repository.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MaintenanceStatus {
    /// The due time of the newest run that was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_schedule_time: Option<Time>,
    /// When the next run starts, jitter included. Written as null when there is none, so that a patch removes it.
    #[serde(default)]
    pub next_run_time: Option<Time>,
    /// The `VolumeTask` of the run that is under way. Written as null when there is none, so that a patch removes it.
    #[serde(default)]
    pub task: Option<String>,
    /// When the newest run ended, well or badly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_completion_time: Option<Time>,
    /// When the newest run that went well ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_success_time: Option<Time>,
    /// What the newest run that went well did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_result: Option<Reclaimed>,
}

/// What a run of maintenance did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reclaimed {
    /// Expired snapshots (of volumes, objects and recovery points) of which every trace was removed.
    pub snapshots: u64,
    /// Bytes that were deleted in the store.
    pub deleted_bytes: u64,
    /// Bytes that were copied, so that mostly dead objects could be deleted.
    pub copied_bytes: u64,
    /// Sessions without a sign of life that were aborted.
    pub aborted: u64,
    /// Backups that began before and still run: what is left is deleted when they are done, by a run soon after this one.
    pub waiting_for: u64,
}
