//! Cuts all snapshots of a backup at once, and notes when the storage has made them.
//!
//! Whether they can be read already is not waited for: the application stays frozen only until every snapshot exists.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::api::{DynamicObject, Patch, PatchParams};
use lifeboat_crds::backup::VolumeBackupStatus;
use lifeboat_crds::conditions::{ConditionType, Reason, State};
use lifeboat_crds::labels;
use lifeboat_crds::plan::VolumeMethod;
use serde_json::{Value, json};
use tracing::info;

use super::Run;
use crate::child::{Owner, make};
use crate::context::Context;
use crate::storage::{self, GroupKinds, Kind, error_of, text};
use crate::task::{self, label_value};

/// The storage is asked when a snapshot has changed, and at the latest after this.
const LOOK: Duration = Duration::from_millis(250);
/// The pause between two looks, for each volume of the backup: many snapshots change often, and each look asks for all.
const GATHER: Duration = Duration::from_millis(5);
/// How long one step asks before it lets the backup be looked at as a whole: its deadline, its deletion.
const STEP: Duration = Duration::from_millis(500);

/// A snapshot as the storage made it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Made {
    handle: String,
    created_at: Timestamp,
}

/// What one look found: handles by claim, and what the storage complains about.
#[derive(Debug, Default)]
struct Found {
    made: BTreeMap<String, Made>,
    complaints: BTreeMap<String, String>,
}

/// The label by which a group snapshot of this backup selects its claims.
pub(super) fn group_label(uid: &str) -> String {
    format!("{}{uid}", labels::GROUP_PREFIX)
}

fn owner(run: &Run) -> Owner<'_> {
    Owner { kind: "Backup", name: &run.name, uid: &run.uid }
}

fn is_waiting(volume: &VolumeBackupStatus, method: VolumeMethod) -> bool {
    volume.method == method && volume.cut.as_ref().is_some_and(|cut| cut.handle.is_none())
}

/// The groups that are still to be cut: driver and class, with the names of their claims.
fn groups(volumes: &[VolumeBackupStatus]) -> BTreeMap<(String, String), Vec<String>> {
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for volume in volumes.iter().filter(|volume| is_waiting(volume, VolumeMethod::Group)) {
        let Some(cut) = &volume.cut else { continue };
        groups.entry((cut.driver.clone(), cut.class.clone())).or_default().push(volume.claim.clone());
    }
    groups
}

fn group_name(uid: &str, driver: &str, class: &str) -> String {
    format!("lifeboat-{}", task::name('g', uid, &format!("{driver}/{class}")))
}

fn snapshot_name(uid: &str, claim: &str) -> String {
    format!("lifeboat-{}", task::name('s', uid, claim))
}

/// One step towards all snapshots: makes them, then looks for a short while whether the storage has. `true`: nothing is left
/// to wait for, for good or bad.
pub(super) async fn cut(run: &mut Run, context: &Context) -> Result<bool> {
    if run.status.cut_started_at.is_none() {
        // Written down with what comes of it: the names of snapshots do not depend on it, and the application waits.
        run.status.cut_started_at = Some(MicroTime(Timestamp::now()));
        run.set(ConditionType::Cut, State::Unknown, Reason::InProgress, "snapshots are being made");
    }
    let mut changes = context.watches.contents();
    let kinds =
        if groups(&run.status.volumes).is_empty() { None } else { GroupKinds::discover(&context.client).await? };
    if let Err(message) = make_all(run, kinds.as_ref(), context).await? {
        return note_failure(run, context, message).await.map(|()| true);
    }
    let end = Instant::now() + STEP;
    loop {
        let found = look(run, kinds.as_ref(), context).await?;
        note(&mut run.status.volumes, &found);
        let is_whole =
            !run.status.volumes.iter().any(|volume| volume.cut.as_ref().is_some_and(|cut| cut.handle.is_none()));
        if is_whole {
            note_whole(run);
            return Ok(true);
        }
        if Instant::now() >= end {
            if run.backup.status.as_ref() != Some(&run.status) {
                run.save(context).await?;
            }
            return Ok(false);
        }
        let gather = GATHER.saturating_mul(u32::try_from(run.status.volumes.len()).unwrap_or(u32::MAX));
        changes.next(gather.min(LOOK), LOOK).await;
    }
}

