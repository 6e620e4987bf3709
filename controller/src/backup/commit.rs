//! The last step: one recovery point that names all snapshots of the backup. Only then has the backup succeeded.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Api, ResourceExt};
use lifeboat_crds::BackupStatus;
use lifeboat_crds::backup::{Consistency, Phase, VolumeBackupStatus};
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::plan::VolumeMethod;
use lifeboat_process::access::AccessError;
use lifeboat_repository::backup;
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::repository::Repository;
use lifeboat_repository::snapshot::{Content, Counts, Snapshot};
use tracing::{info, warn};

use super::Run;
use crate::context::Context;
use crate::recovery_point::{Description, Stream, Volume, lineage, schema, tags};

impl Run {
    /// The pinned repository, opened.
    pub(super) async fn open_repository(&self, context: &Context) -> Result<Result<Repository, AccessError>> {
        let pinned = self.status.repository.as_ref().context("no repository is pinned")?;
        let api: Api<lifeboat_crds::ClusterRepository> = Api::all(context.client.clone());
        let Some(repository) = api.get_opt(&pinned.name).await.context("cannot read the ClusterRepository")? else {
            let message = format!("the ClusterRepository `{}` was deleted", pinned.name);
            return Ok(Err(AccessError { reason: Reason::RepositoryNotFound, message }));
        };
        let spec = &repository.spec;
        Ok(context.access.open(&spec.backend, &spec.encryption.secret_ref, Some(&pinned.id)).await)
    }
}

/// Raw block volumes that were read live although no command kept their pod at rest: a frozen file system holds no device.
fn unheld(status: &BackupStatus) -> impl Iterator<Item = &VolumeBackupStatus> {
    let is_held = move |volume: &VolumeBackupStatus| {
        let mut workloads = status.quiesce.iter().flat_map(|quiesce| &quiesce.workloads);
        workloads.any(|workload| !workload.container.is_empty() && volume.pod_uid.as_ref() == Some(&workload.pod_uid))
    };
    let is_live = |volume: &&VolumeBackupStatus| volume.block && volume.method == VolumeMethod::Live;
    status.volumes.iter().filter(is_live).filter(move |volume| !is_held(volume))
}

/// Why a freeze did not help, if it did not.
fn useless_freeze(status: &BackupStatus) -> Option<String> {
    let names: Vec<_> = unheld(status).map(|volume| volume.claim.as_str()).collect();
    let was_frozen = conditions::is_true(&status.conditions, ConditionType::Quiesced);
    (was_frozen && !names.is_empty()).then(|| {
        format!(
            "but raw block volumes were read while their pods could write ({}): fsfreeze does not hold them, so write exec, hold or a template for these pods",
            names.join(", ")
        )
    })
}

/// What the content may be relied upon for.
fn consistency(status: &BackupStatus) -> Consistency {
    if conditions::is_true(&status.conditions, ConditionType::Quiesced) && unheld(status).next().is_none() {
        return Consistency::Application;
    }
    let read = || status.volumes.iter().filter(|volume| volume.method != VolumeMethod::Skip);
    let groups: BTreeSet<_> = read().map(|volume| volume.cut.as_ref().map(|cut| (&cut.driver, &cut.class))).collect();
    let are_one_group = read().all(|volume| volume.method == VolumeMethod::Group) && groups.len() == 1;
    if read().next().is_none() || read().any(|volume| !volume.method.is_snapshot()) {
        // Files were read one after the other while the application ran.
        Consistency::None
    } else if are_one_group || read().count() == 1 {
        Consistency::Crash
    } else {
        Consistency::CrashPerVolume
    }
}

fn snapshot_id(text: Option<&String>) -> Result<SnapshotId> {
    text.context("a snapshot is not noted")?.parse().context("a noted snapshot id is malformed")
}

