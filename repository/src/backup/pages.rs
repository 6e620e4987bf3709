//! Which pages of a large file changed since the parent: told by short hashes, without a look at the old bytes.
//!
//! The file is compared window by window at fixed offsets. Pages that are the same stay where they lie, the others go
//! into patches: chunks of nothing but changed pages. A file's pieces then are parts of old chunks and parts of
//! patches, each a chunk of its own: nothing is ever a patch of a patch, and restoring needs no other way. Reads no
//! file and stores nothing.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tracing::debug;

use crate::crypto::{SecretKey, UniversalHash};
use crate::manifest::{self, PAGE_BYTES, PAGE_HASH_BYTES, Piece, Regular};
use crate::sink::{ChunkSink, ChunkSource};

/// Files below this have no page map: a change costs them a chunk or two.
pub(super) const MAPPED_BYTES: u64 = 1 << 20;
/// What is kept, patched or stored anew as a whole: 64 pages.
pub(super) const WINDOW_BYTES: u64 = 512 << 10;
/// Pieces that a window may fall into: beyond them it is stored anew, so that it restores as one piece again and what
/// its old chunks still hold for it becomes free.
pub(super) const MAX_FRAGMENTS: usize = 32;
/// Pages that a chunk of the map is for: 16 MiB of the file. Fixed ranges, so that they stay equal where nothing changed.
pub(super) const MAP_PAGES: u64 = 2048;
/// Lists of pieces, and chunks of the map, that are read ahead.
const AHEAD: usize = 2;
/// A later form of the hash gets another text.
const KEY_CONTEXT: &str = "lifeboat 2026 page hash v2";

/// The universal hash of a page.
///
/// Equal hashes are taken for equal pages, so a false match would keep old bytes. A page is compared with the one page
/// that lay at its offset, not with all others: each time the chance of a false match is at most 513 / 2^128, so for
/// 2^50 compared pages (8 EiB) that of a single one is below 2^-68. This holds for pages of somebody who wants a match
/// as well, because hashes are only kept sealed, with those that may write to the repository.
pub(super) type PageHash = [u8; PAGE_HASH_BYTES];

/// Stands for pages that no backup hashed; never equal to anything.
pub(super) const UNKNOWN: PageHash = [0; PAGE_HASH_BYTES];

