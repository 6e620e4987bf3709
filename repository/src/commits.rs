//! The log of decided sessions: which are committed, and what they say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{StreamExt, TryStreamExt};
use thiserror::Error;
use tracing::debug;

use crate::cache::ObjectCache;
use crate::error::{Classified, ErrorClass};
use crate::id::SessionId;
use crate::keyring::{KeyRing, KeyRingError};
use crate::session::decision::{
    Commit, DECISION_PREFIX, Decision, DecisionError, MAX_DECISION_BYTES, SeenCommit, decision_key, parse_decision_key,
};
use crate::snapshot::Snapshot;
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

/// What is known of decided sessions.
#[derive(Debug)]
pub(crate) struct CommitLog {
    store: Arc<dyn Store>,
    cache: ObjectCache,
    keys: Arc<KeyRing>,
    known: Mutex<BTreeMap<SessionId, Option<Arc<Committed>>>>,
}

impl CommitLog {
    pub(crate) fn new(store: Arc<dyn Store>, cache: ObjectCache, keys: Arc<KeyRing>) -> Self {
        Self { store, cache, keys, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<SessionId, Option<Arc<Committed>>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the decisions made since.
    pub(crate) async fn refresh(&self) -> Result<(), CommitLogError> {
        let listed: Vec<_> = self.store.list(DECISION_PREFIX).try_collect().await?;
        let mut new: BTreeSet<_> = listed.iter().filter_map(|object| parse_decision_key(&object.key)).collect();
        {
            let known = self.known();
            new.retain(|session| !known.contains_key(session));
        }
        let decisions: Vec<_> = futures::stream::iter(new)
            .map(|session| async move { Ok::<_, CommitLogError>((session, self.fetch(session).await?)) })
            .buffer_unordered(PARALLEL_FETCHES)
            .try_collect()
            .await?;
        self.known().extend(decisions);
        Ok(())
    }

    async fn fetch(&self, session: SessionId) -> Result<Option<Arc<Committed>>, CommitLogError> {
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
                Ok(None)
            }
            Decision::Commit(sealed) => {
                let keys = match self.keys.get(session).await {
                    Ok(keys) => keys,
                    Err(KeyRingError::Store(error)) if !error.is_not_found() => return Err(error.into()),
                    Err(error) => return Err(damaged(error.to_string())),
                };
                let commit = Commit::open(session, sealed, &keys.structure)
                    .map_err(|error: DecisionError| damaged(error.to_string()))?;
                Ok(Some(Arc::new(Committed { commit, hash: blake3::hash(&bytes).to_hex().to_string() })))
            }
        }
    }

    /// Notes a commit that this process made.
    pub(crate) fn add_own(&self, session: SessionId, bytes: &[u8], commit: &Commit) {
        let committed = Committed { commit: commit.clone(), hash: blake3::hash(bytes).to_hex().to_string() };
        self.known().insert(session, Some(Arc::new(committed)));
    }

    /// All commits that are known, by session.
    pub(crate) fn all(&self) -> Vec<(SessionId, Arc<Committed>)> {
        self.known()
            .iter()
            .filter_map(|(session, committed)| Some((*session, Arc::clone(committed.as_ref()?))))
            .collect()
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

    /// The hash of the refset that was committed with a snapshot.
    pub(crate) fn refset_hash(&self, snapshot: &Snapshot) -> Option<String> {
        let known = self.known();
        let committed = known.get(&snapshot.session)?.as_ref()?;
        committed.commit.refsets.iter().find(|refset| refset.snapshot == snapshot.id).map(|refset| refset.hash.clone())
    }

    /// Commits that others saw but that are not there now, or are there with other bytes.
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
