//! The bytes of one file at any offset, and where it has holes.

use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, TryStreamExt, stream};

use super::Browser;
use crate::manifest::{Contents, FormatError, ManifestError, Piece, Regular, decode_pieces};
use crate::sink::ChunkRef;
use crate::tree::TreeError;

/// Lists of pieces that are read at once on the way to an offset.
const LISTS_AT_ONCE: usize = 8;
/// Chunks behind a read that are fetched meanwhile, when somebody reads on and on.
const CHUNKS_AHEAD: usize = 2;

/// Where the lists of pieces of a large file begin, as far as that is known: 8 bytes a list.
#[derive(Debug)]
pub struct ListStarts(Mutex<Vec<u64>>);

impl Default for ListStarts {
    fn default() -> Self {
        Self(Mutex::new(vec![0]))
    }
}

impl ListStarts {
    /// The list that holds the offset, or the last of which the start is known; its number and start.
    fn nearest(&self, offset: u64) -> (usize, u64) {
        let starts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = starts.partition_point(|start| *start <= offset).saturating_sub(1);
        (number, starts.get(number).copied().unwrap_or(0))
    }

    fn learn(&self, number: usize, start: u64) {
        let mut starts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if starts.len() == number {
            starts.push(start);
        }
    }
}

/// Reads a file at any offset.
pub struct FileReader<'a> {
    browser: &'a Arc<Browser>,
    file: &'a Regular,
    starts: &'a ListStarts,
}

/// Pieces that follow each other.
enum Pieces<'a> {
    Inline(&'a [Piece]),
    Listed(Arc<Vec<Piece>>),
}

impl Pieces<'_> {
    fn get(&self) -> &[Piece] {
        match self {
            Self::Inline(pieces) => pieces,
            Self::Listed(pieces) => pieces,
        }
    }
}

impl<'a> FileReader<'a> {
    pub(super) fn new(browser: &'a Arc<Browser>, file: &'a Regular, starts: &'a ListStarts) -> Self {
        Self { browser, file, starts }
    }

    /// At most `len` bytes from `offset` on: fewer only at the end of the file. `ahead`: what follows will be asked for next.
    pub async fn read(&self, offset: u64, len: usize, ahead: bool) -> Result<Vec<u8>, TreeError> {
        let end = offset.saturating_add(len as u64).min(self.file.size);
        let mut bytes = Vec::with_capacity(usize::try_from(end.saturating_sub(offset)).unwrap_or(0));
        let mut at = offset;
        while at < end {
            let (mut start, list) = self.pieces_at(at).await?;
            let pieces = list.get();
            for (number, piece) in pieces.iter().enumerate() {
                let piece_end = start.saturating_add(piece.len());
                if piece_end > at {
                    let (from, to) = (at - start, piece_end.min(end) - start);
                    self.append(&mut bytes, piece, from, to).await?;
                    at = start + to;
                }
                if at >= end {
                    if ahead {
                        self.fetch_ahead(&pieces[number + 1..]);
                    }
                    break;
                }
                start = piece_end;
            }
        }
        Ok(bytes)
    }

    /// Appends the bytes `from` to `to` of a piece.
    async fn append(&self, bytes: &mut Vec<u8>, piece: &Piece, from: u64, to: u64) -> Result<(), TreeError> {
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        match piece {
            Piece::Hole { .. } => bytes.resize(bytes.len() + place(to - from), 0),
            Piece::Data { chunk, offset, .. } => {
                let plain = self.browser.memory.chunk(chunk).await?;
                let offset = *offset as usize;
                let part = plain.get(offset + place(from)..offset + place(to));
                bytes.extend_from_slice(part.ok_or_else(|| damaged(chunk, "a piece lies outside of its chunk"))?);
            }
        }
        Ok(())
    }

