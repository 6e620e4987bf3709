//! The slots of an open repository: which there are, a new one, one less.
//!
//! A repository that nobody can read any more is lost, so the last slot that opens data is never removed. Whether a
//! slot does is seen without its secret: the sealed part of a writer's slot is shorter by the private key.

use futures::TryStreamExt;
use thiserror::Error;

use super::slot::{KEYS_PREFIX, MAX_SLOT_BYTES, Role, Slot, SlotError, SlotKind};
use super::{DomainKeys, Secret, SecretError};
use crate::crypto::CryptoError;
use crate::error::{Classified, ErrorClass};
use crate::id::SessionId;
use crate::repository::Repository;
use crate::store::StoreError;

/// Fewer digits do not name a slot.
const MIN_PREFIX: usize = 4;

/// A slot, as far as it is known without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySlot {
    /// Its name: 32 hexadecimal digits.
    pub name: String,
    /// What opens it, and what it is good for; `None`: damaged, or of another repository.
    pub usable: Option<(SlotKind, Role)>,
    /// Whether this repository was opened by it.
    pub opened: bool,
}

impl KeySlot {
    /// Whether it opens data.
    fn reads(&self) -> bool {
        matches!(self.usable, Some((_, Role::Full)))
    }
}

/// What could not be done with key slots.
#[derive(Debug, Error)]
pub enum KeySlotsError {
    /// The store failed.
    #[error("cannot {act} the key slots")]
    Store {
        /// What was attempted.
        act: &'static str,
        /// Why.
        source: StoreError,
    },
    /// The new secret protects nothing.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The keys cannot be sealed under the new secret.
    #[error("cannot seal the keys in a new slot")]
    Seal(#[from] CryptoError),
    /// A slot was stored and does not open.
    #[error("the new key slot does not open; nothing was removed")]
    ReadBack(#[source] SlotError),
    /// A worker thread failed.
    #[error("a worker thread failed")]
    Worker(#[from] tokio::task::JoinError),
    /// A writer cannot give away what it does not have.
    #[error("this key can write but not read data; open the repository with a key that reads to make another such key")]
    NoPrivateKey,
    /// No slot has the name.
    #[error("no key slot {wanted:?}; see `lifeboat keys list`")]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// Several slots have.
    #[error("{count} key slots begin with {wanted:?}; write more digits")]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// How many.
        count: usize,
    },
    /// Without it nobody could read the repository.
    #[error("{name} is the last key slot that opens data; add another with `lifeboat keys add` first")]
    Last {
        /// The slot.
        name: String,
    },
    /// Another removed a slot at the same moment.
    #[error("another key slot was removed at the same moment, so {name} was put back; look at `lifeboat keys list`")]
    Raced {
        /// The slot.
        name: String,
    },
}

impl Classified for KeySlotsError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Store { source, .. } => source.class(),
            Self::Secret(_) | Self::NoPrivateKey => ErrorClass::Key,
            Self::Seal(_) | Self::Worker(_) => ErrorClass::Local,
            Self::ReadBack(_) => ErrorClass::Damaged,
            Self::NotFound { .. } => ErrorClass::NotFound,
            Self::Ambiguous { .. } | Self::Last { .. } => ErrorClass::Invalid,
            Self::Raced { .. } => ErrorClass::Conflict,
        }
    }
}

fn failed(act: &'static str) -> impl Fn(StoreError) -> KeySlotsError {
    move |source| KeySlotsError::Store { act, source }
}

impl Repository {
    /// The key slots, by name.
    pub async fn key_slots(&self) -> Result<Vec<KeySlot>, KeySlotsError> {
        let store = &self.engine.store;
        let config_hash = self.config_hash().await?;
        let mut slots = Vec::new();
        let listed: Vec<_> = store.list(KEYS_PREFIX).try_collect().await.map_err(failed("list"))?;
        for object in listed {
            let bytes = match store.get(&object.key, MAX_SLOT_BYTES).await {
                Ok(bytes) => bytes,
                // Removed since.
                Err(error) if error.is_not_found() => continue,
                Err(error) if error.class() == ErrorClass::Damaged => bytes::Bytes::new(),
                Err(error) => return Err(failed("read")(error)),
            };
            let parsed = Slot::parse(&bytes).ok().filter(|slot| slot.belongs_to(&config_hash));
            slots.push(KeySlot {
                usable: parsed.and_then(|slot| Some((slot.kind()?, slot.role()?))),
                opened: object.key == self.engine.keys.slot(),
                name: object.key[KEYS_PREFIX.len()..].to_owned(),
            });
        }
        slots.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(slots)
    }