async fn describe(run: &Run, context: &Context) -> Result<Description> {
    let namespace =
        Api::<Namespace>::all(context.client.clone()).get(&run.namespace).await.context("cannot read the namespace")?;
    let mut volumes = Vec::new();
    for volume in run.status.volumes.iter().filter(|volume| volume.method != VolumeMethod::Skip) {
        volumes.push(Volume { claim: volume.claim.clone(), snapshot: snapshot_id(volume.snapshot.as_ref())? });
    }
    let mut streams = Vec::new();
    for stream in &run.status.streams {
        let rules = run.status.plan.iter().flat_map(|plan| &plan.streams);
        let rule = rules.clone().find(|rule| rule.name == stream.name).context("a stream is not in the plan")?;
        streams.push(Stream {
            name: stream.name.clone(),
            snapshot: snapshot_id(stream.snapshot.as_ref())?,
            selector: rule.selector.clone(),
            container: rule.container.clone(),
            restore: rule.restore.clone(),
        });
    }
    Ok(Description {
        schema: schema(&streams),
        cluster: context.cluster().await?.to_owned(),
        namespace: run.namespace.clone(),
        namespace_uid: namespace.uid().unwrap_or_default(),
        backup: run.name.clone(),
        backup_uid: run.uid.clone(),
        policy: run.backup.spec.policy_ref.as_ref().map(|policy| policy.name.clone()),
        consistency: consistency(&run.status),
        freeze_millis: run.status.quiesce.as_ref().and_then(|quiesce| quiesce.freeze_millis),
        objects: snapshot_id(run.status.objects.as_ref().and_then(|objects| objects.snapshot.as_ref()))?,
        volumes,
        streams,
        skipped: run.status.volumes.iter().map(|volume| volume.skipped).sum(),
    })
}

/// The recovery point that an earlier life of this controller committed before it could say so.
fn committed_before(snapshots: &[Snapshot], uid: &str) -> Option<Snapshot> {
    let is_ours = |snapshot: &&Snapshot| {
        matches!(snapshot.content, Content::RecoveryPoint { .. })
            && snapshot.tags.get(tags::BACKUP_UID).is_some_and(|found| found == uid)
    };
    snapshots.iter().find(is_ours).cloned()
}

/// Commits the recovery point and ends the backup well.
pub(super) async fn commit(run: &mut Run, context: &Context) -> Result<()> {
    let repository = match run.open_repository(context).await? {
        Ok(repository) => repository,
        Err(error) => return run.fail(context, error.reason, error.message).await,
    };
    let description = describe(run, context).await?;
    let snapshots = match repository.snapshots().await {
        Ok(snapshots) => snapshots,
        Err(error) => return fail_with(run, context, &AccessError::from_repository(&error)).await,
    };
    let point = if let Some(point) = committed_before(&snapshots, &run.uid) {
        point
    } else {
        let counts = match counts_of(&snapshots, &description) {
            Ok(counts) => counts,
            Err(missing) => {
                let message = format!("the snapshot {missing} is not in the repository any more");
                return run.fail(context, Reason::RepositoryDamaged, message).await;
            }
        };
        let json = serde_json::to_value(&description)?;
        let lineage = lineage(&description.cluster, &run.namespace);
        match backup::recovery_point(&repository, lineage, description.tags(), description.members(), json, counts)
            .await
        {
            Ok(point) => point,
            Err(error) => return fail_with(run, context, &AccessError::from_repository(&error)).await,
        }
    };
    succeed(run, context, &description, &point).await
}

/// What all members contain together; `Err`: the member that does not exist.
fn counts_of(snapshots: &[Snapshot], description: &Description) -> Result<Counts, SnapshotId> {
    let mut counts = Counts::default();
    for member in description.members() {
        let found = snapshots.iter().find(|snapshot| snapshot.id == member).ok_or(member)?;
        counts.files += found.counts.files;
        counts.directories += found.counts.directories;
        counts.others += found.counts.others;
        counts.bytes += found.counts.bytes;
        counts.skipped += found.counts.skipped;
    }
    Ok(counts)
}

