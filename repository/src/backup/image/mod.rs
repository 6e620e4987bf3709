//! Backups of block devices and disk images: an image becomes a tree with one sparse file, [`FILE`], cut at fixed offsets.
//!
//! Zeros take no room and, where the storage lists what is allocated or what changed, are not read either. A list is only as
//! good as its driver: audits read what it leaves out. A list that is found wrong is not used any more, and the same
//! backup reads everything.

mod extents;
mod parent;
mod read;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use rustix::fs::{FileType, SeekFrom, fstat, seek};
use rustix::io::Errno;
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::warn;

use super::assemble::{Assembly, Written};
use super::inherit::has_lost;
use super::pages::PageMap;
use super::parent::is_lost;
use super::read::{Context, Hooks, Outcome, store_map};
use super::store::{Pieces, Storing};
use super::tree::{StopOnDrop, decide};
use super::{BackupError, TreeBackup};
use crate::chunk;
use crate::manifest::{Contents, Entry, Kind, Manifest, Meta, Piece, PieceListWriter, Regular};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::Session;
use crate::sink::{ChunkKind, ChunkRef, ChunkSink, ChunkSource};
use crate::snapshot::{Content, Snapshot};

pub use extents::{Extents, ExtentsError};
use parent::Parent;
use read::{Block, BlockMap, Cut, Image};

/// The path of the image in its snapshot.
pub const FILE: &str = "volume.img";
/// Chunks that are stored at once.
const IN_FLIGHT: usize = 16;

/// What is known about an image before it is read.
#[derive(Debug, Clone)]
pub enum Known {
    /// Nothing: all of it is read and compared with the parent.
    Nothing,
    /// Outside of these ranges are zeros.
    Allocated(Extents),
    /// Outside of these ranges it is as in the parent.
    Changed(Extents),
}

/// What is read although a list says that it need not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audit {
    /// Nothing.
    Off,
    /// About one in so many parts of 256 KiB; another seed chooses others.
    Sample {
        /// At least one.
        one_in: u64,
        /// Which ones.
        seed: u64,
    },
    /// Everything.
    All,
}

impl Audit {
    fn takes(self, window: u64) -> bool {
        match self {
            Self::Off => false,
            Self::All => true,
            Self::Sample { one_in, seed } => mix(seed ^ mix(window)).is_multiple_of(one_in.max(1)),
        }
    }
}

/// The finalizer of `SplitMix64`: spreads numbers over all bits.
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A place that the list left out although it should not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lie {
    /// Where it begins.
    pub offset: u64,
}

/// How an image was read in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadBy {
    /// By a list of what changed.
    Changed,
    /// By a list of what is allocated.
    Allocated,
    /// All of it.
    Everything,
}

/// What a backup of an image made.
#[derive(Debug, Clone)]
pub struct ImageReport {
    /// The committed snapshot.
    pub snapshot: Snapshot,
    /// How it was read.
    pub by: ReadBy,
    /// Whether the list was not used because the parent cannot be: it expired, lost chunks, or has no image.
    pub parent_is_unusable: bool,
    /// Bytes read only to see whether the list is right.
    pub audited: u64,
    /// Where the list is wrong, if that was found; then everything was read.
    pub lie: Option<Lie>,
}

/// The length of a device or file.
pub fn size_of(device: &OwnedFd) -> std::io::Result<u64> {
    Ok(seek(device, SeekFrom::End(0))?)
}

/// What a regular file's own file system says about it; nothing of a device.
pub fn known_of(file: &OwnedFd) -> std::io::Result<Known> {
    if FileType::from_raw_mode(fstat(file)?.st_mode) != FileType::RegularFile {
        return Ok(Known::Nothing);
    }
    let size = size_of(file)?;
    let mut list = Extents::new(size);
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(size),
            // No data up to the end.
            Err(Errno::NXIO) => break,
            // A file system that does not know its holes.
            Err(_) => return Ok(Known::Nothing),
        };
        let end = seek(file, SeekFrom::Hole(start)).map_or(size, |end| end.min(size)).max(start + 1);
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        if list.add(signed(start), signed(end.min(size) - start)).is_err() {
            return Ok(Known::Nothing);
        }
        at = end;
    }
    Ok(Known::Allocated(list))
}

