//! Volume tasks: their names, their making, what they say.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::{Api, ResourceExt};
use lifeboat_crds::conditions::{self, ConditionType};
use lifeboat_crds::quiesce_lease::LeasedWorkload;
use lifeboat_crds::volume_task::{MountedVolume, Operation, RepositoryAccess};
use lifeboat_crds::{VolumeTask, VolumeTaskSpec, labels};

/// A running task whose agent was silent for this long has lost it.
const SILENCE: jiff::SignedDuration = jiff::SignedDuration::from_secs(60);
/// A task that no agent took for this long has no agent on its node.
const UNTAKEN: jiff::SignedDuration = jiff::SignedDuration::from_secs(120);

/// The first characters of an owner's UID and a hash: the same names after every restart.
pub(crate) fn name(prefix: char, owner_uid: &str, key: &str) -> String {
    let uid: String = owner_uid.chars().filter(char::is_ascii_alphanumeric).take(10).collect();
    let hash = blake3::hash(key.as_bytes()).to_hex();
    format!("{prefix}-{uid}-{}", &hash[..10])
}

/// A label value from any text: long ones are cut and get a hash.
pub(crate) fn label_value(text: &str) -> String {
    if text.len() <= 63 {
        return text.to_owned();
    }
    let hash = blake3::hash(text.as_bytes()).to_hex();
    format!("{}-{}", text[..text.floor_char_boundary(52)].trim_end_matches(['.', '-']), &hash[..10])
}

/// What a task is made of.
pub(crate) struct Order {
    pub(crate) name: String,
    /// Kind and name of the owner, as `Backup/nightly-1`.
    pub(crate) owner: String,
    pub(crate) owner_uid: String,
    pub(crate) node: String,
    /// None for maintenance and streams.
    pub(crate) volume: Option<MountedVolume>,
    /// For streams alone.
    pub(crate) workload: Option<LeasedWorkload>,
    pub(crate) repository: RepositoryAccess,
    pub(crate) operation: Operation,
    pub(crate) deadline: jiff::Timestamp,
}

/// Makes the task unless it exists.
pub(crate) async fn create(api: &Api<VolumeTask>, order: Order) -> Result<()> {
    let claim = order.volume.as_ref().map(|volume| (labels::CLAIM, label_value(&volume.claim)));
    let marks = [(labels::MANAGED_BY, "lifeboat".to_owned()), (labels::OWNER_UID, order.owner_uid)];
    let task = VolumeTask {
        metadata: ObjectMeta {
            name: Some(order.name.clone()),
            annotations: Some([(labels::OWNER.to_owned(), order.owner)].into()),
            labels: Some(
                marks.into_iter().chain(claim).map(|(key, value)| (key.to_owned(), value)).collect::<BTreeMap<_, _>>(),
            ),
            ..ObjectMeta::default()
        },
        spec: VolumeTaskSpec {
            node_name: order.node,
            volume: order.volume,
            workload: order.workload,
            repository: order.repository,
            operation: order.operation,
            deadline: Time(order.deadline),
        },
        status: None,
    };
    match api.create(&PostParams::default(), &task).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot make the task {}", order.name)),
    }
}

/// The tasks of an owner, by name.
pub(crate) async fn of_owner(api: &Api<VolumeTask>, owner_uid: &str) -> Result<BTreeMap<String, VolumeTask>> {
    let list = ListParams::default().labels(&format!("{}={owner_uid}", labels::OWNER_UID));
    let tasks = api.list(&list).await.context("cannot list volume tasks")?;
    Ok(tasks.into_iter().map(|task| (task.name_any(), task)).collect())
}

/// Deletes the tasks of an owner; running ones are thereby stopped.
pub(crate) async fn delete_of(api: &Api<VolumeTask>, owner_uid: &str) -> Result<()> {
    for name in of_owner(api, owner_uid).await?.into_keys() {
        match api.delete(&name, &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).with_context(|| format!("cannot delete the task {name}")),
        }
    }
    Ok(())
}

/// The owner of a task, if it is of this kind: namespace (none for maintenance) and name.
pub(crate) fn owner(task: &VolumeTask, kind: &str) -> Option<(String, String)> {
    let (found, name) = task.annotations().get(labels::OWNER)?.split_once('/')?;
    let namespace = task.spec.namespace().unwrap_or_default();
    (found == kind).then(|| (namespace.to_owned(), name.to_owned()))
}

/// How a task stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// No agent has taken it yet; for too long when the text is there.
    Waiting(Option<String>),
    /// An agent works; silent for too long when the text is there.
    Running(Option<String>),
    Succeeded,
    /// Reason and message.
    Failed(String, String),
}

/// How the task stands at this time.
pub(crate) fn standing(task: &VolumeTask, now: jiff::Timestamp) -> Standing {
    let node = &task.spec.node_name;
    let Some(status) = &task.status else {
        let waits = task.metadata.creation_timestamp.as_ref().is_some_and(|made| now.duration_since(made.0) > UNTAKEN);
        return Standing::Waiting(waits.then(|| {
            format!(
                "no agent on the node {node} takes the task; see `kubectl -n <lifeboat's namespace> get pods -o wide`"
            )
        }));
    };
    match conditions::get(&status.conditions, ConditionType::Succeeded) {
        Some(condition) if condition.status == "True" => Standing::Succeeded,
        Some(condition) if condition.status == "False" => {
            Standing::Failed(condition.reason.clone(), condition.message.clone())
        }
        _ => {
            let silent = status.heartbeat_time.as_ref().is_some_and(|beat| now.duration_since(beat.0) > SILENCE);
            Standing::Running(
                silent
                    .then(|| format!("the agent on the node {node} is silent; its successor will take the task over")),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable_and_short() {
        let uid = "0a1b2c3d-4e5f-6789-abcd-ef0123456789";
        assert_eq!(name('b', uid, "claim"), name('b', uid, "claim"));
        assert_ne!(name('b', uid, "claim"), name('b', uid, "other"));
        assert!(name('b', uid, &"x".repeat(500)).len() <= 24);
        assert!(name('b', uid, "claim").starts_with("b-0a1b2c3d4e-"));
    }

    #[test]
    fn labels_fit() {
        assert_eq!(label_value("data"), "data");
        let long = label_value(&"a.".repeat(120));
        assert!(long.len() <= 63 && !long.contains(".-"), "{long}");
    }
}
