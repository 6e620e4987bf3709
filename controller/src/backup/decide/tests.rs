//! What a backup does next: tables of facts, and what holds whatever was seen.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

const UID: &str = "11111111-2222-3333-4444-555555555555";

struct World {
    status: BackupStatus,
    tasks: BTreeMap<String, VolumeTask>,
    is_deleted: bool,
    has_finalizer: bool,
    has_data_finalizer: bool,
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
            has_data_finalizer: false,
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

    /// With the task of the stream `shop.sql`.
    fn with_dump(self, condition: Option<(&str, &str)>) -> Self {
        let mut world = self.with_task(condition);
        if let Some(task) = world.tasks.remove(&task::name('b', UID, "claim-uid")) {
            world.tasks.insert(task::name('s', UID, "~shop.sql"), task);
        }
        world
    }

    fn step(&self, now: &str) -> Step {
        let facts = Facts {
            is_deleted: self.is_deleted,
            has_finalizer: self.has_finalizer,
            has_data_finalizer: self.has_data_finalizer,
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
    assert_eq!(waiting(&|all| all["plan"]["quiesce"] = Value::Null).step(NOW), Step::Admit, "a volume is read live");
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
fn a_controller_that_died_while_it_waited_for_a_guardian_freezes() {
    assert_eq!(World::new(status("Fail", Some(("Unknown", "Waiting")), false, false)).step(NOW), Step::Freeze);
}

#[test]
fn an_ended_backup_is_cleaned_once() {
    let mut ended = status("Fail", None, false, true);
    ended["conditions"] = json!([{"type": "Succeeded", "status": "True", "reason": "Completed", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    let mut world = World::new(ended);
    assert_eq!(world.step(NOW), Step::Clean);
    world.has_finalizer = false;
    assert_eq!(world.step(NOW), Step::Nothing);
    world.has_data_finalizer = true;
    assert_eq!(world.step(NOW), Step::Nothing, "data goes with the object and not before");
    world.is_deleted = true;
    assert_eq!(world.step(NOW), Step::Erase);
    world.has_finalizer = true;
    assert_eq!(world.step(NOW), Step::Clean, "what was made in the cluster goes first");
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

fn streams(dispatched: bool, read: bool) -> Value {
    json!([{"name": "shop.sql", "dispatchedAt": dispatched.then_some("2026-01-01T00:00:00Z"), "snapshot": read.then_some("ab")}])
}

#[test]
fn streams_run_outside_the_freeze_and_belong_to_the_recovery_point() {
    let with = |mut all: Value, dispatched: bool, read: bool| {
        all["streams"] = streams(dispatched, read);
        World::new(all)
    };
    let thawed = || snapshot(THAWED, false, Some("h"), true);
    assert_eq!(with(snapshot(FROZEN, true, None, false), false, false).step(NOW), Step::Cut);
    assert_eq!(with(snapshot(FROZEN, true, Some("h"), false), false, false).step(NOW), Step::Thaw);
    assert_eq!(with(thawed(), false, false).step(NOW), Step::Expose, "it asks for a turn");
    assert_eq!(with(thawed(), true, false).step(NOW), Step::Dump);
    assert_eq!(with(thawed(), true, false).with_dump(None).step(NOW), Step::Wait(None));
    assert_eq!(with(thawed(), true, true).step(NOW), Step::Commit);
    let both = with(snapshot(THAWED, false, Some("h"), false), true, false).with_dump(None);
    assert_eq!(both.step(NOW), Step::Expose, "a volume does not wait for a stream");
    let mut alone = thawed();
    (alone["volumes"], alone["plan"]["quiesce"], alone["conditions"]) = (json!([]), Value::Null, json!([]));
    assert_eq!(with(alone.clone(), false, false).step(NOW), Step::Expose);
    assert_eq!(with(alone.clone(), true, true).step(NOW), Step::Commit);
    let failed = with(alone, true, false).with_dump(Some(("False", "StreamFailed"))).step(NOW);
    let Step::Fail(reason, message) = failed else { panic!("{failed:?}") };
    assert!(reason == Reason::StreamFailed && message.contains("shop.sql was not stored"), "{message}");
    let mut gone = with(thawed(), true, false).with_dump(None);
    gone.vanished = Some("db-0".into());
    assert!(matches!(gone.step(NOW), Step::Fail(Reason::PodVanished, _)));
}

#[test]
fn a_live_volume_beside_a_snapshot_keeps_the_freeze() {
    let mut both = snapshot(FROZEN, true, Some("h"), false);
    both["volumes"].as_array_mut().unwrap().push(json!({"claim": "old", "claimUid": "claim-uid", "method": "Live"}));
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
        volumes in volumes(), frozen: bool, failed: bool, is_deleted: bool, lost: bool, stream in 0..4_u8, minutes in 0..30_u64, on_failure in 0..2_usize,
    ) {
        let quiesced = if failed { ("False", "HookFailed") } else if frozen { ("Unknown", "Done") } else { ("True", "Done") };
        let mut all = status(["Fail", "Continue"][on_failure], Some(quiesced), frozen, false);
        all["volumes"] = json!(volumes);
        all["streams"] = if stream == 3 { json!([]) } else { streams(stream > 0, stream > 1) };
        all["cutStartedAt"] = json!("2026-01-01T00:00:00Z");
        let mut world = World::new(all);
        world.is_deleted = is_deleted;
        world.lost = if lost { vec!["c0".into()] } else { Vec::new() };
        let step = world.step(&format!("2026-01-01T00:{minutes:02}:00Z"));
        prop_assert!(STEPS.contains(&step.name()), "{:?}", step);
        prop_assert_eq!(&step, &world.step(&format!("2026-01-01T00:{minutes:02}:00Z")), "the same facts, the same step");
        if frozen {
            prop_assert!(!matches!(step, Step::Commit | Step::Fail(..) | Step::Clean | Step::Nothing | Step::Expose | Step::Dump | Step::Renew(_)), "{:?}", step);
        }
        let is_read = |volume: &VolumeBackupStatus| volume.method == VolumeMethod::Skip || volume.snapshot.is_some();
        if step == Step::Commit {
            prop_assert!(world.status.volumes.iter().all(is_read));
            prop_assert!(world.status.streams.iter().all(|stream| stream.snapshot.is_some()));
        }
        if matches!(step, Step::Expose | Step::Dump | Step::Commit) {
            prop_assert!(!world.status.volumes.iter().any(is_uncut));
        }
    }
}

#[test]
fn tasks_are_asked_for_whenever_there_may_be_any() {
    let may = |status: Value| may_have_tasks(&serde_json::from_value(status).unwrap());
    let volume = |more: Value| {
        let mut volume = json!({"claim": "data", "claimUid": "u", "method": "Snapshot"});
        volume.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"volumes": [volume]})
    };
    let at = "2026-01-01T00:00:00Z";
    assert!(!may(json!({})) && !may(volume(json!({}))), "nothing had its turn yet");
    assert!(may(volume(json!({"method": "Live"}))));
    assert!(may(volume(json!({"dispatchedAt": at}))));
    assert!(may(volume(json!({"attempt": 1}))), "the task of the attempt before may be there");
    assert!(may(json!({"streams": [{"name": "shop.sql", "dispatchedAt": at}]})));
    let ended =
        json!({"type": "Succeeded", "status": "True", "reason": "Done", "message": "", "lastTransitionTime": at});
    assert!(may(json!({"conditions": [ended]})));
}
