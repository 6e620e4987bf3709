//! Backups of what is in memory: objects of a cluster as files, and the recovery points that tie snapshots together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use jiff::Timestamp;

use super::assemble::{Assembly, Written};
use super::read::{Context, Hooks, Outcome, SMALL_BYTES};
use super::store::store_bytes;
use super::tree::{StopOnDrop, decide};
use super::{BackupError, BackupReport, TreeBackup};
use crate::chunk::{self, Chunker};
use crate::id::SnapshotId;
use crate::manifest::{Contents, Entry, Kind, Meta, Regular, Time, compare_paths, is_valid_path};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::{Session, SessionOptions};
use crate::sink::ChunkSink;
use crate::snapshot::{Content, Counts, NewSnapshot, Snapshot, WriteStats};

/// A file that comes from memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualFile {
    /// Components separated by `/`, without a leading one.
    pub path: String,
    /// Content.
    pub bytes: Bytes,
    /// Time of the last change.
    pub mtime: Timestamp,
}

/// Backs up files from memory as one snapshot, in a session of its own.
///
/// Files must come in the order of [`compare_paths`]; the directories that they need are made up. Of the options,
/// `excludes` and `one_file_system` mean nothing here.
pub async fn entries<E>(
    repository: &Repository,
    files: impl Stream<Item = Result<VirtualFile, E>> + Send,
    options: TreeBackup,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let session = repository.begin(options.session_options()).await?;
    entries_in(session, repository, files, options, progress).await
}

/// As [`entries`], in a session that was begun for it. The session is decided in any case.
pub async fn entries_in<E>(
    session: Arc<Session>,
    repository: &Repository,
    files: impl Stream<Item = Result<VirtualFile, E>> + Send,
    options: TreeBackup,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let sink = Arc::clone(&session) as Arc<dyn ChunkSink>;
    let work = async {
        let chunker = chunk::chunker(&repository.config().chunker, session.chunker_key())?;
        write_entries(sink, chunker, files, Arc::clone(&progress)).await
    };
    decide(&session, &options, &progress, work).await
}

pub(super) async fn write_entries<E>(
    sink: Arc<dyn ChunkSink>,
    chunker: Arc<dyn Chunker>,
    files: impl Stream<Item = Result<VirtualFile, E>> + Send,
    progress: Arc<Progress>,
) -> Result<(Written, u64), BackupError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let context = Arc::new(Context::new(None, sink, None, chunker, progress, Hooks::default()));
    let _stop = StopOnDrop(Arc::clone(&context));
    let mut assembly = Assembly::new(Arc::clone(&context));
    assembly.push(Outcome::Done(directory(b""))).await?;
    let mut before: Vec<u8> = Vec::new();
    let mut files = std::pin::pin!(files);
    while let Some(file) = files.next().await {
        let VirtualFile { path, bytes, mtime } = file.map_err(|error| BackupError::Source(error.into()))?;
        let refuse = |what| BackupError::Path { path: path.clone(), what };
        let name = path.as_bytes();
        if name.is_empty() || !is_valid_path(name) {
            return Err(refuse("it is no path of a file"));
        }
        if compare_paths(&before, name).is_ge() {
            return Err(refuse("it does not come after the one before"));
        }
        if !before.is_empty() && name.starts_with(&[before.as_slice(), b"/"].concat()) {
            return Err(refuse("a file is in its place as a directory"));
        }
        for at in (0..name.len()).filter(|at| name[*at] == b'/') {
            let is_new = before.get(..=at) != Some(&name[..=at]);
            if is_new {
                assembly.push(Outcome::Done(directory(&name[..at]))).await?;
            }
        }
        assembly.push(file_outcome(&context, name, bytes, mtime).await?).await?;
        before = path.into_bytes();
    }
    Ok((assembly.finish().await?, context.read_bytes.load(Ordering::Relaxed)))
}

fn directory(path: &[u8]) -> Entry {
    Entry { path: path.to_vec(), meta: Meta { mode: 0o755, ..Meta::default() }, kind: Kind::Directory }
}

async fn file_outcome(
    context: &Arc<Context>,
    path: &[u8],
    bytes: Bytes,
    mtime: Timestamp,
) -> Result<Outcome, BackupError> {
    let size = bytes.len() as u64;
    context.read_bytes.fetch_add(size, Ordering::Relaxed);
    context.progress.add_bytes(size);
    let seconds = mtime.as_nanosecond().div_euclid(1_000_000_000);
    let mtime = Time {
        seconds: i64::try_from(seconds).unwrap_or(0),
        nanoseconds: u32::try_from(mtime.as_nanosecond().rem_euclid(1_000_000_000)).unwrap_or(0),
    };
    let is_small = size < SMALL_BYTES && size > 0;
    let contents = if is_small { Contents::Inline(Vec::new()) } else { store_bytes(context, bytes.clone()).await? };
    let entry = Entry {
        path: path.to_vec(),
        meta: Meta { mode: 0o644, mtime, ..Meta::default() },
        kind: Kind::Regular(Regular { size, sparse: false, linked: false, contents, page_map: Contents::default() }),
    };
    Ok(if is_small { Outcome::Small { entry, bytes, changed: false } } else { Outcome::Done(entry) })
}

/// Commits a recovery point: several snapshots that belong together. All of them must exist.
pub async fn recovery_point(
    repository: &Repository,
    lineage: String,
    tags: BTreeMap<String, String>,
    members: Vec<SnapshotId>,
    description: serde_json::Value,
    counts: Counts,
) -> Result<Snapshot, BackupError> {
    repository.find_all(&members).await.map_err(BackupError::Members)?;
    let options = SessionOptions { purpose: "recovery point".to_owned(), ..SessionOptions::default() };
    let session = repository.begin(options).await?;
    let new = NewSnapshot {
        id: SnapshotId::random(),
        time: crate::clock::now(),
        lineage,
        tags,
        host: String::new(),
        parent: None,
        content: Content::RecoveryPoint { members, description },
        counts,
        stats: WriteStats::default(),
    };
    match Arc::clone(&session).commit(vec![new]).await {
        Ok(mut committed) => {
            committed.pop().ok_or_else(|| crate::session::SessionError::Closed { session: session.id() }.into())
        }
        Err(error) => {
            if let Err(failed) = session.abort(&error.to_string()).await {
                tracing::warn!(error = %failed, "the session of a recovery point could not be aborted");
            }
            Err(error.into())
        }
    }
}
