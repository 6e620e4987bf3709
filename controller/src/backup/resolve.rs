//! What a backup covers: the plan, the repository, the claims and the pods that have them mounted.

use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use lifeboat_crds::backup::{Phase, PinnedRepository, VolumeBackupStatus};
use lifeboat_crds::cluster_repository::{AllowedNamespaces, Mode, NamespacesFrom};
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::plan::{BackupPlan, Scope, selector_matches};
use lifeboat_crds::{BackupPolicy, ClusterRepository};
use tracing::info;

use super::method::{self, Selected};
use super::{Run, quiesce, streams};
use crate::context::Context;
use crate::object::ResourceName;
use crate::scope::selects;
use crate::storage::Storage;

/// A backup waits this long for a repository that is not ready.
const REPOSITORY_PATIENCE: jiff::SignedDuration = jiff::SignedDuration::from_mins(5);
/// How often it looks meanwhile.
const PAUSE: Duration = Duration::from_secs(5);

/// Why a backup cannot start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// Whether a namespace with these labels may use a repository.
pub(crate) fn is_allowed(allowed: &AllowedNamespaces, namespace: &Namespace) -> bool {
    match allowed.from {
        NamespacesFrom::All => true,
        NamespacesFrom::None => false,
        NamespacesFrom::Selector => {
            allowed.selector.as_ref().is_some_and(|selector| selector_matches(selector, namespace.labels()))
        }
    }
}

/// The repository, if it exists and this namespace may use it.
pub(crate) async fn repository(
    context: &Context,
    name: &str,
    namespace: &str,
) -> Result<Result<ClusterRepository, Refusal>> {
    let repositories: Api<ClusterRepository> = Api::all(context.client.clone());
    let Some(repository) = repositories.get_opt(name).await.context("cannot read the ClusterRepository")? else {
        let message = format!("there is no ClusterRepository `{name}`; create it or correct the name");
        return Ok(Err(Refusal::new(Reason::RepositoryNotFound, message)));
    };
    let found =
        Api::<Namespace>::all(context.client.clone()).get(namespace).await.context("cannot read the namespace")?;
    if !is_allowed(&repository.spec.allowed_namespaces, &found) {
        let message = format!(
            "the ClusterRepository `{name}` does not allow the namespace `{namespace}`; ask its owner to extend allowedNamespaces"
        );
        return Ok(Err(Refusal::new(Reason::NamespaceNotAllowed, message)));
    }
    Ok(Ok(repository))
}

/// What a repository that is not ready says about it.
pub(crate) fn unready_message(repository: &ClusterRepository) -> Option<String> {
    let conditions = repository.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    if conditions::is_true(conditions, ConditionType::Ready) {
        return None;
    }
    let why = conditions::get(conditions, ConditionType::Ready)
        .map_or("it was not looked at yet", |condition| condition.message.as_str());
    Some(format!("the ClusterRepository `{}` is not ready: {why}", repository.name_any()))
}

async fn plan(run: &Run, context: &Context) -> Result<Result<BackupPlan, Refusal>> {
    let spec = &run.backup.spec;
    if let Some(plan) = &spec.plan {
        return Ok(Ok(plan.clone()));
    }
    let name = spec.policy_ref.as_ref().map(|reference| reference.name.clone()).unwrap_or_default();
    let policy = context
        .namespaced::<BackupPolicy>(&run.namespace)
        .get_opt(&name)
        .await
        .context("cannot read the BackupPolicy")?;
    let missing = || {
        Refusal::new(
            Reason::PolicyNotFound,
            format!("there is no BackupPolicy `{name}` in this namespace; create it or correct the name"),
        )
    };
    Ok(policy.map(|policy| policy.spec.plan).ok_or_else(missing))
}

/// Whether a claim is selected by the scope.
fn is_selected(scope: &Scope, claim: &PersistentVolumeClaim) -> bool {
    let resource = ResourceName { plural: "persistentvolumeclaims".into(), group: String::new() };
    selects(scope, &resource, &claim.name_any(), claim.labels())
}

/// Whether the pod runs and will go on, so that its volumes can be read.
pub(crate) fn is_readable(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
        && pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
}

async fn volumes(run: &Run, plan: &BackupPlan, context: &Context) -> Result<Result<Vec<VolumeBackupStatus>, Refusal>> {
    let everything = ListParams::default();
    let claims = context
        .namespaced::<PersistentVolumeClaim>(&run.namespace)
        .list(&everything)
        .await
        .context("cannot list claims")?;
    let pods = context.namespaced::<Pod>(&run.namespace).list(&everything).await.context("cannot list pods")?.items;
    let mut claims: Vec<_> = claims.into_iter().filter(|claim| is_selected(&plan.scope, claim)).collect();
    // Claims of restore pods are Lifeboat's own until the restore has ended.
    claims.retain(|claim| claim.labels().get(crate::object::MANAGED_BY).is_none_or(|by| by != "lifeboat"));
    claims.sort_by_key(ResourceExt::name_any);
    let persistent = Api::<PersistentVolume>::all(context.client.clone());
    let mut selected = Vec::new();
    for claim in claims {
        let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
        let volume = match name {
            Some(name) => persistent.get_opt(&name).await.context("cannot read a persistent volume")?,
            None => None,
        };
        selected.push(Selected { claim, volume });
    }
    if selected.is_empty() {
        return Ok(Ok(Vec::new()));
    }
    let storage = Storage::observe(&context.client).await?;
    Ok(method::choose(plan, &selected, &pods, &storage))
}

