//! Restoring a tree: plan, create, fill out of order, then metadata with directories last.

mod fill;
mod place;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use thiserror::Error;

use crate::beneath::Beneath;
use crate::error::{Classified, ErrorClass};
use crate::glob::Glob;
use crate::id::SnapshotId;
use crate::manifest::{Entry, Kind, ManifestError, Pages, split_path};
use crate::progress::Progress;
use crate::read::ReadError;
use crate::repository::Repository;
use crate::sink::ChunkSource;
use crate::snapshot::{Content, Counts, Snapshot};

use self::fill::Batch;
use self::place::Placer;

/// What happens when the target is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// Nothing is restored. An empty `lost+found` does not count.
    #[default]
    Fail,
    /// Files of the same names are replaced; others stay.
    Overwrite,
}

/// What is restored and how.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// Paths or patterns from the root, with everything in them; empty for all.
    pub select: Vec<String>,
    /// What happens when the target is not empty.
    pub existing: Existing,
    /// Restores owners and groups; needs the right to give files away.
    pub owner: bool,
}

/// What could not be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// Path from the root.
    pub path: Vec<u8>,
    /// What of it: `content`, `owner`, ...
    pub what: &'static str,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} not restored: {}", self.what, self.reason)
    }
}

/// What came of a restore.
#[derive(Debug, Clone, Default)]
pub struct RestoreReport {
    /// What was restored. `skipped` counts entries of which something is missing.
    pub counts: Counts,
    /// What could not be restored, by name.
    pub failed: Vec<Failed>,
}

/// A restore that could not go on.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The snapshot has no files.
    #[error("the snapshot {0} is a recovery point: restore one of the snapshots that it names")]
    NoTree(SnapshotId),
    /// The target is not empty.
    #[error("{path} is not empty; choose an empty directory or allow overwriting")]
    TargetNotEmpty {
        /// The path.
        path: String,
    },
    /// The target cannot be opened.
    #[error("cannot open the target {path}")]
    Target {
        /// The path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nothing of what was selected is in the snapshot.
    #[error("nothing in the snapshot matches {selected}; see `lifeboat ls`")]
    NothingSelected {
        /// What was selected.
        selected: String,
    },
    /// The list of files cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The store failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No room in the target.
    #[error("the target is full")]
    Full,
    /// Somebody asked to stop.
    #[error("stopped on request; what was restored so far is incomplete")]
    Cancelled,
    /// A worker thread ended unexpectedly.
    #[error("a worker failed: {0}")]
    Worker(String),
}

impl Classified for RestoreError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::NoTree(_) | Self::TargetNotEmpty { .. } | Self::NothingSelected { .. } | Self::Cancelled => {
                ErrorClass::Invalid
            }
            Self::Target { .. } | Self::Worker(_) | Self::Full => ErrorClass::Local,
            Self::Manifest(error) => error.class(),
            Self::Read(error) => error.class(),
        }
    }
}

/// Restores a snapshot into a directory, which is made if it does not exist.
pub async fn tree(
    repository: &Repository,
    snapshot: &Snapshot,
    target: &Path,
    options: RestoreOptions,
    progress: Arc<Progress>,
) -> Result<RestoreReport, RestoreError> {
    let Content::Tree { root, .. } = &snapshot.content else { return Err(RestoreError::NoTree(snapshot.id)) };
    let source: Arc<dyn ChunkSource> = repository.reader()?;
    let beneath = open_target(target, options.existing)?;
    let pages = Pages::read(&source, root).await?;
    progress.expect_bytes(snapshot.counts.bytes);
    let selected: Vec<_> = options.select.iter().map(|pattern| Glob::select(pattern)).collect();
    let pages = match selected.as_slice() {
        [only] => pages.within(only.literal_prefix()),
        _ => pages,
    };
    let mut entries = pages.entries(Arc::clone(&source));
    let mut restore = Restore::new(beneath, source, options, progress);
    let mut any = false;
    while let Some(entry) = entries.next().await? {
        if restore.progress.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        if !selected.is_empty() && !selected.iter().any(|glob| glob.covers(&entry.path)) {
            continue;
        }
        any = true;
        restore.take(entry).await?;
    }
    if !any && !selected.is_empty() {
        return Err(RestoreError::NothingSelected { selected: restore.options.select.join(", ") });
    }
    restore.finish().await
}