/// The thaw follows at once, and is written down together with this: a controller that dies before finds the same snapshots again.
fn note_whole(run: &mut Run) {
    let began = run.status.cut_started_at.as_ref().map_or_else(Timestamp::now, |began| began.0);
    run.status.cut_millis = u64::try_from(Timestamp::now().duration_since(began).as_millis()).ok();
    info!(millis = run.status.cut_millis, "snapshots are made");
    run.set(ConditionType::Cut, State::True, Reason::Done, "every snapshot is made");
}

async fn note_failure(run: &mut Run, context: &Context, message: String) -> Result<()> {
    run.set(ConditionType::Cut, State::False, Reason::SnapshotFailed, message);
    run.save(context).await
}

/// Writes into the volumes what was found.
fn note(volumes: &mut [VolumeBackupStatus], found: &Found) {
    for volume in volumes {
        let Some(cut) = volume.cut.as_mut().filter(|cut| cut.handle.is_none()) else { continue };
        if let Some(made) = found.made.get(&volume.claim) {
            cut.handle = Some(made.handle.clone());
            cut.created_at = Some(Time(made.created_at));
            volume.message = None;
        } else if let Some(complaint) = found.complaints.get(&volume.claim) {
            volume.message = Some(format!("the storage has not made the snapshot: {complaint}"));
        }
    }
}

/// The metadata of a snapshot in the application's namespace. It goes with the `Backup` that it belongs to.
fn metadata(run: &Run, name: &str, claim: &str) -> Value {
    let mut metadata = owner(run).metadata(name, claim);
    metadata["ownerReferences"] =
        json!([{"apiVersion": "lifeboat.dev/v1alpha1", "kind": "Backup", "name": run.name, "uid": run.uid}]);
    if let Some(policy) = &run.backup.spec.policy_ref {
        metadata["labels"][labels::POLICY] = label_value(&policy.name).into();
    }
    metadata
}

/// Makes everything that is still to be cut, all at once. `Err`: why the API server refuses one.
async fn make_all(run: &Run, kinds: Option<&GroupKinds>, context: &Context) -> Result<Result<(), String>> {
    let groups = groups(&run.status.volumes);
    if let Err(refused) = label(run, groups.values().flatten(), context).await? {
        return Ok(Err(refused));
    }
    let mut wanted = Vec::new();
    let singles = storage::snapshots(&context.client, &run.namespace);
    for volume in run.status.volumes.iter().filter(|volume| is_waiting(volume, VolumeMethod::Snapshot)) {
        let class = volume.cut.as_ref().map(|cut| cut.class.clone());
        let data = json!({
            "metadata": metadata(run, &snapshot_name(&run.uid, &volume.claim), &volume.claim),
            "spec": {"volumeSnapshotClassName": class, "source": {"persistentVolumeClaimName": volume.claim}},
        });
        wanted.push((singles.clone(), storage::object(Kind::Snapshot, data)?));
    }
    for ((driver, class), claims) in &groups {
        let Some(kinds) = kinds else {
            return Ok(Err("the cluster does not offer group snapshots any more; use the method Snapshot".into()));
        };
        let first = claims.first().map(String::as_str).unwrap_or_default();
        let data = json!({
            "metadata": metadata(run, &group_name(&run.uid, driver, class), first),
            "spec": {
                "volumeGroupSnapshotClassName": class,
                "source": {"selector": {"matchLabels": {group_label(&run.uid): group_value(driver, class)}}},
            },
        });
        wanted.push((kinds.snapshots(&context.client, &run.namespace), kinds.object(data)?));
    }
    let made = wanted.iter().map(|(api, object)| make(api, object, &run.uid));
    let refused = try_join_all(made).await?.into_iter().find_map(Result::err);
    Ok(refused.map_or(Ok(()), |why| Err(format!("a snapshot was refused: {why}"))))
}

fn group_value(driver: &str, class: &str) -> String {
    task::name('g', "", &format!("{driver}/{class}"))
}

