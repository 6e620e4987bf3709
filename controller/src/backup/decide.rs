//! What a backup does next: a pure function from facts and the time.

use std::collections::BTreeMap;

use jiff::Timestamp;
use lifeboat_crds::BackupStatus;
use lifeboat_crds::VolumeTask;
use lifeboat_crds::conditions::{self, ConditionType, Reason};
use lifeboat_crds::plan::{OnQuiesceFailure, VolumeMethod};

use crate::task::{self, Standing};

/// What was seen.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) is_deleted: bool,
    pub(super) has_finalizer: bool,
    pub(super) status: &'a BackupStatus,
    /// The volume tasks of this backup, by name.
    pub(super) tasks: &'a BTreeMap<String, VolumeTask>,
    pub(super) uid: &'a str,
    /// A pod whose volume is still to be read and that is gone.
    pub(super) vanished: Option<String>,
}

/// What is done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Keep the object until everything is undone.
    Hold,
    Resolve,
    Capture,
    Freeze,
    /// Write down that the freeze failed or was too long.
    NoteFreezeFailure(Reason, String),
    Thaw,
    StartTasks,
    /// Until then at the latest; until something changes when there is no time.
    Wait(Option<Timestamp>),
    Commit,
    Fail(Reason, String),
    /// Remove what was made, and let the object go.
    Clean,
    Nothing,
}

fn is_frozen(status: &BackupStatus) -> bool {
    status.quiesce.as_ref().is_some_and(|quiesce| quiesce.workloads.iter().any(|workload| workload.frozen))
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
    if let Some((reason, message)) = failure(facts) {
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
    let wanted: Vec<_> = status.volumes.iter().filter(|volume| volume.method == VolumeMethod::Live).collect();
    let tasks: Vec<_> =
        wanted.iter().map(|volume| facts.tasks.get(&task::name('b', facts.uid, &volume.claim_uid))).collect();
    // A volume whose snapshot is known needs no task any more.
    let is_missing = wanted.iter().zip(&tasks).any(|(volume, task)| volume.snapshot.is_none() && task.is_none());
    if is_missing {
        return Step::StartTasks;
    }
    let all_read = wanted.iter().all(|volume| volume.snapshot.is_some());
    let frozen = is_frozen(status);
    if all_read {
        return if frozen { Step::Thaw } else { Step::Commit };
    }
    let deadline = status.quiesce.as_ref().and_then(|quiesce| quiesce.deadline.as_ref()).map(|deadline| deadline.0);
    match deadline.filter(|_| frozen) {
        Some(deadline) if deadline <= now => Step::NoteFreezeFailure(
            Reason::FreezeDeadline,
            "maxFreeze was over before everything was read; allow more, or exclude large volumes from the frozen part"
                .into(),
        ),
        deadline => Step::Wait(deadline),
    }
}

/// Why the backup cannot end well, if it cannot.
fn failure(facts: &Facts<'_>) -> Option<(Reason, String)> {
    let status = facts.status;
    let on_failure = status.plan.as_ref().and_then(|plan| plan.quiesce.as_ref()).map(|quiesce| quiesce.on_failure);
    if on_failure == Some(OnQuiesceFailure::Fail)
        && let Some(condition) = conditions::get(&status.conditions, ConditionType::Quiesced)
        && condition.status == "False"
    {
        return Some((Reason::from_text(&condition.reason), condition.message.clone()));
    }
    for volume in &status.volumes {
        let Some(task) = facts.tasks.get(&task::name('b', facts.uid, &volume.claim_uid)) else { continue };
        if let Standing::Failed(reason, message) = task::standing(task, task.metadata.creation_timestamp.as_ref()?.0) {
            return Some((
                Reason::from_text(&reason),
                format!("the volume of the claim {} was not read: {message}", volume.claim),
            ));
        }
    }
    let pod = facts.vanished.as_ref()?;
    Some((
        Reason::PodVanished,
        format!("the pod {pod} ended while its volume was to be read; the next backup reads its successor"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const UID: &str = "11111111-2222-3333-4444-555555555555";

    struct World {
        status: BackupStatus,
        tasks: BTreeMap<String, VolumeTask>,
        is_deleted: bool,
        has_finalizer: bool,
        vanished: Option<String>,
    }

    impl World {
        fn new(status: Value) -> Self {
            Self {
                status: serde_json::from_value(status).unwrap(),
                tasks: BTreeMap::new(),
                is_deleted: false,
                has_finalizer: true,
                vanished: None,
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
        assert_eq!(World::new(captured).step(NOW), Step::Capture);
        assert_eq!(World::new(status("Fail", None, false, false)).step(NOW), Step::Freeze);
        assert_eq!(World::new(status("Fail", Some(("Unknown", "Done")), true, false)).step(NOW), Step::StartTasks);
        let reading = World::new(status("Fail", Some(("Unknown", "Done")), true, false)).with_task(None);
        assert_eq!(reading.step(NOW), Step::Wait(Some("2026-01-01T00:01:00Z".parse().unwrap())));
        assert_eq!(World::new(status("Fail", Some(("Unknown", "Done")), true, true)).step(NOW), Step::Thaw);
        assert_eq!(World::new(status("Fail", Some(("True", "Done")), false, true)).step(NOW), Step::Commit);
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
}
