//! What dies in scenarios, and how an application notices that it is frozen.

use std::collections::HashSet;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};

use crate::scenario::{INSTALLED_IN, Scenario, launcher};

/// The nodes of the cluster.
pub const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// Kills the processes of all nodes whose command line begins like this, without the API server. Returns how many died: none
/// is no error here, since they may be dead already.
pub fn kill(what: &str) -> Result<usize> {
    let command = format!("pkill -9 -e -f '^{what}' || [ $? -eq 1 ]");
    NODES.iter().map(|node| Ok(launcher(&["in-node", node, "sh", "-c", &command])?.lines().count())).sum()
}

/// The controller's command line.
pub const CONTROLLER: &str = "/lifeboat-controller";

/// New pods, so that the pauses after their crashes do not add up: a controller, and an agent on each node, all at work.
pub async fn fresh_lifeboat(s: &Scenario) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(s.client.clone(), INSTALLED_IN);
    let ours = ListParams::default().labels("app.kubernetes.io/name=lifeboat");
    let old: HashSet<_> = pods.list(&ours).await?.into_iter().filter_map(|pod| pod.uid()).collect();
    s.kubectl_cluster(&["-n", INSTALLED_IN, "delete", "pods", "--all", "--grace-period=0", "--force"])?;
    s.eventually("the successors of all pods", async || {
        let found = pods.list(&ours).await?.items;
        let at_work: Vec<_> = found.iter().filter_map(at_work).collect();
        let are_new = found.iter().filter_map(ResourceExt::uid).all(|uid| !old.contains(&uid));
        let has = |component, node: Option<&str>| {
            at_work.iter().any(|(is, on)| *is == component && node.is_none_or(|node| node == *on))
        };
        Ok(are_new && has("controller", None) && NODES.iter().all(|node| has("agent", Some(node))))
    })
    .await
}

/// Component and node of a pod whose containers are all ready.
fn at_work(pod: &Pod) -> Option<(&str, &str)> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    let component = pod.labels().get("app.kubernetes.io/component")?;
    let node = pod.spec.as_ref()?.node_name.as_ref()?;
    (pod.metadata.deletion_timestamp.is_none() && containers.iter().all(|container| container.ready))
        .then_some((component, node))
}

/// An application that waits while `/tmp/frozen` is there, writes to its volume, and notes in `/tmp/gaps` how long it could
/// not, in hundredths of a second.
pub const BEAT: &str = r#"(last=
while :; do
  while [ -e /tmp/frozen ]; do sleep 0.02; done
  echo beat >> /data/beat
  read up rest </proc/uptime
  now=${up%.*}${up#*.}
  [ -z "$last" ] || [ $((now - last)) -lt 30 ] || echo $((now - last)) >> /tmp/gaps
  last=$now
  sleep 0.02
done) </dev/null >/dev/null 2>&1 &"#;

/// Whether the application of this pod writes now.
pub fn is_at_work(s: &Scenario, pod: &str) -> Result<bool> {
    let sizes = s.shell(pod, "wc -c < /data/beat; sleep 0.3; wc -c < /data/beat")?;
    let mut sizes = sizes.lines();
    Ok(sizes.next() != sizes.next())
}

/// The longest time in ms that the application of this pod could not work since the last look, without one that lasts.
pub fn longest_gap(s: &Scenario, pod: &str) -> Result<u64> {
    let gaps = s.shell(pod, "cat /tmp/gaps 2>/dev/null; : > /tmp/gaps")?;
    Ok(gaps.lines().filter_map(|line| line.parse::<u64>().ok()).max().unwrap_or(0) * 10)
}

/// A number that differs from round to round and is the same in every run with the same seed.
pub fn chance(seed: u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    state ^= state >> 29;
    state.wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 32
}

/// A number from the environment.
///
/// # Panics
/// When the variable is set to something else: a run would otherwise be shorter than was asked for.
pub fn number(variable: &str, default: u64) -> u64 {
    let parse = |text: String| text.parse().unwrap_or_else(|_| panic!("{variable} must be a number, not `{text}`"));
    std::env::var(variable).map_or(default, parse)
}
