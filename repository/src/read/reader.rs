//! Finds, fetches, opens and verifies chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::channel::mpsc;
use futures::stream::BoxStream;
use futures::{SinkExt, StreamExt, stream};
use tokio::sync::Mutex;

use super::ReadError;
use super::plan::{Read, Wanted, coalesce};
use crate::directories::DirectoryError;
use crate::engine::Engine;
use crate::id::{ChunkRef, PackId, Place, SessionId};
use crate::keyring::{KeyRingError, SessionCiphers};
use crate::pack::{SlotEntry, open_frame, pack_key};
use crate::sink::ChunkSource;
use crate::store::ByteRange;

/// Reads in flight at once; each holds 8 MiB as they are stored and three groups of 2 MiB opened, at most 42 MiB in all.
const PARALLEL_READS: usize = 3;
/// Chunks located at once: their directories are fetched side by side.
const PARALLEL_LOOKUPS: usize = 16;
/// Chunks planned together: bounds the memory of a plan and of its results.
const PLAN_CHUNKS: usize = 2048;

/// A chunk by the number that it was asked for with, or why it does not come.
type Opened = Result<(usize, Bytes), ReadError>;

/// A chunk that was found.
#[derive(Debug, Clone, Copy)]
struct Located {
    place: Place,
    entry: SlotEntry,
    origin: SessionId,
}

impl Located {
    fn chunk(&self) -> ChunkRef {
        ChunkRef { id: self.entry.expected.id, len: self.entry.expected.plain_len, place: self.place }
    }
}

/// Reads chunks of a repository.
#[derive(Debug)]
pub struct Reader {
    engine: Arc<Engine>,
    /// Whether frames may come from this machine's copies of packs.
    by_cache: bool,
    /// How often loading the index began: it is only needed when a place is stale.
    loads: AtomicU64,
    /// The number of the last load that succeeded.
    loaded: Mutex<u64>,
}

impl Reader {
    pub(crate) fn new(engine: Arc<Engine>) -> Self {
        Self::with(engine, false)
    }

    /// Reads frames from this machine's copies of packs where there are any. That the repository has the packs is seen all
    /// the same, as their directories are read from there; that the frames are whole is not.
    pub(crate) fn by_cache(engine: Arc<Engine>) -> Self {
        Self::with(engine, true)
    }

    fn with(engine: Arc<Engine>, by_cache: bool) -> Self {
        Self { engine, by_cache, loads: AtomicU64::new(0), loaded: Mutex::default() }
    }

    /// Whether data can be read, not only manifests.
    pub fn can_read_data(&self) -> bool {
        self.engine.keys.domain().private.is_some()
    }

