//! Which slots of which packs a snapshot refers to: `r/<snapshot>/0`.
//!
//! Expiry is an OR of these sets. They are derived from manifests and can be derived again.

use std::collections::BTreeMap;

use roaring::RoaringTreemap;

use crate::id::{PackId, Place, SessionId, SnapshotId};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

const MAGIC: &[u8; 8] = b"LBREFS01";
/// No refset is larger; one for a petabyte is about 180 MB.
pub(crate) const MAX_REFSET_BYTES: u64 = 1 << 30;

/// Key of a snapshot's refset.
pub(crate) fn refset_key(snapshot: SnapshotId) -> String {
    format!("r/{snapshot}/0")
}

/// A set of places.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Refset {
    sessions: BTreeMap<SessionId, RoaringTreemap>,
}

fn number(seq: u32, slot: u16) -> u64 {
    u64::from(seq) << 16 | u64::from(slot)
}

impl Refset {
    pub(crate) fn insert(&mut self, place: Place) {
        self.sessions.entry(place.pack.session).or_default().insert(number(place.pack.seq, place.slot));
    }

    pub(crate) fn contains(&self, place: Place) -> bool {
        self.sessions.get(&place.pack.session).is_some_and(|set| set.contains(number(place.pack.seq, place.slot)))
    }

    /// The slots of each pack, in order.
    pub(crate) fn packs(&self) -> BTreeMap<PackId, Vec<u16>> {
        let mut packs = BTreeMap::new();
        for (session, set) in &self.sessions {
            for number in set {
                // Numbers are 48 bits by construction and by `parse`.
                let seq = u32::try_from(number >> 16).unwrap_or(u32::MAX);
                let slot = u16::try_from(number & 0xffff).unwrap_or(u16::MAX);
                packs.entry(PackId { session: *session, seq }).or_insert_with(Vec::new).push(slot);
            }
        }
        packs
    }

    pub(crate) fn to_bytes(&self, snapshot: SnapshotId) -> std::io::Result<Vec<u8>> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&snapshot.0);
        bytes.extend_from_slice(&u32::try_from(self.sessions.len()).unwrap_or(u32::MAX).to_le_bytes());
        for (session, set) in &self.sessions {
            bytes.extend_from_slice(&session.0);
            bytes.extend_from_slice(&u32::try_from(set.serialized_size()).unwrap_or(u32::MAX).to_le_bytes());
            set.serialize_into(&mut bytes)?;
        }
        seal_hash(&mut bytes);
        Ok(bytes)
    }

    pub(crate) fn parse(snapshot: SnapshotId, bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(unseal_hash(bytes)?);
        fields.expect(MAGIC, "no refset of a known version")?;
        fields.expect(&snapshot.0, "the refset of another snapshot")?;
        let mut sessions = BTreeMap::new();
        for _ in 0..fields.count(20)? {
            let session = SessionId(fields.array()?);
            let len = fields.count(1)?;
            let set = RoaringTreemap::deserialize_from(fields.take(len)?)
                .map_err(|_| fields.error("a bitmap is malformed"))?;
            if set.max().is_some_and(|max| max >= 1 << 48) || sessions.insert(session, set).is_some() {
                return Err(fields.error("a bitmap names places that cannot exist"));
            }
        }
        fields.end()?;
        Ok(Self { sessions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn refsets_round_trip(places in proptest::collection::vec((0u8..3, 0u32..100_000, any::<u16>()), 0..200)) {
            let place = |&(session, seq, slot): &(u8, u32, u16)| Place { pack: PackId { session: SessionId([session; 16]), seq }, slot };
            let mut set = Refset::default();
            for p in &places {
                set.insert(place(p));
            }
            let snapshot = SnapshotId::random();
            let bytes = set.to_bytes(snapshot).unwrap();
            let parsed = Refset::parse(snapshot, &bytes).unwrap();
            prop_assert_eq!(&parsed, &set);
            prop_assert!(places.iter().all(|p| parsed.contains(place(p))));
            let distinct: std::collections::BTreeSet<_> = places.iter().map(place).collect();
            prop_assert_eq!(parsed.packs().values().map(Vec::len).sum::<usize>(), distinct.len());
            prop_assert!(Refset::parse(SnapshotId::random(), &bytes).is_err());
        }

        #[test]
        fn hostile_refsets_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let snapshot = SnapshotId([1; 16]);
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&snapshot.0);
            bytes.extend_from_slice(&1u32.to_le_bytes());
            bytes.extend_from_slice(&[0; 16]);
            bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(&body);
            seal_hash(&mut bytes);
            if let Ok(set) = Refset::parse(snapshot, &bytes) {
                // A bitmap may claim full runs; counting them must not expand them.
                let _ = set.sessions.values().map(RoaringTreemap::len).sum::<u64>();
            }
        }
    }
}
