//! Cluster-scoped objects of a recovery point: created where they are missing, with the rights of the `ServiceAccount` that the
//! restore names, or else listed.
//!
//! What exists outside of the namespace is never changed, and nothing there is ever created with Lifeboat's own rights.

use anyhow::{Context as _, Result};
use kube::api::DynamicObject;
use kube::{Api, Client};
use lifeboat_crds::conditions::Reason;
use serde_json::Value;
use tracing::info;

use super::Run;
use super::apply::{Outcome, create, put_all};
use super::claims::captured_objects;
use super::plan::Captured;
use crate::backup::refusal::Refusal;
use crate::context::Context;
use crate::object::{ANSWERING_WAVE, cluster_wave};

/// The client with the rights of the account that the restore names, if it names one.
pub(super) async fn account(run: &Run, context: &Context) -> Result<Result<Option<Client>, Refusal>> {
    match &run.restore.spec.cluster_resources {
        Some(wanted) => Ok(context.acting_as(&run.namespace, &wanted.create_as).await?.map(Some)),
        None => Ok(Ok(None)),
    }
}

/// What an existing object lacks of a captured one, where that matters to the application.
fn lacking(existing: &Value, captured: &Value) -> Option<String> {
    let role = captured.pointer("/roleRef/name")?;
    let has = |object: &Value| object.pointer("/subjects").and_then(Value::as_array).cloned().unwrap_or_default();
    let bound = has(existing);
    let fits =
        existing.pointer("/roleRef/name") == Some(role) && has(captured).iter().all(|subject| bound.contains(subject));
    (!fits).then(|| "exists, but does not give the rights that the captured one gave".to_owned())
}

/// Creates a cluster-scoped object if it is missing and an account is given.
pub(super) async fn put(
    own: &Api<DynamicObject>,
    account: Option<&Api<DynamicObject>>,
    captured: &Captured,
    object: &DynamicObject,
) -> Result<Outcome> {
    let existing = own.get_opt(&captured.name).await.context("cannot look for a cluster-scoped object")?;
    if let Some(existing) = existing {
        let existing = serde_json::to_value(&existing).context("cannot read a cluster-scoped object")?;
        return Ok(lacking(&existing, &captured.object).map_or(Outcome::Present, Outcome::Skipped));
    }
    match account {
        Some(account) => create(account, object).await,
        None => Ok(Outcome::Skipped(
            "is missing in this cluster and was not created, because the restore names no spec.clusterResources.createAs".to_owned(),
        )),
    }
}

/// Creates or lists what has to be there before the namespace's objects, and notes it.
pub(super) async fn prepare(run: &mut Run, context: &Context) -> Result<()> {
    let account = match account(run, context).await? {
        Ok(account) => account,
        Err(refusal) => return run.fail(context, refusal.reason, refusal.message).await,
    };
    let (repository, _) = match run.open_repository(context).await? {
        Ok(opened) => opened,
        Err(error) => return run.fail(context, error.reason, error.message).await,
    };
    let point = run.status.recovery_point.clone().context("no recovery point is pinned")?;
    let mut objects = match captured_objects(&repository, &point.id).await {
        Ok(objects) => objects,
        Err((reason, message)) => return run.fail(context, reason, message).await,
    };
    // Without an account nothing follows later, so all that is missing is listed now.
    let now = |wave| wave < ANSWERING_WAVE || account.is_none();
    objects.retain(|captured| captured.cluster && cluster_wave(&captured.resource).is_some_and(now));
    let counts = put_all(run, context, account.as_ref(), objects).await?;
    info!(created = counts.created, missing = counts.skipped, "cluster-scoped objects are prepared");
    let failed = counts.failed;
    let problems = counts.problems.join("; ");
    run.status.cluster_objects = Some(counts);
    if failed > 0 {
        let message = format!(
            "{failed} cluster-scoped objects were refused, and nothing in the namespace was changed: {problems}"
        );
        return run.fail(context, Reason::ApplyFailed, message).await;
    }
    run.save(context).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_binding_that_does_not_bind_the_application_is_told() {
        let binding = |role: &str, names: &[&str]| {
            let subjects: Vec<_> = names.iter().map(|name| json!({"kind": "ServiceAccount", "name": name})).collect();
            json!({"roleRef": {"name": role}, "subjects": subjects})
        };
        let captured = binding("reader", &["web"]);
        assert_eq!(lacking(&binding("reader", &["other", "web"]), &captured), None);
        assert!(lacking(&binding("reader", &["other"]), &captured).is_some());
        assert!(lacking(&binding("writer", &["web"]), &captured).is_some());
        assert!(lacking(&json!({"roleRef": {"name": "reader"}}), &captured).is_some());
        assert_eq!(lacking(&json!({"spec": 1}), &json!({"spec": 2})), None, "other objects are left to their owners");
    }
}
