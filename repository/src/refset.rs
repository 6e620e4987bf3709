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

    pub(crate) fn has_session(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_some_and(|set| !set.is_empty())
    }

    /// The slots of each pack, in order.
    pub(crate) fn packs(&self) -> BTreeMap<PackId, Vec<u16>> {
        let mut packs = BTreeMap::new();
        for (session, set) in &self.sessions {
            packs.extend(grouped(*session, set));
        }
        packs
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
fn grouped(session: SessionId, set: &RoaringTreemap) -> Vec<(PackId, Vec<u16>)> {
    let mut packs: Vec<(PackId, Vec<u16>)> = Vec::new();
    for number in set {
        // Numbers are 48 bits by construction and by `parse`.
        let pack = PackId { session, seq: u32::try_from(number >> 16).unwrap_or(u32::MAX) };
        let slot = u16::try_from(number & 0xffff).unwrap_or(u16::MAX);
        match packs.last_mut() {
            Some((last, slots)) if *last == pack => slots.push(slot),
            _ => packs.push((pack, vec![slot])),
        }
    }
    packs
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
            for (pack, slots) in set.packs() {
                prop_assert_eq!(set.slots(pack), slots);
                prop_assert!(set.pack_set().contains(pack));
            }
            prop_assert_eq!(set.pack_set().len(), set.packs().len() as u64);
            prop_assert!(places.iter().all(|p| parsed.contains(place(p))));
            let distinct: std::collections::BTreeSet<_> = places.iter().map(place).collect();
            prop_assert_eq!(parsed.packs().values().map(Vec::len).sum::<usize>(), distinct.len());
            prop_assert!(Refset::parse(SnapshotId::random(), 3, &bytes).is_err());
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