/// An offset or length within bytes that are in memory.
fn within(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// A range of a page map, in bytes of the map.
#[derive(Debug)]
pub(super) enum MapPart {
    /// Nothing is known about these pages.
    Unknown(u64),
    /// Their hashes.
    Hashes(Bytes),
}

/// Hashes the pages of a file and gathers its map.
pub(super) struct PageMap {
    /// Without it every page counts as changed.
    hash: Option<UniversalHash>,
    size: u64,
    /// Pages that are in parts already, and in `open`.
    done: u64,
    open: Vec<u8>,
}

impl PageMap {
    pub(super) fn new(sink: &dyn ChunkSink, size: u64) -> Self {
        let key = SecretKey::new(blake3::derive_key(KEY_CONTEXT, sink.chunker_key()));
        Self { hash: UniversalHash::new(&key).ok(), size, done: 0, open: Vec::new() }
    }

    /// The hashes of the pages that a range of the file touches. Those that it has only a part of are unknown.
    pub(super) fn hash(&self, at: u64, bytes: &[u8]) -> Vec<PageHash> {
        let end = at + bytes.len() as u64;
        let mut hashes = Vec::with_capacity(bytes.len() / within(PAGE_BYTES) + 2);
        let mut start = at;
        while start < end {
            let next = (start / PAGE_BYTES + 1) * PAGE_BYTES;
            let is_whole = start.is_multiple_of(PAGE_BYTES) && next.min(self.size) <= end;
            let stop = next.min(end);
            hashes.push(if is_whole {
                let page = &bytes[within(start - at)..within(stop - at)];
                self.hash.as_ref().and_then(|hash| hash.hash(page).ok()).unwrap_or(UNKNOWN)
            } else {
                UNKNOWN
            });
            start = stop;
        }
        hashes
    }

    /// Adds the hashes of a range of the file; ranges come in order.
    pub(super) fn push(&mut self, at: u64, hashes: &[PageHash], parts: &mut Vec<MapPart>) {
        for (page, hash) in (at / PAGE_BYTES..).zip(hashes) {
            self.fill_to(page, parts);
            // A page that two ranges have parts of is there already.
            if page == self.done + (self.open.len() / PAGE_HASH_BYTES) as u64 {
                self.open.extend_from_slice(hash);
            }
        }
    }

    /// Ends the map: it is as long as the file has pages.
    pub(super) fn finish(&mut self, parts: &mut Vec<MapPart>) {
        let pages = self.size.div_ceil(PAGE_BYTES);
        self.fill_to(pages, parts);
        self.close(parts);
    }

    /// Goes on to this page; nothing is known of those before.
    fn fill_to(&mut self, page: u64, parts: &mut Vec<MapPart>) {
        loop {
            let open = (self.open.len() / PAGE_HASH_BYTES) as u64;
            if open == MAP_PAGES {
                self.close(parts);
            } else if self.done + open >= page {
                return;
            } else if open == 0 {
                // A whole chunk of unknown pages takes no room; a part of one does.
                let unknown = page - self.done;
                let whole =
                    if page == self.size.div_ceil(PAGE_BYTES) { unknown } else { unknown / MAP_PAGES * MAP_PAGES };
                if whole > 0 {
                    parts.push(MapPart::Unknown(whole * PAGE_HASH_BYTES as u64));
                    self.done += whole;
                } else {
                    self.open.extend_from_slice(&UNKNOWN);
                }
            } else {
                self.open.extend_from_slice(&UNKNOWN);
            }
        }
    }

    fn close(&mut self, parts: &mut Vec<MapPart>) {
        if !self.open.is_empty() {
            self.done += (self.open.len() / PAGE_HASH_BYTES) as u64;
            parts.push(MapPart::Hashes(std::mem::take(&mut self.open).into()));
        }
    }
}

/// The file as the parent has it: its pieces and its map, read ahead on the runtime.
pub(super) struct Before {
    pieces: mpsc::Receiver<Vec<Piece>>,
    list: VecDeque<Piece>,
    /// Offset of the first piece of `list` in the file.
    at: u64,
    map: mpsc::Receiver<MapPart>,
    part: Option<MapPart>,
    /// Offset of `part` in the map.
    map_at: u64,
}

/// A run of a window: pages that stay, or bytes of the window that go into a patch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Run {
    Kept(Vec<Piece>),
    Changed { from: usize, len: usize },
}

