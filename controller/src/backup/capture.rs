//! Captures the objects of a namespace, as files from memory, streamed into the repository.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use async_stream::try_stream;
use futures::Stream;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DynamicObject, ListParams};
use kube::core::discovery::{ApiResource, Scope as ApiScope, verbs};
use kube::discovery::Discovery;
use kube::{Api, Client, ResourceExt};
use lifeboat_crds::backup::ObjectsStatus;
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::plan::{Scope, selector_matches};
use lifeboat_process::access::AccessError;
use lifeboat_repository::backup::{self, TreeBackup, VirtualFile};
use tracing::{debug, info};

use super::Run;
use crate::context::Context;
use crate::object::{ResourceName, captured_form, is_captured, is_captured_resource};
use crate::recovery_point::objects_lineage;

/// Objects asked for at once.
const PAGE: u32 = 250;

/// One resource that the API server offers.
pub(crate) struct Offered {
    pub(crate) name: ResourceName,
    pub(crate) api: ApiResource,
}

/// All namespaced resources that can be listed, sorted as their folders are.
pub(crate) async fn offered(client: &Client) -> Result<Vec<Offered>> {
    let discovery = Discovery::new(client.clone()).run().await.context("cannot ask the API server what it offers")?;
    let mut all: Vec<_> = discovery
        .groups()
        .flat_map(kube::discovery::ApiGroup::recommended_resources)
        .filter(|(_, capabilities)| {
            capabilities.scope == ApiScope::Namespaced && capabilities.supports_operation(verbs::LIST)
        })
        .map(|(api, _)| Offered { name: ResourceName { plural: api.plural.clone(), group: api.group.clone() }, api })
        .collect();
    all.sort_by_key(|offered| offered.name.folder());
    all.dedup_by_key(|offered| offered.name.folder());
    Ok(all)
}

fn is_in_scope(scope: &Scope, resource: &ResourceName) -> bool {
    let meant = |words: &Vec<String>| words.iter().any(|word| resource.is_meant_by(word));
    is_captured_resource(resource)
        && scope.include_resources.as_ref().is_none_or(meant)
        && !scope.exclude_resources.as_ref().is_some_and(meant)
}

/// The captured objects of one resource, sorted by name.
async fn objects(
    client: &Client,
    namespace: &str,
    offered: &Offered,
    scope: &Scope,
) -> Result<Vec<(String, Vec<u8>)>, kube::Error> {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &offered.api);
    let mut captured = Vec::new();
    let mut list = ListParams::default().limit(PAGE);
    loop {
        let page = match api.list(&list).await {
            Ok(page) => page,
            // Some aggregated servers offer what they cannot list, and a CRD may go in between.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 405) => return Ok(captured),
            Err(error) => return Err(error),
        };
        for mut object in page.items {
            if !scope.selector.as_ref().is_none_or(|selector| selector_matches(selector, object.labels())) {
                continue;
            }
            // Lists leave kind and version to the list itself.
            object.types = Some(kube::core::TypeMeta {
                api_version: offered.api.api_version.clone(),
                kind: offered.api.kind.clone(),
            });
            let name = object.name_any();
            let json = serde_json::to_value(&object).map_err(kube::Error::SerdeError)?;
            if is_captured(&offered.name, &json) {
                captured
                    .push((name, serde_json::to_vec_pretty(&captured_form(json)).map_err(kube::Error::SerdeError)?));
            }
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => list = ListParams::default().limit(PAGE).continue_token(&token),
            None => break,
        }
    }
    captured.sort();
    Ok(captured)
}

/// The files of all objects in scope; resources that cannot be listed go into `errors`.
fn files(
    client: Client,
    namespace: String,
    scope: Scope,
    found: Arc<std::sync::Mutex<ObjectsStatus>>,
) -> impl Stream<Item = Result<VirtualFile, anyhow::Error>> + Send {
    let note = move |change: &dyn Fn(&mut ObjectsStatus)| {
        change(&mut found.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    };
    try_stream! {
        for offered in offered(&client).await? {
            if !is_in_scope(&scope, &offered.name) {
                continue;
            }
            match objects(&client, &namespace, &offered, &scope).await {
                Ok(objects) => {
                    for (name, json) in objects {
                        note(&|status| status.count += 1);
                        let path = format!("{}/{}/{name}.json", offered.name.folder(), offered.api.version);
                        // The time of the capture would make every object look changed.
                        yield VirtualFile { path, bytes: json.into(), mtime: jiff::Timestamp::UNIX_EPOCH };
                    }
                }
                Err(error) => {
                    let what = offered.name.qualified();
                    debug!(resource = what, %error, "not listed");
                    note(&|status| status.errors.push(format!("{what}: {error}")));
                }
            }
        }
    }
}

/// Captures the objects and writes down what was captured.
pub(super) async fn capture(run: &mut Run, context: &Context) -> Result<()> {
    let plan = run.status.plan.clone().context("no plan is pinned")?;
    let repository = match run.open_repository(context).await? {
        Ok(repository) => repository,
        Err(error) => return run.fail(context, error.reason, error.message).await,
    };
    let cluster = context.cluster().await?;
    // The namespace's own labels decide about much, so its existence is checked before anything is captured.
    Api::<Namespace>::all(context.client.clone()).get(&run.namespace).await.context("cannot read the namespace")?;
    let lineage = objects_lineage(cluster, &run.namespace);
    let found = Arc::new(std::sync::Mutex::new(ObjectsStatus::default()));
    let files = files(context.client.clone(), run.namespace.clone(), plan.scope, Arc::clone(&found));
    let parent = repository.latest_of(&lineage).await;
    let tree = TreeBackup { lineage, tags: run.tags(cluster), parent: parent.ok().flatten(), ..TreeBackup::default() };
    let captured = Box::pin(backup::entries(&repository, files, tree, Arc::default())).await;
    let mut objects = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let report = match captured {
        Ok(report) => report,
        Err(error) => {
            let error = AccessError::from_repository(&error);
            let reason = if error.reason == Reason::InternalError { Reason::CaptureFailed } else { error.reason };
            return run.fail(context, reason, format!("the objects were not captured: {}", error.message)).await;
        }
    };
    if !objects.errors.is_empty() {
        let all = objects.errors.join("; ");
        return run.fail(context, Reason::CaptureFailed, format!("some objects could not be listed: {all}")).await;
    }
    if objects.count == 0 && run.status.volumes.is_empty() {
        let message = "neither an object nor a claim is selected; correct spec.scope";
        return run.fail(context, Reason::NothingSelected, message.to_owned()).await;
    }
    info!(objects = objects.count, "objects are captured");
    objects.snapshot = Some(report.snapshot.id.to_string());
    run.status.objects = Some(objects);
    run.status.stored_bytes = Some(report.snapshot.stats.stored_bytes);
    run.save(context).await
}
