//! Repacking: what lives of packs that are mostly dead is copied into new ones, so that the old can be condemned.
//!
//! A session of its own copies sealed frames as they are, which needs no data key, and commits new versions of the
//! refsets that named the old places. Until then nothing changed; after it, manifests still name the old places, as hints.
//! The old packs are deleted by an ordinary round, which keeps them if a writer still took a reference.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use futures::FutureExt;
use tracing::{info, warn};

use super::liveness::lineages;
use super::packset::PackSet;
use super::view::View;
use super::{ExpireError, PARALLEL, Run};
use crate::directories::DirectoryError;
use crate::engine::Engine;
use crate::id::{PackId, Place, SessionId, SnapshotId};
use crate::keyring::KeyRingError;
use crate::pack::{Directory, MAX_PACK_BYTES, PackBuilder, PackKind, pack_key, verify_checksum};
use crate::parallel::at_once;
use crate::session::references::refset;
use crate::session::{MovedRefs, Session, SessionError, SessionOptions};

/// A pack is left alone while at least this share of its bytes lives.
const LIVE_SHARE: u64 = 2;
/// A pack is closed early where the lineage changes, if it has at least this many bytes.
const LINEAGE_PACK_BYTES: usize = 8 << 20;

/// A pack to be repacked.
pub(super) struct Source {
    pack: PackId,
    slots: Vec<u16>,
    directory: Arc<Directory>,
    live_bytes: u64,
    dead_bytes: u64,
}

/// What is to be repacked.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) sources: Vec<Source>,
    /// Bytes that will be copied.
    pub(super) bytes: u64,
}

impl Run {
    /// Chooses packs: those that free most for the bytes copied, within the budget.
    pub(super) async fn plan_repack(&mut self, view: &View) -> Result<Plan, ExpireError> {
        let looks = view.worn.iter().map(|pack| look_into(&self.engine, view, pack).boxed());
        let looked = at_once(PARALLEL, looks.collect()).await?.into_iter().flatten();
        let (mut sparse, dense): (Vec<_>, Vec<_>) =
            looked.partition(|source| source.live_bytes * LIVE_SHARE < source.live_bytes + source.dead_bytes);
        self.dense = dense.into_iter().map(|source| source.pack).collect();
        // dead/live descending, without division.
        sparse.sort_by(|a, b| {
            let left = u128::from(a.dead_bytes) * u128::from(b.live_bytes);
            let right = u128::from(b.dead_bytes) * u128::from(a.live_bytes);
            right.cmp(&left).then(a.pack.cmp(&b.pack))
        });
        let mut plan = Plan::default();
        self.report.packs_left = 0;
        for source in sparse {
            if plan.bytes + source.live_bytes > self.options.repack_budget {
                self.report.packs_left += 1;
                continue;
            }
            plan.bytes += source.live_bytes;
            plan.sources.push(source);
        }
        Ok(plan)
    }

    /// Carries the plan out; whether anything was moved.
    pub(super) async fn repack(&mut self, view: &View, plan: Plan) -> Result<bool, ExpireError> {
        if plan.sources.is_empty() {
            return Ok(false);
        }
        let planned = plan.sources.len() as u64;
        let options = SessionOptions { purpose: "repack".to_owned(), ..SessionOptions::default() };
        let session = self.repository.begin(options).await?;
        let moved = self.move_chunks(&session, view, plan).await;
        let moved = match moved {
            Ok(moved) if moved.packs > 0 => match Arc::clone(&session).commit_moves(moved.refs).await {
                Ok(()) => Ok(Some((moved.packs, moved.bytes))),
                Err(error) => Err(error.into()),
            },
            Ok(_) => Ok(None),
            Err(error) => Err(error),
        };
        match moved {
            Ok(Some((packs, bytes))) => {
                self.report.packs_repacked += packs;
                self.report.bytes_copied += bytes;
                self.report.packs_left += planned - packs;
                return Ok(true);
            }
            Ok(None) => abort(&session, "there was nothing to move").await,
            Err(error) => {
                abort(&session, &error.to_string()).await;
                // Another deleter repacks the same, or took this session for dead: expiry goes on without.
                let is_lost = matches!(
                    &error,
                    ExpireError::Session(SessionError::Closed { .. } | SessionError::AbortedByAnother { .. })
                );
                if !is_lost {
                    return Err(error);
                }
                info!(%error, "another expiry repacks");
            }
        }
        self.report.packs_left += planned;
        Ok(false)
    }

