//! Retention: forgets in the repository what a policy's `keep` does not hold, and deletes the `Backup` objects of it.
//!
//! The newest recovery point of a policy, and its newest in which nothing is missing, always stay; so does what a restore that has not
//! ended brings back. Only what this namespace of this cluster wrote is looked at. Space comes back by maintenance of the repository.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use lifeboat_crds::backup_policy::RetentionStatus;
use lifeboat_crds::cluster_repository::Mode;
use lifeboat_crds::conditions::{self, Reason};
use lifeboat_crds::plan::Keep;
use lifeboat_crds::{Backup, BackupPolicy, Restore, labels};
use lifeboat_process::access::AccessError;
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::retention::{self, Policy};
use lifeboat_repository::snapshot::{Content, Snapshot};
use serde_json::json;
use tracing::info;

use crate::backup::refusal;
use crate::child::remove;
use crate::context::Context;
use crate::recovery_point::tags;

/// Snapshots of a backup that failed or vanished, without a recovery point, stay for so long.
const ORPHAN_AGE: SignedDuration = SignedDuration::from_hours(24);

/// Why retention did nothing, in the words of a condition.
pub(super) type Refused = (Reason, String);

/// Whether there is anything to decide: a backup ended since the last time, the policy was changed, or a run died half-way.
pub(super) fn is_due(policy: &BackupPolicy, backups: &[Backup]) -> bool {
    if policy.spec.plan.keep().is_none() {
        return false;
    }
    let ended =
        |backup: &Backup| backup.status.as_ref().and_then(|status| status.completion_time.as_ref().map(|time| time.0));
    let newest = backups.iter().filter_map(ended).max();
    let last = policy.status.as_ref().and_then(|status| status.retention.as_ref());
    let is_new = last.is_none_or(|last| {
        Some(last.generation) != policy.metadata.generation || newest.is_some_and(|newest| newest >= last.time.0)
    });
    newest.is_some() && is_new || backups.iter().any(is_expired)
}

fn is_expired(backup: &Backup) -> bool {
    backup.annotations().contains_key(labels::EXPIRED)
}

/// The rules as the repository understands them.
fn rules(keep: &Keep, time_zone: Option<&String>) -> Result<Policy, Refused> {
    let invalid = |message: String| (Reason::InvalidSpec, message);
    let time_zone = match time_zone {
        None => TimeZone::UTC,
        Some(name) => {
            TimeZone::get(name).map_err(|_| (Reason::InvalidTimeZone, format!("there is no time zone `{name}`")))?
        }
    };
    let within = match &keep.within {
        None => None,
        Some(text) => {
            let duration = text.get().map_err(|error| invalid(format!("keep.within: {error}")))?;
            let span = SignedDuration::try_from(duration).and_then(Span::try_from);
            Some(span.map_err(|error| invalid(format!("keep.within: {error}")))?)
        }
    };
    let Keep { last, hourly, daily, weekly, monthly, yearly, within: _ } = *keep;
    Ok(Policy { last, hourly, daily, weekly, monthly, yearly, within, time_zone })
}

/// Whose snapshots are decided about.
struct Scope<'a> {
    cluster: &'a str,
    namespace: &'a str,
    policy: &'a str,
}

impl Scope<'_> {
    fn covers(&self, snapshot: &Snapshot) -> bool {
        let is = |tag: &str, wanted: &str| snapshot.tags.get(tag).is_some_and(|found| found == wanted);
        is(tags::CLUSTER, self.cluster) && is(tags::NAMESPACE, self.namespace) && is(tags::POLICY, self.policy)
    }
}

/// What retention decided.
#[derive(Debug, Default, PartialEq, Eq)]
struct Decision {
    kept: BTreeSet<SnapshotId>,
    /// Recovery points that go.
    going: Vec<SnapshotId>,
    /// Snapshots of backups that never came to a recovery point.
    orphans: Vec<SnapshotId>,
}

