//! What the file-level code needs of a repository: somewhere to put chunks, somewhere to get them from.
//!
//! [`ChunkSink`] is implemented by a session, [`ChunkSource`] by a reader; tests may implement both in memory.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

pub use crate::id::{ChunkId, ChunkRef, PackId, Place};
pub use crate::read::ReadError;
pub use crate::session::SessionError;

/// The largest chunk that a repository takes, in plain bytes.
pub const MAX_CHUNK_BYTES: usize = 16 << 20;

/// What a chunk holds. Data and metadata go to separate packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChunkKind {
    /// A piece of one file or volume.
    Data,
    /// Several small files in path order.
    Bundle,
    /// A page of a manifest.
    Manifest,
    /// A list of manifest pages, of skipped files, or any other record about a snapshot.
    Record,
}

impl ChunkKind {
    /// Whether the chunk belongs into a metadata pack.
    pub fn is_metadata(self) -> bool {
        matches!(self, Self::Manifest | Self::Record)
    }
}

/// What became of a chunk that was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Put {
    /// The reference to keep.
    pub chunk: ChunkRef,
    /// Whether the repository lacked the chunk.
    pub new: bool,
    /// Bytes that the chunk takes in its pack when it is new (compressed, encrypted); else 0.
    pub stored: u32,
}

/// Takes chunks; a session implements it.
#[async_trait]
pub trait ChunkSink: Send + Sync {
    /// The id of these plain bytes.
    fn chunk_id(&self, plain: &[u8]) -> ChunkId;

    /// The key that makes cut points unpredictable to outsiders.
    fn chunker_key(&self) -> &[u8; 32];

    /// Stores the chunk unless the repository has it (this session's packs, the index).
    ///
    /// `id` must be `self.chunk_id(&plain)`. Waits while the byte budget of the session is used up. Call it
    /// concurrently for throughput: compression and encryption run on a pool. At most [`MAX_CHUNK_BYTES`].
    async fn put(&self, kind: ChunkKind, id: ChunkId, plain: Bytes) -> Result<Put, SessionError>;

    /// Whether any chunk of the repository is known to be lost.
    fn knows_lost(&self) -> bool {
        false
    }

    /// Whether this chunk cannot be read any more, so that it should be stored again as it was.
    fn is_lost(&self, _chunk: &ChunkRef) -> bool {
        false
    }

    /// Re-uses a chunk that the parent snapshot refers to, without any look-up.
    ///
    /// `false`: it is condemned, put it again.
    fn inherit(&self, chunk: &ChunkRef) -> bool;
}

/// Gives chunks back; a reader implements it.
#[async_trait]
pub trait ChunkSource: Send + Sync {
    /// The plain bytes, verified against the id.
    async fn get(&self, chunk: &ChunkRef) -> Result<Bytes, ReadError>;

    /// Many chunks: planned by pack, ranges coalesced, read in parallel.
    ///
    /// Yields in any order: the index into `chunks` and the plain bytes. Every index comes once, unless an
    /// error is yielded; a failed chunk yields its error and the others go on.
    fn get_many(self: Arc<Self>, chunks: Vec<ChunkRef>) -> BoxStream<'static, Result<(usize, Bytes), ReadError>>;
}
