//! Writing sessions: registered, filled with chunks, decided once.
//!
//! `registration` finds an epoch, `mask` and `references` say what may be referred to, `writer` packs and uploads,
//! `moves` is what repacking does, `pin` what a reader does, `decision` is the one object that makes a session count.
//! Nothing of a session is visible before its commit exists.

pub(crate) mod decision;
pub(crate) mod heartbeat;
mod inherit;
mod mask;
mod moves;
mod pin;
mod put;
pub(crate) mod references;
pub(crate) mod registration;
mod stats;
mod writer;

use std::sync::Arc;

use thiserror::Error;

pub use crate::pack::Compression;
pub(crate) use moves::MovedRefs;
pub use pin::Pin;
pub(crate) use pin::reader_refs;
pub use stats::SessionStats;
pub use writer::{Session, SessionOptions};

use crate::commits::CommitLogError;
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::MarkError;
use crate::id::{ChunkId, SessionId};
use crate::store::StoreError;
use registration::EpochError;

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
    /// A chunk or a record cannot be sealed.
    #[error("the session {session} cannot seal {what}")]
    Seal {
        /// The session.
        session: SessionId,
        /// What was to be sealed.
        what: &'static str,
    },
    /// A task of the session ended unexpectedly.
    #[error("a worker of the session {session} failed: {what}")]
    Worker {
        /// The session.
        session: SessionId,
        /// What it says.
        what: String,
    },
    /// What the session must not refer to cannot be known, so it must not write.
    #[error("the session {session} cannot read the marks of expiry: {what}")]
    Marks {
        /// The session.
        session: SessionId,
        /// What is wrong with them.
        what: String,
    },
    /// The list of commits cannot be read.
    #[error("the session {session} cannot read the list of snapshots")]
    Commits {
        /// The session.
        session: SessionId,
        /// Why.
        source: Arc<CommitLogError>,
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
            Self::Seal { .. } | Self::Worker { .. } => ErrorClass::Local,
            Self::Marks { .. } => ErrorClass::Damaged,
            Self::Commits { source, .. } => source.class(),
            Self::AbortedByAnother { .. } => ErrorClass::Conflict,
        }
    }
}

fn not_registered(session: SessionId, error: EpochError) -> SessionError {
    match error {
        EpochError::Store(source) => SessionError::Store { session, act: "register", source: Arc::new(source) },
        error @ EpochError::Damaged { .. } => SessionError::Marks { session, what: error.to_string() },
    }
}

fn marks_failed(session: SessionId, error: MarkError) -> SessionError {
    match error {
        MarkError::Store(source) => {
            SessionError::Store { session, act: "read the marks of expiry", source: Arc::new(source) }
        }
        error @ MarkError::Damaged { .. } => SessionError::Marks { session, what: error.to_string() },
    }
}
