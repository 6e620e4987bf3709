//! Takes chunks, leaves out known ones, packs the others, uploads packs, and decides the session.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinError, JoinSet};
use tracing::{debug, info, warn};

use super::decision::{Commit, Decision, MAX_DECISION_BYTES, RefsetHash, decision_key};
use super::heartbeat::Heart;
use super::mask::Mask;
use super::references::References;
use super::registration::{Registration, register};
use super::stats::{Counters, SessionStats};
use super::{SessionError, marks_failed, not_registered};
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::id::{ChunkId, ChunkRef, PackId, Place, SessionId};
use crate::index::{SEGMENT_ENTRIES, Segment, SegmentEntry, encode_segment, segment_key};
use crate::keyring::{KeyRingError, SessionCiphers};
use crate::pack::{Compression, Experience, PackBuilder, PackKind, SealedFrame, TARGET_PACK_BYTES, seal_frame};
use crate::refset::{Refset, refset_key};
use crate::sink::{ChunkKind, MAX_CHUNK_BYTES};
use crate::snapshot::{NewSnapshot, Snapshot};
use crate::store::StoreError;

/// Bytes that may wait in open packs and uploads. The two open packs hold less than 32 MiB of it each (a fuller one is
/// uploaded) and a chunk has at most 16 MiB, so that a chunk always finds room and nothing waits for ever.
const BUDGET_BYTES: usize = 2 * TARGET_PACK_BYTES + MAX_CHUNK_BYTES + PERMIT_BYTES;
/// The semaphore counts in KiB.
const PERMIT_BYTES: usize = 1 << 10;
/// After this many packs an index segment is published, so that an aborted long session leaves little to do twice.
const PACKS_PER_SEGMENT: u32 = 64;

/// What a session is for.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// For people: `backup`, `restore`, ...
    pub purpose: String,
    /// The machine; the kernel's host name when empty.
    pub host: String,
    /// How hard data is compressed.
    pub compression: Compression,
}

/// An open pack and the budget that its bytes hold.
#[derive(Debug)]
pub(super) struct OpenPack {
    pub(super) builder: PackBuilder,
    /// A pack that counts in no budget has none.
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

impl OpenPack {
    /// Frames take whole permits: many small ones fill the pack's share of the budget before they fill the pack.
    fn is_full(&self) -> bool {
        let held = self.permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        self.builder.is_full() || held >= TARGET_PACK_BYTES / PERMIT_BYTES
    }
}

#[derive(Debug, Default)]
pub(super) struct Writing {
    pub(super) own: HashMap<ChunkId, Place>,
    refs: Refset,
    open_data: Option<OpenPack>,
    open_metadata: Option<OpenPack>,
    pub(super) next_pack: u32,
    unpublished: Vec<SegmentEntry>,
    unpublished_packs: u32,
    failed: Option<SessionError>,
    closed: bool,
}

impl Writing {
    fn open_pack(&mut self, kind: PackKind) -> &mut Option<OpenPack> {
        match kind {
            PackKind::Data => &mut self.open_data,
            PackKind::Metadata => &mut self.open_metadata,
        }
    }
}

/// A registered session.
#[derive(Debug)]
pub struct Session {
    pub(super) shared: Arc<Shared>,
    uploads: Mutex<JoinSet<()>>,
    heart: Heart,
    pub(super) saw: Vec<super::decision::SeenCommit>,
    pub(super) purpose: String,
    pub(super) epoch: u64,
    host: String,
}

/// What upload tasks need of a session.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: SessionId,
    pub(super) engine: Arc<Engine>,
    /// What must not be referred to.
    pub(super) mask: Mask,
    /// What may be inherited without looking it up.
    pub(super) parent: OnceLock<References>,
    /// Set when the index was loaded, which is when it is first asked: a backup of what did not change needs none.
    index: OnceCell<()>,
    ciphers: Arc<SessionCiphers>,
    /// Frames sealed under the data key and under the manifest key: the nonces.
    data_counter: AtomicU64,
    metadata_counter: AtomicU64,
    writing: Mutex<Writing>,
    /// The number of the next segment. Segments are published one after the other: expiry reads an aborted session's up to
    /// the first that is missing.
    next_segment: tokio::sync::Mutex<u32>,
    budget: Arc<Semaphore>,
    /// Frames that are compressed and sealed at once: as many as there are cores.
    sealers: Semaphore,
    compression: Compression,
    /// Whether data compresses at all.
    experience: Arc<Experience>,
    pub(super) counters: Counters,
}