    fn fetch_ahead(&self, pieces: &[Piece]) {
        let chunks = pieces.iter().filter_map(|piece| match piece {
            Piece::Data { chunk, .. } => Some(*chunk),
            Piece::Hole { .. } => None,
        });
        for chunk in chunks.take(CHUNKS_AHEAD).filter(|chunk| !self.browser.memory.chunks.contains_key(&chunk.id)) {
            let browser = Arc::clone(self.browser);
            // Whoever needs the chunk asks for it again, and then hears why it cannot be read.
            tokio::spawn(async move { browser.memory.chunk(&chunk).await.map(drop) });
        }
    }

    /// The pieces around an offset below the size, and where the first of them begins.
    async fn pieces_at(&self, offset: u64) -> Result<(u64, Pieces<'a>), TreeError> {
        let lists = match &self.file.contents {
            Contents::Inline(pieces) => return Ok((0, Pieces::Inline(pieces))),
            Contents::Listed(lists) => lists,
        };
        let (mut number, mut start) = self.starts.nearest(offset);
        let mut width = 1;
        loop {
            let wanted: Vec<_> = lists.iter().skip(number).take(width).copied().collect();
            let mut read = stream::iter(wanted).map(|list| self.list(list)).buffered(LISTS_AT_ONCE);
            let mut is_any = false;
            while let Some((chunk, pieces)) = read.try_next().await? {
                is_any = true;
                let end = pieces.iter().try_fold(start, |sum, piece| sum.checked_add(piece.len()));
                let is_last = number + 1 == lists.len();
                let end = end.filter(|end| *end <= self.file.size && (!is_last || *end == self.file.size));
                let end = end.ok_or_else(|| damaged(&chunk, "the pieces of a file do not make up its size"))?;
                if offset < end {
                    return Ok((start, Pieces::Listed(pieces)));
                }
                (number, start) = (number + 1, end);
                self.starts.learn(number, start);
            }
            if !is_any {
                // The last list ends at the size, and the offset lies below it.
                return Err(TreeError::NotFound { path: format!("list of pieces for the byte {offset}") });
            }
            width = LISTS_AT_ONCE;
        }
    }

    async fn list(&self, list: ChunkRef) -> Result<(ChunkRef, Arc<Vec<Piece>>), TreeError> {
        let memory = &self.browser.memory;
        let read = async {
            let plain = memory.source().get(&list).await?;
            let pieces = decode_pieces(&plain);
            pieces.map(Arc::new).map_err(|source| ManifestError::Damaged { chunk: list.id, source })
        };
        Ok((list, memory.lists.get_or_insert_async(&list.id, read).await?))
    }

    /// The first offset at or behind this one that is data, or that is none: a hole or the end. `None`: there is no data
    /// from there on.
    pub async fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>, TreeError> {
        let mut at = offset;
        while at < self.file.size {
            let (mut start, list) = self.pieces_at(at).await?;
            for piece in list.get() {
                let piece_end = start.saturating_add(piece.len());
                if piece_end > at {
                    if matches!(piece, Piece::Data { .. }) == data {
                        return Ok(Some(at));
                    }
                    at = piece_end;
                }
                start = piece_end;
            }
        }
        Ok((!data).then_some(self.file.size))
    }

    /// Bytes that are no holes; `None`: more than `max_lists` lists would have to be read to know.
    pub async fn allocated(&self, max_lists: usize) -> Result<Option<u64>, TreeError> {
        if !self.file.sparse {
            return Ok(Some(self.file.size));
        }
        if matches!(&self.file.contents, Contents::Listed(lists) if lists.len() > max_lists) {
            return Ok(None);
        }
        let (mut at, mut sum) = (0, 0);
        while at < self.file.size {
            let (_, list) = self.pieces_at(at).await?;
            for piece in list.get() {
                at += piece.len();
                sum += if matches!(piece, Piece::Data { .. }) { piece.len() } else { 0 };
            }
        }
        Ok(Some(sum))
    }
}

fn damaged(chunk: &ChunkRef, what: &'static str) -> TreeError {
    TreeError::Manifest(ManifestError::Damaged { chunk: chunk.id, source: FormatError { what, at: 0 } })
}
