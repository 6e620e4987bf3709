//! Finds out whether a store honours put-if-absent; a repository on one that does not would lose data.

use thiserror::Error;

use super::{Payload, PutOutcome, Store, StoreError};
use crate::error::{Classified, ErrorClass};

/// Why a store was refused.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The store overwrites an object that exists.
    #[error(
        "the store {store} overwrites objects although asked to create them only if absent; \
         a repository needs this (on S3: If-None-Match on PUT), use another server or a newer version of it"
    )]
    NoPutIfAbsent {
        /// The store.
        store: String,
    },
    /// The store failed.
    #[error("cannot find out whether the store honours put-if-absent")]
    Store(#[from] StoreError),
}

impl Classified for ProbeError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::NoPutIfAbsent { .. } => ErrorClass::Unsupported,
            Self::Store(source) => source.class(),
        }
    }
}

/// Probes with an object of its own, which it deletes when it may.
pub async fn probe(store: &dyn Store) -> Result<(), ProbeError> {
    let key = format!("probe/{}", crate::id::SessionId::random());
    let first = store.put_if_absent(&key, Payload::from(b"first".to_vec())).await?;
    let second = store.put_if_absent(&key, Payload::from(b"second".to_vec())).await?;
    let kept = store.get(&key, 64).await?;
    let cleaned = store.delete(&key).await;
    if !first.is_ours() || second != PutOutcome::Exists || kept != b"first".as_slice() {
        return Err(ProbeError::NoPutIfAbsent { store: store.describe() });
    }
    match cleaned {
        // Credentials without the right to delete are meant to be used; the probe's object may stay.
        Err(error) if error.class() != ErrorClass::Permission => Err(error.into()),
        _ => Ok(()),
    }
}

/// Probes with an object that is known to exist, by offering the very same bytes: a store that ignored the
/// condition would change nothing. Leaves no trace. Credentials that may not write pass: they cannot harm.
pub async fn probe_with(store: &dyn Store, key: &str, bytes: Payload) -> Result<(), ProbeError> {
    match store.put_if_absent(key, bytes).await {
        Ok(PutOutcome::Exists | PutOutcome::CreatedEarlier) => Ok(()),
        Ok(PutOutcome::Created) => Err(ProbeError::NoPutIfAbsent { store: store.describe() }),
        Err(error) if error.class() == ErrorClass::Permission => Ok(()),
        Err(error) => Err(error.into()),
    }
}
