//! What a backup does next: a pure function from facts and the time.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use lifeboat_crds::backup::{StreamBackupStatus, VolumeBackupStatus};
use lifeboat_crds::conditions::{self, ConditionType, Reason};
use lifeboat_crds::plan::{OnQuiesceFailure, VolumeMethod};
use lifeboat_crds::{BackupStatus, VolumeTask};

use crate::stream;
use crate::task::{self, Standing};

/// The storage must have made all snapshots within this time.
const CUT_LIMIT: SignedDuration = SignedDuration::from_mins(5);
/// A snapshot whose node or pod is lost is mounted this often in all.
const MOUNTS: u32 = 3;

/// What was seen.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) is_deleted: bool,
    pub(super) has_finalizer: bool,
    /// Whether the recovery point goes with the object.
    pub(super) has_data_finalizer: bool,
    pub(super) status: &'a BackupStatus,
    /// The volume tasks of this backup, by name.
    pub(super) tasks: &'a BTreeMap<String, VolumeTask>,
    pub(super) uid: &'a str,
    /// An application's pod whose volume is still to be read, or in which a stream's command runs, and that is gone.
    pub(super) vanished: Option<String>,
    /// Claims whose snapshot was mounted by a pod that is gone.
    pub(super) lost: Vec<String>,
}

/// What is done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Keep the object until everything is undone.
    Hold,
    Resolve,
    /// Ask for a turn to bring the application to rest, or to read volumes where they are mounted.
    Admit,
    Capture,
    Freeze,
    /// Write down that the freeze failed or was too long.
    NoteFreezeFailure(Reason, String),
    /// Make the snapshots, or look whether the storage has made them.
    Cut,
    Thaw,
    /// Have volumes read that running pods have mounted.
    StartTasks,
    /// Ask for turns, mount snapshots, and have those read that are mounted.
    Expose,
    /// Have the commands of streams run.
    Dump,
    /// Mount the snapshot of this claim anew.
    Renew(String),
    /// Until then at the latest; until something changes when there is no time.
    Wait(Option<Timestamp>),
    Commit,
    Fail(Reason, String),
    /// Remove what was made, and let the object go.
    Clean,
    /// Forget the recovery point in the repository, and let the object go.
    Erase,
    Nothing,
}

impl Step {
    /// The name under which logs and `lifeboat-controller steps` have it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Hold => "Hold",
            Self::Resolve => "Resolve",
            Self::Admit => "Admit",
            Self::Capture => "Capture",
            Self::Freeze => "Freeze",
            Self::NoteFreezeFailure(..) => "NoteFreezeFailure",
            Self::StartTasks => "StartTasks",
            Self::Cut => "Cut",
            Self::Thaw => "Thaw",
            Self::Expose => "Expose",
            Self::Dump => "Dump",
            Self::Renew(_) => "Renew",
            Self::Wait(_) => "Wait",
            Self::Commit => "Commit",
            Self::Fail(..) => "Fail",
            Self::Clean => "Clean",
            Self::Erase => "Erase",
            Self::Nothing => "Nothing",
        }
    }
}

/// The names of all steps, in the order in which a backup takes them; those that follow a failure last.
pub(crate) const STEPS: [&str; 18] = [
    "Hold",
    "Resolve",
    "Admit",
    "Capture",
    "Freeze",
    "StartTasks",
    "Cut",
    "Wait",
    "Thaw",
    "Expose",
    "Dump",
    "Commit",
    "Clean",
    "Nothing",
    "Erase",
    "Fail",
    "NoteFreezeFailure",
    "Renew",
];

fn is_frozen(status: &BackupStatus) -> bool {
    status.quiesce.as_ref().is_some_and(|quiesce| quiesce.workloads.iter().any(|workload| workload.frozen))
}

/// The key of a volume's reading: a snapshot that is mounted anew is read by another task.
pub(crate) fn reading_key(volume: &VolumeBackupStatus) -> String {
    if volume.attempt == 0 { volume.claim_uid.clone() } else { format!("{}#{}", volume.claim_uid, volume.attempt) }
}

/// The name of the task that reads a volume.
pub(super) fn task_name(uid: &str, volume: &VolumeBackupStatus) -> String {
    task::name('b', uid, &reading_key(volume))
}

/// Whether the backup has to have its turn before it goes on: it will bring the application to rest, or read volumes live.
fn needs_turn(status: &BackupStatus) -> bool {
    let rests = status.plan.as_ref().is_some_and(|plan| plan.quiesce.is_some());
    let reads_live = status.volumes.iter().any(|volume| volume.method == VolumeMethod::Live);
    status.admitted_at.is_none() && status.objects.is_none() && (rests || reads_live)
}

fn is_uncut(volume: &VolumeBackupStatus) -> bool {
    volume.method.is_snapshot() && volume.cut.as_ref().is_none_or(|cut| cut.handle.is_none())
}

/// Whether a volume's snapshot exists and nobody was asked to read it yet.
pub(super) fn is_unexposed(uid: &str, volume: &VolumeBackupStatus, tasks: &BTreeMap<String, VolumeTask>) -> bool {
    volume.method.is_snapshot()
        && !is_uncut(volume)
        && volume.snapshot.is_none()
        && !tasks.contains_key(&task_name(uid, volume))
}

