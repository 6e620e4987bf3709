//! What a backup covers and how: the part that `BackupPolicy` and an on-demand `Backup` share.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::DurationString;

/// What a backup covers, how it is made consistent, and where it goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupPlan {
    /// Which objects and claims of the namespace. Default: all.
    #[serde(default)]
    pub scope: Scope,
    /// How claims are read. The first rule that matches decides. Claims that no rule matches are read from a group snapshot
    /// where their driver has them and several claims are covered, else from a snapshot, else `Live`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub volumes: Vec<VolumeRule>,
    /// How the application is brought to rest while its volumes are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesce: Option<Quiesce>,
    /// Commands whose standard output becomes a file in the backup. They run when nothing is frozen any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(validation = Rule::new("self.all(s, self.exists_one(other, other.name == s.name))").message("every stream needs a name of its own"))]
    pub streams: Vec<StreamRule>,
    /// Where the backup goes: one repository, and the primary storage if its snapshots are to be kept.
    #[schemars(length(min = 1, max = 2))]
    #[x_kube(validation = Rule::new("self.exists_one(t, has(t.repository))").message("write exactly one tier with repository"),
        validation = Rule::new("self.filter(t, has(t.snapshot)).size() <= 1").message("write at most one tier with snapshot"))]
    pub tiers: Vec<Tier>,
}

/// Which objects of the namespace belong to a backup.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.includeResources) || !has(self.excludeResources) || !self.excludeResources.exists(e, e in self.includeResources)")
    .message("a resource stands in both includeResources and excludeResources; write it in one of them"))]
pub struct Scope {
    /// Labels that objects and claims must have. Default: everything in the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// Only these resources, as `configmaps` or `deployments.apps`, or single objects, as `configmaps/settings`. Default: every
    /// namespaced resource that the API server offers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 512)))]
    pub include_resources: Option<Vec<String>>,
    /// Not these resources or objects. `persistentvolumeclaims` here leaves out all volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 512)))]
    pub exclude_resources: Option<Vec<String>>,
    /// Objects outside of the namespace that belong to the application. Default: those that the captured objects name, and those
    /// that give rights to the namespace's service accounts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_resources: Option<ClusterScope>,
}

/// Which cluster-scoped objects belong to a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.includeResources) == has(self.readAs)")
    .message("write clusterResources.includeResources and clusterResources.readAs together: the rights of that ServiceAccount decide what is read"))]
#[x_kube(validation = Rule::new("!has(self.selector) || has(self.includeResources)")
    .message("clusterResources.selector selects among clusterResources.includeResources; write both"))]
pub struct ClusterScope {
    /// Whether what the application needs is captured: storage, priority, runtime and ingress classes and cluster roles that its objects
    /// name, definitions of its custom resources, its volumes' objects, role bindings of its service accounts, webhooks and API services
    /// that it answers, and the namespace's own object.
    #[serde(default = "yes")]
    pub related: bool,
    /// These resources or objects too, whether or not the application names them, as `clusterissuers.cert-manager.io`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 512)))]
    pub include_resources: Option<Vec<String>>,
    /// Labels that objects of `includeResources` must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// A `ServiceAccount` of this namespace. `includeResources` are read with its rights, so the installation must allow its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub read_as: Option<String>,
    /// Not these resources or objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 512)))]
    pub exclude_resources: Option<Vec<String>>,
}

impl Default for ClusterScope {
    fn default() -> Self {
        Self { related: true, include_resources: None, selector: None, read_as: None, exclude_resources: None }
    }
}

fn yes() -> bool {
    true
}

/// How some claims are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.method in ['Snapshot', 'Group'] || !(has(self.snapshotClass) || has(self.readyWithin))")
    .message("snapshotClass and readyWithin belong to the methods Snapshot and Group"))]
pub struct VolumeRule {
    /// Which claims. All given fields must match; none given matches every claim.
    #[serde(default, rename = "match")]
    pub matching: VolumeMatch,
    /// How they are read.
    pub method: VolumeMethod,
    /// What happens when the claim's driver has no snapshots of the wanted kind.
    #[serde(default)]
    pub fallback: Fallback,
    /// The `VolumeSnapshotClass` (with `Group` the `VolumeGroupSnapshotClass`). Default: the driver's default class, else its
    /// first by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub snapshot_class: Option<String>,
    /// The longest time until the snapshot can be read, from its turn. Default: `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("!self.matches('^0+(ms|s|m|h|d)$')").message("readyWithin must be longer than zero, such as 30m"))]
    pub ready_within: Option<DurationString>,
    /// Of raw block volumes whose storage lists what changed: at least one in so many backups reads everything and compares it
    /// with the list; 1 is every backup. Default: 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub audit_every: Option<u32>,
}

