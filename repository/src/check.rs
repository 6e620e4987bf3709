//! Checking a repository: that everything which snapshots refer to is there and whole.
//!
//! Without reading data: commits, refsets, directories of packs, file lists. With: every byte of every pack in use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::StreamExt;
use thiserror::Error;

use crate::commits::CommitLogError;
use crate::directories::DirectoryError;
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::expire::ExpireError;
use crate::expire::marks::LiveRefs;
use crate::id::{ChunkRef, PackId, Place, SessionId, SnapshotId};
use crate::keyring::KeyRingError;
use crate::manifest::{Contents, Kind, Manifest, ManifestError, Piece, Regular};
use crate::pack::{Directory, FrameError, MAX_PACK_BYTES, open_frame, pack_key, parse_header, verify_hash};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::references::{References, ReferencesError};
use crate::sink::ChunkSource;
use crate::snapshot::{Content, Snapshot};
use crate::store::StoreError;

/// Packs looked at at once; each is held in memory when data is read.
const PARALLEL_PACKS: usize = 3;

/// How thoroughly to check.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckOptions {
    /// Reads and opens every chunk in use.
    pub read_data: bool,
}

/// What a check found.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Packs in use.
    pub packs: u64,
    /// Chunks in use.
    pub chunks: u64,
    /// Bytes of packs read.
    pub bytes_read: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// Something that is wrong.
#[derive(Debug, Clone, Error)]
pub enum Problem {
    /// A commit that others saw is gone or is another one.
    #[error("the session {0} committed, and its commit is missing or was exchanged")]
    MissingCommit(SessionId),
    /// A snapshot's set of references is missing, damaged, or not the one committed.
    #[error("snapshot {snapshot}: its references {what}")]
    Refset {
        /// The snapshot.
        snapshot: SnapshotId,
        /// What is wrong with them.
        what: String,
    },
    /// A snapshot refers to a chunk that its set of references lacks: expiry would not keep it.
    #[error("snapshot {snapshot}: the chunk at {place} is not among its references")]
    Unreferenced {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The chunk's place.
        place: Place,
    },
    /// A snapshot's list of files cannot be read.
    #[error("snapshot {snapshot}: {what}")]
    Files {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Why.
        what: String,
    },
    /// A recovery point names a snapshot that does not exist.
    #[error("recovery point {snapshot}: its member {member} does not exist")]
    MissingMember {
        /// The recovery point.
        snapshot: SnapshotId,
        /// The missing snapshot.
        member: SnapshotId,
    },
    /// A pack is missing or damaged.
    #[error("pack {pack}: {what}")]
    Pack {
        /// The pack.
        pack: PackId,
        /// What is wrong.
        what: String,
    },
    /// A chunk in a pack is damaged or missing.
    #[error("pack {} slot {} at offset {offset}: {what}", place.pack, place.slot)]
    Chunk {
        /// Its place.
        place: Place,
        /// Byte offset in the pack; 0 when the slot does not exist.
        offset: u64,
        /// What is wrong.
        what: String,
    },
}

/// A check that could not be done.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The list of snapshots cannot be read.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// The store failed.
    #[error("the store failed during the check")]
    Store(#[from] StoreError),
    /// The marks of expiry, which tell what was removed rightly, cannot be read.
    #[error("cannot tell which commits expired")]
    Marks(#[source] Box<ExpireError>),
    /// The key that opened the repository cannot read data.
    #[error("this key can write but not read data; check without reading data, or use a key with the private part")]
    NoPrivateKey,
    /// Somebody asked to stop.
    #[error("stopped on request")]
    Cancelled,
    /// A worker thread ended unexpectedly.
    #[error("a worker failed: {0}")]
    Worker(#[from] tokio::task::JoinError),
}

impl Classified for CheckError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Marks(error) => error.class(),
            Self::NoPrivateKey => ErrorClass::Key,
            Self::Cancelled => ErrorClass::Invalid,
            Self::Worker(_) => ErrorClass::Local,
        }
    }
}

