//! Replacing a damaged object by its original bytes: the only act that takes an object away to put the same one back.
//!
//! At every moment the store holds either the object or a staged copy of its original (`h/<hash of the key>`), which the
//! next heal puts into place if this one dies. See docs/adr/0008.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use tracing::{info, warn};

use super::HealError;
use super::needs::Needs;
use super::original::is_original;
use crate::error::{Classified, ErrorClass};
use crate::objects;
use crate::pack::parse_pack_key;
use crate::repository::Repository;
use crate::store::{Payload, Store, StoreError};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

/// Where staged copies lie.
pub(crate) const STAGING_PREFIX: &str = "h/";
const MAGIC: &[u8; 8] = b"LBHEAL01";
/// No staged copy is larger than the largest object and its key.
pub(crate) const MAX_STAGED_BYTES: u64 = crate::refset::MAX_REFSET_BYTES + 4096;

/// An object and its key, staged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Staged {
    pub(crate) key: String,
    pub(crate) bytes: Bytes,
}

fn staging_key(key: &str) -> String {
    format!("{STAGING_PREFIX}{}", &blake3::hash(key.as_bytes()).to_hex()[..32])
}

impl Staged {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&u32::try_from(self.key.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(self.key.as_bytes());
        bytes.extend_from_slice(&self.bytes);
        seal_hash(&mut bytes);
        bytes
    }

    /// Reads a staged copy and checks that it lies where its key says.
    pub(crate) fn parse(at: &str, bytes: &Bytes) -> Result<Self, WireError> {
        let mut fields = Fields::new(unseal_hash(bytes)?);
        fields.expect(MAGIC, "no staged object of a known version")?;
        let len = fields.count(1)?;
        let key = std::str::from_utf8(fields.take(len)?).map_err(|_| fields.error("the key is no text"))?.to_owned();
        if staging_key(&key) != at {
            return Err(fields.error("the copy of another object"));
        }
        let rest = fields.take(fields.left())?;
        Ok(Self { bytes: bytes.slice_ref(rest), key })
    }
}

/// Replaces the object by these bytes, which must be its original ones.
pub(super) async fn replace(store: &Arc<dyn Store>, key: &str, original: &Bytes) -> Result<(), HealError> {
    let fail = |act| move |source: StoreError| HealError::Replace { act, source };
    let staged = Staged { key: key.to_owned(), bytes: original.clone() };
    let at = staging_key(key);
    let copy = staged.to_bytes();
    if !store.put_if_absent(&at, copy.clone().into()).await.map_err(fail("stage"))?.is_ours() {
        // Of a heal that died, or of one that runs beside this one; a whole one is the same.
        let found = store.get(&at, MAX_STAGED_BYTES).await.map_err(fail("stage"))?;
        if found != copy {
            store.delete(&at).await.map_err(fail("stage"))?;
            store.put_if_absent(&at, copy.into()).await.map_err(fail("stage"))?;
        }
    }
    let read = store.get(&at, MAX_STAGED_BYTES).await.map_err(fail("read back"))?;
    if Staged::parse(&at, &read).as_ref() != Ok(&staged) {
        return Err(HealError::ReadBack { key: at });
    }
    put_into_place(store, &at, &staged).await
}

async fn put_into_place(store: &Arc<dyn Store>, at: &str, staged: &Staged) -> Result<(), HealError> {
    let fail = |act| move |source: StoreError| HealError::Replace { act, source };
    let Staged { key, bytes } = staged;
    store.delete(key).await.map_err(fail("take away"))?;
    store.put_if_absent(key, Payload::from(bytes.clone())).await.map_err(fail("put into place"))?;
    let read = store.get(key, objects::limit(key)).await.map_err(fail("read back"))?;
    if read != *bytes {
        return Err(HealError::ReadBack { key: key.clone() });
    }
    store.delete(at).await.map_err(fail("clean up after"))?;
    info!(key, "a damaged object was replaced by its original");
    Ok(())
}

/// Ends what a heal that died had begun. Returns the keys of the objects that were put into place.
///
/// Whoever may only create objects could stage what they like; so a copy is used only if it is proven to be the
/// original of an object that is missing or damaged.
pub(super) async fn finish_staged(repository: &Repository) -> Result<Vec<String>, HealError> {
    let store = &repository.engine.store;
    let fail = |act| move |source: StoreError| HealError::Replace { act, source };
    let listed: Vec<_> = store.list(STAGING_PREFIX).try_collect().await.map_err(fail("look for staged copies of"))?;
    let (mut done, mut waiting) = (Vec::new(), Vec::new());
    for object in listed {
        match read_staged(store, &object.key).await? {
            Some(staged) if needs_healing(&**store, &staged.key).await? => {
                if is_original(&repository.engine, &staged.key, &staged.bytes).await? {
                    waiting.push((object.key, staged.key));
                    continue;
                }
                warn!(key = staged.key, "a staged copy is not the original of its object");
            }
            _ => {}
        }
        store.delete(&object.key).await.map_err(fail("clean up after"))?;
    }
    let mut needs = Needs::of(repository, waiting.iter().filter_map(|(_, key)| parse_pack_key(key)).collect()).await?;
    for (at, key) in waiting {
        if needs.keep(repository, &key).await? {
            // Read again, so that not all of them are held in memory.
            let Some(staged) = read_staged(store, &at).await? else { continue };
            put_into_place(store, &at, &staged).await?;
            done.push(key);
        } else if needs.is_useless(&key) {
            store.delete(&at).await.map_err(fail("clean up after"))?;
        }
    }
    needs.release().await;
    Ok(done)
}