/// Selects claims.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeMatch {
    /// Labels of the claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// The claim's storage class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class: Option<String>,
    /// Names of claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 253)))]
    pub names: Option<Vec<String>>,
}

/// How a volume is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VolumeMethod {
    /// From a CSI snapshot that is cut between the freeze and the thaw.
    Snapshot,
    /// From a CSI group snapshot: all volumes of it show the same instant, with or without a freeze.
    Group,
    /// Where a running pod has it, its directory or its raw block device, between the freeze and the thaw.
    Live,
    /// Not at all. The claim's object is still captured.
    Skip,
}

impl VolumeMethod {
    /// Whether the volume is read from a snapshot of its storage.
    pub fn is_snapshot(self) -> bool {
        matches!(self, Self::Snapshot | Self::Group)
    }
}

/// What happens when a driver has no snapshots of the wanted kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Fallback {
    /// The backup fails.
    #[default]
    Fail,
    /// The volume is read `Live`, and the backup's status says so.
    Live,
}

/// How an application is brought to rest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Quiesce {
    /// Executed in this order before the volumes are read; thawed in reverse order. After them come the hooks that pods
    /// declare by annotations; without steps, these alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub steps: Vec<QuiesceStep>,
    /// The longest time that the application may stay frozen. After it the application is thawed, whatever is still to be read. Default: `60s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("!self.matches('^0+(ms|s|m|h|d)$')").message("maxFreeze must be longer than zero, such as 30s"))]
    pub max_freeze: Option<DurationString>,
    /// What happens when a step fails or `maxFreeze` is over: `Fail` ends the backup, `Continue` goes on with the lower consistency
    /// that the status then shows.
    #[serde(default)]
    pub on_failure: OnQuiesceFailure,
}

/// One step of bringing an application to rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.template), has(self.exec), has(self.hold), has(self.fsfreeze)].exists_one(it, it)")
    .message("write exactly one of template, exec, hold and fsfreeze in a step"))]
pub struct QuiesceStep {
    /// Labels of the pods that are brought to rest, all of them.
    pub selector: LabelSelector,
    /// The container. Default: the pod's first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub container: Option<String>,
    /// By a `QuiesceTemplate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateUse>,
    /// By a pair of commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecHook>,
    /// By a command that holds the application at rest as long as it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<HoldHook>,
    /// By the kernel of the node: nothing is written to the pod's volumes, whatever the application does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fsfreeze: Option<FsfreezeHook>,
}

/// Names a `QuiesceTemplate` and gives its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateUse {
    /// The template's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Values of its parameters.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
}

/// A command inside a container that holds the application at rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HoldHook {
    /// Prints a line `frozen` as soon as the application is at rest, and lets go at the end of its standard input.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// The longest time until it prints that line. Default: `30s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationString>,
}

/// Freezes file systems of a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FsfreezeHook {
    /// Only these claims. Default: all claims that the pod has mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 253)))]
    pub claims: Option<Vec<String>>,
}

/// Commands that run inside a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.freeze) || has(self.thaw)").message("write exec.freeze, exec.thaw or both"))]
pub struct ExecHook {
    /// Runs before the volumes are read. Exit code 0 means frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub freeze: Option<Vec<String>>,
    /// Runs after the volumes were read, also when something failed in between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub thaw: Option<Vec<String>>,
    /// The longest time that each of the commands may take. Default: `30s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationString>,
}

/// What happens when the application could not be brought to rest, or not for long enough.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnQuiesceFailure {
    /// The backup fails.
    #[default]
    Fail,
    /// The backup goes on, and its status shows the lower consistency.
    Continue,
}