/// The name of the task that runs a stream's command.
pub(super) fn stream_task(uid: &str, stream: &StreamBackupStatus) -> String {
    task::name('s', uid, &stream::key(&stream.name))
}

/// Whether a stream is still to have its turn.
pub(super) fn is_undispatched(stream: &StreamBackupStatus) -> bool {
    stream.dispatched_at.is_none() && stream.snapshot.is_none()
}

/// Whether a stream had its turn and nobody was asked to read it yet.
pub(super) fn lacks_task(uid: &str, stream: &StreamBackupStatus, tasks: &BTreeMap<String, VolumeTask>) -> bool {
    stream.dispatched_at.is_some() && stream.snapshot.is_none() && !tasks.contains_key(&stream_task(uid, stream))
}

/// Whether there may be tasks: before one is made, it is written down that its volume or stream has its turn, but for volumes that
/// are read live. While an application is at rest for its snapshots there are none, and nobody need ask.
pub(super) fn may_have_tasks(status: &BackupStatus) -> bool {
    conditions::is_finished(&status.conditions)
        || status.streams.iter().any(|stream| stream.dispatched_at.is_some())
        || status
            .volumes
            .iter()
            .any(|volume| volume.method == VolumeMethod::Live || volume.dispatched_at.is_some() || volume.attempt > 0)
}

/// What is done next.
pub(super) fn next_step(facts: &Facts<'_>, now: Timestamp) -> Step {
    let status = facts.status;
    if facts.is_deleted {
        return match (facts.has_finalizer, is_frozen(status)) {
            (false, _) if facts.has_data_finalizer => Step::Erase,
            (false, _) => Step::Nothing,
            (true, true) => Step::Thaw,
            (true, false) => Step::Clean,
        };
    }
    if conditions::is_finished(&status.conditions) {
        return if facts.has_finalizer || !facts.tasks.is_empty() { Step::Clean } else { Step::Nothing };
    }
    if !facts.has_finalizer {
        return Step::Hold;
    }
    let Some(plan) = &status.plan else { return Step::Resolve };
    if needs_turn(status) {
        // Nothing was done yet: what was to be read may have moved to another pod.
        return if facts.vanished.is_some() { Step::Resolve } else { Step::Admit };
    }
    if let Some((reason, message)) = failure(facts, now) {
        return if is_frozen(status) { Step::Thaw } else { Step::Fail(reason, message) };
    }
    if status.objects.is_none() {
        return Step::Capture;
    }
    let quiesced = conditions::get(&status.conditions, ConditionType::Quiesced);
    if plan.quiesce.is_some() {
        match quiesced.map(|condition| (condition.status.as_str(), condition.reason.as_str())) {
            None => return Step::Freeze,
            // Nothing is frozen before every guardian is ready; the controller died while it waited for one.
            Some(("Unknown", reason)) if reason == Reason::Waiting.as_str() => return Step::Freeze,
            // Freezing happens within one step. To see it going on means that its controller died in it.
            Some(("Unknown", reason)) if reason == Reason::InProgress.as_str() => {
                return Step::NoteFreezeFailure(
                    Reason::HookFailed,
                    "the controller was restarted while it froze the application".into(),
                );
            }
            Some(("False", _)) if is_frozen(status) => return Step::Thaw,
            _ => {}
        }
    }
    after_freeze(facts, now)
}

/// What is done once the application is at rest, or runs on as the plan allows.
fn after_freeze(facts: &Facts<'_>, now: Timestamp) -> Step {
    let status = facts.status;
    let live = || status.volumes.iter().filter(|volume| volume.method == VolumeMethod::Live);
    let is_cut = !status.volumes.iter().any(is_uncut);
    let frozen = is_frozen(status);
    let deadline = status.quiesce.as_ref().and_then(|quiesce| quiesce.deadline.as_ref()).map(|deadline| deadline.0);
    let deadline = deadline.filter(|_| frozen);
    let needs_rest = !is_cut || live().any(|volume| volume.snapshot.is_none());
    if needs_rest && deadline.is_some_and(|deadline| deadline <= now) {
        return Step::NoteFreezeFailure(
            Reason::FreezeDeadline,
            "maxFreeze was over before every snapshot was made and every Live volume read; allow more, or exclude large volumes from the frozen part"
                .into(),
        );
    }
    // A volume whose snapshot is known needs no task any more.
    let has_task = |volume: &VolumeBackupStatus| facts.tasks.contains_key(&task_name(facts.uid, volume));
    if live().any(|volume| volume.snapshot.is_none() && !has_task(volume)) {
        return Step::StartTasks;
    }
    if !is_cut {
        return Step::Cut;
    }
    if needs_rest {
        return Step::Wait(deadline);
    }
    if frozen {
        return Step::Thaw;
    }
    read_snapshots(facts)
}

