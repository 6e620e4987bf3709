//! Writing sessions.

use std::sync::Arc;

use thiserror::Error;

use crate::error::{Classified, ErrorClass};
use crate::id::{ChunkId, SessionId};
use crate::store::StoreError;

/// What a session failed to do.
#[derive(Debug, Clone, Error)]
pub enum SessionError {
    /// A chunk is larger than a repository takes.
    #[error("the chunk {id} has {len} bytes; at most {limit} are taken")]
    ChunkTooLarge {
        /// The chunk.
        id: ChunkId,
        /// Its plain bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// The store failed.
    #[error("the session {session} cannot {act}")]
    Store {
        /// The session.
        session: SessionId,
        /// What it attempted.
        act: &'static str,
        /// Why it failed.
        source: Arc<StoreError>,
    },
    /// Another decided that this session is dead; begin a new one (uploaded data will be found again).
    #[error("the session {session} was aborted by another; begin a new one")]
    AbortedByAnother {
        /// The session.
        session: SessionId,
    },
    /// The session was committed or aborted before.
    #[error("the session {session} is closed")]
    Closed {
        /// The session.
        session: SessionId,
    },
}

impl Classified for SessionError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::ChunkTooLarge { .. } | Self::Closed { .. } => ErrorClass::Invalid,
            Self::Store { source, .. } => source.class(),
            Self::AbortedByAnother { .. } => ErrorClass::Conflict,
        }
    }
}