/// A command whose standard output becomes a file in the backup, as a database's dump.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct StreamRule {
    /// The file's name, as `shop.sql`.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([-a-z0-9._]*[a-z0-9])?$"))]
    pub name: String,
    /// Labels of the pod that the command runs in. Of several that are ready, the first by name.
    pub selector: LabelSelector,
    /// The container. Default: the pod's first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub container: Option<String>,
    /// The command. Exit code 0 means that all was written.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    #[x_kube(validation = Rule::new("self.size() == 0 || self[0] != ''").message("the first word of a command is its program"))]
    pub command: Vec<String>,
    /// The longest time that the command may take. Default: `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("!self.matches('^0+(ms|s|m|h|d)$')").message("timeout must be longer than zero, such as 30m"))]
    pub timeout: Option<DurationString>,
    /// What takes the file in when it is restored. Default: nothing; the file can be read with `lifeboat cat`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<StreamRestore>,
}

/// A command that takes a stream's file in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct StreamRestore {
    /// Runs in the restored pod, with the file as its standard input, once the pod is ready. Exit code 0 means that all is there.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    #[x_kube(validation = Rule::new("self.size() == 0 || self[0] != ''").message("the first word of a command is its program"))]
    pub command: Vec<String>,
    /// The longest time that the command may take. Default: `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("!self.matches('^0+(ms|s|m|h|d)$')").message("timeout must be longer than zero, such as 30m"))]
    pub timeout: Option<DurationString>,
}

/// A place where backups are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Tier {
    /// The snapshots on the storage itself: restored within seconds, and lost with the storage or the namespace.
    Snapshot(SnapshotTier),
    /// A deduplicating repository.
    Repository(RepositoryTier),
}

/// Snapshots that stay on the storage after they were read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotTier {
    /// How many are kept.
    pub keep: SnapshotKeep,
}

/// Which snapshots are kept on the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotKeep {
    /// Those of this many backups, the newest of the policy.
    #[schemars(range(min = 1, max = 64))]
    pub last: u32,
}

/// A deduplicating repository as a place for backups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RepositoryTier {
    /// The repository.
    #[serde(rename = "ref")]
    pub reference: RepositoryRef,
    /// Which of the policy's recovery points stay. Default: all. The newest, and the newest in which nothing is missing, always stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<Keep>,
}

/// Which recovery points stay: those that any of the rules holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.last) || has(self.hourly) || has(self.daily) || has(self.weekly) || has(self.monthly) || has(self.yearly) || has(self.within)")
    .message("write at least one of last, hourly, daily, weekly, monthly, yearly and within; leave keep out to keep everything"))]
pub struct Keep {
    /// The newest so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub last: Option<u32>,
    /// The newest of each of the last so many hours that have any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub hourly: Option<u32>,
    /// The same of days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub daily: Option<u32>,
    /// The same of weeks, which begin on Monday.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub weekly: Option<u32>,
    /// The same of months.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub monthly: Option<u32>,
    /// The same of years.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub yearly: Option<u32>,
    /// All that are not older than this, counted from the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<DurationString>,
}

/// Names a `ClusterRepository`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RepositoryRef {
    /// The `ClusterRepository`'s name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

impl BackupPlan {
    /// The repository that the backup goes to.
    pub fn repository(&self) -> Option<&RepositoryRef> {
        self.tiers.iter().find_map(|tier| match tier {
            Tier::Repository(tier) => Some(&tier.reference),
            Tier::Snapshot(_) => None,
        })
    }

    /// Which recovery points stay in the repository; `None`: all.
    pub fn keep(&self) -> Option<&Keep> {
        self.tiers.iter().find_map(|tier| match tier {
            Tier::Repository(tier) => tier.keep.as_ref(),
            Tier::Snapshot(_) => None,
        })
    }

    /// Which snapshots stay on the storage; `None`: they are removed once they were read.
    pub fn kept_snapshots(&self) -> Option<SnapshotKeep> {
        self.tiers.iter().find_map(|tier| match tier {
            Tier::Snapshot(tier) => Some(tier.keep),
            Tier::Repository(_) => None,
        })
    }
}

/// Whether `selector` matches `labels`, by the rules of the Kubernetes API. An operator that is not known matches nothing.
pub fn selector_matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    equal
        && selector.match_expressions.iter().flatten().all(|wanted| {
            let has = labels.get(&wanted.key);
            let among = has.is_some_and(|value| wanted.values.iter().flatten().any(|one| one == value));
            match wanted.operator.as_str() {
                "In" => among,
                "NotIn" => !among,
                "Exists" => has.is_some(),
                "DoesNotExist" => has.is_none(),
                _ => false,
            }
        })
}
