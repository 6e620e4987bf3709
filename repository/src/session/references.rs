//! The references of a snapshot as they are in force: where its chunks lie now, also after repacking.
//!
//! A manifest names the place where a chunk lay when it was written; after repacking that is only a hint. What may be
//! relied on is the snapshot's refset of the newest version: a place in it exists as long as the snapshot lives.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::FutureExt;
use thiserror::Error;

use crate::directories::DirectoryError;
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::LiveRefs;
use crate::id::{ChunkId, ChunkRef, PackId, Place, SessionId, SnapshotId};
use crate::parallel::at_once;
use crate::refset::{MAX_REFSET_BYTES, Refset, refset_key};
use crate::store::StoreError;
use crate::wire::WireError;

/// Moved chunks that are remembered, about 60 MiB; others are read and found again like new ones.
const MAX_MOVED: usize = 500_000;
/// Directories of repacked packs fetched at once.
const PARALLEL_FETCHES: usize = 16;

/// Why the references of a snapshot are not there.
#[derive(Debug, Error)]
pub(crate) enum ReferencesError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the references of snapshot {snapshot} are damaged: {source}")]
    Damaged { snapshot: SnapshotId, source: WireError },
    #[error("the references of snapshot {snapshot} are missing")]
    Missing { snapshot: SnapshotId },
}

/// The refset of a snapshot in a version, compared with the hash that was committed.
pub(crate) async fn refset(
    engine: &Engine,
    snapshot: SnapshotId,
    version: u32,
    hash: &[u8; 32],
) -> Result<Refset, ReferencesError> {
    let key = refset_key(snapshot, version);
    let bytes = match engine.cache.get(&*engine.store, &key, MAX_REFSET_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => return Err(ReferencesError::Missing { snapshot }),
        Err(error) => return Err(error.into()),
    };
    parse(snapshot, version, hash, &bytes).inspect_err(|_| engine.cache.forget(&key))
}

/// As [`refset`], as it lies in the store now, whatever the cache has.
pub(crate) async fn stored(engine: &Engine, refs: &LiveRefs) -> Result<Refset, ReferencesError> {
    let LiveRefs { snapshot, version, hash, .. } = refs;
    match engine.store.get(&refset_key(*snapshot, *version), MAX_REFSET_BYTES).await {
        Ok(bytes) => parse(*snapshot, *version, hash, &bytes),
        Err(error) if error.is_not_found() => Err(ReferencesError::Missing { snapshot: *snapshot }),
        Err(error) => Err(error.into()),
    }
}

fn parse(snapshot: SnapshotId, version: u32, hash: &[u8; 32], bytes: &[u8]) -> Result<Refset, ReferencesError> {
    let parsed = if blake3::hash(bytes).as_bytes() == hash {
        Refset::parse(snapshot, version, bytes).map(|(_, set)| set)
    } else {
        Err(WireError { what: "they are not the ones committed", at: 0 })
    };
    parsed.map_err(|source| ReferencesError::Damaged { snapshot, source })
}

/// The references of a snapshot that are in force, of `newest`, which is what the commits name.
pub(crate) async fn in_force(
    engine: &Engine,
    newest: &BTreeMap<SnapshotId, LiveRefs>,
    snapshot: SnapshotId,
) -> Result<Refset, ReferencesError> {
    let refs = newest.get(&snapshot).ok_or(ReferencesError::Missing { snapshot })?;
    refset(engine, snapshot, refs.version, &refs.hash).await
}

/// Where the chunks of a snapshot lie.
#[derive(Debug, Default)]
pub(crate) struct References {
    set: Refset,
    moved: HashMap<ChunkId, Place>,
}

impl References {
    /// Reads them. `movers` are the sessions that repacked.
    pub(crate) async fn load(
        engine: &Engine,
        snapshot: SnapshotId,
        version: u32,
        hash: &[u8; 32],
        movers: &BTreeSet<SessionId>,
    ) -> Result<Self, ReferencesError> {
        Self::of(engine, refset(engine, snapshot, version, hash).await?, movers).await
    }

    /// The same of a set that was read already.
    pub(crate) async fn of(
        engine: &Engine,
        set: Refset,
        movers: &BTreeSet<SessionId>,
    ) -> Result<Self, ReferencesError> {
        let repacked = set.packs_of(movers);
        let moved = moved(engine, repacked).await?;
        Ok(Self { set, moved })
    }

    /// Where the chunk lies, if it is one of the snapshot's.
    pub(crate) fn place(&self, chunk: &ChunkRef) -> Option<Place> {
        if self.set.contains(chunk.place) { Some(chunk.place) } else { self.moved.get(&chunk.id).copied() }
    }

    /// All places.
    pub(crate) fn set(&self) -> &Refset {
        &self.set
    }
}

/// The ids of the chunks in repacked packs, as the packs' own directories say.
async fn moved(engine: &Engine, packs: Vec<(PackId, Vec<u16>)>) -> Result<HashMap<ChunkId, Place>, ReferencesError> {
    let mut moved = HashMap::new();
    let work = packs.into_iter().map(|(pack, slots)| {
        async move {
            match engine.directories.get(pack).await {
                Ok(directory) => Ok(Some((pack, slots, directory))),
                Err(DirectoryError::Store(error))
                    if !matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) =>
                {
                    Err(error)
                }
                Err(error) => {
                    tracing::warn!(%pack, %error, "a repacked pack cannot be used: its chunks are stored again");
                    Ok(None)
                }
            }
        }
        .boxed()
    });
    for (pack, slots, directory) in at_once(PARALLEL_FETCHES, work.collect()).await?.into_iter().flatten() {
        for slot in slots {
            let Some(entry) = directory.slots.get(usize::from(slot)) else { continue };
            if moved.len() >= MAX_MOVED {
                return Ok(moved);
            }
            moved.insert(entry.expected.id, Place { pack, slot });
        }
    }
    Ok(moved)
}

/// The refsets of several snapshots, or versions of them, as one set.
pub(crate) async fn union(
    engine: &Engine,
    wanted: Vec<(SnapshotId, u32, [u8; 32])>,
) -> Result<Refset, ReferencesError> {
    let mut union = Refset::default();
    // A few at a time: each may be large.
    for some in wanted.chunks(PARALLEL_FETCHES) {
        let work = some.iter().map(|(snapshot, version, hash)| refset(engine, *snapshot, *version, hash).boxed());
        at_once(PARALLEL_FETCHES, work.collect()).await?.iter().for_each(|set| union.extend(set));
    }
    Ok(union)
}
