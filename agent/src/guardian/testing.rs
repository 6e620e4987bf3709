//! Containers that are processes of this machine, for tests: what is written in `sh` runs for real.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use lifeboat_crds::quiesce_lease::{LeasePhase, LeasedWorkload, QuiesceAction, QuiesceLeaseSpec, QuiesceLeaseStatus};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::containerd::{Pipes, Process};
use super::cri::{Containers, CriError, Ended};
use super::intent::Intents;
use super::keeper::Guardian;

/// Runs commands here. Like a runtime, it kills the first process of a command when nobody waits for it any more, but for those that
/// were started: they run on.
pub(super) struct Local {
    /// A container without a shell.
    pub(super) has_shell: bool,
    /// A runtime that starts commands with pipes.
    pub(super) is_containerd: bool,
    started: Mutex<HashMap<String, Started>>,
}

/// A command that was started.
#[derive(Clone)]
struct Started {
    kill: CancellationToken,
    code: watch::Receiver<Option<i32>>,
}

impl Local {
    pub(super) fn new(has_shell: bool) -> Self {
        Self { has_shell, is_containerd: true, started: Mutex::default() }
    }

    /// Whether a command of this id was started and not ended by us.
    pub(super) fn has(&self, id: &str) -> bool {
        self.started.lock().unwrap().contains_key(id)
    }
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

    async fn start(&self, process: &Process<'_>, command: &[String], takes_input: bool) -> Result<Pipes, CriError> {
        if !self.is_containerd {
            return Err(CriError::NotContainerd);
        }
        if !self.has_shell && command[0] == "sh" {
            return Err(CriError::NoProgram("sh".into()));
        }
        let input = if takes_input { Stdio::piped() } else { Stdio::null() };
        let started = tokio::process::Command::new(&command[0])
            .args(&command[1..])
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = started.map_err(|_| CriError::NoProgram(command[0].clone()))?;
        let receiver = |fd: std::io::Result<std::os::fd::OwnedFd>| Receiver::from_owned_fd(fd.unwrap()).unwrap();
        let pipes = Pipes {
            input: child.stdin.take().map(|input| Sender::from_owned_fd(input.into_owned_fd().unwrap()).unwrap()),
            output: receiver(child.stdout.take().unwrap().into_owned_fd()),
            errors: receiver(child.stderr.take().unwrap().into_owned_fd()),
        };
        let (told, code) = watch::channel(None);
        let kill = CancellationToken::new();
        let killed = kill.clone();
        tokio::spawn(async move {
            let status = tokio::select! {
                status = child.wait() => status,
                () = killed.cancelled() => {
                    child.start_kill().unwrap();
                    child.wait().await
                }
            };
            told.send_replace(Some(status.unwrap().code().unwrap_or(137)));
        });
        self.started.lock().unwrap().insert(process.id.to_owned(), Started { kill, code });
        Ok(pipes)
    }

    async fn wait(&self, process: &Process<'_>) -> Result<i32, CriError> {
        let mut started = self.started.lock().unwrap().get(process.id).cloned().ok_or(CriError::Gone)?;
        let code = started.code.wait_for(Option::is_some).await;
        code.ok().and_then(|code| *code).ok_or(CriError::Gone)
    }

    async fn close_input(&self, _: &Process<'_>) -> Result<(), CriError> {
        Ok(())
    }

    async fn end(&self, process: &Process<'_>) -> Result<(), CriError> {
        let started = self.started.lock().unwrap().get(process.id).cloned();
        if let Some(mut started) = started {
            started.kill.cancel();
            started.code.wait_for(Option::is_some).await.map_err(|_| CriError::Gone)?;
            self.started.lock().unwrap().remove(process.id);
        }
        Ok(())
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
            guardian: Arc::new(Guardian { containers: Local::new(has_shell), intents, kubelet_dir }),
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
