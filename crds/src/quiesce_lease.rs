//! `QuiesceLease`: one workload that the guardian of its node holds at rest. Internal; lives in Lifeboat's namespace.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One workload held at rest by the guardian of its node. Made by the controller; not for people to write.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lifeboat.dev",
    version = "v1alpha1",
    kind = "QuiesceLease",
    shortname = "qlease",
    namespaced,
    status = "QuiesceLeaseStatus",
    derive = "PartialEq",
    selectable = ".spec.nodeName",
    doc = "One workload that the guardian of its node holds at rest. Internal to Lifeboat.",
    printcolumn(name = "State", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "End", type_ = "string", json_path = ".status.end"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".spec.workload.namespace"),
    printcolumn(name = "Pod", type_ = "string", json_path = ".spec.workload.pod"),
    printcolumn(name = "Frozen ms", type_ = "integer", json_path = ".status.freezeMillis"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.nodeName == oldSelf.nodeName && self.workload == oldSelf.workload && self.action == oldSelf.action && self.deadline == oldSelf.deadline && self.limitMillis == oldSelf.limitMillis && (self.release || !oldSelf.release)")
    .message("a QuiesceLease can only be released"))]
pub struct QuiesceLeaseSpec {
    /// The node whose guardian holds it.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// What is held.
    pub workload: LeasedWorkload,
    /// How.
    pub action: QuiesceAction,
    /// It is let go by then at the latest.
    pub deadline: Time,
    /// The longest time that it may be held by the node's own clock, which may differ from the controller's.
    pub limit_millis: u64,
    /// The longest time that bringing it to rest may take.
    pub timeout_millis: u64,
    /// Let it go now.
    #[serde(default)]
    pub release: bool,
}

/// A container, or a pod whose volumes are held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeasedWorkload {
    /// The pod's namespace.
    #[schemars(length(max = 253))]
    pub namespace: String,
    /// The pod's name.
    #[schemars(length(max = 253))]
    pub pod: String,
    /// The pod's UID, by which the container runtime and kubelet's folders know it.
    #[schemars(length(max = 64))]
    pub pod_uid: String,
    /// The container. Empty when volumes are held.
    #[serde(default)]
    #[schemars(length(max = 63))]
    pub container: String,
}

/// How a workload is held at rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum QuiesceAction {
    /// By a pair of commands.
    Commands(CommandPair),
    /// By a command that holds as long as it lives.
    Hold(HoldCommand),
    /// By the kernel: nothing is written to the volumes.
    Fsfreeze(FrozenVolumes),
}

/// A command that brings to rest and one that lets go.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CommandPair {
    /// Brings to rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 16384)))]
    pub freeze: Option<Vec<String>>,
    /// Lets go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 16384)))]
    pub thaw: Option<Vec<String>>,
}

/// A command that holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HoldCommand {
    /// Prints a line `frozen` when the application is at rest; lets go at the end of its standard input.
    #[schemars(length(max = 64), inner(length(max = 16384)))]
    pub command: Vec<String>,
}

/// Volumes whose file systems are frozen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FrozenVolumes {
    /// Names of persistent volumes that the pod has mounted.
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 253)))]
    pub volumes: Vec<String>,
}

/// How far a lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LeasePhase {
    /// Being brought to rest.
    Freezing,
    /// At rest.
    Frozen,
    /// Let go, or never brought to rest; `end` says why.
    Thawed,
}

/// Why a workload is not held any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LeaseEnd {
    /// The controller released it: it was at rest all the time until then.
    Released,
    /// Its deadline had come.
    Deadline,
    /// The command that held it ended by itself.
    SessionLost,
    /// Its guardian died; another let go.
    GuardianLost,
    /// It could not be brought to rest.
    Failed,
    /// It was not brought to rest in time.
    TimedOut,
    /// Container or volume are not on this node.
    Gone,
}

/// What thaws when all of Lifeboat has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Watchdog {
    /// A process in the container itself.
    Container,
    /// The second guardian on the node, or the first one after its restart.
    Node,
}

/// How far a lease is, and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuiesceLeaseStatus {
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<LeasePhase>,
    /// Why it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<LeaseEnd>,
    /// What went wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What thaws when all of Lifeboat has died.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// The moment before the first thing that may freeze it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_at: Option<Time>,
    /// How long it was held, from that moment until it was let go, by the node's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_millis: Option<u64>,
}
