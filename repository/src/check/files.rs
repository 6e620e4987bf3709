//! That the file list of a snapshot can be read, and that everything it needs is among the snapshot's references.

use std::sync::Arc;

use futures::StreamExt;

use super::{Check, CheckError, Problem, with_causes};
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::LiveRefs;
use crate::id::ChunkRef;
use crate::manifest::{Contents, Kind, Manifest, ManifestError, Piece, Regular};
use crate::read::ReadError;
use crate::refset::refset_key;
use crate::session::references::{References, ReferencesError, stored};
use crate::sink::ChunkSource;
use crate::snapshot::{Content, Snapshot};

impl Check<'_> {
    /// The snapshot's references that are in force, as the store has them.
    pub(super) async fn references(
        &mut self,
        snapshot: &Snapshot,
        newest: Option<&LiveRefs>,
    ) -> Result<References, CheckError> {
        let engine = &self.repository.engine;
        let snapshot = snapshot.id;
        let read = match newest {
            Some(refs) => stored(engine, refs).await,
            None => Err(ReferencesError::Missing { snapshot }),
        };
        let loaded = match read {
            Ok(set) => References::of(engine, set, &engine.commits.movers()).await,
            Err(error) => Err(error),
        };
        let what = match loaded {
            Ok(references) => return Ok(references),
            Err(ReferencesError::Store(error)) if error.class() != ErrorClass::Damaged => return Err(error.into()),
            Err(ReferencesError::Store(error)) => error.to_string(),
            Err(ReferencesError::Missing { .. }) => "are missing".to_owned(),
            Err(ReferencesError::Damaged { source, .. }) => format!("are damaged: {source}"),
        };
        let version = newest.map_or(0, |refs| refs.version);
        if !self.is_reported(&refset_key(snapshot, version)) {
            self.report.problems.push(Problem::Refset { snapshot, version, what });
        }
        Ok(References::default())
    }

    /// That the file list can be read, and that all its chunks are among the references.
    pub(super) async fn content(
        &mut self,
        snapshot: &Snapshot,
        refs: &References,
        known: &[Snapshot],
    ) -> Result<(), CheckError> {
        match &snapshot.content {
            Content::RecoveryPoint { members, .. } => {
                let missing = members.iter().filter(|member| known.iter().all(|found| found.id != **member));
                let problems = missing.map(|member| Problem::MissingMember { snapshot: snapshot.id, member: *member });
                self.report.problems.extend(problems);
            }
            Content::Tree { root, skipped } => {
                let walked = self.walk(snapshot, root, skipped, refs).await;
                if self.progress.is_cancelled() {
                    return Err(CheckError::Cancelled);
                }
                if let Err(error) = walked {
                    if let ManifestError::Read(crate::read::ReadError::Store { source, .. }) = &error
                        && !matches!(source.class(), ErrorClass::NotFound | ErrorClass::Damaged)
                    {
                        return Err(CheckError::Files { snapshot: snapshot.id, source: error });
                    }
                    self.report.problems.push(Problem::Files { snapshot: snapshot.id, what: with_causes(&error) });
                }
            }
        }
        Ok(())
    }

    async fn walk(
        &mut self,
        snapshot: &Snapshot,
        root: &[ChunkRef],
        skipped: &[ChunkRef],
        refs: &References,
    ) -> Result<(), ManifestError> {
        let source: Arc<dyn ChunkSource> = self.repository.reader()?;
        for chunk in root.iter().chain(skipped) {
            self.is_referenced(snapshot, chunk, refs).await?;
        }
        for chunk in skipped {
            source.get(chunk).await?;
        }
        let manifest = Manifest::open(source, root).await?;
        for page in manifest.pages() {
            self.is_referenced(snapshot, &page.chunk, refs).await?;
        }
        let mut pages = manifest.read(0..manifest.pages().len());
        while let Some(entries) = pages.next().await {
            for entry in entries? {
                if self.progress.is_cancelled() {
                    return Ok(());
                }
                if let Kind::Regular(file) = &entry.kind {
                    self.file(snapshot, &manifest, file, refs).await?;
                }
            }
        }
        Ok(())
    }

    /// That all chunks of a file are among the references: its data, its page map, and the lists of both that are chunks themselves.
    async fn file(
        &mut self,
        snapshot: &Snapshot,
        manifest: &Manifest,
        file: &Regular,
        refs: &References,
    ) -> Result<(), ManifestError> {
        for file in [file, &file.page_map_as_file()] {
            if let Contents::Listed(lists) = &file.contents {
                for chunk in lists {
                    self.is_referenced(snapshot, chunk, refs).await?;
                }
            }
            let mut lists = manifest.pieces(file);
            while let Some(pieces) = lists.next().await {
                for piece in pieces? {
                    if let Piece::Data { chunk, .. } = &piece {
                        self.is_referenced(snapshot, chunk, refs).await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn is_referenced(
        &mut self,
        snapshot: &Snapshot,
        chunk: &ChunkRef,
        refs: &References,
    ) -> Result<(), ReadError> {
        if refs.place(chunk).is_some() {
            return Ok(());
        }
        // Repacked chunks that are too many to remember, or in packs that cannot be read, are looked up.
        let failed = |source| ReadError::Store { act: "look into the index", source: Arc::new(source) };
        let places = self.repository.engine.index.find(&chunk.id).await.map_err(failed)?;
        if !places.iter().any(|place| refs.set().contains(*place)) {
            self.report.problems.push(Problem::Unreferenced { snapshot: snapshot.id, place: chunk.place });
        }
        Ok(())
    }
}
