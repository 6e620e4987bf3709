//! What a backup does next: a pure function from facts and the time.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use lifeboat_crds::backup::VolumeBackupStatus;
use lifeboat_crds::conditions::{self, ConditionType, Reason};
use lifeboat_crds::plan::{OnQuiesceFailure, VolumeMethod};
use lifeboat_crds::{BackupStatus, VolumeTask};

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
    pub(super) status: &'a BackupStatus,
    /// The volume tasks of this backup, by name.
    pub(super) tasks: &'a BTreeMap<String, VolumeTask>,
    pub(super) uid: &'a str,
    /// An application's pod whose volume is still to be read and that is gone.
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
    /// Mount snapshots, and have those read that are mounted.
    Expose,
    /// Mount the snapshot of this claim anew.
    Renew(String),
    /// Until then at the latest; until something changes when there is no time.
    Wait(Option<Timestamp>),
    Commit,
    Fail(Reason, String),
    /// Remove what was made, and let the object go.
    Clean,
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
            Self::Renew(_) => "Renew",
            Self::Wait(_) => "Wait",
            Self::Commit => "Commit",
            Self::Fail(..) => "Fail",
            Self::Clean => "Clean",
            Self::Nothing => "Nothing",
        }
    }
}

/// The names of all steps, in the order in which a backup takes them; those that follow a failure last.
pub(crate) const STEPS: [&str; 16] = [
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
    "Commit",
    "Clean",
    "Nothing",
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

/// What is done next.
pub(super) fn next_step(facts: &Facts<'_>, now: Timestamp) -> Step {
    let status = facts.status;
    if facts.is_deleted {
        return match (facts.has_finalizer, is_frozen(status)) {
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

/// The application runs; what is left is to read the snapshots.
fn read_snapshots(facts: &Facts<'_>) -> Step {
    let snapshots = || facts.status.volumes.iter().filter(|volume| volume.method.is_snapshot());
    if let Some(volume) = snapshots().find(|volume| is_lost(facts, volume)) {
        return Step::Renew(volume.claim.clone());
    }
    if snapshots().any(|volume| is_unexposed(facts.uid, volume, facts.tasks)) {
        return Step::Expose;
    }
    let all_read = snapshots().all(|volume| volume.snapshot.is_some());
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
    let pod = facts.vanished.as_ref()?;
    Some((
        Reason::PodVanished,
        format!("the pod {pod} ended while its volume was to be read; the next backup reads its successor"),
    ))
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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const UID: &str = "11111111-2222-3333-4444-555555555555";

    struct World {
        status: BackupStatus,
        tasks: BTreeMap<String, VolumeTask>,
        is_deleted: bool,
        has_finalizer: bool,
        vanished: Option<String>,
        lost: Vec<String>,
    }

    impl World {
        fn new(status: Value) -> Self {
            Self {
                status: serde_json::from_value(status).unwrap(),
                tasks: BTreeMap::new(),
                is_deleted: false,
                has_finalizer: true,
                vanished: None,
                lost: Vec::new(),
            }
        }

        fn with_task(mut self, condition: Option<(&str, &str)>) -> Self {
            let name = task::name('b', UID, "claim-uid");
            let conditions: Vec<_> = condition
                .map(|(status, reason)| json!({"type": "Succeeded", "status": status, "reason": reason, "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}))
                .into_iter()
                .collect();
            let task = json!({
                "apiVersion": "lifeboat.dev/v1alpha1", "kind": "VolumeTask",
                "metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {
                    "nodeName": "n", "deadline": "2026-01-01T04:00:00Z",
                    "volume": {"namespace": "ns", "claim": "data", "claimUid": "claim-uid", "volume": "pv", "pod": "p", "podUid": "u"},
                    "repository": {"name": "r", "id": "ab", "backend": {"filesystem": {"path": "/x"}}, "encryptionSecret": {"name": "s"}},
                    "operation": {"backup": {"lineage": "l"}}
                },
                "status": {"conditions": conditions}
            });
            self.tasks.insert(name, serde_json::from_value(task).unwrap());
            self
        }

        fn step(&self, now: &str) -> Step {
            let facts = Facts {
                is_deleted: self.is_deleted,
                has_finalizer: self.has_finalizer,
                status: &self.status,
                tasks: &self.tasks,
                uid: UID,
                vanished: self.vanished.clone(),
                lost: self.lost.clone(),
            };
            next_step(&facts, now.parse().unwrap())
        }
    }

    const NOW: &str = "2026-01-01T00:00:10Z";

    fn status(on_failure: &str, quiesced: Option<(&str, &str)>, frozen: bool, read: bool) -> Value {
        let conditions: Vec<_> = quiesced
            .map(|(status, reason)| json!({"type": "Quiesced", "status": status, "reason": reason, "message": "why", "lastTransitionTime": "2026-01-01T00:00:00Z"}))
            .into_iter()
            .collect();
        let step = json!({"selector": {}, "exec": {"freeze": ["f"]}});
        json!({
            "plan": {"quiesce": {"steps": [step], "onFailure": on_failure}, "tiers": [{"repository": {"ref": {"name": "r"}}}]},
            "objects": {"count": 1},
            "conditions": conditions,
            "quiesce": {"deadline": "2026-01-01T00:01:00Z", "workloads": [{"step": 0, "pod": "p", "podUid": "u", "container": "c", "frozen": frozen}]},
            "volumes": [{"claim": "data", "claimUid": "claim-uid", "method": "Live", "snapshot": read.then_some("ab")}]
        })
    }

    #[test]
    fn a_backup_goes_from_step_to_step() {
        let mut world = World::new(json!({}));
        world.has_finalizer = false;
        assert_eq!(world.step(NOW), Step::Hold);
        assert_eq!(World::new(json!({})).step(NOW), Step::Resolve);
        let mut captured = status("Fail", None, false, false);
        captured["objects"] = Value::Null;
        assert_eq!(World::new(captured.clone()).step(NOW), Step::Admit);
        captured["admittedAt"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(World::new(captured).step(NOW), Step::Capture);
        assert_eq!(World::new(status("Fail", None, false, false)).step(NOW), Step::Freeze);
        assert_eq!(World::new(status("Fail", Some(("Unknown", "Done")), true, false)).step(NOW), Step::StartTasks);
        let reading = World::new(status("Fail", Some(("Unknown", "Done")), true, false)).with_task(None);
        assert_eq!(reading.step(NOW), Step::Wait(Some("2026-01-01T00:01:00Z".parse().unwrap())));
        assert_eq!(World::new(status("Fail", Some(("Unknown", "Done")), true, true)).step(NOW), Step::Thaw);
        assert_eq!(World::new(status("Fail", Some(("True", "Done")), false, true)).step(NOW), Step::Commit);
    }

    #[test]
    fn who_rests_or_reads_live_waits_for_a_turn_before_anything_is_done_and_never_later() {
        let waiting = |change: &dyn Fn(&mut Value)| {
            let mut all = status("Fail", None, false, false);
            all["objects"] = Value::Null;
            change(&mut all);
            World::new(all)
        };
        assert_eq!(waiting(&|_| {}).step(NOW), Step::Admit);
        assert_eq!(
            waiting(&|all| all["plan"]["quiesce"] = Value::Null).step(NOW),
            Step::Admit,
            "a volume is read live"
        );
        let only_cut = |all: &mut Value| {
            *all = snapshot(None, false, None, false);
            all["objects"] = Value::Null;
            all["plan"]["quiesce"] = Value::Null;
        };
        assert_eq!(waiting(&only_cut).step(NOW), Step::Capture);
        let mut moved = waiting(&|_| {});
        moved.vanished = Some("p".into());
        assert_eq!(moved.step(NOW), Step::Resolve, "its successor is found");
        let mut deleted = waiting(&|_| {});
        deleted.is_deleted = true;
        assert_eq!(deleted.step(NOW), Step::Clean);
        let begun = World::new(status("Fail", Some(("Unknown", "Done")), true, false));
        assert_eq!(begun.step(NOW), Step::StartTasks, "what an older version began goes on");
    }

    #[test]
    fn a_frozen_application_is_thawed_before_anything_ends() {
        let failed =
            World::new(status("Fail", Some(("Unknown", "Done")), true, false)).with_task(Some(("False", "ReadFailed")));
        assert_eq!(failed.step(NOW), Step::Thaw);
        let thawed =
            World::new(status("Fail", Some(("True", "Done")), false, false)).with_task(Some(("False", "ReadFailed")));
        assert!(matches!(thawed.step(NOW), Step::Fail(Reason::ReadFailed, _)));
        let mut deleted = World::new(status("Fail", Some(("Unknown", "Done")), true, false));
        deleted.is_deleted = true;
        assert_eq!(deleted.step(NOW), Step::Thaw);
        deleted.status = serde_json::from_value(status("Fail", Some(("True", "Done")), false, false)).unwrap();
        assert_eq!(deleted.step(NOW), Step::Clean);
        let mut vanished = World::new(status("Fail", Some(("Unknown", "Done")), true, false));
        vanished.vanished = Some("p".into());
        assert_eq!(vanished.step(NOW), Step::Thaw);
    }

    #[test]
    fn the_longest_freeze_ends_the_freeze_and_the_plan_decides_about_the_backup() {
        let late = "2026-01-01T00:01:00Z";
        let world = World::new(status("Fail", Some(("Unknown", "Done")), true, false)).with_task(None);
        assert!(matches!(world.step(late), Step::NoteFreezeFailure(Reason::FreezeDeadline, _)));
        let noted = |on_failure, frozen| {
            World::new(status(on_failure, Some(("False", "FreezeDeadline")), frozen, false)).with_task(None)
        };
        assert_eq!(noted("Fail", true).step(late), Step::Thaw);
        assert!(matches!(noted("Fail", false).step(late), Step::Fail(Reason::FreezeDeadline, _)));
        assert_eq!(noted("Continue", true).step(late), Step::Thaw);
        assert_eq!(noted("Continue", false).step(late), Step::Wait(None));
    }

    #[test]
    fn a_controller_that_died_while_freezing_thaws() {
        let world = World::new(status("Fail", Some(("Unknown", "InProgress")), true, false));
        assert!(matches!(world.step(NOW), Step::NoteFreezeFailure(Reason::HookFailed, _)));
    }

    #[test]
    fn an_ended_backup_is_cleaned_once() {
        let mut ended = status("Fail", None, false, true);
        ended["conditions"] = json!([{"type": "Succeeded", "status": "True", "reason": "Completed", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        let mut world = World::new(ended);
        assert_eq!(world.step(NOW), Step::Clean);
        world.has_finalizer = false;
        assert_eq!(world.step(NOW), Step::Nothing);
    }

    fn snapshot(quiesced: Option<(&str, &str)>, frozen: bool, handle: Option<&str>, read: bool) -> Value {
        let mut all = status("Fail", quiesced, frozen, read);
        all["cutStartedAt"] = json!("2026-01-01T00:00:00Z");
        all["volumes"][0]["method"] = json!("Snapshot");
        all["volumes"][0]["cut"] = json!({
            "driver": "d", "class": "c", "volumeHandle": "v", "storageClass": "s", "size": "1Gi", "readyWithinSeconds": 600, "handle": handle
        });
        all["volumes"][0]["dispatchedAt"] = json!("2026-01-01T00:00:00Z");
        all
    }

    const FROZEN: Option<(&str, &str)> = Some(("Unknown", "Done"));
    const THAWED: Option<(&str, &str)> = Some(("True", "Done"));

    #[test]
    fn the_application_is_thawed_as_soon_as_the_snapshot_exists_and_before_it_is_read() {
        assert_eq!(World::new(snapshot(None, false, None, false)).step(NOW), Step::Freeze);
        assert_eq!(World::new(snapshot(FROZEN, true, None, false)).step(NOW), Step::Cut);
        assert_eq!(World::new(snapshot(FROZEN, true, Some("h"), false)).step(NOW), Step::Thaw);
        assert_eq!(World::new(snapshot(THAWED, false, Some("h"), false)).step(NOW), Step::Expose);
        assert_eq!(World::new(snapshot(THAWED, false, Some("h"), false)).with_task(None).step(NOW), Step::Wait(None));
        assert_eq!(World::new(snapshot(THAWED, false, Some("h"), true)).step(NOW), Step::Commit);
    }

    #[test]
    fn a_live_volume_beside_a_snapshot_keeps_the_freeze() {
        let mut both = snapshot(FROZEN, true, Some("h"), false);
        both["volumes"]
            .as_array_mut()
            .unwrap()
            .push(json!({"claim": "old", "claimUid": "claim-uid", "method": "Live"}));
        assert_eq!(World::new(both.clone()).step(NOW), Step::StartTasks);
        assert!(matches!(World::new(both.clone()).with_task(None).step(NOW), Step::Wait(Some(_))));
        both["volumes"][1]["snapshot"] = json!("ab");
        assert_eq!(World::new(both).step(NOW), Step::Thaw);
    }

    #[test]
    fn a_cut_that_comes_too_late_ends_the_freeze_first() {
        let late = "2026-01-01T00:01:00Z";
        let world = World::new(snapshot(FROZEN, true, None, false));
        assert!(matches!(world.step(late), Step::NoteFreezeFailure(Reason::FreezeDeadline, _)));
        let mut refused = snapshot(FROZEN, true, None, false);
        refused["conditions"].as_array_mut().unwrap().push(
            json!({"type": "Cut", "status": "False", "reason": "SnapshotFailed", "message": "quota", "lastTransitionTime": "2026-01-01T00:00:00Z"}),
        );
        assert_eq!(World::new(refused.clone()).step(NOW), Step::Thaw);
        refused["quiesce"]["workloads"][0]["frozen"] = json!(false);
        assert_eq!(World::new(refused).step(NOW), Step::Fail(Reason::SnapshotFailed, "quota".into()));
    }

    #[test]
    fn a_snapshot_that_is_never_made_or_never_ready_fails_by_its_deadline() {
        let mut unmade = snapshot(THAWED, false, None, false);
        unmade["volumes"][0]["message"] = json!("pool is full");
        let unmade = World::new(unmade);
        assert_eq!(unmade.step("2026-01-01T00:05:00Z"), Step::Cut);
        let Step::Fail(reason, message) = unmade.step("2026-01-01T00:05:01Z") else { panic!("no failure") };
        assert!(
            reason == Reason::SnapshotFailed && message.contains("pool is full") && message.contains("data"),
            "{message}"
        );
        let unready = World::new(snapshot(THAWED, false, Some("h"), false));
        assert_eq!(unready.step("2026-01-01T00:10:00Z"), Step::Expose);
        let Step::Fail(reason, message) = unready.step("2026-01-01T00:10:01Z") else { panic!("no failure") };
        assert!(reason == Reason::SnapshotNotReady && message.contains("readyWithin"), "{message}");
        let mut queued = snapshot(THAWED, false, Some("h"), false);
        queued["volumes"][0]["dispatchedAt"] = Value::Null;
        assert_eq!(World::new(queued).step("2026-01-02T00:00:00Z"), Step::Expose, "waiting for a turn costs no time");
        let reading = World::new(snapshot(THAWED, false, Some("h"), false)).with_task(None);
        assert_eq!(reading.step("2026-01-01T01:00:00Z"), Step::Wait(None), "what is being read is in time");
    }

    #[test]
    fn a_lost_mount_is_made_again_a_few_times() {
        let lost = |attempt: u32| {
            let mut all = snapshot(THAWED, false, Some("h"), false);
            all["volumes"][0]["attempt"] = json!(attempt);
            let mut world = World::new(all);
            world.lost = vec!["data".into()];
            world
        };
        assert_eq!(lost(0).step(NOW), Step::Renew("data".into()));
        assert_eq!(lost(1).step(NOW), Step::Renew("data".into()));
        assert!(matches!(lost(2).step(NOW), Step::Fail(Reason::PodVanished, _)));
        let says_so = World::new(snapshot(THAWED, false, Some("h"), false)).with_task(Some(("False", "PodVanished")));
        assert_eq!(says_so.step(NOW), Step::Renew("data".into()));
        let other = World::new(snapshot(THAWED, false, Some("h"), false)).with_task(Some(("False", "ReadFailed")));
        assert!(matches!(other.step(NOW), Step::Fail(Reason::ReadFailed, _)));
    }

    #[test]
    fn a_mount_that_is_made_again_has_other_names() {
        let volume = |attempt: u32| -> VolumeBackupStatus {
            serde_json::from_value(json!({"claim": "c", "claimUid": "u", "method": "Snapshot", "attempt": attempt}))
                .unwrap()
        };
        assert_eq!(task_name(UID, &volume(0)), task::name('b', UID, "u"));
        assert_ne!(task_name(UID, &volume(0)), task_name(UID, &volume(1)));
        assert_ne!(task_name(UID, &volume(1)), task_name(UID, &volume(2)));
    }

    fn volumes() -> impl Strategy<Value = Vec<Value>> {
        let one = (0..4_usize, any::<bool>(), any::<bool>(), 0..4_u32).prop_map(|(method, handle, read, attempt)| {
            let method = ["Snapshot", "Group", "Live", "Skip"][method];
            let cut = json!({
                "driver": "d", "class": "c", "volumeHandle": "v", "storageClass": "s", "size": "1Gi", "readyWithinSeconds": 600,
                "handle": handle.then_some("h")
            });
            json!({
                "method": method, "attempt": attempt, "snapshot": read.then_some("ab"),
                "cut": (method != "Live" && method != "Skip").then_some(cut)
            })
        });
        proptest::collection::vec(one, 0..5).prop_map(|mut all| {
            for (number, volume) in all.iter_mut().enumerate() {
                volume["claim"] = json!(format!("c{number}"));
                volume["claimUid"] = json!(format!("c{number}"));
            }
            all
        })
    }

    proptest! {
        #[test]
        fn whatever_was_seen_nothing_ends_frozen_or_unread(
            volumes in volumes(), frozen: bool, failed: bool, is_deleted: bool, lost: bool, minutes in 0..30_u64, on_failure in 0..2_usize,
        ) {
            let quiesced = if failed { ("False", "HookFailed") } else if frozen { ("Unknown", "Done") } else { ("True", "Done") };
            let mut all = status(["Fail", "Continue"][on_failure], Some(quiesced), frozen, false);
            all["volumes"] = json!(volumes);
            all["cutStartedAt"] = json!("2026-01-01T00:00:00Z");
            let mut world = World::new(all);
            world.is_deleted = is_deleted;
            world.lost = if lost { vec!["c0".into()] } else { Vec::new() };
            let step = world.step(&format!("2026-01-01T00:{minutes:02}:00Z"));
            prop_assert!(STEPS.contains(&step.name()), "{:?}", step);
            prop_assert_eq!(&step, &world.step(&format!("2026-01-01T00:{minutes:02}:00Z")), "the same facts, the same step");
            if frozen {
                prop_assert!(!matches!(step, Step::Commit | Step::Fail(..) | Step::Clean | Step::Nothing | Step::Expose | Step::Renew(_)), "{:?}", step);
            }
            let is_read = |volume: &VolumeBackupStatus| volume.method == VolumeMethod::Skip || volume.snapshot.is_some();
            if step == Step::Commit {
                prop_assert!(world.status.volumes.iter().all(is_read));
            }
            if step == Step::Expose || step == Step::Commit {
                prop_assert!(!world.status.volumes.iter().any(is_uncut));
            }
        }
    }
}
