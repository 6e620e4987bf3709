//! What a backup covers: the plan, the repository, the claims and the pods that have them mounted.

use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use lifeboat_crds::backup::{Phase, PinnedRepository, VolumeBackupStatus};
use lifeboat_crds::cluster_repository::{AllowedNamespaces, Mode, NamespacesFrom};
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::plan::{BackupPlan, Scope, VolumeMatch, VolumeMethod, selector_matches};
use lifeboat_crds::{BackupPolicy, ClusterRepository};
use tracing::info;

use super::{Run, quiesce};
use crate::context::Context;
use crate::object::ResourceName;
use crate::scope::selects;

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

fn rule_matches(rule: &VolumeMatch, claim: &PersistentVolumeClaim) -> bool {
    let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_ref());
    rule.selector.as_ref().is_none_or(|selector| selector_matches(selector, claim.labels()))
        && rule.storage_class.as_ref().is_none_or(|wanted| class == Some(wanted))
        && rule.names.as_ref().is_none_or(|names| names.contains(&claim.name_any()))
}

fn method(plan: &BackupPlan, claim: &PersistentVolumeClaim) -> VolumeMethod {
    plan.volumes.iter().find(|rule| rule_matches(&rule.matching, claim)).map_or(VolumeMethod::Live, |rule| rule.method)
}

/// Whether the pod runs and will go on, so that its volumes can be read.
pub(crate) fn is_readable(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
        && pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
}

/// Whether the pod has the claim mounted.
fn mounts(pod: &Pod, claim: &str) -> bool {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()).any(|volume| {
        let named = volume.persistent_volume_claim.as_ref().is_some_and(|source| source.claim_name == claim);
        named || (volume.ephemeral.is_some() && format!("{}-{}", pod.name_any(), volume.name) == claim)
    })
}

/// How a claim is read, or why it cannot be.
fn volume(plan: &BackupPlan, claim: &PersistentVolumeClaim, pods: &[Pod]) -> Result<VolumeBackupStatus, Refusal> {
    let name = claim.name_any();
    let method = method(plan, claim);
    let spec = claim.spec.clone().unwrap_or_default();
    let mut status = VolumeBackupStatus {
        claim: name.clone(),
        claim_uid: claim.uid().unwrap_or_default(),
        volume: spec.volume_name.clone(),
        method,
        pod: None,
        pod_uid: None,
        node: None,
        phase: Phase::Pending,
        snapshot: None,
        transfer: None,
        skipped: 0,
        skipped_sample: Vec::new(),
        message: None,
    };
    if method == VolumeMethod::Skip {
        status.phase = Phase::Succeeded;
        status.message = Some("left out by a rule of the plan".into());
        return Ok(status);
    }
    let way_out = "or leave its data out with a rule {match: {names: [..]}, method: Skip}";
    if claim.metadata.deletion_timestamp.is_some() {
        return Err(Refusal::new(
            Reason::VolumeUnavailable,
            format!("the claim {name} is being deleted; wait for it, {way_out}"),
        ));
    }
    if spec.volume_mode.as_deref() == Some("Block") {
        return Err(Refusal::new(
            Reason::VolumeUnsupported,
            format!(
                "the claim {name} is a raw block volume, which the method Live cannot read; leave its data out with a rule of method Skip"
            ),
        ));
    }
    if claim.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Bound") || spec.volume_name.is_none() {
        return Err(Refusal::new(
            Reason::VolumeUnavailable,
            format!("the claim {name} is not bound to a volume; start a pod that uses it, {way_out}"),
        ));
    }
    let mut readers: Vec<_> = pods.iter().filter(|pod| is_readable(pod) && mounts(pod, &name)).collect();
    readers.sort_by_key(|pod| pod.name_any());
    let Some(pod) = readers.first() else {
        return Err(Refusal::new(
            Reason::NoPodForVolume,
            format!(
                "no running pod has the claim {name} mounted, so the method Live has nothing to read; start the pod, {way_out}"
            ),
        ));
    };
    status.pod = Some(pod.name_any());
    status.pod_uid = pod.uid();
    status.node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    Ok(status)
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
    Ok(claims.iter().map(|claim| volume(plan, claim, &pods)).collect())
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
    quiesce::adopt_declared(run, &mut plan, context).await?;
    info!(repository = name, volumes = volumes.len(), "resolved");
    let id = repository.status.and_then(|status| status.id).unwrap_or_default();
    run.status.repository = Some(PinnedRepository { name, id });
    run.status.plan = Some(plan);
    run.status.volumes = volumes;
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

    fn pod(phase: &str, claim: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "db-0", "uid": "p"},
            "spec": {"nodeName": "n1", "containers": [], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]},
            "status": {"phase": phase}
        }))
        .unwrap()
    }

    fn plan(more: Value) -> BackupPlan {
        let mut plan = json!({"tiers": [{"repository": {"ref": {"name": "r"}}}]});
        plan.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(plan).unwrap()
    }

    #[test]
    fn a_mounted_claim_is_read_where_its_pod_runs() {
        let found = volume(
            &plan(json!({})),
            &claim(json!({})),
            &[pod("Pending", "data"), pod("Running", "other"), pod("Running", "data")],
        )
        .unwrap();
        assert_eq!(
            (found.node.as_deref(), found.pod_uid.as_deref(), found.volume.as_deref()),
            (Some("n1"), Some("p"), Some("pv"))
        );
    }

    #[test]
    fn claims_that_cannot_be_read_are_refused_with_the_way_out() {
        let running = [pod("Running", "data")];
        let everything = plan(json!({}));
        for (claim, pods, reason) in [
            (claim(json!({})), &[][..], Reason::NoPodForVolume),
            (claim(json!({})), &[pod("Pending", "data")][..], Reason::NoPodForVolume),
            (claim(json!({"/status": {"phase": "Pending"}})), &running[..], Reason::VolumeUnavailable),
            (
                claim(json!({"/spec": {"volumeName": "pv", "volumeMode": "Block"}})),
                &running[..],
                Reason::VolumeUnsupported,
            ),
        ] {
            let refusal = volume(&everything, &claim, pods).unwrap_err();
            assert_eq!(refusal.reason, reason);
            assert!(refusal.message.contains("data") && refusal.message.contains("Skip"), "{}", refusal.message);
        }
        let skipping = plan(json!({"volumes": [{"match": {"storageClass": "fast"}, "method": "Skip"}]}));
        assert_eq!(volume(&skipping, &claim(json!({})), &[]).unwrap().method, VolumeMethod::Skip);
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
