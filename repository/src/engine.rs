//! What all parts of an open repository share.

use std::sync::Arc;

use futures::TryStreamExt;
use tracing::debug;

use crate::commits::CommitLog;
use crate::config::Config;
use crate::directories::Directories;
use crate::id::{ChunkId, SessionId};
use crate::index::Index;
use crate::keyring::KeyRing;
use crate::store::{Store, StoreError};

/// The parts of an open repository.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) config: Config,
    pub(crate) keys: Arc<KeyRing>,
    pub(crate) index: Index,
    pub(crate) directories: Directories,
    pub(crate) commits: CommitLog,
}

impl Engine {
    /// The id of these plain bytes.
    pub(crate) fn chunk_id(&self, plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(self.keys.domain().id.bytes(), plain).as_bytes())
    }

    /// Whether expiry has begun in this repository: marks that a writer must honour.
    pub(crate) async fn has_expiry_marks(&self) -> Result<bool, StoreError> {
        Ok(self.store.list("g/").try_next().await?.is_some())
    }

    /// Removes a decided session's heartbeats; they are hints, so a failure is only logged.
    pub(crate) async fn remove_heartbeats(&self, session: SessionId) {
        let mut beats = self.store.list(&format!("hb/{session}/"));
        loop {
            let removed = match beats.try_next().await {
                Ok(None) => return,
                Ok(Some(beat)) => self.store.delete(&beat.key).await,
                Err(error) => Err(error),
            };
            if let Err(error) = removed {
                debug!(%session, %error, "heartbeats were not removed");
                return;
            }
        }
    }
}
