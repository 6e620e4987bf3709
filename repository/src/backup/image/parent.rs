//! What the parent has of an image, block by block: pieces, and short hashes of pages. Used by the thread that reads.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use futures::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tracing::debug;

use crate::backup::pages::{PageHash, UNKNOWN, part_of};
use crate::manifest::{self, PAGE_BYTES, PAGE_HASH_BYTES, Piece, Regular, page_map_len};
use crate::sink::ChunkSource;

/// Lists of pieces that are read ahead.
const AHEAD: usize = 2;

/// The pieces of a file from its start to its end, read ahead on the runtime.
struct Cursor {
    lists: mpsc::Receiver<Vec<Piece>>,
    list: VecDeque<Piece>,
    /// Offset of the first piece of `list`.
    at: u64,
}

impl Cursor {
    fn start(source: &Arc<dyn ChunkSource>, file: &Regular) -> Self {
        let (sender, lists) = mpsc::channel(AHEAD);
        let mut pieces = manifest::pieces(Arc::clone(source), file);
        tokio::spawn(async move {
            while let Some(list) = pieces.next().await {
                match list {
                    Ok(list) => {
                        if sender.send(list).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => return debug!(%error, "the parent cannot be read: the image is read anew"),
                }
            }
        });
        Self { lists, list: VecDeque::new(), at: 0 }
    }

    /// The pieces of a range; `None` if the file does not have all of it. Ranges come in order. Blocking.
    fn range(&mut self, range: &Range<u64>) -> Option<Vec<Piece>> {
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some(piece) = self.list.front() else {
                self.list.extend(self.lists.blocking_recv()?);
                continue;
            };
            let until = self.at + piece.len();
            if until <= at {
                self.at = until;
                self.list.pop_front();
                continue;
            }
            let stop = until.min(range.end);
            found.push(part_of(piece, at.checked_sub(self.at)?, stop - at)?);
            at = stop;
        }
        Some(found)
    }
}

/// A part of the pieces of a range, by offset within the range.
pub(super) fn slice(pieces: &[Piece], wanted: &Range<u64>) -> Option<Vec<Piece>> {
    let mut found = Vec::new();
    let mut at = 0;
    for piece in pieces {
        let (start, end) = (wanted.start.max(at), wanted.end.min(at + piece.len()));
        if start < end {
            found.push(part_of(piece, start - at, end - start)?);
        }
        at += piece.len();
    }
    (at >= wanted.end).then_some(found)
}

/// The image as the parent has it.
pub(super) struct Parent {
    pieces: Cursor,
    map: Cursor,
    source: Arc<dyn ChunkSource>,
    runtime: Handle,
}

/// What the parent has of a block.
pub(super) struct Before {
    pub(super) pieces: Vec<Piece>,
    /// The part of the page map for it.
    pub(super) map: Vec<Piece>,
}

impl Parent {
    pub(super) fn start(source: &Arc<dyn ChunkSource>, file: &Regular) -> Self {
        Self {
            pieces: Cursor::start(source, file),
            map: Cursor::start(source, &file.page_map_as_file()),
            source: Arc::clone(source),
            runtime: Handle::current(),
        }
    }

    /// What it has of the next block, if it has all of it. Blocking.
    pub(super) fn block(&mut self, range: &Range<u64>) -> Option<Before> {
        let pieces = self.pieces.range(range)?;
        let map = range.start / PAGE_BYTES * PAGE_HASH_BYTES as u64..page_map_len(range.end);
        Some(Before { pieces, map: self.map.range(&map)? })
    }

    /// The hashes of a block's pages; `None` if they cannot be read. Blocking.
    pub(super) fn hashes(&self, before: &Before) -> Option<Vec<PageHash>> {
        let mut bytes = Vec::new();
        for piece in &before.map {
            match *piece {
                Piece::Hole { len } => bytes.resize(bytes.len() + usize::try_from(len).ok()?, 0),
                Piece::Data { chunk, offset, len } => match self.runtime.block_on(self.source.get(&chunk)) {
                    Ok(plain) => bytes.extend_from_slice(plain.get(offset as usize..offset as usize + len as usize)?),
                    Err(error) => {
                        debug!(%error, "a page map cannot be read: that part of the image is read anew");
                        return None;
                    }
                },
            }
        }
        let hash = |bytes: &[u8]| bytes.first_chunk().copied().unwrap_or(UNKNOWN);
        Some(bytes.chunks(PAGE_HASH_BYTES).map(hash).collect())
    }
}
