//! Expiry: what no snapshot refers to any more is deleted, while others write and others expire, without a lock.
//!
//! A *round* K condemns packs, seals epoch K-1, waits until every session of it is decided, takes out of the condemned
//! what the commits that are now fixed refer to, and deletes the rest. `docs/adr/0006` has the argument. Every step may
//! be repeated, by any number of deleters; none relies on a clock or on a listing being complete. `forget` sets
//! tombstones, `view` finds candidates, `repack` moves what is left of worn packs, `round` decides, `sweep` deletes, `merge` keeps the index small.

mod forget;
mod liveness;
pub(crate) mod marks;
mod merge;
pub(crate) mod packset;
mod published;
mod repack;
mod round;
mod suspect;
mod sweep;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use thiserror::Error;
use tracing::info;

pub use forget::{ForgetError, ForgetReport};
#[cfg(test)]
pub(crate) use liveness::parse as parse_union;

use crate::commits::CommitLogError;
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::id::{PackId, SessionId, SnapshotId};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::SessionError;
use crate::session::references::ReferencesError;
use crate::session::registration::EpochError;
use crate::store::StoreError;
use marks::MarkError;
use packset::PackSet;

/// Objects deleted or fetched at once.
const PARALLEL: usize = 16;

/// How to expire.
#[derive(Debug, Clone, Copy)]
pub struct ExpireOptions {
    /// A session without a sign of life for so long is aborted. Only its work is lost, also when a clock is wrong.
    pub silence: Duration,
    /// How long to wait for running sessions before the round is left for later.
    pub patience: Duration,
    /// Bytes that may be copied to take the space of dead chunks back; 0: nothing is repacked.
    pub repack_budget: u64,
    /// Index segments that sessions left behind are merged when there are so many.
    pub merge_from: usize,
    /// Change nothing, and report what would be done.
    pub dry_run: bool,
}

impl Default for ExpireOptions {
    fn default() -> Self {
        Self {
            silence: Duration::from_mins(15),
            patience: Duration::ZERO,
            repack_budget: 4 << 30,
            merge_from: 16,
            dry_run: false,
        }
    }
}

/// What an expiry did; in a dry run what it would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpireReport {
    /// Snapshots that live.
    pub snapshots: u64,
    /// Forgotten snapshots of which every trace was removed.
    pub snapshots_removed: u64,
    /// Packs deleted.
    pub packs_deleted: u64,
    /// Their bytes.
    pub bytes_deleted: u64,
    /// Packs of which the living chunks were copied, so that they could be deleted.
    pub packs_repacked: u64,
    /// Bytes copied for that.
    pub bytes_copied: u64,
    /// Packs of which less than half lives and that were not repacked: over the budget, damaged, or in use by others.
    pub packs_left: u64,
    /// Index segments of sessions that were merged.
    pub segments_merged: u64,
    /// Sessions that were aborted because they gave no sign of life.
    pub aborted: Vec<SessionId>,
    /// Running sessions that the round waits for; run again later. Empty: the round is done.
    pub waiting_for: Vec<SessionId>,
}

/// Why an expiry ended early. Another one goes on where it ended.
#[derive(Debug, Error)]
pub enum ExpireError {
    /// The list of snapshots cannot be read.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// The store failed.
    #[error("the store failed during expiry")]
    Store(#[from] StoreError),
    /// A mark of expiry is damaged or missing.
    #[error("expiry cannot go on: {what}")]
    Marks {
        /// What is wrong.
        what: String,
    },
    /// What a living snapshot refers to is not known, so nothing may be deleted.
    #[error(
        "the references of snapshot {snapshot} {what}: nothing is deleted. Forget the snapshot if it cannot be restored, or heal the repository"
    )]
    References {
        /// The snapshot.
        snapshot: SnapshotId,
        /// What is wrong with them.
        what: String,
    },
    /// An object cannot be encoded.
    #[error("a mark cannot be encoded")]
    Encode(#[source] std::io::Error),
    /// The session that repacks failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Someone asked to stop.
    #[error("the expiry was stopped; another one goes on where it ended")]
    Cancelled,
}

impl Classified for ExpireError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Session(error) => error.class(),
            Self::Marks { .. } | Self::References { .. } => ErrorClass::Damaged,
            Self::Encode(_) | Self::Cancelled => ErrorClass::Local,
        }
    }
}

impl From<MarkError> for ExpireError {
    fn from(error: MarkError) -> Self {
        match error {
            MarkError::Store(error) => Self::Store(error),
            error @ MarkError::Damaged { .. } => Self::Marks { what: error.to_string() },
        }
    }
}

impl From<EpochError> for ExpireError {
    fn from(error: EpochError) -> Self {
        match error {
            EpochError::Store(error) => Self::Store(error),
            error @ EpochError::Damaged { .. } => Self::Marks { what: error.to_string() },
        }
    }
}

impl From<ReferencesError> for ExpireError {
    fn from(error: ReferencesError) -> Self {
        match error {
            ReferencesError::Store(error) => Self::Store(error),
            ReferencesError::Damaged { snapshot, source } => {
                Self::References { snapshot, what: format!("are damaged ({source})") }
            }
            ReferencesError::Missing { snapshot } => Self::References { snapshot, what: "are missing".to_owned() },
        }
    }
}

