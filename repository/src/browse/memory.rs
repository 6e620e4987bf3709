//! What browsing keeps in memory, and the most that it reads at once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter, sync::Cache, sync::DefaultLifecycle};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::id::ChunkId;
use crate::manifest::{Contents, Entry, Kind, Manifest, Piece};
use crate::read::ReadError;
use crate::sink::{ChunkRef, ChunkSource};

/// Plain chunks of files. The largest fits.
const CHUNKS_BYTES: u64 = 20 << 20;
/// Pages of manifests, unfolded.
const PAGES_BYTES: u64 = 12 << 20;
/// Lists of pieces of large files, unfolded.
const LISTS_BYTES: u64 = 6 << 20;
/// Lists of pages of snapshots; the one that was used last is kept however large it is.
const MANIFESTS_BYTES: usize = 8 << 20;
/// Bytes of chunks, sealed and plain, that are fetched at once; a chunk that needs more is fetched alone.
const IN_FLIGHT_BYTES: usize = 24 << 20;
/// The semaphore counts kibibytes.
const UNIT: usize = 1 << 10;

/// An item of which caches need the weight.
pub(super) trait Weigh {
    /// About the bytes of memory that it takes.
    fn weight(&self) -> u64;
}

impl Weigh for Bytes {
    fn weight(&self) -> u64 {
        self.len() as u64 + 64
    }
}

impl Weigh for Arc<Vec<Piece>> {
    fn weight(&self) -> u64 {
        (self.len() * size_of::<Piece>()) as u64 + 64
    }
}

impl Weigh for Arc<Vec<Entry>> {
    fn weight(&self) -> u64 {
        self.iter().map(weight_of_entry).sum::<usize>() as u64 + 64
    }
}

fn weight_of_entry(entry: &Entry) -> usize {
    let contents = |contents: &Contents| match contents {
        Contents::Inline(pieces) => pieces.len() * size_of::<Piece>(),
        Contents::Listed(lists) => lists.len() * size_of::<ChunkRef>(),
    };
    let kind = match &entry.kind {
        Kind::Regular(file) => contents(&file.contents) + contents(&file.page_map),
        Kind::Symlink { target } => target.len(),
        Kind::Link { to } => to.len(),
        _ => 0,
    };
    let xattrs = entry.meta.xattrs.iter().map(|xattr| 48 + xattr.name.len() + xattr.value.len());
    size_of::<Entry>() + entry.path.len() + kind + xattrs.sum::<usize>()
}

#[derive(Clone)]
pub(super) struct ByWeight;

impl<K, V: Weigh> Weighter<K, V> for ByWeight {
    fn weight(&self, _: &K, value: &V) -> u64 {
        value.weight()
    }
}

pub(super) type Weighed<K, V> = Cache<K, V, ByWeight>;

/// One shard: each of several would have a part of the room, and the largest items fit into none.
fn cache<K: std::hash::Hash + Eq, V: Weigh + Clone>(items: usize, bytes: u64) -> Weighed<K, V> {
    let options = OptionsBuilder::new().shards(1).estimated_items_capacity(items).weight_capacity(bytes).build();
    match options {
        Ok(options) => {
            Cache::with_options(options, ByWeight, DefaultHashBuilder::default(), DefaultLifecycle::default())
        }
        // All that is required is given above.
        Err(_) => Cache::with_weighter(items, bytes, ByWeight),
    }
}

/// Reads chunks, but only so many bytes at once.
struct Limited {
    source: Arc<dyn ChunkSource>,
    turns: Semaphore,
}

impl Limited {
    async fn turn(&self, chunk: &ChunkRef) -> Option<SemaphorePermit<'_>> {
        let units = (chunk.len as usize * 2 / UNIT + 1).min(IN_FLIGHT_BYTES / UNIT);
        // Never closed.
        self.turns.acquire_many(u32::try_from(units).unwrap_or(u32::MAX)).await.ok()
    }
}

#[async_trait]
impl ChunkSource for Limited {
    async fn get(&self, chunk: &ChunkRef) -> Result<Bytes, ReadError> {
        let _turn = self.turn(chunk).await;
        self.source.get(chunk).await
    }

    fn get_many(self: Arc<Self>, chunks: Vec<ChunkRef>) -> BoxStream<'static, Result<(usize, Bytes), ReadError>> {
        Arc::clone(&self.source).get_many(chunks)
    }
}

/// Everything that is kept.
pub(super) struct Memory {
    source: Arc<Limited>,
    pub(super) chunks: Weighed<ChunkId, Bytes>,
    /// By the number of the tree and the page.
    pub(super) pages: Weighed<(u32, u32), Arc<Vec<Entry>>>,
    pub(super) lists: Weighed<ChunkId, Arc<Vec<Piece>>>,
    /// By the number of the tree; the one that was used last comes first.
    manifests: Mutex<VecDeque<(u32, Manifest)>>,
}

impl Memory {
    pub(super) fn new(source: Arc<dyn ChunkSource>) -> Self {
        Self {
            source: Arc::new(Limited { source, turns: Semaphore::new(IN_FLIGHT_BYTES / UNIT) }),
            chunks: cache(256, CHUNKS_BYTES),
            pages: cache(256, PAGES_BYTES),
            lists: cache(128, LISTS_BYTES),
            manifests: Mutex::default(),
        }
    }

    /// Where chunks come from that are kept in another form.
    pub(super) fn source(&self) -> Arc<dyn ChunkSource> {
        Arc::clone(&self.source) as Arc<dyn ChunkSource>
    }

    /// A chunk of a file. Those who ask at once share one fetch.
    pub(super) async fn chunk(&self, chunk: &ChunkRef) -> Result<Bytes, ReadError> {
        self.chunks.get_or_insert_async(&chunk.id, self.source.get(chunk)).await
    }

    /// The list of pages of a tree, if it is kept.
    pub(super) fn manifest(&self, tree: u32) -> Option<Manifest> {
        let mut kept = self.manifests.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(number, _)| *number == tree)?;
        let found = kept.remove(at)?;
        kept.push_front(found.clone());
        Some(found.1)
    }

    /// Keeps the list of pages of a tree instead of those that were not used for the longest time.
    pub(super) fn keep(&self, tree: u32, manifest: Manifest) {
        let mut kept = self.manifests.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_front((tree, manifest));
        let mut sum = 0;
        let fit = kept.iter().take_while(|(_, manifest)| {
            let pages = manifest.pages();
            sum += pages.iter().map(|page| size_of_val(page) + page.first.len()).sum::<usize>();
            sum <= MANIFESTS_BYTES
        });
        let fit = fit.count().max(1);
        kept.truncate(fit);
    }
}
