//! Which waiting work begins now and where, and what the rest waits for: a pure function, without client and clock.
//!
//! Restores come before backups. Among the others it is the turn of the namespace that has least going on, and in a namespace of
//! what has been due longest. Work that cannot begin is passed over, so that a full node does not keep another one idle.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use jiff::Timestamp;
use lifeboat_crds::conditions::Reason;

/// What work is for. Restores come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Restore,
    Backup,
}

/// Where one volume can be read or written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// On this node alone: it is mounted there.
    On(String),
    /// On these, by the topology of its storage.
    Among(BTreeSet<String>),
    /// On any node that has an agent.
    Anywhere,
}

/// What work needs to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Need {
    /// One volume is read or written.
    Volume(Place),
    /// An application is brought to rest, and meanwhile volumes are read where they are mounted: one node an entry.
    Rest(Vec<String>),
}

/// Work that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Work {
    /// The same for the same work after every restart.
    pub(crate) key: String,
    pub(crate) kind: Kind,
    pub(crate) repository: String,
    pub(crate) namespace: String,
    /// Since when it should have begun.
    pub(crate) due: Timestamp,
    pub(crate) need: Need,
}

/// Work that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Running {
    pub(crate) key: String,
    pub(crate) kind: Kind,
    pub(crate) repository: String,
    pub(crate) namespace: String,
    /// One entry a volume: the node.
    pub(crate) nodes: Vec<String>,
    /// Whether an application rests, or is about to.
    pub(crate) rests: bool,
}

/// How much goes on at once through one repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    /// Volumes in all.
    pub(crate) all: u32,
    /// Volumes of one namespace.
    pub(crate) namespace: u32,
}

/// How much goes on at once.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Volumes on one node; a restore may be one more.
    pub(crate) node: u32,
    /// Applications at rest, in the whole cluster.
    pub(crate) rests: u32,
    pub(crate) repositories: BTreeMap<String, Share>,
}

/// What becomes of waiting work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It begins now; a volume on this node.
    Start(Option<String>),
    Wait {
        reason: Reason,
        message: String,
        /// How much work waits in front of it.
        ahead: usize,
    },
}

/// Why work does not begin.
type Obstacle = (Reason, String);

/// What is taken by running work, by work that begins now and, on nodes, by work that waits for several places at once.
#[derive(Default)]
struct Load<'a> {
    nodes: BTreeMap<&'a str, u32>,
    /// Kept free for an application whose volumes must be read together; backups that come after it leave them alone.
    reserved: BTreeMap<&'a str, u32>,
    rests: u32,
    /// Volumes by repository, of both kinds and of restores alone.
    repositories: BTreeMap<&'a str, (u32, u32)>,
    /// The same by repository and namespace.
    shares: BTreeMap<(&'a str, &'a str), (u32, u32)>,
    /// Everything that a namespace has going on.
    namespaces: BTreeMap<&'a str, u32>,
}

impl<'a> Load<'a> {
    fn of(running: &'a [Running]) -> Self {
        let mut load = Self::default();
        for one in running {
            load.add(one.kind, &one.repository, &one.namespace, one.nodes.iter().map(String::as_str), one.rests);
        }
        load
    }

    fn add(
        &mut self,
        kind: Kind,
        repository: &'a str,
        namespace: &'a str,
        nodes: impl Iterator<Item = &'a str>,
        rests: bool,
    ) {
        let mut volumes = 0;
        for node in nodes {
            *self.nodes.entry(node).or_default() += 1;
            volumes += 1;
        }
        let restored = if kind == Kind::Restore { volumes } else { 0 };
        for taken in
            [self.repositories.entry(repository).or_default(), self.shares.entry((repository, namespace)).or_default()]
        {
            taken.0 += volumes;
            taken.1 += restored;
        }
        self.rests += u32::from(rests);
        *self.namespaces.entry(namespace).or_default() += volumes.max(1);
    }

    /// Whether so many more volumes find a place on a node. An empty node takes any number: they are done in turn there.
    fn has_room(&self, node: &str, more: u32, kind: Kind, limits: &Limits) -> bool {
        let taken = self.nodes.get(node).copied().unwrap_or(0);
        let (reserved, limit) = match kind {
            Kind::Restore => (0, limits.node + 1),
            Kind::Backup => (self.reserved.get(node).copied().unwrap_or(0), limits.node),
        };
        taken + reserved + more <= limit || taken + reserved == 0
    }

    /// Whether the repository has room. Backups count restores too; restores wait only for each other.
    fn repository_obstacle(&self, work: &Work, volumes: u32, limits: &Limits) -> Option<Obstacle> {
        let share = limits.repositories.get(&work.repository)?;
        let of = |taken: Option<&(u32, u32)>| match (taken, work.kind) {
            (None, _) => 0,
            (Some(taken), Kind::Backup) => taken.0,
            (Some(taken), Kind::Restore) => taken.1,
        };
        let (repository, namespace) = (work.repository.as_str(), work.namespace.as_str());
        let is_full = |taken: u32, limit: u32| volumes > 0 && taken > 0 && taken + volumes > limit;
        let all = of(self.repositories.get(repository));
        if is_full(all, share.all) {
            let message =
                format!("the repository `{repository}` has {all} volumes under way; its limit is {}", share.all);
            return Some((Reason::RepositoryBusy, message));
        }
        let own = of(self.shares.get(&(repository, namespace)));
        is_full(own, share.namespace).then(|| {
            let message = format!(
                "the namespace has {own} volumes under way with the repository `{repository}`; the limit is {}",
                share.namespace
            );
            (Reason::NamespaceBusy, message)
        })
    }
}

