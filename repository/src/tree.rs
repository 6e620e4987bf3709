//! Looking into a snapshot: listings, and the content of single files, without restoring anything.
//!
//! Only the pages of the manifest that can hold what is asked for are read.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use thiserror::Error;

use crate::error::{Classified, ErrorClass};
use crate::manifest::{Entry, Kind, Manifest, ManifestError, Piece, Regular, Skipped, is_in, read_skipped};
use crate::read::ReadError;
use crate::repository::Repository;
use crate::restore::Selection;
use crate::sink::{ChunkRef, ChunkSource};
use crate::snapshot::{Content, Snapshot};

/// Chunks of a file that are read ahead.
const AHEAD: usize = 4;
/// Zeros of a hole come in pieces of at most this length.
const ZEROS: &[u8] = &[0; 64 << 10];

/// Why a snapshot cannot be looked into.
#[derive(Debug, Error)]
pub enum TreeError {
    /// The snapshot has no files.
    #[error("the snapshot is a recovery point, not a tree")]
    NotATree,
    /// The manifest cannot be read.
    #[error("cannot read the snapshot")]
    Manifest(#[from] ManifestError),
    /// The content cannot be read.
    #[error("cannot read the content")]
    Read(#[from] ReadError),
    /// The snapshot does not have the path.
    #[error("the snapshot has no {path}")]
    NotFound {
        /// The path.
        path: String,
    },
    /// The path is no regular file.
    #[error("{path} is a {kind}, not a file")]
    NotAFile {
        /// The path.
        path: String,
        /// What it is.
        kind: &'static str,
    },
}

impl Classified for TreeError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::NotATree | Self::NotAFile { .. } => ErrorClass::Invalid,
            Self::Manifest(error) => error.class(),
            Self::Read(error) => error.class(),
            Self::NotFound { .. } => ErrorClass::NotFound,
        }
    }
}

fn root_of(snapshot: &Snapshot) -> Result<&[ChunkRef], TreeError> {
    match &snapshot.content {
        Content::Tree { root, .. } => Ok(root),
        Content::RecoveryPoint { .. } => Err(TreeError::NotATree),
    }
}

/// The manifest of a snapshot, for those who want to read it on their own.
pub async fn manifest(repository: &Repository, snapshot: &Snapshot) -> Result<Manifest, TreeError> {
    Ok(Manifest::open(repository.reader()?, root_of(snapshot)?).await?)
}

/// A path as people write it: without slashes at the ends and without `.`.
fn plain_path(path: &Path) -> Vec<u8> {
    let names = path.as_os_str().as_bytes().split(|byte| *byte == b'/');
    names.filter(|name| !matches!(*name, b"" | b".")).collect::<Vec<_>>().join(&b'/')
}

/// The entries in a directory (all below it if `recursive`), or the one entry that is no directory; in path order.
///
/// Without a path: the root, whose own entry is left out. For very large trees prefer [`stream`].
pub async fn list(
    repository: &Repository,
    snapshot: &Snapshot,
    path: Option<&Path>,
    recursive: bool,
) -> Result<Vec<Entry>, TreeError> {
    let manifest = manifest(repository, snapshot).await?;
    list_in(&manifest, path, recursive).await
}

pub(crate) async fn list_in(
    manifest: &Manifest,
    path: Option<&Path>,
    recursive: bool,
) -> Result<Vec<Entry>, TreeError> {
    let path = path.map(plain_path).unwrap_or_default();
    if !path.is_empty() {
        match manifest.find(&path).await? {
            None => return Err(TreeError::NotFound { path: String::from_utf8_lossy(&path).into_owned() }),
            Some(entry) if entry.kind != Kind::Directory => return Ok(vec![entry]),
            Some(_) => {}
        }
    }
    walk(manifest, path, recursive).try_concat().await.map_err(TreeError::from)
}

/// All entries of a snapshot, page by page, in path order; with the root's own entry.
pub async fn stream(
    repository: &Repository,
    snapshot: &Snapshot,
) -> Result<BoxStream<'static, Result<Vec<Entry>, ManifestError>>, TreeError> {
    let manifest = manifest(repository, snapshot).await?;
    Ok(manifest.read(0..manifest.pages().len()))
}

/// What a restore with these patterns would take, page by page, in path order; directories above it are left out.
pub async fn select(
    repository: &Repository,
    snapshot: &Snapshot,
    patterns: &[String],
) -> Result<BoxStream<'static, Result<Vec<Entry>, ManifestError>>, TreeError> {
    let manifest = manifest(repository, snapshot).await?;
    let selection = Selection::new(patterns);
    let pages = manifest.read(selection.pages(&manifest));
    let take = move |entries: Vec<Entry>| entries.into_iter().filter(|entry| selection.takes(&entry.path)).collect();
    Ok(pages.map_ok(take).boxed())
}

