//! Looking into a snapshot: listing entries, reading one file.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use thiserror::Error;

use crate::backup::Skipped;
use crate::error::{Classified, ErrorClass};
use crate::id::SnapshotId;
use crate::manifest::{Entry, Kind, ManifestError, Pages, is_within, split_path};
use crate::read::ReadError;
use crate::repository::Repository;
use crate::sink::ChunkSource;
use crate::snapshot::{Content, Snapshot};

/// Chunks of a file read ahead.
const CHUNKS_AHEAD: usize = 4;

/// A look into a snapshot that failed.
#[derive(Debug, Error)]
pub enum TreeError {
    /// The snapshot has no files.
    #[error("the snapshot {0} is a recovery point: look into one of the snapshots that it names")]
    NoTree(SnapshotId),
    /// No such entry.
    #[error("{path} is not in the snapshot")]
    NotFound {
        /// The path.
        path: String,
    },
    /// The list of files cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A chunk cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A record is damaged.
    #[error("the list of unread files is damaged")]
    Skipped(#[from] serde_json::Error),
}

impl Classified for TreeError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::NoTree(_) => ErrorClass::Invalid,
            Self::NotFound { .. } => ErrorClass::NotFound,
            Self::Manifest(error) => error.class(),
            Self::Read(error) => error.class(),
            Self::Skipped(_) => ErrorClass::Damaged,
        }
    }
}

fn bytes_of(path: Option<&Path>) -> &[u8] {
    use std::os::unix::ffi::OsStrExt;
    let mut bytes = path.map(|path| path.as_os_str().as_bytes()).unwrap_or_default();
    while let [b'/', rest @ ..] | [rest @ .., b'/'] = bytes {
        bytes = rest;
    }
    if bytes == b"." { b"" } else { bytes }
}

async fn pages(source: &Arc<dyn ChunkSource>, snapshot: &Snapshot) -> Result<Pages, TreeError> {
    match &snapshot.content {
        Content::Tree { root, .. } => Ok(Pages::read(source, root).await?),
        Content::RecoveryPoint { .. } => Err(TreeError::NoTree(snapshot.id)),
    }
}

/// The entries of a directory, or all below it; the entry itself when it is no directory.
pub async fn list(
    repository: &Repository,
    snapshot: &Snapshot,
    path: Option<&Path>,
    recursive: bool,
) -> Result<Vec<Entry>, TreeError> {
    let wanted = bytes_of(path);
    let source: Arc<dyn ChunkSource> = repository.reader()?;
    let mut entries = pages(&source, snapshot).await?.within(wanted).entries(source);
    let mut listed = Vec::new();
    let mut exists = wanted.is_empty();
    while let Some(entry) = entries.next().await? {
        if !is_within(&entry.path, wanted) {
            continue;
        }
        exists = true;
        let is_itself = entry.path == wanted;
        let is_child = !entry.path.is_empty() && split_path(&entry.path).0 == wanted;
        let shown = if is_itself { entry.kind != Kind::Directory } else { recursive || is_child };
        if shown {
            listed.push(entry);
        }
    }
    if exists { Ok(listed) } else { Err(TreeError::NotFound { path: String::from_utf8_lossy(wanted).into_owned() }) }
}

/// All regular files of a small tree with their content, in order.
///
/// Meant for trees of small files: each file is held in memory, one after the other.
pub async fn read_files(
    repository: &Repository,
    snapshot: &Snapshot,
) -> Result<impl Stream<Item = Result<(Vec<u8>, Bytes), TreeError>>, TreeError> {
    let source: Arc<dyn ChunkSource> = repository.reader()?;
    let mut entries = pages(&source, snapshot).await?.entries(Arc::clone(&source));
    let mut files = Vec::new();
    while let Some(entry) = entries.next().await? {
        if matches!(entry.kind, Kind::File { .. }) {
            files.push(entry);
        }
    }
    let read = move |entry: Entry| {
        let source = Arc::clone(&source);
        async move {
            let bytes = read_content(&source, &entry).await?;
            Ok((entry.path, bytes))
        }
    };
    Ok(futures::stream::iter(files).map(read).buffered(CHUNKS_AHEAD))
}

/// The content of a file, holes as zeros.
async fn read_content(source: &Arc<dyn ChunkSource>, entry: &Entry) -> Result<Bytes, ReadError> {
    let Kind::File { size, extents } = &entry.kind else { return Ok(Bytes::new()) };
    let mut content = Vec::new();
    for extent in extents {
        let bytes = source.get(&extent.chunk).await?;
        content.resize(usize::try_from(extent.offset).unwrap_or(usize::MAX), 0);
        let from = extent.from as usize;
        // The page's decoder refuses extents beyond their chunk.
        content.extend_from_slice(bytes.get(from..from + extent.len as usize).unwrap_or_default());
    }
    content.resize(usize::try_from(*size).unwrap_or(usize::MAX), 0);
    Ok(content.into())
}

/// The entries that a backup left out.
pub async fn skipped(repository: &Repository, snapshot: &Snapshot) -> Result<Vec<Skipped>, TreeError> {
    let Content::Tree { skipped, .. } = &snapshot.content else { return Ok(Vec::new()) };
    let reader = repository.reader()?;
    let mut all = Vec::new();
    let mut records = futures::stream::iter(skipped).then(|chunk| reader.get(chunk));
    while let Some(bytes) = records.try_next().await? {
        all.extend(serde_json::from_slice::<Vec<Skipped>>(&bytes)?);
    }
    Ok(all)
}
