//! A store in memory that is stricter than real ones, and keeps a journal of its mutations.
//!
//! It refuses keys that some real store would refuse, and lists in random order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};

use super::{ByteRange, Listed, Payload, PutOutcome, Reason, Store, StoreError};

/// A change of the store.
#[derive(Debug, Clone)]
pub enum Mutation {
    /// An object was created.
    Create(String, Bytes),
    /// An object was deleted.
    Delete(String),
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    journal: Vec<Mutation>,
}

/// A store in memory. Clones share the objects.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    state: Arc<Mutex<State>>,
}

impl Memory {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// A store with the objects that these mutations leave.
    pub fn replay(journal: &[Mutation]) -> Self {
        let memory = Self::new();
        memory.with(|state| {
            for mutation in journal {
                match mutation {
                    Mutation::Create(key, bytes) => state.objects.insert(key.clone(), bytes.clone()),
                    Mutation::Delete(key) => state.objects.remove(key),
                };
            }
        });
        memory
    }

    /// Everything that changed the store, in order.
    pub fn journal(&self) -> Vec<Mutation> {
        self.with(|state| state.journal.clone())
    }

    /// All keys, sorted.
    pub fn keys(&self) -> Vec<String> {
        self.with(|state| state.objects.keys().cloned().collect())
    }

    /// An object's bytes.
    pub fn object(&self, key: &str) -> Option<Bytes> {
        self.with(|state| state.objects.get(key).cloned())
    }

    /// Replaces an object's bytes behind the repository's back, as decay or an attacker would.
    pub fn overwrite(&self, key: &str, bytes: Bytes) {
        self.with(|state| state.objects.insert(key.to_owned(), bytes));
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn found(&self, operation: &'static str, key: &str) -> Result<Bytes, StoreError> {
        self.object(key).ok_or_else(|| failed(operation, key, Reason::NotFound))
    }
}

fn failed(operation: &'static str, key: &str, reason: Reason) -> StoreError {
    StoreError { operation, key: key.to_owned(), store: "memory".to_owned(), reason, source: None }
}

/// Whether every real store takes this key.
fn is_portable(key: &str) -> bool {
    let fits = |segment: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        (1..=128).contains(&segment.len()) && segment.bytes().all(known) && segment != "." && segment != ".."
    };
    key.len() <= 512 && key.split('/').all(fits)
}

#[async_trait]
impl Store for Memory {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        if !is_portable(key) {
            return Err(failed("create", key, Reason::Refused));
        }
        tokio::task::yield_now().await;
        let bytes = payload.to_bytes();
        self.with(|state| {
            if state.objects.contains_key(key) {
                return Ok(PutOutcome::Exists);
            }
            // File systems and some servers cannot have an object below another.
            let below = format!("{key}/");
            let above = key.match_indices('/').map(|(at, _)| &key[..at]);
            let has_below = state.objects.range(below.clone()..).next().is_some_and(|(k, _)| k.starts_with(&below));
            if has_below || above.into_iter().any(|above| state.objects.contains_key(above)) {
                return Err(failed("create", key, Reason::Refused));
            }
            state.objects.insert(key.to_owned(), bytes.clone());
            state.journal.push(Mutation::Create(key.to_owned(), bytes));
            Ok(PutOutcome::Created)
        })
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        tokio::task::yield_now().await;
        let bytes = self.found("read", key)?;
        let size = bytes.len() as u64;
        if size > limit {
            return Err(failed("read", key, Reason::TooLarge { size, limit }));
        }
        Ok(bytes)
    }

    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError> {
        tokio::task::yield_now().await;
        let bytes = self.found("read", key)?;
        let len = bytes.len() as u64;
        let range = match range {
            ByteRange::Bounded(range) => range,
            ByteRange::Suffix(count) => len.saturating_sub(count)..len,
        };
        let out_of_range = || failed("read", key, Reason::OutOfRange);
        if range.start > range.end || range.end > len {
            return Err(out_of_range());
        }
        let bound = |at: u64| usize::try_from(at).map_err(|_| out_of_range());
        Ok(bytes.slice(bound(range.start)?..bound(range.end)?))
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        tokio::task::yield_now().await;
        Ok(self.found("look at", key)?.len() as u64)
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>> {
        let mut found: Vec<_> = self.with(|state| {
            let all = state.objects.iter().filter(|(key, _)| key.starts_with(prefix));
            all.map(|(key, bytes)| Listed { key: key.clone(), size: bytes.len() as u64 }).collect()
        });
        found.sort_by_cached_key(|_| rand::random::<u64>());
        stream::iter(found.into_iter().map(Ok)).boxed()
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        tokio::task::yield_now().await;
        self.with(|state| {
            if state.objects.remove(key).is_some() {
                state.journal.push(Mutation::Delete(key.to_owned()));
            }
        });
        Ok(())
    }
}