    async fn locate(&self, chunk: &ChunkRef) -> Result<Located, ReadError> {
        match self.locate_in(chunk.place.pack, chunk).await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(ReadError::Store { source, .. }) if source.is_not_found() => {}
            // A copy elsewhere may be whole; if there is none, this is the error to show.
            Err(error @ ReadError::DamagedPack { .. }) => return self.locate_by_index(chunk).await.map_err(|_| error),
            Err(error) => return Err(error),
        }
        self.locate_by_index(chunk).await
    }

    /// A chunk is missing only if an index says so that was loaded after it was asked for: what is pinned and was moved
    /// since the index was loaded is in a later one.
    async fn locate_by_index(&self, chunk: &ChunkRef) -> Result<Located, ReadError> {
        let loads = self.loads.load(Ordering::SeqCst);
        if let Some(found) = self.look_into_index(chunk).await? {
            return Ok(found);
        }
        {
            // Those who wait for the same load share it.
            let mut loaded = self.loaded.lock().await;
            if *loaded <= loads {
                let number = self.loads.fetch_add(1, Ordering::SeqCst) + 1;
                self.engine
                    .index
                    .refresh()
                    .await
                    .map_err(|source| ReadError::Store { act: "load the index", source: Arc::new(source) })?;
                *loaded = number;
            }
        }
        let found = self.look_into_index(chunk).await?;
        found.ok_or(ReadError::Missing { id: chunk.id, place: chunk.place })
    }

    async fn look_into_index(&self, chunk: &ChunkRef) -> Result<Option<Located>, ReadError> {
        let failed = |source| ReadError::Store { act: "look into the index", source: Arc::new(source) };
        for place in self.engine.index.find(&chunk.id).await.map_err(failed)? {
            if place.pack != chunk.place.pack
                && let Ok(Some(found)) = self.locate_in(place.pack, chunk).await
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn locate_in(&self, pack: PackId, chunk: &ChunkRef) -> Result<Option<Located>, ReadError> {
        let found = self.engine.directories.slot(pack, &chunk.id).await.map_err(|error| explain(pack, error))?;
        Ok(found.filter(|(_, entry, _)| entry.expected.plain_len == chunk.len).map(|(place, entry, directory)| {
            Located {
                place,
                entry,
                // The directory refuses slots whose origin it does not list.
                origin: directory.origins.get(usize::from(entry.origin)).copied().unwrap_or(pack.session),
            }
        }))
    }

    /// A chunk whose pack was deleted after its directory was read: expiry moved it, and the index tells where to.
    async fn get_elsewhere(&self, chunk: ChunkRef) -> Result<Bytes, ReadError> {
        self.engine.directories.renew();
        let located = self.locate(&chunk).await?;
        let frame = self.fetch_frame(&located).await?;
        self.open(located, frame).await
    }

    /// Where a chunk is found now.
    #[cfg(test)]
    pub(crate) async fn locate_for_test(&self, chunk: &ChunkRef) -> Option<Place> {
        self.engine.directories.renew();
        self.locate(chunk).await.ok().map(|located| located.place)
    }

    /// Drops what is at hand of the pack.
    fn forget_copies(&self, pack: PackId) {
        self.engine.directories.forget_pack(pack);
        if self.by_cache {
            self.engine.cache.forget(&pack_key(pack));
        }
    }

    async fn fetch_frame(&self, located: &Located) -> Result<Bytes, ReadError> {
        let start = u64::from(located.entry.offset);
        self.fetch(located.place.pack, start..start + u64::from(located.entry.len)).await
    }

    async fn fetch(&self, pack: PackId, range: std::ops::Range<u64>) -> Result<Bytes, ReadError> {
        let cached = || self.by_cache.then(|| self.engine.cache.pack_range(pack, &range)).flatten();
        if let Some(bytes) = self.engine.directories.pack_range(pack, &range).or_else(cached) {
            return Ok(bytes);
        }
        self.engine
            .store
            .get_range(&pack_key(pack), ByteRange::Bounded(range))
            .await
            .map_err(|source| ReadError::Store { act: "read a pack", source: Arc::new(source) })
    }

    async fn ciphers(&self, located: &Located) -> Result<Arc<SessionCiphers>, ReadError> {
        self.engine.keys.get(located.origin).await.map_err(|error| explain(located.place.pack, error.into()))
    }

    /// Opens a frame; if it is damaged, a copy of the chunk in another pack, if there is one.
    async fn open(&self, located: Located, frame: Bytes) -> Result<Bytes, ReadError> {
        let opened = self.open_at(located, frame).await;
        self.or_copy(located, opened).await
    }

    /// What was opened, or instead of a damaged frame what the repository has, or a copy of the chunk in another pack.
    async fn or_copy(&self, located: Located, opened: Result<Bytes, ReadError>) -> Result<Bytes, ReadError> {
        let error = match opened {
            Err(error @ ReadError::DamagedChunk { .. }) => error,
            opened => return opened,
        };
        // It may be a copy of the pack that is damaged, here or on the way.
        self.forget_copies(located.place.pack);
        if let Ok(frame) = self.fetch_frame(&located).await
            && let Ok(plain) = self.open_at(located, frame).await
        {
            return Ok(plain);
        }
        let Ok(copy) = self.locate_by_index(&located.chunk()).await else { return Err(error) };
        let frame = self.fetch_frame(&copy).await?;
        self.open_at(copy, frame).await.map_err(|_| error)
    }

    /// Opens a frame on a worker thread.
    async fn open_at(&self, located: Located, frame: Bytes) -> Result<Bytes, ReadError> {
        let ciphers = self.ciphers(&located).await?;
        let engine = Arc::clone(&self.engine);
        let open = move || open_with(&engine, &ciphers, located, &frame);
        tokio::task::spawn_blocking(open).await.map_err(|error| ReadError::Worker { what: error.to_string() })?
    }

    /// Performs one read: every frame in it, or its error. Goes on while nobody takes them, one group ahead.
    fn perform(self: Arc<Self>, read: Read, located: Arc<Vec<(usize, Located)>>) -> BoxStream<'static, Opened> {
        let (sender, receiver) = mpsc::channel(0);
        let work = tokio::spawn(self.open_groups(read, located, sender));
        let ended = stream::once(work)
            .filter_map(async |ended| ended.err().map(|error| Err(ReadError::Worker { what: error.to_string() })));
        receiver.map(stream::iter).flatten().chain(ended).boxed()
    }

    /// Fetches the range of a read and opens it group by group; ends early when nobody listens any more.
    async fn open_groups(
        self: Arc<Self>,
        read: Read,
        located: Arc<Vec<(usize, Located)>>,
        mut sender: mpsc::Sender<Vec<Opened>>,
    ) {
        let fetched = self.fetch(read.pack, read.range.clone()).await;
        for group in read.groups {
            let opened = match &fetched {
                Ok(bytes) => self.open_group(group, read.range.start, bytes, &located).await,
                Err(error) if is_gone(error) => {
                    let mut found = Vec::with_capacity(group.len());
                    for Wanted { number, .. } in group {
                        let (index, located) = located[number];
                        found.push(self.get_elsewhere(located.chunk()).await.map(|plain| (index, plain)));
                    }
                    found
                }
                Err(error) => group.iter().map(|_| Err(error.clone())).collect(),
            };
            if sender.send(opened).await.is_err() {
                return;
            }
        }
    }

    /// Opens the frames of a group in the bytes of a pack from `start` on.
    async fn open_group(
        &self,
        group: Vec<Wanted>,
        start: u64,
        bytes: &Bytes,
        located: &[(usize, Located)],
    ) -> Vec<Opened> {
        let mut frames = Vec::with_capacity(group.len());
        for Wanted { range, number, .. } in group {
            let (index, located) = located[number];
            // The plan made the read from these very ranges.
            let at = usize::try_from(range.start - start).unwrap_or(usize::MAX);
            let frame = bytes.slice(at..at + located.entry.len as usize);
            frames.push((index, located, frame, self.ciphers(&located).await));
        }
        // All of them by one worker: a hop between threads for each costs as much as opening a small one.
        let engine = Arc::clone(&self.engine);
        let open = move || {
            let open = |(index, located, frame, ciphers): (usize, Located, Bytes, Result<Arc<_>, _>)| {
                let plain = ciphers.and_then(|ciphers| open_with(&engine, &ciphers, located, &frame));
                (index, located, plain)
            };
            frames.into_iter().map(open).collect::<Vec<_>>()
        };
        let ended = match tokio::task::spawn_blocking(open).await {
            Ok(ended) => ended,
            Err(error) => return vec![Err(ReadError::Worker { what: error.to_string() })],
        };
        let mut opened = Vec::with_capacity(ended.len());
        for (index, located, plain) in ended {
            opened.push(self.or_copy(located, plain).await.map(|plain| (index, plain)));
        }
        opened
    }

    /// Locates some chunks, reads them and yields each.
    async fn read_some(self: Arc<Self>, chunks: Vec<(usize, ChunkRef)>) -> BoxStream<'static, Opened> {
        let this = &self;
        let found: Vec<_> = stream::iter(chunks)
            .map(|(index, chunk)| async move { this.locate(&chunk).await.map(|located| (index, located)) })
            .buffer_unordered(PARALLEL_LOOKUPS)
            .collect()
            .await;
        let (located, failed): (Vec<_>, Vec<_>) = found.into_iter().partition(Result::is_ok);
        let located: Arc<Vec<_>> = Arc::new(located.into_iter().filter_map(Result::ok).collect());
        let wanted = located
            .iter()
            .enumerate()
            .map(|(number, (_, located))| {
                let start = u64::from(located.entry.offset);
                let range = start..start + u64::from(located.entry.len);
                Wanted { pack: located.place.pack, range, plain_len: located.entry.expected.plain_len, number }
            })
            .collect();
        let failed = stream::iter(failed.into_iter().filter_map(Result::err).map(Err));
        let reads = stream::iter(coalesce(wanted))
            .flat_map_unordered(PARALLEL_READS, move |read| Arc::clone(&self).perform(read, Arc::clone(&located)));
        failed.chain(reads).boxed()
    }
}

