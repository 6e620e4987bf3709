//! Whether bytes are what was once written as an object: more than that they carry a fitting hash, which anyone can make.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;

use super::HealError;
use crate::config::CONFIG_KEY;
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::{MARKS_PREFIX, TOMBSTONE_PREFIX, fits_round};
use crate::id::SessionId;
use crate::index::{LISTS_PREFIX, VERSIONS_PREFIX, fits_versions, parse_segment_key};
use crate::keyring::KeyRingError;
use crate::keys::{KEYS_PREFIX, MAX_SLOT_BYTES, SessionKeys, Slot};
use crate::objects;
use crate::pack::{Directory, DirectorySpan, TRAILER_BYTES, open_frame, parse_pack_key};
use crate::refset::parse_refset_key;
use crate::session::decision::{Commit, Decision, parse_decision_key};
use crate::session::registration::{REGISTRATIONS_PREFIX, fits_others};
use crate::store::Store;

/// Whether these bytes are the original of the object.
///
/// What is sealed must open with the repository's keys; references must be those that a commit names; registrations and
/// marks of expiry must fit what else is there. Index segments of committed sessions, merged ones, places of lost chunks and heartbeats
/// are hints, which nothing proves, and only have to be whole.
pub(super) async fn is_original(engine: &Arc<Engine>, key: &str, bytes: &Bytes) -> Result<bool, HealError> {
    if objects::verify(key, bytes).is_err() {
        return Ok(false);
    }
    if key == CONFIG_KEY || key.starts_with(KEYS_PREFIX) {
        return fits_slots(&*engine.store, key, bytes).await;
    }
    if let Some(session) = key.strip_prefix("k/").and_then(|rest| rest.split('/').next()?.parse::<SessionId>().ok()) {
        return Ok(SessionKeys::open(bytes, session, engine.keys.domain()).is_ok());
    }
    if let Some(session) = parse_decision_key(key) {
        return opens_decision(engine, session, bytes).await;
    }
    if let Some((snapshot, version)) = parse_refset_key(key) {
        let hash = blake3::hash(bytes).to_hex().to_string();
        return Ok(engine.commits.all().iter().any(|(_, committed)| {
            committed
                .commit
                .refsets
                .iter()
                .any(|refset| refset.snapshot == snapshot && refset.version == version && refset.hash == hash)
        }));
    }
    if parse_pack_key(key).is_some() {
        return opens_pack(engine, key, bytes).await;
    }
    if let Some((session, _)) = parse_segment_key(key) {
        // What an aborted session published decides what is deleted at once; a damaged segment counts as everything.
        return Ok(!engine.commits.aborted().contains(&session));
    }
    let fail = |source| HealError::Replace { act: "prove what belongs to", source };
    if key.starts_with(VERSIONS_PREFIX) || key.starts_with(LISTS_PREFIX) {
        return fits_versions(&*engine.store, &engine.mark_key(), key, bytes).await.map_err(fail);
    }
    if key.starts_with(REGISTRATIONS_PREFIX) {
        return fits_others(&*engine.store, key, bytes).await.map_err(fail);
    }
    if key.starts_with(MARKS_PREFIX) || key.starts_with(TOMBSTONE_PREFIX) {
        return fits_round(engine, key, bytes).await.map_err(fail);
    }
    Ok(true)
}

/// A config and its slots name each other by the config's hash; what is to be judged is left out.
pub(super) async fn fits_slots(store: &dyn Store, key: &str, bytes: &Bytes) -> Result<bool, HealError> {
    let fail = |source| HealError::Replace { act: "compare the key slots with", source };
    if key != CONFIG_KEY {
        let config = match store.get(CONFIG_KEY, objects::limit(CONFIG_KEY)).await {
            Ok(config) => config,
            Err(error) if matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) => return Ok(false),
            Err(error) => return Err(fail(error)),
        };
        return Ok(Slot::parse(bytes).is_ok_and(|slot| slot.belongs_to(blake3::hash(&config).as_bytes())));
    }
    let hash = blake3::hash(bytes);
    let mut listed = store.list(KEYS_PREFIX);
    while let Some(object) = listed.try_next().await.map_err(fail)? {
        match store.get(&object.key, MAX_SLOT_BYTES).await {
            Ok(slot) if Slot::parse(&slot).is_ok_and(|slot| slot.belongs_to(hash.as_bytes())) => return Ok(true),
            Ok(_) => {}
            Err(error) if matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) => {}
            Err(error) => return Err(fail(error)),
        }
    }
    Ok(false)
}

async fn opens_decision(engine: &Arc<Engine>, session: SessionId, bytes: &Bytes) -> Result<bool, HealError> {
    let seen = engine.commits.all();
    let seen: Vec<_> =
        seen.iter().flat_map(|(_, committed)| &committed.commit.saw).filter(|seen| seen.session == session).collect();
    let hash = blake3::hash(bytes).to_hex().to_string();
    if seen.iter().any(|seen| seen.hash != hash) {
        return Ok(false);
    }
    match Decision::parse(session, bytes) {
        Ok(Decision::Commit(sealed)) => {
            let keys = engine.keys.get(session).await;
            Ok(unless_store_fails(keys)?.is_some_and(|keys| Commit::open(session, sealed, &keys.structure).is_ok()))
        }
        Ok(Decision::Abort(_)) => Ok(true),
        Err(_) => Ok(false),
    }
}

fn unless_store_fails<T>(keys: Result<T, KeyRingError>) -> Result<Option<T>, HealError> {
    match keys {
        Ok(keys) => Ok(Some(keys)),
        Err(KeyRingError::Store(source)) if !matches!(source.class(), ErrorClass::NotFound | ErrorClass::Damaged) => {
            Err(HealError::Replace { act: "read the keys for", source })
        }
        Err(_) => Ok(None),
    }
}

/// The directory opens, and every frame for whose kind there is a key.
async fn opens_pack(engine: &Arc<Engine>, key: &str, bytes: &Bytes) -> Result<bool, HealError> {
    let Some(pack) = parse_pack_key(key) else { return Ok(false) };
    let Some(own) = unless_store_fails(engine.keys.get(pack.session).await)? else { return Ok(false) };
    let Ok(span) = DirectorySpan::parse(bytes) else { return Ok(false) };
    let (start, len) = (span.offset as usize, span.len as usize);
    let Some(sealed) = bytes.get(start..start + len).filter(|_| start + len + TRAILER_BYTES <= bytes.len()) else {
        return Ok(false);
    };
    let Ok(directory) = Directory::open(pack, span, sealed, &own.structure) else { return Ok(false) };
    let mut ciphers = Vec::new();
    for origin in &directory.origins {
        let Some(keys) = unless_store_fails(engine.keys.get(*origin).await)? else { return Ok(false) };
        ciphers.push(keys);
    }
    let (engine, bytes) = (Arc::clone(engine), bytes.clone());
    let open = move || {
        directory.slots.iter().all(|slot| {
            let Some(keys) = ciphers.get(usize::from(slot.origin)) else { return false };
            // Without the private key the hash and the directory have to do for data.
            let Some(cipher) = keys.frame(slot.expected.kind) else { return true };
            let start = slot.offset as usize;
            bytes
                .get(start..start + slot.len as usize)
                .is_some_and(|frame| open_frame(cipher, &slot.expected, frame, |plain| engine.chunk_id(plain)).is_ok())
        })
    };
    Ok(tokio::task::spawn_blocking(open).await?)
}
