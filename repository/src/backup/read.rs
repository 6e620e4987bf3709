//! Turns changed files into chunks, and takes over the chunks of files that did not change.
//!
//! Reading, cutting and hashing run on blocking threads; storing runs beside them, within a byte budget. A file is
//! what it was when it was opened: bytes that come later are not read, bytes that go make it skipped.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};

use super::BackupError;
use super::compare::{Item, Todo};
use super::inherit::{has_lost, inherit_lists};
use super::open::{Opened, open, read_full, read_uncached};
use super::pages::{Before, MAPPED_BYTES, MapPart, PageMap, Run, WINDOW_BYTES};
use super::store::{Pieces, Storing};
use crate::beneath::Beneath;
use crate::chunk::Chunker;
use crate::manifest::{Contents, Entry, Kind, Piece, PieceListWriter, Reason, Regular, Skipped};
use crate::pack::FRAME_ROOM;
use crate::progress::Progress;
use crate::session::SessionError;
use crate::sink::{ChunkId, ChunkKind, ChunkSink, ChunkSource, Put};

/// Files below this share chunks.
pub(super) const SMALL_BYTES: u64 = 64 << 10;
/// Bytes asked of the kernel at once.
const READ_BYTES: usize = 1 << 20;
/// Bytes read ahead of storing, per file.
const BATCH_BYTES: usize = 2 << 20;
/// Bytes of changed pages that make a patch.
const PATCH_BYTES: usize = 512 << 10;
/// Bytes of a file that are looked at before what was found is handed on.
const SCAN_BYTES: u64 = 64 << 20;
/// Large files that are read at once.
const STREAMS: usize = 3;
/// Bytes cut but not yet stored, all files together, in KiB.
const MEMORY_KIB: usize = 16 << 10;
/// Chunks of one file that are stored at once.
const IN_FLIGHT: usize = 8;
/// Shorter holes are read as zeros: their bookkeeping would cost more.
const MIN_HOLE_BYTES: u64 = 64 << 10;

/// Is told the path of a file that is about to be opened.
pub(super) type OnOpen = Box<dyn Fn(&[u8]) + Send + Sync>;
/// Is told the path and the offset that is about to be read.
pub(super) type OnRead = Box<dyn Fn(&[u8], u64) + Send + Sync>;

/// Calls at the moments at which tests change the tree.
#[derive(Default)]
pub(super) struct Hooks {
    pub(super) before_open: Option<OnOpen>,
    pub(super) before_read: Option<OnRead>,
}

/// What all parts of a backup share.
pub(super) struct Context {
    pub(super) root: Option<Beneath>,
    pub(super) sink: Arc<dyn ChunkSink>,
    pub(super) source: Option<Arc<dyn ChunkSource>>,
    pub(super) chunker: Arc<dyn Chunker>,
    pub(super) progress: Arc<Progress>,
    pub(super) read_bytes: AtomicU64,
    pub(super) stopped: AtomicBool,
    pub(super) hooks: Hooks,
    streams: Semaphore,
    memory: Arc<Semaphore>,
}

/// What became of an item.
pub(super) enum Outcome {
    /// The entry is complete.
    Done(Entry),
    /// The bytes are to be bundled.
    Small { entry: Entry, bytes: Bytes, changed: bool },
    /// It is not in the snapshot.
    Skipped(Skipped),
}

impl Context {
    pub(super) fn new(
        root: Option<Beneath>,
        sink: Arc<dyn ChunkSink>,
        source: Option<Arc<dyn ChunkSource>>,
        chunker: Arc<dyn Chunker>,
        progress: Arc<Progress>,
        hooks: Hooks,
    ) -> Self {
        Self {
            root,
            sink,
            source,
            chunker,
            progress,
            read_bytes: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            hooks,
            streams: Semaphore::new(STREAMS),
            memory: Arc::new(Semaphore::new(MEMORY_KIB)),
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed) || self.progress.is_cancelled()
    }

    /// Takes over pieces of the parent; `false` if one of them is condemned.
    pub(super) fn inherits(&self, pieces: &[Piece]) -> bool {
        pieces.iter().all(|piece| match piece {
            Piece::Hole { .. } => true,
            Piece::Data { chunk, .. } => self.sink.inherit(chunk),
        })
    }

