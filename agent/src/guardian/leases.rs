//! Takes the leases of this node, and tells the API server what becomes of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures::TryStreamExt;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use lifeboat_crds::quiesce_lease::{LeaseEnd, LeasePhase};
use lifeboat_crds::{QuiesceLease, QuiesceLeaseStatus};
use lifeboat_process::reconnect;
use lifeboat_process::server::Readiness;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cri::Containers;
use super::keeper::Guardian;

/// Between attempts to write a status.
const AGAIN: Duration = Duration::from_millis(500);
/// The end of a lease is told for this many attempts.
const ATTEMPTS: u32 = 600;
/// Between attempts to open the watch again, up to doubled by chance: the controller waits for 5 s until a lease is taken.
const LONGEST_DEAF: Duration = Duration::from_secs(2);
/// How often it is looked whether what another guardian left is thawed.
const LOOK: Duration = Duration::from_millis(200);

/// The leases that this process has taken or looked at, by UID.
type Known = HashMap<String, CancellationToken>;

/// Takes leases until the watch fails for good, which it does not.
pub(crate) async fn work<C: Containers>(
    guardian: Arc<Guardian<C>>,
    leases: Api<QuiesceLease>,
    node: &str,
    readiness: Readiness,
) -> Result<()> {
    let mine = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut events = std::pin::pin!(watcher(leases.clone(), mine).backoff(reconnect::backoff(LONGEST_DEAF)));
    let mut known = Known::new();
    let mut listed = HashSet::new();
    loop {
        match events.try_next().await {
            Ok(Some(watcher::Event::Init)) => listed.clear(),
            Ok(Some(watcher::Event::InitApply(lease))) => {
                listed.extend(lease.uid());
                look_at(&guardian, &leases, &mut known, lease);
            }
            Ok(Some(watcher::Event::Apply(lease))) => look_at(&guardian, &leases, &mut known, lease),
            Ok(Some(watcher::Event::InitDone)) => {
                // What was deleted while nobody watched is released too.
                known.retain(|uid, released| {
                    let is_there = listed.contains(uid);
                    if !is_there {
                        released.cancel();
                    }
                    is_there
                });
                readiness.set(true);
            }
            Ok(Some(watcher::Event::Delete(lease))) => {
                if let Some(released) = lease.uid().and_then(|uid| known.remove(&uid)) {
                    released.cancel();
                }
            }
            Ok(None) => return Ok(()),
            Err(error) => warn!(%error, "the watch of leases failed; it is tried again"),
        }
    }
}

fn look_at<C: Containers>(
    guardian: &Arc<Guardian<C>>,
    leases: &Api<QuiesceLease>,
    known: &mut Known,
    lease: QuiesceLease,
) {
    let Some(uid) = lease.uid() else { return };
    let is_over = lease.spec.release || lease.metadata.deletion_timestamp.is_some();
    if let Some(released) = known.get(&uid) {
        if is_over {
            released.cancel();
        }
        return;
    }
    let phase = lease.status.as_ref().and_then(|status| status.phase);
    if phase == Some(LeasePhase::Thawed) {
        return;
    }
    let released = CancellationToken::new();
    known.insert(uid, released.clone());
    let (guardian, leases) = (Arc::clone(guardian), leases.clone());
    tokio::spawn(async move {
        match phase {
            None if is_over => tell_unfrozen(&leases, &lease).await,
            None => take(&guardian, &leases, &lease, &released).await,
            Some(_) => tell_lost(&guardian, &leases, &lease).await,
        }
    });
}

async fn take<C: Containers>(
    guardian: &Guardian<C>,
    leases: &Api<QuiesceLease>,
    lease: &QuiesceLease,
    released: &CancellationToken,
) {
    let name = lease.name_any();
    let status = QuiesceLeaseStatus { phase: Some(LeasePhase::Freezing), ..QuiesceLeaseStatus::default() };
    // Said before anything is frozen, so that nobody freezes a second time; only for the lease as it was seen.
    let seen = json!({"metadata": {"uid": lease.uid(), "resourceVersion": lease.resource_version()}, "status": status});
    if let Err(error) = leases.patch_status(&name, &PatchParams::default(), &Patch::Merge(seen)).await {
        warn!(lease = name, %error, "the lease is not taken");
        return;
    }
    let (report, news) = watch::channel(status);
    let keeping = async {
        guardian.keep(&name, &lease.spec, released, &report).await;
        drop(report);
    };
    tokio::join!(keeping, tell(leases, lease, news));
}

/// Writes every status that matters, until the last one is written.
async fn tell(leases: &Api<QuiesceLease>, lease: &QuiesceLease, mut news: watch::Receiver<QuiesceLeaseStatus>) {
    let mut attempts = 0;
    loop {
        let is_last = news.changed().await.is_err();
        loop {
            let status = news.borrow_and_update().clone();
            let is_end = status.phase == Some(LeasePhase::Thawed);
            if is_last && !is_end {
                return;
            }
            if write(leases, lease, &status).await || attempts >= ATTEMPTS {
                if is_end {
                    return;
                }
                break;
            }
            attempts += 1;
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// Whether there is nothing more to write.
async fn write(leases: &Api<QuiesceLease>, lease: &QuiesceLease, status: &QuiesceLeaseStatus) -> bool {
    let patch = json!({"metadata": {"uid": lease.uid()}, "status": status});
    match leases.patch_status(&lease.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => true,
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => true,
        Err(error) => {
            warn!(lease = lease.name_any(), %error, "the state of a lease was not written");
            false
        }
    }
}

async fn end(leases: &Api<QuiesceLease>, lease: &QuiesceLease, end: LeaseEnd, message: &str) {
    let before = lease.status.clone().unwrap_or_default();
    let status = QuiesceLeaseStatus {
        phase: Some(LeasePhase::Thawed),
        end: Some(end),
        message: Some(message.to_owned()),
        ..before
    };
    for _ in 0..ATTEMPTS {
        if write(leases, lease, &status).await {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn tell_unfrozen(leases: &Api<QuiesceLease>, lease: &QuiesceLease) {
    end(leases, lease, LeaseEnd::Failed, "it was released before it was taken").await;
}

/// An earlier guardian had taken it. What it froze is thawed by now, or will be.
async fn tell_lost<C: Containers>(guardian: &Guardian<C>, leases: &Api<QuiesceLease>, lease: &QuiesceLease) {
    let name = lease.name_any();
    while guardian.intents.has(&name) {
        tokio::time::sleep(LOOK).await;
    }
    info!(lease = name, "its guardian died; it is thawed");
    end(leases, lease, LeaseEnd::GuardianLost, "the guardian of its node died while it was at rest").await;
}
