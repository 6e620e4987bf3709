//! Registering a session in the first epoch that is not sealed: `e/<epoch>/<lane>/<slot>`; sealing an epoch; and the
//! list of all who registered in one.
//!
//! Slots of a lane are taken in order by put-if-absent and never emptied, so a SEAL closes the lane for good, and who
//! registered before it can be told by reads alone. Listings, and what this machine remembers of its last registration,
//! only say where to begin; a stale one costs requests, never safety.

use bytes::Bytes;
use futures::TryStreamExt;
use jiff::Timestamp;

use super::decision::decision_key;
use crate::cache::ObjectCache;
use crate::expire::marks::{MARKS_PREFIX, condemned_key, exists, round_of};
use crate::id::{SessionId, SnapshotId};
use crate::keys::session_key_object;
use crate::refset::refset_key;
use crate::store::{Store, StoreError};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

/// Where registrations lie.
pub(crate) const REGISTRATIONS_PREFIX: &str = "e/";
const REGISTER_MAGIC: &[u8; 8] = b"LBREGI01";
const PIN_MAGIC: &[u8; 8] = b"LBPINR01";
const SEAL_MAGIC: &[u8; 8] = b"LBSEAL01";
const MAX_SLOT_BYTES: u64 = 4096;
/// Where the cache keeps this machine's last registration: the key of its slot, a space, and the session.
const LAST: &str = "local/registered";
/// Slots of a lane read at once.
const PARALLEL_SLOTS: u64 = 16;

/// Where a session registered: its compact ordinal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) epoch: u64,
    pub(crate) lane: u32,
    pub(crate) slot: u64,
}

impl Registration {
    fn key(self) -> String {
        format!("e/{:010}/{:04}/{:010}", self.epoch, self.lane, self.slot)
    }

    fn parse(key: &str) -> Option<Self> {
        let mut parts = key.strip_prefix("e/")?.split('/');
        let found = Self {
            epoch: parts.next()?.parse().ok()?,
            lane: parts.next()?.parse().ok()?,
            slot: parts.next()?.parse().ok()?,
        };
        (found.key() == key).then_some(found)
    }
}

/// Who registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registered {
    pub(crate) session: SessionId,
    /// When, by the clock of its machine, in milliseconds: a hint.
    pub(crate) since: i64,
    /// It reads what `r/<session>/0` with this hash refers to; `None`: it writes.
    pub(crate) pinned: Option<[u8; 32]>,
}

impl Registered {
    fn to_bytes(self) -> Bytes {
        let mut bytes = if self.pinned.is_some() { PIN_MAGIC } else { REGISTER_MAGIC }.to_vec();
        bytes.extend_from_slice(&self.session.0);
        bytes.extend_from_slice(&self.since.to_le_bytes());
        if let Some(hash) = self.pinned {
            bytes.extend_from_slice(&hash);
        }
        seal_hash(&mut bytes);
        bytes.into()
    }
}

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Registered(Registered),
    Seal,
}

impl Slot {
    fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes == SEAL_MAGIC {
            return Ok(Self::Seal);
        }
        let mut fields = Fields::new(unseal_hash(bytes)?);
        let magic: [u8; 8] = fields.array()?;
        let (session, since) = (SessionId(fields.array()?), fields.array().map(i64::from_le_bytes)?);
        let pinned = match &magic {
            REGISTER_MAGIC => None,
            PIN_MAGIC => Some(fields.array()?),
            _ => return Err(WireError { what: "no registration of a known version", at: 0 }),
        };
        fields.end()?;
        Ok(Self::Registered(Registered { session, since, pinned }))
    }
}

/// An epoch whose registrations cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EpochError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the registration {key} is damaged: {source}")]
    Damaged { key: String, source: WireError },
}