    /// Begins to store a chunk as soon as the budget allows.
    pub(super) async fn store(
        &self,
        kind: ChunkKind,
        id: ChunkId,
        plain: Bytes,
    ) -> Result<JoinHandle<Result<Put, SessionError>>, BackupError> {
        let kib = u32::try_from((plain.len() >> 10).clamp(1, MEMORY_KIB)).unwrap_or(1);
        let permit = Arc::clone(&self.memory).acquire_many_owned(kib).await.map_err(|_| BackupError::Cancelled)?;
        let sink = Arc::clone(&self.sink);
        let progress = Arc::clone(&self.progress);
        Ok(tokio::spawn(async move {
            let len = plain.len() as u64;
            let put = sink.put(kind, id, plain).await;
            drop(permit);
            if let Ok(Put { new: true, stored, .. }) = &put {
                progress.add_stored(len, u64::from(*stored));
            }
            put
        }))
    }
}

/// Does what is left to do for some items.
pub(super) async fn resolve(context: Arc<Context>, group: Vec<Item>) -> Result<Vec<Outcome>, BackupError> {
    if context.is_stopped() {
        return Err(BackupError::Cancelled);
    }
    let is_large = |entry: &Entry, todo: &Todo| match todo {
        Todo::Nothing => false,
        Todo::Inherit => true,
        Todo::Read { .. } => entry.size() >= SMALL_BYTES,
    };
    let group = match <[Item; 1]>::try_from(group) {
        Ok([Item::Entry(entry, todo)]) if is_large(&entry, &todo) => {
            let mut outcomes = Vec::new();
            resolve_large(&context, entry, todo, &mut outcomes).await?;
            return Ok(outcomes);
        }
        Ok([item]) => vec![item],
        Err(group) => group,
    };
    let reading = Arc::clone(&context);
    let needs_reading = group.iter().any(|item| matches!(item, Item::Entry(_, Todo::Read { .. })));
    let work = move || {
        let mut read = Vec::with_capacity(group.len());
        for item in group {
            read_small(&reading, item, &mut read);
        }
        read
    };
    // What is complete needs no thread that may block.
    let small = if needs_reading { spawn_blocking(work).await.map_err(BackupError::Worker)? } else { work() };
    let mut outcomes = Vec::with_capacity(small.len());
    for read in small {
        match read {
            Ok(outcome) => outcomes.push(outcome),
            // It grew since the walk.
            Err(entry) => {
                let todo = Todo::Read { changed: true, before: None };
                resolve_large(&context, *entry, todo, &mut outcomes).await?;
            }
        }
    }
    Ok(outcomes)
}

async fn resolve_large(
    context: &Arc<Context>,
    entry: Entry,
    todo: Todo,
    outcomes: &mut Vec<Outcome>,
) -> Result<(), BackupError> {
    let before = match todo {
        Todo::Inherit if inherit_lists(context, &entry).await? => {
            context.progress.add_bytes(entry.size());
            outcomes.push(Outcome::Done(entry));
            return Ok(());
        }
        Todo::Read { before: Some(before), .. } if !has_lost(context, &before).await? => Some(before),
        _ => None,
    };
    read_large(context, entry, before.map(|before| *before), outcomes).await
}

