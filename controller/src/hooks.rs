//! Runs a command in a container, with a deadline.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::AttachParams;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of standard error that are kept for the message.
const KEPT_STDERR: usize = 512;

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HookEnd {
    /// With exit code 0.
    Done,
    /// With another code, or not at all; in words.
    Failed(String),
    /// It did not end in time. It may still run in the container.
    TimedOut(Duration),
    /// The container is gone or not running: nothing in it is frozen.
    Gone(String),
}

/// Runs the command and waits for its end, at most this long.
pub(crate) async fn run(
    pods: &Api<Pod>,
    pod: &str,
    pod_uid: &str,
    container: &str,
    command: &[String],
    limit: Duration,
) -> HookEnd {
    match tokio::time::timeout(limit, run_to_end(pods, pod, pod_uid, container, command)).await {
        Ok(end) => end,
        Err(_) => HookEnd::TimedOut(limit),
    }
}

async fn run_to_end(pods: &Api<Pod>, pod: &str, pod_uid: &str, container: &str, command: &[String]) -> HookEnd {
    match pods.get_opt(pod).await {
        Ok(Some(found)) if found.metadata.uid.as_deref() == Some(pod_uid) => {
            if !is_running(&found, container) {
                return HookEnd::Gone(format!("the container {container} of the pod {pod} does not run"));
            }
        }
        Ok(_) => return HookEnd::Gone(format!("the pod {pod} is gone")),
        Err(error) => return HookEnd::Failed(format!("the pod {pod} cannot be looked at: {error}")),
    }
    let parameters = AttachParams::default().container(container).stdin(false).stdout(true).stderr(true);
    let mut process = match pods.exec(pod, command, &parameters).await {
        Ok(process) => process,
        Err(error) => return HookEnd::Failed(format!("the command cannot be started: {error}")),
    };
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let status = process.take_status();
    // Standard output is read and dropped: a full pipe would block the command.
    let (_, said) = tokio::join!(read(stdout), read(stderr));
    let Some(status) = status else { return HookEnd::Failed("the API server gives no exit status".into()) };
    match status.await {
        Some(status) if status.status.as_deref() == Some("Success") => HookEnd::Done,
        Some(status) => HookEnd::Failed(describe(&status, &said)),
        None => HookEnd::Failed("the connection to the container was lost".into()),
    }
}

fn is_running(pod: &Pod, container: &str) -> bool {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    statuses
        .into_iter()
        .any(|status| status.name == container && status.state.as_ref().is_some_and(|state| state.running.is_some()))
}

fn describe(status: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Status, said: &str) -> String {
    let causes = status.details.iter().flat_map(|details| details.causes.iter().flatten());
    let code = causes
        .into_iter()
        .find(|cause| cause.reason.as_deref() == Some("ExitCode"))
        .and_then(|cause| cause.message.clone());
    let said = said.trim();
    let said = if said.is_empty() { String::new() } else { format!(": {said}") };
    match code {
        Some(code) => format!("exit code {code}{said}"),
        None => format!("{}{said}", status.message.as_deref().unwrap_or("the command failed")),
    }
}

/// Reads to the end and keeps the first bytes as text.
async fn read(source: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut source) = source else { return String::new() };
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    // An error here means the end of the stream; the status says how the command ended.
    while let Ok(count @ 1..) = source.read(&mut buffer).await {
        let room = KEPT_STDERR.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(&buffer[..room]);
    }
    String::from_utf8_lossy(&kept).chars().filter(|c| !c.is_control() || *c == ' ').collect()
}
