//! Which slots of which packs a snapshot refers to: `r/<snapshot>/<version>`.
//!
//! Expiry is an OR of these sets. Version 0 is committed with the snapshot; repacking commits later ones.

use std::collections::{BTreeMap, BTreeSet};

use roaring::RoaringTreemap;

use crate::expire::packset::PackSet;
use crate::id::{PackId, Place, SessionId, SnapshotId};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

const MAGIC: &[u8; 8] = b"LBREFS01";
/// No refset is larger; one for a petabyte is about 180 MB.
pub(crate) const MAX_REFSET_BYTES: u64 = 1 << 30;

/// Key of a version of a snapshot's refset.
pub(crate) fn refset_key(snapshot: SnapshotId, version: u32) -> String {
    format!("r/{snapshot}/{version}")
}

/// The snapshot and the version of a refset's key.
pub(crate) fn parse_refset_key(key: &str) -> Option<(SnapshotId, u32)> {
    let (snapshot, version) = key.strip_prefix("r/")?.split_once('/')?;
    let parsed = (snapshot.parse().ok()?, version.parse().ok()?);
    (refset_key(parsed.0, parsed.1) == key).then_some(parsed)
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

    /// Takes in all of another set.
    pub(crate) fn extend(&mut self, other: &Self) {
        for (session, set) in &other.sessions {
            *self.sessions.entry(*session).or_default() |= set;
        }
    }

    /// Takes a place out; whether it was there.
    pub(crate) fn remove(&mut self, place: Place) -> bool {
        self.sessions.get_mut(&place.pack.session).is_some_and(|set| set.remove(number(place.pack.seq, place.slot)))
    }

    /// Whether a place in this pack is in the set.
    pub(crate) fn has_pack(&self, pack: PackId) -> bool {
        let (first, last) = (number(pack.seq, 0), number(pack.seq, u16::MAX));
        self.sessions.get(&pack.session).is_some_and(|set| set.range_cardinality(first..=last) > 0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sessions.values().all(RoaringTreemap::is_empty)
    }

    /// Number of places.
    pub(crate) fn len(&self) -> u64 {
        self.sessions.values().map(RoaringTreemap::len).sum()
    }

    pub(crate) fn has_session(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_some_and(|set| !set.is_empty())
    }

    /// The slots of each pack, in order, one pack at a time: a set may name more than fits into memory.
    pub(crate) fn each_pack(&self) -> impl Iterator<Item = (PackId, Vec<u16>)> + '_ {
        self.sessions.iter().flat_map(|(session, set)| grouped(*session, set))
    }

    /// The same of the packs of these sessions only.
    pub(crate) fn packs_of(&self, sessions: &BTreeSet<SessionId>) -> Vec<(PackId, Vec<u16>)> {
        let found = sessions.iter().filter_map(|session| Some((session, self.sessions.get(session)?)));
        found.flat_map(|(session, set)| grouped(*session, set)).collect()
    }

    /// The slots of one pack.
    pub(crate) fn slots(&self, pack: PackId) -> Vec<u16> {
        let Some(set) = self.sessions.get(&pack.session) else { return Vec::new() };
        let first = set.rank(number(pack.seq, 0)) - u64::from(set.contains(number(pack.seq, 0)));
        let end = set.rank(number(pack.seq, u16::MAX));
        (first..end).filter_map(|at| u16::try_from(set.select(at)? & 0xffff).ok()).collect()
    }

    /// The packs that it has places in.
    pub(crate) fn pack_set(&self) -> PackSet {
        let mut packs = PackSet::default();
        for (session, set) in &self.sessions {
            let mut last = None;
            for number in set {
                let seq = u32::try_from(number >> 16).unwrap_or(u32::MAX);
                if last.replace(seq) != Some(seq) {
                    packs.insert(PackId { session: *session, seq });
                }
            }
        }
        packs
    }

    /// The stored form; `by` is the session that writes it.
    pub(crate) fn to_bytes(&self, snapshot: SnapshotId, version: u32, by: SessionId) -> std::io::Result<Vec<u8>> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&snapshot.0);
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&by.0);
        let sessions: Vec<_> = self.sessions.iter().filter(|(_, set)| !set.is_empty()).collect();
        bytes.extend_from_slice(&u32::try_from(sessions.len()).unwrap_or(u32::MAX).to_le_bytes());
        for (session, set) in sessions {
            bytes.extend_from_slice(&session.0);
            bytes.extend_from_slice(&u32::try_from(set.serialized_size()).unwrap_or(u32::MAX).to_le_bytes());
            set.serialize_into(&mut bytes)?;
        }
        seal_hash(&mut bytes);
        Ok(bytes)
    }

    /// Reads the stored form; also tells which session wrote it.
    pub(crate) fn parse(snapshot: SnapshotId, version: u32, bytes: &[u8]) -> Result<(SessionId, Self), WireError> {
        let mut fields = Fields::new(unseal_hash(bytes)?);
        fields.expect(MAGIC, "no refset of a known version")?;
        fields.expect(&snapshot.0, "the refset of another snapshot")?;
        fields.expect(&version.to_le_bytes(), "another version of the refset")?;
        let by = SessionId(fields.array()?);
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
        Ok((by, Self { sessions }))
    }
}