impl Session {
    /// Registers a session.
    pub(crate) async fn begin(engine: Arc<Engine>, options: SessionOptions) -> Result<Arc<Self>, SessionError> {
        let id = SessionId::random();
        let registration = register(&*engine.store, &engine.cache, engine.config.lanes, id, crate::clock::now(), None)
            .await
            .map_err(|error| not_registered(id, error))?;
        match Self::begin_registered(Arc::clone(&engine), id, registration, options).await {
            Ok(session) => Ok(session),
            Err(error) => {
                // Expiry waits for every registered session: one that will never write is decided at once.
                let bytes = Decision::abort_bytes(id, &error.to_string());
                if let Err(failed) = engine.store.put_if_absent(&decision_key(id), bytes.into()).await {
                    debug!(session = %id, error = %failed, "a session that did not begin was not aborted");
                }
                Err(error)
            }
        }
    }

    async fn begin_registered(
        engine: Arc<Engine>,
        id: SessionId,
        registration: Registration,
        options: SessionOptions,
    ) -> Result<Arc<Self>, SessionError> {
        let Registration { epoch, lane, slot } = registration;
        let fail = |act| move |source: StoreError| SessionError::Store { session: id, act, source: Arc::new(source) };
        engine.directories.renew();
        // All of it after registering, and in no order: each is a round trip or more.
        let mask = async { Mask::load(&engine, epoch).await.map_err(|error| marks_failed(id, error)) };
        let ciphers = async {
            engine.keys.create(id).await.map_err(|error| match error {
                KeyRingError::Store(source) => fail("store its keys")(source),
                KeyRingError::Object { .. } => SessionError::Seal { session: id, what: "its keys" },
            })
        };
        let lost = async { engine.lost.refresh(&*engine.store).await.map_err(fail("load which chunks are lost")) };
        let (mask, ciphers, ()) = tokio::try_join!(mask, ciphers, lost)?;
        let saw = engine.commits.heads();
        debug!(session = %id, epoch, lane, slot, masked = mask.packs.len(), purpose = options.purpose, "session registered");
        let shared = Arc::new(Shared {
            id,
            mask,
            parent: OnceLock::new(),
            index: OnceCell::new(),
            ciphers,
            data_counter: AtomicU64::new(0),
            metadata_counter: AtomicU64::new(0),
            writing: Mutex::default(),
            next_segment: tokio::sync::Mutex::default(),
            budget: Arc::new(Semaphore::new(BUDGET_BYTES / PERMIT_BYTES)),
            sealers: Semaphore::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
            compression: options.compression,
            experience: Arc::default(),
            counters: Counters::default(),
            engine,
        });
        let heart = Heart::begin(Arc::clone(&shared.engine), id);
        let host = if options.host.is_empty() { crate::snapshot::this_host() } else { options.host };
        let (uploads, purpose) = (Mutex::default(), options.purpose);
        Ok(Arc::new(Self { shared, uploads, heart, saw, purpose, epoch, host }))
    }

    /// The session's name.
    pub fn id(&self) -> SessionId {
        self.shared.id
    }

    /// Chunks of its own that it remembers, because no published segment has them.
    #[cfg(test)]
    pub(crate) fn remembered(&self) -> usize {
        self.shared.lock().own.len()
    }

    /// What it did so far.
    pub fn stats(&self) -> SessionStats {
        self.shared.counters.read()
    }