/// Opens a frame and verifies it. Takes the time of decryption, decompression and hashing.
fn open_with(engine: &Engine, ciphers: &SessionCiphers, located: Located, frame: &[u8]) -> Result<Bytes, ReadError> {
    let Located { place, entry, .. } = located;
    let cipher = ciphers.frame(entry.expected.kind).ok_or(ReadError::NoPrivateKey)?;
    open_frame(cipher, &entry.expected, frame, |plain| engine.chunk_id(plain)).map(Bytes::from).map_err(|error| {
        ReadError::DamagedChunk { id: entry.expected.id, place, offset: u64::from(entry.offset), what: error.what() }
    })
}

/// Whether the pack was deleted: its living chunks were moved.
fn is_gone(error: &ReadError) -> bool {
    matches!(error, ReadError::Store { source, .. } if source.is_not_found())
}

/// What a failed look at a directory means for those who read.
fn explain(pack: PackId, error: DirectoryError) -> ReadError {
    match error {
        DirectoryError::Store(source) | DirectoryError::Keys(KeyRingError::Store(source)) => {
            ReadError::Store { act: "read the directory of a pack", source: Arc::new(source) }
        }
        DirectoryError::Keys(error) => ReadError::DamagedPack { pack, what: error.to_string() },
        DirectoryError::Damaged(error) => ReadError::DamagedPack { pack, what: error.to_string() },
    }
}

#[async_trait]
impl ChunkSource for Reader {
    async fn get(&self, chunk: &ChunkRef) -> Result<Bytes, ReadError> {
        let located = self.locate(chunk).await?;
        match self.fetch_frame(&located).await {
            Ok(frame) => self.open(located, frame).await,
            Err(error) if is_gone(&error) => self.get_elsewhere(*chunk).await,
            Err(error) => Err(error),
        }
    }

    fn get_many(self: Arc<Self>, chunks: Vec<ChunkRef>) -> BoxStream<'static, Result<(usize, Bytes), ReadError>> {
        let mut numbered = chunks.into_iter().enumerate().peekable();
        let batches = std::iter::from_fn(move || {
            let batch: Vec<_> = numbered.by_ref().take(PLAN_CHUNKS).collect();
            (!batch.is_empty()).then_some(batch)
        });
        stream::iter(batches).then(move |batch| Arc::clone(&self).read_some(batch)).flatten().boxed()
    }
}
