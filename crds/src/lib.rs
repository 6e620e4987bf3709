//! The custom resources of Lifeboat: types, schemas and the closed sets of condition reasons.
//!
//! This crate is the single source of the CRD manifests (`crdgen` prints them). It holds schema and tiny helpers
//! only, and must not depend on the controller, the agent or the repository.

// The schema derive copies each struct into a private function, where `pub` cannot be reached.
#![allow(unreachable_pub)]
// Several printed columns have the same type; the lint takes them for copies.
#![allow(clippy::duplicated_attributes)]

pub mod backup;
pub mod backup_policy;
pub mod cluster_repository;
pub mod conditions;
pub mod duration;
pub mod plan;
pub mod quiesce_lease;
pub mod quiesce_template;
pub mod restore;
pub mod volume_task;

pub use backup::{Backup, BackupSpec, BackupStatus};
pub use backup_policy::{BackupPolicy, BackupPolicySpec, BackupPolicyStatus};
pub use cluster_repository::{ClusterRepository, ClusterRepositorySpec, ClusterRepositoryStatus};
pub use duration::DurationString;
pub use quiesce_lease::{QuiesceLease, QuiesceLeaseSpec, QuiesceLeaseStatus};
pub use quiesce_template::{QuiesceTemplate, QuiesceTemplateSpec};
pub use restore::{Restore, RestoreSpec, RestoreStatus};
pub use volume_task::{VolumeTask, VolumeTaskSpec, VolumeTaskStatus};

/// The API group of all kinds.
pub const GROUP: &str = "lifeboat.dev";

/// The field manager of the controller's server-side apply patches.
pub const CONTROLLER_MANAGER: &str = "lifeboat-controller";

/// The field manager of the agent's server-side apply patches.
pub const AGENT_MANAGER: &str = "lifeboat-agent";

/// Labels and annotations that Lifeboat puts on objects.
pub mod labels {
    /// On a `Backup`: the name of the `BackupPolicy` that it follows.
    pub const POLICY: &str = "lifeboat.dev/policy";
    /// On child objects: the UID of the `Backup` or `Restore` that owns them.
    pub const OWNER_UID: &str = "lifeboat.dev/owner-uid";
    /// On child objects: kind and name of the owner, as `Backup/nightly-1`. An annotation.
    pub const OWNER: &str = "lifeboat.dev/owner";
    /// On a `VolumeTask` and a restore pod: the name of the persistent volume claim (shortened to a label's length).
    pub const CLAIM: &str = "lifeboat.dev/claim";
    /// On a child object: the full name of the claim that it belongs to. An annotation.
    pub const CLAIM_NAME: &str = "lifeboat.dev/claim-name";
    /// What the labels begin with by which a group snapshot selects its claims; the backup's UID follows. They are taken away again.
    pub const GROUP_PREFIX: &str = "lifeboat.dev/group-";
    /// On a snapshot that stays on the storage after its backup ended.
    pub const KEPT: &str = "lifeboat.dev/kept";
    /// On a scheduled `Backup`: the time that it was due, RFC 3339. An annotation.
    pub const SCHEDULED_AT: &str = "lifeboat.dev/scheduled-at";
    /// On restored objects: the id of the recovery point that they came from. An annotation.
    pub const RESTORED_FROM: &str = "lifeboat.dev/restored-from";
    /// On a `Backup` or `Restore` that runs: what it froze is thawed and what it made is removed before it goes. A finalizer.
    pub const FINALIZER: &str = "lifeboat.dev/run";
    /// On a `Backup` whose `deletionPolicy` is `Delete`: its recovery point is forgotten before it goes. A finalizer.
    pub const DATA_FINALIZER: &str = "lifeboat.dev/data";
    /// On a `Backup` whose recovery point retention removes: set before that, so that the object goes whatever dies in between. An annotation.
    pub const EXPIRED: &str = "lifeboat.dev/expired";
    /// The beginning of all annotations by which a pod declares how it is brought to rest.
    pub const QUIESCE: &str = "quiesce.lifeboat.dev/";
    /// `lifeboat`, on every object that Lifeboat makes for itself, which captures therefore leave out.
    pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
}