/// One call of [`Repository::expire`].
struct Run {
    repository: Repository,
    engine: Arc<Engine>,
    options: ExpireOptions,
    progress: Arc<Progress>,
    report: ExpireReport,
    /// Sizes of packs, as they were listed last.
    sizes: BTreeMap<PackId, u64>,
    /// Worn packs of which enough lives: not looked at again until they lose more.
    dense: PackSet,
}

impl Run {
    fn new(repository: &Repository, options: ExpireOptions, progress: Arc<Progress>) -> Self {
        Self {
            repository: repository.clone(),
            engine: Arc::clone(&repository.engine),
            options,
            progress,
            report: ExpireReport::default(),
            sizes: BTreeMap::new(),
            dense: PackSet::default(),
        }
    }
}

impl Repository {
    /// Deletes what no snapshot refers to any more, and repacks what is mostly dead.
    ///
    /// Any number may run at the same time, on any machines. Stopped at any point, another one goes on. When sessions are
    /// running that began before, the round may end [`ExpireReport::waiting_for`] them: call again later.
    pub async fn expire(&self, options: ExpireOptions, progress: Arc<Progress>) -> Result<ExpireReport, ExpireError> {
        let stop = Arc::clone(&progress);
        let mut run = Run::new(self, options, progress);
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(ExpireError::Cancelled),
            done = run.expire().boxed() => done.map(|()| run.report),
        }
    }

    /// Commits that others saw, that are not there, and that did not expire: somebody took them away.
    pub(crate) async fn omissions(&self) -> Result<Vec<SessionId>, ExpireError> {
        let mut missing = self.engine.commits.omissions();
        if !missing.is_empty() {
            let dropped = self.dropped().await?;
            missing.retain(|session| !dropped.contains(session));
        }
        Ok(missing)
    }

    /// All sessions that committed, also those whose commits expired.
    pub(crate) async fn committed_ever(&self) -> Result<BTreeSet<SessionId>, ExpireError> {
        let mut committed = self.dropped().await?;
        committed.extend(self.engine.commits.all().into_iter().map(|(session, _)| session));
        Ok(committed)
    }

    /// Sessions whose commits expired.
    async fn dropped(&self) -> Result<BTreeSet<SessionId>, ExpireError> {
        let mut dropped = BTreeSet::new();
        let mut round = 1;
        while let Some(decided) = marks::finals(&self.engine, round).await? {
            dropped.extend(decided.dropped.into_iter().map(|(session, _)| session));
            round += 1;
        }
        Ok(dropped)
    }
}

impl Run {
    async fn expire(&mut self) -> Result<(), ExpireError> {
        loop {
            let before = self.standing().await?;
            match self.attempt(before).await {
                // Another deleter ended the round meanwhile, and took away what this one was looking at.
                Err(ExpireError::Marks { .. } | ExpireError::References { .. }) if self.standing().await? != before => {
                }
                Ok(()) => return self.merge_index().await,
                Err(error) => return Err(error),
            }
        }
    }

    /// The newest round, and whether it is done. Only ever grows.
    async fn standing(&self) -> Result<(u64, bool), ExpireError> {
        let newest = marks::newest_round(&self.engine).await?;
        Ok((newest, newest == 0 || marks::is_done(&self.engine, newest).await?))
    }

    async fn attempt(&mut self, standing: (u64, bool)) -> Result<(), ExpireError> {
        let (newest, is_done) = standing;
        if !is_done && !self.options.dry_run && !self.finish(newest).await? {
            return Ok(());
        }
        // While a round is open, a dry run builds on the one before.
        let settled = if is_done || !self.options.dry_run { newest } else { newest - 1 };
        let mut view = self.look(settled).await?;
        let plan = self.plan_repack(&view).await?;
        if self.options.dry_run {
            self.report_plan(&view, &plan);
            return Ok(());
        }
        if self.repack(&view, plan).await? {
            view = self.look(settled).await?;
        }
        self.delete_unpublished(&view).await?;
        if view.candidates.is_empty() && view.dead.is_empty() {
            self.report.snapshots = view.live.len() as u64;
            return Ok(());
        }
        let round = newest + 1;
        let bytes = marks::Condemned { packs: view.candidates }
            .to_bytes(&self.engine.mark_key(), round)
            .map_err(ExpireError::Encode)?;
        // Whoever is first condemns; what others found is found again in a later round.
        let created = self.engine.store.put_if_absent(&marks::condemned_key(round), bytes.into()).await?;
        info!(round, first = created.is_ours(), "condemned");
        self.finish(round).await?;
        Ok(())
    }

    fn report_plan(&mut self, view: &view::View, plan: &repack::Plan) {
        self.report.snapshots = view.live.len() as u64;
        self.report.snapshots_removed = view.dead.len() as u64;
        for pack in view.candidates.iter().chain(view.unpublished.iter()) {
            self.report.packs_deleted += 1;
            self.report.bytes_deleted += self.sizes.get(&pack).copied().unwrap_or(0);
        }
        self.report.packs_repacked = plan.sources.len() as u64;
        self.report.bytes_copied = plan.bytes;
    }
}
