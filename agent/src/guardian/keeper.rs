//! Keeps one workload at rest: freezes, waits for the release, the end or the loss of the session, thaws.
//!
//! Nothing here speaks to the API server; what happens is handed to a reporter that does.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use lifeboat_crds::quiesce_lease::{
    LeaseEnd, LeasePhase, LeasedWorkload, QuiesceAction, QuiesceLeaseSpec, QuiesceLeaseStatus, Watchdog,
};
use lifeboat_process::hold::BootTime;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::container;
use super::cri::Containers;
use super::intent::{Intents, Locked};
use super::volumes;

/// What the keepers of one node share.
pub(crate) struct Guardian<C> {
    pub(crate) containers: C,
    pub(crate) intents: Intents,
    pub(crate) kubelet_dir: PathBuf,
}

/// How a workload came out of its freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) end: LeaseEnd,
    pub(crate) message: Option<String>,
}

impl Outcome {
    pub(crate) fn new(end: LeaseEnd, message: impl Into<String>) -> Self {
        Self { end, message: Some(message.into()) }
    }

    pub(crate) fn released() -> Self {
        Self { end: LeaseEnd::Released, message: None }
    }
}

/// One lease while it is kept.
pub(crate) struct Lease<'a> {
    pub(crate) name: &'a str,
    pub(crate) workload: &'a LeasedWorkload,
    /// When thawing begins at the latest.
    pub(crate) end: Instant,
    /// The same for processes in a container.
    pub(crate) boot_end: BootTime,
    /// When the freeze is given up.
    pub(crate) give_up: Instant,
    pub(crate) timeout: Duration,
    pub(crate) released: &'a CancellationToken,
    report: &'a watch::Sender<QuiesceLeaseStatus>,
    times: &'a Times,
}

/// When a workload was brought to rest and let go.
#[derive(Debug, Default)]
struct Times {
    begun: OnceLock<Instant>,
    over: OnceLock<Instant>,
}

impl Lease<'_> {
    /// What follows may bring the workload to rest.
    pub(crate) fn begins(&self) {
        self.times.begun.get_or_init(Instant::now);
        // Told with the next that is: a write now would be in its way.
        self.report.send_if_modified(|status| {
            status.frozen_at = Some(Time(jiff::Timestamp::now()));
            false
        });
    }

    /// The workload has been let go: what still follows is for us.
    pub(crate) fn is_over(&self) {
        self.times.over.get_or_init(Instant::now);
    }

    /// The workload is at rest.
    pub(crate) fn is_frozen(&self, watchdog: Watchdog) {
        info!(pod = self.workload.pod, container = self.workload.container, ?watchdog, "frozen");
        self.report.send_modify(|status| {
            status.phase = Some(LeasePhase::Frozen);
            status.watchdog = Some(watchdog);
        });
    }

    /// Something goes wrong that is still being worked on.
    pub(crate) fn says(&self, message: String) {
        warn!(pod = self.workload.pod, message, "trouble with a freeze");
        self.report.send_modify(|status| status.message = Some(message));
    }
}

/// Thawing begins this much before the end of the freeze, since it takes time.
fn reserve(limit: Duration) -> Duration {
    (limit / 10).clamp(Duration::from_millis(50), Duration::from_secs(2)).min(limit / 2)
}

impl<C: Containers> Guardian<C> {
    /// Keeps the workload of a lease at rest until it ends, one way or another.
    pub(crate) async fn keep(
        &self,
        name: &str,
        spec: &QuiesceLeaseSpec,
        released: &CancellationToken,
        report: &watch::Sender<QuiesceLeaseStatus>,
    ) {
        let began = Instant::now();
        let times = Times::default();
        let outcome = self.freeze_and_thaw(name, spec, began, released, report, &times).await;
        let over = times.over.get().copied().unwrap_or_else(Instant::now);
        let rest = times.begun.get().map_or(Duration::ZERO, |begun| over.duration_since(*begun));
        let millis = u64::try_from(rest.as_millis()).unwrap_or(u64::MAX);
        info!(pod = spec.workload.pod, container = spec.workload.container, end = ?outcome.end, millis, "thawed");
        report.send_modify(|status| {
            status.phase = Some(LeasePhase::Thawed);
            status.end = Some(outcome.end);
            status.message = outcome.message;
            status.freeze_millis = Some(millis);
        });
    }