/// A staged copy; `None`: it is gone, or damaged. It was not read back then, so nothing was taken away for it.
async fn read_staged(store: &Arc<dyn Store>, at: &str) -> Result<Option<Staged>, HealError> {
    let bytes = match store.get(at, MAX_STAGED_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) if error.class() == ErrorClass::Damaged => Bytes::new(),
        Err(source) => return Err(HealError::Replace { act: "read a staged copy of", source }),
    };
    match Staged::parse(at, &bytes) {
        Ok(staged) => Ok(Some(staged)),
        Err(error) => {
            warn!(key = at, %error, "a staged copy is damaged and of no use");
            Ok(None)
        }
    }
}

/// Whether the object is missing, or its bytes are not what they say themselves.
pub(super) async fn needs_healing(store: &dyn Store, key: &str) -> Result<bool, HealError> {
    match store.get(key, objects::limit(key)).await {
        Ok(found) => Ok(objects::verify(key, &found).is_err()),
        Err(error) if matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) => Ok(true),
        Err(source) => Err(HealError::Replace { act: "look at", source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Secret;
    use crate::repository::{InitOptions, OpenOptions, Repository};
    use crate::store::faulty::{Fault, Faulty, Operation};
    use crate::store::memory::Memory;
    use crate::store::{Reason, Store};
    use proptest::prelude::*;

    #[tokio::test]
    async fn a_crash_at_any_step_loses_nothing_and_the_next_heal_ends_it() {
        let secret = Secret::key_file([7; 32]);
        let memory = Memory::new();
        Repository::init(Arc::new(memory.clone()), &secret, InitOptions::default()).await.unwrap();
        let journal = memory.journal();
        let key = format!("hb/{}/00000000", "01".repeat(16));
        let original = Bytes::from_static(b"2026-01-01T00:00:00Z");
        for crash in 0..12 {
            let memory = Memory::replay(&journal);
            memory.overwrite(&key, Bytes::from_static(b"damaged"));
            let mut step = 0;
            let faulty: Arc<dyn Store> = Arc::new(Faulty::new(Arc::new(memory.clone()), move |_, _| {
                step += 1;
                if step > crash { Fault::Before(Reason::Unreachable) } else { Fault::None }
            }));
            let ended = replace(&faulty, &key, &original).await;
            let is = |bytes: &[u8]| memory.object(&key).as_deref() == Some(bytes);
            let is_staged = memory.keys().iter().any(|key| key.starts_with(STAGING_PREFIX));
            assert!(is(&original) || is_staged || is(b"damaged"), "after {crash} steps");
            let store: Arc<dyn Store> = Arc::new(memory.clone());
            let repository = Repository::open(store, &secret, OpenOptions::default()).await.unwrap();
            finish_staged(&repository).await.unwrap();
            assert!(memory.keys().iter().all(|key| !key.starts_with(STAGING_PREFIX)));
            if is(b"damaged") {
                assert!(ended.is_err() && crash == 0, "the staged copy was not used after {crash} steps");
                replace(&repository.engine.store, &key, &original).await.unwrap();
            }
            assert!(is(&original), "after {crash} steps");
        }
    }

    #[tokio::test]
    async fn a_store_that_refuses_to_delete_keeps_what_it_has() {
        let memory = Memory::new();
        memory.overwrite("x/a", Bytes::from_static(b"damaged"));
        let plan = |operation, _: &str| match operation {
            Operation::Delete => Fault::Before(Reason::Denied),
            _ => Fault::None,
        };
        let store: Arc<dyn Store> = Arc::new(Faulty::new(Arc::new(memory.clone()), plan));
        assert!(replace(&store, "x/a", &Bytes::from_static(b"original")).await.is_err());
        assert_eq!(memory.object("x/a").as_deref(), Some(&b"damaged"[..]));
    }

    #[tokio::test]
    async fn what_somebody_else_staged_replaces_nothing_that_is_whole() {
        let memory = Memory::new();
        let store: Arc<dyn Store> = Arc::new(memory.clone());
        let repository = Repository::init(store, &Secret::key_file([7; 32]), InitOptions::default()).await.unwrap();
        let key = format!("hb/{}/00000000", "01".repeat(16));
        let mine = Bytes::from_static(b"2026-01-01T00:00:00Z");
        memory.overwrite(&key, mine.clone());
        let evil = Staged { key: key.clone(), bytes: Bytes::from_static(b"2027-01-01T00:00:00Z") };
        memory.overwrite(&staging_key(&key), evil.to_bytes().into());
        assert_eq!(finish_staged(&repository).await.unwrap(), Vec::<String>::new());
        assert_eq!(memory.object(&key), Some(mine));
        assert_eq!(memory.object(&staging_key(&key)), None);
    }

    proptest! {
        #[test]
        fn hostile_copies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..100), len: u32) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&body);
            seal_hash(&mut bytes);
            prop_assert!(Staged::parse("h/00", &bytes.into()).is_err());
        }
    }
}