impl Before {
    /// Begins to read what the parent has of the file. Where it cannot be read the file counts as changed.
    pub(super) fn start(source: &Arc<dyn ChunkSource>, file: &Regular) -> Self {
        let (piece_sender, pieces) = mpsc::channel(AHEAD);
        let (map_sender, map) = mpsc::channel(AHEAD);
        let as_file = file.page_map_as_file();
        let mut lists = manifest::pieces(Arc::clone(source), file);
        tokio::spawn(async move {
            while let Some(list) = lists.next().await {
                match list {
                    Ok(list) => {
                        if piece_sender.send(list).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => return debug!(%error, "pieces of the parent cannot be read: the file is read anew"),
                }
            }
        });
        let source = Arc::clone(source);
        tokio::spawn(async move {
            let mut lists = manifest::pieces(Arc::clone(&source), &as_file);
            while let Some(Ok(list)) = lists.next().await {
                for piece in list {
                    let part = match piece {
                        Piece::Hole { len } => MapPart::Unknown(len),
                        Piece::Data { chunk, offset, len } => match source.get(&chunk).await {
                            Ok(plain) => {
                                let (from, until) = (offset as usize, offset as usize + len as usize);
                                MapPart::Hashes(plain.slice(from.min(plain.len())..until.min(plain.len())))
                            }
                            Err(error) => return debug!(%error, "a page map cannot be read: the file is read anew"),
                        },
                    };
                    if map_sender.send(part).await.is_err() {
                        return;
                    }
                }
            }
        });
        Self { pieces, list: VecDeque::new(), at: 0, map, part: None, map_at: 0 }
    }

    /// What became of a window, whose pages now have these hashes. `None`: too much changed, store it anew.
    ///
    /// Windows come in order. Blocking.
    pub(super) fn compare(&mut self, at: u64, len: usize, hashes: &[PageHash]) -> Option<Vec<Run>> {
        let first = at / PAGE_BYTES;
        let same: Vec<bool> =
            (first..).zip(hashes).map(|(page, hash)| *hash != UNKNOWN && self.hash_of(page) == *hash).collect();
        if same.iter().filter(|same| !**same).count() * 2 > same.len() {
            return None;
        }
        let end = at + len as u64;
        let mut runs = Vec::new();
        let mut fragments = 0;
        let mut page = first;
        for run in same.chunk_by(|one, other| one == other) {
            let start = (page * PAGE_BYTES).max(at);
            page += run.len() as u64;
            let stop = (page * PAGE_BYTES).min(end);
            if run[0] {
                let pieces = self.pieces_of(start, stop)?;
                fragments += pieces.len();
                runs.push(Run::Kept(pieces));
            } else {
                fragments += 1;
                runs.push(Run::Changed { from: within(start - at), len: within(stop - start) });
            }
        }
        (fragments <= MAX_FRAGMENTS).then_some(runs)
    }

    fn hash_of(&mut self, page: u64) -> PageHash {
        let wanted = page * PAGE_HASH_BYTES as u64;
        loop {
            let part = match &self.part {
                Some(part) => part,
                None => match self.map.blocking_recv() {
                    Some(part) => self.part.insert(part),
                    None => return UNKNOWN,
                },
            };
            let len = match part {
                MapPart::Unknown(len) => *len,
                MapPart::Hashes(hashes) => hashes.len() as u64,
            };
            if wanted < self.map_at + len {
                let MapPart::Hashes(hashes) = part else { return UNKNOWN };
                let from = usize::try_from(wanted.saturating_sub(self.map_at)).unwrap_or(usize::MAX);
                return hashes.get(from..).and_then(<[u8]>::first_chunk).copied().unwrap_or(UNKNOWN);
            }
            self.map_at += len;
            self.part = None;
        }
    }

    /// The pieces that a range of the file had; `None` if the file did not have all of it.
    fn pieces_of(&mut self, start: u64, end: u64) -> Option<Vec<Piece>> {
        let mut found = Vec::new();
        let mut at = start;
        while at < end {
            let Some(piece) = self.list.front() else {
                self.list.extend(self.pieces.blocking_recv()?);
                continue;
            };
            let until = self.at + piece.len();
            if until <= at {
                self.at = until;
                self.list.pop_front();
                continue;
            }
            let stop = until.min(end);
            found.push(part_of(piece, at.checked_sub(self.at)?, stop - at)?);
            at = stop;
        }
        Some(found)
    }
}

/// A part of a piece.
pub(super) fn part_of(piece: &Piece, from: u64, len: u64) -> Option<Piece> {
    Some(match *piece {
        Piece::Hole { .. } => Piece::Hole { len },
        Piece::Data { chunk, offset, .. } => {
            Piece::Data { chunk, offset: offset + u32::try_from(from).ok()?, len: u32::try_from(len).ok()? }
        }
    })
}

/// One piece that is both, if the second goes on where the first ends.
pub(super) fn join(first: &Piece, second: &Piece) -> Option<Piece> {
    match (*first, *second) {
        (Piece::Hole { len }, Piece::Hole { len: more }) => Some(Piece::Hole { len: len.checked_add(more)? }),
        (Piece::Data { chunk, offset, len }, Piece::Data { chunk: other, offset: next, len: more })
            if chunk == other && offset + len == next =>
        {
            Some(Piece::Data { chunk, offset, len: len + more })
        }
        _ => None,
    }
}
