//! Does one task: opens the repository, reads or writes the volume or the stream, reports.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kube::Api;
use lifeboat_crds::VolumeTask;
use lifeboat_crds::backup::Transfer;
use lifeboat_crds::cluster_repository::CompressionLevel;
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::volume_task::{BackupOperation, DumpOperation, Operation, RestoreOperation, TaskResult};
use lifeboat_process::access::RepositoryAccess;
use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::id::SessionId;
use lifeboat_repository::progress::Progress;
use lifeboat_repository::repository::Repository;
use lifeboat_repository::restore::{self, Existing, RestoreOptions};
use lifeboat_repository::session::{Compression, Session, SessionOptions};
use lifeboat_repository::snapshot::Snapshot;
use tracing::{Instrument, debug, info, info_span, warn};

use crate::device;
use crate::image;
use crate::lists::Lister;
use crate::maintain;
use crate::metrics::Metrics;
use crate::outcome::{Failure, sample};
use crate::report::Reporter;
use crate::stream;
use crate::volume::{self, Mounted};

/// A task is given up after this many attempts, its agents having died in all of them.
const MAX_ATTEMPTS: u32 = 5;
/// How often it is looked whether the volume is still mounted.
const MOUNT_CHECK: Duration = Duration::from_secs(1);
/// Before the next attempt after a failure that may pass: this long times the attempts so far.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// The steps of a task, in order, as [`enter`] logs them. Writing is a restore's, registering and reading a backup's.
pub(crate) const STEPS: [&str; 6] = ["Begin", "Open", "Register", "Read", "Write", "Report"];

/// Says in the log which step begins.
pub(crate) fn enter(step: &'static str) {
    debug_assert!(STEPS.contains(&step), "{step} is not in the list");
    debug!(step, "next");
}

/// What all tasks of this agent share.
pub(crate) struct Worker {
    pub(crate) tasks: Api<VolumeTask>,
    pub(crate) access: RepositoryAccess,
    /// Knows which blocks of a device need not be read.
    pub(crate) lister: Lister,
    /// The UID of this agent's pod.
    pub(crate) agent: String,
    pub(crate) node: String,
    pub(crate) kubelet_dir: PathBuf,
    /// Where the guardian of this node runs commands and opens block devices.
    pub(crate) streams_socket: PathBuf,
    pub(crate) metrics: Metrics,
}

impl Worker {
    /// Does the task and writes how it ended.
    pub(crate) async fn run(&self, task: VolumeTask, progress: Arc<Progress>) {
        let name = task.metadata.name.clone().unwrap_or_default();
        let (volume, workload) = (task.spec.volume.as_ref(), task.spec.workload.as_ref());
        let span = info_span!(
            "task",
            task = name,
            claim = volume.map(|v| &v.claim),
            pod = workload.map(|workload| &workload.pod),
            namespace = task.spec.namespace()
        );
        self.metrics.running.inc();
        self.attempt(task, progress).instrument(span).await;
        self.metrics.running.dec();
    }

    async fn attempt(&self, task: VolumeTask, progress: Arc<Progress>) {
        let mut reporter = Reporter::new(self.tasks.clone(), &task);
        if matches!(task.spec.operation, Operation::Feed(_)) && reporter.status().attempts > 0 {
            let message = "the agent ended while the restore command ran or was about to; nobody knows what the command did, so it is not run again: look, and start another Restore";
            reporter.end(Err(Failure::new(Reason::AgentLost, message))).await;
            return;
        }
        let outcome = loop {
            let before = reporter.status().clone();
            if before.attempts >= MAX_ATTEMPTS {
                let message = format!(
                    "the agents died in all of {MAX_ATTEMPTS} attempts; see the logs and memory limits of the agents"
                );
                reporter.end(Err(Failure::new(Reason::AgentLost, message))).await;
                return;
            }
            enter("Begin");
            if !reporter.begin(&self.agent).await {
                info!("the task was gone before it began");
                return;
            }
            let outcome = self.perform(&task, before.session, &mut reporter, &progress).await;
            match &outcome {
                Err(failure)
                    if failure.may_pass && !progress.is_cancelled() && reporter.status().attempts < MAX_ATTEMPTS =>
                {
                    warn!(reason = failure.reason.as_str(), message = failure.message, "failed; it is tried again");
                    tokio::time::sleep(RETRY_PAUSE * reporter.status().attempts).await;
                }
                _ => break outcome,
            }
        };
        if progress.is_cancelled() && outcome.as_ref().is_err_and(|failure| failure.reason == Reason::Cancelled) {
            // The task was deleted: there is no status to write.
            info!("stopped");
            return;
        }
        match &outcome {
            Ok(result) => {
                info!(
                    snapshot = result.snapshot,
                    read = result.transfer.read_bytes,
                    stored = result.transfer.stored_bytes,
                    "done"
                );
                self.metrics.succeeded.inc();
                self.metrics.read_bytes.inc_by(result.transfer.read_bytes);
                self.metrics.stored_bytes.inc_by(result.transfer.stored_bytes);
                self.metrics.skipped_files.inc_by(result.skipped);
            }
            Err(failure) => {
                warn!(reason = failure.reason.as_str(), message = failure.message, "failed");
                self.metrics.failed.inc();
            }
        }
        enter("Report");
        reporter.end(outcome).await;
    }

