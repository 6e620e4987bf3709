//! `BackupPolicy`: what is backed up in a namespace, how and when.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{DurationString, plan::BackupPlan};

/// What is backed up in this namespace, how and when.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lifeboat.dev",
    version = "v1alpha1",
    kind = "BackupPolicy",
    plural = "backuppolicies",
    shortname = "bpol",
    category = "lifeboat",
    namespaced,
    status = "BackupPolicyStatus",
    derive = "PartialEq",
    doc = "What is backed up in a namespace, how and when.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Schedule", type_ = "string", json_path = ".spec.schedule.cron"),
    printcolumn(name = "Last Success", type_ = "date", json_path = ".status.lastSuccessTime"),
    printcolumn(name = "Next", type_ = "string", json_path = ".status.nextRunTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        priority = "1",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct BackupPolicySpec {
    /// No scheduled runs while true. Backups on demand go on.
    #[serde(default)]
    pub suspend: bool,
    /// When backups run. Without it only on demand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// What is backed up, how and to where.
    #[serde(flatten)]
    pub plan: BackupPlan,
}

/// When backups run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Schedule {
    /// Five fields: minute, hour, day of month, month, day of week; or `@hourly`, `@daily`, `@weekly`, `@monthly`.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new("self.matches('^(@(hourly|daily|weekly|monthly|yearly)|[^ ]+( +[^ ]+){4})$')")
        .message("cron must have five fields, such as '0 3 * * *', or be @hourly, @daily, @weekly, @monthly or @yearly"))]
    pub cron: String,
    /// A name of the IANA time zone database, such as `Europe/Berlin`. Default: `UTC`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub time_zone: Option<String>,
    /// Runs are spread over this time after the due time, each policy always by the same part of it. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<DurationString>,
    /// A run that could not start within this time after it was due is left out. Default: `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starting_deadline: Option<DurationString>,
    /// What happens when a run is due while the one before it still runs.
    #[serde(default)]
    pub concurrency: Concurrency,
}

/// What happens when a run is due while the one before it still runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Concurrency {
    /// The new run is left out.
    #[default]
    Forbid,
    /// The old run is cancelled.
    Replace,
}

/// What became of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupPolicyStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `MaintenanceHealthy`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The due time of the newest scheduled run that was created or left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_schedule_time: Option<Time>,
    /// When the newest backup that succeeded was completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_success_time: Option<Time>,
    /// The newest backup that succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_successful_backup: Option<String>,
    /// When the next run starts, jitter included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_run_time: Option<Time>,
    /// What retention did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionStatus>,
}

/// What retention did last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetentionStatus {
    /// When.
    pub time: Time,
    /// The backup after which it ran.
    pub after_backup: String,
    /// The generation of the policy by which it decided.
    pub generation: i64,
    /// Recovery points of the policy that stay.
    pub kept: u64,
    /// Recovery points that were removed. Maintenance of the repository gives their space back.
    pub removed: u64,
}
