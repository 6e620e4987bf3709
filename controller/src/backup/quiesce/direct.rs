//! Holds a workload by way of the API server, where no guardian can reach it.
//!
//! The deadline is kept all the same: the command that holds has its own watchdog in the container.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::quiesce_lease::QuiesceAction;
use lifeboat_process::hold::{self, Until};

use super::workloads::Target;
use crate::hooks::{self, HookEnd};

/// Beyond the end of what is held, for its thaw.
const GRACE: Duration = Duration::from_secs(30);
/// Thawing begins this much before the end, since it takes time; a tenth of short ones.
const RESERVE: Duration = Duration::from_secs(2);
/// For short commands of our own.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether only a guardian can bring the workload to rest.
pub(super) fn cannot(target: &Target) -> bool {
    matches!(target.action, QuiesceAction::Fsfreeze(_))
}

/// Why a workload that needs a guardian is not brought to rest.
pub(super) fn no_guardian(target: &Target) -> (Reason, String) {
    let node = &target.node;
    let message = format!(
        "no guardian of Lifeboat is ready on the node {node}, which fsfreeze needs; look at the pod of the DaemonSet \
         lifeboat-agent there"
    );
    (Reason::HookFailed, message)
}

/// Brings a workload to rest for at most `left`.
pub(super) async fn freeze(
    pods: &Api<Pod>,
    target: &Target,
    token: &str,
    left: Duration,
) -> Result<(), (Reason, String)> {
    let command = match &target.action {
        QuiesceAction::Commands(pair) => hold::commands(pair.freeze.as_deref(), pair.thaw.as_deref()),
        QuiesceAction::Hold(hold) => hold.command.clone(),
        QuiesceAction::Fsfreeze(_) => return Err(no_guardian(target)),
    };
    let end = left.saturating_sub((left / 10).min(RESERVE));
    let limit = target.timeout.min(end);
    let held = hold::hold(token, Until::For(end), GRACE, &command);
    let (api, pod, uid, container) =
        (pods.clone(), target.pod.clone(), target.pod_uid.clone(), target.container.clone());
    // It lives as long as this process: when that dies, the watchdog in the container lets go.
    let session = tokio::spawn(async move { hooks::run(&api, &pod, &uid, &container, &held, end + GRACE).await });
    let wait = hold::await_frozen(token, Until::For(limit));
    tokio::select! {
        biased;
        ended = session => {
            let why = match ended {
                Ok(HookEnd::Failed(why) | HookEnd::Gone(why)) => why,
                Ok(HookEnd::Done) => "it ended without the line `frozen`".to_owned(),
                Ok(HookEnd::TimedOut(limit)) => format!("it did not end within {limit:.1?}"),
                Err(error) => error.to_string(),
            };
            Err((Reason::HookFailed, why))
        }
        answer = hooks::run(pods, &target.pod, &target.pod_uid, &target.container, &wait, limit) => match answer {
            HookEnd::Done => Ok(()),
            _ => Err((Reason::HookTimedOut, format!("it was not at rest within {limit:.1?}; allow it more or look why it hangs"))),
        },
    }
}

/// How a workload was let go.
pub(super) enum LetGo {
    /// It was at rest until now.
    Held,
    /// It was not at rest any more.
    NotHeld,
    /// It may still be at rest.
    Unconfirmed(String),
}

/// Lets a workload go.
pub(super) async fn thaw(pods: &Api<Pod>, pod: &str, pod_uid: &str, container: &str, token: &str) -> LetGo {
    let send = async |command: Vec<String>| hooks::run(pods, pod, pod_uid, container, &command, PATIENCE + GRACE).await;
    let was_held = send(hold::await_frozen(token, Until::For(Duration::ZERO))).await == HookEnd::Done;
    match send(hold::release(token, GRACE)).await {
        HookEnd::Done if was_held => LetGo::Held,
        // Nothing is frozen in a container that is gone.
        HookEnd::Done | HookEnd::Gone(_) => LetGo::NotHeld,
        HookEnd::Failed(why) => LetGo::Unconfirmed(why),
        HookEnd::TimedOut(limit) => LetGo::Unconfirmed(format!("it did not end within {limit:.1?}")),
    }
}
