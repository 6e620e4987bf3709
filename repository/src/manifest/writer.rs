//! Writes a manifest: takes entries in path order, stores pages as they fill, and the root records at the end.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::entry::{Contents, Entry, Kind, shared_prefix};
use super::page::PageBuilder;
use super::root::{PageRef, encode_root};
use crate::session::SessionError;
use crate::sink::{ChunkKind, ChunkRef, ChunkSink, Put};

/// A page ends at a path that fits [`CUT_MASK`] once it has this many bytes ...
const PAGE_MIN: usize = 64 << 10;
/// ... and at the latest before an entry that would take it over this.
const PAGE_MAX: usize = 128 << 10;
/// A page ends at the latest when its paths have this many bytes without front-coding.
const UNFOLDED_MAX: usize = 4 << 20;
/// One path in 128 may begin a page.
const CUT_MASK: u8 = 127;
/// Pages that are stored at the same time.
const IN_FLIGHT: usize = 4;
/// A root record ends after about this many bytes.
const ROOT_BYTES: usize = 256 << 10;

struct Storing {
    first: Vec<u8>,
    entries: u64,
    bytes: u64,
    put: JoinHandle<Result<Put, SessionError>>,
}

/// Takes the entries of a tree in path order.
pub struct ManifestWriter {
    sink: Arc<dyn ChunkSink>,
    open: PageBuilder,
    /// Of the open page: path of its first entry, bytes of its files, estimated size, bytes of all its paths.
    first: Vec<u8>,
    bytes: u64,
    size: usize,
    unfolded: usize,
    storing: VecDeque<Storing>,
    pages: Vec<PageRef>,
}

impl ManifestWriter {
    /// A manifest without entries.
    pub fn new(sink: Arc<dyn ChunkSink>) -> Self {
        Self {
            sink,
            open: PageBuilder::default(),
            first: Vec::new(),
            bytes: 0,
            size: 0,
            unfolded: 0,
            storing: VecDeque::new(),
            pages: Vec::new(),
        }
    }

    /// Appends an entry; its path must come after all before.
    pub async fn push(&mut self, entry: Entry) -> Result<(), SessionError> {
        let size = encoded_size(&entry, self.open.last());
        let is_full = self.size >= PAGE_MIN && self.may_begin_page(&entry.path)
            || self.size + size > PAGE_MAX
            || self.unfolded + entry.path.len() > UNFOLDED_MAX;
        if is_full {
            self.close().await?;
        }
        self.size += size;
        self.unfolded += entry.path.len();
        if let Kind::Regular(file) = &entry.kind {
            self.bytes += file.size;
        }
        self.open.push(&entry);
        if self.open.entries() == 1 {
            self.first = entry.path;
        }
        Ok(())
    }

    fn may_begin_page(&self, path: &[u8]) -> bool {
        blake3::keyed_hash(self.sink.chunker_key(), path).as_bytes()[0] & CUT_MASK == 0
    }

    async fn close(&mut self) -> Result<(), SessionError> {
        if self.open.entries() == 0 {
            return Ok(());
        }
        let page = std::mem::take(&mut self.open);
        (self.size, self.unfolded) = (0, 0);
        let entries = page.entries();
        let plain = Bytes::from(page.encode());
        let sink = Arc::clone(&self.sink);
        self.storing.push_back(Storing {
            first: std::mem::take(&mut self.first),
            entries,
            bytes: std::mem::take(&mut self.bytes),
            put: tokio::spawn(async move { sink.put(ChunkKind::Manifest, sink.chunk_id(&plain), plain).await }),
        });
        while self.storing.len() >= IN_FLIGHT {
            self.settle().await?;
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), SessionError> {
        if let Some(Storing { first, entries, bytes, put }) = self.storing.pop_front() {
            let put = put.await.unwrap_or_else(|error| Err(worker_ended(&error)))?;
            self.pages.push(PageRef { chunk: put.chunk, first, entries, bytes });
        }
        Ok(())
    }

    /// Stores what is open and the root records, which it returns.
    pub async fn finish(mut self) -> Result<Vec<ChunkRef>, SessionError> {
        self.close().await?;
        while !self.storing.is_empty() {
            self.settle().await?;
        }
        let mut roots = Vec::new();
        let mut rest = self.pages.as_slice();
        while !rest.is_empty() {
            let mut size = 0;
            let count = rest.iter().take_while(|page| {
                let fits = size < ROOT_BYTES;
                size += page.first.len() + 64;
                fits
            });
            let (record, left) = rest.split_at(count.count());
            let plain = Bytes::from(encode_root(record));
            roots.push(self.sink.put(ChunkKind::Record, self.sink.chunk_id(&plain), plain).await?.chunk);
            rest = left;
        }
        Ok(roots)
    }
}

pub(crate) fn worker_ended(error: &tokio::task::JoinError) -> SessionError {
    SessionError::Worker { session: crate::id::SessionId([0; 16]), what: error.to_string() }
}

/// About the bytes that the entry takes in a page.
fn encoded_size(entry: &Entry, before: &[u8]) -> usize {
    let attributes: usize = entry.meta.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len() + 3).sum();
    let pieces = |contents: &Contents| match contents {
        Contents::Inline(pieces) => pieces.len() * 45 + 4,
        Contents::Listed(lists) => lists.len() * 45 + 4,
    };
    let kind = match &entry.kind {
        Kind::Regular(file) if file.page_map.is_empty() => pieces(&file.contents),
        Kind::Regular(file) => pieces(&file.contents) + pieces(&file.page_map),
        Kind::Symlink { target } => target.len() + 2,
        Kind::Link { to } => to.len() + 2,
        _ => 2,
    };
    let shared = shared_prefix(before, &entry.path);
    entry.path.len() - shared + 32 + attributes + kind
}