/// Decides about everything in the scope. `in_use`: recovery points that are being restored, or are to be.
fn decide(
    snapshots: &[Snapshot],
    scope: &Scope<'_>,
    backups: &[Backup],
    in_use: &BTreeSet<String>,
    rules: &Policy,
    now: Timestamp,
) -> Result<Decision, Refused> {
    let of_scope: BTreeSet<_> = snapshots.iter().filter(|one| scope.covers(one)).map(|one| one.id).collect();
    let points: BTreeSet<_> =
        snapshots.iter().filter(|one| matches!(one.content, Content::RecoveryPoint { .. })).map(|one| one.id).collect();
    let (candidates, single): (Vec<_>, Vec<_>) = retention::candidates(snapshots)
        .into_iter()
        .filter(|candidate| of_scope.contains(&candidate.id))
        .partition(|candidate| points.contains(&candidate.id));
    let verdicts =
        retention::decide(candidates, rules, now).map_err(|error| (Reason::InvalidSpec, error.to_string()))?;
    let mut decision = Decision::default();
    for verdict in verdicts {
        let id = verdict.candidate.id;
        if verdict.is_kept() || in_use.contains(&id.to_string()) {
            decision.kept.insert(id);
        } else {
            decision.going.push(id);
        }
    }
    let uid_of = |id: SnapshotId| {
        snapshots.iter().find(|snapshot| snapshot.id == id).and_then(|snapshot| snapshot.tags.get(tags::BACKUP_UID))
    };
    let has_failed = |backup: &Backup| {
        let status = backup.status.as_ref();
        status.is_some_and(|status| conditions::is_finished(&status.conditions) && status.recovery_point.is_none())
    };
    for orphan in single {
        let owner = backups.iter().find(|backup| backup.uid().as_ref() == uid_of(orphan.id));
        // What may still become a recovery point, or did by a list that is behind, is young.
        let is_left = owner.is_none_or(has_failed) && now.duration_since(orphan.time) > ORPHAN_AGE;
        if is_left {
            decision.orphans.push(orphan.id);
        }
    }
    Ok(decision)
}

/// The backups that go: those of recovery points that go, and those that failed before the oldest that stays.
fn leaving<'a>(backups: &'a [Backup], decision: &Decision, snapshots: &[Snapshot]) -> Vec<&'a Backup> {
    let going: BTreeSet<_> = decision.going.iter().map(ToString::to_string).collect();
    let oldest = snapshots.iter().filter(|one| decision.kept.contains(&one.id)).map(|one| one.time).min();
    let leaves = |backup: &&Backup| {
        let Some(status) = &backup.status else { return false };
        if let Some(point) = &status.recovery_point {
            return going.contains(point);
        }
        let ended = status.completion_time.as_ref().map(|time| time.0);
        conditions::is_finished(&status.conditions) && ended.zip(oldest).is_some_and(|(ended, oldest)| ended < oldest)
    };
    backups.iter().filter(|backup| is_expired(backup) || leaves(backup)).collect()
}

/// Removes what is to go. Every step can be repeated: a run that dies half-way is ended by the next.
pub(super) async fn retain(
    policy: &BackupPolicy,
    backups: &[Backup],
    context: &Context,
) -> Result<Result<RetentionStatus, Refused>> {
    // Before anything is looked at: what ends meanwhile has its turn next time.
    let now = Timestamp::now();
    let (name, namespace) = (policy.name_any(), policy.namespace().unwrap_or_default());
    let (Some(keep), Some(reference)) = (policy.spec.plan.keep(), policy.spec.plan.repository()) else {
        return Ok(Err((Reason::InvalidSpec, "the policy keeps everything".into())));
    };
    let rules = match rules(keep, policy.spec.schedule.as_ref().and_then(|schedule| schedule.time_zone.as_ref())) {
        Ok(rules) => rules,
        Err(refused) => return Ok(Err(refused)),
    };
    let object = match refusal::repository(context, &reference.name, &namespace).await? {
        Ok(object) => object,
        Err(refusal) => return Ok(Err((refusal.reason, refusal.message))),
    };
    if object.spec.mode == Mode::ReadOnly {
        return Ok(Err((Reason::RepositoryReadOnly, "the repository is in mode ReadOnly: nothing expires".into())));
    }
    if let Some(message) = refusal::unready_message(&object) {
        return Ok(Err((Reason::RepositoryNotReady, message)));
    }
    let id = object.status.as_ref().and_then(|status| status.id.clone());
    let opened = context.access.open(&object.spec.backend, &object.spec.encryption.secret_ref, id.as_deref()).await;
    let repository = match opened {
        Ok(repository) => repository,
        Err(error) => return Ok(Err((error.reason, error.message))),
    };
    let snapshots = match repository.snapshots().await {
        Ok(snapshots) => snapshots,
        Err(error) => return Ok(Err(refused(AccessError::from_repository(&error)))),
    };
    let scope = Scope { cluster: context.cluster().await?, namespace: &namespace, policy: &name };
    let in_use = in_use(context, &namespace).await?;
    let decision = match decide(&snapshots, &scope, backups, &in_use, &rules, now) {
        Ok(decision) => decision,
        Err(refused) => return Ok(Err(refused)),
    };
    let leaving = leaving(backups, &decision, &snapshots);
    let api = context.namespaced::<Backup>(&namespace);
    for backup in leaving.iter().filter(|backup| !is_expired(backup)) {
        mark(&api, backup).await?;
    }
    let all: Vec<_> = decision.going.iter().chain(&decision.orphans).copied().collect();
    if !all.is_empty()
        && let Err(error) = repository.forget(&all).await
    {
        return Ok(Err(refused(AccessError::from_repository(&error))));
    }
    for backup in &leaving {
        info!(namespace, backup = backup.name_any(), "expired");
        remove(&api, backup).await?;
    }
    Ok(Ok(RetentionStatus {
        time: Time(now),
        after_backup: newest_name(backups).unwrap_or_default(),
        generation: policy.metadata.generation.unwrap_or_default(),
        kept: decision.kept.len() as u64,
        removed: decision.going.len() as u64,
    }))
}

