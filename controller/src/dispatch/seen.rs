//! What goes on: read off the objects that say so, and off nothing else.

use jiff::Timestamp;
use kube::ResourceExt;
use lifeboat_crds::backup::Phase;
use lifeboat_crds::conditions::{self, ConditionType};
use lifeboat_crds::{Backup, BackupStatus, Restore, labels};

use super::decide::{Kind, Running};
use crate::stream;

/// The key of an application that is brought to rest.
pub(crate) fn rest_key(backup_uid: &str) -> String {
    format!("{backup_uid}/rest")
}

/// The key of one volume that is read or written.
pub(crate) fn volume_key(owner_uid: &str, volume: &str) -> String {
    format!("{owner_uid}/{volume}")
}

/// Since when a backup should have begun.
pub(crate) fn due(backup: &Backup) -> Timestamp {
    let scheduled = backup.annotations().get(labels::SCHEDULED_AT).and_then(|text| text.parse().ok());
    let made = backup.metadata.creation_timestamp.as_ref().map(|made| made.0);
    scheduled.or(made).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Whether the application of an admitted backup rests, or its volumes are to be read where they are mounted.
fn is_resting(status: &BackupStatus) -> bool {
    let quiesce = status.plan.as_ref().and_then(|plan| plan.quiesce.as_ref());
    let is_frozen = status.quiesce.as_ref().is_some_and(|quiesce| quiesce.workloads.iter().any(|one| one.frozen));
    let is_to_freeze = quiesce.is_some() && conditions::get(&status.conditions, ConditionType::Quiesced).is_none();
    let is_uncut = status
        .volumes
        .iter()
        .any(|volume| volume.method.is_snapshot() && volume.cut.as_ref().is_none_or(|cut| cut.handle.is_none()));
    status.admitted_at.is_some()
        && (status.objects.is_none() || is_frozen || is_to_freeze || is_uncut || unread_live(status) > 0)
}

fn unread_live(status: &BackupStatus) -> usize {
    live_nodes(status).len()
}

/// The nodes of the volumes that are read where they are mounted and that are still to be read.
pub(crate) fn live_nodes(status: &BackupStatus) -> Vec<String> {
    let is_live = |method| method == lifeboat_crds::plan::VolumeMethod::Live;
    let unread = status.volumes.iter().filter(|volume| is_live(volume.method) && volume.snapshot.is_none());
    unread.filter_map(|volume| volume.node.clone()).collect()
}

/// What a backup has going on.
pub(super) fn of_backup(backup: &Backup) -> Vec<Running> {
    let Some(status) = backup.status.as_ref().filter(|status| !conditions::is_finished(&status.conditions)) else {
        return Vec::new();
    };
    let uid = backup.uid().unwrap_or_default();
    let running = |key, nodes, rests| Running {
        key,
        kind: Kind::Backup,
        repository: status.repository.as_ref().map(|repository| repository.name.clone()).unwrap_or_default(),
        namespace: backup.namespace().unwrap_or_default(),
        nodes,
        rests,
    };
    let mut all = Vec::new();
    if is_resting(status) {
        all.push(running(rest_key(&uid), live_nodes(status), true));
    }
    let read = status.volumes.iter().filter(|volume| volume.dispatched_at.is_some() && volume.snapshot.is_none());
    all.extend(read.map(|volume| {
        running(volume_key(&uid, &crate::backup::reading_key(volume)), volume.node.iter().cloned().collect(), false)
    }));
    let streams = status.streams.iter().filter(|stream| stream.dispatched_at.is_some() && stream.snapshot.is_none());
    all.extend(streams.map(|stream| {
        running(volume_key(&uid, &stream::key(&stream.name)), stream.node.iter().cloned().collect(), false)
    }));
    all
}

/// What a restore has going on.
pub(super) fn of_restore(restore: &Restore) -> Vec<Running> {
    let Some(status) = restore.status.as_ref().filter(|status| !conditions::is_finished(&status.conditions)) else {
        return Vec::new();
    };
    let uid = restore.uid().unwrap_or_default();
    let filled = status.volumes.iter().filter(|volume| volume.phase == Phase::Running);
    let filled = filled.map(|volume| (volume.claim.clone(), &volume.node));
    let fed = status.streams.iter().filter(|stream| stream.phase == Phase::Running);
    let fed = fed.map(|stream| (stream::key(&stream.name), &stream.node));
    filled
        .chain(fed)
        .map(|(key, node)| Running {
            key: volume_key(&uid, &key),
            kind: Kind::Restore,
            repository: status.repository.as_ref().map(|repository| repository.name.clone()).unwrap_or_default(),
            namespace: restore.namespace().unwrap_or_default(),
            nodes: node.iter().cloned().collect(),
            rests: false,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn backup(status: &Value) -> Vec<Running> {
        let mut all = json!({
            "plan": {"quiesce": {}, "tiers": [{"repository": {"ref": {"name": "r"}}}]},
            "repository": {"name": "r", "id": "ab"}, "admittedAt": "2026-01-01T00:00:00Z",
        });
        all.as_object_mut().unwrap().extend(status.as_object().unwrap().clone());
        let object = json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "Backup", "metadata": {"name": "b", "namespace": "n", "uid": "u"},
            "spec": {"policyRef": {"name": "p"}}, "status": all
        });
        of_backup(&serde_json::from_value(object).unwrap())
    }

    fn live(read: bool) -> Value {
        json!([{"claim": "c", "claimUid": "c", "method": "Live", "node": "n1", "snapshot": read.then_some("ab")}])
    }

    fn copied(dispatched: bool, read: bool) -> Value {
        json!([{
            "claim": "c", "claimUid": "c", "method": "Snapshot", "node": "n2", "snapshot": read.then_some("ab"),
            "dispatchedAt": dispatched.then_some("2026-01-01T00:00:00Z"),
            "cut": {"driver": "d", "class": "c", "volumeHandle": "v", "storageClass": "s", "size": "1", "readyWithinSeconds": 1, "handle": "h"},
        }])
    }

    fn thawed() -> Value {
        json!([{"type": "Quiesced", "status": "True", "reason": "Done", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    }

    #[test]
    fn an_application_counts_as_at_rest_until_it_runs_and_its_volumes_are_read() {
        let rests = |status: Value| backup(&status).iter().any(|one| one.rests);
        assert!(rests(json!({})), "admitted, and about to be frozen");
        assert!(!rests(json!({"admittedAt": null})), "it waits");
        assert!(rests(json!({"objects": {"count": 1}})));
        let all = |volumes| json!({"objects": {"count": 1}, "conditions": thawed(), "volumes": volumes});
        assert!(rests(all(live(false))));
        assert_eq!(backup(&all(live(false)))[0].nodes, ["n1"]);
        assert!(!rests(all(live(true))));
        let mut frozen = all(live(true));
        frozen["quiesce"] = json!({"workloads": [{"step": 0, "pod": "p", "podUid": "p", "frozen": true}]});
        assert!(rests(frozen));
    }

    #[test]
    fn a_snapshot_counts_from_its_dispatch_until_it_is_read() {
        let all = |volumes| backup(&json!({"objects": {"count": 1}, "conditions": thawed(), "volumes": volumes}));
        assert!(all(copied(false, false)).is_empty());
        assert_eq!(all(copied(true, false)).iter().map(|one| one.nodes.clone()).collect::<Vec<_>>(), [["n2"]]);
        assert!(all(copied(true, true)).is_empty());
    }

    #[test]
    fn a_stream_counts_while_its_command_runs() {
        let all = |stream: Value| {
            let all = backup(&json!({"objects": {"count": 1}, "conditions": thawed(), "streams": [stream]}));
            all.into_iter().map(|one| (one.key, one.nodes)).collect::<Vec<_>>()
        };
        let at = "2026-01-01T00:00:00Z";
        assert!(all(json!({"name": "a.sql"})).is_empty());
        let running = all(json!({"name": "a.sql", "node": "n1", "dispatchedAt": at}));
        assert_eq!(running, [("u/~a.sql".to_owned(), vec!["n1".to_owned()])]);
        assert!(all(json!({"name": "a.sql", "node": "n1", "dispatchedAt": at, "snapshot": "ab"})).is_empty());
        let restore = json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "Restore", "metadata": {"name": "r", "namespace": "n", "uid": "u"},
            "spec": {"source": {"backupRef": {"name": "b"}}},
            "status": {"streams": [{"name": "a.sql", "snapshot": "ab", "node": "n2", "phase": "Running"}, {"name": "b.sql", "snapshot": "cd"}]}
        });
        let found = of_restore(&serde_json::from_value(restore).unwrap());
        assert_eq!(
            found.iter().map(|one| (one.key.as_str(), one.nodes.clone())).collect::<Vec<_>>(),
            [("u/~a.sql", vec!["n2".to_owned()])]
        );
    }

    #[test]
    fn a_backup_is_due_since_its_schedule_or_its_making() {
        let due_of = |annotations: Value| {
            let object = json!({
                "apiVersion": "lifeboat.dev/v1alpha1", "kind": "Backup", "spec": {},
                "metadata": {"name": "b", "creationTimestamp": "2026-01-01T00:00:05Z", "annotations": annotations}
            });
            due(&serde_json::from_value(object).unwrap()).to_string()
        };
        assert_eq!(due_of(json!({labels::SCHEDULED_AT: "2026-01-01T00:00:00Z"})), "2026-01-01T00:00:00Z");
        assert_eq!(due_of(json!({labels::SCHEDULED_AT: "yesterday"})), "2026-01-01T00:00:05Z");
    }
}
