//! What repacking does with a session: packs of copied frames, and new versions of refsets that name them.

use std::sync::Arc;

use tracing::info;

use super::SessionError;
use super::decision::{Commit, Decision, MAX_DECISION_BYTES, RefsetHash, decision_key};
use super::writer::{OpenPack, Session};
use crate::id::{PackId, SessionId, SnapshotId};
use crate::pack::{PackBuilder, PackKind};
use crate::refset::{MAX_REFSET_BYTES, Refset, refset_key};
use crate::store::StoreError;

/// The references of a snapshot after its chunks were moved.
#[derive(Debug)]
pub(crate) struct MovedRefs {
    pub(crate) snapshot: SnapshotId,
    /// The version that they come from.
    pub(crate) from: u32,
    pub(crate) set: Refset,
}

impl Session {
    /// Whether expiry deletes the pack, or may: nothing may be copied from it, and no reference to it be kept.
    pub(crate) fn is_masked(&self, pack: PackId) -> bool {
        self.shared.mask.packs.contains(pack)
    }

    /// A pack for frames that are copied from others.
    pub(crate) fn new_pack(&self, kind: PackKind) -> Result<PackBuilder, SessionError> {
        let mut writing = self.shared.usable()?;
        let seq = writing.next_pack;
        writing.next_pack += 1;
        Ok(PackBuilder::new(PackId { session: self.id(), seq }, kind))
    }

    /// Uploads a pack of copied frames.
    pub(crate) async fn store_pack(&self, builder: PackBuilder) -> Result<(), SessionError> {
        drop(self.shared.usable()?);
        self.shared.upload(OpenPack { builder, permit: None }).await
    }

    /// Commits the new references: from now on they are the snapshots' in place of the versions that they come from.
    ///
    /// [`SessionError::Closed`]: another session moves, or moved, chunks of one of these snapshots. Abort, try later.
    pub(crate) async fn commit_moves(self: Arc<Self>, moves: Vec<MovedRefs>) -> Result<(), SessionError> {
        self.flush().await?;
        let mut refsets = Vec::new();
        for moved in moves {
            refsets.push(self.store_moved(moved).await?);
        }
        self.commit_as(Commit {
            epoch: self.epoch,
            snapshots: Vec::new(),
            refsets,
            saw: self.saw.clone(),
            purpose: self.purpose.clone(),
        })
        .await?;
        info!(session = %self.id(), "moved chunks");
        Ok(())
    }

    /// Stores the next version of a refset. Versions of sessions that were aborted are passed over; there is exactly one
    /// chain, because nobody builds on a version that is undecided.
    async fn store_moved(&self, moved: MovedRefs) -> Result<RefsetHash, SessionError> {
        let MovedRefs { snapshot, from, set } = moved;
        let fail =
            |act| move |source: StoreError| SessionError::Store { session: self.id(), act, source: Arc::new(source) };
        for version in from + 1.. {
            let bytes = set
                .to_bytes(snapshot, version, self.id())
                .map_err(|_| SessionError::Seal { session: self.id(), what: "a refset" })?;
            let hash = blake3::hash(&bytes).to_hex().to_string();
            let key = refset_key(snapshot, version);
            let store = &self.shared.engine.store;
            if store.put_if_absent(&key, bytes.into()).await.map_err(fail("store a refset"))?.is_ours() {
                return Ok(RefsetHash { snapshot, version, hash });
            }
            let found = match store.get(&key, MAX_REFSET_BYTES).await {
                Ok(found) => found,
                // Removed in between: somebody else is at work.
                Err(error) if error.is_not_found() => break,
                Err(error) => return Err(fail("read a refset")(error)),
            };
            let Ok((by, _)) = Refset::parse(snapshot, version, &found) else { break };
            if !self.is_aborted(by).await? {
                break;
            }
        }
        Err(SessionError::Closed { session: self.id() })
    }

    async fn is_aborted(&self, session: SessionId) -> Result<bool, SessionError> {
        let key = decision_key(session);
        match self.shared.engine.store.get(&key, MAX_DECISION_BYTES).await {
            Ok(bytes) => Ok(matches!(Decision::parse(session, &bytes), Ok(Decision::Abort(_)))),
            Err(error) if error.is_not_found() => Ok(false),
            Err(source) => {
                Err(SessionError::Store { session: self.id(), act: "read a decision", source: Arc::new(source) })
            }
        }
    }
}