    async fn perform(
        &self,
        task: &VolumeTask,
        earlier: Option<String>,
        reporter: &mut Reporter,
        progress: &Arc<Progress>,
    ) -> Result<TaskResult, Failure> {
        let spec = &task.spec;
        let left = spec.deadline.0.duration_since(jiff::Timestamp::now());
        let left = Duration::try_from(left)
            .map_err(|_| Failure::new(Reason::TimedOut, "the task's deadline was over before it began"))?;
        enter("Open");
        let mounted = |volume| volume::find(&self.kubelet_dir, volume).map(|mounted| (volume, mounted));
        let found = spec.volume.as_ref().map(mounted).transpose()?;
        let access = &spec.repository;
        let repository = self.access.open(&access.backend, &access.encryption_secret, Some(&access.id)).await?;
        if let Some(session) = earlier {
            abort_earlier(&repository, &session).await?;
        }
        let Some((volume, mounted)) = found else {
            return self.without_volume(&repository, task, left, reporter, progress).await;
        };
        let device = if mounted.is_block { Some(device::borrow(&self.streams_socket, task).await?) } else { None };
        let work = async {
            match &spec.operation {
                Operation::Backup(operation) => {
                    let repository = (&repository, spec.repository.compression_level);
                    self.back_up(repository, (&mounted, device), operation, reporter, progress).await
                }
                Operation::Restore(operation) => {
                    restore(&repository, (&mounted, device), operation, reporter, progress).await
                }
                Operation::Maintain(_) | Operation::Dump(_) | Operation::Feed(_) => {
                    Err(Failure::new(Reason::InternalError, "the operation works on no volume"))
                }
            }
        };
        let stopped = Arc::new(OnceLock::new());
        let watched = Some((mounted.clone(), volume.pod.clone()));
        let guard = tokio::spawn(guard(watched, left, Arc::clone(progress), Arc::clone(&stopped)));
        // The work is never dropped half-way: it is told to stop, and then decides its session itself.
        let outcome = work.await;
        guard.abort();
        match stopped.get() {
            Some(failure) => Err(failure.clone()),
            None if mounted.is_still_there() => outcome,
            None => Err(volume::VolumeError::PodGone { pod: volume.pod.clone() }.into()),
        }
    }

    /// Maintenance, and streams.
    async fn without_volume(
        &self,
        repository: &Repository,
        task: &VolumeTask,
        left: Duration,
        reporter: &mut Reporter,
        progress: &Arc<Progress>,
    ) -> Result<TaskResult, Failure> {
        let operation = &task.spec.operation;
        if matches!(operation, Operation::Maintain(_)) {
            return maintain::maintain(repository, operation, left, reporter, progress).await;
        }
        let stopped = Arc::new(OnceLock::new());
        let guard = tokio::spawn(guard(None, left, Arc::clone(progress), Arc::clone(&stopped)));
        let outcome = match operation {
            Operation::Dump(operation) => self.dump(repository, task, operation, reporter, progress).await,
            Operation::Feed(operation) => {
                stream::feed(&self.streams_socket, repository, task, operation, reporter, progress).await
            }
            _ => Err(Failure::new(Reason::InternalError, "the operation needs a volume")),
        };
        guard.abort();
        stopped.get().cloned().map_or(outcome, Err)
    }