    async fn freeze_and_thaw(
        &self,
        name: &str,
        spec: &QuiesceLeaseSpec,
        began: Instant,
        released: &CancellationToken,
        report: &watch::Sender<QuiesceLeaseStatus>,
        times: &Times,
    ) -> Outcome {
        let limit = Duration::from_millis(spec.limit_millis);
        // Two clocks may differ; the application waits no longer than by either.
        let left = Duration::try_from(spec.deadline.0.duration_since(jiff::Timestamp::now())).unwrap_or_default();
        let left = left.min(limit);
        let reserve = reserve(limit);
        let at_rest = left.saturating_sub(reserve);
        if at_rest.is_zero() {
            return Outcome::new(LeaseEnd::TimedOut, "maxFreeze was over before the freeze could begin; allow more");
        }
        let Some(now) = BootTime::now() else {
            return Outcome::new(LeaseEnd::Failed, "the node has no /proc/uptime");
        };
        let timeout = Duration::from_millis(spec.timeout_millis);
        let lease = Lease {
            name,
            workload: &spec.workload,
            end: began + at_rest,
            boot_end: now.after(at_rest),
            give_up: began + timeout.min(at_rest),
            timeout,
            released,
            report,
            times,
        };
        match &spec.action {
            QuiesceAction::Commands(pair) => container::keep_by_commands(self, &lease, pair).await,
            QuiesceAction::Hold(hold) => container::keep_by_session(self, &lease, &hold.command).await,
            QuiesceAction::Fsfreeze(frozen) => volumes::keep(self, &lease, &frozen.volumes).await,
        }
    }

    /// Writes down what is about to be frozen.
    pub(crate) fn announce(&self, lease: &Lease<'_>, thaw: super::intent::Thaw) -> Result<Locked, Outcome> {
        let intent = super::intent::Intent { lease: lease.name.to_owned(), end: lease.boot_end.hundredths(), thaw };
        self.intents.write(&intent).map_err(|error| {
            Outcome::new(
                LeaseEnd::Failed,
                format!("the intent cannot be written on the node, so nothing is frozen: {error}"),
            )
        })
    }
}

/// Waits for the release or the end.
pub(crate) async fn until_let_go(lease: &Lease<'_>) -> Outcome {
    tokio::select! {
        () = lease.released.cancelled() => Outcome::released(),
        () = tokio::time::sleep_until(lease.end) => deadline(),
    }
}

pub(crate) fn deadline() -> Outcome {
    Outcome::new(LeaseEnd::Deadline, "maxFreeze was over before the workload was released")
}

