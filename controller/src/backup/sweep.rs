//! Removes everything that a backup made in the cluster, at every end that a backup can have, and keeps the snapshots that
//! the policy wants kept.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use lifeboat_crds::conditions::{self, ConditionType};
use lifeboat_crds::labels;
use serde_json::json;
use tracing::info;

use super::Run;
use super::cut::group_label;
use crate::child::{force, of_owner, remove};
use crate::context::Context;
use crate::storage::{self, GroupKinds, text};
use crate::task::label_value;

/// A pod that is going for this long is on a node that does not answer.
const PATIENCE: SignedDuration = SignedDuration::from_secs(30);

/// Whether the snapshots stay on the storage: the backup ended well, exists, and its plan says so.
fn are_kept(run: &Run) -> bool {
    run.backup.metadata.deletion_timestamp.is_none()
        && conditions::is_true(&run.status.conditions, ConditionType::Succeeded)
        && run.status.plan.as_ref().is_some_and(|plan| plan.kept_snapshots().is_some())
}

/// Removes what was made. `false`: something is still going.
pub(super) async fn sweep(run: &Run, context: &Context) -> Result<bool> {
    if !run.status.volumes.iter().any(|volume| volume.method.is_snapshot()) {
        return Ok(true);
    }
    if !remove_exposures(run, context).await? {
        return Ok(false);
    }
    unlabel(run, context).await?;
    let kinds = GroupKinds::discover(&context.client).await?;
    let primary = Primary::of(run, kinds, context);
    for snapshot in primary.list(&format!("{}={}", labels::OWNER_UID, run.uid)).await? {
        if are_kept(run) {
            primary.keep(&snapshot).await?;
        } else {
            primary.remove(context, &snapshot).await?;
        }
    }
    retire(run, &primary, context).await?;
    Ok(true)
}

/// Removes what made snapshots readable, in Lifeboat's namespace.
async fn remove_exposures(run: &Run, context: &Context) -> Result<bool> {
    let pods = context.namespaced::<Pod>(&context.namespace);
    for pod in of_owner(&pods, &run.uid).await? {
        let going = pod.metadata.deletion_timestamp.as_ref().map(|since| Timestamp::now().duration_since(since.0));
        if going.is_some_and(|going| going > PATIENCE) {
            force(&pods, &pod).await?;
        } else {
            remove(&pods, &pod).await?;
        }
    }
    let claims = context.namespaced::<PersistentVolumeClaim>(&context.namespace);
    let found = of_owner(&claims, &run.uid).await?;
    for claim in &found {
        remove_claim(context, &claims, claim).await?;
    }
    let snapshots = storage::snapshots(&context.client, &context.namespace);
    let pointers = of_owner(&snapshots, &run.uid).await?;
    for snapshot in &pointers {
        remove(&snapshots, snapshot).await?;
    }
    if !found.is_empty() || !pointers.is_empty() {
        return Ok(false);
    }
    let contents = storage::contents(&context.client);
    let left = of_owner(&contents, &run.uid).await?;
    for content in &left {
        remove(&contents, content).await?;
    }
    Ok(left.is_empty())
}

/// Deletes a claim of ours, and sees to it that its volume goes with it, whatever its storage class says.
pub(super) async fn remove_claim(
    context: &Context,
    claims: &Api<PersistentVolumeClaim>,
    claim: &PersistentVolumeClaim,
) -> Result<()> {
    if claim.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let volumes: Api<PersistentVolume> = Api::all(context.client.clone());
    let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
    let volume = if name.is_empty() { None } else { volumes.get_opt(&name).await.context("cannot read a volume")? };
    let belongs = |volume: &PersistentVolume| {
        let spec = volume.spec.as_ref();
        spec.and_then(|spec| spec.claim_ref.as_ref()).is_some_and(|claimed| claimed.uid == claim.uid())
            && spec.and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref()) != Some("Delete")
    };
    if volume.is_some_and(|volume| belongs(&volume)) {
        let patch = json!({"spec": {"persistentVolumeReclaimPolicy": "Delete"}});
        volumes
            .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .context("cannot have the copy of a snapshot deleted with its claim")?;
    }
    remove(claims, claim).await
}

/// Takes the marks of group snapshots away from the application's claims.
async fn unlabel(run: &Run, context: &Context) -> Result<()> {
    let key = group_label(&run.uid);
    let api = context.namespaced::<PersistentVolumeClaim>(&run.namespace);
    let marked = api.list(&ListParams::default().labels(&key)).await.context("cannot list claims")?;
    for claim in marked {
        let patch = json!({"metadata": {"uid": claim.uid(), "labels": {key.as_str(): null}}});
        match api.patch(&claim.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(error).context("cannot take a mark away from a claim"),
        }
    }
    Ok(())
}

/// The snapshots in the application's namespace, single ones and groups.
struct Primary {
    singles: Api<DynamicObject>,
    groups: Option<(Api<DynamicObject>, Api<DynamicObject>)>,
}

impl Primary {
    fn of(run: &Run, kinds: Option<GroupKinds>, context: &Context) -> Self {
        let client = &context.client;
        let groups = kinds.map(|kinds| (kinds.snapshots(client, &run.namespace), kinds.contents(client)));
        Self { singles: storage::snapshots(client, &run.namespace), groups }
    }

