//! The log of decided sessions: which are committed, what they say, and which of their snapshots are forgotten.
//!
//! It follows listings, so it may lag behind: a view for people, for parents and for candidates of expiry. What is deleted
//! is never decided by it alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::{FutureExt, TryStreamExt};
use thiserror::Error;
use tracing::{debug, warn};

use crate::cache::ObjectCache;
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::{
    LiveRefs, MAX_TOMBSTONE_BYTES, MarkKey, TOMBSTONE_PREFIX, check_tombstone, parse_tombstone_key,
};
use crate::id::{SessionId, SnapshotId};
use crate::keyring::{KeyRing, KeyRingError};
use crate::parallel::at_once;
use crate::session::decision::{
    Commit, DECISION_PREFIX, Decision, DecisionError, MAX_DECISION_BYTES, SeenCommit, decision_key, parse_decision_key,
};
use crate::store::{Store, StoreError};

/// Decisions fetched at once.
const PARALLEL_FETCHES: usize = 16;

/// A commit log that cannot be read.
#[derive(Debug, Error)]
pub enum CommitLogError {
    /// The store failed.
    #[error("cannot read the list of snapshots")]
    Store(#[from] StoreError),
    /// A commit is not what was written.
    #[error("the commit of the session {session} is damaged: {what}")]
    Damaged {
        /// The session.
        session: SessionId,
        /// What does not fit.
        what: String,
    },
}

impl Classified for CommitLogError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Store(source) => source.class(),
            Self::Damaged { .. } => ErrorClass::Damaged,
        }
    }
}

/// A committed session.
#[derive(Debug)]
pub(crate) struct Committed {
    pub(crate) commit: Commit,
    hash: String,
}

/// How a session was decided.
#[derive(Debug, Clone)]
pub(crate) enum Decided {
    Committed(Arc<Committed>),
    Aborted,
}

/// What is known of decided sessions.
#[derive(Debug)]
pub(crate) struct CommitLog {
    store: Arc<dyn Store>,
    cache: ObjectCache,
    keys: Arc<KeyRing>,
    known: Mutex<BTreeMap<SessionId, Decided>>,
    forgotten: Mutex<BTreeSet<SnapshotId>>,
}