/// The slots of the packs of one session, pack by pack.
fn grouped(session: SessionId, set: &RoaringTreemap) -> impl Iterator<Item = (PackId, Vec<u16>)> + '_ {
    // Numbers are 48 bits by construction and by `parse`.
    let slot = |number: u64| u16::try_from(number & 0xffff).unwrap_or(u16::MAX);
    let mut numbers = set.iter().peekable();
    std::iter::from_fn(move || {
        let first = numbers.next()?;
        let mut slots = vec![slot(first)];
        while let Some(number) = numbers.next_if(|number| number >> 16 == first >> 16) {
            slots.push(slot(number));
        }
        let seq = u32::try_from(first >> 16).unwrap_or(u32::MAX);
        Some((PackId { session, seq }, slots))
    })
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
            let by = SessionId([9; 16]);
            let bytes = set.to_bytes(snapshot, 3, by).unwrap();
            let (found, parsed) = Refset::parse(snapshot, 3, &bytes).unwrap();
            prop_assert_eq!((found, &parsed), (by, &set));
            prop_assert!(Refset::parse(snapshot, 2, &bytes).is_err());
            for (pack, slots) in set.each_pack() {
                prop_assert_eq!(set.slots(pack), slots);
                prop_assert!(set.pack_set().contains(pack) && set.has_pack(pack));
            }
            prop_assert_eq!(set.pack_set().len(), set.each_pack().count() as u64);
            prop_assert!(places.iter().all(|p| parsed.contains(place(p))));
            let distinct: std::collections::BTreeSet<_> = places.iter().map(place).collect();
            prop_assert_eq!(parsed.each_pack().map(|(_, slots)| slots.len()).sum::<usize>(), distinct.len());
            let other = PackId { session: SessionId([9; 16]), seq: 0 };
            prop_assert!(!parsed.has_pack(other));
            prop_assert_eq!(parsed.len(), distinct.len() as u64);
            prop_assert_eq!(parsed.is_empty(), places.is_empty());
            prop_assert!(Refset::parse(SnapshotId::random(), 3, &bytes).is_err());
            let key = refset_key(snapshot, 3);
            prop_assert_eq!(parse_refset_key(&key), Some((snapshot, 3)));
            prop_assert_eq!(parse_refset_key(&key.replace("/3", "/03")), None);
        }

        #[test]
        fn hostile_refsets_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let snapshot = SnapshotId([1; 16]);
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&snapshot.0);
            bytes.extend_from_slice(&0u32.to_le_bytes());
            bytes.extend_from_slice(&[2; 16]);
            bytes.extend_from_slice(&1u32.to_le_bytes());
            bytes.extend_from_slice(&[0; 16]);
            bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(&body);
            seal_hash(&mut bytes);
            if let Ok((_, set)) = Refset::parse(snapshot, 0, &bytes) {
                // A bitmap may claim full runs; counting them must not expand them.
                let _ = set.sessions.values().map(RoaringTreemap::len).sum::<u64>();
            }
        }
    }
}
