//! Makes the index anew where it is missing or damaged, from the directories of packs.
//!
//! Only packs that snapshots refer to are indexed, and of those only what committed sessions wrote: what an aborted one
//! published decides what expiry deletes at once, so nobody else may publish for it. The index is derived, so a damaged
//! segment of a committed session is removed when another took its place.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::TryStreamExt;
use thiserror::Error;
use tracing::warn;

use super::part::PartInfo;
use super::{
    INDEX_PREFIX, MAX_SEGMENT_BYTES, SEAL_MAGIC, SEGMENT_ENTRIES, Segment, SegmentEntry, encode_segment,
    parse_segment_key, segment_key,
};
use crate::commits::CommitLogError;
use crate::directories::DirectoryError;
use crate::error::{Classified, ErrorClass};
use crate::expire::ExpireError;
use crate::expire::packset::PackSet;
use crate::id::{PackId, SessionId};
use crate::keyring::KeyRingError;
use crate::progress::Progress;
use crate::refset::Refset;
use crate::repository::Repository;
use crate::session::references::{ReferencesError, in_force};
use crate::store::StoreError;

/// Rebuilt segments have numbers from here on.
const FIRST_REBUILT: u32 = 1 << 31;

/// What was rebuilt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RebuildReport {
    /// Packs in use.
    pub packs: u64,
    /// Packs in use that no segment spoke of, and that are indexed now.
    pub indexed: u64,
    /// Packs in use of sessions that did not commit: only these themselves may index them.
    pub left_out: u64,
    /// Packs in use whose directories cannot be read: `check` says why.
    pub unreadable: u64,
    /// Damaged segments and parts that were removed.
    pub removed: u64,
}

/// Why the index was not rebuilt to the end. What was written is of use.
#[derive(Debug, Error)]
pub enum RebuildError {
    /// The list of snapshots cannot be read.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// The store failed.
    #[error("the store failed while the index was rebuilt")]
    Store(#[from] StoreError),
    /// The marks of expiry, which tell who committed once, cannot be read.
    #[error("cannot tell which sessions committed")]
    Marks(#[source] Box<ExpireError>),
    /// Somebody asked to stop.
    #[error("stopped on request")]
    Cancelled,
}

impl Classified for RebuildError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Marks(error) => error.class(),
            Self::Cancelled => ErrorClass::Invalid,
        }
    }
}

/// What the segments say that can be read.
#[derive(Default)]
struct Present {
    packs: PackSet,
    damaged: Vec<(String, SessionId)>,
    damaged_parts: Vec<PartInfo>,
}

impl Repository {
    /// Indexes what is in use and not in the index.
    pub async fn rebuild_index(&self, progress: Arc<Progress>) -> Result<RebuildReport, RebuildError> {
        let mut report = RebuildReport::default();
        let mut live = Refset::default();
        let snapshots = self.snapshots().await?;
        let newest = self.engine.commits.references();
        for snapshot in snapshots {
            match in_force(&self.engine, &newest, snapshot.id).await {
                Ok(refs) => live.extend(&refs),
                Err(ReferencesError::Store(error)) if error.class() != ErrorClass::Damaged => return Err(error.into()),
                Err(error) => warn!(%error, "what a snapshot refers to is not indexed"),
            }
        }
        let committed = self.committed_ever().await.map_err(|error| RebuildError::Marks(Box::new(error)))?;
        let present = self.present_segments().await?;
        let mut missing: BTreeMap<SessionId, Vec<SegmentEntry>> = BTreeMap::new();
        for (pack, _) in live.each_pack() {
            if progress.is_cancelled() {
                return Err(RebuildError::Cancelled);
            }
            report.packs += 1;
            if present.packs.contains(pack) {
                continue;
            }
            if !committed.contains(&pack.session) {
                report.left_out += 1;
                continue;
            }
            match self.entries_of(pack).await? {
                Some(entries) => {
                    progress.add_entry();
                    report.indexed += 1;
                    let waiting = missing.entry(pack.session).or_default();
                    waiting.extend(entries);
                    if waiting.len() >= SEGMENT_ENTRIES {
                        self.write_segment(pack.session, std::mem::take(waiting)).await?;
                    }
                }
                None => report.unreadable += 1,
            }
        }
        for (session, entries) in missing {
            if !entries.is_empty() {
                self.write_segment(session, entries).await?;
            }
        }
        if report.unreadable == 0 {
            report.removed = self.remove_damaged(present.damaged, &committed).await?;
            if self.engine.index.leave_out_parts(&present.damaged_parts).await? {
                report.removed += present.damaged_parts.len() as u64;
            }
            self.engine.index.clean().await?;
        }
        Ok(report)
    }

    async fn present_segments(&self) -> Result<Present, StoreError> {
        let store = &self.engine.store;
        let mut present = Present::default();
        let mut listed = store.list(INDEX_PREFIX);
        while let Some(object) = listed.try_next().await? {
            let Some((session, _)) = parse_segment_key(&object.key) else { continue };
            let bytes = match store.get(&object.key, MAX_SEGMENT_BYTES).await {
                Ok(bytes) => bytes,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            if &bytes[..] == SEAL_MAGIC {
                continue;
            }
            match Segment::parse(session, bytes).and_then(|segment| segment.packs()) {
                Ok(packs) => present.packs.extend(&packs),
                Err(error) => {
                    warn!(key = object.key, %error, "an index segment is damaged");
                    present.damaged.push((object.key, session));
                }
            }
        }
        // Segments that were merged while this looked at them are in a version that is read after.
        self.engine.index.refresh().await?;
        present.damaged_parts = self.engine.index.add_merged_packs(&mut present.packs).await?;
        Ok(present)
    }

    async fn entries_of(&self, pack: PackId) -> Result<Option<Vec<SegmentEntry>>, StoreError> {
        match self.engine.directories.get(pack).await {
            Ok(directory) => Ok(Some(
                (0..=u16::MAX)
                    .zip(&directory.slots)
                    .map(|(slot, entry)| SegmentEntry {
                        id: entry.expected.id,
                        seq: pack.seq,
                        slot,
                        plain_len: entry.expected.plain_len,
                    })
                    .collect(),
            )),
            Err(DirectoryError::Store(error) | DirectoryError::Keys(KeyRingError::Store(error)))
                if !matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) =>
            {
                Err(error)
            }
            Err(error) => {
                warn!(%pack, %error, "a pack cannot be indexed");
                Ok(None)
            }
        }
    }

    /// Writes a segment under a random high number: the session itself counts from 0, and no name is used again.
    async fn write_segment(&self, session: SessionId, entries: Vec<SegmentEntry>) -> Result<(), StoreError> {
        let bytes = encode_segment(entries);
        loop {
            let key = segment_key(session, rand::random::<u32>() | FIRST_REBUILT);
            if self.engine.store.put_if_absent(&key, bytes.clone().into()).await?.is_ours() {
                if let Ok(segment) = Segment::parse(session, bytes.into()) {
                    self.engine.index.add(key, segment);
                }
                return Ok(());
            }
        }
    }

    /// A segment of an aborted session stays: it may be the seal that keeps others from being written.
    async fn remove_damaged(
        &self,
        damaged: Vec<(String, SessionId)>,
        committed: &BTreeSet<SessionId>,
    ) -> Result<u64, StoreError> {
        let mut removed = 0;
        for (key, session) in damaged {
            if committed.contains(&session) {
                self.engine.store.delete(&key).await?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}