/// Backs up a device or file as one image, in a session of its own. See [`image_in`].
pub async fn image(
    repository: &Repository,
    device: OwnedFd,
    known: Known,
    audit: Audit,
    options: TreeBackup,
    progress: Arc<Progress>,
) -> Result<ImageReport, BackupError> {
    let session = repository.begin(options.session_options()).await?;
    image_in(session, repository, device, (known, audit), options, progress).await
}

/// Backs up a device or file as one image, in a session that was begun for it. The session is decided in any case.
///
/// What is `known` must be about exactly this state, and [`Known::Changed`] about the way to it from the parent.
/// Of the options, `excludes` and `one_file_system` mean nothing here.
pub async fn image_in(
    session: Arc<Session>,
    repository: &Repository,
    device: OwnedFd,
    (known, audit): (Known, Audit),
    options: TreeBackup,
    progress: Arc<Progress>,
) -> Result<ImageReport, BackupError> {
    let mut found = Found::default();
    let work = async {
        if let Some(parent) = &options.parent {
            session.inherit_from(parent).await?;
        }
        let size = size_of(&device).map_err(|source| BackupError::ReadImage { offset: 0, source })?;
        progress.expect_bytes(size);
        let source: Arc<dyn ChunkSource> = repository.parent_reader();
        let sink = Arc::clone(&session) as Arc<dyn ChunkSink>;
        let chunker = chunk::chunker(&repository.config().chunker, session.chunker_key())?;
        let context = Context::new(None, sink, Some(source), chunker, Arc::clone(&progress), Hooks::default());
        let input = Input { device, size, known, audit, parent: parent_root(&options)? };
        write_image(Arc::new(context), input, &mut found).await
    };
    let report = decide(&session, &options, &progress, work).await?;
    let Found { by, parent_is_unusable, audited, lie } = found;
    let by = by.unwrap_or(ReadBy::Everything);
    Ok(ImageReport { snapshot: report.snapshot, by, parent_is_unusable, audited, lie })
}

fn parent_root(options: &TreeBackup) -> Result<Option<Vec<ChunkRef>>, BackupError> {
    match options.parent.as_ref().map(|parent| &parent.content) {
        None => Ok(None),
        Some(Content::Tree { root, .. }) => Ok(Some(root.clone())),
        Some(Content::RecoveryPoint { .. }) => Err(BackupError::ParentIsNoTree),
    }
}

/// What is read, and what is known before.
struct Input {
    device: OwnedFd,
    size: u64,
    known: Known,
    audit: Audit,
    parent: Option<Vec<ChunkRef>>,
}

/// What reading showed.
#[derive(Debug, Default)]
struct Found {
    by: Option<ReadBy>,
    parent_is_unusable: bool,
    audited: u64,
    lie: Option<Lie>,
}

/// The parent's image, if it can be compared with.
async fn parent_image(context: &Context, root: &[ChunkRef]) -> Result<Option<Regular>, BackupError> {
    let Some(source) = &context.source else { return Ok(None) };
    let find = async { Manifest::open(Arc::clone(source), root).await?.find(FILE.as_bytes()).await };
    let file = match find.await {
        Ok(Some(Entry { kind: Kind::Regular(file), .. })) => file,
        Ok(_) => return Ok(None),
        Err(error) if is_lost(&error) => {
            warn!(%error, "the parent is damaged: everything is read");
            return Ok(None);
        }
        Err(error) => return Err(BackupError::ReadParent(error)),
    };
    Ok(if has_lost(context, &file).await? { None } else { Some(file) })
}