    async fn dump(
        &self,
        repository: &Repository,
        task: &VolumeTask,
        operation: &DumpOperation,
        reporter: &mut Reporter,
        progress: &Arc<Progress>,
    ) -> Result<TaskResult, Failure> {
        let level = task.spec.repository.compression_level;
        let (plan, session) = self.register((repository, level), &operation.lineage, &operation.tags, reporter).await?;
        let parent = plan.parent.as_ref().map(|parent| parent.id.to_string());
        enter("Read");
        let reporting = tokio::spawn(reporter.clone().keep_reporting(Arc::clone(progress)));
        let shown = Arc::clone(progress);
        let dumped =
            Box::pin(stream::dump(&self.streams_socket, repository, session, task, operation, plan, shown)).await;
        reporting.abort();
        let snapshot = dumped.map_err(|failure| stopped(progress).unwrap_or(failure))?;
        Ok(TaskResult {
            snapshot: snapshot.id.to_string(),
            parent,
            transfer: transfer(&snapshot),
            ..TaskResult::default()
        })
    }

    /// What snapshot is to be made, and a session for it that is noted in the status.
    async fn register(
        &self,
        (repository, level): (&Repository, CompressionLevel),
        lineage: &str,
        tags: &BTreeMap<String, String>,
        reporter: &mut Reporter,
    ) -> Result<(TreeBackup, Arc<Session>), Failure> {
        let parent = repository.latest_of(lineage).await.map_err(|error| Failure::of(&error, Reason::ReadFailed))?;
        enter("Register");
        // The API server takes only levels that exist.
        let compression = Compression::level(level.0).unwrap_or_default();
        let options = SessionOptions { purpose: "backup".to_owned(), host: self.node.clone(), compression };
        let session = repository.begin(options).await.map_err(|error| Failure::of(&error, Reason::ReadFailed))?;
        if let Err(error) = reporter.session(session.id().to_string()).await {
            let message = format!("the session cannot be noted in the task: {error}");
            // The API server may be back soon.
            let failure = Failure { may_pass: true, ..Failure::new(Reason::Unreachable, message) };
            session.abort(&failure.message).await.map_err(|error| Failure::of(&error, Reason::ReadFailed))?;
            return Err(failure);
        }
        let plan = TreeBackup {
            lineage: lineage.to_owned(),
            tags: tags.clone(),
            parent,
            host: self.node.clone(),
            one_file_system: true,
            ..TreeBackup::default()
        };
        Ok((plan, session))
    }

    async fn back_up(
        &self,
        (repository, level): (&Repository, CompressionLevel),
        (mounted, device): (&Mounted, Option<OwnedFd>),
        operation: &BackupOperation,
        reporter: &mut Reporter,
        progress: &Arc<Progress>,
    ) -> Result<TaskResult, Failure> {
        let (plan, session) = self.register((repository, level), &operation.lineage, &operation.tags, reporter).await?;
        let parent = plan.parent.as_ref().map(|parent| parent.id.to_string());
        enter("Read");
        let reporting = tokio::spawn(reporter.clone().keep_reporting(Arc::clone(progress)));
        let read = async {
            if let Some(device) = device {
                let shown = Arc::clone(progress);
                let read = image::back_up(&self.lister, repository, session, device, operation, plan, shown).await;
                return read.map(|(report, block)| (report.snapshot, Vec::new(), Some(block)));
            }
            let report = backup::tree_in(session, repository, &mounted.path, plan, Arc::clone(progress)).await;
            let report = report.map_err(|error| Failure::of(&error, Reason::ReadFailed))?;
            Ok((report.snapshot, report.skipped, None))
        };
        let read = Box::pin(read).await;
        reporting.abort();
        let (snapshot, skipped, block) = read.map_err(|failure| stopped(progress).unwrap_or(failure))?;
        Ok(TaskResult {
            snapshot: snapshot.id.to_string(),
            parent,
            transfer: transfer(&snapshot),
            block,
            skipped: snapshot.counts.skipped,
            skipped_sample: sample(skipped.iter().map(|skipped| (skipped.path.as_slice(), skipped.reason.to_string()))),
            reclaimed: None,
        })
    }
}

