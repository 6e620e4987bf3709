//! The index: which pack and slot holds a chunk. Never loaded whole.
//!
//! Each session publishes small segments for its own packs (`segment`), which are kept at hand (`spool`) until they are
//! merged into runs of parts (`part`, `merge`), of which a version tells the current ones (`version`). Of a part only the
//! head is kept at hand; a block of entries is read when the filter says that it may have an answer. The index is a hint:
//! whoever uses an answer compares it with the pack's sealed directory. What is missing costs deduplication, never data.

mod filter;
mod merge;
mod part;
mod rebuild;
#[cfg(test)]
mod scale_tests;
mod segment;
mod spool;
#[cfg(test)]
mod tests;
mod version;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use quick_cache::{Weighter, sync::Cache};
use tokio::sync::OnceCell;
use tracing::{debug, warn};

pub(crate) use merge::MergeError;
pub(crate) use part::{MAX_PART_BYTES, verify as verify_part};
pub use rebuild::{RebuildError, RebuildReport};
pub(crate) use segment::{Segment, SegmentEntry, encode_segment};
pub(crate) use version::{
    LISTS_PREFIX, MAX_LIST_BYTES, MAX_VERSION_BYTES, PARTS_PREFIX, VERSIONS_PREFIX, fits_versions,
    verify as verify_version,
};

use crate::cache::ObjectCache;
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::{MarkKey, exists};
use crate::id::{ChunkId, Place, SessionId};
use crate::store::{ByteRange, Reason, Store, StoreError};
use part::{Head, PartInfo, Prefix, prefix_of};
use spool::Spool;

/// Where segments lie.
pub(crate) const INDEX_PREFIX: &str = "x0/";
/// No segment is larger.
pub(crate) const MAX_SEGMENT_BYTES: u64 = 160 << 20;
/// A session publishes a segment at the latest after the pack with which it has so many chunks: some MB.
pub(crate) const SEGMENT_ENTRIES: usize = 1 << 15;
/// In place of a segment: the session was aborted and publishes no more.
pub(crate) const SEAL_MAGIC: &[u8; 8] = b"LBSEAL01";
/// Segments fetched at once when an index is loaded.
const PARALLEL_FETCHES: usize = 16;
/// Memory for blocks of entries.
const BLOCK_CACHE_BYTES: u64 = 8 << 20;

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

/// A block of a part: the part's name, and the block's number.
type BlockName = ([u8; 16], usize);

#[derive(Debug, Clone)]
struct ByMemory;

impl Weighter<BlockName, Bytes> for ByMemory {
    fn weight(&self, _: &BlockName, block: &Bytes) -> u64 {
        block.len() as u64 + 64
    }
}

/// All of the index that is known.
#[derive(Debug)]
pub(crate) struct Index {
    store: Arc<dyn Store>,
    cache: ObjectCache,
    key: MarkKey,
    spool: Spool,
    blocks: Cache<BlockName, Bytes, ByMemory>,
    state: RwLock<State>,
    /// One at a time looks for what is new.
    refreshing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Keys of segments that were looked at.
    known: HashSet<String>,
    segments: Vec<(String, Arc<Segment>)>,
    version: u64,
    /// Whether the version cannot be read.
    is_damaged: bool,
    absorbed: BTreeSet<(SessionId, u32)>,
    /// Oldest first.
    runs: Vec<Arc<Vec<Arc<Part>>>>,
}

/// A part of a run. Its head is fetched when it is first asked.
#[derive(Debug)]
struct Part {
    info: PartInfo,
    /// `None`: it is damaged.
    head: OnceCell<Option<Head>>,
}

/// A part, or a block of it, that is not there any more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gone {
    /// Is an error: a later version has its entries.
    Error,
    /// Is passed over.
    PassedOver,
}

impl Index {
    pub(crate) fn new(store: Arc<dyn Store>, cache: ObjectCache, key: MarkKey) -> Self {
        let spool = Spool::new(cache.directory());
        Self::with_limits(store, cache, key, spool, BLOCK_CACHE_BYTES)
    }

