//! Checking a repository: that everything which snapshots refer to is there and whole.
//!
//! Without reading data: every object but packs against its hash, commits, references, file lists, directories of packs.
//! With: every byte of every pack in use, or of a share of them. `files` looks at snapshots, `packs` at packs. What expires
//! during the check is no problem.

mod files;
mod packs;
mod problem;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

pub use problem::Problem;

use crate::commits::CommitLogError;
use crate::error::{Classified, ErrorClass};
use crate::expire::ExpireError;
use crate::expire::marks::{
    LiveRefs, MARKS_PREFIX, TOMBSTONE_PREFIX, condemned_key, done_key, exists, final_key, round_of, verify_with,
};
use crate::id::{Place, SnapshotId};
use crate::manifest::ManifestError;
use crate::objects;
use crate::progress::Progress;
use crate::refset::Refset;
use crate::repository::Repository;
use crate::scrub::{ScrubError, small_keys, small_objects};
use crate::session::decision::decision_key;
use crate::session::references::{ReferencesError, in_force};
use crate::share::Share;
use crate::snapshot::Snapshot;
use crate::store::StoreError;

/// How thoroughly to check.
#[derive(Debug, Clone, Default)]
pub struct CheckOptions {
    /// Reads and opens every chunk in use in this share of the packs: those after the ones of the last check.
    pub read_data: Option<Share>,
    /// Remembers where the last share ended; without it every share is the first one.
    pub cache_dir: Option<PathBuf>,
}

impl CheckOptions {
    /// Reads everything in use.
    pub fn all_data() -> Self {
        Self { read_data: Some(Share::ALL), cache_dir: None }
    }
}

/// What a check found.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Packs in use.
    pub packs: u64,
    /// Chunks in use.
    pub chunks: u64,
    /// Bytes of packs read.
    pub bytes_read: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Chunks in use that cannot be read.
    pub(crate) unreadable: Refset,
}

/// A check that could not be done.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The list of snapshots cannot be read.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// The objects cannot be read.
    #[error("the objects cannot be read")]
    Objects(#[source] ScrubError),
    /// The store failed.
    #[error("the store failed during the check")]
    Store(#[from] StoreError),
    /// The marks of expiry, which tell what was removed rightly, cannot be read.
    #[error("cannot tell which commits expired")]
    Marks(#[source] Box<ExpireError>),
    /// The file list of a snapshot cannot be read, and not because it is damaged.
    #[error("cannot read the files of snapshot {snapshot}")]
    Files {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Why.
        source: ManifestError,
    },
    /// The key that opened the repository cannot read data.
    #[error("this key can write but not read data; check without reading data, or use a key with the private part")]
    NoPrivateKey,
    /// Somebody asked to stop.
    #[error("stopped on request")]
    Cancelled,
    /// A worker thread ended unexpectedly.
    #[error("a worker failed: {0}")]
    Worker(#[from] tokio::task::JoinError),
}

impl Classified for CheckError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log(error) => error.class(),
            Self::Objects(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Marks(error) => error.class(),
            Self::Files { source, .. } => source.class(),
            Self::NoPrivateKey => ErrorClass::Key,
            Self::Cancelled => ErrorClass::Invalid,
            Self::Worker(_) => ErrorClass::Local,
        }
    }
}

impl From<ScrubError> for CheckError {
    fn from(error: ScrubError) -> Self {
        if matches!(error, ScrubError::Cancelled) { Self::Cancelled } else { Self::Objects(error) }
    }
}

impl Repository {
    /// Checks everything that snapshots refer to. Damage is reported, not an error.
    pub async fn check(&self, options: CheckOptions, progress: Arc<Progress>) -> Result<CheckReport, CheckError> {
        if options.read_data.is_some() && self.engine.keys.domain().private.is_none() {
            return Err(CheckError::NoPrivateKey);
        }
        let mut check = Check { repository: self, report: CheckReport::default(), progress };
        let snapshots = check.commits().await?;
        self.engine.index.refresh().await?;
        let newest = self.engine.commits.references();
        let mut used = Refset::default();
        for snapshot in &snapshots {
            check.progress.add_entry();
            check.report.snapshots += 1;
            used.extend(&check.snapshot(snapshot, &snapshots, &newest).await?);
        }
        check.packs(&used, &options).await?;
        if !check.report.problems.is_empty() {
            check.leave_out_expired(&snapshots, &newest).await?;
        }
        Ok(check.report)
    }
}

struct Check<'a> {
    repository: &'a Repository,
    report: CheckReport,
    progress: Arc<Progress>,
}

