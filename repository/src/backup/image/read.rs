//! Reads an image block by block: what a list calls unchanged is taken over from the parent, the rest is compared with
//! it page by page, and what is new is handed on to be stored. Stores nothing itself.

use std::ops::Range;
use std::os::fd::OwnedFd;

use bytes::Bytes;
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, pread};

use super::parent::{Before, Parent, slice};
use super::{Audit, Extents, Known, Lie};
use crate::backup::BackupError;
use crate::backup::pages::{MAP_PAGES, MAX_FRAGMENTS, MapPart, PageHash, PageMap, UNKNOWN};
use crate::backup::read::Context;
use crate::manifest::{PAGE_BYTES, PAGE_HASH_BYTES, Piece, page_map_len};
use crate::sink::ChunkId;

/// What is kept, patched or stored anew as a whole: 32 pages. Fixed, as what lies on a volume is aligned.
pub(super) const WINDOW_BYTES: u64 = 256 << 10;
/// What one chunk of the page map is for: 16 MiB.
const BLOCK_BYTES: u64 = MAP_PAGES * PAGE_BYTES;
/// Changed pages go into another patch once this many bytes are in one.
const PATCH_BYTES: usize = 1 << 20;
const ZEROS: &[u8] = &[0; 256 << 10];

/// An offset or length within bytes that are in memory.
fn within(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(|chunk| chunk == &ZEROS[..chunk.len()])
}

/// A piece that may not be stored yet.
pub(super) enum Cut {
    /// A window that is stored anew.
    Chunk(ChunkId, Bytes),
    /// A hole, or what the parent has.
    Kept(Piece),
    /// A part of this patch of the block.
    Patched { patch: usize, offset: u32, len: u32 },
}

/// The part of the page map for a block.
pub(super) enum BlockMap {
    Kept(Vec<Piece>),
    New(MapPart),
}

/// What became of a block.
pub(super) struct Block {
    pub(super) cuts: Vec<Cut>,
    /// Changed pages, one after the other.
    pub(super) patches: Vec<Vec<u8>>,
    pub(super) map: BlockMap,
}

impl Block {
    fn zeros(&mut self, len: u64) {
        self.cuts.push(Cut::Kept(Piece::Hole { len }));
    }

    fn patch(&mut self, bytes: &[u8]) {
        if self.patches.last().is_none_or(|open| open.len() >= PATCH_BYTES) {
            self.patches.push(Vec::new());
        }
        let patch = self.patches.len() - 1;
        // A patch has less than `PATCH_BYTES` and a window.
        let short = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        self.cuts.push(Cut::Patched { patch, offset: short(self.patches[patch].len()), len: short(bytes.len()) });
        self.patches[patch].extend_from_slice(bytes);
    }
}

/// What a page turned out to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Page {
    /// As in the parent.
    Same,
    Zero,
    New,
}

/// An image that is being read.
pub(super) struct Image {
    pub(super) file: OwnedFd,
    pub(super) size: u64,
    /// Next byte to look at.
    pub(super) at: u64,
    pub(super) known: Known,
    pub(super) audit: Audit,
    pub(super) parent: Option<Parent>,
    pub(super) hasher: PageMap,
    /// Bytes read only to see whether the list is right.
    pub(super) audited: u64,
    /// The first range that changed although the list does not say so.
    pub(super) lie: Option<Lie>,
}

/// A window, and what is known of its pages before any is read.
struct Window<'a> {
    range: Range<u64>,
    /// What the parent has of it: pieces and hashes.
    before: Option<(Vec<Piece>, &'a [PageHash])>,
    /// Its pages that the list names.
    listed: Vec<bool>,
    is_audited: bool,
}

impl Image {
    /// The next block; `None` at the end. Blocking.
    pub(super) fn next(&mut self, context: &Context) -> Result<Option<Block>, BackupError> {
        if self.at >= self.size {
            return Ok(None);
        }
        let range = self.at..(self.at + BLOCK_BYTES).min(self.size);
        self.at = range.end;
        let before = self.parent.as_mut().and_then(|parent| parent.block(&range));
        let block = match (&self.known, before) {
            (Known::Changed(list), Some(before))
                if self.leaves_out(list, &range)
                    && context.inherits(&before.pieces)
                    && context.inherits(&before.map) =>
            {
                let cuts = before.pieces.into_iter().map(Cut::Kept).collect();
                Block { cuts, patches: Vec::new(), map: BlockMap::Kept(before.map) }
            }
            (Known::Allocated(list), _) if self.leaves_out(list, &range) => {
                let cuts = vec![Cut::Kept(Piece::Hole { len: range.end - range.start })];
                let map = MapPart::Unknown(page_map_len(range.end - range.start));
                Block { cuts, patches: Vec::new(), map: BlockMap::New(map) }
            }
            (_, before) => self.compare(&range, before, context)?,
        };
        context.progress.add_bytes(range.end - range.start);
        // Advice keeps the page cache for others; it may fail.
        if let Err(error) =
            fadvise(&self.file, range.start, (range.end - range.start).try_into().ok(), Advice::DontNeed)
        {
            tracing::trace!(%error, "no advice taken");
        }
        Ok(Some(block))
    }