/// Marks the claims of groups: a group snapshot finds its claims by a label.
async fn label(run: &Run, claims: impl Iterator<Item = &String>, context: &Context) -> Result<Result<(), String>> {
    let api = context.namespaced::<PersistentVolumeClaim>(&run.namespace);
    let mut patches = Vec::new();
    for name in claims {
        let Some(volume) = run.status.volumes.iter().find(|volume| volume.claim == *name) else { continue };
        let Some(cut) = &volume.cut else { continue };
        // The UID makes the patch fail on another claim of the same name.
        let patch = json!({"metadata": {
            "uid": volume.claim_uid,
            "labels": {group_label(&run.uid): group_value(&cut.driver, &cut.class)},
        }});
        let api = &api;
        patches.push(async move {
            match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
                Ok(_) => Ok(None),
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                    Ok(Some(format!("the claim {name} was deleted or made anew while it was to be cut")))
                }
                Err(error) => Err(error).with_context(|| format!("cannot mark the claim {name}")),
            }
        });
    }
    let refused = try_join_all(patches).await?.into_iter().flatten().next();
    Ok(refused.map_or(Ok(()), Err))
}

/// Asks what the storage has made.
async fn look(run: &Run, kinds: Option<&GroupKinds>, context: &Context) -> Result<Found> {
    let mut found = Found::default();
    let singles = run.status.volumes.iter().filter(|volume| is_waiting(volume, VolumeMethod::Snapshot));
    let looks = singles.map(async |volume: &VolumeBackupStatus| {
        let (snapshot, bound) = single(run, &volume.claim, context).await?;
        Ok::<_, anyhow::Error>((volume.claim.clone(), snapshot, bound))
    });
    for (claim, snapshot, bound) in try_join_all(looks).await? {
        if let Some(made) = bound.as_ref().and_then(|bound| made(&bound.data["status"], "snapshotHandle")) {
            found.made.insert(claim, made);
        } else if let Some(error) = snapshot.as_ref().and_then(error_of) {
            found.complaints.insert(claim, error.to_owned());
        }
    }
    let Some(kinds) = kinds else { return Ok(found) };
    for ((driver, class), claims) in groups(&run.status.volumes) {
        let name = group_name(&run.uid, &driver, &class);
        let group = kinds.snapshots(&context.client, &run.namespace).get_opt(&name).await;
        let Some(group) = group.context("cannot read a group snapshot")? else { continue };
        let bound = text(&group.data, "/status/boundVolumeGroupSnapshotContentName");
        let whole = if bound.is_empty() {
            None
        } else {
            kinds.contents(&context.client).get_opt(bound).await.context("cannot read a group snapshot's content")?
        };
        let members = whole.map(|whole| members(&whole.data["status"])).unwrap_or_default();
        for claim in claims {
            let volume = run.status.volumes.iter().find(|volume| volume.claim == claim);
            let handle = volume.and_then(|volume| volume.cut.as_ref()).map(|cut| cut.volume_handle.as_str());
            if let Some(made) = handle.and_then(|handle| members.get(handle)) {
                found.made.insert(claim, made.clone());
            } else if let Some(error) = error_of(&group) {
                found.complaints.insert(claim, error.to_owned());
            }
        }
    }
    Ok(found)
}

/// The snapshot of a claim and its content.
async fn single(run: &Run, claim: &str, context: &Context) -> Result<(Option<DynamicObject>, Option<DynamicObject>)> {
    let api = storage::snapshots(&context.client, &run.namespace);
    let snapshot = api.get_opt(&snapshot_name(&run.uid, claim)).await.context("cannot read a snapshot")?;
    let bound = snapshot.as_ref().map(|snapshot| text(&snapshot.data, "/status/boundVolumeSnapshotContentName"));
    let made = match bound.filter(|name| !name.is_empty()) {
        Some(name) => {
            storage::contents(&context.client).get_opt(name).await.context("cannot read a snapshot's content")?
        }
        None => None,
    };
    Ok((snapshot, made))
}

/// A snapshot that exists: it has a handle and a time. Nanoseconds in some versions of the API, a date in others.
fn made(status: &Value, handle: &str) -> Option<Made> {
    let handle = status.get(handle)?.as_str().filter(|handle| !handle.is_empty())?.to_owned();
    let created_at = match status.get("creationTime")? {
        Value::String(text) => text.parse().ok()?,
        number => Timestamp::from_nanosecond(i128::from(number.as_i64()?)).ok()?,
    };
    Some(Made { handle, created_at })
}

