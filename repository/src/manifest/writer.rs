//! Cuts a stream of entries into pages and puts them.

use std::sync::Arc;

use bytes::Bytes;

use super::entry::Entry;
use super::page::encode_page;
use super::root::{PageInfo, encode_root};
use crate::id::ChunkRef;
use crate::session::SessionError;
use crate::sink::{ChunkKind, ChunkSink};

/// A page is not cut before it has about this many bytes.
const MIN_PAGE_BYTES: usize = 64 << 10;
/// A page is cut at the latest when it has about this many bytes.
const MAX_PAGE_BYTES: usize = 128 << 10;
/// One path in this many ends a page that is large enough; by the path alone, so that pages stay the same.
const CUT_ONE_IN: u64 = 128;
/// Pages in one record of the list.
const PAGES_PER_ROOT: usize = 4096;

/// Writes a manifest.
pub(crate) struct ManifestWriter {
    sink: Arc<dyn ChunkSink>,
    entries: Vec<Entry>,
    /// About the bytes that the entries take.
    weight: usize,
    pages: Vec<PageInfo>,
}

/// What came of writing.
pub(crate) struct WrittenManifest {
    /// The records that hold the list of pages.
    pub(crate) root: Vec<ChunkRef>,
}

/// About the bytes that an entry takes in a page.
fn weight(entry: &Entry) -> usize {
    let extents = if let super::Kind::File { extents, .. } = &entry.kind { extents.len() } else { 0 };
    let xattrs: usize = entry.meta.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    entry.file_name().len() + 32 + extents * 48 + xattrs
}

impl ManifestWriter {
    pub(crate) fn new(sink: Arc<dyn ChunkSink>) -> Self {
        Self { sink, entries: Vec::new(), weight: 0, pages: Vec::new() }
    }

    fn ends_page(&self, path: &[u8]) -> bool {
        let hash = blake3::keyed_hash(self.sink.chunker_key(), path);
        let mut number = [0; 8];
        number.copy_from_slice(&hash.as_bytes()[..8]);
        u64::from_le_bytes(number) % CUT_ONE_IN == 0
    }

    /// Appends an entry; paths must come in order.
    pub(crate) async fn push(&mut self, entry: Entry) -> Result<(), SessionError> {
        self.weight += weight(&entry);
        let full = self.weight >= MAX_PAGE_BYTES || (self.weight >= MIN_PAGE_BYTES && self.ends_page(&entry.path));
        self.entries.push(entry);
        if full { self.end_page().await } else { Ok(()) }
    }

    async fn end_page(&mut self) -> Result<(), SessionError> {
        let (Some(first), Some(last)) = (self.entries.first(), self.entries.last()) else { return Ok(()) };
        let (first, last) = (first.path.clone(), last.path.clone());
        let bytes = Bytes::from(encode_page(&self.entries));
        let put = self.sink.put(ChunkKind::Manifest, self.sink.chunk_id(&bytes), bytes).await?;
        self.pages.push(PageInfo { chunk: put.chunk, first, last, entries: self.entries.len() as u64 });
        self.entries.clear();
        self.weight = 0;
        Ok(())
    }

    /// Writes what is left and the list of pages.
    pub(crate) async fn finish(mut self) -> Result<WrittenManifest, SessionError> {
        self.end_page().await?;
        let mut root = Vec::new();
        for pages in self.pages.chunks(PAGES_PER_ROOT) {
            let bytes = Bytes::from(encode_root(pages));
            root.push(self.sink.put(ChunkKind::Record, self.sink.chunk_id(&bytes), bytes).await?.chunk);
        }
        Ok(WrittenManifest { root })
    }
}