impl Repository {
    /// Checks everything that snapshots refer to. Damage is reported, not an error.
    pub async fn check(&self, options: CheckOptions, progress: Arc<Progress>) -> Result<CheckReport, CheckError> {
        if options.read_data && self.engine.keys.domain().private.is_none() {
            return Err(CheckError::NoPrivateKey);
        }
        let snapshots = self.snapshots().await?;
        let mut check = Check { repository: self, report: CheckReport::default(), progress };
        let omissions = self.omissions().await.map_err(|error| CheckError::Marks(Box::new(error)))?;
        check.report.problems.extend(omissions.into_iter().map(Problem::MissingCommit));
        let known: BTreeSet<_> = snapshots.iter().map(|snapshot| snapshot.id).collect();
        let mut used: BTreeMap<PackId, BTreeSet<u16>> = BTreeMap::new();
        for snapshot in &snapshots {
            check.progress.add_entry();
            check.report.snapshots += 1;
            let refs = check.references(snapshot).await?;
            check.content(snapshot, &refs, &known).await?;
            for (pack, slots) in refs.set().packs() {
                used.entry(pack).or_default().extend(slots);
            }
        }
        check.packs(used, options.read_data).await?;
        Ok(check.report)
    }
}

struct Check<'a> {
    repository: &'a Repository,
    report: CheckReport,
    progress: Arc<Progress>,
}

impl Check<'_> {
    /// The snapshot's references, as committed.
    async fn references(&mut self, snapshot: &Snapshot) -> Result<References, CheckError> {
        let engine = &self.repository.engine;
        let newest = engine.commits.references().get(&snapshot.id).copied();
        let loaded = match newest {
            Some(LiveRefs { version, hash, .. }) => {
                References::load(engine, snapshot.id, version, &hash, &engine.commits.movers()).await
            }
            None => Err(ReferencesError::Missing { snapshot: snapshot.id }),
        };
        let what = match loaded {
            Ok(references) => return Ok(references),
            Err(ReferencesError::Store(error)) => return Err(error.into()),
            Err(ReferencesError::Missing { .. }) => "are missing".to_owned(),
            Err(ReferencesError::Damaged { source, .. }) => format!("are damaged: {source}"),
        };
        self.report.problems.push(Problem::Refset { snapshot: snapshot.id, what });
        Ok(References::default())
    }

    /// That the file list can be read, and that all its chunks are among the references.
    async fn content(
        &mut self,
        snapshot: &Snapshot,
        refs: &References,
        known: &BTreeSet<SnapshotId>,
    ) -> Result<(), CheckError> {
        match &snapshot.content {
            Content::RecoveryPoint { members, .. } => {
                let missing = members.iter().filter(|member| !known.contains(member));
                let problems = missing.map(|member| Problem::MissingMember { snapshot: snapshot.id, member: *member });
                self.report.problems.extend(problems);
            }
            Content::Tree { root, skipped } => {
                let walked = self.walk(snapshot, root, skipped, refs).await;
                if self.progress.is_cancelled() {
                    return Err(CheckError::Cancelled);
                }
                if let Err(error) = walked {
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
            self.is_referenced(snapshot, chunk, refs);
        }
        for chunk in skipped {
            source.get(chunk).await?;
        }
        let manifest = Manifest::open(source, root).await?;
        for page in manifest.pages() {
            self.is_referenced(snapshot, &page.chunk, refs);
        }
        let mut pages = manifest.read((0..manifest.pages().len()).collect());
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

    /// That all chunks of a file are among the references: its data, and the lists of it that are chunks themselves.
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
                    self.is_referenced(snapshot, chunk, refs);
                }
            }
            let mut lists = manifest.pieces(file);
            while let Some(pieces) = lists.next().await {
                for piece in pieces? {
                    if let Piece::Data { chunk, .. } = &piece {
                        self.is_referenced(snapshot, chunk, refs);
                    }
                }
            }
        }
        Ok(())
    }

    fn is_referenced(&mut self, snapshot: &Snapshot, chunk: &ChunkRef, refs: &References) {
        if refs.place(chunk).is_none() {
            self.report.problems.push(Problem::Unreferenced { snapshot: snapshot.id, place: chunk.place });
        }
    }

    /// That every pack in use has the slots, and with `read_data` that all of them open.
    async fn packs(&mut self, used: BTreeMap<PackId, BTreeSet<u16>>, read_data: bool) -> Result<(), CheckError> {
        let engine = Arc::clone(&self.repository.engine);
        let mut checks = futures::stream::iter(used)
            .map(|(pack, slots)| {
                let engine = Arc::clone(&engine);
                async move { check_pack(engine, pack, slots, read_data).await }
            })
            .buffer_unordered(PARALLEL_PACKS);
        while let Some(checked) = checks.next().await {
            if self.progress.is_cancelled() {
                return Err(CheckError::Cancelled);
            }
            let checked = checked?;
            self.progress.add_bytes(checked.bytes_read);
            self.report.packs += 1;
            self.report.chunks += checked.chunks;
            self.report.bytes_read += checked.bytes_read;
            self.report.problems.extend(checked.problems);
        }
        Ok(())
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[derive(Default)]
struct CheckedPack {
    chunks: u64,
    bytes_read: u64,
    problems: Vec<Problem>,
}

async fn check_pack(
    engine: Arc<Engine>,
    pack: PackId,
    slots: BTreeSet<u16>,
    read_data: bool,
) -> Result<CheckedPack, CheckError> {
    let mut checked = CheckedPack { chunks: slots.len() as u64, ..CheckedPack::default() };
    let problem = |what: String| Problem::Pack { pack, what };
    let directory = match engine.directories.get(pack).await {
        Ok(directory) => directory,
        Err(DirectoryError::Store(error) | DirectoryError::Keys(KeyRingError::Store(error))) if !is_damage(&error) => {
            return Err(error.into());
        }
        Err(error) => {
            checked.problems.push(problem(with_causes(&error)));
            return Ok(checked);
        }
    };
    for slot in slots.iter().filter(|slot| usize::from(**slot) >= directory.slots.len()) {
        checked.problems.push(Problem::Chunk {
            place: Place { pack, slot: *slot },
            offset: 0,
            what: "the slot does not exist".into(),
        });
    }
    if !read_data {
        return Ok(checked);
    }
    let bytes = match engine.store.get(&pack_key(pack), MAX_PACK_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if is_damage(&error) => {
            checked.problems.push(problem(error.to_string()));
            return Ok(checked);
        }
        Err(error) => return Err(error.into()),
    };
    checked.bytes_read = bytes.len() as u64;
    let hash = verify_hash(&bytes).and_then(|()| parse_header(&bytes));
    match hash {
        Ok(found) if found == pack => {}
        Ok(found) => checked.problems.push(problem(format!("the object holds the pack {found}"))),
        Err(error) => checked.problems.push(problem(error.to_string())),
    }
    checked.problems.extend(open_all(engine, pack, slots, directory, bytes).await?);
    Ok(checked)
}

fn is_damage(error: &StoreError) -> bool {
    matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged)
}