/// A list that leaves out a change would have lost it: the owner of the storage should know.
async fn note_wrong_lists(run: &mut Run, context: &Context) {
    let wrong = |volume: &VolumeBackupStatus| {
        let what = volume.block_read.as_ref()?.wrong_list.as_ref()?;
        let driver = volume.cut.as_ref().map(|cut| cut.driver.as_str()).unwrap_or_default();
        Some(format!("of the claim {} by the driver {driver}: {what}", volume.claim))
    };
    let all: Vec<_> = run.status.volumes.iter().filter_map(wrong).collect();
    if all.is_empty() {
        return;
    }
    let message = format!(
        "the list of blocks is wrong, {}; everything was read instead. Earlier backups since the last audit may lack changes: tell the driver's maker, and set auditEvery: 1",
        all.join(", ")
    );
    warn!(message, "a list of blocks is wrong");
    run.set(ConditionType::BlockLists, State::False, Reason::WrongBlockList, message.clone());
    context.events.warning(&run.backup, Reason::WrongBlockList, message).await;
}

async fn fail_with(run: &mut Run, context: &Context, error: &AccessError) -> Result<()> {
    run.fail(context, error.reason, format!("the recovery point was not committed: {}", error.message)).await
}

async fn succeed(run: &mut Run, context: &Context, description: &Description, point: &Snapshot) -> Result<()> {
    let now = Timestamp::now();
    let objects = run.status.stored_bytes.unwrap_or(0);
    let of_streams = run.status.streams.iter().filter_map(|stream| stream.transfer);
    let transfers = || run.status.volumes.iter().filter_map(|volume| volume.transfer).chain(of_streams);
    let (read, stored): (u64, u64) =
        transfers().fold((0, 0), |(read, stored), t| (read + t.read_bytes, stored + t.stored_bytes));
    run.status.read_bytes = Some(read);
    run.status.stored_bytes = Some(objects + stored);
    run.status.consistency = Some(description.consistency);
    run.status.recovery_point = Some(point.id.to_string());
    run.status.completion_time = Some(Time(now));
    run.set(ConditionType::Captured, State::True, Reason::Done, "objects, volumes and streams are in the repository");
    note_wrong_lists(run, context).await;
    let unread: Vec<_> = run.status.volumes.iter().filter(|volume| volume.skipped > 0).collect();
    let (phase, reason, message) = if unread.is_empty() {
        let but = useless_freeze(&run.status).map(|why| format!(", {why}")).unwrap_or_default();
        let message = format!("recovery point {} is committed{but}", point.id);
        (Phase::Succeeded, Reason::Completed, message)
    } else {
        let named: Vec<_> = unread
            .iter()
            .map(|volume| {
                let first =
                    volume.skipped_sample.first().map(|file| format!(", the first: {}: {}", file.path, file.reason));
                format!("{} of {}{}", volume.skipped, volume.claim, first.unwrap_or_default())
            })
            .collect();
        let message =
            format!("recovery point {} is committed, but files could not be read: {}", point.id, named.join("; "));
        (Phase::Partial, Reason::UnreadFiles, message)
    };
    run.status.phase = phase;
    run.set(ConditionType::Succeeded, State::True, reason, message.clone());
    run.save(context).await?;
    info!(recovery_point = %point.id, read, stored, "succeeded");
    context.metrics.backups_succeeded.inc();
    if let Some(start) = &run.status.start_time {
        context.metrics.backup_seconds.observe(now.duration_since(start.0).as_secs_f64());
    }
    if phase == Phase::Partial {
        context.events.warning(&run.backup, reason, message).await;
    } else {
        context.events.normal(&run.backup, reason, message).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn point(uid: &str, content: Content) -> Snapshot {
        Snapshot {
            id: SnapshotId::random(),
            session: lifeboat_repository::id::SessionId::random(),
            time: Timestamp::UNIX_EPOCH,
            lineage: "l".into(),
            tags: BTreeMap::from([(tags::BACKUP_UID.to_owned(), uid.to_owned())]),
            host: String::new(),
            parent: None,
            content,
            counts: Counts::default(),
            stats: lifeboat_repository::snapshot::WriteStats::default(),
        }
    }

    #[test]
    fn an_earlier_commit_is_adopted_and_a_volume_is_not_taken_for_it() {
        let recovery = Content::RecoveryPoint { members: vec![], description: serde_json::Value::Null };
        let tree = Content::Tree { root: vec![], skipped: vec![] };
        let all = [point("mine", tree), point("other", recovery.clone()), point("mine", recovery)];
        assert_eq!(committed_before(&all, "mine").map(|found| found.id), Some(all[2].id));
        assert!(committed_before(&all[..2], "mine").is_none());
    }

    #[test]
    fn the_level_of_consistency_is_what_was_reached_and_never_more() {
        let status = |quiesced: Option<&str>, volumes: &[(&str, &str)]| -> BackupStatus {
            let conditions: Vec<_> = quiesced
                .map(|status| serde_json::json!({"type": "Quiesced", "status": status, "reason": "Done", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}))
                .into_iter()
                .collect();
            let volumes: Vec<_> = volumes
                .iter()
                .map(|(method, driver)| {
                    let cut = serde_json::json!({"driver": driver, "class": "c", "volumeHandle": "v", "storageClass": "s", "size": "1", "readyWithinSeconds": 1});
                    serde_json::json!({"claim": "x", "claimUid": "x", "method": method, "cut": (!driver.is_empty()).then_some(cut)})
                })
                .collect();
            serde_json::from_value(serde_json::json!({"conditions": conditions, "volumes": volumes})).unwrap()
        };
        let group = ("Group", "d");
        for (quiesced, volumes, level) in [
            (Some("True"), &[("Live", ""), ("Snapshot", "d")][..], Consistency::Application),
            (Some("False"), &[group, group], Consistency::Crash),
            (None, &[group, group], Consistency::Crash),
            (None, &[group, group, ("Skip", "")], Consistency::Crash),
            (None, &[("Snapshot", "d")], Consistency::Crash),
            (None, &[("Snapshot", "d"), ("Snapshot", "d")], Consistency::CrashPerVolume),
            (None, &[group, ("Group", "other")], Consistency::CrashPerVolume),
            (None, &[group, ("Snapshot", "d")], Consistency::CrashPerVolume),
            (None, &[group, ("Live", "")], Consistency::None),
            (None, &[("Live", "")], Consistency::None),
            (None, &[], Consistency::None),
        ] {
            assert_eq!(consistency(&status(quiesced, volumes)), level, "{quiesced:?} {volumes:?}");
        }
    }

    #[test]
    fn a_raw_block_volume_that_is_read_live_is_at_rest_only_if_a_command_holds_its_pod() {
        let status = |container: &str, pod: &str, method: &str| -> BackupStatus {
            let quiesced = serde_json::json!({"type": "Quiesced", "status": "True", "reason": "Done", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
            let workload =
                serde_json::json!({"step": 0, "pod": pod, "podUid": pod, "container": container, "frozen": false});
            let volume =
                serde_json::json!({"claim": "disk", "claimUid": "x", "method": method, "block": true, "podUid": "db"});
            let status = serde_json::json!({"conditions": [quiesced], "quiesce": {"workloads": [workload]}, "volumes": [volume]});
            serde_json::from_value(status).unwrap()
        };
        for (container, pod, level) in [
            ("main", "db", Consistency::Application),
            ("", "db", Consistency::None),
            ("main", "another", Consistency::None),
        ] {
            let status = status(container, pod, "Live");
            assert_eq!(consistency(&status), level, "{container} {pod}");
            let why = useless_freeze(&status);
            assert_eq!(why.is_some_and(|why| why.contains("disk")), level == Consistency::None);
        }
        assert_eq!(consistency(&status("", "db", "Snapshot")), Consistency::Application);
    }
}
