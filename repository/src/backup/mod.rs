//! Backing up: a directory, files from memory, or several snapshots as one recovery point.

mod assemble;
mod files;
mod merge;
mod tree;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::clock;
use crate::error::{Classified, ErrorClass};
use crate::id::SnapshotId;
use crate::manifest::ManifestError;
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::{Session, SessionError, SessionOptions};
use crate::snapshot::{Content, Counts, NewSnapshot, Snapshot, WriteStats};

/// What a backup is called, what it continues, what it leaves out.
#[derive(Debug, Clone, Default)]
pub struct TreeBackup {
    /// What it is a state of.
    pub lineage: String,
    /// Free labels.
    pub tags: BTreeMap<String, String>,
    /// The snapshot that unchanged files are taken from; usually the newest of the lineage.
    pub parent: Option<Snapshot>,
    /// Patterns: without a slash a name at any depth, with one a path from the root. `*`, `**`, `?`, `[..]`.
    pub excludes: Vec<String>,
    /// Directories on other file systems are recorded, but not entered.
    pub one_file_system: bool,
    /// The machine; the kernel's host name when empty.
    pub host: String,
}

/// Why an entry is not in the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SkipReason {
    /// It could not be read; what the system says.
    Unreadable(String),
    /// It went away between being listed and being read.
    Vanished,
    /// It became shorter while it was being read.
    Shrunk,
    /// It is another name of a file that is not in the backup.
    LinkedToSkipped,
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(why) => write!(f, "cannot be read: {why}"),
            Self::Vanished => f.write_str("went away while the backup ran"),
            Self::Shrunk => f.write_str("became shorter while it was being read"),
            Self::LinkedToSkipped => f.write_str("is another name of a file that was left out"),
        }
    }
}

/// An entry that is not in the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its path from the root.
    pub path: Vec<u8>,
    /// Why.
    pub reason: SkipReason,
}

/// What came of a backup.
#[derive(Debug, Clone)]
pub struct BackupReport {
    /// The committed snapshot.
    pub snapshot: Snapshot,
    /// Entries that are not in it.
    pub skipped: Vec<Skipped>,
}

/// A backup that failed; nothing of it is visible.
#[derive(Debug, Error)]
pub enum BackupError {
    /// The root cannot be opened.
    #[error("cannot open {path}")]
    Root {
        /// The path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The parent's file list cannot be read.
    #[error("cannot read the file list of the snapshot before")]
    Parent(#[from] ManifestError),
    /// The repository cannot be written.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Somebody asked to stop.
    #[error("stopped on request; nothing was saved")]
    Cancelled,
    /// The source of the files failed.
    #[error("{0}")]
    Source(String),
    /// Files from memory must come in order.
    #[error("the file {path:?} does not come in order, or its path is malformed")]
    Order {
        /// Its path.
        path: String,
    },
    /// A worker thread ended unexpectedly.
    #[error("a worker failed: {0}")]
    Worker(String),
}

impl Classified for BackupError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Root { .. } | Self::Worker(_) | Self::Source(_) => ErrorClass::Local,
            Self::Parent(error) => error.class(),
            Self::Session(error) => error.class(),
            Self::Cancelled | Self::Order { .. } => ErrorClass::Invalid,
        }
    }
}

/// A file that comes from memory.
#[derive(Debug, Clone)]
pub struct VirtualFile {
    /// Its path; directories above it need no entries.
    pub path: Vec<u8>,
    /// Its content.
    pub bytes: Bytes,
}

/// What the content half of a backup gives to the commit.
pub(crate) struct Written {
    content: Content,
    counts: Counts,
    read_bytes: u64,
    skipped: Vec<Skipped>,
}

/// Backs up a directory in a session of its own.
pub async fn tree(
    repository: &Repository,
    root: &Path,
    plan: TreeBackup,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError> {
    let options = SessionOptions { purpose: "backup".to_owned(), host: plan.host.clone() };
    let session = repository.begin(options).await?;
    tree_in(session, repository, root, plan, progress).await
}

/// Backs up a directory in this session, which is committed or aborted at the end.
pub async fn tree_in(
    session: Arc<Session>,
    repository: &Repository,
    root: &Path,
    plan: TreeBackup,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError> {
    let began = std::time::Instant::now();
    let time = clock::now();
    let written = tree::write(&session, repository, root, &plan, &progress).await;
    finish(session, written, plan, time, began, &progress).await
}

/// Backs up files that come from memory, sorted by path.
pub async fn entries<E: fmt::Display + Send>(
    repository: &Repository,
    plan: TreeBackup,
    files: impl Stream<Item = Result<VirtualFile, E>> + Send,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError> {
    let began = std::time::Instant::now();
    let time = clock::now();
    let options = SessionOptions { purpose: "backup".to_owned(), host: plan.host.clone() };
    let session = repository.begin(options).await?;
    let files = files.map(|file| file.map_err(|error| BackupError::Source(error.to_string())));
    let written = files::write(&session, repository, Box::pin(files), &progress).await;
    finish(session, written, plan, time, began, &progress).await
}

/// Commits a recovery point: a snapshot that names others.
pub async fn recovery_point(
    repository: &Repository,
    lineage: String,
    tags: BTreeMap<String, String>,
    members: Vec<SnapshotId>,
    description: serde_json::Value,
    counts: Counts,
) -> Result<Snapshot, BackupError> {
    let session =
        repository.begin(SessionOptions { purpose: "recovery point".to_owned(), host: String::new() }).await?;
    let content = Content::RecoveryPoint { members, description };
    let written = Ok(Written { content, counts, read_bytes: 0, skipped: Vec::new() });
    let plan = TreeBackup { lineage, tags, ..TreeBackup::default() };
    let report = finish(session, written, plan, clock::now(), std::time::Instant::now(), &Progress::default()).await?;
    Ok(report.snapshot)
}

/// Commits what was written, or aborts the session.
async fn finish(
    session: Arc<Session>,
    written: Result<Written, BackupError>,
    plan: TreeBackup,
    time: jiff::Timestamp,
    began: std::time::Instant,
    progress: &Progress,
) -> Result<BackupReport, BackupError> {
    let committed = match written {
        Ok(_) if progress.is_cancelled() => Err(BackupError::Cancelled),
        Ok(written) => commit(&session, written, plan, time, began).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &committed
        && let Err(abort) = session.abort(&error.to_string()).await
    {
        tracing::warn!(session = %session.id(), %abort, "a failed session was not aborted; it stays undecided and invisible");
    }
    committed
}

async fn commit(
    session: &Arc<Session>,
    written: Written,
    plan: TreeBackup,
    time: jiff::Timestamp,
    began: std::time::Instant,
) -> Result<BackupReport, BackupError> {
    let stats = session.stats();
    let snapshot = NewSnapshot {
        id: SnapshotId::random(),
        time,
        lineage: plan.lineage,
        tags: plan.tags,
        host: plan.host,
        parent: plan.parent.map(|parent| parent.id),
        content: written.content,
        counts: written.counts,
        stats: WriteStats {
            read_bytes: written.read_bytes,
            new_bytes: stats.new_bytes,
            stored_bytes: stats.stored_bytes,
            duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        },
    };
    let mut committed = Arc::clone(session).commit(vec![snapshot]).await?;
    let snapshot = committed.pop().ok_or_else(|| BackupError::Worker("the commit names no snapshot".to_owned()))?;
    Ok(BackupReport { snapshot, skipped: written.skipped })
}
