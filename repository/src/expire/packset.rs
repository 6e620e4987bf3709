//! A set of packs: of each session a bitmap of pack numbers.

use std::collections::BTreeMap;

use roaring::RoaringBitmap;

use crate::id::{PackId, SessionId};
use crate::wire::{Fields, WireError};

/// Names of packs.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct PackSet {
    sessions: BTreeMap<SessionId, RoaringBitmap>,
}

impl PackSet {
    pub(crate) fn insert(&mut self, pack: PackId) {
        self.sessions.entry(pack.session).or_default().insert(pack.seq);
    }

    pub(crate) fn contains(&self, pack: PackId) -> bool {
        self.sessions.get(&pack.session).is_some_and(|packs| packs.contains(pack.seq))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sessions.values().all(RoaringBitmap::is_empty)
    }

    pub(crate) fn len(&self) -> u64 {
        self.sessions.values().map(RoaringBitmap::len).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = PackId> + '_ {
        self.sessions.iter().flat_map(|(session, packs)| packs.iter().map(|seq| PackId { session: *session, seq }))
    }

    /// The sessions that have packs in the set.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = SessionId> + '_ {
        self.sessions.iter().filter(|(_, packs)| !packs.is_empty()).map(|(session, _)| *session)
    }

    pub(crate) fn extend(&mut self, other: &Self) {
        for (session, packs) in &other.sessions {
            *self.sessions.entry(*session).or_default() |= packs;
        }
    }

    /// Takes out what is in `other`.
    pub(crate) fn remove_all(&mut self, other: &Self) {
        self.sessions.retain(|session, packs| {
            if let Some(others) = other.sessions.get(session) {
                *packs -= others;
            }
            !packs.is_empty()
        });
    }

    /// Leaves what is in `other` as well.
    pub(crate) fn retain_all(&mut self, other: &Self) {
        self.sessions.retain(|session, packs| {
            let Some(others) = other.sessions.get(session) else { return false };
            *packs &= others;
            !packs.is_empty()
        });
    }

    /// Appends the number of sessions, and of each its id, the length of its bitmap and the bitmap.
    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) -> std::io::Result<()> {
        let sessions: Vec<_> = self.sessions.iter().filter(|(_, packs)| !packs.is_empty()).collect();
        bytes.extend_from_slice(&u32::try_from(sessions.len()).unwrap_or(u32::MAX).to_le_bytes());
        for (session, packs) in sessions {
            bytes.extend_from_slice(&session.0);
            bytes.extend_from_slice(&u32::try_from(packs.serialized_size()).unwrap_or(u32::MAX).to_le_bytes());
            packs.serialize_into(&mut *bytes)?;
        }
        Ok(())
    }

    pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        let mut sessions = BTreeMap::new();
        for _ in 0..fields.count(20)? {
            let session = SessionId(fields.array()?);
            let len = fields.count(1)?;
            let packs = RoaringBitmap::deserialize_from(fields.take(len)?)
                .map_err(|_| fields.error("a bitmap is malformed"))?;
            if packs.is_empty() || sessions.insert(session, packs).is_some() {
                return Err(fields.error("a session is named twice or without packs"));
            }
        }
        Ok(Self { sessions })
    }
}

impl FromIterator<PackId> for PackSet {
    fn from_iter<I: IntoIterator<Item = PackId>>(packs: I) -> Self {
        let mut set = Self::default();
        packs.into_iter().for_each(|pack| set.insert(pack));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(packs: &[(u8, u32)]) -> PackSet {
        packs.iter().map(|&(session, seq)| PackId { session: SessionId([session; 16]), seq }).collect()
    }

    proptest! {
        #[test]
        fn sets_behave_like_sets(a in proptest::collection::vec((0u8..3, 0u32..50), 0..40), b in proptest::collection::vec((0u8..3, 0u32..50), 0..40)) {
            use std::collections::BTreeSet;
            let (one, two) = (set(&a), set(&b));
            let (a, b): (BTreeSet<_>, BTreeSet<_>) = (a.into_iter().collect(), b.into_iter().collect());
            let plain = |set: &PackSet| set.iter().map(|pack| (pack.session.0[0], pack.seq)).collect::<BTreeSet<_>>();
            prop_assert_eq!(plain(&one), a.clone());
            let mut less = one.clone();
            less.remove_all(&two);
            prop_assert_eq!(plain(&less), &a - &b);
            let mut both = one.clone();
            both.retain_all(&two);
            prop_assert_eq!(plain(&both), &a & &b);
            let mut more = one.clone();
            more.extend(&two);
            prop_assert_eq!(plain(&more), &a | &b);
            let mut bytes = Vec::new();
            more.encode(&mut bytes).unwrap();
            let mut fields = Fields::new(&bytes);
            prop_assert_eq!(PackSet::parse(&mut fields).unwrap(), more);
            prop_assert!(fields.end().is_ok());
        }

        #[test]
        fn hostile_sets_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PackSet::parse(&mut Fields::new(&bytes));
        }
    }
}
