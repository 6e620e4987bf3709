//! The restore of a tree: directories and special files first, then the content of files, then hard links, then the
//! attributes of directories from the leaves to the root.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use tokio::task::{JoinHandle, spawn_blocking};

use super::create::LinkedFiles;
use super::plan::Batch;
use super::select::Selection;
use super::target::Target;
use super::write::OutFile;
use super::{RestoreError, RestoreOptions, RestoreReport, What};
use crate::beneath::Beneath;
use crate::manifest::{Entry, Kind, Manifest, Regular, is_in};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::sink::{ChunkRef, ChunkSource};
use crate::snapshot::{Content, Snapshot};

/// Restores a snapshot, or a part of it, into a directory that exists.
///
/// What cannot be restored in full is listed in the report; it is an error only if nothing could go on. A cancelled
/// restore leaves a part; restore again with [`super::Existing::Overwrite`].
pub async fn tree(
    repository: &Repository,
    snapshot: &Snapshot,
    target: &Path,
    options: RestoreOptions,
    progress: Arc<Progress>,
) -> Result<RestoreReport, RestoreError> {
    let Content::Tree { root, .. } = &snapshot.content else { return Err(RestoreError::NotATree) };
    let source = repository.reader()?;
    if !source.can_read_data() {
        return Err(crate::read::ReadError::NoPrivateKey.into());
    }
    if options.select.is_empty() {
        progress.expect_bytes(snapshot.counts.bytes);
    }
    // What is read must not expire meanwhile.
    let pin = repository.pin(snapshot).await?;
    let restored = restore_tree(source, root, target, options, progress).await;
    if let Some(pin) = pin {
        pin.release().await;
    }
    restored
}

/// As [`tree`], from any source of chunks.
pub(super) async fn restore_tree(
    source: Arc<dyn ChunkSource>,
    root: &[ChunkRef],
    target: &Path,
    options: RestoreOptions,
    progress: Arc<Progress>,
) -> Result<RestoreReport, RestoreError> {
    let manifest = Manifest::open(Arc::clone(&source), root).await?;
    let opened = target.to_owned();
    let beneath = spawn_blocking(move || Beneath::open(&opened))
        .await?
        .map_err(|source| RestoreError::OpenTarget { path: target.to_owned(), source })?;
    let selection = Selection::new(&options.select);
    let select = options.select.clone();
    let target = Arc::new(Target::new(beneath, options, Arc::clone(&progress)));
    let restore =
        Restore { pages: selection.pages(&manifest), source, manifest, selection, target, linked: Arc::default() };
    tokio::select! {
        biased;
        () = progress.cancelled() => Err(RestoreError::Cancelled),
        done = restore.run() => done.and_then(|report| report.ok_or(RestoreError::NothingSelected { select })),
    }
}

struct Restore {
    source: Arc<dyn ChunkSource>,
    manifest: Manifest,
    pages: Vec<usize>,
    selection: Selection,
    target: Arc<Target>,
    linked: Arc<Mutex<LinkedFiles>>,
}

/// What the first pass found.
#[derive(Default)]
struct FirstPass {
    took_any: bool,
    has_links: bool,
}

impl Restore {
    /// `None` if nothing was selected.
    async fn run(self) -> Result<Option<RestoreReport>, RestoreError> {
        let found = self.write_entries().await?;
        if !found.took_any {
            return Ok(None);
        }
        if found.has_links {
            self.write_links().await?;
        }
        self.finish_directories().await?;
        // Some file systems tell of a lack of room only when they write back.
        let target = Arc::clone(&self.target);
        spawn_blocking(move || target.flush()).await?.map_err(RestoreError::Flush)?;
        self.target.check()?;
        let (counts, failed) = self.target.report();
        Ok(Some(RestoreReport { counts, failed }))
    }

    async fn write_entries(&self) -> Result<FirstPass, RestoreError> {
        let mut found = FirstPass::default();
        let mut above: Vec<Entry> = Vec::new();
        let mut queue = Queue::new(self);
        let mut pages = self.manifest.read(self.pages.iter().copied());
        while let Some(page) = pages.next().await {
            self.target.check()?;
            let mut making = Vec::new();
            let mut files = Vec::new();
            for entry in page? {
                if !self.selection.takes(&entry.path) {
                    // Directories above something chosen are made when that comes.
                    above.retain(|directory| is_in(&entry.path, &directory.path));
                    if entry.kind == Kind::Directory {
                        above.push(entry);
                    }
                    continue;
                }
                found.took_any = true;
                making.extend(above.drain(..).filter(|directory| is_in(&entry.path, &directory.path)));
                match &entry.kind {
                    Kind::Regular(_) => files.push(entry),
                    Kind::Link { .. } => found.has_links = true,
                    _ => making.push(entry),
                }
            }
            let target = Arc::clone(&self.target);
            spawn_blocking(move || making.iter().for_each(|entry| target.create(entry))).await?;
            for entry in files {
                queue.push(entry).await?;
            }
        }
        queue.finish().await?;
        Ok(found)
    }