pub(crate) fn timed_out(lease: &Lease<'_>) -> Outcome {
    let what = "it was not at rest within the step's timeout or maxFreeze; allow it more or look why it hangs";
    Outcome::new(LeaseEnd::TimedOut, format!("{what} (timeout {:.1?})", lease.timeout))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lifeboat_crds::quiesce_lease::{CommandPair, HoldCommand};

    use super::super::testing::Node;
    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    /// Frozen while the file `frozen` is there.
    fn pair(node: &Node) -> QuiesceAction {
        let file = node.file("frozen");
        QuiesceAction::Commands(CommandPair {
            freeze: Some(words(&["touch", &file])),
            thaw: Some(words(&["rm", &file])),
        })
    }

    fn session(script: &str) -> QuiesceAction {
        QuiesceAction::Hold(HoldCommand { command: words(&["sh", "-c", script]) })
    }

    #[test]
    fn the_reserve_for_the_thaw_is_a_part_of_the_limit() {
        for (limit, reserved) in [(60_000, 2000), (10_000, 1000), (1000, 100), (200, 50), (60, 30)] {
            assert_eq!(reserve(Duration::from_millis(limit)), Duration::from_millis(reserved));
        }
    }

    #[tokio::test]
    async fn a_workload_is_at_rest_until_it_is_released_with_and_without_a_shell() {
        for (name, has_shell, watchdog) in [("shell", true, Watchdog::Container), ("bare", false, Watchdog::Node)] {
            let node = Node::new(name, has_shell);
            let kept = node.keep(pair(&node), LONG, LONG);
            assert_eq!(node.reaches(LeasePhase::Frozen).await.watchdog, Some(watchdog));
            assert!(node.is_frozen() && node.guardian.intents.has(&node.name));
            node.released.cancel();
            let status = node.reaches(LeasePhase::Thawed).await;
            assert_eq!(status.end, Some(LeaseEnd::Released), "{status:?}");
            kept.await.unwrap();
            assert!(!node.is_frozen() && !node.guardian.intents.has(&node.name));
            assert!(!node.guardian.containers.has(&format!("lifeboat-{}", node.name)), "the voice is left");
        }
    }

    #[tokio::test]
    async fn a_runtime_without_pipes_is_sent_commands() {
        let mut node = Node::new("no-voice", true);
        Arc::get_mut(&mut node.guardian).unwrap().containers.is_containerd = false;
        let kept = node.keep(pair(&node), LONG, LONG);
        node.reaches(LeasePhase::Frozen).await;
        assert!(node.is_frozen());
        node.released.cancel();
        assert_eq!(node.reaches(LeasePhase::Thawed).await.end, Some(LeaseEnd::Released));
        kept.await.unwrap();
        assert!(!node.is_frozen());
    }

    #[tokio::test]
    async fn a_workload_is_let_go_before_its_limit() {
        for (name, has_shell) in [("late-shell", true), ("late-bare", false)] {
            let node = Node::new(name, has_shell);
            node.keep(pair(&node), Duration::from_secs(2), LONG);
            node.reaches(LeasePhase::Frozen).await;
            let status = node.reaches(LeasePhase::Thawed).await;
            assert_eq!(status.end, Some(LeaseEnd::Deadline), "{status:?}");
            assert!(status.freeze_millis.unwrap() <= 2000 && !node.is_frozen(), "{status:?}");
        }
    }

    #[tokio::test]
    async fn what_never_comes_to_rest_is_told_apart() {
        let hanging = |node: &Node| {
            let thaw = Some(words(&["touch", &node.file("thawed")]));
            QuiesceAction::Commands(CommandPair { freeze: Some(words(&["sleep", "30"])), thaw })
        };
        let node = Node::new("hangs", true);
        node.keep(hanging(&node), LONG, Duration::from_millis(300));
        assert_eq!(node.reaches(LeasePhase::Thawed).await.end, Some(LeaseEnd::TimedOut));
        assert!(node.folder.path().join("thawed").exists());

        let node = Node::new("fails", true);
        node.keep(session("echo no such database; exit 2"), LONG, LONG);
        let status = node.reaches(LeasePhase::Thawed).await;
        assert_eq!(status.end, Some(LeaseEnd::Failed));
        assert!(
            status.message.as_ref().is_some_and(|said| said.contains("exit code 2: no such database")),
            "{status:?}"
        );

        let node = Node::new("gone", true);
        node.keep(session("echo frozen"), LONG, LONG);
        assert_eq!(node.reaches(LeasePhase::Thawed).await.end, Some(LeaseEnd::Gone));

        let node = Node::new("no-shell", false);
        node.keep(session("echo frozen"), LONG, LONG);
        let status = node.reaches(LeasePhase::Thawed).await;
        assert!(status.message.is_some_and(|said| said.contains("no `sh`")));

        let node = Node::new("short", true);
        node.keep(pair(&node), Duration::ZERO, LONG);
        assert_eq!(node.reaches(LeasePhase::Thawed).await.end, Some(LeaseEnd::TimedOut));
    }

    #[tokio::test]
    async fn a_session_that_ends_by_itself_is_no_freeze() {
        let node = Node::new("lost", true);
        node.keep(session("echo frozen; sleep 0.3; exit 1"), LONG, LONG);
        assert_eq!(node.reaches(LeasePhase::Thawed).await.end, Some(LeaseEnd::SessionLost));
        let node = Node::new("quiet-loss", true);
        node.keep(session("echo frozen; sleep 0.3"), LONG, LONG);
        assert_eq!(node.reaches(LeasePhase::Thawed).await.end, Some(LeaseEnd::SessionLost));
    }

    #[tokio::test]
    async fn what_a_dead_guardian_leaves_is_thawed_by_the_container_and_by_a_sweep() {
        for (name, has_shell) in [("dead-shell", true), ("dead-bare", false)] {
            let node = Node::new(name, has_shell);
            let kept = node.keep(pair(&node), LONG, LONG);
            node.reaches(LeasePhase::Frozen).await;
            assert_eq!(node.guardian.sweep().await, 0);
            assert!(node.is_frozen(), "what is kept is left alone");
            // As a kill does: locks and connections go with it.
            kept.abort();
            assert!(kept.await.is_err());
            assert_eq!(node.guardian.sweep().await, 0);
            assert!(!node.is_frozen() && !node.guardian.intents.has(&node.name));
        }
    }
}
