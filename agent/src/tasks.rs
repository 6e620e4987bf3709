//! Watches this node's tasks: begins them, a bounded number at once, and stops those that are deleted.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use futures::TryStreamExt;
use kube::runtime::{WatchStreamExt, watcher};
use lifeboat_crds::VolumeTask;
use lifeboat_crds::conditions::is_finished;
use lifeboat_crds::volume_task::Operation;
use lifeboat_process::reconnect;
use lifeboat_process::server::Readiness;
use lifeboat_repository::progress::Progress;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::task::Worker;

/// How much is done at once.
#[derive(Clone)]
struct Room {
    volumes: Arc<Semaphore>,
    /// One more place, so that a restore never waits for a long backup.
    restore: Arc<Semaphore>,
    maintenance: Arc<Semaphore>,
}

impl Room {
    fn new(at_once: usize) -> Self {
        let one = || Arc::new(Semaphore::new(1));
        Self { volumes: Arc::new(Semaphore::new(at_once)), restore: one(), maintenance: one() }
    }

    /// Waits for a place, which is free again when the permit is dropped. The semaphores are never closed.
    async fn place(&self, operation: &Operation) -> Result<SemaphorePermit<'_>, AcquireError> {
        match operation {
            Operation::Backup(_) | Operation::Dump(_) => self.volumes.acquire().await,
            Operation::Restore(_) | Operation::Feed(_) => tokio::select! {
                biased;
                place = self.volumes.acquire() => place,
                place = self.restore.acquire() => place,
            },
            Operation::Maintain(_) => self.maintenance.acquire().await,
        }
    }
}

/// Works until the watch fails for good, which it does not.
pub(crate) async fn work(worker: Arc<Worker>, at_once: usize, readiness: Readiness) -> Result<()> {
    let mine = watcher::Config::default().fields(&format!("spec.nodeName={}", worker.node));
    let mut events =
        std::pin::pin!(watcher(worker.tasks.clone(), mine).backoff(reconnect::backoff(reconnect::LONGEST)));
    let room = Room::new(at_once);
    let mut begun: HashMap<String, Arc<Progress>> = HashMap::new();
    let mut running: JoinSet<String> = JoinSet::new();
    loop {
        tokio::select! {
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Apply(task) | watcher::Event::InitApply(task))) => {
                    begin_or_stop(&worker, &room, &mut begun, &mut running, task);
                }
                Ok(Some(watcher::Event::Delete(task))) => stop(&begun, &task),
                Ok(Some(watcher::Event::InitDone)) => readiness.set(true),
                Ok(Some(watcher::Event::Init)) => {}
                Ok(None) => return Ok(()),
                Err(error) => warn!(%error, "the watch of tasks failed; it is tried again"),
            },
            Some(ended) = running.join_next() => match ended {
                Ok(uid) => {
                    begun.remove(&uid);
                }
                Err(error) => warn!(%error, "a task ended unexpectedly"),
            },
        }
    }
}

fn begin_or_stop(
    worker: &Arc<Worker>,
    room: &Room,
    begun: &mut HashMap<String, Arc<Progress>>,
    running: &mut JoinSet<String>,
    task: VolumeTask,
) {
    if task.metadata.deletion_timestamp.is_some() {
        stop(begun, &task);
        return;
    }
    let Some(uid) = task.metadata.uid.clone() else { return };
    let is_done = task.status.as_ref().is_some_and(|status| is_finished(&status.conditions));
    if is_done || begun.contains_key(&uid) {
        return;
    }
    let progress = Arc::new(Progress::default());
    begun.insert(uid.clone(), Arc::clone(&progress));
    let (worker, room) = (Arc::clone(worker), room.clone());
    running.spawn(async move {
        let _place = room.place(&task.spec.operation).await;
        if !progress.is_cancelled() {
            Box::pin(worker.run(task, progress)).await;
        }
        uid
    });
}

fn stop(begun: &HashMap<String, Arc<Progress>>, task: &VolumeTask) {
    if let Some(progress) = task.metadata.uid.as_ref().and_then(|uid| begun.get(uid)) {
        info!(task = task.metadata.name, "the task was deleted; it is stopped");
        progress.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use lifeboat_crds::volume_task::{BackupOperation, MaintainOperation, RestoreOperation};

    #[test]
    fn a_restore_has_a_place_beside_backups_and_maintenance_one_of_its_own() {
        let backup = Operation::Backup(BackupOperation {
            lineage: String::new(),
            tags: std::collections::BTreeMap::new(),
            image: None,
        });
        let restore = Operation::Restore(RestoreOperation { snapshot: String::new() });
        let maintain = Operation::Maintain(MaintainOperation::default());
        let room = Room::new(1);
        let first = room.place(&backup).now_or_never();
        assert!(first.is_some() && room.place(&backup).now_or_never().is_none());
        let second = room.place(&restore).now_or_never();
        assert!(second.is_some() && room.place(&restore).now_or_never().is_none());
        assert!(room.place(&maintain).now_or_never().is_some());
        drop(first);
        assert!(room.place(&restore).now_or_never().is_some());
    }
}