fn walk(manifest: &Manifest, path: Vec<u8>, recursive: bool) -> BoxStream<'static, Result<Vec<Entry>, ManifestError>> {
    let range = manifest.range_of(&path);
    let pages = manifest.pages();
    let wanted = range.filter(|page| {
        // A page that begins and ends below the same name in the directory holds nothing of the directory itself.
        let child = |at: usize| pages.get(at).and_then(|page| child_below(&page.first, &path));
        recursive || child(*page).is_none() || child(*page) != child(page + 1)
    });
    manifest
        .read(wanted)
        .map_ok(move |entries| {
            let is_wanted = |entry: &Entry| {
                entry.path != path
                    && is_in(&entry.path, &path)
                    && (recursive || entry.parent_and_name().0 == path.as_slice())
            };
            entries.into_iter().filter(is_wanted).collect()
        })
        .boxed()
}

/// The name in the directory that the path lies below, if it lies deeper than that.
pub(crate) fn child_below<'a>(path: &'a [u8], directory: &[u8]) -> Option<&'a [u8]> {
    if path == directory || !is_in(path, directory) {
        return None;
    }
    let start = if directory.is_empty() { 0 } else { directory.len() + 1 };
    let rest = &path[start..];
    rest.iter().position(|byte| *byte == b'/').map(|end| &rest[..end])
}

/// What the backup could not read.
pub async fn skipped(repository: &Repository, snapshot: &Snapshot) -> Result<Vec<Skipped>, TreeError> {
    match &snapshot.content {
        Content::Tree { skipped, .. } => Ok(read_skipped(&*repository.reader()?, skipped).await?),
        Content::RecoveryPoint { .. } => Err(TreeError::NotATree),
    }
}

/// The content of one regular file, from its start to its end.
pub async fn read_file(
    repository: &Repository,
    snapshot: &Snapshot,
    path: &Path,
) -> Result<BoxStream<'static, Result<Bytes, TreeError>>, TreeError> {
    let source: Arc<dyn ChunkSource> = repository.reader()?;
    let manifest = Manifest::open(Arc::clone(&source), root_of(snapshot)?).await?;
    let wanted = plain_path(path);
    let shown = || path.display().to_string();
    match manifest.find_file(&wanted).await? {
        Some(Entry { kind: Kind::Regular(file), .. }) => Ok(read_pieces(source, &manifest, &file)),
        Some(entry) => Err(TreeError::NotAFile { path: shown(), kind: entry.kind.name() }),
        None => Err(TreeError::NotFound { path: shown() }),
    }
}

/// All regular files with their content, in path order.
///
/// For trees of small files: each is held in memory, a few at a time.
pub async fn read_files(
    repository: &Repository,
    snapshot: &Snapshot,
) -> Result<BoxStream<'static, Result<(Vec<u8>, Bytes), TreeError>>, TreeError> {
    let source: Arc<dyn ChunkSource> = repository.reader()?;
    let manifest = Arc::new(Manifest::open(Arc::clone(&source), root_of(snapshot)?).await?);
    let files = manifest
        .read(0..manifest.pages().len())
        .map_ok(|entries| stream::iter(entries.into_iter().map(Ok::<_, ManifestError>)))
        .try_flatten()
        .try_filter_map(|entry| async move {
            Ok(if let Kind::Regular(file) = entry.kind { Some((entry.path, file)) } else { None })
        });
    let read = move |found: Result<(Vec<u8>, Regular), ManifestError>| {
        let (source, manifest) = (Arc::clone(&source), Arc::clone(&manifest));
        async move {
            let (path, file) = found?;
            let bytes = read_pieces(source, &manifest, &file).try_fold(Vec::new(), |mut all, part| async move {
                all.extend_from_slice(&part);
                Ok(all)
            });
            Ok((path, Bytes::from(bytes.await?)))
        }
    };
    Ok(files.map(read).buffered(AHEAD).boxed())
}

pub(crate) fn read_pieces(
    source: Arc<dyn ChunkSource>,
    manifest: &Manifest,
    file: &Regular,
) -> BoxStream<'static, Result<Bytes, TreeError>> {
    manifest
        .pieces(file)
        .map_ok(|list| stream::iter(list.into_iter().map(Ok::<_, ManifestError>)))
        .try_flatten()
        .map(move |piece| {
            let source = Arc::clone(&source);
            async move {
                Ok::<_, TreeError>(match piece? {
                    Piece::Hole { len } => Part::Zeros(len),
                    Piece::Data { chunk, offset, len } => {
                        let plain = source.get(&chunk).await?;
                        let (start, end) = (offset as usize, offset as usize + len as usize);
                        // The reader verified the length of the chunk, and the manifest that the piece lies in it.
                        Part::Bytes(plain.slice(start.min(plain.len())..end.min(plain.len())))
                    }
                })
            }
        })
        .buffered(AHEAD)
        .map_ok(|part| stream::iter(part.into_bytes().map(Ok::<_, TreeError>)))
        .try_flatten()
        .boxed()
}

enum Part {
    Zeros(u64),
    Bytes(Bytes),
}

impl Part {
    fn into_bytes(self) -> impl Iterator<Item = Bytes> {
        let (mut zeros, mut bytes) = match self {
            Self::Zeros(len) => (len, None),
            Self::Bytes(bytes) => (0, Some(bytes)),
        };
        std::iter::from_fn(move || {
            if zeros == 0 {
                return bytes.take();
            }
            let len = usize::try_from(zeros).unwrap_or(usize::MAX).min(ZEROS.len());
            zeros -= len as u64;
            Some(Bytes::from_static(&ZEROS[..len]))
        })
    }
}
