//! Replication: snapshots of one repository become snapshots of another, which keeps its own retention.
//!
//! The replicator is an ordinary writing session at the target, one for each snapshot. So the target's expiry treats it
//! as any writer, no listing has to be complete, and after a crash what was uploaded is found again. A replica is a
//! snapshot with an id of its own and the label `replica-of`. Where both repositories have the same keys, a chunk that
//! the target has is not even read; with other keys chunks are opened here and sealed there. See docs/adr/0010.

mod copy;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use thiserror::Error;
use tracing::warn;

use crate::commits::CommitLogError;
use crate::error::{Classified, ErrorClass};
use crate::id::SnapshotId;
use crate::manifest::ManifestError;
use crate::progress::Progress;
use crate::read::ReadError;
use crate::repository::Repository;
use crate::session::{Session, SessionError, SessionOptions};
use crate::snapshot::{Content, NewSnapshot, Snapshot, WriteStats};

/// The label that names the snapshot which a replica is one of.
pub const REPLICA_OF: &str = "replica-of";

/// What is replicated: of everything that fits, what the target lacks.
#[derive(Debug, Clone, Default)]
pub struct ReplicateOptions {
    /// These snapshots, whatever else is asked for, and whether or not the target had them once.
    pub snapshots: Vec<SnapshotId>,
    /// Only these lineages; empty: all.
    pub lineages: Vec<String>,
    /// Only snapshots with all these labels.
    pub tags: Vec<(String, String)>,
    /// Only snapshots made after this time.
    pub newer_than: Option<Timestamp>,
    /// Only so many of each lineage: the newest.
    pub newest: Option<usize>,
    /// Nothing is written.
    pub dry_run: bool,
}

/// A snapshot that was replicated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replicated {
    /// The snapshot.
    pub source: SnapshotId,
    /// Its replica; `None` with `dry_run`.
    pub replica: Option<SnapshotId>,
    /// Plain bytes that were read.
    pub read_bytes: u64,
    /// Plain bytes that the target lacked.
    pub new_bytes: u64,
    /// Bytes that they take in packs.
    pub stored_bytes: u64,
}

/// What a replication did.
#[derive(Debug, Clone, Default)]
pub struct ReplicateReport {
    /// What was replicated, in this order.
    pub copied: Vec<Replicated>,
    /// Snapshots that the target has already.
    pub present: u64,
    /// Snapshots that the target lacks though it has a later one of the lineage: its retention let them go, or they were
    /// not chosen at the time. They are replicated if they are named.
    pub passed_over: Vec<SnapshotId>,
    /// Snapshots that were forgotten at the source before they were copied.
    pub expired: Vec<SnapshotId>,
}

