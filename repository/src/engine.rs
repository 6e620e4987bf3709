//! What all parts of an open repository share.

use std::sync::Arc;

use futures::TryStreamExt;
use tracing::debug;

use crate::cache::ObjectCache;
use crate::commits::CommitLog;
use crate::config::Config;
use crate::directories::Directories;
use crate::expire::marks::MarkKey;
use crate::heal::Lost;
use crate::id::{ChunkId, SessionId};
use crate::index::Index;
use crate::keyring::KeyRing;
use crate::store::Store;

/// The parts of an open repository.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) cache: ObjectCache,
    pub(crate) config: Config,
    pub(crate) keys: Arc<KeyRing>,
    pub(crate) index: Index,
    pub(crate) directories: Directories,
    pub(crate) commits: CommitLog,
    /// Chunks that cannot be read any more.
    pub(crate) lost: Lost,
}

impl Engine {
    /// The id of these plain bytes.
    pub(crate) fn chunk_id(&self, plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(self.keys.domain().id.bytes(), plain).as_bytes())
    }

    /// The key of expiry's marks.
    pub(crate) fn mark_key(&self) -> MarkKey {
        MarkKey::new(self.keys.domain().structure.bytes())
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