    /// Uploads what is open, waits for all uploads and publishes the index segment.
    pub(crate) async fn flush(&self) -> Result<(), SessionError> {
        let open: Vec<_> = {
            let mut writing = self.shared.usable()?;
            [writing.open_data.take(), writing.open_metadata.take()].into_iter().flatten().collect()
        };
        for pack in open {
            self.upload(pack);
        }
        let mut uploads = std::mem::take(&mut *self.uploads.lock().unwrap_or_else(PoisonError::into_inner));
        while let Some(ended) = uploads.join_next().await {
            ended.map_err(|error| self.shared.worker_failed(&error))?;
        }
        drop(self.shared.usable()?);
        self.shared.publish().await
    }

    pub(super) fn upload(&self, pack: OpenPack) {
        let shared = Arc::clone(&self.shared);
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        // Ended tasks are taken out so that the set stays small; their failures are kept in the session.
        while uploads.try_join_next().is_some() {}
        uploads.spawn(async move {
            if let Err(error) = shared.upload(pack).await {
                shared.fail(error);
            }
        });
    }

    /// Commits: from now on the snapshots exist. All or none.
    ///
    /// A failure leaves the session open: [`Self::abort`] it.
    pub async fn commit(self: Arc<Self>, snapshots: Vec<NewSnapshot>) -> Result<Vec<Snapshot>, SessionError> {
        // Nothing is decided before both are done.
        let ((), refsets) = tokio::try_join!(self.flush(), self.put_refsets(&snapshots))?;
        let snapshots: Vec<_> = snapshots.into_iter().map(|snapshot| snapshot.commit(self.id(), &self.host)).collect();
        let (epoch, saw, purpose) = (self.epoch, self.saw.clone(), self.purpose.clone());
        self.commit_as(Commit { epoch, snapshots, refsets, saw, purpose }).await
    }

    async fn put_refsets(&self, snapshots: &[NewSnapshot]) -> Result<Vec<RefsetHash>, SessionError> {
        let refs = std::mem::take(&mut self.shared.usable()?.refs);
        let mut refsets = Vec::new();
        for snapshot in snapshots {
            let bytes = refs
                .to_bytes(snapshot.id, 0, self.id())
                .map_err(|_| SessionError::Seal { session: self.id(), what: "a refset" })?;
            let hash = blake3::hash(&bytes).to_hex().to_string();
            refsets.push(RefsetHash { snapshot: snapshot.id, version: 0, hash });
            let (key, bytes) = (refset_key(snapshot.id, 0), Bytes::from(bytes));
            self.shared.put(&key, bytes.clone(), "store a refset").await?;
            self.shared.engine.cache.put(&key, &bytes);
        }
        Ok(refsets)
    }

    /// Decides the session by this commit.
    pub(super) async fn commit_as(&self, commit: Commit) -> Result<Vec<Snapshot>, SessionError> {
        let bytes = commit
            .seal(self.id(), &self.shared.ciphers.structure)
            .map_err(|_| SessionError::Seal { session: self.id(), what: "its commit" })?;
        let bytes = Bytes::from(bytes);
        self.decide(bytes.clone(), "commit").await?;
        self.shared.lock().closed = true;
        self.shared.engine.commits.add_own(self.id(), &bytes, &commit);
        self.heart.end().await;
        info!(session = %self.id(), snapshots = commit.snapshots.len(), "committed");
        Ok(commit.snapshots)
    }

    /// Gives the session up: nothing of it becomes visible. What it uploaded is found again by later sessions.
    pub async fn abort(&self, reason: &str) -> Result<(), SessionError> {
        let mut uploads = std::mem::take(&mut *self.uploads.lock().unwrap_or_else(PoisonError::into_inner));
        uploads.shutdown().await;
        if std::mem::replace(&mut self.shared.lock().closed, true) {
            return Err(SessionError::Closed { session: self.id() });
        }
        // Useful to later sessions only, so a failure here must not keep the session from being decided.
        if let Err(error) = self.shared.publish().await {
            debug!(session = %self.id(), %error, "the index of an aborted session was not published");
        }
        self.decide(Decision::abort_bytes(self.id(), reason).into(), "abort").await?;
        self.heart.end().await;
        info!(session = %self.id(), reason, "aborted");
        Ok(())
    }

