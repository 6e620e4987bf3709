//! Brings entries back into path order, bundles small files, and writes the manifest.
//!
//! An entry waits until the chunk that holds its bytes is stored; what waits is bounded. Files that changed since the
//! parent have a bundle of their own, so that the bundles of files that never change stay whole.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::BackupError;
use super::compare::{Item, Todo};
use super::read::{Context, Outcome, resolve};
use crate::manifest::{Contents, Entry, Kind, ManifestWriter, Piece, Regular, Skipped, write_skipped};
use crate::session::SessionError;
use crate::sink::{ChunkKind, ChunkRef, Put};
use crate::snapshot::Counts;

/// A bundle ends behind a file that fits [`CUT_MASK`] once it has this many bytes ...
const BUNDLE_MIN: usize = 64 << 10;
/// ... and at the latest behind the file that takes it to this.
const BUNDLE_MAX: usize = 192 << 10;
/// One path in eight may end a bundle: after an insertion the next bundles soon are the old ones again.
const CUT_MASK: u8 = 7;
/// Entries that wait for others before their own bundles are closed early.
const WINDOW: usize = 4096;
/// Bundles that are stored at the same time.
const IN_FLIGHT: usize = 8;

#[derive(Default)]
struct Bundle {
    number: u64,
    bytes: Vec<u8>,
    files: usize,
}

/// A bundle on its way into the repository.
struct Storing {
    number: u64,
    files: usize,
    put: JoinHandle<Result<Put, SessionError>>,
}

struct Waiting {
    entry: Entry,
    /// Number of the bundle, offset and length there.
    bundled: Option<(u64, u32, u32)>,
}

/// A manifest that is being made.
pub(super) struct Assembly {
    context: Arc<Context>,
    writer: ManifestWriter,
    queue: VecDeque<Waiting>,
    /// For new files, and for files that the parent has with other content.
    open: [Bundle; 2],
    next_bundle: u64,
    storing: VecDeque<Storing>,
    stored: HashMap<u64, (ChunkRef, usize)>,
    /// First paths that could not be read; once another name of the file was read, that one.
    lost: HashMap<Vec<u8>, Option<Vec<u8>>>,
    skipped: Vec<Skipped>,
    counts: Counts,
}

/// What was written.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) root: Vec<ChunkRef>,
    pub(super) skipped_list: Vec<ChunkRef>,
    pub(super) skipped: Vec<Skipped>,
    pub(super) counts: Counts,
}

impl Assembly {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            writer: ManifestWriter::new(Arc::clone(&context.sink)),
            context,
            queue: VecDeque::new(),
            open: [Bundle { number: 0, ..Bundle::default() }, Bundle { number: 1, ..Bundle::default() }],
            next_bundle: 2,
            storing: VecDeque::new(),
            stored: HashMap::new(),
            lost: HashMap::new(),
            skipped: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Takes the next outcome in path order.
    pub(super) async fn push(&mut self, outcome: Outcome) -> Result<(), BackupError> {
        if let Outcome::Done(entry) | Outcome::Small { entry, .. } = &outcome
            && !self.lost.is_empty()
        {
            // Listed for its attributes only.
            self.lost.remove(&entry.path);
        }
        match outcome {
            Outcome::Done(entry) => self.push_done(entry).await?,
            Outcome::Small { entry, bytes, changed } => self.bundle(entry, &bytes, changed).await?,
            Outcome::Skipped(skipped) => self.skip(skipped),
        }
        self.drain().await
    }

    fn skip(&mut self, skipped: Skipped) {
        self.counts.skipped += 1;
        self.context.progress.add_skipped();
        self.lost.insert(skipped.path.clone(), None);
        self.skipped.push(skipped);
    }

    async fn push_done(&mut self, mut entry: Entry) -> Result<(), BackupError> {
        if let Kind::Link { to } = &mut entry.kind
            && let Some(replaced) = self.lost.get(to.as_slice())
        {
            match replaced {
                Some(other) => to.clone_from(other),
                None => return self.read_instead(entry).await,
            }
        }
        if self.queue.is_empty() {
            return self.write(entry).await;
        }
        self.queue.push_back(Waiting { entry, bundled: None });
        Ok(())
    }