    fn with_limits(store: Arc<dyn Store>, cache: ObjectCache, key: MarkKey, spool: Spool, block_bytes: u64) -> Self {
        let blocks = Cache::with_weighter(4096, block_bytes, ByMemory);
        Self { store, cache, key, spool, blocks, state: RwLock::default(), refreshing: tokio::sync::Mutex::default() }
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for what appeared since. What is damaged is left out: it costs deduplication only.
    pub(crate) async fn refresh(&self) -> Result<(), StoreError> {
        let _one = self.refreshing.lock().await;
        loop {
            // Segments first: one that is not there any more is in the version that is read after.
            let listed: Vec<_> = self.store.list(INDEX_PREFIX).try_collect().await?;
            // SEALs stay for good, and say nothing about chunks. Every segment is larger.
            let segments = listed.into_iter().filter(|object| object.size != SEAL_MAGIC.len() as u64);
            let listed: HashSet<String> = segments.map(|object| object.key).collect();
            let known = self.state().version;
            let newest = version::newest(&*self.store, known).await?;
            if newest != known {
                let list = version::list(&*self.store, &self.key, newest).await?;
                if list.is_err() && exists(&*self.store, &version::version_key(newest + 1)).await? {
                    continue;
                }
                self.take_version(newest, list, &listed);
            }
            let is_whole = self.load_segments(listed).await?;
            if is_whole || !exists(&*self.store, &version::version_key(newest + 1)).await? {
                let state = self.state();
                debug!(
                    version = state.version,
                    runs = state.runs.len(),
                    segments = state.segments.len(),
                    "index loaded"
                );
                return Ok(());
            }
        }
    }

    fn take_version(&self, newest: u64, list: Result<version::List, crate::wire::WireError>, listed: &HashSet<String>) {
        let mut state = self.state_mut();
        state.is_damaged = list.is_err();
        let list = list.unwrap_or_else(|error| {
            warn!(version = newest, %error, "the index is damaged: `lifeboat rebuild-index` makes it anew");
            version::List::default()
        });
        // Heads that were fetched stay.
        let parts: HashMap<[u8; 16], Arc<Part>> =
            state.runs.iter().flat_map(|run| run.iter()).map(|part| (part.info.name, Arc::clone(part))).collect();
        let part = |info: PartInfo| match parts.get(&info.name) {
            Some(part) if part.info == info => Arc::clone(part),
            _ => Arc::new(Part { info, head: OnceCell::new() }),
        };
        state.runs = list.runs.into_iter().map(|run| Arc::new(run.into_iter().map(part).collect())).collect();
        state.absorbed = list.absorbed;
        let is_next = newest == state.version + 1;
        state.version = newest;
        let State { segments, absorbed, known, .. } = &mut *state;
        // A version in between may have merged what this one does not name any more.
        segments.retain(|(key, _)| {
            parse_segment_key(key).is_none_or(|key| !absorbed.contains(&key)) && (is_next || listed.contains(key))
        });
        let held: HashSet<&String> = segments.iter().map(|(key, _)| key).collect();
        known.retain(|key| held.contains(key));
    }

    /// Fetches the segments that are new; `false`: one of them was gone.
    async fn load_segments(&self, listed: HashSet<String>) -> Result<bool, StoreError> {
        let new: Vec<String> = {
            let state = self.state();
            let is_absorbed = |key: &str| parse_segment_key(key).is_some_and(|key| state.absorbed.contains(&key));
            listed.into_iter().filter(|key| !state.known.contains(key) && !is_absorbed(key)).collect()
        };
        let mut fetched =
            futures::stream::iter(new.into_iter().map(|key| self.load(key))).buffer_unordered(PARALLEL_FETCHES);
        let mut is_whole = true;
        while let Some((key, loaded)) = fetched.try_next().await? {
            match loaded {
                Loaded::Segment(segment) => self.add(key, segment),
                Loaded::Useless => _ = self.state_mut().known.insert(key),
                Loaded::Gone => is_whole = false,
            }
        }
        Ok(is_whole)
    }

    async fn load(&self, key: String) -> Result<(String, Loaded), StoreError> {
        let Some((session, _)) = parse_segment_key(&key) else {
            debug!(key, "not an index segment of this version");
            return Ok((key, Loaded::Useless));
        };
        let loaded = match self.cache.get(&*self.store, &key, MAX_SEGMENT_BYTES).await {
            Ok(bytes) if &bytes[..] == SEAL_MAGIC => Loaded::Useless,
            Ok(bytes) => match Segment::parse(session, bytes) {
                Ok(segment) => Loaded::Segment(segment),
                Err(error) => {
                    warn!(key, %error, "an index segment is damaged; its chunks will be stored again when they are met");
                    self.cache.forget(&key);
                    Loaded::Useless
                }
            },
            Err(error) if error.is_not_found() => Loaded::Gone,
            Err(error) => return Err(error),
        };
        Ok((key, loaded))
    }

    /// Adds a segment.
    pub(crate) fn add(&self, key: String, segment: Segment) {
        let segment = segment.spooled(&self.spool);
        let mut state = self.state_mut();
        if state.known.insert(key.clone()) {
            state.segments.push((key, Arc::new(segment)));
        }
    }

    /// The sessions of which a segment is not merged.
    pub(crate) fn waiting(&self) -> BTreeSet<SessionId> {
        self.state().segments.iter().map(|(_, segment)| segment.session()).collect()
    }

    /// Where the chunk may lie: in segments, then in runs, the newest run first.
    pub(crate) async fn find(&self, id: &ChunkId) -> Result<Vec<Place>, StoreError> {
        loop {
            let version = self.state().version;
            match self.look(id, Gone::Error).await {
                Err(error) if error.is_not_found() => {
                    // Merged meanwhile: a later version has what was there.
                    self.refresh().await?;
                    if self.state().version == version {
                        return self.look(id, Gone::PassedOver).await;
                    }
                }
                places => return places,
            }
        }
    }

    async fn look(&self, id: &ChunkId, gone: Gone) -> Result<Vec<Place>, StoreError> {
        let mut places = Vec::new();
        let runs = {
            let state = self.state();
            for (key, segment) in state.segments.iter().rev() {
                places.extend(segment.find(id).map_err(|error| unreadable(key, error))?);
            }
            state.runs.clone()
        };
        let prefix = prefix_of(&id.0);
        for run in runs.iter().rev() {
            let after = run.partition_point(|part| part.info.first <= prefix);
            let Some(part) = after.checked_sub(1).and_then(|at| run.get(at)) else { continue };
            match self.look_in(part, &prefix).await {
                Ok(found) => places.extend(found),
                Err(error) if error.is_not_found() && gone == Gone::PassedOver => {
                    warn!(%error, "a part of the index is missing: `lifeboat rebuild-index` makes it anew");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(places)
    }

    async fn look_in(&self, part: &Part, prefix: &Prefix) -> Result<Vec<Place>, StoreError> {
        let mut places = Vec::new();
        let Some(head) = self.head(part).await? else { return Ok(places) };
        let key = version::part_key(&part.info);
        let local = |error| unreadable(&key, error);
        if !head.may_have(prefix).map_err(local)? {
            return Ok(places);
        }
        let mut block = head.block_of(prefix).map_err(local)?;
        loop {
            let Some(bytes) = self.block(&key, part, head, block).await? else { return Ok(places) };
            places.extend(head.places(&bytes, prefix).map_err(local)?);
            block += 1;
            if !head.begins_with(block, prefix).map_err(local)? {
                return Ok(places);
            }
        }
    }

    /// The head of a part; `None`: it is damaged.
    async fn head<'a>(&self, part: &'a Part) -> Result<Option<&'a Head>, StoreError> {
        let head = part.head.get_or_try_init(|| async {
            let info = &part.info;
            let key = version::part_key(info);
            let cached = self.cache.get_local(&head_name(&key)).await;
            let is_it = |bytes: &Bytes| *blake3::hash(bytes).as_bytes() == info.head_hash;
            let bytes = if let Some(bytes) = cached.filter(is_it) {
                bytes
            } else {
                let range = info.head_at()..info.head_at() + u64::from(info.head_len);
                let Some(bytes) = self.read(&key, range).await?.filter(is_it) else {
                    warn!(key, "a part of the index is damaged: `lifeboat rebuild-index` makes it anew");
                    return Ok(None);
                };
                self.cache.put(&head_name(&key), &bytes);
                bytes
            };
            let parsed = Head::parse(info.entries, &bytes, || self.spool.take(bytes.clone()));
            Ok::<_, StoreError>(parsed.inspect_err(|error| warn!(key, %error, "a part of the index is damaged")).ok())
        });
        Ok(head.await?.as_ref())
    }

    async fn block(&self, key: &str, part: &Part, head: &Head, block: usize) -> Result<Option<Bytes>, StoreError> {
        let name = (part.info.name, block);
        if let Some(bytes) = self.blocks.get(&name) {
            return Ok(Some(bytes));
        }
        let bytes = self.read(key, head.span(block)).await?;
        if let Some(bytes) = &bytes {
            self.blocks.insert(name, bytes.clone());
        }
        Ok(bytes)
    }

    /// A range of a part; `None`: the part is too short.
    async fn read(&self, key: &str, range: std::ops::Range<u64>) -> Result<Option<Bytes>, StoreError> {
        match self.store.get_range(key, ByteRange::Bounded(range)).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.class() == ErrorClass::Damaged => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What became of a segment that was listed.
enum Loaded {
    Segment(Segment),
    /// Nothing that answers.
    Useless,
    /// It is not there any more.
    Gone,
}

/// Where the local cache keeps the head of a part.
fn head_name(key: &str) -> String {
    format!("heads/{key}")
}

/// What was kept at hand cannot be read.
fn unreadable(key: &str, source: io::Error) -> StoreError {
    StoreError {
        operation: "read what was kept of",
        key: key.to_owned(),
        store: "the local index".to_owned(),
        reason: Reason::Refused,
        source: Some(Box::new(source)),
    }
}
