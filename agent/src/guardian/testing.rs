//! Containers that are processes of this machine, for tests: what is written in `sh` runs for real.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use lifeboat_crds::quiesce_lease::{LeasePhase, LeasedWorkload, QuiesceAction, QuiesceLeaseSpec, QuiesceLeaseStatus};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cri::{Containers, CriError, Ended};
use super::intent::Intents;
use super::keeper::Guardian;

/// Runs commands here. Like a runtime, it kills the first process of a command when nobody waits for it any more.
pub(super) struct Local {
    /// A container without a shell.
    pub(super) has_shell: bool,
}

impl Containers for Local {
    async fn find(&self, pod_uid: &str, _: &str) -> Result<String, CriError> {
        if pod_uid == "gone" { Err(CriError::Gone) } else { Ok("container".into()) }
    }

    async fn exec(&self, _: &str, command: &[String]) -> Result<Ended, CriError> {
        if !self.has_shell && command[0] == "sh" {
            return Err(CriError::NoProgram("sh".into()));
        }
        let started = tokio::process::Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let output = started.map_err(|_| CriError::NoProgram(command[0].clone()))?.wait_with_output().await;
        let output = output.map_err(|error| CriError::Unreachable(error.to_string()))?;
        Ok(Ended { code: output.status.code().unwrap_or(137), stdout: output.stdout, stderr: output.stderr })
    }
}

/// One lease on a node of its own.
pub(super) struct Node {
    pub(super) folder: tempfile::TempDir,
    pub(super) guardian: Arc<Guardian<Local>>,
    pub(super) released: CancellationToken,
    pub(super) name: String,
    report: watch::Sender<QuiesceLeaseStatus>,
    pub(super) status: watch::Receiver<QuiesceLeaseStatus>,
}

impl Node {
    /// `name` is the lease's; no other test has it.
    pub(super) fn new(name: &str, has_shell: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let intents = Intents::in_folder(folder.path().join("intents")).unwrap();
        let kubelet_dir = folder.path().to_owned();
        let (report, status) = watch::channel(QuiesceLeaseStatus::default());
        Self {
            guardian: Arc::new(Guardian { containers: Local { has_shell }, intents, kubelet_dir }),
            released: CancellationToken::new(),
            name: format!("test-{name}-{}", std::process::id()),
            report,
            status,
            folder,
        }
    }

    /// A file of this node, which stands for the frozen application.
    pub(super) fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.folder.path().join("frozen").exists()
    }

    /// Keeps a lease, in a task of its own, for at most this long.
    pub(super) fn keep(
        &self,
        action: QuiesceAction,
        limit: Duration,
        timeout: Duration,
    ) -> tokio::task::JoinHandle<()> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap();
        let workload = |pod: &str| LeasedWorkload {
            namespace: "ns".into(),
            pod: pod.into(),
            pod_uid: pod.into(),
            container: "main".into(),
        };
        let spec = QuiesceLeaseSpec {
            node_name: "n".into(),
            workload: workload(if self.name.starts_with("test-gone") { "gone" } else { "pod" }),
            action,
            deadline: Time(jiff::Timestamp::now() + limit),
            limit_millis: millis(limit),
            timeout_millis: millis(timeout),
            release: false,
        };
        let (guardian, name, released, report) =
            (Arc::clone(&self.guardian), self.name.clone(), self.released.clone(), self.report.clone());
        tokio::spawn(async move { guardian.keep(&name, &spec, &released, &report).await })
    }

    /// Waits for a phase.
    pub(super) async fn reaches(&self, phase: LeasePhase) -> QuiesceLeaseStatus {
        let mut status = self.status.clone();
        let found =
            tokio::time::timeout(Duration::from_secs(20), status.wait_for(|status| status.phase == Some(phase)));
        found.await.expect("in time").unwrap().clone()
    }
}