    /// Whether nothing of the range needs to be read by this list.
    fn leaves_out(&self, list: &Extents, range: &Range<u64>) -> bool {
        let mut windows = (range.start..range.end).step_by(within(WINDOW_BYTES));
        !list.touch(range) && !windows.any(|at| self.audit.takes(at / WINDOW_BYTES))
    }

    /// Reads what may have changed of a block.
    fn compare(&mut self, range: &Range<u64>, before: Option<Before>, context: &Context) -> Result<Block, BackupError> {
        let hashes = self.parent.as_ref().zip(before.as_ref()).and_then(|(parent, before)| parent.hashes(before));
        let before = before.zip(hashes);
        let pages = within((range.end - range.start).div_ceil(PAGE_BYTES));
        let mut map = Vec::with_capacity(pages * PAGE_HASH_BYTES);
        let mut block = Block { cuts: Vec::new(), patches: Vec::new(), map: BlockMap::Kept(Vec::new()) };
        let mut buffer = vec![0; within(WINDOW_BYTES)];
        for start in (range.start..range.end).step_by(within(WINDOW_BYTES)) {
            let window = start..(start + WINDOW_BYTES).min(range.end);
            let window = self.window(window, range, before.as_ref());
            let bytes = &mut buffer[..within(window.range.end - window.range.start)];
            bytes.fill(0);
            for hash in self.window_into(&window, bytes, &mut block, context)? {
                map.extend_from_slice(&hash);
            }
        }
        block.map =
            BlockMap::New(if is_zero(&map) { MapPart::Unknown(map.len() as u64) } else { MapPart::Hashes(map.into()) });
        Ok(block)
    }

