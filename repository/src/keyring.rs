//! The keys of sessions, fetched once and opened with the domain's keys.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use thiserror::Error;

use crate::cache::ObjectCache;
use crate::crypto::{Cipher, CryptoError};
use crate::id::SessionId;
use crate::keys::{DomainKeys, KeyObjectError, SessionKeys, session_key_object};
use crate::sink::ChunkKind;
use crate::store::{Store, StoreError};

/// No key object is larger.
const MAX_KEY_OBJECT_BYTES: u64 = 4096;

/// A session's keys, ready for use.
#[derive(Debug)]
pub(crate) struct SessionCiphers {
    data: Option<Cipher>,
    manifest: Cipher,
    pub(crate) structure: Cipher,
}

impl SessionCiphers {
    pub(crate) fn new(keys: &SessionKeys) -> Result<Self, CryptoError> {
        Ok(Self {
            data: keys.data.as_ref().map(Cipher::new).transpose()?,
            manifest: Cipher::new(&keys.manifest)?,
            structure: Cipher::new(&keys.structure)?,
        })
    }

    /// The cipher of a chunk's frame; `None`: it needs the private key.
    pub(crate) fn frame(&self, kind: ChunkKind) -> Option<&Cipher> {
        if kind.is_metadata() { Some(&self.manifest) } else { self.data.as_ref() }
    }
}

/// Why a session's keys are not there.
#[derive(Debug, Error)]
pub(crate) enum KeyRingError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the keys of the session {session} cannot be used: {source}")]
    Object { session: SessionId, source: KeyObjectError },
}

/// Opens and remembers session keys.
#[derive(Debug)]
pub(crate) struct KeyRing {
    store: Arc<dyn Store>,
    cache: ObjectCache,
    domain: DomainKeys,
    /// Key of the slot that opened the repository.
    slot: String,
    known: Mutex<HashMap<SessionId, Arc<SessionCiphers>>>,
}

impl KeyRing {
    pub(crate) fn new(store: Arc<dyn Store>, cache: ObjectCache, domain: DomainKeys, slot: String) -> Self {
        Self { store, cache, domain, slot, known: Mutex::default() }
    }

    /// Key of the slot that opened the repository.
    pub(crate) fn slot(&self) -> &str {
        &self.slot
    }

    pub(crate) fn domain(&self) -> &DomainKeys {
        &self.domain
    }

    /// The keys of a session.
    pub(crate) async fn get(&self, session: SessionId) -> Result<Arc<SessionCiphers>, KeyRingError> {
        if let Some(known) = self.known().get(&session) {
            return Ok(Arc::clone(known));
        }
        let key = session_key_object(session);
        let bytes = self.cache.get(&*self.store, &key, MAX_KEY_OBJECT_BYTES).await?;
        let opened = SessionKeys::open(&bytes, session, &self.domain).and_then(|keys| Ok(SessionCiphers::new(&keys)?));
        let ciphers = Arc::new(opened.map_err(|source| {
            self.cache.forget(&key);
            KeyRingError::Object { session, source }
        })?);
        self.known().insert(session, Arc::clone(&ciphers));
        Ok(ciphers)
    }

    /// Makes the keys of a new session and stores them.
    pub(crate) async fn create(&self, session: SessionId) -> Result<Arc<SessionCiphers>, KeyRingError> {
        let keys = SessionKeys::random();
        let refuse = |source| KeyRingError::Object { session, source };
        let bytes = keys.seal(session, &self.domain).map_err(refuse)?;
        let ciphers = Arc::new(SessionCiphers::new(&keys).map_err(|error| refuse(error.into()))?);
        // The session is random: an object that exists is this very one, after a lost answer.
        let (key, bytes) = (session_key_object(session), Bytes::from(bytes));
        self.store.put_if_absent(&key, bytes.clone().into()).await?;
        self.cache.put(&key, &bytes);
        self.known().insert(session, Arc::clone(&ciphers));
        Ok(ciphers)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<SessionId, Arc<SessionCiphers>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
