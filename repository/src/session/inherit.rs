//! What a session may take over from a parent snapshot without looking it up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tracing::{info, warn};

use super::mask::Mask;
use super::references::{References, ReferencesError};
use super::writer::Session;
use super::{SessionError, marks_failed};
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::LiveRefs;
use crate::id::{SessionId, SnapshotId};
use crate::snapshot::Snapshot;

impl Session {
    /// Lets [`crate::sink::ChunkSink::inherit`] take over chunks of this snapshot; without a call it takes over none.
    ///
    /// A parent that expired or whose references are damaged is no error: nothing is inherited, so that everything is
    /// read again. Must be called at most once; a second parent is not taken.
    pub async fn inherit_from(&self, parent: &Snapshot) -> Result<(), SessionError> {
        let engine = &self.shared.engine;
        // Whoever found the parent has just read the list of snapshots.
        let newest = if engine.commits.references().contains_key(&parent.id) {
            newest_refs(engine, &self.shared.mask, self.id(), &[parent.id]).await
        } else {
            self.newest_refs(&[parent.id]).await
        };
        let newest = match newest {
            Err(SessionError::Commits { source, .. }) if source.class() == ErrorClass::Damaged => {
                warn!(session = %self.id(), error = %source, "nothing is inherited: everything is read again");
                return Ok(());
            }
            newest => newest?.pop(),
        };
        let Some(refs) = newest else {
            info!(session = %self.id(), parent = %parent.id, "the parent expired: everything is read again");
            return Ok(());
        };
        let movers = engine.commits.movers();
        match References::load(engine, parent.id, refs.version, &refs.hash, &movers).await {
            Ok(references) => {
                // At most one parent: the first stays.
                let _ = self.shared.parent.set(references);
                Ok(())
            }
            Err(ReferencesError::Store(source)) => Err(SessionError::Store {
                session: self.id(),
                act: "read the references of the parent",
                source: Arc::new(source),
            }),
            Err(error) => {
                warn!(session = %self.id(), %error, "nothing is inherited: everything is read again");
                Ok(())
            }
        }
    }

    /// As [`newest_refs`], for this session, after reading the list of snapshots.
    pub(crate) async fn newest_refs(&self, wanted: &[SnapshotId]) -> Result<Vec<LiveRefs>, SessionError> {
        let failed = |source| SessionError::Commits { session: self.id(), source: Arc::new(source) };
        self.shared.engine.commits.refresh().await.map_err(failed)?;
        newest_refs(&self.shared.engine, &self.shared.mask, self.id(), wanted).await
    }
}

/// The references of these snapshots that a session with this mask may build on. Those that expired are left out.
///
/// They are at least as new as those in force when the newest round was decided: what that round and earlier ones
/// deleted is in none of them, however old the list of snapshots is that was read last. Later rounds wait for the session.
pub(super) async fn newest_refs(
    engine: &Engine,
    mask: &Mask,
    session: SessionId,
    wanted: &[SnapshotId],
) -> Result<Vec<LiveRefs>, SessionError> {
    let live = mask.live(engine).await.map_err(|error| marks_failed(session, error))?;
    let seen = engine.commits.references();
    let Some((round, live)) = live else {
        return Ok(wanted.iter().filter_map(|snapshot| seen.get(snapshot).copied()).collect());
    };
    let settled: BTreeMap<_, _> =
        live.commits.iter().flat_map(|commit| &commit.snapshots).map(|refs| (refs.snapshot, *refs)).collect();
    // The round decided about sessions of earlier epochs only.
    let commits = engine.commits.all();
    let later: BTreeSet<_> = commits
        .iter()
        .filter(|(_, committed)| committed.commit.epoch >= round)
        .flat_map(|(_, committed)| committed.commit.snapshots.iter().map(|snapshot| snapshot.id))
        .collect();
    let newest = |snapshot: &SnapshotId| match (settled.get(snapshot), seen.get(snapshot)) {
        (Some(settled), Some(seen)) if seen.version > settled.version => Some(*seen),
        (Some(settled), _) => Some(*settled),
        (None, seen) => seen.filter(|_| later.contains(snapshot)).copied(),
    };
    Ok(wanted.iter().filter_map(newest).collect())
}
