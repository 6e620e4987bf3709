//! What all control loops share: the client, the way into repositories, events, metrics.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::Action;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use lifeboat_crds::conditions::Reason;
use lifeboat_process::access::RepositoryAccess;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::OnceCell;
use tracing::warn;

use crate::changes::Watches;
use crate::dispatch::Dispatch;
use crate::metrics::Metrics;
use crate::repository::Looked;

/// Shared by all control loops.
pub(crate) struct Context {
    pub(crate) client: Client,
    /// How the client reaches the API server, for clients with the rights of others.
    pub(crate) config: kube::Config,
    pub(crate) namespace: String,
    pub(crate) image: String,
    pub(crate) image_pull_policy: String,
    pub(crate) image_pull_secrets: Vec<String>,
    pub(crate) dispatch: Dispatch,
    pub(crate) looked: Looked,
    pub(crate) watches: Watches,
    pub(crate) access: RepositoryAccess,
    pub(crate) events: Events,
    pub(crate) metrics: Metrics,
    pub(crate) cluster: OnceCell<String>,
}

/// A reconciliation that failed in a way that a later one may not.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub(crate) struct ReconcileError(#[from] pub(crate) anyhow::Error);

/// After an error of a reconciliation it is tried again this much later.
const ERROR_PAUSE: Duration = Duration::from_secs(5);

/// The error policy of all control loops.
#[allow(clippy::needless_pass_by_value)] // the runtime gives it like this
pub(crate) fn on_error<K: Resource<DynamicType = ()>>(
    object: Arc<K>,
    error: &ReconcileError,
    context: Arc<Context>,
) -> Action {
    context.metrics.reconcile_errors.inc();
    warn!(kind = %K::kind(&()), namespace = object.namespace(), name = object.name_any(), %error, "reconciliation failed; it is tried again");
    Action::requeue(ERROR_PAUSE)
}

impl Context {
    /// The name of this cluster in repositories: the UID of its namespace `kube-system`, which never changes.
    pub(crate) async fn cluster(&self) -> Result<&str> {
        let fetch = async || {
            let namespace = Api::<Namespace>::all(self.client.clone())
                .get("kube-system")
                .await
                .context("cannot read the namespace kube-system")?;
            namespace.uid().context("the namespace kube-system has no UID")
        };
        self.cluster.get_or_try_init(fetch).await.map(String::as_str)
    }

    /// Objects of a kind in a namespace.
    pub(crate) fn namespaced<K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>>(
        &self,
        namespace: &str,
    ) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Replaces the status of exactly this object, and returns the object as it is then.
    pub(crate) async fn write_status<K, S>(&self, object: &K, status: &S) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
        S: Serialize,
    {
        write_status(&self.namespaced::<K>(&object.namespace().unwrap_or_default()), object, status).await
    }
}

/// Replaces the status of exactly this object, and returns the object as it is then.
///
/// Another one of the same name has another UID and is left alone.
pub(crate) async fn write_status<K, S>(api: &Api<K>, object: &K, status: &S) -> Result<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    S: Serialize,
{
    let name = object.name_any();
    let patch = serde_json::json!({"metadata": {"uid": object.uid()}, "status": status});
    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .with_context(|| format!("cannot write the status of {} {name}", K::kind(&())))
}

/// Publishes events.
pub(crate) struct Events(Recorder);

impl Events {
    pub(crate) fn new(client: Client, pod: &str) -> Self {
        Self(Recorder::new(
            client,
            Reporter { controller: "lifeboat-controller".into(), instance: Some(pod.to_owned()) },
        ))
    }

    /// Something that went as it should.
    pub(crate) async fn normal<K: Resource<DynamicType = ()>>(
        &self,
        object: &K,
        reason: Reason,
        note: impl Into<String>,
    ) {
        self.publish(object, EventType::Normal, reason, note.into()).await;
    }

    /// Something that a person should look at.
    pub(crate) async fn warning<K: Resource<DynamicType = ()>>(
        &self,
        object: &K,
        reason: Reason,
        note: impl Into<String>,
    ) {
        self.publish(object, EventType::Warning, reason, note.into()).await;
    }

    async fn publish<K: Resource<DynamicType = ()>>(
        &self,
        object: &K,
        type_: EventType,
        reason: Reason,
        mut note: String,
    ) {
        // The API server refuses notes of more than 1024 bytes.
        note.truncate(note.floor_char_boundary(1000));
        let event = Event {
            type_,
            reason: reason.as_str().to_owned(),
            note: Some(note),
            action: "Reconcile".into(),
            secondary: None,
        };
        if let Err(error) = self.0.publish(&event, &object.object_ref(&())).await {
            warn!(%error, reason = reason.as_str(), "an event was not published");
        }
    }
}
