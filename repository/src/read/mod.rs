//! Reading chunks back: by place, verified against their ids.

mod plan;
mod reader;

use std::sync::Arc;

use thiserror::Error;

use crate::error::{Classified, ErrorClass};
use crate::id::{ChunkId, PackId, Place};
use crate::store::StoreError;

pub use reader::Reader;

/// What a reader failed to do.
#[derive(Debug, Clone, Error)]
pub enum ReadError {
    /// Neither the place that the reference names nor the index has the chunk.
    #[error("the chunk {id} is missing (last known place {place})")]
    Missing {
        /// The chunk.
        id: ChunkId,
        /// Where the reference said it lies.
        place: Place,
    },
    /// The stored bytes of a chunk are not what was written.
    #[error("the chunk {id} is damaged in pack {} slot {} at offset {offset}: {what}", place.pack, place.slot)]
    DamagedChunk {
        /// The chunk.
        id: ChunkId,
        /// Its pack and slot.
        place: Place,
        /// Byte offset of its frame in the pack.
        offset: u64,
        /// What does not fit.
        what: &'static str,
    },
    /// The directory of a pack cannot be used.
    #[error("the pack {pack} is damaged: {what}")]
    DamagedPack {
        /// The pack.
        pack: PackId,
        /// What does not fit.
        what: String,
    },
    /// A worker ended unexpectedly.
    #[error("a worker of the reader failed: {what}")]
    Worker {
        /// What it says.
        what: String,
    },
    /// The store failed.
    #[error("cannot {act}")]
    Store {
        /// What was attempted.
        act: &'static str,
        /// Why it failed.
        source: Arc<StoreError>,
    },
    /// The secret that opened the repository can write but not read.
    #[error("this key can write but not read; a key with the private part is needed")]
    NoPrivateKey,
}

impl Classified for ReadError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Missing { .. } | Self::DamagedChunk { .. } | Self::DamagedPack { .. } => ErrorClass::Damaged,
            Self::Store { source, .. } => source.class(),
            Self::Worker { .. } => ErrorClass::Local,
            Self::NoPrivateKey => ErrorClass::Key,
        }
    }
}
