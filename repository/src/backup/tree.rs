//! The backup of a live tree.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tracing::warn;

use super::assemble::{Assembly, Written};
use super::compare::Comparison;
use super::parent::{Failure, ParentCursor, is_lost};
use super::read::{Context, Hooks, resolve};
use super::{BackupError, BackupReport, TreeBackup};
use crate::beneath::Beneath;
use crate::chunk::{self, Chunker};
use crate::glob::Glob;
use crate::id::SnapshotId;
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::Session;
use crate::sink::{ChunkRef, ChunkSink, ChunkSource};
use crate::snapshot::{Content, NewSnapshot, WriteStats};
use crate::walk::{WalkOptions, walk};

/// Groups of entries between the walk and those who read.
const GROUPS_AHEAD: usize = 8;
/// Groups that are read at the same time.
const GROUPS_AT_ONCE: usize = 6;

/// Backs up a tree as one snapshot, in a session of its own.
///
/// A failed or cancelled backup aborts the session. Paths that cannot be read do not fail it: they are listed.
pub async fn tree(
    repository: &Repository,
    root: &Path,
    options: TreeBackup,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError> {
    let session = repository.begin(options.session_options()).await?;
    tree_in(session, repository, root, options, progress).await
}

/// As [`tree`], in a session that was begun for it. The session is decided in any case.
pub async fn tree_in(
    session: Arc<Session>,
    repository: &Repository,
    root: &Path,
    options: TreeBackup,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError> {
    let work = async {
        if let Some(parent) = &options.parent {
            session.inherit_from(parent).await?;
        }
        let input = Input {
            sink: Arc::clone(&session) as Arc<dyn ChunkSink>,
            source: repository.parent_reader(),
            chunker: chunk::chunker(&repository.config().chunker, session.chunker_key())?,
            parent: parent_root(&options)?,
            options: &options,
            progress: Arc::clone(&progress),
            hooks: Hooks::default(),
        };
        write_tree(root, input).await
    };
    decide(&session, &options, &progress, work).await
}

fn parent_root(options: &TreeBackup) -> Result<Option<Vec<ChunkRef>>, BackupError> {
    match options.parent.as_ref().map(|parent| &parent.content) {
        None => Ok(None),
        Some(Content::Tree { root, .. }) => Ok(Some(root.clone())),
        Some(Content::RecoveryPoint { .. }) => Err(BackupError::ParentIsNoTree),
    }
}

/// Does the work and commits what it wrote; or aborts.
pub(super) async fn decide(
    session: &Arc<Session>,
    options: &TreeBackup,
    progress: &Progress,
    work: impl Future<Output = Result<(Written, u64), BackupError>>,
) -> Result<BackupReport, BackupError> {
    let began = crate::clock::now();
    let written = tokio::select! {
        biased;
        () = progress.cancelled() => Err(BackupError::Cancelled),
        written = work => written,
    };
    let committed = match written {
        Ok((written, read_bytes)) => commit(session, options, began, written, read_bytes).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &committed
        && let Err(failed) = session.abort(&error.to_string()).await
    {
        // The session stays undecided until another aborts it; that keeps nothing half visible.
        warn!(error = %failed, "the session of a failed backup could not be aborted");
    }
    committed
}

async fn commit(
    session: &Arc<Session>,
    options: &TreeBackup,
    began: jiff::Timestamp,
    written: Written,
    read_bytes: u64,
) -> Result<BackupReport, BackupError> {
    let Written { root, skipped_list, skipped, counts } = written;
    let stats = session.stats();
    let millis = crate::clock::now().as_millisecond() - began.as_millisecond();
    let new = NewSnapshot {
        id: SnapshotId::random(),
        time: began,
        lineage: options.lineage.clone(),
        tags: options.tags.clone(),
        host: options.host.clone(),
        parent: options.parent.as_ref().map(|parent| parent.id),
        content: Content::Tree { root, skipped: skipped_list },
        counts,
        stats: WriteStats {
            read_bytes,
            new_bytes: stats.new_bytes,
            stored_bytes: stats.stored_bytes,
            duration_ms: u64::try_from(millis).unwrap_or(0),
        },
    };
    let mut committed = Arc::clone(session).commit(vec![new]).await?;
    let snapshot = committed.pop().ok_or(crate::session::SessionError::Closed { session: session.id() })?;
    Ok(BackupReport { snapshot, skipped })
}

/// What a backup of a tree works with.
pub(super) struct Input<'a> {
    pub(super) sink: Arc<dyn ChunkSink>,
    pub(super) source: Arc<dyn ChunkSource>,
    pub(super) chunker: Arc<dyn Chunker>,
    pub(super) parent: Option<Vec<ChunkRef>>,
    pub(super) options: &'a TreeBackup,
    pub(super) progress: Arc<Progress>,
    pub(super) hooks: Hooks,
}

/// Stops the threads of a backup that ended early.
pub(super) struct StopOnDrop(pub(super) Arc<Context>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Relaxed);
    }
}

/// Writes a tree's chunks and manifest; also tells how many bytes were read.
pub(super) async fn write_tree(root: &Path, input: Input<'_>) -> Result<(Written, u64), BackupError> {
    let Input { sink, source, chunker, parent, options, progress, hooks } = input;
    let failure = Failure::default();
    let parent = match parent {
        Some(root) => match Manifest::open(Arc::clone(&source), &root).await {
            Ok(manifest) => ParentCursor::start(manifest, Arc::clone(&failure)),
            Err(error) if is_lost(&error) => {
                warn!(%error, "the parent's manifest is damaged: everything is read again");
                ParentCursor::default()
            }
            Err(error) => return Err(BackupError::ReadParent(error)),
        },
        None => ParentCursor::default(),
    };
    let opened = root.to_owned();
    let beneath = spawn_blocking(move || Beneath::open(&opened))
        .await
        .map_err(BackupError::Worker)?
        .map_err(|source| BackupError::OpenRoot { path: root.to_owned(), source })?;
    let context = Arc::new(Context::new(Some(beneath), sink, Some(source), chunker, progress, hooks));
    let stop = StopOnDrop(Arc::clone(&context));
    let (sender, mut receiver) = mpsc::channel(GROUPS_AHEAD);
    let walk_options = WalkOptions {
        excludes: options.excludes.iter().map(|pattern| Glob::exclude(pattern)).collect(),
        one_file_system: options.one_file_system,
    };
    let walking = spawn_blocking({
        let context = Arc::clone(&context);
        move || {
            let mut comparison = Comparison::new(Arc::clone(&context), parent, sender);
            let Some(root) = &context.root else { return Ok(()) };
            walk(root, &walk_options, &mut comparison)?;
            comparison.finish()
        }
    });
    let mut groups = stream::poll_fn(|task| receiver.poll_recv(task))
        .map(|group| tokio::spawn(resolve(Arc::clone(&context), group)))
        .buffered(GROUPS_AT_ONCE);
    let mut assembly = Assembly::new(Arc::clone(&context));
    while let Some(outcomes) = groups.next().await {
        for outcome in outcomes.map_err(BackupError::Worker)?? {
            assembly.push(outcome).await?;
        }
        take(&failure)?;
    }
    drop(groups);
    // The walk only stops early when it was told to.
    walking.await.map_err(BackupError::Worker)?.map_err(|_| BackupError::Cancelled)?;
    take(&failure)?;
    let written = assembly.finish().await?;
    drop(stop);
    Ok((written, context.read_bytes.load(Ordering::Relaxed)))
}

fn take(failure: &Failure) -> Result<(), BackupError> {
    match failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(BackupError::ReadParent(error)),
        None => Ok(()),
    }
}
