//! Finds the key slot that a secret opens: the one that opened the repository last on this machine comes first.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use tracing::warn;

use super::slot::{KEYS_PREFIX, MAX_SLOT_BYTES, Slot, SlotError};
use super::{DomainKeys, Secret};
use crate::cache::ObjectCache;
use crate::id::SessionId;
use crate::repository::OpenError;
use crate::store::{Store, StoreError};

/// Where the cache keeps the key of the slot that opened the repository last.
const LAST: &str = "slot";

/// The slots that may open a repository.
#[derive(Debug)]
pub(crate) struct Slots {
    store: Arc<dyn Store>,
    remembered: ObjectCache,
    last: Option<(String, Bytes)>,
    /// `None`: they were not listed, because the last one is there.
    listed: Option<Vec<String>>,
    usable: usize,
    damaged: usize,
}

impl Slots {
    /// Fetches the last slot, or lists all. `remembered` is the cache of the repository's location.
    pub(crate) async fn find(store: Arc<dyn Store>, remembered: ObjectCache) -> Result<Self, StoreError> {
        let is_slot =
            |key: &String| key.strip_prefix(KEYS_PREFIX).is_some_and(|name| name.parse::<SessionId>().is_ok());
        let key = remembered.get_local(LAST).await.and_then(|key| String::from_utf8(key.to_vec()).ok()).filter(is_slot);
        let mut slots = Self { store, remembered, last: None, listed: None, usable: 0, damaged: 0 };
        if let Some(key) = key {
            slots.last = slots.fetch(&key).await?.map(|bytes| (key, bytes));
        }
        if slots.last.is_none() {
            slots.listed = Some(slots.list().await?);
        }
        Ok(slots)
    }

    async fn list(&self) -> Result<Vec<String>, StoreError> {
        self.store.list(KEYS_PREFIX).map_ok(|object| object.key).try_collect().await
    }

    async fn fetch(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self.store.get(key, MAX_SLOT_BYTES).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tries the secret on every slot that belongs to the config; the keys, and the key of the slot that gave them.
    pub(crate) async fn open(
        mut self,
        secret: &Secret,
        config_hash: &[u8; 32],
    ) -> Result<(DomainKeys, String), OpenError> {
        let last = self.last.take();
        if let Some((key, bytes)) = &last
            && let Some(keys) = self.attempt(key, bytes, secret, config_hash).await?
        {
            return Ok((keys, key.clone()));
        }
        let tried = last.map(|(key, _)| key);
        let listed = match self.listed.take() {
            Some(listed) => listed,
            None => self.list().await?,
        };
        for key in listed.into_iter().filter(|key| Some(key) != tried.as_ref()) {
            let Some(bytes) = self.fetch(&key).await? else { continue };
            if let Some(keys) = self.attempt(&key, &bytes, secret, config_hash).await? {
                self.remembered.put(LAST, &Bytes::from(key.clone()));
                return Ok((keys, key));
            }
        }
        let store = self.store.describe();
        Err(if self.usable == 0 {
            OpenError::NoSlot { store, damaged: self.damaged }
        } else {
            OpenError::WrongSecret { store }
        })
    }

    async fn attempt(
        &mut self,
        key: &str,
        bytes: &[u8],
        secret: &Secret,
        config_hash: &[u8; 32],
    ) -> Result<Option<DomainKeys>, OpenError> {
        let opened = match Slot::parse(bytes) {
            Ok(slot) if slot.belongs_to(config_hash) => {
                self.usable += 1;
                let secret = secret.clone();
                tokio::task::spawn_blocking(move || slot.open(&secret)).await?
            }
            Ok(_) => return Ok(None),
            Err(error) => Err(error.into()),
        };
        match opened {
            Ok(keys) => Ok(Some(keys)),
            Err(SlotError::WrongSecret) => Ok(None),
            Err(SlotError::Object(error)) => {
                warn!(slot = key, %error, "a key slot is damaged");
                self.damaged += 1;
                Ok(None)
            }
        }
    }
}