    /// Copies the living frames and makes the new references. Nothing is in force before the session commits.
    async fn move_chunks(&self, session: &Arc<Session>, view: &View, plan: Plan) -> Result<Moved, ExpireError> {
        let referring = self.referring(session, view, &plan).await?;
        let mut copy = Copy { session, open: HashMap::new(), places: HashMap::new(), lineage: None };
        let (mut packs, mut bytes) = (0, 0);
        for (lineage, source) in by_lineage(plan.sources, &referring) {
            if session.is_masked(source.pack) || !copy.take(&self.engine, lineage, &source).await? {
                continue;
            }
            packs += 1;
            bytes += source.live_bytes;
            self.progress.add_bytes(source.live_bytes);
        }
        let places = copy.finish().await?;
        let mut refs = Vec::new();
        for Referring { snapshot, version, set, .. } in referring {
            let mut set = set;
            let mut is_moved = false;
            for (old, new) in &places {
                if set.remove(*old) {
                    set.insert(*new);
                    is_moved = true;
                }
            }
            if is_moved {
                refs.push(MovedRefs { snapshot, from: version, set });
            }
        }
        Ok(Moved { refs, packs, bytes })
    }

    /// The snapshots that refer to chunks of the sources, with the references that this session may build on.
    async fn referring(&self, session: &Arc<Session>, view: &View, plan: &Plan) -> Result<Vec<Referring>, ExpireError> {
        let sources: PackSet = plan.sources.iter().map(|source| source.pack).collect();
        let lineages = lineages(&self.engine);
        let wanted: Vec<_> = view.live.iter().map(|refs| refs.snapshot).collect();
        let newest = session.newest_refs(&wanted).await?;
        let mut referring = Vec::new();
        for refs in newest {
            let set = refset(&self.engine, refs.snapshot, refs.version, &refs.hash).await?;
            let mut used = set.pack_set();
            if used.iter().any(|pack| session.is_masked(pack)) {
                // It is about to expire; a reference that is masked must not be written down again.
                continue;
            }
            used.retain_all(&sources);
            if !used.is_empty() {
                let lineage = lineages.get(&refs.snapshot).cloned().unwrap_or_default();
                referring.push(Referring { snapshot: refs.snapshot, version: refs.version, lineage, set, used });
            }
        }
        Ok(referring)
    }
}

struct Moved {
    refs: Vec<MovedRefs>,
    packs: u64,
    bytes: u64,
}

/// A snapshot that refers to sources.
struct Referring {
    snapshot: SnapshotId,
    version: u32,
    lineage: String,
    set: crate::refset::Refset,
    /// The sources that it refers to.
    used: PackSet,
}

/// What lives in a pack; `None`: its directory cannot be used.
async fn look_into(engine: &Engine, view: &View, pack: PackId) -> Result<Option<Source>, ExpireError> {
    let directory = match engine.directories.get(pack).await {
        Ok(directory) => directory,
        Err(DirectoryError::Store(error) | DirectoryError::Keys(KeyRingError::Store(error)))
            if !error.is_not_found() =>
        {
            return Err(error.into());
        }
        Err(error) => {
            warn!(%pack, %error, "a pack that snapshots refer to cannot be used: it is left as it is");
            return Ok(None);
        }
    };
    let slots = view.refs.slots(pack);
    let all: u64 = directory.slots.iter().map(|slot| u64::from(slot.len)).sum();
    let entries = slots.iter().filter_map(|slot| directory.slots.get(usize::from(*slot)));
    let live_bytes: u64 = entries.map(|entry| u64::from(entry.len)).sum();
    Ok(Some(Source { pack, slots, directory, live_bytes, dead_bytes: all.saturating_sub(live_bytes) }))
}