    async fn write_links(&self) -> Result<(), RestoreError> {
        // Names whose first one was not chosen: the first of them takes its part.
        let mut instead: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
        let mut pages = self.manifest.read(self.pages.iter().copied());
        while let Some(page) = pages.next().await {
            self.target.check()?;
            for entry in page? {
                let Kind::Link { to } = &entry.kind else { continue };
                if !self.selection.takes(&entry.path) {
                    continue;
                }
                let first = if self.selection.takes(to) { Some(to) } else { instead.get(to) };
                if let Some(first) = first.cloned() {
                    self.link(entry, first).await?;
                    continue;
                }
                let to = to.clone();
                let Some(Entry { kind: Kind::Regular(file), meta, .. }) = self.manifest.find(&to).await? else {
                    let reason = "the snapshot has no file at the path that it names".to_owned();
                    self.target.fail_with(&entry.path, What::Link, reason);
                    continue;
                };
                let path = entry.path.clone();
                let mut queue = Queue::new(self);
                let kind = Kind::Regular(Regular { linked: true, ..file });
                queue.push(Entry { path: path.clone(), meta, kind }).await?;
                queue.finish().await?;
                instead.insert(to, path);
            }
        }
        Ok(())
    }

    async fn link(&self, entry: Entry, first: Vec<u8>) -> Result<(), RestoreError> {
        let (target, linked) = (Arc::clone(&self.target), Arc::clone(&self.linked));
        spawn_blocking(move || {
            let linked = linked.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = target.create_link(&entry, &first, &linked) {
                target.fail(&entry.path, What::Link, &error);
            }
        })
        .await?;
        Ok(())
    }

    /// From the last path to the first, so that a directory that nobody may enter is closed after what is in it.
    async fn finish_directories(&self) -> Result<(), RestoreError> {
        let mut wanted_below: Option<Vec<u8>> = None;
        let mut pages = self.manifest.read(self.pages.iter().rev().copied());
        while let Some(page) = pages.next().await {
            self.target.check()?;
            let mut directories = Vec::new();
            for entry in page?.into_iter().rev() {
                let is_chosen = self.selection.takes(&entry.path);
                let is_above = || wanted_below.as_ref().is_some_and(|below| is_in(below, &entry.path));
                let is_directory = entry.kind == Kind::Directory;
                if is_chosen || is_directory && is_above() {
                    wanted_below = Some(entry.path.clone());
                    if is_directory {
                        directories.push(entry);
                    }
                }
            }
            let target = Arc::clone(&self.target);
            spawn_blocking(move || directories.iter().for_each(|entry| target.finish_directory(entry))).await?;
        }
        Ok(())
    }
}

/// Files on their way: one batch is filled while the one before is written.
struct Queue<'a> {
    restore: &'a Restore,
    batch: Batch,
    writing: Option<Writing>,
}

/// A batch that is being written; ends with its owner.
struct Writing(JoinHandle<Result<(), RestoreError>>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<'a> Queue<'a> {
    fn new(restore: &'a Restore) -> Self {
        Self { restore, batch: Batch::default(), writing: None }
    }

    async fn push(&mut self, entry: Entry) -> Result<(), RestoreError> {
        let Restore { manifest, target, linked, .. } = self.restore;
        let Kind::Regular(regular) = entry.kind.clone() else { return Ok(()) };
        target.progress.set_current(&entry.path);
        let Some(file) = OutFile::new(target, linked, entry) else { return Ok(()) };
        let mut at = 0;
        let mut lists = manifest.pieces(&regular);
        while let Some(list) = lists.next().await {
            let list = match list {
                Ok(list) => list,
                Err(error) if crate::error::Classified::class(&error) == crate::error::ErrorClass::Damaged => {
                    file.lose(error.to_string());
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            if list.len() > 1 {
                self.batch.note_open();
            }
            for piece in list {
                self.batch.push(&file, at, &piece);
                at += piece.len();
                if self.batch.is_full() {
                    self.flush().await?;
                    self.batch.note_open();
                }
            }
        }
        if self.batch.is_full() {
            self.flush().await?;
        }
        // Planned; a file without bytes is made here.
        if file.is_last() {
            spawn_blocking(move || file.finish()).await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), RestoreError> {
        self.settle().await?;
        if !self.batch.is_empty() {
            let work = self.batch.take().perform(Arc::clone(&self.restore.source), Arc::clone(&self.restore.target));
            self.writing = Some(Writing(tokio::spawn(work)));
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), RestoreError> {
        match &mut self.writing {
            Some(Writing(writing)) => {
                let written = writing.await;
                self.writing = None;
                written?
            }
            None => Ok(()),
        }
    }

    async fn finish(mut self) -> Result<(), RestoreError> {
        self.flush().await?;
        self.settle().await
    }
}