fn open_target(target: &Path, existing: Existing) -> Result<Beneath, RestoreError> {
    let path = || target.display().to_string();
    let fail = |source| RestoreError::Target { path: path(), source };
    std::fs::create_dir_all(target).map_err(fail)?;
    if existing == Existing::Fail {
        for entry in std::fs::read_dir(target).map_err(fail)? {
            if entry.map_err(fail)?.file_name() != "lost+found" {
                return Err(RestoreError::TargetNotEmpty { path: path() });
            }
        }
    }
    Beneath::new(target).map_err(fail)
}

/// A restore under way.
struct Restore {
    source: Arc<dyn ChunkSource>,
    options: RestoreOptions,
    progress: Arc<Progress>,
    placer: Placer,
    batch: Batch,
    /// Directories, whose metadata comes last.
    directories: Vec<Entry>,
    report: RestoreReport,
}

impl Restore {
    fn new(beneath: Beneath, source: Arc<dyn ChunkSource>, options: RestoreOptions, progress: Arc<Progress>) -> Self {
        let placer = Placer::new(beneath, options.existing, options.owner);
        Self {
            source,
            options,
            progress,
            placer,
            batch: Batch::default(),
            directories: Vec::new(),
            report: RestoreReport::default(),
        }
    }

    fn fail(&mut self, path: Vec<u8>, what: &'static str, reason: String) {
        tracing::warn!(path = %String::from_utf8_lossy(&path), what, reason, "not restored");
        self.progress.add_skipped();
        self.report.counts.skipped += 1;
        self.report.failed.push(Failed { path, what, reason });
    }

    async fn take(&mut self, entry: Entry) -> Result<(), RestoreError> {
        let counts = &mut self.report.counts;
        match &entry.kind {
            Kind::File { size, .. } => {
                counts.files += 1;
                counts.bytes += size;
            }
            Kind::HardLink { .. } => counts.files += 1,
            Kind::Directory => counts.directories += 1,
            _ => counts.others += 1,
        }
        self.progress.add_entry();
        self.progress.set_current(&entry.path);
        let (parent, _) = split_path(&entry.path);
        if let Err(error) = self.placer.make_parents(parent) {
            self.fail(entry.path, "entry", error.to_string());
            return Ok(());
        }
        match self.placer.place(&entry) {
            Ok(place::Placed::Done(failures)) => {
                for failure in failures {
                    self.fail(entry.path.clone(), failure.what, failure.errno.to_string());
                }
            }
            Ok(place::Placed::Directory) => self.directories.push(entry),
            Ok(place::Placed::File(file)) => {
                self.batch.push(entry, file);
                if self.batch.is_full() {
                    self.fill().await?;
                }
            }
            Err(error) if is_full(&error) => return Err(RestoreError::Full),
            Err(error) => self.fail(entry.path, "entry", error.to_string()),
        }
        Ok(())
    }

    /// Fills the files that wait, and restores their metadata.
    async fn fill(&mut self) -> Result<(), RestoreError> {
        let batch = std::mem::take(&mut self.batch);
        let filled = batch.fill(Arc::clone(&self.source), &self.progress).await?;
        for file in filled {
            if let Some(reason) = file.failure {
                self.fail(file.entry.path.clone(), "content", reason);
            }
            for failure in self.placer.finish(&file.entry) {
                self.fail(file.entry.path.clone(), failure.what, failure.reason);
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<RestoreReport, RestoreError> {
        self.fill().await?;
        // Deepest first: filling a directory changes its times.
        for entry in std::mem::take(&mut self.directories).into_iter().rev() {
            for failure in self.placer.finish(&entry) {
                self.fail(entry.path.clone(), failure.what, failure.reason);
            }
        }
        self.placer.sync().map_err(|error| {
            if is_full(&error) { RestoreError::Full } else { RestoreError::Worker(error.to_string()) }
        })?;
        Ok(self.report)
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