    /// Makes a slot that opens with `secret`, and proves that it does. Returns its name.
    ///
    /// A writer's slot writes and deduplicates, lists and checks, and cannot read any data.
    pub async fn add_key(&self, secret: &Secret, role: Role) -> Result<String, KeySlotsError> {
        secret.check()?;
        let domain = self.engine.keys.domain();
        let keys = match role {
            Role::Writer => domain.writer(),
            Role::Full if domain.private.is_none() => return Err(KeySlotsError::NoPrivateKey),
            Role::Full => domain.clone(),
        };
        let bytes = seal(keys, secret.clone(), self.config_hash().await?).await?;
        let name = SessionId::random().to_string();
        let key = format!("{KEYS_PREFIX}{name}");
        let store = &self.engine.store;
        // The name is random: an object that exists is this very one, after a lost answer.
        store.put_if_absent(&key, bytes.into()).await.map_err(failed("add to"))?;
        let stored = store.get(&key, MAX_SLOT_BYTES).await.map_err(failed("read back"))?;
        let secret = secret.clone();
        let opened = tokio::task::spawn_blocking(move || {
            Slot::parse(&stored).map_err(SlotError::from).and_then(|slot| slot.open(&secret))
        });
        opened.await?.map_err(KeySlotsError::ReadBack)?;
        Ok(name)
    }

    /// Removes the slot with this name or unique beginning of at least four digits. Returns its name.
    pub async fn remove_key(&self, wanted: &str) -> Result<String, KeySlotsError> {
        let slots = self.key_slots().await?;
        let found: Vec<_> = slots.iter().filter(|slot| slot.name.starts_with(wanted)).collect();
        let none = || KeySlotsError::NotFound { wanted: wanted.chars().take(80).collect() };
        let slot = match found.as_slice() {
            [slot] if wanted.len() >= MIN_PREFIX => *slot,
            [] | [_] => return Err(none()),
            several => return Err(KeySlotsError::Ambiguous { wanted: wanted.to_owned(), count: several.len() }),
        };
        let name = slot.name.clone();
        if slot.reads() && slots.iter().filter(|slot| slot.reads()).count() == 1 {
            return Err(KeySlotsError::Last { name });
        }
        let key = format!("{KEYS_PREFIX}{name}");
        let store = &self.engine.store;
        let bytes = store.get(&key, MAX_SLOT_BYTES).await;
        store.delete(&key).await.map_err(failed("remove from"))?;
        // Of two that remove the last two slots at once, at least one looks after both are gone, and puts its back.
        if slot.reads() && !self.key_slots().await?.iter().any(KeySlot::reads) {
            let bytes = bytes.map_err(failed("read"))?;
            store.put_if_absent(&key, bytes.into()).await.map_err(failed("put back into"))?;
            return Err(KeySlotsError::Raced { name });
        }
        Ok(name)
    }

    /// Replaces the slot that opened this repository by one for `secret`, of the same role. Returns the new name.
    pub async fn change_key(&self, secret: &Secret) -> Result<String, KeySlotsError> {
        let role = if self.engine.keys.domain().private.is_some() { Role::Full } else { Role::Writer };
        let name = self.add_key(secret, role).await?;
        self.remove_key(&self.engine.keys.slot()[KEYS_PREFIX.len()..]).await?;
        Ok(name)
    }

    async fn config_hash(&self) -> Result<[u8; 32], KeySlotsError> {
        let store = &self.engine.store;
        let bytes = store.get(crate::config::CONFIG_KEY, crate::config::MAX_CONFIG_BYTES).await;
        Ok(*blake3::hash(&bytes.map_err(failed("read the config for"))?).as_bytes())
    }
}

/// Seals on a worker thread: Argon2id is slow on purpose.
async fn seal(keys: DomainKeys, secret: Secret, config_hash: [u8; 32]) -> Result<Vec<u8>, KeySlotsError> {
    let sealed = tokio::task::spawn_blocking(move || Slot::seal(&keys, &secret, config_hash));
    Ok(sealed.await??.to_bytes())
}