/// The members of a group snapshot that is made, by the driver's name of the volume.
fn members(status: &Value) -> BTreeMap<String, Made> {
    let Some(group) = made(status, "volumeGroupSnapshotHandle") else { return BTreeMap::new() };
    let list = status.get("volumeSnapshotInfoList").or_else(|| status.get("volumeSnapshotHandlePairList"));
    let members = list.and_then(Value::as_array).into_iter().flatten();
    members
        .filter_map(|member| {
            let volume = member.get("volumeHandle")?.as_str()?.to_owned();
            let handle = member.get("snapshotHandle")?.as_str()?.to_owned();
            // All members show the group's time.
            Some((volume, Made { handle, created_at: group.created_at }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_exists_when_it_has_a_handle_and_a_time_ready_or_not() {
        let at = "2026-01-01T00:00:00Z".parse().unwrap();
        let found = |status: Value| made(&status, "snapshotHandle");
        let whole = Some(Made { handle: "h".into(), created_at: at });
        assert_eq!(
            found(json!({"snapshotHandle": "h", "creationTime": 1_767_225_600_000_000_000_i64, "readyToUse": false})),
            whole
        );
        assert_eq!(found(json!({"snapshotHandle": "h", "creationTime": "2026-01-01T00:00:00Z"})), whole);
        for status in [
            json!(null),
            json!({"snapshotHandle": "h"}),
            json!({"creationTime": 1}),
            json!({"snapshotHandle": "", "creationTime": 1}),
            json!({"snapshotHandle": "h", "creationTime": "yesterday"}),
        ] {
            assert_eq!(found(status.clone()), None, "{status}");
        }
    }

    #[test]
    fn members_are_known_by_their_volumes_in_all_versions_of_the_api() {
        for list in ["volumeSnapshotInfoList", "volumeSnapshotHandlePairList"] {
            let mut status = json!({"volumeGroupSnapshotHandle": "g", "creationTime": "2026-01-01T00:00:00Z"});
            status[list] = json!([{"volumeHandle": "v1", "snapshotHandle": "s1"}, {"volumeHandle": "v2"}]);
            let found = members(&status);
            assert_eq!(found.keys().collect::<Vec<_>>(), ["v1"]);
            assert_eq!(found["v1"].handle, "s1");
            status["volumeGroupSnapshotHandle"] = Value::Null;
            assert!(members(&status).is_empty(), "a group that is not made has no members");
        }
    }

    #[test]
    fn what_was_found_is_noted_once_and_complaints_are_shown() {
        let volume = |claim: &str, handle: Option<&str>| -> VolumeBackupStatus {
            serde_json::from_value(json!({
                "claim": claim, "claimUid": claim, "method": "Snapshot",
                "cut": {"driver": "d", "class": "c", "volumeHandle": "v", "storageClass": "s", "size": "1Gi", "readyWithinSeconds": 1, "handle": handle}
            }))
            .unwrap()
        };
        let mut volumes = [volume("a", None), volume("b", Some("old")), volume("c", None)];
        let new = Made { handle: "new".into(), created_at: Timestamp::UNIX_EPOCH };
        let made = BTreeMap::from([("a".to_owned(), new.clone()), ("b".to_owned(), new)]);
        note(&mut volumes, &Found { made, complaints: BTreeMap::from([("c".to_owned(), "no space".to_owned())]) });
        let handles: Vec<_> = volumes.iter().map(|v| v.cut.as_ref().unwrap().handle.as_deref()).collect();
        assert_eq!(handles, [Some("new"), Some("old"), None]);
        assert!(volumes[2].message.as_ref().unwrap().contains("no space"));
    }

    #[test]
    fn names_and_labels_fit_the_api() {
        let uid = "0a1b2c3d-4e5f-6789-abcd-ef0123456789";
        assert!(group_label(uid).split_once('/').unwrap().1.len() <= 63);
        let value = group_value("csi.example.com", "class");
        assert!(
            value.len() <= 63 && value.starts_with('g') && value.ends_with(|c: char| c.is_ascii_alphanumeric()),
            "{value}"
        );
        assert_ne!(group_value("a", "b"), group_value("a", "c"));
    }
}
