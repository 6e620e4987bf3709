//! Puts entries into the manifest in order, and small files into bundles.
//!
//! Entries wait in a queue until the bundle that holds their data is put; the queue is bounded.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{BackupError, SkipReason, Skipped, Written};
use crate::id::ChunkRef;
use crate::manifest::{Entry, Extent, Kind, ManifestWriter};
use crate::progress::Progress;
use crate::sink::{ChunkKind, ChunkSink};
use crate::snapshot::{Content, Counts};

/// Files below this size go into bundles.
pub(super) const SMALL_FILE_BYTES: u64 = 64 << 10;
/// A bundle is closed when it has this many bytes; only at the end of a file.
const BUNDLE_BYTES: usize = 128 << 10;
/// Entries that may wait for a bundle.
const MAX_WAITING: usize = 4096;
/// Skipped files in one record.
const SKIPPED_PER_RECORD: usize = 10_000;

/// Where the data of an entry is.
#[derive(Debug)]
pub(super) enum Data {
    /// Nowhere, or in extents that are there already.
    Placed,
    /// Here; to be bundled. `changed`: the parent has another version of it.
    Small { bytes: Bytes, changed: bool },
}

/// One entry in the queue.
struct Waiting {
    entry: Entry,
    /// Which bundle, by number, and where in it.
    bundle: Option<(u64, u32, u32)>,
}

#[derive(Default)]
struct Bundle {
    number: u64,
    bytes: BytesMut,
}

/// Assembles a snapshot's content.
pub(super) struct Assembler {
    sink: Arc<dyn ChunkSink>,
    progress: Arc<Progress>,
    manifest: ManifestWriter,
    waiting: VecDeque<Waiting>,
    /// Bundle of new files, and bundle of files changed since the parent.
    bundles: [Bundle; 2],
    next_bundle: u64,
    closed: std::collections::HashMap<u64, ChunkRef>,
    counts: Counts,
    read_bytes: u64,
    skipped: Vec<Skipped>,
    skipped_files: HashSet<Vec<u8>>,
}

impl Assembler {
    pub(super) fn new(sink: Arc<dyn ChunkSink>, progress: Arc<Progress>) -> Self {
        Self {
            manifest: ManifestWriter::new(Arc::clone(&sink)),
            sink,
            progress,
            waiting: VecDeque::new(),
            bundles: [Bundle { number: 0, ..Bundle::default() }, Bundle { number: 1, ..Bundle::default() }],
            next_bundle: 2,
            closed: std::collections::HashMap::new(),
            counts: Counts::default(),
            read_bytes: 0,
            skipped: Vec::new(),
            skipped_files: HashSet::new(),
        }
    }

    /// Notes bytes read from the source.
    pub(super) fn add_read(&mut self, bytes: u64) {
        self.read_bytes += bytes;
    }

    /// Leaves an entry out, by name.
    pub(super) fn skip(&mut self, path: Vec<u8>, reason: SkipReason) {
        tracing::debug!(path = %String::from_utf8_lossy(&path), %reason, "left out");
        self.progress.add_skipped();
        self.counts.skipped += 1;
        self.skipped_files.insert(path.clone());
        self.skipped.push(Skipped { path, reason });
    }

    /// Takes the next entry, in order.
    pub(super) async fn push(&mut self, entry: Entry, data: Data) -> Result<(), BackupError> {
        if let Kind::HardLink { to } = &entry.kind
            && self.skipped_files.contains(to)
        {
            self.skip(entry.path, SkipReason::LinkedToSkipped);
            return Ok(());
        }
        match &entry.kind {
            Kind::File { size, .. } => {
                self.counts.files += 1;
                self.counts.bytes += size;
            }
            Kind::HardLink { .. } => self.counts.files += 1,
            Kind::Directory => self.counts.directories += 1,
            _ => self.counts.others += 1,
        }
        self.progress.add_entry();
        let bundle = match data {
            Data::Placed => None,
            Data::Small { bytes, changed } => Some(self.bundle(&bytes, usize::from(changed)).await?),
        };
        self.waiting.push_back(Waiting { entry, bundle });
        if self.waiting.len() > MAX_WAITING {
            self.close(0).await?;
            self.close(1).await?;
        }
        self.drain().await
    }

    async fn bundle(&mut self, bytes: &Bytes, which: usize) -> Result<(u64, u32, u32), BackupError> {
        let bundle = &mut self.bundles[which];
        // Both far below 2^32: a bundle is closed at 128 KiB, and a small file has less than 64 KiB.
        let from = u32::try_from(bundle.bytes.len()).unwrap_or(u32::MAX);
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        bundle.bytes.extend_from_slice(bytes);
        let place = (bundle.number, from, len);
        if bundle.bytes.len() >= BUNDLE_BYTES {
            self.close(which).await?;
        }
        Ok(place)
    }

    async fn close(&mut self, which: usize) -> Result<(), BackupError> {
        let bundle = &mut self.bundles[which];
        if bundle.bytes.is_empty() {
            return Ok(());
        }
        let number = bundle.number;
        let bytes = std::mem::take(&mut bundle.bytes).freeze();
        bundle.number = self.next_bundle;
        self.next_bundle += 1;
        let put = self.sink.put(ChunkKind::Bundle, self.sink.chunk_id(&bytes), bytes).await?;
        if put.new {
            self.progress.add_stored(u64::from(put.chunk.len), u64::from(put.stored));
        }
        self.closed.insert(number, put.chunk);
        Ok(())
    }

    /// Passes on what need not wait any more.
    async fn drain(&mut self) -> Result<(), BackupError> {
        while let Some(first) = self.waiting.front() {
            let chunk = match first.bundle {
                None => None,
                Some((number, ..)) => match self.closed.get(&number) {
                    Some(chunk) => Some(*chunk),
                    None => return Ok(()),
                },
            };
            let Some(Waiting { mut entry, bundle }) = self.waiting.pop_front() else { return Ok(()) };
            if let (Some(chunk), Some((_, from, len)), Kind::File { extents, .. }) = (chunk, bundle, &mut entry.kind) {
                extents.push(Extent { offset: 0, chunk, from, len });
            }
            self.manifest.push(entry).await?;
        }
        // Nothing waits, so no closed bundle is needed any more.
        self.closed.clear();
        Ok(())
    }

    /// Writes what is left.
    pub(super) async fn finish(mut self) -> Result<Written, BackupError> {
        self.close(0).await?;
        self.close(1).await?;
        self.drain().await?;
        let root = self.manifest.finish().await?.root;
        let mut skipped = Vec::new();
        for part in self.skipped.chunks(SKIPPED_PER_RECORD) {
            let bytes = Bytes::from(serde_json::to_vec(part).map_err(|error| BackupError::Worker(error.to_string()))?);
            skipped.push(self.sink.put(ChunkKind::Record, self.sink.chunk_id(&bytes), bytes).await?.chunk);
        }
        Ok(Written {
            content: Content::Tree { root, skipped },
            counts: self.counts,
            read_bytes: self.read_bytes,
            skipped: self.skipped,
        })
    }
}