/// Pins what the backup covers. `Some`: wait this long and try again.
pub(super) async fn resolve(run: &mut Run, context: &Context) -> Result<Option<Duration>> {
    let mut plan = match plan(run, context).await? {
        Ok(plan) => plan,
        Err(refusal) => return refuse(run, context, refusal).await,
    };
    let name = plan.repository().map(|reference| reference.name.clone()).unwrap_or_default();
    let repository = match repository(context, &name, &run.namespace).await? {
        Ok(repository) => repository,
        Err(refusal) => return refuse(run, context, refusal).await,
    };
    if repository.spec.mode == Mode::ReadOnly {
        let message = format!("the ClusterRepository `{name}` is in mode ReadOnly and takes no backups");
        return refuse(run, context, Refusal::new(Reason::RepositoryReadOnly, message)).await;
    }
    if let Some(message) = unready_message(&repository) {
        return wait_for_repository(run, context, message).await;
    }
    let volumes = match volumes(run, &plan, context).await? {
        Ok(volumes) => volumes,
        Err(refusal) => return refuse(run, context, refusal).await,
    };
    let streams = match streams::resolve(run, &plan, context).await? {
        Ok(streams) => streams,
        Err(refusal) => return refuse(run, context, refusal).await,
    };
    quiesce::adopt_declared(run, &mut plan, context).await?;
    info!(repository = name, volumes = volumes.len(), "resolved");
    let id = repository.status.and_then(|status| status.id).unwrap_or_default();
    run.status.repository = Some(PinnedRepository { name, id });
    run.status.plan = Some(plan);
    run.status.volumes = volumes;
    run.status.streams = streams;
    run.status.start_time = Some(Time(Timestamp::now()));
    run.status.phase = Phase::Running;
    run.set(ConditionType::Resolved, State::True, Reason::Done, "the plan is pinned");
    run.set(ConditionType::Succeeded, State::Unknown, Reason::InProgress, "under way");
    run.save(context).await?;
    Ok(None)
}

async fn refuse(run: &mut Run, context: &Context, refusal: Refusal) -> Result<Option<Duration>> {
    run.set(ConditionType::Resolved, State::False, refusal.reason, refusal.message.clone());
    run.fail(context, refusal.reason, refusal.message).await?;
    Ok(None)
}

async fn wait_for_repository(run: &mut Run, context: &Context, message: String) -> Result<Option<Duration>> {
    let made = run.backup.metadata.creation_timestamp.as_ref().map_or_else(Timestamp::now, |made| made.0);
    if Timestamp::now().duration_since(made) > REPOSITORY_PATIENCE {
        return refuse(run, context, Refusal::new(Reason::RepositoryNotReady, message)).await;
    }
    run.set(ConditionType::Resolved, State::Unknown, Reason::RepositoryNotReady, message);
    run.save(context).await?;
    Ok(Some(PAUSE))
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json!(..) as an argument reads better without a borrow
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn claim(change: Value) -> PersistentVolumeClaim {
        let mut claim = json!({
            "metadata": {"name": "data", "uid": "c", "labels": {"app": "db"}},
            "spec": {"volumeName": "pv", "storageClassName": "fast"}, "status": {"phase": "Bound"}
        });
        for (pointer, value) in change.as_object().into_iter().flatten() {
            *claim.pointer_mut(pointer).unwrap() = value.clone();
        }
        serde_json::from_value(claim).unwrap()
    }

    fn plan(more: Value) -> BackupPlan {
        let mut plan = json!({"tiers": [{"repository": {"ref": {"name": "r"}}}]});
        plan.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(plan).unwrap()
    }

    #[test]
    fn the_scope_and_the_repositorys_owner_decide() {
        let selected = |scope: Value| is_selected(&plan(json!({"scope": scope})).scope, &claim(json!({})));
        assert!(selected(json!({})));
        assert!(selected(json!({"selector": {"matchLabels": {"app": "db"}}})));
        assert!(!selected(json!({"selector": {"matchLabels": {"app": "web"}}})));
        assert!(!selected(json!({"excludeResources": ["persistentvolumeclaims"]})));
        assert!(!selected(json!({"includeResources": ["configmaps"]})));
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"team": "a"}}})).unwrap();
        let allowed = |value: Value| is_allowed(&serde_json::from_value(value).unwrap(), &namespace);
        assert!(allowed(json!({"from": "All"})) && !allowed(json!({"from": "None"})));
        assert!(allowed(json!({"from": "Selector", "selector": {"matchLabels": {"team": "a"}}})));
        assert!(!allowed(json!({"from": "Selector", "selector": {"matchLabels": {"team": "b"}}})));
    }
}
