//! Wakes a step that waits for another process as soon as that has changed an object.
//!
//! A signal and nothing more: whoever waits reads the objects anew, and looks by himself too, since a watch may be interrupted.

use std::fmt::Debug;
use std::sync::OnceLock;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use lifeboat_crds::QuiesceLease;
use lifeboat_process::reconnect;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::debug;

use crate::storage;

/// Watches that are opened when they are first asked for and stay open.
pub(crate) struct Watches {
    client: Client,
    /// The namespace that Lifeboat is installed in.
    namespace: String,
    leases: OnceLock<Signal>,
    contents: OnceLock<Signal>,
    exposures: OnceLock<Signal>,
}

impl Watches {
    pub(crate) fn new(client: Client, namespace: String) -> Self {
        let (leases, contents, exposures) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self { client, namespace, leases, contents, exposures }
    }

    /// Changes of `QuiesceLease`s.
    pub(crate) fn leases(&self) -> Changes {
        self.leases.get_or_init(|| Signal::silent().on(self.names::<QuiesceLease>())).changes()
    }

    /// Changes of the snapshots that the storage made.
    pub(crate) fn contents(&self) -> Changes {
        self.contents.get_or_init(|| Signal::silent().on(storage::contents(&self.client))).changes()
    }

    /// Changes of what makes snapshots readable: snapshots, claims and pods.
    pub(crate) fn exposures(&self) -> Changes {
        let open = || {
            Signal::silent()
                .on(storage::snapshots(&self.client, &self.namespace))
                .on(self.names::<PersistentVolumeClaim>())
                .on(self.names::<Pod>())
        };
        self.exposures.get_or_init(open).changes()
    }

    /// Objects of Lifeboat's namespace without their content.
    fn names<K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>>(&self) -> Api<PartialObjectMeta<K>> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}

/// Follows kinds for as long as this process lives; nothing of the objects is kept.
struct Signal(watch::Sender<()>);

impl Signal {
    fn silent() -> Self {
        Self(watch::channel(()).0)
    }

    fn on<K>(self, api: Api<K>) -> Self
    where
        K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
        K::DynamicType: Clone,
    {
        let teller = self.0.clone();
        tokio::spawn(async move {
            let mut events = std::pin::pin!(
                watcher(api, watcher::Config::default()).backoff(reconnect::backoff(reconnect::LONGEST))
            );
            while let Some(event) = events.next().await {
                match event {
                    Ok(_) => {
                        teller.send_replace(());
                    }
                    Err(error) => debug!(%error, "a watch was interrupted; it is opened again"),
                }
            }
        });
        self
    }

    fn changes(&self) -> Changes {
        Changes(self.0.subscribe())
    }
}

/// Changes since these were last waited for.
pub(crate) struct Changes(watch::Receiver<()>);

impl Changes {
    /// Returns when something has changed since the last call: not within `at_least`, for which a burst is gathered, and `at_most`
    /// after this call.
    pub(crate) async fn next(&mut self, at_least: Duration, at_most: Duration) {
        tokio::time::sleep(at_least).await;
        let changed = async {
            // Nobody is left to tell of changes: then the time alone counts.
            if self.0.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let _ = tokio::time::timeout(at_most.saturating_sub(at_least), changed).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_wakes_even_if_it_came_before_the_wait_and_time_does_without_one() {
        let (teller, receiver) = watch::channel(());
        let mut changes = Changes(receiver);
        let (short, long) = (Duration::from_millis(5), Duration::from_secs(1));
        teller.send_replace(());
        let began = Instant::now();
        changes.next(short, long).await;
        assert_eq!(began.elapsed(), short);
        changes.next(short, long).await;
        assert_eq!(began.elapsed(), short + long, "the change was told once");
        drop(teller);
        changes.next(short, long).await;
        assert_eq!(began.elapsed(), short + 2 * long, "without a teller it does not spin");
    }
}