    fn window<'a>(
        &self,
        range: Range<u64>,
        block: &Range<u64>,
        before: Option<&'a (Before, Vec<PageHash>)>,
    ) -> Window<'a> {
        let before = before.and_then(|(before, hashes)| {
            let (from, until) = (range.start - block.start, range.end - block.start);
            let pages = within(from / PAGE_BYTES)..within(until.div_ceil(PAGE_BYTES));
            Some((slice(&before.pieces, &(from..until))?, hashes.get(pages)?))
        });
        let list = match &self.known {
            Known::Nothing => None,
            Known::Allocated(list) => Some(list),
            // Of what the parent does not have, or cannot be compared, nothing is known.
            Known::Changed(list) => before.is_some().then_some(list),
        };
        let listed = pages_of(&range).map(|page| list.is_none_or(|list| list.touch(&page))).collect();
        let is_audited = self.audit.takes(range.start / WINDOW_BYTES);
        Window { range, before, listed, is_audited }
    }

    /// Reads a window as far as needed and says what becomes of it. Gives back the hashes of its pages.
    fn window_into(
        &mut self,
        window: &Window<'_>,
        bytes: &mut [u8],
        block: &mut Block,
        context: &Context,
    ) -> Result<Vec<PageHash>, BackupError> {
        let len = window.range.end - window.range.start;
        let is_read: Vec<_> = window.listed.iter().map(|listed| *listed || window.is_audited).collect();
        self.read_pages(window, &is_read, bytes, context)?;
        let (mut pages, mut hashes) = self.judge(window, &is_read, bytes);
        if pages.iter().all(|page| *page == Page::Zero) {
            block.zeros(len);
            return Ok(vec![UNKNOWN; pages.len()]);
        }
        let runs = window.before.as_ref().and_then(|(pieces, _)| runs(&window.range, &pages, pieces));
        // What is condemned is stored again.
        let may_keep = |run: &Run| if let Run::Kept(pieces) = run { context.inherits(pieces) } else { true };
        if let Some(runs) = runs.filter(|runs| runs.iter().all(may_keep)) {
            for run in runs {
                match run {
                    Run::Kept(pieces) => block.cuts.extend(pieces.into_iter().map(Cut::Kept)),
                    Run::Zero(len) => block.zeros(len),
                    Run::New(range) => block.patch(&bytes[range]),
                }
            }
            return Ok(hashes);
        }
        // All of it is stored anew, so the rest is needed as well.
        if matches!(self.known, Known::Changed(_)) && is_read.contains(&false) {
            let rest: Vec<_> = is_read.iter().map(|is_read| !is_read).collect();
            self.read_pages(window, &rest, bytes, context)?;
            (pages, hashes) = self.judge(window, &vec![true; pages.len()], bytes);
            if pages.iter().all(|page| *page == Page::Zero) {
                block.zeros(len);
                return Ok(vec![UNKNOWN; pages.len()]);
            }
        }
        let plain = Bytes::copy_from_slice(bytes);
        block.cuts.push(Cut::Chunk(context.sink.chunk_id(&plain), plain));
        Ok(hashes)
    }

    /// Compares what was read with the parent, and with what the list says.
    fn judge(&mut self, window: &Window<'_>, is_read: &[bool], bytes: &[u8]) -> (Vec<Page>, Vec<PageHash>) {
        let mut pages = Vec::with_capacity(is_read.len());
        let mut hashes = Vec::with_capacity(is_read.len());
        let mut lie = None;
        let old = window.before.as_ref().map(|(_, hashes)| *hashes);
        // A page that was not read is the parent's, or zeros by the list.
        let is_kept = |is_read: &bool| !is_read && matches!(self.known, Known::Changed(_));
        let is_all_zero = !is_read.iter().any(is_kept) && is_zero(bytes);
        for (number, range) in pages_of(&window.range).enumerate() {
            let old = old.and_then(|old| old.get(number)).copied().unwrap_or(UNKNOWN);
            if is_kept(&is_read[number]) {
                pages.push(Page::Same);
                hashes.push(old);
                continue;
            }
            let page = &bytes[within(range.start - window.range.start)..within(range.end - window.range.start)];
            let is_zero = is_all_zero || is_zero(page);
            let needs_hash = !is_all_zero || old != UNKNOWN;
            let hash = if needs_hash { self.hasher.hash(range.start, page).first().copied() } else { None };
            let hash = hash.unwrap_or(UNKNOWN);
            let is_same = old != UNKNOWN && hash == old;
            let is_as_told = match &self.known {
                // Pages of which the parent has no hash were zeros: it hashed all others.
                Known::Changed(_) => is_same || (old == UNKNOWN && is_zero),
                _ => is_zero,
            };
            if !window.listed[number] && !is_as_told {
                lie.get_or_insert(Lie { offset: range.start });
            }
            pages.push(match (is_same, is_zero) {
                // The parent's pages may be zeros all the same: holes are better.
                _ if is_all_zero => Page::Zero,
                (true, _) => Page::Same,
                (false, true) => Page::Zero,
                (false, false) => Page::New,
            });
            hashes.push(hash);
        }
        self.lie = self.lie.or(lie);
        (pages, hashes)
    }

    /// Reads these pages of a window.
    fn read_pages(
        &mut self,
        window: &Window<'_>,
        wanted: &[bool],
        bytes: &mut [u8],
        context: &Context,
    ) -> Result<(), BackupError> {
        let mut page = 0;
        for run in wanted.chunk_by(|one, other| one == other) {
            let start = page * within(PAGE_BYTES);
            page += run.len();
            if !run[0] {
                continue;
            }
            let stop = (page * within(PAGE_BYTES)).min(bytes.len());
            let offset = window.range.start + start as u64;
            read_full(&self.file, &mut bytes[start..stop], offset)
                .map_err(|source| BackupError::ReadImage { offset, source })?;
            context.read_bytes.fetch_add((stop - start) as u64, std::sync::atomic::Ordering::Relaxed);
        }
        let unlisted = pages_of(&window.range).zip(&window.listed).zip(wanted);
        let audited = unlisted.filter(|((_, listed), wanted)| !**listed && **wanted);
        self.audited += audited.map(|((range, _), _)| range.end - range.start).sum::<u64>();
        Ok(())
    }
}

/// The pages of a range, the last one perhaps shorter.
fn pages_of(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    (range.start..end).step_by(within(PAGE_BYTES)).map(move |start| start..(start + PAGE_BYTES).min(end))
}

/// Pages of a window that go the same way.
enum Run {
    Kept(Vec<Piece>),
    Zero(u64),
    /// Bytes of the window.
    New(Range<usize>),
}

/// What becomes of a window of which some pages are the parent's; `None`: too much changed, it is stored anew.
fn runs(range: &Range<u64>, pages: &[Page], before: &[Piece]) -> Option<Vec<Run>> {
    if pages.iter().filter(|page| **page == Page::New).count() * 2 > pages.len() || !pages.contains(&Page::Same) {
        return None;
    }
    let (mut runs, mut fragments, mut page) = (Vec::new(), 0, 0);
    for run in pages.chunk_by(|one, other| one == other) {
        let start = page * PAGE_BYTES;
        page += run.len() as u64;
        let stop = (page * PAGE_BYTES).min(range.end - range.start);
        runs.push(match run[0] {
            Page::Same => Run::Kept(slice(before, &(start..stop))?),
            Page::Zero => Run::Zero(stop - start),
            Page::New => Run::New(within(start)..within(stop)),
        });
        fragments += if let Some(Run::Kept(pieces)) = runs.last() { pieces.len() } else { 1 };
    }
    (fragments <= MAX_FRAGMENTS).then_some(runs)
}

/// Reads until `buffer` is full.
fn read_full(file: &OwnedFd, buffer: &mut [u8], offset: u64) -> Result<(), std::io::Error> {
    let mut done = 0;
    while done < buffer.len() {
        match pread(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