fn refused(error: AccessError) -> Refused {
    (error.reason, error.message)
}

fn newest_name(backups: &[Backup]) -> Option<String> {
    let ended = |backup: &Backup| backup.status.as_ref()?.completion_time.as_ref().map(|time| time.0);
    backups.iter().filter_map(|backup| Some((ended(backup)?, backup.name_any()))).max().map(|(_, name)| name)
}

/// Writes down that a backup goes, before its recovery point does.
async fn mark(api: &Api<Backup>, backup: &Backup) -> Result<()> {
    let patch = json!({"metadata": {"uid": backup.uid(), "annotations": {labels::EXPIRED: "true"}}});
    match api.patch(&backup.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error).context("cannot mark a backup as expired"),
    }
}

/// The recovery points that restores of the namespace bring back and that have not ended.
async fn in_use(context: &Context, namespace: &str) -> Result<BTreeSet<String>> {
    let restores = context.namespaced::<Restore>(namespace);
    let restores = restores.list(&ListParams::default()).await.context("cannot list restores")?;
    let runs = restores.into_iter().filter_map(|restore| restore.status);
    Ok(runs
        .filter(|status| !conditions::is_finished(&status.conditions))
        .filter_map(|status| status.recovery_point.map(|point| point.id))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_repository::id::SessionId;
    use lifeboat_repository::snapshot::{Counts, WriteStats};
    use serde_json::Value;

    const SCOPE: Scope<'_> = Scope { cluster: "here", namespace: "shop", policy: "nightly" };

    fn snapshot(at: i64, content: Content, tags: [&str; 4]) -> Snapshot {
        let names = [tags::CLUSTER, tags::NAMESPACE, tags::POLICY, tags::BACKUP_UID];
        Snapshot {
            id: SnapshotId::random(),
            session: SessionId::random(),
            time: Timestamp::from_second(at).unwrap(),
            lineage: "l".into(),
            tags: names.into_iter().zip(tags).map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            host: String::new(),
            parent: None,
            content,
            counts: Counts::default(),
            stats: WriteStats::default(),
        }
    }

    fn point(at: i64, tags: [&str; 4]) -> Snapshot {
        snapshot(at, Content::RecoveryPoint { members: vec![], description: Value::Null }, tags)
    }

    fn tree(at: i64, uid: &str) -> Snapshot {
        snapshot(at, Content::Tree { root: vec![], skipped: vec![] }, ["here", "shop", "nightly", uid])
    }

    fn backup(uid: &str, status: &Value) -> Backup {
        serde_json::from_value(json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "Backup", "metadata": {"name": uid, "uid": uid},
            "spec": {"policyRef": {"name": "nightly"}}, "status": status
        }))
        .unwrap()
    }

    fn ended(point: Option<&Snapshot>, at: &str) -> Value {
        let state = if point.is_some() { "True" } else { "False" };
        json!({
            "recoveryPoint": point.map(|point| point.id.to_string()), "completionTime": at,
            "conditions": [{"type": "Succeeded", "status": state, "reason": "Done", "message": "", "lastTransitionTime": at}]
        })
    }

    fn last(count: u32) -> Policy {
        rules(&Keep { last: Some(count), ..Keep::default() }, None).unwrap()
    }

    fn decided(snapshots: &[Snapshot], backups: &[Backup], in_use: &[&Snapshot], now: i64) -> Decision {
        let in_use = in_use.iter().map(|point| point.id.to_string()).collect();
        decide(snapshots, &SCOPE, backups, &in_use, &last(1), Timestamp::from_second(now).unwrap()).unwrap()
    }

    #[test]
    fn only_what_this_policy_of_this_namespace_and_cluster_made_expires() {
        let mine = |at| point(at, ["here", "shop", "nightly", "u"]);
        let all = [
            mine(1),
            mine(2),
            point(3, ["there", "shop", "nightly", "u"]),
            point(4, ["here", "bank", "nightly", "u"]),
            point(5, ["here", "shop", "hourly", "u"]),
        ];
        let decision = decided(&all, &[], &[], 10);
        assert_eq!((decision.going, decision.kept), (vec![all[0].id], BTreeSet::from([all[1].id])));
        assert_eq!(decided(&all[..1], &[], &[], 10).going, [], "the last one stays");
    }

    #[test]
    fn what_is_being_restored_stays() {
        let mine = |at| point(at, ["here", "shop", "nightly", "u"]);
        let all = [mine(1), mine(2)];
        assert_eq!(decided(&all, &[], &[&all[0]], 10).going, []);
    }

    #[test]
    fn what_failed_backups_left_goes_and_what_running_ones_write_stays() {
        let all =
            [tree(1, "failed"), tree(2, "running"), tree(3, "vanished"), tree(4, "ended"), tree(90_000, "failed")];
        let mut succeeded = ended(None, "2026-01-01T00:00:00Z");
        succeeded["recoveryPoint"] = json!("00");
        let backups = [
            backup("failed", &ended(None, "2026-01-01T00:00:00Z")),
            backup("running", &json!({})),
            backup("ended", &succeeded),
        ];
        assert_eq!(decided(&all, &backups, &[], 90_010).orphans, [all[0].id, all[2].id]);
    }

    #[test]
    fn backups_leave_with_their_recovery_points_and_old_failures_with_them() {
        let mine = |at| point(at, ["here", "shop", "nightly", "u"]);
        let all = [mine(1_767_225_600), mine(1_767_225_700)];
        let decision = decided(&all, &[], &[], 1_767_225_800);
        let backups = [
            backup("going", &ended(Some(&all[0]), "2026-01-01T00:00:00Z")),
            backup("kept", &ended(Some(&all[1]), "2026-01-01T00:01:40Z")),
            backup("failed-before", &ended(None, "2026-01-01T00:00:50Z")),
            backup("failed-after", &ended(None, "2026-01-01T00:03:00Z")),
            backup("running", &json!({})),
        ];
        let names: Vec<_> = leaving(&backups, &decision, &all).into_iter().map(ResourceExt::name_any).collect();
        assert_eq!(names, ["going", "failed-before"]);
    }

    #[test]
    fn retention_runs_after_each_backup_and_ends_what_it_began() {
        let policy = |retention: Value| -> BackupPolicy {
            serde_json::from_value(json!({
                "apiVersion": "lifeboat.dev/v1alpha1", "kind": "BackupPolicy", "metadata": {"name": "nightly", "generation": 1},
                "spec": {"tiers": [{"repository": {"ref": {"name": "r"}, "keep": {"last": 1}}}]}, "status": {"retention": retention}
            }))
            .unwrap()
        };
        let done = |generation: i64| json!({"time": "2026-01-01T00:00:30Z", "afterBackup": "b", "generation": generation, "kept": 1, "removed": 0});
        let before = [backup("b", &ended(None, "2026-01-01T00:00:00Z"))];
        assert!(is_due(&policy(Value::Null), &before) && !is_due(&policy(Value::Null), &[]));
        assert!(!is_due(&policy(done(1)), &before));
        assert!(is_due(&policy(done(0)), &before), "the rules changed");
        assert!(is_due(&policy(done(1)), &[backup("b", &ended(None, "2026-01-01T00:00:30Z"))]));
        let mut marked = before[0].clone();
        marked.metadata.annotations = Some([(labels::EXPIRED.to_owned(), "true".to_owned())].into());
        assert!(is_due(&policy(done(1)), &[marked]));
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        let keep =
            |within: &str| Keep { within: Some(lifeboat_crds::DurationString(within.into())), ..Keep::default() };
        assert!(rules(&keep("36h"), Some(&"Europe/Berlin".to_owned())).is_ok_and(|rules| rules.within.is_some()));
        assert_eq!(rules(&keep("1h"), Some(&"Nowhere/Land".to_owned())).unwrap_err().0, Reason::InvalidTimeZone);
        assert_eq!(rules(&keep("soon"), None).unwrap_err().0, Reason::InvalidSpec);
    }
}