/// Takes the next free slot for the session.
///
/// A damaged slot is not passed over: it may have been the SEAL.
pub(crate) async fn register(
    store: &dyn Store,
    cache: &ObjectCache,
    lanes: u32,
    session: SessionId,
    now: Timestamp,
    pinned: Option<[u8; 32]>,
) -> Result<Registration, EpochError> {
    let record = Registered { session, since: now.as_millisecond(), pinned }.to_bytes();
    let lane = u32::from_le_bytes([session.0[0], session.0[1], session.0[2], session.0[3]]) % lanes.max(1);
    let mut at = match after_last(store, cache).await? {
        Some(at) if store.put_if_absent(&at.key(), record.clone().into()).await?.is_ours() => {
            return Ok(remember(cache, at, session));
        }
        // Others were faster, maybe many: not one after the other.
        _ => {
            let epoch = newest_listed_round(store).await?;
            Registration { epoch, lane, slot: last_listed_slot(store, epoch, lane).await? }
        }
    };
    loop {
        let key = at.key();
        if store.put_if_absent(&key, record.clone().into()).await?.is_ours() {
            return Ok(remember(cache, at, session));
        }
        at = match taken(store, key).await? {
            Slot::Seal => {
                let epoch = at.epoch + 1;
                Registration { epoch, lane, slot: last_listed_slot(store, epoch, lane).await? }
            }
            Slot::Registered(_) => Registration { slot: at.slot + 1, ..at },
        };
    }
}

fn remember(cache: &ObjectCache, at: Registration, session: SessionId) -> Registration {
    cache.put(LAST, &Bytes::from(format!("{} {session}", at.key())));
    at
}

/// The slot after this machine's last registration, if that is in the store: it is not in one that was set back, where a
/// registration behind a gap would be seen by nobody.
async fn after_last(store: &dyn Store, cache: &ObjectCache) -> Result<Option<Registration>, EpochError> {
    let Some(last) = cache.get_local(LAST).await else { return Ok(None) };
    let parsed = std::str::from_utf8(&last).ok().and_then(|last| {
        let (key, session) = last.split_once(' ')?;
        Some((Registration::parse(key)?, session.parse::<SessionId>().ok()?))
    });
    let Some((at, session)) = parsed else { return Ok(None) };
    let is_there = match read_slot(store, at).await {
        Ok(slot) => matches!(slot, Some(Slot::Registered(found)) if found.session == session),
        // Later ones may be whole, and a listing tells.
        Err(EpochError::Damaged { .. }) => false,
        Err(error @ EpochError::Store(_)) => return Err(error),
    };
    Ok(is_there.then_some(Registration { slot: at.slot + 1, ..at }))
}

/// The newest round of expiry that a listing shows: the epoch of this number is open, or a later one.
async fn newest_listed_round(store: &dyn Store) -> Result<u64, StoreError> {
    let newest = store.list(MARKS_PREFIX).try_fold(0, |newest, object| async move {
        // A round is condemned before the epoch before it is sealed, but done only after it.
        let sealed = if object.key.ends_with("/done") { round_of(&object.key) } else { None };
        Ok(newest.max(sealed.unwrap_or(0)))
    });
    newest.await
}

/// The last taken slot of the lane that a listing shows: not after it, since it may be the SEAL.
async fn last_listed_slot(store: &dyn Store, epoch: u64, lane: u32) -> Result<u64, StoreError> {
    let listed = store.list(&format!("e/{epoch:010}/{lane:04}/"));
    listed
        .try_fold(0, |newest, object| async move {
            Ok(newest.max(Registration::parse(&object.key).map_or(0, |found| found.slot)))
        })
        .await
}

/// Closes all lanes of an epoch: no session can register there any more.
pub(crate) async fn seal_epoch(store: &dyn Store, lanes: u32, epoch: u64) -> Result<(), EpochError> {
    for lane in 0..lanes.max(1) {
        seal_lane(store, epoch, lane).await?;
    }
    Ok(())
}

async fn seal_lane(store: &dyn Store, epoch: u64, lane: u32) -> Result<(), EpochError> {
    let mut at = Registration { epoch, lane, slot: last_listed_slot(store, epoch, lane).await? };
    loop {
        let key = at.key();
        if store.put_if_absent(&key, SEAL_MAGIC.to_vec().into()).await?.is_ours()
            || taken(store, key).await? == Slot::Seal
        {
            return Ok(());
        }
        at.slot += 1;
    }
}

