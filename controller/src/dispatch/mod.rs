//! Dispatch: gives waiting work its turn, within limits and fairly between namespaces.
//!
//! What goes on is read off the status of `Backup` and `Restore` objects. What waits asks again and again, so nothing has to be
//! kept over a restart: the queue is whoever asked lately. Never between freeze and thaw is anybody asked.

mod decide;
#[cfg(test)]
mod decide_tests;
mod seen;
mod topology;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, Pod, Toleration};
use kube::api::ListParams;
use kube::runtime::reflector::Store;
use kube::{Api, ResourceExt};
use lifeboat_crds::{Backup, ClusterRepository, Restore};
use tracing::{debug, info};

pub(crate) use decide::{Kind, Need, Place, Verdict, Work};
pub(crate) use seen::{due, live_nodes, rest_key, volume_key};

use crate::context::Context;
use decide::{Limits, Running, Share, decide};

/// Who has not asked for this long does not want any more.
const FORGOTTEN: Duration = Duration::from_mins(1);
/// What began is seen in its object within this time, or it did not begin.
const UNSEEN: Duration = Duration::from_secs(15);
/// Nodes and agents are listed this often at most.
const NODES_AGE: Duration = Duration::from_secs(10);
/// What a volume says about nodes is read this often at most: it changes seldom, and who waits asks often.
const VOLUME_AGE: Duration = Duration::from_mins(1);
/// The next to have a turn ask again after this,
const NEXT_PAUSE: Duration = Duration::from_secs(1);
/// those behind them later, by this much each,
const PAUSE_EACH: Duration = Duration::from_millis(40);
/// and everybody within this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);

/// After how long work that so much waits in front of asks again.
pub(crate) fn pause(ahead: usize) -> Duration {
    (NEXT_PAUSE + PAUSE_EACH * u32::try_from(ahead).unwrap_or(u32::MAX).min(10_000)).min(LONGEST_PAUSE)
}

/// Work that asked, and when it did so last.
struct Asked {
    work: Work,
    at: Instant,
}

#[derive(Default)]
struct Queue {
    waiting: BTreeMap<String, Asked>,
    /// What began and is not seen in its object yet.
    begun: Vec<(Running, Instant)>,
}

/// Nodes that an agent runs on, as they were seen lately.
type Nodes = Vec<Node>;

/// Gives waiting work its turn.
pub(crate) struct Dispatch {
    /// Volumes on one node at once.
    pub(crate) per_node: u32,
    /// Applications at rest at once.
    pub(crate) rests: u32,
    /// What pods of ours tolerate.
    pub(crate) tolerations: Vec<Toleration>,
    pub(crate) backups: OnceLock<Store<Backup>>,
    pub(crate) restores: OnceLock<Store<Restore>>,
    pub(crate) repositories: OnceLock<Store<ClusterRepository>>,
    queue: Mutex<Queue>,
    nodes: tokio::sync::Mutex<Option<(Instant, Nodes)>>,
    /// Volumes that are bound to nodes, `None` for others, as they were read lately.
    volumes: Mutex<BTreeMap<String, (Instant, Option<PersistentVolume>)>>,
}

impl Dispatch {
    pub(crate) fn new(per_node: u32, rests: u32, tolerations: Vec<Toleration>) -> Self {
        Self {
            per_node,
            rests,
            tolerations,
            backups: OnceLock::new(),
            restores: OnceLock::new(),
            repositories: OnceLock::new(),
            queue: Mutex::default(),
            nodes: tokio::sync::Mutex::default(),
            volumes: Mutex::default(),
        }
    }

    /// Whether this work begins now. The caller writes down at once that it did, or asks again after [`pause`].
    pub(crate) async fn ask(&self, context: &Context, work: Work) -> Result<Verdict> {
        let nodes = self.nodes(context).await?.iter().map(ResourceExt::name_any).collect();
        let running = self.running().await?;
        let limits = self.limits().await?;
        let now = Instant::now();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = queue.turn(work.clone(), running, &nodes, &limits, now);
        queue.show(context);
        drop(queue);
        match &verdict {
            Verdict::Start(node) => {
                let waited = Timestamp::now().duration_since(work.due);
                context.metrics.dispatch_wait_seconds.observe(waited.as_secs_f64().max(0.0));
                info!(namespace = work.namespace, node, "work has its turn");
            }
            Verdict::Wait { reason, ahead, .. } => {
                debug!(namespace = work.namespace, reason = reason.as_str(), ahead, "work waits");
            }
        }
        Ok(verdict)
    }