    async fn decide(&self, bytes: Bytes, act: &'static str) -> Result<(), SessionError> {
        let key = decision_key(self.id());
        let store = &self.shared.engine.store;
        let fail = |source| SessionError::Store { session: self.id(), act, source: Arc::new(source) };
        if store.put_if_absent(&key, bytes.into()).await.map_err(fail)?.is_ours() {
            return Ok(());
        }
        let decided = store.get(&key, MAX_DECISION_BYTES).await.map_err(fail)?;
        match Decision::parse(self.id(), &decided) {
            Ok(Decision::Abort(_)) if act == "abort" => Ok(()),
            Ok(Decision::Abort(_)) => Err(SessionError::AbortedByAnother { session: self.id() }),
            _ => Err(SessionError::Closed { session: self.id() }),
        }
    }

    /// Refers to a chunk that the repository has; `None`: it has to be put.
    pub(crate) async fn refer_to_known(&self, id: ChunkId, len: u32) -> Result<Option<ChunkRef>, SessionError> {
        let own = self.shared.usable()?.own.get(&id).copied();
        let place = match own {
            Some(place) => Some(place),
            None => self.shared.find(&id, len as usize).await?,
        };
        Ok(place.map(|place| {
            self.shared.refer(place);
            ChunkRef { id, len, place }
        }))
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless the session failed or ended.
    pub(super) fn usable(&self) -> Result<MutexGuard<'_, Writing>, SessionError> {
        let writing = self.lock();
        match &writing.failed {
            Some(error) => Err(error.clone()),
            None if writing.closed => Err(SessionError::Closed { session: self.id }),
            None => Ok(writing),
        }
    }

    fn fail(&self, error: SessionError) {
        warn!(session = %self.id, %error, "an upload failed");
        self.lock().failed.get_or_insert(error);
    }

    fn worker_failed(&self, error: &JoinError) -> SessionError {
        SessionError::Worker { session: self.id, what: error.to_string() }
    }

    async fn put(&self, key: &str, bytes: Bytes, act: &'static str) -> Result<(), SessionError> {
        let outcome = self.engine.store.put_if_absent(key, bytes.into()).await;
        match outcome {
            Ok(outcome) if outcome.is_ours() => Ok(()),
            // Keys hold a random id that is this session's alone: only this session can have made the object, and
            // with other bytes only when a process was copied while it ran.
            Ok(_) => Err(SessionError::Closed { session: self.id }),
            Err(source) => Err(SessionError::Store { session: self.id, act, source: Arc::new(source) }),
        }
    }

    pub(super) async fn upload(&self, pack: OpenPack) -> Result<(), SessionError> {
        let OpenPack { builder, permit } = pack;
        let kind = builder.kind();
        let ciphers = Arc::clone(&self.ciphers);
        let sealed = tokio::task::spawn_blocking(move || builder.seal(&ciphers.structure))
            .await
            .map_err(|error| self.worker_failed(&error))?
            .map_err(|_| SessionError::Seal { session: self.id, what: "a pack" })?;
        let bytes = sealed.payload.len();
        let key = crate::pack::pack_key(sealed.id);
        let outcome = self.engine.store.put_if_absent(&key, sealed.payload.clone()).await;
        match outcome {
            Ok(outcome) if outcome.is_ours() => {}
            Ok(_) => return Err(SessionError::Closed { session: self.id }),
            Err(source) => {
                return Err(SessionError::Store { session: self.id, act: "upload a pack", source: Arc::new(source) });
            }
        }
        self.counters.uploaded_bytes.fetch_add(bytes, Ordering::Relaxed);
        if kind == PackKind::Metadata {
            let (cache, id, payload) = (self.engine.cache.clone(), sealed.id, sealed.payload.clone());
            let keep = move || cache.put_pack(id, &payload);
            tokio::task::spawn_blocking(keep).await.map_err(|error| self.worker_failed(&error))?;
        }
        let is_due = {
            let mut writing = self.lock();
            let seq = sealed.id.seq;
            writing.unpublished.extend(sealed.entries().map(|(id, slot, plain_len)| SegmentEntry {
                id,
                seq,
                slot,
                plain_len,
            }));
            writing.unpublished_packs += 1;
            writing.unpublished_packs >= PACKS_PER_SEGMENT || writing.unpublished.len() >= SEGMENT_ENTRIES
        };
        drop(permit);
        if is_due { self.publish().await } else { Ok(()) }
    }