/// Puts together what one lineage refers to: the first, by name, of those that refer to a pack.
fn by_lineage(sources: Vec<Source>, referring: &[Referring]) -> Vec<(String, Source)> {
    let mut sorted: Vec<_> = sources
        .into_iter()
        .map(|source| {
            let users = referring.iter().filter(|referring| referring.used.contains(source.pack));
            let lineages: BTreeSet<_> = users.map(|referring| &referring.lineage).collect();
            (lineages.first().map(ToString::to_string).unwrap_or_default(), source)
        })
        .collect();
    sorted.sort_by(|a, b| (&a.0, a.1.pack).cmp(&(&b.0, b.1.pack)));
    sorted
}

/// Copies frames into new packs.
struct Copy<'a> {
    session: &'a Arc<Session>,
    open: HashMap<PackKind, PackBuilder>,
    places: HashMap<Place, Place>,
    lineage: Option<String>,
}

impl Copy<'_> {
    /// Copies what lives of a pack; `false`: the pack is damaged, and left for those who heal.
    async fn take(&mut self, engine: &Engine, lineage: String, source: &Source) -> Result<bool, ExpireError> {
        let bytes = match engine.store.get(&pack_key(source.pack), MAX_PACK_BYTES).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let is_lost = |slot: &u16| engine.lost.covers(Place { pack: source.pack, slot: *slot });
        if source.slots.iter().any(is_lost) {
            // No mark would name the new place of a chunk that is lost.
            return Ok(false);
        }
        if let Err(error) = verify_checksum(&bytes) {
            warn!(pack = %source.pack, %error, "a damaged pack is not repacked");
            return Ok(false);
        }
        if self.lineage.replace(lineage.clone()).is_some_and(|before| before != lineage) {
            self.close(LINEAGE_PACK_BYTES).await?;
        }
        for slot in &source.slots {
            let Some(entry) = source.directory.slots.get(usize::from(*slot)) else { return Ok(false) };
            // The directory was checked to lie in the pack when it was opened, and origins to be listed.
            let start = entry.offset as usize;
            let Some(frame) = bytes.get(start..start + entry.len as usize) else { return Ok(false) };
            let origin =
                source.directory.origins.get(usize::from(entry.origin)).copied().unwrap_or(source.pack.session);
            let kind = if entry.expected.kind.is_metadata() { PackKind::Metadata } else { PackKind::Data };
            // A copy, so that the frame does not keep the whole of the old pack in memory.
            let place = self.push(kind, entry.expected, bytes::Bytes::copy_from_slice(frame), origin).await?;
            self.places.insert(Place { pack: source.pack, slot: *slot }, place);
        }
        Ok(true)
    }

    async fn push(
        &mut self,
        kind: PackKind,
        expected: crate::pack::Expected,
        frame: bytes::Bytes,
        origin: SessionId,
    ) -> Result<Place, ExpireError> {
        if !self.open.contains_key(&kind) {
            self.open.insert(kind, self.session.new_pack(kind)?);
        }
        let Some(builder) = self.open.get_mut(&kind) else {
            return Err(SessionError::Closed { session: self.session.id() }.into());
        };
        let place = Place { pack: builder.id, slot: builder.push_copy(expected, frame, origin) };
        if builder.is_full()
            && let Some(full) = self.open.remove(&kind)
        {
            self.session.store_pack(full).await?;
        }
        Ok(place)
    }

    /// Closes the open packs that have at least so many bytes.
    async fn close(&mut self, from: usize) -> Result<(), ExpireError> {
        for kind in [PackKind::Data, PackKind::Metadata] {
            if self.open.get(&kind).is_some_and(|builder| builder.len() >= from)
                && let Some(builder) = self.open.remove(&kind)
            {
                self.session.store_pack(builder).await?;
            }
        }
        Ok(())
    }

    /// Uploads what is open; where each chunk lies now.
    async fn finish(mut self) -> Result<BTreeMap<Place, Place>, ExpireError> {
        self.close(0).await?;
        Ok(self.places.into_iter().collect())
    }
}

async fn abort(session: &Arc<Session>, reason: &str) {
    if let Err(error) = session.abort(reason).await {
        warn!(%error, "the session that repacks could not be aborted");
    }
}