    /// A node for work that needs no volume: another one for each key.
    pub(crate) async fn any_node(&self, context: &Context, key: &str) -> Result<Option<String>> {
        let nodes = self.nodes(context).await?;
        let names = nodes.iter().map(ResourceExt::name_any);
        Ok(names.min_by_key(|node| *blake3::hash(format!("{key}\0{node}").as_bytes()).as_bytes()))
    }

    /// The work of a run that has ended waits no more.
    pub(crate) fn forget(&self, context: &Context, owner_uid: &str) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let prefix = format!("{owner_uid}/");
        queue.waiting.retain(|key, _| !key.starts_with(&prefix));
        queue.begun.retain(|(one, _)| !one.key.starts_with(&prefix));
        queue.show(context);
    }

    /// Where a snapshot can be read: where the volume can be that it was cut from.
    pub(crate) async fn place_of(&self, context: &Context, volume: &str) -> Result<Place> {
        let Some(volume) = self.bound_to_nodes(context, volume).await? else { return Ok(Place::Anywhere) };
        let nodes = self.nodes(context).await?;
        Ok(Place::Among(
            nodes.iter().filter(|node| topology::is_reachable(&volume, node)).map(ResourceExt::name_any).collect(),
        ))
    }

    /// The volume of this name, if it says anything about nodes.
    async fn bound_to_nodes(&self, context: &Context, name: &str) -> Result<Option<PersistentVolume>> {
        let lock = || self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, volume)) = lock().get(name)
            && at.elapsed() < VOLUME_AGE
        {
            return Ok(volume.clone());
        }
        let volumes: Api<PersistentVolume> = Api::all(context.client.clone());
        let found = volumes.get_opt(name).await.context("cannot read a persistent volume")?;
        let found = found.filter(topology::is_bound_to_nodes);
        let mut known = lock();
        known.retain(|_, (at, _)| at.elapsed() < VOLUME_AGE);
        known.insert(name.to_owned(), (Instant::now(), found.clone()));
        Ok(found)
    }

    async fn running(&self) -> Result<Vec<Running>> {
        let (backups, restores) = (ready(&self.backups).await?, ready(&self.restores).await?);
        let of_backups = backups.state().into_iter().flat_map(|backup| seen::of_backup(&backup)).collect::<Vec<_>>();
        let of_restores = restores.state().into_iter().flat_map(|restore| seen::of_restore(&restore));
        Ok(of_backups.into_iter().chain(of_restores).collect())
    }

    async fn limits(&self) -> Result<Limits> {
        let share = |repository: &ClusterRepository| {
            let limits = repository.spec.limits;
            Share { all: limits.volumes, namespace: limits.volumes_per_namespace }
        };
        let repositories = ready(&self.repositories).await?.state();
        let repositories = repositories.into_iter().map(|one| (one.name_any(), share(&one))).collect();
        Ok(Limits { node: self.per_node, rests: self.rests, repositories })
    }

    /// The nodes that pods of ours can be sent to and that an agent runs on.
    async fn nodes(&self, context: &Context) -> Result<Nodes> {
        let mut kept = self.nodes.lock().await;
        if let Some((at, nodes)) = kept.as_ref().filter(|(at, _)| at.elapsed() < NODES_AGE) {
            debug!(age = ?at.elapsed(), "nodes are known");
            return Ok(nodes.clone());
        }
        let agents = ListParams::default().labels("app.kubernetes.io/name=lifeboat,app.kubernetes.io/component=agent");
        let agents =
            context.namespaced::<Pod>(&context.namespace).list(&agents).await.context("cannot list the agents")?;
        let with_agent: BTreeSet<_> =
            agents.into_iter().filter(is_ready).filter_map(|pod| pod.spec?.node_name).collect();
        let all = Api::<Node>::all(context.client.clone());
        let all = all.list(&ListParams::default()).await.context("cannot list nodes")?;
        let nodes: Nodes = all
            .into_iter()
            .filter(|node| with_agent.contains(&node.name_any()) && topology::is_open(node, &self.tolerations))
            .collect();
        *kept = Some((Instant::now(), nodes.clone()));
        Ok(nodes)
    }
}

/// What a control loop watches, once it has seen everything.
async fn ready<K>(store: &OnceLock<Store<K>>) -> Result<&Store<K>>
where
    K: kube::Resource<DynamicType = ()> + Clone + 'static,
{
    let store = store.get().context("the control loops have not started yet")?;
    store.wait_until_ready().await.context("a watch ended before it began")?;
    Ok(store)
}

/// Whether a pod is ready and stays.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