    /// Publishes an index segment for the packs uploaded since the last.
    async fn publish(&self) -> Result<(), SessionError> {
        let mut next = self.next_segment.lock().await;
        let entries = {
            let mut writing = self.lock();
            writing.unpublished_packs = 0;
            std::mem::take(&mut writing.unpublished)
        };
        if entries.is_empty() {
            return Ok(());
        }
        let places: Vec<_> = entries.iter().map(|entry| (entry.id, entry.seq, entry.slot)).collect();
        let bytes = Bytes::from(encode_segment(entries));
        let key = segment_key(self.id, *next);
        // When it fails, its number stays: nothing must be published behind a gap.
        self.put(&key, bytes.clone(), "publish its index").await.map_err(|error| match error {
            // Nobody else puts anything there but expiry: the SEAL of a session that it aborted.
            SessionError::Closed { session } => SessionError::AbortedByAnother { session },
            error => error,
        })?;
        *next += 1;
        self.engine.cache.put(&key, &bytes);
        match Segment::parse(self.id, bytes) {
            Ok(segment) => self.engine.index.add(key, segment),
            Err(error) => warn!(session = %self.id, %error, "an index segment does not read back"),
        }
        // From now on the index has them, so that what is remembered does not grow with the backup.
        let mut writing = self.lock();
        for (id, seq, slot) in places {
            let place = Place { pack: PackId { session: self.id, seq }, slot };
            if writing.own.get(&id) == Some(&place) {
                writing.own.remove(&id);
            }
        }
        Ok(())
    }

    /// Whether a reference to this place is good: expiry does not delete it, and the chunk is not lost.
    pub(super) fn may_refer(&self, place: Place) -> bool {
        !self.mask.packs.contains(place.pack) && !self.engine.lost.covers(place)
    }

    /// Where the repository has the chunk already, as the pack's own directory says.
    pub(super) async fn find(&self, id: &ChunkId, plain_len: usize) -> Result<Option<Place>, SessionError> {
        // What was stored together is met together: the packs of the last answers first.
        for (place, entry) in self.engine.directories.recent(id) {
            if entry.expected.plain_len as usize == plain_len && self.may_refer(place) {
                return Ok(Some(place));
            }
        }
        let fail = |act| move |source| SessionError::Store { session: self.id, act, source: Arc::new(source) };
        let load = async || self.engine.index.refresh().await.map_err(fail("load the index"));
        self.index.get_or_try_init(load).await?;
        for place in self.engine.index.find(id).await.map_err(fail("look up a chunk"))? {
            if self.mask.packs.contains(place.pack) {
                continue;
            }
            match self.engine.directories.slot(place.pack, id).await {
                Ok(Some((place, _, _))) if !self.may_refer(place) => {
                    debug!(%place, "a chunk that expires or is lost is stored again");
                }
                Ok(Some((place, entry, _))) if entry.expected.plain_len as usize == plain_len => {
                    return Ok(Some(place));
                }
                Ok(_) => debug!(%place, "the index names a slot that holds another chunk"),
                Err(error) => self.ignore_unless_store_fails(place, error)?,
            }
        }
        Ok(None)
    }

    /// A pack that is gone or damaged is not used: the chunk is stored again. A store that fails is an error.
    fn ignore_unless_store_fails(
        &self,
        place: Place,
        error: crate::directories::DirectoryError,
    ) -> Result<(), SessionError> {
        use crate::directories::DirectoryError;
        let source = match error {
            DirectoryError::Store(source) | DirectoryError::Keys(KeyRingError::Store(source)) => source,
            DirectoryError::Keys(error) => {
                warn!(%place, %error, "a pack is not used for deduplication");
                return Ok(());
            }
            DirectoryError::Damaged(error) => {
                warn!(%place, %error, "a damaged pack is not used for deduplication");
                return Ok(());
            }
        };
        if matches!(source.class(), ErrorClass::NotFound | ErrorClass::Damaged) {
            return Ok(());
        }
        Err(SessionError::Store { session: self.id, act: "look up a chunk", source: Arc::new(source) })
    }