/// All that registered in an epoch, told by reads alone: up to the seals, or to now if it is open.
pub(crate) async fn registered(store: &dyn Store, lanes: u32, epoch: u64) -> Result<Vec<Registered>, EpochError> {
    let mut all = Vec::new();
    for lane in 0..lanes.max(1) {
        let mut from = 0;
        'lane: loop {
            let work = (from..from + PARALLEL_SLOTS).map(|slot| read_slot(store, Registration { epoch, lane, slot }));
            for slot in futures::future::try_join_all(work).await? {
                match slot {
                    Some(Slot::Registered(found)) => all.push(found),
                    Some(Slot::Seal) | None => break 'lane,
                }
            }
            from += PARALLEL_SLOTS;
        }
    }
    Ok(all)
}

async fn read_slot(store: &dyn Store, at: Registration) -> Result<Option<Slot>, EpochError> {
    match taken(store, at.key()).await {
        Err(EpochError::Store(error)) if error.is_not_found() => Ok(None),
        slot => slot.map(Some),
    }
}

/// What a slot that is taken holds.
async fn taken(store: &dyn Store, key: String) -> Result<Slot, EpochError> {
    let bytes = store.get(&key, MAX_SLOT_BYTES).await?;
    Slot::parse(&bytes).map_err(|source| EpochError::Damaged { key, source })
}

/// Checks what lies at a slot.
pub(crate) fn verify(key: &str, bytes: &[u8]) -> Result<(), WireError> {
    if Registration::parse(key).is_none() {
        return Err(WireError { what: "the key is not one of a slot", at: 0 });
    }
    Slot::parse(bytes).map(drop)
}