impl Check<'_> {
    /// All small objects, and the snapshots whose commits are whole.
    async fn commits(&mut self) -> Result<Vec<Snapshot>, CheckError> {
        let store = &self.repository.engine.store;
        let keys = small_keys(&**store).await?;
        let (_, problems) = small_objects(store, keys.clone(), &self.progress).await?;
        self.report.problems = problems;
        self.marks(&keys).await?;
        let (snapshots, damaged) = self.repository.readable_snapshots().await?;
        for error in damaged {
            let CommitLogError::Damaged { session, what } = error else { return Err(error.into()) };
            if !self.is_reported(&decision_key(session)) {
                self.report.problems.push(Problem::Commit { session, what });
            }
        }
        match self.repository.omissions().await {
            Ok(missing) => self.report.problems.extend(missing.into_iter().map(Problem::MissingCommit)),
            // Without the mark nothing can be said, and the mark is reported.
            Err(ExpireError::Marks { .. }) if self.is_any_reported(|key| key.starts_with(MARKS_PREFIX)) => {}
            Err(error) => return Err(CheckError::Marks(Box::new(error))),
        }
        Ok(snapshots)
    }

    /// That marks and tombstones were written by this repository.
    async fn marks(&mut self, keys: &[String]) -> Result<(), CheckError> {
        let engine = &self.repository.engine;
        let own = engine.mark_key();
        for key in keys.iter().filter(|key| key.starts_with(MARKS_PREFIX) || key.starts_with(TOMBSTONE_PREFIX)) {
            if self.is_reported(key) {
                continue;
            }
            let what = match engine.store.get(key, objects::limit(key)).await {
                Ok(bytes) => verify_with(&own, key, &bytes).err().map(|error| error.to_string()),
                // Of a round that was done since.
                Err(error) if error.is_not_found() => None,
                Err(error) if error.class() == ErrorClass::Damaged => Some(error.to_string()),
                Err(error) => return Err(error.into()),
            };
            self.report.problems.extend(what.map(|what| Problem::Object { key: key.clone(), what }));
        }
        let listed: BTreeSet<_> = keys.iter().map(String::as_str).collect();
        for key in marks_expected(&listed) {
            if !listed.contains(key.as_str()) && !exists(&*engine.store, &key).await? {
                self.report.problems.push(Problem::Object { key, what: "it is missing".to_owned() });
            }
        }
        Ok(())
    }

    /// The references and the files of a snapshot; what it refers to.
    async fn snapshot(
        &mut self,
        snapshot: &Snapshot,
        known: &[Snapshot],
        newest: &BTreeMap<SnapshotId, LiveRefs>,
    ) -> Result<Refset, CheckError> {
        let refs = self.references(snapshot, newest.get(&snapshot.id)).await?;
        self.content(snapshot, &refs, known).await?;
        Ok(refs.set().clone())
    }

    /// Takes back what was found of snapshots that were forgotten meanwhile, and looks again at those that were repacked.
    async fn leave_out_expired(
        &mut self,
        before: &[Snapshot],
        then: &BTreeMap<SnapshotId, LiveRefs>,
    ) -> Result<(), CheckError> {
        let repository = self.repository;
        let (snapshots, _) = repository.readable_snapshots().await?;
        let newest = repository.engine.commits.references();
        let living: BTreeSet<_> = snapshots.iter().map(|snapshot| snapshot.id).collect();
        let is_changed = |id: &SnapshotId| !living.contains(id) || newest.get(id) != then.get(id);
        let changed: BTreeSet<_> = before.iter().map(|snapshot| snapshot.id).filter(is_changed).collect();
        if changed.is_empty() {
            return Ok(());
        }
        let mut used = Refset::default();
        for snapshot in &snapshots {
            match in_force(&repository.engine, &newest, snapshot.id).await {
                Ok(refs) => used.extend(&refs),
                Err(ReferencesError::Store(error)) if error.class() != ErrorClass::Damaged => return Err(error.into()),
                // It is among the problems already.
                Err(_) => {}
            }
        }
        self.report.problems.retain(|problem| match problem {
            Problem::Refset { snapshot, .. }
            | Problem::Unreferenced { snapshot, .. }
            | Problem::Files { snapshot, .. }
            | Problem::MissingMember { snapshot, .. } => !changed.contains(snapshot),
            Problem::Pack { pack, .. } => used.has_pack(*pack),
            Problem::Chunk { place, .. } => used.contains(*place),
            Problem::Object { .. } | Problem::Commit { .. } | Problem::MissingCommit(_) => true,
        });
        let unreadable = std::mem::take(&mut self.report.unreadable);
        for (pack, slots) in unreadable.each_pack() {
            let places = slots.into_iter().map(|slot| Place { pack, slot });
            places.filter(|place| used.contains(*place)).for_each(|place| self.report.unreadable.insert(place));
        }
        for snapshot in snapshots.iter().filter(|snapshot| changed.contains(&snapshot.id)) {
            self.snapshot(snapshot, &snapshots, &newest).await?;
        }
        Ok(())
    }

    /// Whether this object was found damaged already.
    fn is_reported(&self, wanted: &str) -> bool {
        self.is_any_reported(|key| key == wanted)
    }

    fn is_any_reported(&self, is_wanted: impl Fn(&str) -> bool) -> bool {
        self.report.problems.iter().any(|problem| matches!(problem, Problem::Object { key, .. } if is_wanted(key)))
    }
}

/// The marks that there must be of rounds of which others are there.
fn marks_expected(listed: &BTreeSet<&str>) -> Vec<String> {
    let newest = listed.iter().filter_map(|key| round_of(key)).max().unwrap_or(0);
    let mut expected = Vec::new();
    for round in 1..=newest {
        expected.push(condemned_key(round));
        if round < newest || listed.contains(done_key(round).as_str()) {
            expected.extend([final_key(round), done_key(round)]);
        }
    }
    expected
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