/// Writes the chunks and the manifest of an image; also tells how many bytes were read.
async fn write_image(context: Arc<Context>, input: Input, found: &mut Found) -> Result<(Written, u64), BackupError> {
    let _stop = StopOnDrop(Arc::clone(&context));
    let Input { device, size, mut known, mut audit, parent } = input;
    let parent = match parent {
        Some(root) => parent_image(&context, &root).await?,
        None => None,
    };
    let is_comparable = parent.as_ref().is_some_and(|parent| parent.size == size);
    if matches!(known, Known::Changed(_)) && !is_comparable {
        found.parent_is_unusable = true;
        known = Known::Nothing;
    }
    let (contents, page_map) = loop {
        let by = match &known {
            Known::Nothing => ReadBy::Everything,
            Known::Allocated(_) => ReadBy::Allocated,
            Known::Changed(_) => ReadBy::Changed,
        };
        found.by = Some(if audit == Audit::All { ReadBy::Everything } else { by });
        let file = device.try_clone().map_err(|source| BackupError::ReadImage { offset: 0, source })?;
        let before = parent.as_ref().zip(context.source.as_ref());
        let image = Image {
            file,
            size,
            at: 0,
            known,
            audit,
            parent: before.map(|(parent, source)| Parent::start(source, parent)),
            hasher: PageMap::new(&*context.sink, size),
            audited: 0,
            lie: None,
        };
        let (image, stored) = store(&context, image, audit != Audit::All).await?;
        found.audited += image.audited;
        found.lie = found.lie.or(image.lie);
        if let Some(stored) = stored {
            break stored;
        }
        warn!(lie = ?image.lie, "the storage's list of blocks is wrong: everything is read");
        (known, audit) = (Known::Nothing, Audit::Off);
    };
    let kind = Kind::Regular(Regular { size, sparse: true, linked: false, contents, page_map });
    let file = Entry { path: FILE.into(), meta: Meta { mode: 0o600, ..Meta::default() }, kind };
    let root = Entry { path: Vec::new(), meta: Meta { mode: 0o755, ..Meta::default() }, kind: Kind::Directory };
    let mut assembly = Assembly::new(Arc::clone(&context));
    assembly.push(Outcome::Done(root)).await?;
    assembly.push(Outcome::Done(file)).await?;
    Ok((assembly.finish().await?, context.read_bytes.load(Ordering::Relaxed)))
}

type Reading = JoinHandle<(Image, Result<Option<Block>, BackupError>)>;

fn read_on(context: &Arc<Context>, mut image: Image) -> Reading {
    let context = Arc::clone(context);
    spawn_blocking(move || {
        let block = image.next(&context);
        (image, block)
    })
}

/// Contents and page map.
type Stored = (Contents, Contents);

/// Reads an image and stores what is new. `None`, if `until_lie` and the list was found wrong.
async fn store(context: &Arc<Context>, image: Image, until_lie: bool) -> Result<(Image, Option<Stored>), BackupError> {
    let mut pieces = Pieces::new(context);
    let mut map = PieceListWriter::new(Arc::clone(&context.sink));
    let mut storing: VecDeque<Storing> = VecDeque::new();
    let mut reading = read_on(context, image);
    loop {
        let (image, block) = reading.await.map_err(BackupError::Worker)?;
        if context.is_stopped() {
            return Err(BackupError::Cancelled);
        }
        if until_lie && image.lie.is_some() {
            return Ok((image, None));
        }
        let Some(block) = block? else {
            for stored in storing {
                pieces.push(stored.settle().await?).await?;
            }
            return Ok((image, Some((pieces.finish().await?, map.finish().await?))));
        };
        reading = read_on(context, image);
        match block.map {
            BlockMap::Kept(kept) => {
                for piece in kept {
                    map.push(piece).await?;
                }
            }
            BlockMap::New(part) => map.push(store_map(context, part).await?).await?,
        }
        let mut patches = Vec::new();
        for patch in block.patches {
            let plain = Bytes::from(patch);
            let put = context.store(ChunkKind::Data, context.sink.chunk_id(&plain), plain).await?;
            patches.push(put.await.map_err(BackupError::Worker)??.chunk);
        }
        for cut in block.cuts {
            storing.push_back(match cut {
                Cut::Kept(piece) => Storing::Done(piece),
                Cut::Chunk(id, plain) => Storing::Put(context.store(ChunkKind::Data, id, plain).await?),
                Cut::Patched { patch, offset, len } => {
                    Storing::Done(Piece::Data { chunk: patches[patch], offset, len })
                }
            });
            while storing.len() >= IN_FLIGHT
                && let Some(oldest) = storing.pop_front()
            {
                pieces.push(oldest.settle().await?).await?;
            }
        }
    }
}

/// Opens a device or file to be backed up.
pub fn open(path: &Path) -> std::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}