/// The application runs; what is left is to read the snapshots and the streams.
fn read_snapshots(facts: &Facts<'_>) -> Step {
    let snapshots = || facts.status.volumes.iter().filter(|volume| volume.method.is_snapshot());
    if let Some(volume) = snapshots().find(|volume| is_lost(facts, volume)) {
        return Step::Renew(volume.claim.clone());
    }
    let streams = &facts.status.streams;
    if streams.iter().any(|stream| lacks_task(facts.uid, stream, facts.tasks)) {
        return Step::Dump;
    }
    if snapshots().any(|volume| is_unexposed(facts.uid, volume, facts.tasks)) || streams.iter().any(is_undispatched) {
        return Step::Expose;
    }
    let all_read =
        snapshots().all(|volume| volume.snapshot.is_some()) && streams.iter().all(|stream| stream.snapshot.is_some());
    if all_read { Step::Commit } else { Step::Wait(None) }
}

/// Whether the mount of a snapshot went away before it was read.
fn is_lost(facts: &Facts<'_>, volume: &VolumeBackupStatus) -> bool {
    let task = facts.tasks.get(&task_name(facts.uid, volume));
    let says_gone = task.and_then(|task| task.status.as_ref()).is_some_and(|status| {
        conditions::get(&status.conditions, ConditionType::Succeeded)
            .is_some_and(|condition| condition.status == "False" && condition.reason == Reason::PodVanished.as_str())
    });
    volume.method.is_snapshot() && volume.snapshot.is_none() && (says_gone || facts.lost.contains(&volume.claim))
}

/// Why the backup cannot end well, if it cannot.
fn failure(facts: &Facts<'_>, now: Timestamp) -> Option<(Reason, String)> {
    let status = facts.status;
    let on_failure = status.plan.as_ref().and_then(|plan| plan.quiesce.as_ref()).map(|quiesce| quiesce.on_failure);
    if on_failure == Some(OnQuiesceFailure::Fail)
        && let Some(condition) = conditions::get(&status.conditions, ConditionType::Quiesced)
        && condition.status == "False"
    {
        return Some((Reason::from_text(&condition.reason), condition.message.clone()));
    }
    if let Some(refused) = conditions::get(&status.conditions, ConditionType::Cut).filter(|cut| cut.status == "False") {
        return Some((Reason::from_text(&refused.reason), refused.message.clone()));
    }
    if let Some(failure) = status.volumes.iter().find_map(|volume| volume_failure(facts, volume, now)) {
        return Some(failure);
    }
    if let Some(failure) = status.streams.iter().find_map(|stream| stream_failure(facts, stream, now)) {
        return Some(failure);
    }
    let pod = facts.vanished.as_ref()?;
    Some((
        Reason::PodVanished,
        format!(
            "the pod {pod} ended while its volume or a stream of it was to be read; the next backup reads its successor"
        ),
    ))
}

/// Why a stream was not read, if it was not. Nothing of its output is kept then.
fn stream_failure(facts: &Facts<'_>, stream: &StreamBackupStatus, now: Timestamp) -> Option<(Reason, String)> {
    let task = facts.tasks.get(&stream_task(facts.uid, stream))?;
    let Standing::Failed(reason, message) = task::standing(task, now) else { return None };
    Some((Reason::from_text(&reason), format!("the stream {} was not stored: {message}", stream.name)))
}

/// Why a volume cannot be read, if it cannot.
fn volume_failure(facts: &Facts<'_>, volume: &VolumeBackupStatus, now: Timestamp) -> Option<(Reason, String)> {
    let claim = &volume.claim;
    if let Some(task) = facts.tasks.get(&task_name(facts.uid, volume)) {
        let is_last = !is_lost(facts, volume) || volume.attempt + 1 >= MOUNTS;
        if let Standing::Failed(reason, message) = task::standing(task, now)
            && is_last
        {
            return Some((
                Reason::from_text(&reason),
                format!("the volume of the claim {claim} was not read: {message}"),
            ));
        }
    }
    if is_lost(facts, volume) && volume.attempt + 1 >= MOUNTS {
        let message = format!(
            "the pod that had the snapshot of the claim {claim} mounted was lost {MOUNTS} times; look at the nodes, then start another backup"
        );
        return Some((Reason::PodVanished, message));
    }
    let since = facts.status.cut_started_at.as_ref().map(|since| now.duration_since(since.0))?;
    let why = volume.message.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    if is_uncut(volume) && since > CUT_LIMIT {
        let message = format!(
            "the storage did not make the snapshot of the claim {claim} within {CUT_LIMIT:#}{why}; look at the driver's and the snapshot controller's logs, or use the method Live"
        );
        return Some((Reason::SnapshotFailed, message));
    }
    let within = volume
        .cut
        .as_ref()
        .map(|cut| SignedDuration::from_secs(cut.ready_within_seconds.try_into().unwrap_or(i64::MAX)))?;
    let since = volume.dispatched_at.as_ref().map(|since| now.duration_since(since.0))?;
    if is_unexposed(facts.uid, volume, facts.tasks) && since > within {
        let message = format!(
            "the snapshot of the claim {claim} could not be mounted within {within:#}{why}; allow more with readyWithin, or look at the driver's logs"
        );
        return Some((Reason::SnapshotNotReady, message));
    }
    None
}

#[cfg(test)]
mod tests;
