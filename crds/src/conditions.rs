//! Every condition type and every reason that Lifeboat writes, as closed enums.
//!
//! Conditions are the contract with users and tools: a reason is never renamed once released. The texts are the
//! variants' names.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde::{Deserialize, Serialize};

macro_rules! names {
    ($(#[$doc:meta])* $enum:ident { $($(#[$vdoc:meta])* $variant:ident,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $enum { $($(#[$vdoc])* $variant,)+ }

        impl $enum {
            /// All variants, in the order in which they are documented.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The text as it stands in a condition.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)+ }
            }
        }

        impl std::fmt::Display for $enum {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

names! {
    /// Types of conditions.
    ConditionType {
        /// `ClusterRepository`, `BackupPolicy`: usable as it stands.
        Ready,
        /// `ClusterRepository`: the store answers with these credentials.
        Reachable,
        /// `Backup`: what is to be backed up is resolved and pinned in the status.
        Resolved,
        /// `Backup`, `Restore`: `True` while it waits for its turn; reason and message say what for.
        Waiting,
        /// `Backup`: the application was quiesced and has been thawed again. `False` with a reason when a step failed.
        Quiesced,
        /// `Backup`: every snapshot is made on the storage. From then on the application need not rest any more.
        Cut,
        /// `Backup`: the objects are captured, and every volume and stream has been read.
        Captured,
        /// `Backup`: `False` when a storage's list of blocks was found wrong; the volume was then read in full.
        BlockLists,
        /// `Restore`: source found and everything to be restored is listed.
        Planned,
        /// `Restore`: every volume has its data.
        DataReady,
        /// `Restore`: every stream was given to its command. `False` when some were not, which the message names.
        StreamsRestored,
        /// `ClusterRepository`: the last maintenance ended well. `BackupPolicy`: the last run of its retention did.
        MaintenanceHealthy,
        /// `Backup`, `Restore`, `VolumeTask`: ended well (`True`), ended badly (`False`), still going on (`Unknown`).
        Succeeded,
    }
}

names! {
    /// Reasons of conditions and events, for all kinds.
    Reason {
        // Good or going on
        /// In use; nothing to do.
        Available,
        /// The step is done.
        Done,
        /// The step is going on.
        InProgress,
        /// Waiting for something else, named in the message.
        Waiting,
        /// The node, or every node that would do, has as many volumes under way as it may.
        NodeBusy,
        /// The repository has as many volumes under way as it may.
        RepositoryBusy,
        /// The namespace has as many volumes under way as it may.
        NamespaceBusy,
        /// As many applications are at rest as may be at once.
        QuiesceBusy,
        /// Recovery points were removed by retention. An event.
        Expired,
        /// Ended with everything that was asked for.
        Completed,
        /// Ended, but the files named in the message and in the status could not be read.
        UnreadFiles,
        /// Ended, but the items named in the message and in the status could not be restored or were left as they were.
        CompletedWithProblems,
        /// The policy is suspended by its spec.
        Suspended,
        /// A scheduled run was created. An event.
        RunCreated,
        /// A scheduled run was left out because the one before it still runs. An event.
        RunSkipped,
        /// A run that was due while the controller was away is too late to be made up for. An event.
        RunMissed,

        // The repository
        /// No `ClusterRepository` of that name.
        RepositoryNotFound,
        /// The `ClusterRepository` exists but is not ready.
        RepositoryNotReady,
        /// The repository's `allowedNamespaces` does not cover this namespace.
        NamespaceNotAllowed,
        /// A referenced Secret is missing.
        SecretNotFound,
        /// A referenced Secret lacks a key, or the key's value is unusable.
        SecretInvalid,
        /// The password or key does not open the repository.
        WrongKey,
        /// The store refused the credentials.
        AccessDenied,
        /// The bucket or the folder does not exist.
        BucketNotFound,
        /// The store cannot be reached.
        Unreachable,
        /// The store lacks something that Lifeboat's safety rests on (put-if-absent).
        StoreUnsuitable,
        /// The store or its disk is full.
        StoreFull,
        /// The data at the location is no repository, or one of a newer format.
        FormatUnsupported,
        /// The repository is damaged; the message says where.
        RepositoryDamaged,
        /// The repository is in mode `ReadOnly`.
        RepositoryReadOnly,

        // Policies
        /// The cron expression is wrong.
        InvalidSchedule,
        /// The time zone is not in the IANA database.
        InvalidTimeZone,
        /// A field of the spec is wrong in a way that the schema cannot say.
        InvalidSpec,

        // Backups
        /// No `BackupPolicy` of that name.
        PolicyNotFound,
        /// Neither a volume nor an object is selected.
        NothingSelected,
        /// No running pod uses the selected claim, so there is nothing that the live method can read.
        NoPodForVolume,
        /// The claim or its volume cannot be backed up by the chosen method, or its block device cannot be opened.
        VolumeUnsupported,
        /// The claim is not bound, is being deleted or is gone.
        VolumeUnavailable,
        /// The driver of the volume has no snapshots of the wanted kind, or there is no class for them.
        NoSnapshotClass,
        /// The storage did not make a snapshot.
        SnapshotFailed,
        /// The snapshot was made, but could not be mounted and read in time.
        SnapshotNotReady,
        /// The storage's list of allocated or changed blocks leaves out some.
        WrongBlockList,
        /// A quiesce step failed.
        HookFailed,
        /// A quiesce step did not end by its deadline.
        HookTimedOut,
        /// There is no `QuiesceTemplate` of that name.
        TemplateNotFound,
        /// The template and the given parameters do not go together, or hooks declared on a pod cannot be understood.
        HookInvalid,
        /// The application did not stay at rest until everything was read.
        FreezeBroken,
        /// The application was thawed before everything was read, because `maxFreeze` was over.
        FreezeDeadline,
        /// Objects could not be captured.
        CaptureFailed,
        /// The pod went away while its volume was being read or written, or a stream's command ran in it.
        PodVanished,
        /// No pod that a stream's selector matches is ready, or it has no such container.
        NoPodForStream,
        /// A stream's command failed or could not be run; nothing of its output is kept.
        StreamFailed,
        /// No agent runs on the node that the volume is mounted on.
        NoAgent,
        /// An agent stopped reporting; the task is given to the next.
        AgentLost,
        /// The task did not end by its deadline.
        TimedOut,
        /// The volume could not be read.
        ReadFailed,
        /// The volume could not be written.
        WriteFailed,
        /// The object was being deleted.
        Cancelled,

        // Restores
        /// No such recovery point in the repository for this namespace.
        RecoveryPointNotFound,
        /// The `Backup` named as the source does not exist or has no recovery point.
        SourceUnusable,
        /// A claim of that name exists, and existing volumes are never overwritten.
        VolumeExists,
        /// Objects of that name exist and the spec says `Fail`.
        ObjectExists,
        /// The installation does not let Lifeboat act as the named `ServiceAccount`, so nothing cluster-scoped is read or created for it.
        ClusterResourcesNotAllowed,
        /// Objects could not be applied.
        ApplyFailed,
        /// Streams have no restore command, or the spec says `Ignore`: their files are in the repository only.
        StreamsNotRestored,

        /// An error that Lifeboat did not foresee; the message has the chain of causes.
        InternalError,
    }
}

impl Reason {
    /// The reason of a text that a condition holds; [`Reason::InternalError`] for one that this version does not know.
    pub fn from_text(text: &str) -> Self {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == text).unwrap_or(Self::InternalError)
    }
}

/// The three states of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// `True`
    True,
    /// `False`
    False,
    /// `Unknown`
    Unknown,
}

impl State {
    /// The text as it stands in a condition.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Sets a condition in `conditions`, keeping `lastTransitionTime` when the state stays the same.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: ConditionType,
    state: State,
    reason: Reason,
    message: impl Into<String>,
    observed_generation: Option<i64>,
    now: jiff::Timestamp,
) {
    let previous = conditions.iter().position(|c| c.type_ == type_.as_str());
    let since = match previous.map(|at| &conditions[at]) {
        Some(old) if old.status == state.as_str() => old.last_transition_time.clone(),
        _ => Time(now),
    };
    let condition = Condition {
        type_: type_.as_str().to_owned(),
        status: state.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        message: message.into(),
        observed_generation,
        last_transition_time: since,
    };
    match previous {
        Some(at) => conditions[at] = condition,
        None => conditions.push(condition),
    }
}

/// The condition of that type, if it was ever set.
pub fn get(conditions: &[Condition], type_: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|c| c.type_ == type_.as_str())
}

/// Whether the condition of that type is `True`.
pub fn is_true(conditions: &[Condition], type_: ConditionType) -> bool {
    get(conditions, type_).is_some_and(|c| c.status == State::True.as_str())
}

/// Whether a run-once object has ended: its `Succeeded` condition is `True` or `False`.
pub fn is_finished(conditions: &[Condition]) -> bool {
    get(conditions, ConditionType::Succeeded).is_some_and(|c| c.status != State::Unknown.as_str())
}
