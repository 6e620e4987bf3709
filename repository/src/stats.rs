//! How large a repository is, and whose backups made it so. For people: listings may lag behind.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use jiff::Timestamp;
use serde::Serialize;
use thiserror::Error;

use crate::commits::CommitLogError;
use crate::error::{Classified, ErrorClass};
use crate::pack::parse_pack_key;
use crate::refset::Refset;
use crate::repository::Repository;
use crate::session::references::{ReferencesError, in_force};
use crate::snapshot::{Content, Snapshot};
use crate::store::StoreError;

/// Why nothing can be counted.
#[derive(Debug, Error)]
pub enum StatsError {
    /// The list of snapshots cannot be read.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// The store failed.
    #[error("cannot look at what the repository holds")]
    Store(#[from] StoreError),
}

impl Classified for StatsError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log(error) => error.class(),
            Self::Store(error) => error.class(),
        }
    }
}

/// The size of a repository.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// Snapshots of trees.
    pub snapshots: u64,
    /// Recovery points.
    pub recovery_points: u64,
    /// Bytes of all files of all snapshots, as often as they were backed up.
    pub logical_bytes: u64,
    /// Bytes of all objects.
    pub stored_bytes: u64,
    /// Packs.
    pub packs: ObjectCount,
    /// Packs that no snapshot refers to: of sessions under way, of aborted ones, of forgotten snapshots. `expire` looks closer.
    pub unreferenced_packs: ObjectCount,
    /// Snapshots whose references cannot be read; their packs may count as unreferenced. `lifeboat check` says more.
    pub unreadable_references: u64,
    /// All objects by the first part of their key.
    pub objects: BTreeMap<String, ObjectCount>,
    /// By lineage.
    pub lineages: Vec<LineageStats>,
}

/// A number of objects and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ObjectCount {
    /// How many.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
}

impl ObjectCount {
    fn add(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }
}

/// What the snapshots of one lineage take.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LineageStats {
    /// What they are snapshots of.
    pub lineage: String,
    /// How many.
    pub snapshots: u64,
    /// When the newest was made.
    pub newest: Timestamp,
    /// Bytes of the files of the newest.
    pub newest_bytes: u64,
    /// Bytes of the files of all.
    pub logical_bytes: u64,
    /// Bytes that making them added to the repository.
    pub added_bytes: u64,
}

impl Repository {
    /// Counts everything: one listing, and the references of each snapshot.
    pub async fn stats(&self) -> Result<Stats, StatsError> {
        let snapshots = self.snapshots().await?;
        let mut stats = Stats::default();
        let mut lineages = BTreeMap::new();
        let mut live = Refset::default();
        let newest = self.engine.commits.references();
        for snapshot in &snapshots {
            match &snapshot.content {
                Content::Tree { .. } => stats.snapshots += 1,
                Content::RecoveryPoint { .. } => stats.recovery_points += 1,
            }
            stats.logical_bytes += snapshot.counts.bytes;
            count_lineage(&mut lineages, snapshot);
            match in_force(&self.engine, &newest, snapshot.id).await {
                Ok(refs) => live.extend(&refs),
                Err(ReferencesError::Store(error)) if error.class() != ErrorClass::Damaged => return Err(error.into()),
                Err(_) => stats.unreadable_references += 1,
            }
        }
        let mut listed = self.engine.store.list("");
        while let Some(object) = listed.try_next().await? {
            stats.stored_bytes += object.size;
            let part = object.key.split('/').next().unwrap_or_default().to_owned();
            stats.objects.entry(part).or_default().add(object.size);
            if let Some(pack) = parse_pack_key(&object.key) {
                stats.packs.add(object.size);
                if !live.has_pack(pack) {
                    stats.unreferenced_packs.add(object.size);
                }
            }
        }
        stats.lineages = lineages.into_values().collect();
        Ok(stats)
    }
}

fn count_lineage(lineages: &mut BTreeMap<String, LineageStats>, snapshot: &Snapshot) {
    let entry = lineages.entry(snapshot.lineage.clone()).or_insert_with(|| LineageStats {
        lineage: snapshot.lineage.clone(),
        snapshots: 0,
        newest: snapshot.time,
        newest_bytes: 0,
        logical_bytes: 0,
        added_bytes: 0,
    });
    // Snapshots come oldest first.
    entry.newest = snapshot.time;
    entry.newest_bytes = snapshot.counts.bytes;
    entry.snapshots += 1;
    entry.logical_bytes += snapshot.counts.bytes;
    entry.added_bytes += snapshot.stats.stored_bytes;
}
