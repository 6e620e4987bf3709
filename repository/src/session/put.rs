//! A session as the sink of a backup: knows chunks, takes new ones, refers to those of its parent.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use bytes::Bytes;

use super::SessionError;
use super::writer::Session;
use crate::id::{ChunkId, ChunkRef};
use crate::sink::{ChunkKind, ChunkSink, MAX_CHUNK_BYTES, Put};

#[async_trait]
impl ChunkSink for Session {
    fn chunk_id(&self, plain: &[u8]) -> ChunkId {
        self.shared.engine.chunk_id(plain)
    }

    fn chunker_key(&self) -> &[u8; 32] {
        self.shared.engine.keys.domain().chunker.bytes()
    }

    async fn put(&self, kind: ChunkKind, id: ChunkId, plain: Bytes) -> Result<Put, SessionError> {
        let shared = &self.shared;
        if plain.len() > MAX_CHUNK_BYTES {
            return Err(SessionError::ChunkTooLarge { id, len: plain.len(), limit: MAX_CHUNK_BYTES });
        }
        // At most 16 MiB: fits.
        let len = u32::try_from(plain.len()).unwrap_or(u32::MAX);
        let known = shared.usable()?.own.get(&id).copied();
        let known = match known {
            Some(place) => Some(place),
            None => shared.find(&id, plain.len()).await?,
        };
        if let Some(place) = known {
            shared.refer(place);
            return Ok(Put { chunk: ChunkRef { id, len, place }, new: false, stored: 0 });
        }
        let (frame, permit) = shared.seal(kind, id, plain).await?;
        let stored = u32::try_from(frame.bytes.len()).unwrap_or(u32::MAX);
        let place = match shared.append(frame, permit)? {
            Ok((place, full)) => {
                if let Some(pack) = full {
                    self.upload(pack);
                }
                place
            }
            Err(place) => {
                shared.refer(place);
                return Ok(Put { chunk: ChunkRef { id, len, place }, new: false, stored: 0 });
            }
        };
        shared.refer(place);
        let counters = &shared.counters;
        counters.new_chunks.fetch_add(1, Ordering::Relaxed);
        counters.new_bytes.fetch_add(u64::from(len), Ordering::Relaxed);
        counters.stored_bytes.fetch_add(u64::from(stored), Ordering::Relaxed);
        Ok(Put { chunk: ChunkRef { id, len, place }, new: true, stored })
    }

    fn knows_lost(&self) -> bool {
        !self.shared.engine.lost.is_empty()
    }

    fn is_lost(&self, chunk: &ChunkRef) -> bool {
        let place = self.shared.parent.get().and_then(|parent| parent.place(chunk));
        self.shared.engine.lost.covers(place.unwrap_or(chunk.place))
    }

    fn inherit(&self, chunk: &ChunkRef) -> bool {
        let place = self.shared.parent.get().and_then(|parent| parent.place(chunk));
        match place.filter(|place| self.shared.may_refer(*place)) {
            Some(place) => {
                self.shared.refer(place);
                true
            }
            None => false,
        }
    }
}