impl Queue {
    /// Decides about everything that waits, and answers the one that asks.
    fn turn(
        &mut self,
        work: Work,
        mut running: Vec<Running>,
        nodes: &BTreeSet<String>,
        limits: &Limits,
        now: Instant,
    ) -> Verdict {
        let key = work.key.clone();
        self.waiting.insert(key.clone(), Asked { work, at: now });
        self.waiting.retain(|_, asked| now.duration_since(asked.at) < FORGOTTEN);
        self.begun.retain(|(begun, at)| {
            now.duration_since(*at) < UNSEEN && begun.key != key && !running.iter().any(|one| one.key == begun.key)
        });
        running.extend(self.begun.iter().map(|(begun, _)| begun.clone()));
        let waiting: Vec<_> = self.waiting.values().map(|asked| asked.work.clone()).collect();
        let verdict = decide(&waiting, &running, nodes, limits).remove(key.as_str());
        let verdict = verdict.unwrap_or(Verdict::Start(None));
        if let Verdict::Start(node) = &verdict
            && let Some(asked) = self.waiting.remove(&key)
        {
            let (nodes, rests) = match asked.work.need {
                Need::Rest(live) => (live, true),
                Need::Volume(_) => (node.iter().cloned().collect(), false),
            };
            let Work { kind, repository, namespace, .. } = asked.work;
            self.begun.push((Running { key, kind, repository, namespace, nodes, rests }, now));
        }
        verdict
    }

    fn show(&self, context: &Context) {
        let count = |kind| {
            let of_kind = self.waiting.values().filter(|asked| asked.work.kind == kind).count();
            i64::try_from(of_kind).unwrap_or(i64::MAX)
        };
        context.metrics.backups_waiting.set(count(Kind::Backup));
        context.metrics.restores_waiting.set(count(Kind::Restore));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(key: &str, namespace: &str, due: i64) -> Work {
        Work {
            key: key.into(),
            kind: Kind::Backup,
            repository: "r".into(),
            namespace: namespace.into(),
            due: Timestamp::from_second(due).unwrap(),
            need: Need::Volume(Place::Anywhere),
        }
    }

    #[test]
    fn what_began_counts_before_its_object_shows_it_and_not_for_ever() {
        let nodes = BTreeSet::from(["n".to_owned()]);
        let limits = Limits { node: 1, rests: 1, repositories: BTreeMap::new() };
        let mut queue = Queue::default();
        let began = Instant::now();
        let starts = |verdict| matches!(verdict, Verdict::Start(Some(node)) if node == "n");
        assert!(starts(queue.turn(work("a", "x", 1), Vec::new(), &nodes, &limits, began)));
        assert!(!starts(queue.turn(work("b", "x", 2), Vec::new(), &nodes, &limits, began)));
        assert!(
            starts(queue.turn(work("a", "x", 1), Vec::new(), &nodes, &limits, began)),
            "whoever could not write it down asks again and has it"
        );
        assert!(!starts(queue.turn(work("b", "x", 2), Vec::new(), &nodes, &limits, began)));
        assert!(starts(queue.turn(work("b", "x", 2), Vec::new(), &nodes, &limits, began + UNSEEN)));
    }

    #[test]
    fn a_turn_is_kept_free_for_who_is_next_as_long_as_it_asks() {
        let nodes = BTreeSet::from(["n".to_owned()]);
        let limits = Limits { node: 1, rests: 1, repositories: BTreeMap::new() };
        let running = Running {
            key: "old".into(),
            kind: Kind::Backup,
            repository: "r".into(),
            namespace: "x".into(),
            nodes: vec!["n".into()],
            rests: false,
        };
        let mut queue = Queue::default();
        let began = Instant::now();
        for asked in [work("first", "y", 1), work("second", "y", 2)] {
            assert!(matches!(queue.turn(asked, vec![running.clone()], &nodes, &limits, began), Verdict::Wait { .. }));
        }
        let verdict = queue.turn(work("second", "y", 2), Vec::new(), &nodes, &limits, began + NEXT_PAUSE);
        assert!(matches!(verdict, Verdict::Wait { ahead: 0, .. }), "{verdict:?}");
        let verdict = queue.turn(work("second", "y", 2), Vec::new(), &nodes, &limits, began + FORGOTTEN);
        assert!(matches!(verdict, Verdict::Start(_)), "{verdict:?}");
    }

    #[test]
    fn those_far_behind_ask_seldom() {
        assert_eq!(pause(0), NEXT_PAUSE);
        assert_eq!(pause(25), Duration::from_secs(2));
        assert_eq!(pause(usize::MAX), LONGEST_PAUSE);
        assert!(LONGEST_PAUSE * 2 < FORGOTTEN);
    }
}
