//! The index: which pack and slot holds a chunk.
//!
//! Made of immutable segments, each written by one session for its own packs. The index is a hint: whoever uses
//! an answer compares it with the pack's sealed directory. A missing segment costs deduplication, never data.

mod rebuild;
mod segment;

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};

use futures::{StreamExt, TryStreamExt};
use tracing::{debug, warn};

pub use rebuild::{RebuildError, RebuildReport};
pub(crate) use segment::{Segment, SegmentEntry, encode_segment};

use crate::cache::ObjectCache;
use crate::id::{ChunkId, Place, SessionId};
use crate::store::{Store, StoreError};

/// Where segments lie.
pub(crate) const INDEX_PREFIX: &str = "x0/";
/// No segment is larger: 2^22 entries of 24 bytes, fences and filter.
pub(crate) const MAX_SEGMENT_BYTES: u64 = 160 << 20;
/// In place of a segment: the session was aborted and publishes no more.
pub(crate) const SEAL_MAGIC: &[u8; 8] = b"LBSEAL01";
/// Segments fetched at once when an index is loaded.
const PARALLEL_FETCHES: usize = 16;

/// Key of a session's segment.
pub(crate) fn segment_key(session: SessionId, number: u32) -> String {
    format!("{INDEX_PREFIX}{session}/{number:08x}")
}

/// Where the segments of a session lie.
pub(crate) fn segments_prefix(session: SessionId) -> String {
    format!("{INDEX_PREFIX}{session}/")
}

pub(crate) fn parse_segment_key(key: &str) -> Option<(SessionId, u32)> {
    let (session, number) = key.strip_prefix(INDEX_PREFIX)?.split_once('/')?;
    let parsed = (session.parse().ok()?, u32::from_str_radix(number, 16).ok()?);
    (segment_key(parsed.0, parsed.1) == key).then_some(parsed)
}

/// All segments that are known.
#[derive(Debug)]
pub(crate) struct Index {
    store: Arc<dyn Store>,
    cache: ObjectCache,
    segments: RwLock<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    known: HashSet<String>,
    segments: Vec<Arc<Segment>>,
}

impl Index {
    pub(crate) fn new(store: Arc<dyn Store>, cache: ObjectCache) -> Self {
        Self { store, cache, segments: RwLock::default() }
    }

    /// Loads the segments that appeared since. Damaged ones are left out: they cost deduplication only.
    pub(crate) async fn refresh(&self) -> Result<(), StoreError> {
        let listed: Vec<_> = self.store.list(INDEX_PREFIX).try_collect().await?;
        let new: Vec<String> = {
            let loaded = self.segments.read().unwrap_or_else(PoisonError::into_inner);
            listed.into_iter().map(|object| object.key).filter(|key| !loaded.known.contains(key)).collect()
        };
        let fetched: Vec<_> = futures::stream::iter(new.into_iter().map(|key| self.load(key)))
            .buffer_unordered(PARALLEL_FETCHES)
            .try_collect()
            .await?;
        let mut loaded = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        for (key, segment) in fetched {
            if loaded.known.insert(key) {
                loaded.segments.extend(segment.map(Arc::new));
            }
        }
        debug!(segments = loaded.segments.len(), "index loaded");
        Ok(())
    }

    async fn load(&self, key: String) -> Result<(String, Option<Segment>), StoreError> {
        let Some((session, _)) = parse_segment_key(&key) else {
            debug!(key, "not an index segment of this version");
            return Ok((key, None));
        };
        match self.cache.get(&*self.store, &key, MAX_SEGMENT_BYTES).await {
            Ok(bytes) if &bytes[..] == SEAL_MAGIC => Ok((key, None)),
            Ok(bytes) => match Segment::parse(session, bytes) {
                Ok(segment) => Ok((key, Some(segment))),
                Err(error) => {
                    warn!(key, %error, "an index segment is damaged; its chunks will be stored again when they are met");
                    self.cache.forget(&key);
                    Ok((key, None))
                }
            },
            // Listed, but deleted since.
            Err(error) if error.is_not_found() => Ok((key, None)),
            Err(error) => Err(error),
        }
    }

    /// Adds a segment that this process wrote.
    pub(crate) fn add(&self, key: String, segment: Segment) {
        let mut loaded = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        if loaded.known.insert(key) {
            loaded.segments.push(Arc::new(segment));
        }
    }

    /// Where the chunk may lie: newest segments first.
    pub(crate) fn find(&self, id: &ChunkId) -> Vec<Place> {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        segments.segments.iter().rev().filter_map(|segment| segment.find(id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip() {
        let session = SessionId::random();
        assert_eq!(parse_segment_key(&segment_key(session, 17)), Some((session, 17)));
        assert_eq!(parse_segment_key("x0/abc/0"), None);
        assert_eq!(parse_segment_key("p/abc/0"), None);
    }
}
