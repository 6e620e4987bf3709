//! What the agent of this node asks the guardian for: the commands of streams, and block devices. The agent reads what repositories
//! say, and has neither the runtime's socket nor the right to a device.
//!
//! The agent names a task; what is done is what the API server says that the task is.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::{Api, ResourceExt};
use lifeboat_crds::VolumeTask;
use lifeboat_crds::conditions::is_finished;
use tokio::net::{UnixListener, UnixStream};
use tracing::info;

use super::cri::Containers;
use super::devices::{self, Opener};
use super::keeper::Guardian;
use super::streams;
use crate::wire::{self, Ask, End, Frame, How};

/// The agent says at once what it wants.
const ASKING: Duration = Duration::from_secs(10);

/// What serves the agent.
pub(super) struct Server<C> {
    pub(super) guardian: Arc<Guardian<C>>,
    pub(super) tasks: Api<VolumeTask>,
    pub(super) node: String,
    pub(super) opener: Opener,
}

/// What a task asks for.
#[derive(Debug, Clone, PartialEq)]
enum Order {
    Run(streams::Order),
    Open(devices::Order),
}

impl<C: Containers> Server<C> {
    /// Serves the agent until the socket cannot be listened at any more.
    pub(super) async fn serve(self, socket: &Path) -> Result<()> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).context("cannot remove an old socket");
            }
            _ => {}
        }
        let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
        let server = Arc::new(self);
        loop {
            let (agent, _) = listener.accept().await.context("cannot take a connection of the agent")?;
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                if let Err(error) = server.answer(agent).await {
                    info!(%error, "the agent has gone before it had its answer");
                }
            });
        }
    }

    /// `Err`: the agent is gone.
    async fn answer(&self, mut agent: UnixStream) -> io::Result<()> {
        let Ok(Ok(Some(Frame::Ask(ask)))) = tokio::time::timeout(ASKING, wire::hear(&mut agent)).await else {
            return Ok(());
        };
        let end = match self.order(&ask).await {
            Err(end) => end,
            Ok((name, Order::Run(order))) => {
                let (mut from, mut to) = agent.into_split();
                let end = streams::run(&self.guardian, &name, &order, &mut from, &mut to).await?;
                return wire::say(&mut to, &Frame::End(end)).await;
            }
            Ok((_, Order::Open(order))) => match self.opener.open(&self.guardian.kubelet_dir, order).await {
                Ok(device) => return wire::hand_over(&agent, device.as_fd()).await,
                Err(end) => end,
            },
        };
        wire::say(&mut agent, &Frame::End(end)).await
    }

    /// The name of the task, and what it asks for.
    async fn order(&self, ask: &Ask) -> Result<(String, Order), End> {
        match self.tasks.get_opt(&ask.task).await {
            Err(error) => Err(End::new(How::Trouble, format!("the guardian cannot read the task: {error}"))),
            Ok(None) => Err(End::new(How::Failed, "the task was deleted")),
            Ok(Some(task)) => {
                let order = order(&task, ask, &self.node).map_err(|why| End::new(How::Failed, why))?;
                Ok((task.name_any(), order))
            }
        }
    }
}

/// What the task asks for on this node; `Err`: why nothing.
fn order(task: &VolumeTask, ask: &Ask, node: &str) -> Result<Order, String> {
    let is_done = task.status.as_ref().is_some_and(|status| is_finished(&status.conditions));
    if task.uid().as_ref() != Some(&ask.uid) || task.metadata.deletion_timestamp.is_some() || is_done {
        return Err("the task is over".to_owned());
    }
    let spec = &task.spec;
    if spec.node_name != node {
        return Err(format!("the task is for the node {}", spec.node_name));
    }
    let stream = streams::Order::of(spec).map(Order::Run);
    let wanted = stream.or_else(|| devices::Order::of(spec).map(Order::Open));
    wanted.ok_or_else(|| "the task has neither a command nor a block device".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn task(operation: &Value, change: &dyn Fn(&mut Value)) -> VolumeTask {
        let mut task = json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "VolumeTask", "metadata": {"name": "s-1", "uid": "u"},
            "spec": {
                "nodeName": "n", "deadline": "2026-01-01T04:00:00Z",
                "workload": {"namespace": "ns", "pod": "db-0", "podUid": "p", "container": "db"},
                "volume": {"namespace": "ns", "claim": "c", "claimUid": "c", "volume": "pv", "pod": "db-0", "podUid": "p", "block": true},
                "repository": {"name": "r", "id": "ab", "backend": {"filesystem": {"path": "/x"}}, "encryptionSecret": {"name": "s"}},
                "operation": operation
            }
        });
        change(&mut task);
        serde_json::from_value(task).unwrap()
    }

    fn dump() -> Value {
        json!({"dump": {"lineage": "l", "file": "shop.sql", "command": {"words": ["pg_dump"], "limitMillis": 5}}})
    }

    fn ask(uid: &str) -> Ask {
        Ask { task: "s-1".into(), uid: uid.into() }
    }

    #[test]
    fn only_what_a_living_task_of_this_node_says_runs() {
        let found = order(&task(&dump(), &|_| {}), &ask("u"), "n").unwrap();
        let Order::Run(found) = found else { unreachable!("{found:?}") };
        assert_eq!(
            (found.words.as_slice(), found.takes_input, found.workload.pod_uid.as_str()),
            (&["pg_dump".to_owned()][..], false, "p")
        );
        let refused = |change: &dyn Fn(&mut Value), uid: &str, node: &str| {
            order(&task(&dump(), change), &ask(uid), node).unwrap_err()
        };
        assert!(refused(&|_| {}, "other", "n").contains("over"));
        assert!(refused(&|_| {}, "u", "m").contains("node n"));
        assert!(
            refused(&|task| task["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"), "u", "n")
                .contains("over")
        );
        let done = json!({"conditions": [{"type": "Succeeded", "status": "False", "reason": "TimedOut", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        assert!(refused(&|task| task["status"] = done.clone(), "u", "n").contains("over"));
        let maintain = json!({"maintain": {"patienceSeconds": 1}});
        assert!(refused(&|task| task["spec"]["operation"] = maintain.clone(), "u", "n").contains("neither"));
    }

    #[test]
    fn only_the_device_of_a_living_task_is_opened_and_for_a_backup_only_to_be_read() {
        let of = |operation: Value, change: &dyn Fn(&mut Value)| order(&task(&operation, change), &ask("u"), "n");
        for (operation, writes) in
            [(json!({"backup": {"lineage": "l"}}), false), (json!({"restore": {"snapshot": "ab"}}), true)]
        {
            let found = of(operation.clone(), &|_| {}).unwrap();
            let Order::Open(found) = found else { unreachable!("{found:?}") };
            assert_eq!((found.volume.pod_uid.as_str(), found.writes), ("p", writes));
            let of_files = of(operation.clone(), &|task| task["spec"]["volume"]["block"] = json!(false));
            assert!(of_files.unwrap_err().contains("neither"));
            assert!(order(&task(&operation, &|_| {}), &ask("u"), "m").unwrap_err().contains("node n"));
        }
    }
}