    /// A number for a frame's nonce, never given twice under one key.
    fn count(&self, kind: ChunkKind) -> Result<u32, SessionError> {
        let counter = if kind.is_metadata() { &self.metadata_counter } else { &self.data_counter };
        u32::try_from(counter.fetch_add(1, Ordering::Relaxed))
            .map_err(|_| SessionError::Seal { session: self.id, what: "more than 2^32 chunks: split the backup" })
    }

    /// Compresses and seals on a worker thread, holding the budget that the sealed bytes need.
    pub(super) async fn seal(
        &self,
        kind: ChunkKind,
        id: ChunkId,
        plain: Bytes,
    ) -> Result<(SealedFrame, OwnedSemaphorePermit), SessionError> {
        let session = self.id;
        let permits = u32::try_from(plain.len() / PERMIT_BYTES + 1).unwrap_or(u32::MAX);
        let mut permit =
            Arc::clone(&self.budget).acquire_many_owned(permits).await.map_err(|_| SessionError::Closed { session })?;
        let counter = self.count(kind)?;
        let ciphers = Arc::clone(&self.ciphers);
        let compression = if kind.is_metadata() { Compression::FAST } else { self.compression };
        let experience = (!kind.is_metadata()).then(|| Arc::clone(&self.experience));
        let seal = move || {
            let fail = SessionError::Seal { session, what: "a chunk" };
            let Some(cipher) = ciphers.frame(kind) else { return Err(fail) };
            let level = match (&experience, compression.zstd_level()) {
                (Some(experience), Some(level)) => experience.level(&plain, level),
                (_, level) => level,
            };
            let frame = seal_frame(cipher, counter, kind, id, plain, level).map_err(|_| fail)?;
            if let Some(experience) = experience {
                experience.note(frame.codec);
            }
            Ok(frame)
        };
        // More at once would only take turns, each with a compression context of its own.
        let sealer = self.sealers.acquire().await.map_err(|_| SessionError::Closed { session })?;
        let frame = tokio::task::spawn_blocking(seal).await.map_err(|error| self.worker_failed(&error))??;
        drop(sealer);
        // What compression saved goes back to the budget; the rest is held until the pack is uploaded.
        if let Some(saved) = permit.num_permits().checked_sub(frame.bytes.len() / PERMIT_BYTES + 1) {
            drop(permit.split(saved));
        }
        Ok((frame, permit))
    }

    /// Appends the frame to the open pack of its kind; also gives back the pack when that filled it.
    ///
    /// `Err(place)`: another stream stored the same chunk meanwhile.
    pub(super) fn append(
        &self,
        frame: SealedFrame,
        permit: OwnedSemaphorePermit,
    ) -> Result<Result<(Place, Option<OpenPack>), Place>, SessionError> {
        let mut writing = self.usable()?;
        if let Some(place) = writing.own.get(&frame.id) {
            return Ok(Err(*place));
        }
        let kind = if frame.kind.is_metadata() { PackKind::Metadata } else { PackKind::Data };
        let open = writing.open_pack(kind).take();
        let mut open = open.unwrap_or_else(|| {
            let seq = writing.next_pack;
            writing.next_pack += 1;
            OpenPack { builder: PackBuilder::new(PackId { session: self.id, seq }, kind), permit: None }
        });
        let id = frame.id;
        let place = Place { pack: open.builder.id, slot: open.builder.push(frame) };
        match &mut open.permit {
            Some(held) => held.merge(permit),
            none => *none = Some(permit),
        }
        writing.own.insert(id, place);
        if open.is_full() {
            return Ok(Ok((place, Some(open))));
        }
        *writing.open_pack(kind) = Some(open);
        Ok(Ok((place, None)))
    }

    /// Notes that the session refers to the place.
    pub(super) fn refer(&self, place: Place) {
        self.counters.chunks.fetch_add(1, Ordering::Relaxed);
        self.lock().refs.insert(place);
    }
}
