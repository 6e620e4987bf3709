//! Pack directories, fetched by one small read each and kept within a budget.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use quick_cache::{Weighter, sync::Cache};
use thiserror::Error;

use crate::id::{ChunkId, PackId, Place};
use crate::keyring::{KeyRing, KeyRingError};
use crate::pack::{Directory, DirectorySpan, SlotEntry, pack_key};
use crate::store::{ByteRange, Store, StoreError};
use crate::wire::WireError;

/// Memory for directories, in bytes: about 250,000 chunks.
const BUDGET_BYTES: u64 = 32 << 20;
/// Memory for frames that came along.
const CAME_ALONG_BYTES: u64 = 4 << 20;
/// A read of this many bytes at a pack's end has the whole directory of nearly every pack.
const TAIL_BYTES: u64 = 64 << 10;

/// Directories that are asked before the index.
const RECENT: usize = 16;

/// A directory that cannot be had.
#[derive(Debug, Error)]
pub(crate) enum DirectoryError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Keys(#[from] KeyRingError),
    #[error(transparent)]
    Damaged(#[from] WireError),
}

#[derive(Debug, Clone)]
struct ByMemory;

impl Weighter<(u64, PackId), Arc<Directory>> for ByMemory {
    fn weight(&self, _: &(u64, PackId), directory: &Arc<Directory>) -> u64 {
        directory.weight() as u64
    }
}

/// The end of a pack: frames that came along with the directory behind them.
#[derive(Debug, Clone)]
struct CameAlong {
    /// Offset in the pack.
    start: u64,
    bytes: Bytes,
}

impl Weighter<PackId, CameAlong> for ByMemory {
    fn weight(&self, _: &PackId, end: &CameAlong) -> u64 {
        end.bytes.len() as u64 + 64
    }
}

/// The directories of packs.
#[derive(Debug)]
pub(crate) struct Directories {
    store: Arc<dyn Store>,
    keys: Arc<KeyRing>,
    /// By the number of renewals before the fetch, so that what was fetched before the last is not used after it.
    cache: Cache<(u64, PackId), Arc<Directory>, ByMemory>,
    renewals: AtomicU64,
    /// What came along with directories that are small: most often a whole manifest, or its root.
    came_along: Cache<PackId, CameAlong, ByMemory>,
    /// Those in which the index's answers were found last, newest first.
    recent: Mutex<VecDeque<(u64, PackId, Arc<Directory>)>>,
}

impl Directories {
    pub(crate) fn new(store: Arc<dyn Store>, keys: Arc<KeyRing>) -> Self {
        let cache = Cache::with_weighter(4096, BUDGET_BYTES, ByMemory);
        let came_along = Cache::with_weighter(256, CAME_ALONG_BYTES, ByMemory);
        Self { store, keys, cache, renewals: AtomicU64::new(0), came_along, recent: Mutex::default() }
    }

    /// From now on a directory that is given proves that its pack existed after this call: others may have been
    /// deleted by expiry meanwhile. Whoever registers calls this after it.
    pub(crate) fn renew(&self) {
        self.renewals.fetch_add(1, Ordering::SeqCst);
    }

    /// The directory of a pack; those who ask at once share one fetch.
    pub(crate) async fn get(&self, pack: PackId) -> Result<Arc<Directory>, DirectoryError> {
        let key = (self.renewals.load(Ordering::SeqCst), pack);
        self.cache.get_or_insert_async(&key, self.fetch(pack)).await
    }

    /// The slot of a chunk in a pack, if the pack has it.
    pub(crate) async fn slot(
        &self,
        pack: PackId,
        id: &ChunkId,
    ) -> Result<Option<(Place, SlotEntry, Arc<Directory>)>, DirectoryError> {
        let renewals = self.renewals.load(Ordering::SeqCst);
        let directory = self.get(pack).await?;
        let found = directory.find(id).map(|(slot, entry)| (Place { pack, slot }, *entry));
        if found.is_some() {
            self.remember(renewals, pack, &directory);
        }
        Ok(found.map(|(place, entry)| (place, entry, directory)))
    }

    /// Where the chunk lies in the packs in which the index's last answers were found since the last renewal.
    pub(crate) fn recent(&self, id: &ChunkId) -> Vec<(Place, SlotEntry)> {
        let renewals = self.renewals.load(Ordering::SeqCst);
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let found = recent.iter().filter(|(when, ..)| *when == renewals).filter_map(|(_, pack, directory)| {
            directory.find(id).map(|(slot, entry)| (Place { pack: *pack, slot }, *entry))
        });
        found.collect()
    }

    fn remember(&self, renewals: u64, pack: PackId, directory: &Arc<Directory>) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let known = recent.iter().position(|(when, known, _)| (*when, *known) == (renewals, pack));
        if let Some(known) = known.and_then(|at| recent.remove(at)) {
            recent.push_front(known);
        } else {
            recent.push_front((renewals, pack, Arc::clone(directory)));
            recent.truncate(RECENT);
        }
    }

    async fn fetch(&self, pack: PackId) -> Result<Arc<Directory>, DirectoryError> {
        let key = pack_key(pack);
        let keys = self.keys.get(pack.session).await?;
        let tail = self.store.get_range(&key, ByteRange::Suffix(TAIL_BYTES)).await?;
        let span = DirectorySpan::parse(&tail)?;
        let len = span.len as usize;
        let at = tail.len().checked_sub(crate::pack::TRAILER_BYTES + len);
        let directory = if let Some(at) = at {
            Directory::open(pack, span, &tail[at..at + len], &keys.structure)?
        } else {
            let range = u64::from(span.offset)..u64::from(span.offset) + u64::from(span.len);
            let sealed = self.store.get_range(&key, ByteRange::Bounded(range)).await?;
            Directory::open(pack, span, &sealed, &keys.structure)?
        };
        // Of packs of data nearly all of the tail is directory, and what is before it is a part of one frame.
        if let Some(at) = at
            && at >= tail.len() / 2
            && let Some(start) = u64::from(span.offset).checked_sub(at as u64)
        {
            self.came_along.insert(pack, CameAlong { start, bytes: tail.slice(..at) });
        }
        Ok(Arc::new(directory))
    }

    /// Drops what came along of a pack.
    pub(crate) fn forget_pack(&self, pack: PackId) {
        self.came_along.remove(&pack);
    }

    /// These bytes of a pack if they came along with its directory.
    pub(crate) fn pack_range(&self, pack: PackId, range: &Range<u64>) -> Option<Bytes> {
        let CameAlong { start, bytes } = self.came_along.get(&pack)?;
        let at = usize::try_from(range.start.checked_sub(start)?).ok()?;
        let end = usize::try_from(range.end.checked_sub(start)?).ok()?;
        (at <= end && end <= bytes.len()).then(|| bytes.slice(at..end))
    }
}
