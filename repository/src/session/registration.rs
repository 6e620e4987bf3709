//! Registering a session in the first epoch that is not sealed: `e/<epoch>/<lane>/<slot>`.
//!
//! Slots of a lane are taken in order by put-if-absent, so a SEAL closes the lane for good. Listings only say
//! where to begin; a stale one costs requests, never safety.

use bytes::Bytes;
use futures::TryStreamExt;

use crate::id::SessionId;
use crate::store::{Store, StoreError};

const REGISTER_MAGIC: &[u8; 8] = b"LBREGI01";
const SEAL_MAGIC: &[u8; 8] = b"LBSEAL01";
const MAX_SLOT_BYTES: u64 = 4096;

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

/// Takes the next free slot for the session.
pub(crate) async fn register(store: &dyn Store, lanes: u32, session: SessionId) -> Result<Registration, StoreError> {
    let lane = u32::from_le_bytes([session.0[0], session.0[1], session.0[2], session.0[3]]) % lanes.max(1);
    let mut at = hint(store, lane).await?;
    let mut record = REGISTER_MAGIC.to_vec();
    record.extend_from_slice(&session.0);
    let record = Bytes::from(record);
    loop {
        let key = at.key();
        if store.put_if_absent(&key, record.clone().into()).await?.is_ours() {
            return Ok(at);
        }
        let taken = store.get(&key, MAX_SLOT_BYTES).await?;
        at = if taken.starts_with(SEAL_MAGIC) {
            Registration { epoch: at.epoch + 1, lane, slot: 0 }
        } else {
            Registration { slot: at.slot + 1, ..at }
        };
    }
}

/// The last taken slot of the lane that a listing shows: not after it, since it may be the SEAL.
async fn hint(store: &dyn Store, lane: u32) -> Result<Registration, StoreError> {
    let mut newest = Registration { epoch: 0, lane, slot: 0 };
    let mut listed = store.list("e/");
    while let Some(object) = listed.try_next().await? {
        if let Some(found) = Registration::parse(&object.key)
            && (found.lane == lane && (found.epoch, found.slot) > (newest.epoch, newest.slot))
        {
            newest = found;
        }
    }
    Ok(newest)
}

/// Closes a lane of an epoch: no session can register there any more. What expiry will do; the tests do it now.
#[cfg(test)]
pub(crate) async fn seal_lane(store: &dyn Store, epoch: u64, lane: u32) -> Result<(), StoreError> {
    let mut at = Registration { epoch, lane, slot: 0 };
    loop {
        let key = at.key();
        if store.put_if_absent(&key, SEAL_MAGIC.to_vec().into()).await?.is_ours() {
            return Ok(());
        }
        if store.get(&key, MAX_SLOT_BYTES).await?.starts_with(SEAL_MAGIC) {
            return Ok(());
        }
        at.slot += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::Memory;

    #[tokio::test]
    async fn sessions_take_slots_in_order_and_go_round_a_seal() {
        let store = Memory::new();
        let first = register(&store, 1, SessionId::random()).await.unwrap();
        let second = register(&store, 1, SessionId::random()).await.unwrap();
        assert_eq!((first.slot, second.slot), (0, 1));
        seal_lane(&store, 0, 0).await.unwrap();
        seal_lane(&store, 0, 0).await.unwrap();
        let third = register(&store, 1, SessionId::random()).await.unwrap();
        assert_eq!(third, Registration { epoch: 1, lane: 0, slot: 0 });
        assert_eq!(Registration::parse(&third.key()), Some(third));
    }
}