/// Reads an item if it is small; gives it back if it is not (any more). What is listed comes before its entry.
fn read_small(context: &Context, item: Item, outcomes: &mut Vec<Result<Outcome, Box<Entry>>>) {
    let (mut entry, changed) = match item {
        Item::Skipped(skipped) => return outcomes.push(Ok(Outcome::Skipped(skipped))),
        Item::Entry(entry, Todo::Read { changed, .. }) => (entry, changed),
        Item::Entry(entry, _) => {
            context.progress.add_bytes(entry.size());
            return outcomes.push(Ok(Outcome::Done(entry)));
        }
    };
    let read = open(context, &mut entry).and_then(|Opened { file, without_xattrs }| {
        let size = entry.size();
        if size >= SMALL_BYTES {
            return Ok(None);
        }
        if let Some(hook) = &context.hooks.before_read {
            hook(&entry.path, 0);
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        read_full(&file, &mut bytes, 0)?;
        Ok(Some((bytes, without_xattrs)))
    });
    let outcome = match read {
        Ok(Some((bytes, without_xattrs))) => {
            context.read_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            context.progress.add_bytes(bytes.len() as u64);
            if let Some(reason) = without_xattrs {
                outcomes.push(Ok(Outcome::Skipped(Skipped { path: entry.path.clone(), reason })));
            }
            Ok(if bytes.is_empty() {
                Outcome::Done(entry)
            } else {
                Outcome::Small { entry, bytes: bytes.into(), changed }
            })
        }
        Ok(None) => Err(Box::new(entry)),
        Err(reason) => Ok(Outcome::Skipped(Skipped { path: entry.path, reason })),
    };
    outcomes.push(outcome);
}

/// A piece that is not stored yet.
enum Cut {
    Chunk(ChunkId, Bytes),
    /// A hole, or what the parent has.
    Kept(Piece),
    /// A part of the patch of the batch.
    Patched {
        offset: u32,
        len: u32,
    },
}

/// What was read of a large file at a time.
#[derive(Default)]
struct Batch {
    cuts: Vec<Cut>,
    /// Bytes in chunks of `cuts`.
    bytes: usize,
    /// Changed pages, one after the other.
    patch: Vec<u8>,
    map: Vec<MapPart>,
    is_last: bool,
}

/// Reads one large file from its start to its end.
struct LargeFile {
    file: OwnedFd,
    path: Vec<u8>,
    size: u64,
    sparse: bool,
    /// Whether reading leaves the page cache as it was.
    leaves_no_trace: bool,
    /// Next byte to read.
    at: u64,
    /// End of the run of data that is being read.
    data_end: u64,
    buffer: ReadBuffer,
    map: Option<PageMap>,
    before: Option<Before>,
}

/// Bytes that were read and not cut yet. One allocation for the whole file: chunks are copied out of it, so that one
/// that waits to be stored keeps no more memory than its own.
struct ReadBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl ReadBuffer {
    fn new(max_chunk: usize, size: u64) -> Self {
        let capacity = usize::try_from(size).unwrap_or(usize::MAX).min(max_chunk + 2 * READ_BYTES);
        Self { bytes: vec![0; capacity], start: 0, end: 0 }
    }

    fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Room for more bytes, at most `wanted`. There is some while less than the largest chunk is filled.
    fn room(&mut self, wanted: usize) -> &mut [u8] {
        if self.bytes.len() - self.end < wanted {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let until = self.bytes.len().min(self.end + wanted);
        &mut self.bytes[self.end..until]
    }

    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    fn take(&mut self, count: usize) -> Bytes {
        let mut taken = Vec::with_capacity(count + FRAME_ROOM);
        taken.extend_from_slice(&self.filled()[..count]);
        self.start += count;
        taken.into()
    }
}

impl LargeFile {
    /// The next pieces, about [`BATCH_BYTES`] of new data.
    fn next(&mut self, context: &Context) -> Result<Batch, Reason> {
        let mut batch = Batch::default();
        let until = self.at.saturating_add(SCAN_BYTES);
        while batch.bytes < BATCH_BYTES && batch.patch.len() < PATCH_BYTES && self.at < until {
            if self.buffer.filled().len() < context.chunker.max() && self.at < self.data_end {
                self.fill(context, &mut batch)?;
            } else if !self.buffer.filled().is_empty() {
                self.cut(context, self.buffer.filled().len(), &mut batch);
            } else if self.at < self.size {
                if let Some(len) = self.next_run() {
                    batch.cuts.push(Cut::Kept(Piece::Hole { len }));
                    context.progress.add_bytes(len);
                }
            } else {
                if let Some(map) = &mut self.map {
                    map.finish(&mut batch.map);
                }
                batch.is_last = true;
                break;
            }
        }
        Ok(batch)
    }

    /// Cuts a chunk off the first `len` bytes of the buffer.
    fn cut(&mut self, context: &Context, len: usize, batch: &mut Batch) {
        let plain = self.buffer.take(context.chunker.cut(&self.buffer.filled()[..len]));
        batch.bytes += plain.len();
        batch.cuts.push(Cut::Chunk(context.sink.chunk_id(&plain), plain));
    }

    fn fill(&mut self, context: &Context, batch: &mut Batch) -> Result<(), Reason> {
        if let Some(hook) = &context.hooks.before_read {
            hook(&self.path, self.at);
        }
        // With a page map: to the end of the window.
        let step = if self.map.is_some() { WINDOW_BYTES - self.at % WINDOW_BYTES } else { READ_BYTES as u64 };
        let count = usize::try_from((self.data_end - self.at).min(step)).unwrap_or(READ_BYTES);
        let room = self.buffer.room(count);
        let count = room.len();
        read_uncached(&self.file, room, self.at, &mut self.leaves_no_trace)?;
        let at = self.at;
        self.buffer.end += count;
        self.at += count as u64;
        context.read_bytes.fetch_add(count as u64, Ordering::Relaxed);
        context.progress.add_bytes(count as u64);
        if let Some(map) = &mut self.map {
            let filled = self.buffer.filled();
            let hashes = map.hash(at, &filled[filled.len() - count..]);
            map.push(at, &hashes, &mut batch.map);
            if let Some(runs) = self.before.as_mut().and_then(|before| before.compare(at, count, &hashes)) {
                self.keep(context, count, runs, batch);
            }
        }
        Ok(())
    }

    /// Takes over what did not change of the last `count` bytes, and patches the rest.
    fn keep(&mut self, context: &Context, count: usize, runs: Vec<Run>, batch: &mut Batch) {
        let mut kept = runs.iter().filter_map(|run| if let Run::Kept(pieces) = run { Some(pieces) } else { None });
        // What is condemned is stored again.
        if !kept.all(|pieces| context.inherits(pieces)) {
            return;
        }
        // A run of new data ends before it.
        while self.buffer.filled().len() > count {
            self.cut(context, self.buffer.filled().len() - count, batch);
        }
        for run in runs {
            match run {
                Run::Kept(pieces) => batch.cuts.extend(pieces.into_iter().map(Cut::Kept)),
                Run::Changed { from, len } => {
                    // A batch ends soon after its patch has `PATCH_BYTES`: both fit.
                    let short = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
                    batch.cuts.push(Cut::Patched { offset: short(batch.patch.len()), len: short(len) });
                    batch.patch.extend_from_slice(&self.buffer.filled()[from..from + len]);
                }
            }
        }
        self.buffer.clear();
    }

    /// Finds where data begins and ends; gives back the length of the hole before it.
    fn next_run(&mut self) -> Option<u64> {
        if !self.sparse {
            self.data_end = self.size;
            return None;
        }
        let start = match seek(&self.file, SeekFrom::Data(self.at)) {
            Ok(start) => start.min(self.size),
            // No data up to the end.
            Err(Errno::NXIO) => self.size,
            // A file system that does not know its holes.
            Err(_) => self.at,
        };
        let hole = start - self.at;
        if hole >= MIN_HOLE_BYTES {
            self.at = start;
            self.data_end = start;
            return Some(hole);
        }
        // Holes that are too short for a piece of their own belong to the data around them.
        let mut end = start;
        while end < self.size {
            end = match seek(&self.file, SeekFrom::Hole(end)) {
                Ok(end) => end.min(self.size),
                Err(_) => self.size,
            };
            let next = match seek(&self.file, SeekFrom::Data(end)) {
                Ok(next) => next.min(self.size),
                Err(Errno::NXIO) => self.size,
                Err(_) => end,
            };
            if next - end >= MIN_HOLE_BYTES || next == end {
                break;
            }
            end = next;
        }
        self.data_end = end.max(self.at + 1).min(self.size);
        None
    }
}

async fn read_large(
    context: &Arc<Context>,
    mut entry: Entry,
    before: Option<Regular>,
    outcomes: &mut Vec<Outcome>,
) -> Result<(), BackupError> {
    let _stream = context.streams.acquire().await.map_err(|_| BackupError::Cancelled)?;
    context.progress.set_current(&entry.path);
    let opening = Arc::clone(context);
    let (opened, mut entry) = spawn_blocking(move || {
        let opened = open(&opening, &mut entry);
        (opened, entry)
    })
    .await
    .map_err(BackupError::Worker)?;
    let Opened { file, without_xattrs } = match opened {
        Ok(opened) => opened,
        Err(reason) => {
            outcomes.push(Outcome::Skipped(Skipped { path: entry.path, reason }));
            return Ok(());
        }
    };
    let Kind::Regular(Regular { size, sparse, .. }) = entry.kind else {
        outcomes.push(Outcome::Done(entry));
        return Ok(());
    };
    advise(&file, Advice::Sequential);
    let (path, buffer) = (entry.path.clone(), ReadBuffer::new(context.chunker.max(), size));
    let map = (size >= MAPPED_BYTES).then(|| PageMap::new(&*context.sink, size));
    let before = before.zip(context.source.as_ref()).map(|(before, source)| Before::start(source, &before));
    let file = LargeFile { file, path, size, sparse, leaves_no_trace: true, at: 0, data_end: 0, buffer, map, before };
    match store_all(context, file).await? {
        Ok((contents, page_map)) => {
            if let Kind::Regular(regular) = &mut entry.kind {
                (regular.contents, regular.page_map) = (contents, page_map);
            }
            if let Some(reason) = without_xattrs {
                outcomes.push(Outcome::Skipped(Skipped { path: entry.path.clone(), reason }));
            }
            outcomes.push(Outcome::Done(entry));
        }
        Err(reason) => outcomes.push(Outcome::Skipped(Skipped { path: entry.path, reason })),
    }
    Ok(())
}

/// Advice makes reading faster and keeps the page cache for others; it may fail.
fn advise(file: &OwnedFd, advice: Advice) {
    if let Err(error) = fadvise(file, 0, None, advice) {
        tracing::trace!(%error, "no advice taken");
    }
}

type Reading = JoinHandle<(LargeFile, Result<Batch, Reason>)>;

fn read_on(context: &Arc<Context>, mut file: LargeFile) -> Reading {
    let context = Arc::clone(context);
    spawn_blocking(move || {
        let batch = file.next(&context);
        (file, batch)
    })
}

/// Reads the next pieces while those before are stored. Gives back the contents and the page map.
async fn store_all(
    context: &Arc<Context>,
    file: LargeFile,
) -> Result<Result<(Contents, Contents), Reason>, BackupError> {
    let mut pieces = Pieces::new(context);
    let mut map = PieceListWriter::new(Arc::clone(&context.sink));
    let mut storing: VecDeque<Storing> = VecDeque::new();
    let mut reading = Some(read_on(context, file));
    while let Some(ended) = reading.take() {
        let (file, batch) = ended.await.map_err(BackupError::Worker)?;
        if context.is_stopped() {
            return Err(BackupError::Cancelled);
        }
        let batch = match batch {
            Ok(batch) => batch,
            Err(reason) => return Ok(Err(reason)),
        };
        if batch.is_last {
            // Pages that an application has there go as well, so only where the kernel knows no better.
            if !file.leaves_no_trace {
                advise(&file.file, Advice::DontNeed);
            }
        } else {
            reading = Some(read_on(context, file));
        }
        for part in batch.map {
            map.push(store_map(context, part).await?).await?;
        }
        let patch = if batch.patch.is_empty() {
            None
        } else {
            let plain = Bytes::from(batch.patch);
            let put = context.store(ChunkKind::Data, context.sink.chunk_id(&plain), plain).await?;
            Some(put.await.map_err(BackupError::Worker)??.chunk)
        };
        for cut in batch.cuts {
            storing.push_back(match (cut, patch) {
                (Cut::Kept(piece), _) => Storing::Done(piece),
                (Cut::Chunk(id, plain), _) => Storing::Put(context.store(ChunkKind::Data, id, plain).await?),
                (Cut::Patched { offset, len }, Some(chunk)) => Storing::Done(Piece::Data { chunk, offset, len }),
                // The patch of a batch with patched pages is not empty.
                (Cut::Patched { .. }, None) => continue,
            });
            while storing.len() >= IN_FLIGHT
                && let Some(oldest) = storing.pop_front()
            {
                pieces.push(oldest.settle().await?).await?;
            }
        }
    }
    for stored in storing {
        pieces.push(stored.settle().await?).await?;
    }
    Ok(Ok((pieces.finish().await?, map.finish().await?)))
}

/// Stores a part of a page map: as metadata, because a writer that cannot read data needs it.
pub(super) async fn store_map(context: &Context, part: MapPart) -> Result<Piece, BackupError> {
    Ok(match part {
        MapPart::Unknown(len) => Piece::Hole { len },
        MapPart::Hashes(plain) => {
            let id = context.sink.chunk_id(&plain);
            Piece::whole(context.sink.put(ChunkKind::Manifest, id, plain).await?.chunk)
        }
    })
}
