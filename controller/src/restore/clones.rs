//! Snapshots that a backup left on the storage: a claim that is cloned from one has its data within seconds.
//!
//! Whatever is doubtful about a clone, the repository fills the claim instead.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use kube::ResourceExt;
use kube::api::{DynamicObject, ListParams};
use lifeboat_crds::labels;
use serde_json::{Value, json};

use crate::context::Context;
use crate::storage::{self, GroupKinds, Storage, text};

/// A snapshot in the namespace that can be cloned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    /// The `VolumeSnapshot`'s name.
    pub(super) name: String,
    driver: String,
}

/// The snapshots of a backup that the storage still has, by claim.
pub(super) async fn kept(context: &Context, namespace: &str, backup_uid: &str) -> Result<BTreeMap<String, Kept>> {
    let snapshots = match storage::snapshots(&context.client, namespace).list(&ListParams::default()).await {
        Ok(snapshots) => snapshots.items,
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(BTreeMap::new()),
        Err(error) => return Err(error).context("cannot list snapshots"),
    };
    let mine = ListParams::default().labels(&format!("{}={backup_uid}", labels::OWNER_UID));
    let groups = match GroupKinds::discover(&context.client).await? {
        Some(kinds) => {
            kinds.snapshots(&context.client, namespace).list(&mine).await.context("cannot list group snapshots")?.items
        }
        None => Vec::new(),
    };
    let groups = groups.iter().filter_map(ResourceExt::uid).collect();
    let mut kept = BTreeMap::new();
    for snapshot in snapshots.iter().filter(|snapshot| is_usable(snapshot, backup_uid, &groups)) {
        let bound = text(&snapshot.data, "/status/boundVolumeSnapshotContentName");
        let found =
            storage::contents(&context.client).get_opt(bound).await.context("cannot read a snapshot's content")?;
        let Some(found) = found else { continue };
        let driver = text(&found.data, "/spec/driver").to_owned();
        let claim = text(&snapshot.data, "/spec/source/persistentVolumeClaimName").to_owned();
        kept.insert(claim, Kept { name: snapshot.name_any(), driver });
    }
    Ok(kept)
}

/// Whether a snapshot belongs to the backup, by itself or by its group, and is whole.
fn is_usable(snapshot: &DynamicObject, backup_uid: &str, groups: &BTreeSet<String>) -> bool {
    let is_ours = snapshot.labels().get(labels::OWNER_UID).is_some_and(|uid| uid == backup_uid)
        || snapshot.owner_references().iter().any(|owner| groups.contains(&owner.uid));
    is_ours
        && snapshot.metadata.deletion_timestamp.is_none()
        && storage::is_ready(snapshot)
        && !text(&snapshot.data, "/status/boundVolumeSnapshotContentName").is_empty()
}

/// The snapshot that a captured claim can be cloned from: its storage class must be of the snapshot's driver.
pub(super) fn fitting<'a>(kept: Option<&'a Kept>, claim: &Value, storage: &Storage) -> Option<&'a Kept> {
    let class = text(claim, "/spec/storageClassName");
    kept.filter(|kept| storage.drivers.iter().any(|(name, driver)| name == class && *driver == kept.driver))
}

/// The claim as it is created when it is cloned. It must not be smaller than the snapshot.
pub(super) fn cloned_form(mut claim: Value, snapshot: &DynamicObject) -> Value {
    claim["spec"]["dataSource"] =
        json!({"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": snapshot.name_any()});
    let least = text(&snapshot.data, "/status/restoreSize").to_owned();
    let wanted = text(&claim, "/spec/resources/requests/storage");
    if bytes(&least) > bytes(wanted) {
        claim["spec"]["resources"]["requests"]["storage"] = least.into();
    }
    claim
}

/// A quantity of the Kubernetes API in bytes. Sizes of volumes are whole numbers with or without a suffix.
fn bytes(quantity: &str) -> Option<u128> {
    let digits = quantity.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor: u128 = match &quantity[digits.len()..] {
        "" => 1,
        "k" => 1000,
        "M" => 1000_u128.pow(2),
        "G" => 1000_u128.pow(3),
        "T" => 1000_u128.pow(4),
        "P" => 1000_u128.pow(5),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return None,
    };
    digits.parse::<u128>().ok()?.checked_mul(factor)
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json!(..) as an argument reads better without a borrow
mod tests {
    use super::*;

    fn snapshot(labels: Value, owners: Value, status: Value) -> DynamicObject {
        serde_json::from_value(json!({
            "metadata": {"name": "s", "labels": labels, "ownerReferences": owners}, "status": status
        }))
        .unwrap()
    }

    #[test]
    fn only_whole_snapshots_of_the_backup_are_cloned() {
        let groups = BTreeSet::from(["group".to_owned()]);
        let whole = json!({"readyToUse": true, "boundVolumeSnapshotContentName": "c"});
        let mine = json!({labels::OWNER_UID: "b"});
        let member = json!([{"apiVersion": "v1", "kind": "VolumeGroupSnapshot", "name": "g", "uid": "group"}]);
        for (found, usable) in [
            (snapshot(mine.clone(), json!([]), whole.clone()), true),
            (snapshot(json!({}), member, whole.clone()), true),
            (snapshot(json!({}), json!([]), whole.clone()), false),
            (snapshot(json!({labels::OWNER_UID: "other"}), json!([]), whole), false),
            (
                snapshot(mine.clone(), json!([]), json!({"readyToUse": false, "boundVolumeSnapshotContentName": "c"})),
                false,
            ),
            (snapshot(mine, json!([]), json!({"readyToUse": true})), false),
        ] {
            assert_eq!(is_usable(&found, "b", &groups), usable, "{found:?}");
        }
    }

    #[test]
    fn a_claim_is_cloned_within_its_driver_and_never_smaller_than_the_snapshot() {
        let storage = Storage { drivers: vec![("fast".into(), "d".into())], ..Storage::default() };
        let kept = Kept { name: "s".into(), driver: "d".into() };
        let claim = |class: &str, size: &str| json!({"spec": {"storageClassName": class, "resources": {"requests": {"storage": size}}}});
        assert_eq!(fitting(Some(&kept), &claim("fast", "1Gi"), &storage), Some(&kept));
        assert_eq!(fitting(Some(&kept), &claim("slow", "1Gi"), &storage), None);
        assert_eq!(fitting(None, &claim("fast", "1Gi"), &storage), None);
        let source = snapshot(json!({}), json!([]), json!({"restoreSize": "2Gi"}));
        let size = |wanted: &str| {
            let cloned = cloned_form(claim("fast", wanted), &source);
            assert_eq!(text(&cloned, "/spec/dataSource/name"), "s");
            text(&cloned, "/spec/resources/requests/storage").to_owned()
        };
        assert_eq!(
            (size("1Gi").as_str(), size("3Gi").as_str(), size("2147483648").as_str()),
            ("2Gi", "3Gi", "2147483648")
        );
        assert_eq!((bytes("5M"), bytes("1.5Gi"), bytes("x"), bytes("")), (Some(5_000_000), None, None, None));
    }
}