/// Opens the frames of these slots.
async fn open_all(
    engine: Arc<Engine>,
    pack: PackId,
    slots: BTreeSet<u16>,
    directory: Arc<Directory>,
    bytes: bytes::Bytes,
) -> Result<Vec<Problem>, CheckError> {
    let mut ciphers = BTreeMap::new();
    let mut problems = Vec::new();
    for origin in &directory.origins {
        match engine.keys.get(*origin).await {
            Ok(keys) => {
                ciphers.insert(*origin, keys);
            }
            Err(KeyRingError::Store(error)) if !is_damage(&error) => return Err(error.into()),
            Err(error) => problems.push(Problem::Pack { pack, what: with_causes(&error) }),
        }
    }
    let open = move || {
        for slot in slots {
            let Some(entry) = directory.slots.get(usize::from(slot)) else { continue };
            let origin = directory.origins.get(usize::from(entry.origin)).copied().unwrap_or(pack.session);
            let Some(cipher) = ciphers.get(&origin).and_then(|keys| keys.frame(entry.expected.kind)) else { continue };
            let start = entry.offset as usize;
            let opened = match bytes.get(start..start + entry.len as usize) {
                Some(frame) => {
                    open_frame(cipher, &entry.expected, frame, |plain| engine.chunk_id(plain)).map_err(FrameError::what)
                }
                None => Err("the pack ends before it"),
            };
            if let Err(what) = opened {
                let place = Place { pack, slot };
                problems.push(Problem::Chunk { place, offset: u64::from(entry.offset), what: what.to_owned() });
            }
        }
        problems
    };
    Ok(tokio::task::spawn_blocking(open).await?)
}