/// Why a replication ended early. What was replicated before stays.
#[derive(Debug, Error)]
pub enum ReplicateError {
    /// A list of snapshots cannot be read.
    #[error("cannot read which snapshots the {which} has")]
    Log {
        /// Source or target.
        which: &'static str,
        /// Why.
        source: CommitLogError,
    },
    /// Both are the same.
    #[error("source and target are the same repository")]
    Same,
    /// A snapshot does not exist.
    #[error("there is no snapshot {0} to replicate")]
    NotFound(SnapshotId),
    /// A snapshot cannot be read.
    #[error("cannot read the files of a snapshot")]
    Manifest(#[from] ManifestError),
    /// A chunk cannot be read.
    #[error("cannot read a chunk")]
    Read(#[from] ReadError),
    /// The target does not take it.
    #[error("cannot write into the target")]
    Session(#[from] SessionError),
    /// The source's expiry would not know of the replication.
    #[error("cannot register at the source")]
    Pin(#[source] SessionError),
    /// A replica that the target has is not like its original.
    #[error("the target has no replica of {0}, which the recovery point needs")]
    MissingMember(SnapshotId),
    /// Somebody asked to stop.
    #[error("stopped on request; the next replication goes on from here")]
    Cancelled,
}

impl Classified for ReplicateError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log { source, .. } => source.class(),
            Self::Same | Self::Cancelled => ErrorClass::Invalid,
            Self::NotFound(_) | Self::MissingMember(_) => ErrorClass::NotFound,
            Self::Manifest(error) => error.class(),
            Self::Read(error) => error.class(),
            Self::Session(error) | Self::Pin(error) => error.class(),
        }
    }
}

/// Replicates what was chosen, oldest first, recovery points after their members.
pub async fn replicate(
    source: &Repository,
    target: &Repository,
    options: ReplicateOptions,
    progress: Arc<Progress>,
) -> Result<ReplicateReport, ReplicateError> {
    if source.id() == target.id() {
        return Err(ReplicateError::Same);
    }
    let log = |which| move |source| ReplicateError::Log { which, source };
    let snapshots = source.snapshots().await.map_err(log("source"))?;
    let mut replicas = Replicas::of(target.snapshots().await.map_err(log("target"))?);
    let (chosen, mut report) = choose(&snapshots, &replicas, &options)?;
    progress.expect_bytes(chosen.iter().map(|snapshot| snapshot.counts.bytes).sum());
    for snapshot in chosen {
        progress.set_current(snapshot.lineage.as_bytes());
        let mut copied =
            Replicated { source: snapshot.id, replica: None, read_bytes: 0, new_bytes: 0, stored_bytes: 0 };
        if !options.dry_run {
            let replica = match one(source, target, snapshot, &snapshots, &replicas, &progress).await {
                Ok(replica) => replica,
                Err(error) => {
                    let is_named = options.snapshots.contains(&snapshot.id);
                    if is_named || !has_expired(source, snapshot).await.map_err(log("source"))? {
                        return Err(error);
                    }
                    report.expired.push(snapshot.id);
                    continue;
                }
            };
            copied.replica = Some(replica.id);
            copied.read_bytes = replica.stats.read_bytes;
            copied.new_bytes = replica.stats.new_bytes;
            copied.stored_bytes = replica.stats.stored_bytes;
            replicas.by_source.insert(snapshot.id, replica);
        }
        progress.add_entry();
        report.copied.push(copied);
    }
    Ok(report)
}

/// Whether the source does not have the snapshot any more.
async fn has_expired(source: &Repository, snapshot: &Snapshot) -> Result<bool, CommitLogError> {
    Ok(source.snapshots().await?.iter().all(|found| found.id != snapshot.id))
}

/// What the target has.
struct Replicas {
    by_source: BTreeMap<SnapshotId, Snapshot>,
}

impl Replicas {
    fn of(snapshots: Vec<Snapshot>) -> Self {
        let named = |snapshot: Snapshot| Some((snapshot.tags.get(REPLICA_OF)?.parse().ok()?, snapshot));
        Self { by_source: snapshots.into_iter().filter_map(named).collect() }
    }

    /// The time of the newest replica of a lineage.
    fn newest(&self, lineage: &str) -> Option<Timestamp> {
        let of = self.by_source.values().filter(|replica| replica.lineage == lineage);
        of.map(|replica| replica.time).max()
    }
}

/// Chooses among the snapshots, which come oldest first.
fn choose<'a>(
    snapshots: &'a [Snapshot],
    replicas: &Replicas,
    options: &ReplicateOptions,
) -> Result<(Vec<&'a Snapshot>, ReplicateReport), ReplicateError> {
    let known: BTreeMap<_, _> = snapshots.iter().map(|snapshot| (snapshot.id, snapshot)).collect();
    if let Some(missing) = options.snapshots.iter().find(|id| !known.contains_key(id)) {
        return Err(ReplicateError::NotFound(*missing));
    }
    let mut report = ReplicateReport::default();
    let mut ids = BTreeSet::new();
    let mut of_lineage: BTreeMap<&str, usize> = BTreeMap::new();
    for snapshot in snapshots.iter().rev() {
        let is_named = options.snapshots.contains(&snapshot.id);
        let fits = (options.snapshots.is_empty() && fits(snapshot, options)) && {
            let count = of_lineage.entry(&snapshot.lineage).or_default();
            *count += 1;
            options.newest.is_none_or(|newest| *count <= newest)
        };
        if !is_named && !fits {
            continue;
        }
        if replicas.by_source.contains_key(&snapshot.id) {
            report.present += 1;
        } else if is_named || replicas.newest(&snapshot.lineage).is_none_or(|newest| snapshot.time > newest) {
            ids.insert(snapshot.id);
        } else {
            report.passed_over.push(snapshot.id);
        }
    }
    // A recovery point is nothing without its members.
    let points: Vec<_> = ids.iter().filter_map(|id| known.get(id)).copied().collect();
    for snapshot in points {
        if let Content::RecoveryPoint { members, .. } = &snapshot.content {
            ids.extend(members.iter().filter(|member| !replicas.by_source.contains_key(member)));
        }
    }
    report.passed_over.retain(|id| !ids.contains(id));
    let mut chosen: Vec<_> = snapshots.iter().filter(|snapshot| ids.contains(&snapshot.id)).collect();
    chosen.sort_by_key(|snapshot| matches!(snapshot.content, Content::RecoveryPoint { .. }));
    Ok((chosen, report))
}

fn fits(snapshot: &Snapshot, options: &ReplicateOptions) -> bool {
    (options.lineages.is_empty() || options.lineages.contains(&snapshot.lineage))
        && options.tags.iter().all(|(name, value)| snapshot.tags.get(name) == Some(value))
        && options.newer_than.is_none_or(|time| snapshot.time > time)
}