    /// The API of an object of these.
    fn api(&self, snapshot: &DynamicObject) -> &Api<DynamicObject> {
        match &self.groups {
            Some((groups, _)) if is_group(snapshot) => groups,
            _ => &self.singles,
        }
    }

    async fn list(&self, selector: &str) -> Result<Vec<DynamicObject>> {
        let mut all = Vec::new();
        for api in std::iter::once(&self.singles).chain(self.groups.iter().map(|(groups, _)| groups)) {
            match api.list(&ListParams::default().labels(selector)).await {
                Ok(found) => all.extend(found),
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error).context("cannot list snapshots"),
            }
        }
        Ok(all)
    }

    async fn keep(&self, snapshot: &DynamicObject) -> Result<()> {
        if snapshot.labels().contains_key(labels::KEPT) {
            return Ok(());
        }
        patch(
            self.api(snapshot),
            &snapshot.name_any(),
            &json!({"metadata": {"uid": snapshot.uid(), "labels": {labels::KEPT: "true"}}}),
        )
        .await
    }

    /// Removes a snapshot from the storage, whatever its class says about deletion.
    async fn remove(&self, context: &Context, snapshot: &DynamicObject) -> Result<()> {
        let delete = json!({"spec": {"deletionPolicy": "Delete"}});
        let contents = storage::contents(&context.client);
        if let Some((_, group_contents)) = self.groups.as_ref().filter(|_| is_group(snapshot)) {
            let bound = text(&snapshot.data, "/status/boundVolumeGroupSnapshotContentName");
            if !bound.is_empty() {
                patch(group_contents, bound, &delete).await?;
            }
            let all = self.singles.list(&ListParams::default()).await.context("cannot list snapshots")?;
            let of_group = |one: &&DynamicObject| {
                one.owner_references().iter().any(|owner| Some(&owner.uid) == snapshot.uid().as_ref())
            };
            for member in all.iter().filter(of_group) {
                let bound = text(&member.data, "/status/boundVolumeSnapshotContentName");
                if !bound.is_empty() {
                    patch(&contents, bound, &delete).await?;
                }
            }
        } else {
            let bound = text(&snapshot.data, "/status/boundVolumeSnapshotContentName");
            if !bound.is_empty() {
                patch(&contents, bound, &delete).await?;
            }
        }
        remove(self.api(snapshot), snapshot).await
    }
}

fn is_group(snapshot: &DynamicObject) -> bool {
    snapshot.data.pointer("/spec/volumeGroupSnapshotClassName").is_some()
}

/// Changes an object that may be gone.
async fn patch(api: &Api<DynamicObject>, name: &str, patch: &serde_json::Value) -> Result<()> {
    match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot change {name}")),
    }
}

/// Removes kept snapshots of the same policy beyond those of the newest backups that its plan keeps.
async fn retire(run: &Run, primary: &Primary, context: &Context) -> Result<()> {
    let keep = run.status.plan.as_ref().and_then(lifeboat_crds::plan::BackupPlan::kept_snapshots);
    // Backups on demand keep theirs until they are deleted.
    let (Some(keep), Some(policy), true) = (keep, &run.backup.spec.policy_ref, are_kept(run)) else { return Ok(()) };
    let kept = primary.list(&format!("{}={},{}", labels::POLICY, label_value(&policy.name), labels::KEPT)).await?;
    for snapshot in beyond(&kept, keep.last as usize) {
        info!(snapshot = snapshot.name_any(), "a snapshot on the storage has reached its end");
        primary.remove(context, snapshot).await?;
    }
    Ok(())
}

/// The snapshots that belong to none of the newest `last` backups.
fn beyond(kept: &[DynamicObject], last: usize) -> Vec<&DynamicObject> {
    let mut newest: Vec<_> = kept.iter().collect();
    newest.sort_by_key(|one| std::cmp::Reverse(one.creation_timestamp().map(|made| made.0)));
    let mut backups = BTreeSet::new();
    let owner = |one: &DynamicObject| one.labels().get(labels::OWNER_UID).cloned();
    for one in &newest {
        if backups.len() == last {
            break;
        }
        backups.insert(owner(one));
    }
    newest.into_iter().filter(|one| !backups.contains(&owner(one))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_backups_keep_all_their_snapshots() {
        let snapshot = |name: &str, backup: &str, second: u8| -> DynamicObject {
            serde_json::from_value(json!({"metadata": {
                "name": name, "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z"), "labels": {labels::OWNER_UID: backup}
            }}))
            .unwrap()
        };
        let kept = [
            snapshot("a1", "a", 1),
            snapshot("a2", "a", 2),
            snapshot("c1", "c", 9),
            snapshot("b1", "b", 5),
            snapshot("b2", "b", 5),
        ];
        let names = |last| beyond(&kept, last).into_iter().map(ResourceExt::name_any).collect::<Vec<_>>();
        assert_eq!(names(3), Vec::<String>::new());
        assert_eq!(names(2), ["a2", "a1"]);
        assert_eq!(names(1), ["b1", "b2", "a2", "a1"]);
    }
}