/// Decides about all waiting work, by key. `nodes` are those that an agent runs on and that a pod can be sent to.
pub(crate) fn decide<'a>(
    waiting: &'a [Work],
    running: &'a [Running],
    nodes: &'a BTreeSet<String>,
    limits: &Limits,
) -> BTreeMap<&'a str, Verdict> {
    let mut load = Load::of(running);
    let mut queues: BTreeMap<(Kind, &str), Vec<&Work>> = BTreeMap::new();
    for work in waiting {
        queues.entry((work.kind, &work.namespace)).or_default().push(work);
    }
    let mut turns = BinaryHeap::new();
    for ((kind, namespace), queue) in &mut queues {
        queue.sort_by_key(|work| Reverse((work.due, &work.key)));
        let going = load.namespaces.get(namespace).copied().unwrap_or(0);
        turns.extend(queue.last().map(|head| Reverse((*kind, going, head.due, *namespace))));
    }
    let mut verdicts = BTreeMap::new();
    let mut ahead = 0;
    while let Some(Reverse((kind, going, _, namespace))) = turns.pop() {
        let Some(queue) = queues.get_mut(&(kind, namespace)) else { continue };
        let Some(work) = queue.pop() else { continue };
        // What waits counts like what begins, so that the order of those that wait is fair as well.
        turns.extend(queue.last().map(|next| Reverse((kind, going + 1, next.due, namespace))));
        let verdict = match place(work, &load, nodes, limits) {
            Ok(node) => {
                let single = node.into_iter();
                let (taken, rests): (Vec<&str>, _) = match &work.need {
                    Need::Volume(_) => (single.collect(), false),
                    Need::Rest(live) => (live.iter().map(String::as_str).collect(), true),
                };
                load.add(work.kind, &work.repository, &work.namespace, taken.into_iter(), rests);
                Verdict::Start(node.map(str::to_owned))
            }
            Err((reason, message)) => {
                if let (Need::Rest(live), Reason::NodeBusy) = (&work.need, reason) {
                    for node in live {
                        *load.reserved.entry(node).or_default() += 1;
                    }
                }
                ahead += 1;
                Verdict::Wait { reason, message, ahead: ahead - 1 }
            }
        };
        verdicts.insert(work.key.as_str(), verdict);
    }
    verdicts
}

/// The node on which work can begin (`None`: it needs no single one), or what stands in its way.
fn place<'a>(
    work: &'a Work,
    load: &Load<'_>,
    nodes: &'a BTreeSet<String>,
    limits: &Limits,
) -> Result<Option<&'a str>, Obstacle> {
    let volumes = match &work.need {
        Need::Volume(_) => 1,
        Need::Rest(live) => u32::try_from(live.len()).unwrap_or(u32::MAX),
    };
    if let Some(obstacle) = load.repository_obstacle(work, volumes, limits) {
        return Err(obstacle);
    }
    let busy = |node: &str| {
        let taken = load.nodes.get(node).copied().unwrap_or(0);
        (Reason::NodeBusy, format!("the node {node} has {taken} volumes under way; its limit is {}", limits.node))
    };
    match &work.need {
        Need::Volume(Place::On(node)) if load.has_room(node, 1, work.kind, limits) => Ok(Some(node)),
        Need::Volume(Place::On(node)) => Err(busy(node)),
        Need::Volume(Place::Among(some)) => least_loaded(work, nodes.intersection(some), load, limits).map(Some),
        Need::Volume(Place::Anywhere) => least_loaded(work, nodes.iter(), load, limits).map(Some),
        Need::Rest(_) if load.rests >= limits.rests => {
            let message =
                format!("{} applications are at rest or about to be; the limit is {}", load.rests, limits.rests);
            Err((Reason::QuiesceBusy, message))
        }
        Need::Rest(live) => {
            let mut wanted: BTreeMap<&str, u32> = BTreeMap::new();
            for node in live {
                *wanted.entry(node).or_default() += 1;
            }
            let full = wanted.into_iter().find(|(node, more)| !load.has_room(node, *more, work.kind, limits));
            full.map_or(Ok(None), |(node, _)| Err(busy(node)))
        }
    }
}

/// The node with the least to do that has room. Among equals each work has its own favourite, so that they spread.
fn least_loaded<'a>(
    work: &Work,
    nodes: impl Iterator<Item = &'a String> + Clone,
    load: &Load<'_>,
    limits: &Limits,
) -> Result<&'a str, Obstacle> {
    let taken = |node: &str| load.nodes.get(node).copied().unwrap_or(0);
    let favourite = |node: &str| *blake3::hash(format!("{}\0{node}", work.key).as_bytes()).as_bytes();
    let open = nodes.clone().filter(|node| load.has_room(node, 1, work.kind, limits));
    if let Some(node) = open.min_by_key(|node| (taken(node), favourite(node))) {
        return Ok(node);
    }
    match nodes.count() {
        0 => Err((Reason::NoAgent, "no node on which an agent runs can mount the volume".to_owned())),
        count => {
            let message = format!("all {count} nodes that can mount the volume have {} volumes under way", limits.node);
            Err((Reason::NodeBusy, message))
        }
    }
}