/// Replicates one snapshot in a session of its own.
async fn one(
    source: &Repository,
    target: &Repository,
    snapshot: &Snapshot,
    snapshots: &[Snapshot],
    replicas: &Replicas,
    progress: &Arc<Progress>,
) -> Result<Snapshot, ReplicateError> {
    // The last state of the same thing that both have: what did not change since is not looked at.
    let base = snapshots.iter().rev().find_map(|base| {
        let replica = replicas.by_source.get(&base.id)?;
        (base.lineage == snapshot.lineage && matches!(base.content, Content::Tree { .. })).then_some((base, replica))
    });
    let mut pins = Vec::new();
    if let Content::Tree { .. } = snapshot.content {
        // What is read must not expire meanwhile, as in a restore.
        for read in [Some(snapshot), base.map(|(before, _)| before)].into_iter().flatten() {
            pins.extend(source.pin(read).await.map_err(ReplicateError::Pin)?);
        }
    }
    let done = in_session(source, target, snapshot, base, replicas, progress).await;
    for pin in pins {
        pin.release().await;
    }
    done
}

async fn in_session(
    source: &Repository,
    target: &Repository,
    snapshot: &Snapshot,
    base: Option<(&Snapshot, &Snapshot)>,
    replicas: &Replicas,
    progress: &Arc<Progress>,
) -> Result<Snapshot, ReplicateError> {
    let began = std::time::Instant::now();
    let options = SessionOptions { purpose: "replicate".to_owned(), ..SessionOptions::default() };
    let session = target.begin(options).await?;
    let work = async {
        if let Some((_, replica)) = base {
            session.inherit_from(replica).await?;
        }
        let (content, read_bytes) = match &snapshot.content {
            Content::RecoveryPoint { members, description } => (point(members, description, replicas)?, 0),
            Content::Tree { root, skipped } => {
                copy::tree(source, target, &session, (root, skipped), base, progress).await?
            }
        };
        commit(&session, snapshot, content, base.map(|(_, replica)| replica.id), read_bytes, began).await
    };
    let done = tokio::select! {
        biased;
        () = progress.cancelled() => Err(ReplicateError::Cancelled),
        done = work => done,
    };
    if let Err(error) = &done
        && let Err(failed) = session.abort(&error.to_string()).await
    {
        warn!(session = %session.id(), error = %failed, "the session of a replication was not aborted");
    }
    done
}

async fn commit(
    session: &Arc<Session>,
    snapshot: &Snapshot,
    content: Content,
    parent: Option<SnapshotId>,
    read_bytes: u64,
    began: std::time::Instant,
) -> Result<Snapshot, ReplicateError> {
    let mut tags = snapshot.tags.clone();
    tags.insert(REPLICA_OF.to_owned(), snapshot.id.to_string());
    let stats = session.stats();
    let new = NewSnapshot {
        id: SnapshotId::random(),
        time: snapshot.time,
        lineage: snapshot.lineage.clone(),
        tags,
        host: snapshot.host.clone(),
        parent,
        content,
        counts: snapshot.counts,
        stats: WriteStats {
            read_bytes,
            new_bytes: stats.new_bytes,
            stored_bytes: stats.stored_bytes,
            duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(0),
        },
    };
    let committed = Arc::clone(session).commit(vec![new]).await?.pop();
    committed.ok_or_else(|| SessionError::Closed { session: session.id() }.into())
}

/// A recovery point that names the replicas, also in its description.
fn point(
    members: &[SnapshotId],
    description: &serde_json::Value,
    replicas: &Replicas,
) -> Result<Content, ReplicateError> {
    let mut names = BTreeMap::new();
    for member in members {
        let replica = replicas.by_source.get(member).ok_or(ReplicateError::MissingMember(*member))?;
        names.insert(*member, replica.id);
    }
    let mut description = description.clone();
    rename(&mut description, &names);
    Ok(Content::RecoveryPoint {
        members: members.iter().filter_map(|member| names.get(member)).copied().collect(),
        description,
    })
}

/// Replaces ids of snapshots wherever they stand.
fn rename(value: &mut serde_json::Value, names: &BTreeMap<SnapshotId, SnapshotId>) {
    match value {
        serde_json::Value::String(text) => {
            if let Some(name) = text.parse().ok().and_then(|id: SnapshotId| names.get(&id)) {
                *text = name.to_string();
            }
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(|value| rename(value, names)),
        serde_json::Value::Object(values) => values.values_mut().for_each(|value| rename(value, names)),
        _ => {}
    }
}
