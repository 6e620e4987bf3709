//! Streams of backups and restores: which pod a command runs in, for how long, and the task that runs it.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt;
use lifeboat_crds::DurationString;
use lifeboat_crds::plan::selector_matches;
use lifeboat_crds::quiesce_lease::LeasedWorkload;
use lifeboat_crds::volume_task::StreamCommand;

use crate::dispatch::is_ready;

/// A command may take this long unless the plan says something else.
const DEFAULT_TIMEOUT: Duration = Duration::from_hours(1);
/// Beside its command's time, for the repository.
const MARGIN: SignedDuration = SignedDuration::from_mins(30);

/// Where a command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) workload: LeasedWorkload,
    pub(crate) node: String,
}

/// The pod that the command runs in: of those that match and are ready, the first by name. `Err`: why there is none.
pub(crate) fn choose(selector: &LabelSelector, container: Option<&str>, pods: &[Pod]) -> Result<Spot, String> {
    let is_fitting = |pod: &&Pod| selector_matches(selector, pod.labels()) && is_ready(pod);
    let pod = pods.iter().filter(is_fitting).min_by_key(|pod| pod.name_any());
    let pod = pod.ok_or("no pod that its selector matches is ready")?;
    let spec = pod.spec.as_ref().ok_or("the pod is malformed")?;
    let mut names = spec.containers.iter().map(|one| one.name.as_str());
    let name = match container {
        Some(wanted) => names.find(|name| *name == wanted),
        None => names.next(),
    };
    let name =
        name.ok_or_else(|| format!("the pod {} has no container {}", pod.name_any(), container.unwrap_or_default()))?;
    let workload = LeasedWorkload {
        namespace: pod.namespace().unwrap_or_default(),
        pod: pod.name_any(),
        pod_uid: pod.uid().unwrap_or_default(),
        container: name.to_owned(),
    };
    Ok(Spot { workload, node: spec.node_name.clone().ok_or("the pod has no node")? })
}

/// The command of a task.
pub(crate) fn command(words: &[String], timeout: Option<&DurationString>) -> StreamCommand {
    let limit = timeout.and_then(|text| text.get().ok()).unwrap_or(DEFAULT_TIMEOUT);
    StreamCommand { words: words.to_vec(), limit_millis: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX) }
}

/// When a task of this command ends at the latest, also when it is begun anew after an agent died.
pub(crate) fn deadline(command: &StreamCommand, now: Timestamp) -> Timestamp {
    let limit = SignedDuration::from_millis(i64::try_from(command.limit_millis).unwrap_or(i64::MAX));
    let until = now.saturating_add(limit).and_then(|until| until.saturating_add(limit));
    until.and_then(|until| until.saturating_add(MARGIN)).unwrap_or(Timestamp::MAX)
}

/// The key of a stream among those of the volumes of a run, which are UIDs or names of claims.
pub(crate) fn key(name: &str) -> String {
    format!("~{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, app: &str, ready: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "labels": {"app": app}},
            "spec": {"nodeName": "n", "containers": [{"name": "db"}, {"name": "side"}]},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}
        }))
        .unwrap()
    }

    #[test]
    fn the_first_ready_pod_by_name_is_chosen() {
        let selector: LabelSelector = serde_json::from_value(json!({"matchLabels": {"app": "db"}})).unwrap();
        let pods = [pod("db-2", "db", true), pod("db-1", "db", true), pod("db-0", "db", false), pod("a", "web", true)];
        let found = choose(&selector, None, &pods).unwrap();
        assert_eq!((found.workload.pod.as_str(), found.workload.container.as_str()), ("db-1", "db"));
        assert_eq!(choose(&selector, Some("side"), &pods).unwrap().workload.container, "side");
        assert!(choose(&selector, Some("other"), &pods).unwrap_err().contains("db-1 has no container other"));
        assert!(choose(&selector, None, &pods[2..]).unwrap_err().contains("ready"));
        let mut going = pod("db-0", "db", true);
        going.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        assert_eq!(choose(&selector, None, &[going, pod("db-3", "db", true)]).unwrap().workload.pod, "db-3");
    }

    #[test]
    fn a_command_has_an_hour_unless_the_plan_says_something_else() {
        let words = ["pg_dump".to_owned()];
        assert_eq!(command(&words, None).limit_millis, 3_600_000);
        let quick = command(&words, Some(&DurationString("90s".into())));
        assert_eq!(quick.limit_millis, 90_000);
        assert_eq!(deadline(&quick, Timestamp::UNIX_EPOCH).as_second(), 2 * 90 + 30 * 60);
        let endless = StreamCommand { words: vec![], limit_millis: u64::MAX };
        assert_eq!(deadline(&endless, Timestamp::UNIX_EPOCH), Timestamp::MAX);
    }
}
