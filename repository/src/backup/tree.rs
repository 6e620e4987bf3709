//! Backs up a directory: walk, merge with the parent, read what changed, in order and several files at once.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::{FuturesOrdered, StreamExt};
use rustix::fs::{Advice, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::assemble::{Assembler, Data, SMALL_FILE_BYTES};
use super::merge::{Parent, inherit, is_unchanged};
use super::{BackupError, SkipReason, TreeBackup, Written};
use crate::chunk::{Chunker, KeyedFastCdc};
use crate::glob::Glob;
use crate::id::ChunkId;
use crate::manifest::{Entry, Extent, Kind};
use crate::meta;
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::{Session, SessionError};
use crate::sink::{ChunkKind, ChunkSink, Put};
use crate::walk::{Found, Step, Walk, WalkOptions};

/// Entries that the walk may be ahead.
const WALK_AHEAD: usize = 1024;
/// Entries worked on at once.
const PARALLEL_ENTRIES: usize = 4;
/// Chunks of one file on their way at once.
const PARALLEL_CHUNKS: usize = 4;
/// Bytes read at once.
const READ_BYTES: usize = 1 << 20;
/// An entry that changed this shortly before it was looked at may change again within the same tick of the file
/// system's clock, unseen: its change time is not recorded, so that the next backup looks again.
const RACY_NANOS: i128 = 50_000_000;

/// What became of one found entry.
enum Outcome {
    Entry { entry: Entry, data: Data, read: u64 },
    Skipped(Vec<u8>, SkipReason),
}

/// What reading files needs.
struct Reading {
    sink: Arc<dyn ChunkSink>,
    chunker: KeyedFastCdc,
    progress: Arc<Progress>,
}

/// Writes the content and the manifest of a directory.
pub(super) async fn write(
    session: &Arc<Session>,
    repository: &Repository,
    root: &Path,
    plan: &TreeBackup,
    progress: &Arc<Progress>,
) -> Result<Written, BackupError> {
    let sink: Arc<dyn ChunkSink> = Arc::<Session>::clone(session);
    let chunker = KeyedFastCdc::new(&repository.config().chunker, sink.chunker_key());
    let reading = Arc::new(Reading { sink: Arc::clone(&sink), chunker, progress: Arc::clone(progress) });
    let mut parent = Parent::open(repository, plan.parent.as_ref()).await?;
    let mut found = start_walk(root, plan, progress)?;
    let mut assembler = Assembler::new(sink, Arc::clone(progress));
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut running = FuturesOrdered::new();
    let mut walked = false;
    while !walked || !running.is_empty() {
        tokio::select! {
            step = found.recv(), if !walked && running.len() < PARALLEL_ENTRIES => match step {
                Some(step) => {
                    let before = match &step {
                        Step::Found(found) => parent.find(&found.path).await?,
                        Step::Failed { .. } => None,
                    };
                    running.push_back(entry(step, before, &reading, &mut links));
                }
                None => walked = true,
            },
            Some(outcome) = running.next() => take(&mut assembler, outcome?).await?,
            () = progress.cancelled() => return Err(BackupError::Cancelled),
        }
    }
    assembler.finish().await
}

async fn take(assembler: &mut Assembler, outcome: Outcome) -> Result<(), BackupError> {
    match outcome {
        Outcome::Entry { entry, data, read } => {
            assembler.add_read(read);
            assembler.push(entry, data).await
        }
        Outcome::Skipped(path, reason) => {
            assembler.skip(path, reason);
            Ok(())
        }
    }
}

/// Walks on a thread of its own.
fn start_walk(root: &Path, plan: &TreeBackup, progress: &Arc<Progress>) -> Result<mpsc::Receiver<Step>, BackupError> {
    let excludes = plan.excludes.iter().map(|pattern| Glob::exclude(pattern)).collect();
    let options = WalkOptions { excludes, one_file_system: plan.one_file_system };
    let walk =
        Walk::new(root, options).map_err(|source| BackupError::Root { path: root.display().to_string(), source })?;
    let (sender, receiver) = mpsc::channel(WALK_AHEAD);
    let progress = Arc::clone(progress);
    tokio::task::spawn_blocking(move || {
        for step in walk {
            // The receiver is gone when the backup ended early.
            if progress.is_cancelled() || sender.blocking_send(step).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

type Work = futures::future::BoxFuture<'static, Result<Outcome, BackupError>>;

fn ready(outcome: Outcome) -> Work {
    Box::pin(std::future::ready(Ok(outcome)))
}

fn skip_reason(error: &io::Error) -> SkipReason {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::STALE) => SkipReason::Vanished,
        _ => SkipReason::Unreadable(error.to_string()),
    }
}

/// Decides what an entry needs: nothing, or reading.
fn entry(step: Step, before: Option<Entry>, reading: &Arc<Reading>, links: &mut HashMap<(u64, u64), Vec<u8>>) -> Work {
    let found = match step {
        Step::Found(found) => found,
        Step::Failed { path, error } => return ready(Outcome::Skipped(path, skip_reason(&error))),
    };
    let Some(kind) = meta::kind_of_stat(&found.stat) else {
        return ready(Outcome::Skipped(found.path, SkipReason::Unreadable("unknown kind of entry".to_owned())));
    };
    let mut entry = Entry { path: found.path.clone(), kind, meta: meta::of_stat(&found.stat) };
    if is_racy(&entry) {
        entry.meta.times.ctime = (0, 0);
    }
    let is_directory = matches!(entry.kind, Kind::Directory);
    if !is_directory && found.stat.st_nlink > 1 {
        let inode = (found.stat.st_dev, found.stat.st_ino);
        if let Some(first) = links.get(&inode) {
            entry.kind = Kind::HardLink { to: first.clone() };
            return ready(Outcome::Entry { entry, data: Data::Placed, read: 0 });
        }
        links.insert(inode, entry.path.clone());
    }
    if let Some(before) = &before
        && is_unchanged(before, &entry)
        && inherit(&*reading.sink, before)
    {
        reading.progress.add_bytes(before.size());
        return ready(Outcome::Entry { entry: before.clone(), data: Data::Placed, read: 0 });
    }
    let reading = Arc::clone(reading);
    Box::pin(async move { reading.read(*found, entry, before.is_some()).await })
}

fn is_racy(entry: &Entry) -> bool {
    let (seconds, nanos) = entry.meta.times.ctime;
    let changed = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    jiff::Timestamp::now().as_nanosecond() - changed < RACY_NANOS
}

/// A message from the reading thread.
enum Piece {
    /// A chunk and where it lies in the file.
    Chunk(u64, ChunkId, Bytes),
}

impl Reading {
    /// Reads attributes, link targets and data.
    async fn read(self: Arc<Self>, found: Found, mut entry: Entry, changed: bool) -> Result<Outcome, BackupError> {
        self.progress.set_current(&entry.path);
        let (found, looked) = blocking(move || {
            let looked = look(&found);
            (found, looked)
        })
        .await?;
        let path = entry.path.clone();
        let (xattrs, target) = match looked {
            Ok(looked) => looked,
            Err(error) => return Ok(Outcome::Skipped(path, skip_reason(&error))),
        };
        entry.meta.xattrs = xattrs;
        match &mut entry.kind {
            Kind::Symlink { target: text } => {
                *text = target;
                Ok(Outcome::Entry { entry, data: Data::Placed, read: 0 })
            }
            Kind::File { size, .. } if *size < SMALL_FILE_BYTES => self.read_small(found, entry, changed).await,
            Kind::File { .. } => self.read_large(found, entry).await,
            _ => Ok(Outcome::Entry { entry, data: Data::Placed, read: 0 }),
        }
    }

    async fn read_small(&self, found: Found, mut entry: Entry, changed: bool) -> Result<Outcome, BackupError> {
        let wanted = usize::try_from(entry.size()).unwrap_or(usize::MAX);
        let read = blocking(move || {
            let file = open(&found)?;
            let mut bytes = vec![0; wanted];
            let mut filled = 0;
            while filled < wanted {
                match rustix::io::pread(&file, &mut bytes[filled..], filled as u64)? {
                    0 => break,
                    count => filled += count,
                }
            }
            bytes.truncate(filled);
            Ok::<_, io::Error>(bytes)
        })
        .await?;
        let bytes = match read {
            Ok(bytes) if bytes.len() < wanted => return Ok(Outcome::Skipped(entry.path, SkipReason::Shrunk)),
            Ok(bytes) => Bytes::from(bytes),
            Err(error) => return Ok(Outcome::Skipped(entry.path, skip_reason(&error))),
        };
        let read = bytes.len() as u64;
        self.progress.add_bytes(read);
        entry.kind = Kind::File { size: read, extents: Vec::new() };
        let data = if bytes.is_empty() { Data::Placed } else { Data::Small { bytes, changed } };
        Ok(Outcome::Entry { entry, data, read })
    }

    async fn read_large(self: Arc<Self>, found: Found, mut entry: Entry) -> Result<Outcome, BackupError> {
        let (sender, mut pieces) = mpsc::channel(PARALLEL_CHUNKS);
        let size = entry.size();
        let this = Arc::clone(&self);
        let reader = tokio::task::spawn_blocking(move || this.cut_file(&found, size, &sender));
        let mut extents = Vec::new();
        let mut read = 0;
        let mut putting = FuturesOrdered::new();
        loop {
            tokio::select! {
                piece = pieces.recv(), if putting.len() < PARALLEL_CHUNKS => match piece {
                    Some(Piece::Chunk(offset, id, plain)) => {
                        read += plain.len() as u64;
                        putting.push_back(self.put(offset, id, plain));
                    }
                    None => break,
                },
                Some(put) = putting.next() => self.note(put?, &mut extents),
            }
        }
        while let Some(put) = putting.next().await {
            self.note(put?, &mut extents);
        }
        let ended = reader.await.map_err(|error| BackupError::Worker(error.to_string()))?;
        if let Err(reason) = ended {
            return Ok(Outcome::Skipped(entry.path, reason));
        }
        entry.kind = Kind::File { size, extents };
        Ok(Outcome::Entry { entry, data: Data::Placed, read })
    }

    async fn put(&self, offset: u64, id: ChunkId, plain: Bytes) -> Result<(u64, Put), SessionError> {
        Ok((offset, self.sink.put(ChunkKind::Data, id, plain).await?))
    }

    fn note(&self, (offset, put): (u64, Put), extents: &mut Vec<Extent>) {
        let len = put.chunk.len;
        self.progress.add_bytes(u64::from(len));
        if put.new {
            self.progress.add_stored(u64::from(len), u64::from(put.stored));
        }
        extents.push(Extent { offset, chunk: put.chunk, from: 0, len });
    }

    /// Reads, cuts and hashes a file on this thread; holes are left out.
    fn cut_file(&self, found: &Found, size: u64, sender: &mpsc::Sender<Piece>) -> Result<(), SkipReason> {
        let unreadable = |error: Errno| skip_reason(&io::Error::from(error));
        let file = open(found).map_err(|error| skip_reason(&error))?;
        // A hint only.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        let is_sparse = found.stat.st_blocks.cast_unsigned().saturating_mul(512) < size;
        let mut offset = 0;
        while offset < size {
            let (start, end) =
                if is_sparse { next_data(&file, offset, size).map_err(unreadable)? } else { (offset, size) };
            self.cut_range(&file, start, end, sender)?;
            offset = end;
        }
        let still = rustix::fs::fstat(&file).map_err(unreadable)?.st_size.cast_unsigned();
        // Beyond a shorter end there are no holes, only nothing.
        if still < size { Err(SkipReason::Shrunk) } else { Ok(()) }
    }

    fn cut_range(&self, file: &OwnedFd, start: u64, end: u64, sender: &mpsc::Sender<Piece>) -> Result<(), SkipReason> {
        let mut buffer = BytesMut::new();
        let (mut read_to, mut cut_to) = (start, start);
        while cut_to < end {
            while buffer.len() < self.chunker.max() && read_to < end {
                let want = usize::try_from(end - read_to).unwrap_or(usize::MAX).min(READ_BYTES);
                let filled = buffer.len();
                buffer.resize(filled + want, 0);
                let count = rustix::io::pread(file, &mut buffer[filled..], read_to)
                    .map_err(|error| skip_reason(&io::Error::from(error)))?;
                buffer.truncate(filled + count);
                if count == 0 {
                    return Err(SkipReason::Shrunk);
                }
                read_to += count as u64;
            }
            let plain = buffer.split_to(self.chunker.cut(&buffer)).freeze();
            let length = plain.len() as u64;
            let id = self.sink.chunk_id(&plain);
            if self.progress.is_cancelled() || sender.blocking_send(Piece::Chunk(cut_to, id, plain)).is_err() {
                // The backup ended early; what is returned is not looked at.
                return Ok(());
            }
            cut_to += length;
        }
        let _ = rustix::fs::fadvise(file, start, std::num::NonZeroU64::new(end - start), Advice::DontNeed);
        Ok(())
    }
}

/// The next range with data at or after `offset`; (size, size) when only a hole is left.
fn next_data(file: &OwnedFd, offset: u64, size: u64) -> Result<(u64, u64), Errno> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start.min(size),
        Err(Errno::NXIO) => return Ok((size, size)),
        // A file system that does not know holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((offset, size)),
        Err(error) => return Err(error),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok((start, end.min(size)))
}

/// Opens a file without following a link, without waiting for a pipe's other end, without changing its access time.
fn open(found: &Found) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(&found.directory, &found.name, flags | OFlags::NOATIME, Mode::empty()) {
        // Only the owner may leave the access time alone.
        Err(Errno::PERM) => rustix::fs::openat(&found.directory, &found.name, flags, Mode::empty())?,
        opened => opened?,
    };
    // Another file may have taken the name since the walk looked.
    if rustix::fs::fstat(&file)?.st_ino == found.stat.st_ino { Ok(file) } else { Err(Errno::NOENT.into()) }
}

/// Attributes, and where a symbolic link points.
fn look(found: &Found) -> io::Result<(Vec<crate::manifest::Xattr>, Vec<u8>)> {
    let xattrs = meta::read_xattrs(found.directory.as_fd(), found.name.to_bytes())?;
    let is_link = rustix::fs::FileType::from_raw_mode(found.stat.st_mode) == rustix::fs::FileType::Symlink;
    let target = if is_link {
        rustix::fs::readlinkat(&found.directory, &found.name, Vec::new())?.into_bytes()
    } else {
        Vec::new()
    };
    Ok((xattrs, target))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, BackupError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| BackupError::Worker(error.to_string()))
}
