//! Pack directories, fetched by one small read each and kept within a budget.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::{Weighter, sync::Cache};
use thiserror::Error;

use crate::id::{ChunkId, PackId, Place};
use crate::keyring::{KeyRing, KeyRingError};
use crate::pack::{Directory, DirectorySpan, SlotEntry, pack_key};
use crate::store::{ByteRange, Store, StoreError};
use crate::wire::WireError;

/// Memory for directories, in bytes: about 250,000 chunks.
const BUDGET_BYTES: u64 = 32 << 20;
/// A read of this many bytes at a pack's end has the whole directory of nearly every pack.
const TAIL_BYTES: u64 = 64 << 10;

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

/// The directories of packs.
#[derive(Debug)]
pub(crate) struct Directories {
    store: Arc<dyn Store>,
    keys: Arc<KeyRing>,
    /// By the number of renewals before the fetch, so that what was fetched before the last is not used after it.
    cache: Cache<(u64, PackId), Arc<Directory>, ByMemory>,
    renewals: AtomicU64,
}

impl Directories {
    pub(crate) fn new(store: Arc<dyn Store>, keys: Arc<KeyRing>) -> Self {
        Self { store, keys, cache: Cache::with_weighter(4096, BUDGET_BYTES, ByMemory), renewals: AtomicU64::new(0) }
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
        let directory = self.get(pack).await?;
        let found = directory.find(id).map(|(slot, entry)| (Place { pack, slot }, *entry));
        Ok(found.map(|(place, entry)| (place, entry, directory)))
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
        Ok(Arc::new(directory))
    }
}
