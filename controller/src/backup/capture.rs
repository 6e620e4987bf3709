//! Captures the objects of a namespace and what belongs to them, as files from memory, streamed into the repository.

use std::fmt::Debug;
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
use lifeboat_crds::plan::Scope;
use lifeboat_process::access::AccessError;
use lifeboat_repository::backup::{self, TreeBackup, VirtualFile};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tracing::{debug, info};

use super::Run;
use super::cluster::Gathering;
use super::refusal::Refusal;
use crate::context::Context;
use crate::object::{ResourceName, captured_form, is_captured};
use crate::recovery_point::objects_lineage;
use crate::related::Related;
use crate::scope::{may_select, selects};

/// Objects asked for at once.
const PAGE: u32 = 250;

/// One resource that the API server offers.
pub(crate) struct Offered {
    pub(crate) name: ResourceName,
    pub(crate) api: ApiResource,
    /// Whether its objects lie in no namespace.
    pub(crate) cluster: bool,
}

/// All resources that can be listed, sorted as their folders are.
pub(crate) async fn offered(client: &Client) -> Result<Vec<Offered>> {
    let discovery = Discovery::new(client.clone()).run().await.context("cannot ask the API server what it offers")?;
    let mut all: Vec<_> = discovery
        .groups()
        .flat_map(kube::discovery::ApiGroup::recommended_resources)
        .filter(|(_, capabilities)| capabilities.supports_operation(verbs::LIST))
        .map(|(api, capabilities)| Offered {
            name: ResourceName { plural: api.plural.clone(), group: api.group.clone() },
            api,
            cluster: capabilities.scope == ApiScope::Cluster,
        })
        .collect();
    all.sort_by_key(|offered| offered.name.folder());
    all.dedup_by_key(|offered| offered.name.folder());
    Ok(all)
}

/// Gives every object to `each`, page by page.
pub(crate) async fn each_object<K: Clone + Debug + DeserializeOwned>(
    api: &Api<K>,
    mut each: impl FnMut(K) -> Result<(), kube::Error>,
) -> Result<(), kube::Error> {
    let mut list = ListParams::default().limit(PAGE);
    loop {
        let page = match api.list(&list).await {
            Ok(page) => page,
            // Some aggregated servers offer what they cannot list, and a CRD may go in between.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 405) => return Ok(()),
            Err(error) => return Err(error),
        };
        page.items.into_iter().try_for_each(&mut each)?;
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => list = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// The object as JSON with its version and kind, which lists leave to the list itself.
pub(super) fn with_types(mut object: DynamicObject, of: &Offered) -> Result<Value, kube::Error> {
    let types = kube::core::TypeMeta { api_version: of.api.api_version.clone(), kind: of.api.kind.clone() };
    object.types = Some(types);
    serde_json::to_value(&object).map_err(kube::Error::SerdeError)
}

/// A captured object as a file, in a folder of its own or in that of its resource.
pub(super) fn file(folder: Option<&str>, of: &Offered, name: &str, object: &Value) -> Result<VirtualFile, kube::Error> {
    let path = format!("{}/{}/{name}.json", of.name.folder(), of.api.version);
    let path = folder.map_or(path.clone(), |folder| format!("{folder}/{path}"));
    let bytes = serde_json::to_vec_pretty(object).map_err(kube::Error::SerdeError)?.into();
    // The time of the capture would make every object look changed.
    Ok(VirtualFile { path, bytes, mtime: jiff::Timestamp::UNIX_EPOCH })
}

/// The captured objects of one resource of the namespace, sorted by name.
async fn objects(
    client: &Client,
    namespace: &str,
    offered: &Offered,
    scope: &Scope,
    related: &mut Related,
) -> Result<Vec<VirtualFile>, kube::Error> {
    let api = Api::namespaced_with(client.clone(), namespace, &offered.api);
    let mut captured = Vec::new();
    each_object(&api, |object: DynamicObject| {
        let name = object.name_any();
        if !selects(scope, &offered.name, &name, object.labels()) {
            return Ok(());
        }
        let json = with_types(object, offered)?;
        if is_captured(&offered.name, &json) {
            related.note(&offered.name, &json);
            captured.push((name.clone(), file(None, offered, &name, &captured_form(json))?));
        }
        Ok(())
    })
    .await?;
    captured.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(captured.into_iter().map(|(_, file)| file).collect())
}

/// The files of all objects in scope; resources that cannot be listed go into `errors`.
fn files(
    client: Client,
    reader: Option<Client>,
    namespace: String,
    scope: Scope,
    found: Arc<std::sync::Mutex<ObjectsStatus>>,
) -> impl Stream<Item = Result<VirtualFile, anyhow::Error>> + Send {
    let note = move |change: &dyn Fn(&mut ObjectsStatus)| {
        change(&mut found.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    };
    try_stream! {
        let all = offered(&client).await?;
        let mut related = Related::of(&namespace);
        for offered in all.iter().filter(|one| !one.cluster && may_select(&scope, &one.name)) {
            match objects(&client, &namespace, offered, &scope, &mut related).await {
                Ok(files) => {
                    for file in files {
                        note(&|status| status.count += 1);
                        yield file;
                    }
                }
                Err(error) => {
                    let what = offered.name.qualified();
                    debug!(resource = what, %error, "not listed");
                    note(&|status| status.errors.push(format!("{what}: {error}")));
                }
            }
        }
        let cluster = scope.cluster_resources.clone().unwrap_or_default();
        let (files, errors) = Gathering::new(&client, reader.as_ref(), &all, cluster).gather(related).await;
        note(&|status| status.errors.extend(errors.iter().cloned()));
        for file in files {
            note(&|status| status.cluster_scoped += 1);
            yield file;
        }
    }
}

/// The client that reads what the scope includes from outside of the namespace, if it includes anything.
async fn reader(run: &Run, context: &Context, scope: &Scope) -> Result<Result<Option<Client>, Refusal>> {
    match scope.cluster_resources.as_ref().and_then(|cluster| cluster.read_as.as_ref()) {
        Some(account) => Ok(context.acting_as(&run.namespace, account).await?.map(Some)),
        None => Ok(Ok(None)),
    }
}

/// Captures the objects and writes down what was captured.
pub(super) async fn capture(run: &mut Run, context: &Context) -> Result<()> {
    let plan = run.status.plan.clone().context("no plan is pinned")?;
    let repository = match run.open_repository(context).await? {
        Ok(repository) => repository,
        Err(error) => return run.fail(context, error.reason, error.message).await,
    };
    let reader = match reader(run, context, &plan.scope).await? {
        Ok(reader) => reader,
        Err(refusal) => return run.fail(context, refusal.reason, refusal.message).await,
    };
    let cluster = context.cluster().await?;
    // The namespace's own labels decide about much, so its existence is checked before anything is captured.
    Api::<Namespace>::all(context.client.clone()).get(&run.namespace).await.context("cannot read the namespace")?;
    let lineage = objects_lineage(cluster, &run.namespace);
    let found = Arc::new(std::sync::Mutex::new(ObjectsStatus::default()));
    let files = files(context.client.clone(), reader, run.namespace.clone(), plan.scope, Arc::clone(&found));
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
    info!(objects = objects.count, cluster_scoped = objects.cluster_scoped, "objects are captured");
    objects.snapshot = Some(report.snapshot.id.to_string());
    run.status.objects = Some(objects);
    run.status.stored_bytes = Some(report.snapshot.stats.stored_bytes);
    run.save(context).await
}
