//! Forgets the recovery point of a `Backup` that is deleted and whose `deletionPolicy` says so.

use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use lifeboat_crds::cluster_repository::Mode;
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::{ClusterRepository, labels};
use lifeboat_process::access::AccessError;
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::snapshot::{Content, Snapshot};
use tracing::info;

use super::{Run, set_finalizer};
use crate::context::Context;
use crate::recovery_point::tags;

/// A repository that cannot be reached is asked again after this.
const PAUSE: Duration = Duration::from_secs(30);

/// The recovery point that the status names, if this very backup made it: a status is no proof.
fn own_point(snapshots: &[Snapshot], run: &Run) -> Option<SnapshotId> {
    let named = run.status.recovery_point.as_ref()?;
    let has = |snapshot: &Snapshot, tag: &str, wanted: &String| snapshot.tags.get(tag) == Some(wanted);
    let found = snapshots.iter().find(|snapshot| snapshot.id.to_string() == *named)?;
    let is_own = matches!(found.content, Content::RecoveryPoint { .. })
        && has(found, tags::NAMESPACE, &run.namespace)
        && has(found, tags::BACKUP_UID, &run.uid);
    is_own.then_some(found.id)
}

/// Why the data stays although the object goes, if it does.
async fn stays(run: &Run, context: &Context) -> Result<Option<&'static str>> {
    let namespace = Api::<Namespace>::all(context.client.clone()).get_opt(&run.namespace).await;
    let namespace = namespace.context("cannot read the namespace")?;
    if namespace.is_none_or(|namespace| namespace.metadata.deletion_timestamp.is_some()) {
        return Ok(Some("the namespace is being deleted"));
    }
    let Some(pinned) = run.status.repository.as_ref().filter(|_| run.status.recovery_point.is_some()) else {
        return Ok(Some("it has no recovery point"));
    };
    let repositories: Api<ClusterRepository> = Api::all(context.client.clone());
    Ok(match repositories.get_opt(&pinned.name).await.context("cannot read the ClusterRepository")? {
        None => Some("its ClusterRepository was deleted"),
        Some(found) if found.spec.mode == Mode::ReadOnly => Some("its ClusterRepository is in mode ReadOnly"),
        Some(_) => None,
    })
}

/// Forgets the recovery point, then lets the object go. `Some`: not yet; try again after this.
pub(super) async fn erase(run: &mut Run, context: &Context) -> Result<Option<Duration>> {
    if let Some(why) = stays(run, context).await? {
        info!(why, "the data stays in the repository");
    } else if let Err(error) = forget(run, context).await? {
        let note = format!("the recovery point is still to be removed: {}", error.message);
        context.events.warning(&run.backup, error.reason, note).await;
        return Ok(Some(PAUSE));
    }
    run.backup = set_finalizer(&run.backup, context, labels::DATA_FINALIZER, false).await?;
    Ok(None)
}

async fn forget(run: &Run, context: &Context) -> Result<Result<(), AccessError>> {
    let repository = match run.open_repository(context).await? {
        Ok(repository) => repository,
        Err(error) => return Ok(Err(error)),
    };
    let snapshots = match repository.snapshots().await {
        Ok(snapshots) => snapshots,
        Err(error) => return Ok(Err(AccessError::from_repository(&error))),
    };
    let Some(point) = own_point(&snapshots, run) else { return Ok(Ok(())) };
    if let Err(error) = repository.forget(&[point]).await {
        return Ok(Err(AccessError::from_repository(&error)));
    }
    context.events.normal(&run.backup, Reason::Expired, format!("the recovery point {point} is removed")).await;
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use lifeboat_repository::id::SessionId;
    use lifeboat_repository::snapshot::{Counts, WriteStats};
    use serde_json::{Value, json};

    #[test]
    fn nobody_removes_the_recovery_point_of_another_by_a_forged_status() {
        let point = |namespace: &str, uid: &str| Snapshot {
            id: SnapshotId::random(),
            session: SessionId::random(),
            time: Timestamp::UNIX_EPOCH,
            lineage: "l".into(),
            tags: [(tags::NAMESPACE, namespace), (tags::BACKUP_UID, uid)]
                .into_iter()
                .map(|(tag, value)| (tag.to_owned(), value.to_owned()))
                .collect(),
            host: String::new(),
            parent: None,
            content: Content::RecoveryPoint { members: vec![], description: Value::Null },
            counts: Counts::default(),
            stats: WriteStats::default(),
        };
        let all = [point("shop", "mine"), point("bank", "mine"), point("shop", "other")];
        let found = |snapshot: &Snapshot| {
            let object = json!({
                "apiVersion": "lifeboat.dev/v1alpha1", "kind": "Backup",
                "metadata": {"name": "b", "namespace": "shop", "uid": "mine"}, "spec": {"policyRef": {"name": "p"}},
                "status": {"recoveryPoint": snapshot.id.to_string()}
            });
            own_point(&all, &Run::new(serde_json::from_value(object).unwrap()))
        };
        assert_eq!(found(&all[0]), Some(all[0].id));
        assert_eq!((found(&all[1]), found(&all[2])), (None, None));
    }
}