    /// The first name of this file could not be read; perhaps it was removed. This name takes its part.
    async fn read_instead(&mut self, mut entry: Entry) -> Result<(), BackupError> {
        let Kind::Link { to } = entry.kind else { return Ok(()) };
        let path = entry.path.clone();
        entry.kind = Kind::Regular(Regular {
            size: super::read::SMALL_BYTES,
            sparse: false,
            linked: true,
            contents: Contents::default(),
            page_map: Contents::default(),
        });
        let items = vec![Item::Entry(entry, Todo::Read { changed: true, before: None })];
        // Boxed: it is rare, and large with all that reading needs.
        for outcome in Box::pin(resolve(Arc::clone(&self.context), items)).await? {
            match outcome {
                Outcome::Done(entry) => {
                    self.lost.insert(to.clone(), Some(path.clone()));
                    self.queue.push_back(Waiting { entry, bundled: None });
                }
                Outcome::Small { entry, bytes, changed } => {
                    self.lost.insert(to.clone(), Some(path.clone()));
                    self.bundle(entry, &bytes, changed).await?;
                }
                Outcome::Skipped(skipped) => self.skip(skipped),
            }
        }
        Ok(())
    }

    async fn bundle(&mut self, entry: Entry, bytes: &[u8], changed: bool) -> Result<(), BackupError> {
        let which = usize::from(changed);
        let open = &mut self.open[which];
        // Both are far below 4 GiB: bundles end at [`BUNDLE_MAX`].
        let short = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let place = (open.number, short(open.bytes.len()), short(bytes.len()));
        open.bytes.extend_from_slice(bytes);
        open.files += 1;
        let size = open.bytes.len();
        let may_end = || blake3::keyed_hash(self.context.sink.chunker_key(), &entry.path).as_bytes()[1] & CUT_MASK == 0;
        let ends = size >= BUNDLE_MAX || size >= BUNDLE_MIN && may_end();
        self.queue.push_back(Waiting { entry, bundled: Some(place) });
        if ends { self.close(which).await } else { Ok(()) }
    }

    async fn close(&mut self, which: usize) -> Result<(), BackupError> {
        if self.open[which].files == 0 {
            return Ok(());
        }
        let next = Bundle { number: self.next_bundle, ..Bundle::default() };
        self.next_bundle += 1;
        let Bundle { number, bytes, files } = std::mem::replace(&mut self.open[which], next);
        let plain = Bytes::from(bytes);
        let id = self.context.sink.chunk_id(&plain);
        let put = self.context.store(ChunkKind::Bundle, id, plain).await?;
        self.storing.push_back(Storing { number, files, put });
        while self.storing.len() >= IN_FLIGHT {
            self.settle().await?;
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), BackupError> {
        if let Some(Storing { number, files, put }) = self.storing.pop_front() {
            let put = put.await.map_err(BackupError::Worker)??;
            self.stored.insert(number, (put.chunk, files));
        }
        Ok(())
    }

    /// Writes the entries at the front that wait for nothing.
    async fn drain(&mut self) -> Result<(), BackupError> {
        while self.storing.front().is_some_and(|bundle| bundle.put.is_finished()) {
            self.settle().await?;
        }
        if self.queue.len() > WINDOW {
            self.close(0).await?;
            self.close(1).await?;
            while !self.storing.is_empty() {
                self.settle().await?;
            }
        }
        while let Some(Waiting { mut entry, bundled }) = self.queue.pop_front() {
            if let Some((number, offset, len)) = bundled {
                let Some((chunk, left)) = self.stored.get_mut(&number) else {
                    self.queue.push_front(Waiting { entry, bundled });
                    return Ok(());
                };
                if let Kind::Regular(file) = &mut entry.kind {
                    file.contents = Contents::Inline(vec![Piece::Data { chunk: *chunk, offset, len }]);
                }
                *left -= 1;
                if *left == 0 {
                    self.stored.remove(&number);
                }
            }
            self.write(entry).await?;
        }
        Ok(())
    }

    async fn write(&mut self, entry: Entry) -> Result<(), BackupError> {
        self.count(&entry);
        Ok(self.writer.push(entry).await?)
    }

    fn count(&mut self, entry: &Entry) {
        match &entry.kind {
            Kind::Regular(_) | Kind::Link { .. } => self.counts.files += 1,
            Kind::Directory => {
                self.counts.directories += 1;
                self.context.progress.set_current(&entry.path);
            }
            _ => self.counts.others += 1,
        }
        if let Kind::Regular(file) = &entry.kind {
            self.counts.bytes += file.size;
        }
        self.context.progress.add_entry();
    }

    /// Stores what is open, the root records and the list of skipped paths.
    pub(super) async fn finish(mut self) -> Result<Written, BackupError> {
        self.close(0).await?;
        self.close(1).await?;
        while !self.storing.is_empty() {
            self.settle().await?;
        }
        self.drain().await?;
        let root = self.writer.finish().await?;
        let skipped_list = write_skipped(&*self.context.sink, &self.skipped).await?;
        Ok(Written { root, skipped_list, skipped: self.skipped, counts: self.counts })
    }
}
