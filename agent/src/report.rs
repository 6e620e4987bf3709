//! Writes a task's status: throttled progress, heartbeats, the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::{Patch, PatchParams};
use lifeboat_crds::backup::Phase;
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::volume_task::{Progress as TaskProgress, TaskResult, VolumeTask, VolumeTaskStatus};
use lifeboat_repository::progress::Progress;
use serde_json::json;
use tracing::warn;

use crate::outcome::{Failure, message};

/// Progress is written at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);
/// A status is written at least this often while the task runs.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// The end must be written.
const END_ATTEMPTS: u32 = 30;

/// Writes the status of one task.
#[derive(Clone)]
pub(crate) struct Reporter {
    tasks: Api<VolumeTask>,
    name: String,
    uid: String,
    generation: Option<i64>,
    /// What was written last; this process alone writes it.
    status: VolumeTaskStatus,
}

impl Reporter {
    pub(crate) fn new(tasks: Api<VolumeTask>, task: &VolumeTask) -> Self {
        let metadata = &task.metadata;
        Self {
            tasks,
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            generation: metadata.generation,
            status: task.status.clone().unwrap_or_default(),
        }
    }

    /// The status as it was written last.
    pub(crate) fn status(&self) -> &VolumeTaskStatus {
        &self.status
    }

    async fn write(&self) -> Result<(), kube::Error> {
        // The UID makes the patch fail on another task of the same name.
        let patch = json!({"metadata": {"uid": self.uid}, "status": self.status});
        self.tasks.patch_status(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ())
    }

    fn set(&mut self, state: State, reason: Reason, message: String) {
        let now = jiff::Timestamp::now();
        conditions::set(
            &mut self.status.conditions,
            ConditionType::Succeeded,
            state,
            reason,
            message,
            self.generation,
            now,
        );
    }

    /// Writes until the API server has taken it, which may be away for a while; at most so often. `false`: the task is gone.
    async fn write_persistently(&self, attempts: u32) -> bool {
        for attempt in 1..=attempts {
            match self.write().await {
                Ok(()) => return true,
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return false,
                Err(error) => {
                    warn!(task = self.name, attempt, %error, "the status of a task was not written");
                    tokio::time::sleep(Duration::from_secs(u64::from(attempt.min(10)))).await;
                }
            }
        }
        false
    }

    /// Says that this agent begins, before it touches anything. `false`: the task is gone. Nobody else would begin it, so that
    /// this is tried until it succeeds.
    pub(crate) async fn begin(&mut self, agent: &str) -> bool {
        let now = Time(jiff::Timestamp::now());
        self.status.phase = Phase::Running;
        self.status.agent = Some(agent.to_owned());
        // The session of the attempt before stays named until it is aborted and another takes its place.
        self.status.attempts += 1;
        self.status.start_time.get_or_insert(now.clone());
        self.status.heartbeat_time = Some(now);
        self.set(State::Unknown, Reason::InProgress, "under way".to_owned());
        self.write_persistently(u32::MAX).await
    }

    /// Names the session before anything is written in it, so that a successor can abort it.
    pub(crate) async fn session(&mut self, session: String) -> Result<(), kube::Error> {
        self.status.session = Some(session);
        self.write().await
    }

    /// Writes progress and heartbeats until it is dropped.
    pub(crate) async fn keep_reporting(mut self, progress: Arc<Progress>) {
        let mut last = TaskProgress::default();
        let mut written = Instant::now();
        loop {
            tokio::time::sleep(PROGRESS_INTERVAL).await;
            let now = progress.snapshot();
            let elapsed = written.elapsed();
            let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
            let current = TaskProgress {
                entries_done: now.entries_done,
                bytes_done: now.bytes_done,
                bytes_total: now.bytes_total,
                bytes_per_second: now.bytes_done.saturating_sub(last.bytes_done).saturating_mul(1000) / millis,
            };
            if current.entries_done == last.entries_done
                && current.bytes_done == last.bytes_done
                && elapsed < HEARTBEAT_INTERVAL
            {
                continue;
            }
            self.status.progress = Some(current);
            self.status.heartbeat_time = Some(Time(jiff::Timestamp::now()));
            if let Err(error) = self.write().await {
                warn!(task = self.name, %error, "progress was not written");
                continue;
            }
            last = current;
            written = Instant::now();
        }
    }

    /// Says how the task ended. Tries for minutes: without it the work would be done again.
    pub(crate) async fn end(&mut self, outcome: Result<TaskResult, Failure>) {
        self.status.completion_time = Some(Time(jiff::Timestamp::now()));
        match outcome {
            Ok(result) => {
                let reason = if result.skipped == 0 { Reason::Completed } else { Reason::UnreadFiles };
                self.status.phase = if result.skipped == 0 { Phase::Succeeded } else { Phase::Partial };
                self.set(State::True, reason, message(&result));
                self.status.result = Some(result);
            }
            Err(failure) => {
                self.status.phase = Phase::Failed;
                self.set(State::False, failure.reason, failure.message);
            }
        }
        self.write_persistently(END_ATTEMPTS).await;
    }
}