/// The figures of a backup.
fn transfer(snapshot: &Snapshot) -> Transfer {
    Transfer {
        files: snapshot.counts.files,
        bytes: snapshot.counts.bytes,
        read_bytes: snapshot.stats.read_bytes,
        new_bytes: snapshot.stats.new_bytes,
        stored_bytes: snapshot.stats.stored_bytes,
        millis: snapshot.stats.duration_ms,
    }
}

/// A predecessor may still run somewhere; after this its session cannot commit.
async fn abort_earlier(repository: &Repository, session: &str) -> Result<(), Failure> {
    let Ok(session) = session.parse::<SessionId>() else { return Ok(()) };
    let outcome = repository
        .abort_session(session, "taken over by another agent")
        .await
        .map_err(|error| Failure::of(&error, Reason::InternalError))?;
    info!(%session, ?outcome, "an earlier attempt was decided");
    Ok(())
}

/// Stops the work when its deadline is over, or the volume of this pod is gone.
async fn guard(
    mounted: Option<(Mounted, String)>,
    left: Duration,
    progress: Arc<Progress>,
    stopped: Arc<OnceLock<Failure>>,
) {
    let end = Instant::now() + left;
    let failure = loop {
        tokio::time::sleep(MOUNT_CHECK).await;
        if Instant::now() >= end {
            break Failure::new(
                Reason::TimedOut,
                "the task did not end by its deadline; it is safe to start another backup",
            );
        }
        if let Some((_, pod)) = mounted.as_ref().filter(|(mounted, _)| !mounted.is_still_there()) {
            break volume::VolumeError::PodGone { pod: pod.clone() }.into();
        }
    };
    stopped.get_or_init(|| failure);
    progress.cancel();
}

/// Why the work was stopped from outside, if it was.
pub(crate) fn stopped(progress: &Progress) -> Option<Failure> {
    progress.is_cancelled().then(|| Failure::new(Reason::Cancelled, "the task was deleted"))
}

async fn restore(
    repository: &Repository,
    (mounted, device): (&Mounted, Option<OwnedFd>),
    operation: &RestoreOperation,
    reporter: &Reporter,
    progress: &Arc<Progress>,
) -> Result<TaskResult, Failure> {
    enter("Write");
    let began = Instant::now();
    let snapshot =
        repository.find(&operation.snapshot).await.map_err(|error| Failure::of(&error, Reason::WriteFailed))?;
    let reporting = tokio::spawn(reporter.clone().keep_reporting(Arc::clone(progress)));
    if let Some(device) = device {
        let restored = restore::image(repository, &snapshot, device, Arc::clone(progress)).await;
        reporting.abort();
        let restored =
            restored.map_err(|error| stopped(progress).unwrap_or_else(|| Failure::of(&error, Reason::WriteFailed)))?;
        let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let transfer =
            Transfer { files: 1, bytes: restored.size, read_bytes: restored.written, millis, ..Transfer::default() };
        return Ok(TaskResult { snapshot: snapshot.id.to_string(), transfer, ..TaskResult::default() });
    }
    // Another attempt may have written a part: the claim was made for this restore and belongs to nobody else.
    let options = RestoreOptions { existing: Existing::Overwrite, owner: true, ..RestoreOptions::default() };
    let report = restore::tree(repository, &snapshot, &mounted.path, options, Arc::clone(progress)).await;
    reporting.abort();
    let report =
        report.map_err(|error| stopped(progress).unwrap_or_else(|| Failure::of(&error, Reason::WriteFailed)))?;
    Ok(TaskResult {
        snapshot: snapshot.id.to_string(),
        parent: None,
        transfer: Transfer {
            files: report.counts.files,
            bytes: report.counts.bytes,
            read_bytes: report.counts.bytes,
            new_bytes: 0,
            stored_bytes: 0,
            millis: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        },
        block: None,
        skipped: report.failed.len() as u64,
        skipped_sample: sample(report.failed.iter().map(|failed| (failed.path.as_slice(), failed.to_string()))),
        reclaimed: None,
    })
}