/// Whether what a copy has in this slot is what was here, by what else is here: what a session stores under its name after
/// it registered; the mark before a SEAL, and nothing behind it. A copy on which others worked has other sessions.
pub(crate) async fn fits_others(store: &dyn Store, key: &str, bytes: &[u8]) -> Result<bool, StoreError> {
    let (Some(at), Ok(slot)) = (Registration::parse(key), Slot::parse(bytes)) else { return Ok(false) };
    let evidence = match slot {
        Slot::Registered(found) => {
            let name = found.session;
            vec![session_key_object(name), decision_key(name), refset_key(SnapshotId(name.0), 0)]
        }
        Slot::Seal if exists(store, &Registration { slot: at.slot + 1, ..at }.key()).await? => return Ok(false),
        Slot::Seal => vec![condemned_key(at.epoch + 1)],
    };
    for key in evidence {
        if exists(store, &key).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::store::faulty::{Fault, Faulty, Operation};
    use crate::store::memory::Memory;

    async fn take(store: &Memory, lanes: u32, session: SessionId) -> Registration {
        register(store, &ObjectCache::default(), lanes, session, Timestamp::UNIX_EPOCH, None).await.unwrap()
    }

    #[tokio::test]
    async fn sessions_take_slots_in_order_and_go_round_a_seal() {
        let store = Memory::new();
        let sessions = [0; 3].map(|_| SessionId::random());
        let first = take(&store, 1, sessions[0]).await;
        let second = take(&store, 1, sessions[1]).await;
        assert_eq!((first.slot, second.slot), (0, 1));
        seal_epoch(&store, 1, 0).await.unwrap();
        seal_epoch(&store, 1, 0).await.unwrap();
        let third = take(&store, 1, sessions[2]).await;
        assert_eq!(third, Registration { epoch: 1, lane: 0, slot: 0 });
        assert_eq!(Registration::parse(&third.key()), Some(third));
        let names = |found: Vec<Registered>| found.into_iter().map(|found| found.session).collect::<Vec<_>>();
        assert_eq!(names(registered(&store, 1, 0).await.unwrap()), sessions[..2]);
        assert_eq!(names(registered(&store, 1, 1).await.unwrap()), sessions[2..]);
    }

    #[tokio::test]
    async fn everyone_in_every_lane_is_told_however_many_there_are() {
        let store = Memory::new();
        let mut sessions = Vec::new();
        for number in 0..70u8 {
            let session = SessionId([number; 16]);
            let pinned = (number == 9).then_some([4; 32]);
            register(&store, &ObjectCache::default(), 3, session, Timestamp::UNIX_EPOCH, pinned).await.unwrap();
            sessions.push(session);
        }
        seal_epoch(&store, 3, 0).await.unwrap();
        let mut found = registered(&store, 3, 0).await.unwrap();
        found.sort_by_key(|found| found.session);
        assert_eq!(found.iter().map(|found| found.session).collect::<Vec<_>>(), sessions);
        assert_eq!(found[9].pinned, Some([4; 32]));
        assert_eq!(found.iter().filter(|found| found.pinned.is_some()).count(), 1);
    }

    #[tokio::test]
    async fn nobody_registers_behind_a_seal_that_is_damaged() {
        let store = Memory::new();
        let first = take(&store, 1, SessionId::random()).await;
        seal_epoch(&store, 1, 0).await.unwrap();
        store.overwrite(&Registration { slot: first.slot + 1, ..first }.key(), Bytes::from_static(b"LBSEAL00"));
        let cache = ObjectCache::default();
        let refused = register(&store, &cache, 1, SessionId::random(), Timestamp::UNIX_EPOCH, None).await;
        assert!(matches!(refused, Err(EpochError::Damaged { .. })), "{refused:?}");
        assert!(seal_epoch(&store, 1, 0).await.is_err());
    }

    #[tokio::test]
    async fn a_machine_goes_on_after_its_last_slot_without_a_listing_and_never_behind_a_gap() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ObjectCache::new(Some(folder.path()), crate::id::RepositoryId::random());
        let take = async |store: &dyn Store, lanes| {
            register(store, &cache, lanes, SessionId::random(), Timestamp::UNIX_EPOCH, None).await.unwrap()
        };
        let store = Memory::new();
        let first = take(&store, 4).await;
        let requests = Arc::new(Mutex::new(Vec::new()));
        let asked = Arc::clone(&requests);
        let counting = Faulty::new(Arc::new(store.clone()), move |operation, _| {
            asked.lock().unwrap().push(operation);
            Fault::None
        });
        let second = take(&counting, 4).await;
        assert_eq!(second, Registration { slot: 1, ..first });
        assert_eq!(*requests.lock().unwrap(), [Operation::Get, Operation::Put]);
        // Another machine, then a seal: what is remembered is no place to register.
        register(&store, &ObjectCache::default(), 1, SessionId::random(), Timestamp::UNIX_EPOCH, None).await.unwrap();
        seal_epoch(&store, 4, 0).await.unwrap();
        let third = take(&store, 4).await;
        assert_eq!((third.epoch, third.slot), (1, 0));
        assert_eq!(take(&store, 4).await, Registration { slot: 1, ..third });
        // The same repository from an older copy: its slots are free again from the first on.
        let old = Memory::new();
        assert_eq!(take(&old, 1).await, Registration { epoch: 0, lane: 0, slot: 0 });
        assert_eq!(registered(&old, 1, 0).await.unwrap().len(), 1);
        // A copy on which others went on: the slot is taken, but not by the session that is remembered.
        let other = Memory::new();
        register(&other, &ObjectCache::default(), 1, SessionId::random(), Timestamp::UNIX_EPOCH, None).await.unwrap();
        seal_epoch(&other, 1, 0).await.unwrap();
        assert_eq!(take(&other, 1).await, Registration { epoch: 1, lane: 0, slot: 0 });
        // The last slot is damaged, and others registered since.
        let damaged = take(&other, 1).await;
        register(&other, &ObjectCache::default(), 1, SessionId::random(), Timestamp::UNIX_EPOCH, None).await.unwrap();
        other.overwrite(&damaged.key(), Bytes::from_static(b"damaged"));
        assert_eq!(take(&other, 1).await, Registration { slot: damaged.slot + 2, ..damaged });
        // What is remembered is damaged.
        cache.put(LAST, &Bytes::from_static(b"e/x"));
        assert_eq!(take(&other, 1).await, Registration { slot: damaged.slot + 3, ..damaged });
    }

    #[test]
    fn damaged_slots_are_errors() {
        let bytes = Registered { session: SessionId([1; 16]), since: 7, pinned: None }.to_bytes();
        assert!(Slot::parse(&bytes).is_ok());
        for at in 0..bytes.len() {
            assert!(Slot::parse(&bytes[..at]).is_err());
            let mut changed = bytes.to_vec();
            changed[at] ^= 1;
            assert!(Slot::parse(&changed).is_err());
        }
        assert!(Slot::parse(b"LBREGI99aaaaaaaaaaaaaaaaaaaaaaaa").is_err());
    }
}
