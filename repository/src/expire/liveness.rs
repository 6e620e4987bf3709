//! What the living snapshots refer to together: an OR of their refsets, kept per lineage in the local cache.
//!
//! A lineage of which only new snapshots appeared costs the new ones; one that lost some is computed again from refsets,
//! which are in the cache as well. Nothing here walks a manifest.

use std::collections::{BTreeMap, BTreeSet};

use futures::FutureExt;

use crate::engine::Engine;
use crate::expire::marks::LiveRefs;
use crate::id::{SessionId, SnapshotId};
use crate::parallel::at_once;
use crate::refset::Refset;
use crate::session::references::{ReferencesError, union};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

const MAGIC: &[u8; 8] = b"LBUNIO01";
/// Lineages at once.
const PARALLEL_LINEAGES: usize = 4;

/// A version of a snapshot's refset, and its hash.
pub(crate) type Member = (SnapshotId, u32, [u8; 32]);

/// All places that these references name together.
pub(super) async fn union_of(engine: &Engine, refs: &[LiveRefs]) -> Result<Refset, ReferencesError> {
    let lineages = lineages(engine);
    let mut groups: BTreeMap<&str, BTreeSet<Member>> = BTreeMap::new();
    for refs in refs {
        let lineage = lineages.get(&refs.snapshot).map_or("", String::as_str);
        groups.entry(lineage).or_default().insert((refs.snapshot, refs.version, refs.hash));
    }
    let work = groups.into_iter().map(|(lineage, members)| union_of_lineage(engine, lineage, members).boxed());
    let mut all = Refset::default();
    at_once(PARALLEL_LINEAGES, work.collect()).await?.iter().for_each(|set| all.extend(set));
    Ok(all)
}

/// The lineage of each snapshot that is known.
pub(super) fn lineages(engine: &Engine) -> BTreeMap<SnapshotId, String> {
    let all = engine.commits.all();
    let snapshots = all.iter().flat_map(|(_, committed)| &committed.commit.snapshots);
    snapshots.map(|snapshot| (snapshot.id, snapshot.lineage.clone())).collect()
}

async fn union_of_lineage(
    engine: &Engine,
    lineage: &str,
    members: BTreeSet<Member>,
) -> Result<Refset, ReferencesError> {
    let key = format!("u/{}", &blake3::hash(lineage.as_bytes()).to_hex()[..32]);
    let cached = engine.cache.get_local(&key).await.and_then(|bytes| parse(&bytes).ok());
    let (known, mut set) = cached.filter(|(known, _)| known.is_subset(&members)).unwrap_or_default();
    let new: Vec<_> = members.difference(&known).copied().collect();
    if !new.is_empty() {
        set.extend(&union(engine, new).await?);
        if let Ok(bytes) = to_bytes(&members, &set) {
            engine.cache.put(&key, &bytes.into());
        }
    }
    Ok(set)
}

fn to_bytes(members: &BTreeSet<Member>, set: &Refset) -> std::io::Result<Vec<u8>> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&u32::try_from(members.len()).unwrap_or(u32::MAX).to_le_bytes());
    for (snapshot, version, hash) in members {
        bytes.extend_from_slice(&snapshot.0);
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(hash);
    }
    bytes.extend(set.to_bytes(SnapshotId([0; 16]), 0, SessionId([0; 16]))?);
    seal_hash(&mut bytes);
    Ok(bytes)
}

pub(crate) fn parse(bytes: &[u8]) -> Result<(BTreeSet<Member>, Refset), WireError> {
    let mut fields = Fields::new(unseal_hash(bytes)?);
    fields.expect(MAGIC, "no union of a known version")?;
    let count = fields.count(52)?;
    let members = (0..count)
        .map(|_| Ok::<_, WireError>((SnapshotId(fields.array()?), fields.u32()?, fields.array()?)))
        .collect::<Result<_, _>>()?;
    let rest = fields.take(fields.left())?;
    let (_, set) = Refset::parse(SnapshotId([0; 16]), 0, rest)?;
    Ok((members, set))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{PackId, Place};

    #[test]
    fn a_cached_union_round_trips_and_damage_is_found() {
        let mut set = Refset::default();
        set.insert(Place { pack: PackId { session: SessionId([1; 16]), seq: 2 }, slot: 3 });
        let members = BTreeSet::from([(SnapshotId([4; 16]), 1, [5; 32])]);
        let bytes = to_bytes(&members, &set).unwrap();
        assert_eq!(parse(&bytes).unwrap(), (members, set));
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(parse(&changed).is_err());
        }
    }
}