impl CommitLog {
    pub(crate) fn new(store: Arc<dyn Store>, cache: ObjectCache, keys: Arc<KeyRing>) -> Self {
        Self { store, cache, keys, known: Mutex::default(), forgotten: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<SessionId, Decided>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forgotten(&self) -> MutexGuard<'_, BTreeSet<SnapshotId>> {
        self.forgotten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the decisions and tombstones made since, and leaves out what expired.
    pub(crate) async fn refresh(&self) -> Result<(), CommitLogError> {
        self.refresh_readable().await?.pop().map_or(Ok(()), Err)
    }

    /// As [`Self::refresh`], as far as decisions are whole; gives back why the others are not.
    ///
    /// For lists and checks. Whatever decides what is deleted must see every commit, and so must not use this.
    pub(crate) async fn refresh_readable(&self) -> Result<Vec<CommitLogError>, CommitLogError> {
        // Tombstones first: a commit that appears after this listing cannot have an older tombstone that is missed.
        self.refresh_tombstones().await?;
        let listed: Vec<_> = self.store.list(DECISION_PREFIX).try_collect().await?;
        let listed: BTreeSet<_> = listed.iter().filter_map(|object| parse_decision_key(&object.key)).collect();
        let (new, absent): (Vec<_>, Vec<_>) = {
            let known = self.known();
            let new = listed.iter().copied().filter(|session| !known.contains_key(session)).collect();
            (new, known.keys().copied().filter(|session| !listed.contains(session)).collect())
        };
        let work = new.into_iter().map(|session| {
            async move {
                match self.decided(session).await {
                    Err(error @ CommitLogError::Damaged { .. }) => Ok(Some(error)),
                    decided => decided.map(|_| None),
                }
            }
            .boxed()
        });
        let damaged = at_once(PARALLEL_FETCHES, work.collect()).await?.into_iter().flatten().collect();
        for session in absent {
            // The listing may be stale: asked of the store itself.
            match self.store.size(&decision_key(session)).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => self.leave_out(session),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(damaged)
    }

    async fn refresh_tombstones(&self) -> Result<(), CommitLogError> {
        let listed: Vec<_> = self.store.list(TOMBSTONE_PREFIX).try_collect().await?;
        let new: Vec<_> = {
            let forgotten = self.forgotten();
            let found = listed.iter().filter_map(|object| parse_tombstone_key(&object.key));
            found.filter(|snapshot| !forgotten.contains(snapshot)).collect()
        };
        let key = MarkKey::new(self.keys.domain().structure.bytes());
        let key = &key;
        let work = new.into_iter().map(|snapshot| {
            async move { Ok::<_, CommitLogError>((snapshot, self.is_forgotten(key, snapshot).await?)) }.boxed()
        });
        let found = at_once(PARALLEL_FETCHES, work.collect()).await?;
        self.forgotten().extend(found.into_iter().filter(|(_, is)| *is).map(|(snapshot, _)| snapshot));
        Ok(())
    }

    /// Whether the tombstone is there and of this repository.
    async fn is_forgotten(&self, key: &MarkKey, snapshot: SnapshotId) -> Result<bool, CommitLogError> {
        let name = crate::expire::marks::tombstone_key(snapshot);
        match self.store.get(&name, MAX_TOMBSTONE_BYTES).await {
            Ok(bytes) => match check_tombstone(key, snapshot, &bytes) {
                Ok(()) => Ok(true),
                Err(error) => {
                    warn!(%snapshot, %error, "a tombstone is not heeded");
                    Ok(false)
                }
            },
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Drops what is known of a session whose decision was removed.
    pub(crate) fn leave_out(&self, session: SessionId) {
        self.known().remove(&session);
        self.cache.forget(&decision_key(session));
    }

    /// How the session was decided; `None`: it was not, or expired. Asked of the store itself unless it is known.
    pub(crate) async fn decided(&self, session: SessionId) -> Result<Option<Decided>, CommitLogError> {
        let known = self.known().get(&session).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let fetched = self.fetch(session).await?;
        if let Some(decided) = &fetched {
            self.known().insert(session, decided.clone());
        }
        Ok(fetched)
    }

    async fn fetch(&self, session: SessionId) -> Result<Option<Decided>, CommitLogError> {
        let key = decision_key(session);
        let bytes = match self.cache.get(&*self.store, &key, MAX_DECISION_BYTES).await {
            Ok(bytes) => bytes,
            // Listed, but expired and removed since.
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = |what: String| {
            self.cache.forget(&key);
            CommitLogError::Damaged { session, what }
        };
        match Decision::parse(session, &bytes).map_err(|error| damaged(error.to_string()))? {
            Decision::Abort(reason) => {
                debug!(%session, reason, "aborted session");
                Ok(Some(Decided::Aborted))
            }
            Decision::Commit(sealed) => {
                let keys = match self.keys.get(session).await {
                    Ok(keys) => keys,
                    Err(KeyRingError::Store(error)) if !error.is_not_found() => return Err(error.into()),
                    Err(error) => return Err(damaged(error.to_string())),
                };
                let commit = Commit::open(session, sealed, &keys.structure)
                    .map_err(|error: DecisionError| damaged(error.to_string()))?;
                let hash = blake3::hash(&bytes).to_hex().to_string();
                Ok(Some(Decided::Committed(Arc::new(Committed { commit, hash }))))
            }
        }
    }

    /// Notes a commit that this process made.
    pub(crate) fn add_own(&self, session: SessionId, bytes: &Bytes, commit: &Commit) {
        self.cache.put(&decision_key(session), bytes);
        let committed = Committed { commit: commit.clone(), hash: blake3::hash(bytes).to_hex().to_string() };
        self.known().insert(session, Decided::Committed(Arc::new(committed)));
    }

    /// Notes a tombstone that this process set.
    pub(crate) fn add_forgotten(&self, snapshot: SnapshotId) {
        self.forgotten().insert(snapshot);
    }

    /// The snapshots with tombstones.
    pub(crate) fn all_forgotten(&self) -> BTreeSet<SnapshotId> {
        self.forgotten().clone()
    }

    /// All commits that are known, by session.
    pub(crate) fn all(&self) -> Vec<(SessionId, Arc<Committed>)> {
        let known = self.known();
        let commits = known.iter().filter_map(|(session, decided)| match decided {
            Decided::Committed(committed) => Some((*session, Arc::clone(committed))),
            Decided::Aborted => None,
        });
        commits.collect()
    }

    /// The sessions that are known to have been aborted.
    pub(crate) fn aborted(&self) -> BTreeSet<SessionId> {
        let known = self.known();
        known.iter().filter(|(_, decided)| matches!(decided, Decided::Aborted)).map(|(session, _)| *session).collect()
    }

    /// The sessions that repacked.
    pub(crate) fn movers(&self) -> BTreeSet<SessionId> {
        self.all()
            .into_iter()
            .filter(|(_, committed)| committed.commit.is_mover())
            .map(|(session, _)| session)
            .collect()
    }

    /// The newest references of each snapshot that a known commit names.
    pub(crate) fn references(&self) -> BTreeMap<SnapshotId, LiveRefs> {
        let mut newest: BTreeMap<SnapshotId, LiveRefs> = BTreeMap::new();
        for (session, committed) in self.all() {
            for refset in &committed.commit.refsets {
                let found = LiveRefs {
                    snapshot: refset.snapshot,
                    version: refset.version,
                    hash: refset.hash_bytes(),
                    by: session,
                };
                let kept = newest.entry(found.snapshot).or_insert(found);
                if kept.version < found.version {
                    *kept = found;
                }
            }
        }
        newest
    }

    /// The commits that no other known commit names: a new one that names them names all.
    pub(crate) fn heads(&self) -> Vec<SeenCommit> {
        let all = self.all();
        let named: BTreeSet<_> = all.iter().flat_map(|(_, c)| c.commit.saw.iter().map(|seen| seen.session)).collect();
        all.iter()
            .filter(|(session, _)| !named.contains(session))
            .map(|(session, committed)| SeenCommit { session: *session, hash: committed.hash.clone() })
            .collect()
    }

    /// Commits that others saw but that are not there now, or are there with other bytes. Expired ones are among them.
    pub(crate) fn omissions(&self) -> Vec<SessionId> {
        let all: BTreeMap<_, _> = self.all().into_iter().collect();
        let mut missing: Vec<_> = all
            .values()
            .flat_map(|committed| &committed.commit.saw)
            .filter(|seen| all.get(&seen.session).is_none_or(|now| now.hash != seen.hash))
            .map(|seen| seen.session)
            .collect();
        missing.sort_unstable();
        missing.dedup();
        missing
    }
}
