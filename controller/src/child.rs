//! Objects that a run makes for itself: made once under names that follow from the run's UID, adopted only from the same
//! run, removed by name or all together.

use std::fmt::Debug;

use anyhow::{Context as _, Result};
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use lifeboat_crds::labels;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::task::label_value;

/// Whom a child belongs to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    /// `Backup` or `Restore`.
    pub(crate) kind: &'static str,
    pub(crate) name: &'a str,
    pub(crate) uid: &'a str,
}

impl Owner<'_> {
    /// The metadata of a child that belongs to a claim.
    pub(crate) fn metadata(&self, name: &str, claim: &str) -> Value {
        json!({
            "name": name,
            "labels": {
                labels::MANAGED_BY: "lifeboat",
                labels::OWNER_UID: self.uid,
                labels::CLAIM: label_value(claim),
            },
            "annotations": {labels::OWNER: format!("{}/{}", self.kind, self.name), labels::CLAIM_NAME: claim},
        })
    }
}

/// Whether the API server lacks the object, or its whole kind.
fn is_absent(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Makes an object, or adopts the one of that name that this run made before. `Err`: why the API server refuses it.
pub(crate) async fn make<K>(api: &Api<K>, object: &K, owner_uid: &str) -> Result<Result<K, String>>
where
    K: Resource + Clone + Debug + DeserializeOwned + Serialize,
{
    let name = object.name_any();
    let is_ours = |found: &K| found.labels().get(labels::OWNER_UID).is_some_and(|uid| uid == owner_uid);
    let in_the_way = || format!("an object {name} that belongs to somebody else is in the way; delete it");
    if let Some(found) = api.get_opt(&name).await.with_context(|| format!("cannot read {name}"))? {
        return Ok(if is_ours(&found) { Ok(found) } else { Err(in_the_way()) });
    }
    match api.create(&PostParams::default(), object).await {
        Ok(made) => Ok(Ok(made)),
        Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 404 | 422) => {
            Ok(Err(status.message.clone()))
        }
        // Another life of this controller was quicker: the next step sees its object.
        Err(error) => Err(error).with_context(|| format!("cannot make {name}")),
    }
}

/// The objects of a run; none when the cluster lacks the kind.
pub(crate) async fn of_owner<K>(api: &Api<K>, owner_uid: &str) -> Result<Vec<K>>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    let list = ListParams::default().labels(&format!("{}={owner_uid}", labels::OWNER_UID));
    match api.list(&list).await {
        Ok(found) => Ok(found.items),
        Err(error) if is_absent(&error) => Ok(Vec::new()),
        Err(error) => Err(error).context("cannot list the objects of a run"),
    }
}

/// Asks for the deletion of exactly this object; one that is gone or going is fine.
pub(crate) async fn remove<K>(api: &Api<K>, object: &K) -> Result<()>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    if object.meta().deletion_timestamp.is_some() {
        return Ok(());
    }
    delete(api, object, DeleteParams::default()).await
}

/// Deletes a pod without waiting for its node, which may be gone for good.
pub(crate) async fn force<K>(api: &Api<K>, object: &K) -> Result<()>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    delete(api, object, DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await
}

async fn delete<K>(api: &Api<K>, object: &K, mut how: DeleteParams) -> Result<()>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    how.preconditions = Some(Preconditions { uid: object.uid(), resource_version: None });
    match api.delete(&object.name_any(), &how).await {
        Ok(_) => Ok(()),
        // Another object of the same name took its place.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot delete {}", object.name_any())),
    }
}
