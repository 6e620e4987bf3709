//! Index versions: which merged parts are current. `xv/<n>` names a list; the largest n that exists is in force.
//!
//! Marks are tiny and never removed, so that the newest is found by reads alone, whatever a listing shows; lists and parts
//! of earlier versions are removed. Both have a hash under a key of the domain, as the marks of expiry do.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::TryStreamExt;

use super::part::PartInfo;
use crate::expire::marks::{MarkKey, exists, split};
use crate::id::SessionId;
use crate::store::{Store, StoreError};
use crate::wire::{Fields, WireError};

/// Where the marks of versions lie.
pub(crate) const VERSIONS_PREFIX: &str = "xv/";
/// Where their lists lie.
pub(crate) const LISTS_PREFIX: &str = "xl/";
/// Where merged parts lie.
pub(crate) const PARTS_PREFIX: &str = "x1/";
/// No mark of a version is larger.
pub(crate) const MAX_VERSION_BYTES: u64 = 256;
/// No list is larger: 78 bytes a part, 20 bytes a merged segment.
pub(crate) const MAX_LIST_BYTES: u64 = 64 << 20;

const VERSION_MAGIC: &[u8; 8] = b"LBXVER01";
const LIST_MAGIC: &[u8; 8] = b"LBXLST01";
const PART_INFO_BYTES: usize = 78;

pub(super) fn version_key(version: u64) -> String {
    format!("{VERSIONS_PREFIX}{version:010}")
}

fn named_key(prefix: &str, version: u64, name: [u8; 16]) -> String {
    format!("{prefix}{version:010}/{}", SessionId(name))
}

fn list_key(version: u64, hash: &[u8; 32]) -> String {
    let mut name = [0; 16];
    name.copy_from_slice(&hash[..16]);
    named_key(LISTS_PREFIX, version, name)
}

/// The key of a part.
pub(super) fn part_key(info: &PartInfo) -> String {
    named_key(PARTS_PREFIX, info.version, info.name)
}

/// The version of a key below one of the prefixes here.
pub(super) fn version_of(prefix: &str, key: &str) -> Option<u64> {
    let rest = key.strip_prefix(prefix)?;
    let (number, name) = if prefix == VERSIONS_PREFIX {
        (rest, None)
    } else {
        let (number, name) = rest.split_once('/')?;
        (number, Some(name.parse::<SessionId>().ok()?))
    };
    let version = number.parse().ok()?;
    let again = name.map_or_else(|| version_key(version), |name| named_key(prefix, version, name.0));
    (again == key).then_some(version)
}

/// What a version consists of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct List {
    /// Runs, oldest first; the parts of a run are sorted and do not overlap.
    pub(super) runs: Vec<Vec<PartInfo>>,
    /// Segments of sessions that are merged into the runs and may still be there.
    pub(super) absorbed: BTreeSet<(SessionId, u32)>,
}

/// A version that was put together, not yet in force.
pub(super) struct Sealed {
    pub(super) list_key: String,
    pub(super) list: Vec<u8>,
    pub(super) mark: Vec<u8>,
}

impl List {
    pub(super) fn seal(&self, key: &MarkKey, version: u64) -> Sealed {
        let list = key.seal(self.to_bytes(version));
        let hash = *blake3::hash(&list).as_bytes();
        let mut mark = VERSION_MAGIC.to_vec();
        mark.extend_from_slice(&version.to_le_bytes());
        // Two that merge never make equal marks, so that each can tell whether its own was taken.
        mark.extend_from_slice(&rand::random::<[u8; 16]>());
        mark.extend_from_slice(&hash);
        Sealed { list_key: list_key(version, &hash), list, mark: key.seal(mark) }
    }

    fn to_bytes(&self, version: u64) -> Vec<u8> {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = LIST_MAGIC.to_vec();
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&count(self.runs.len()));
        for run in &self.runs {
            bytes.extend_from_slice(&count(run.len()));
            for part in run {
                bytes.extend_from_slice(&part.version.to_le_bytes());
                bytes.extend_from_slice(&part.name);
                bytes.extend_from_slice(&part.first);
                bytes.extend_from_slice(&part.entries.to_le_bytes());
                bytes.extend_from_slice(&part.head_len.to_le_bytes());
                bytes.extend_from_slice(&part.head_hash);
            }
        }
        bytes.extend_from_slice(&count(self.absorbed.len()));
        for (session, number) in &self.absorbed {
            bytes.extend_from_slice(&session.0);
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn parse(mut fields: Fields<'_>, version: u64) -> Result<Self, WireError> {
        fields.expect(LIST_MAGIC, "no list of an index of a known version")?;
        fields.expect(&version.to_le_bytes(), "the list of another version")?;
        let mut list = Self::default();
        for _ in 0..fields.count(4)? {
            let count = fields.count(PART_INFO_BYTES)?;
            let run = (0..count).map(|_| parse_info(&mut fields)).collect::<Result<Vec<_>, _>>()?;
            if !run.is_sorted_by(|a, b| a.first < b.first) {
                return Err(fields.error("the parts of a run are not sorted"));
            }
            list.runs.push(run);
        }
        for _ in 0..fields.count(20)? {
            list.absorbed.insert((SessionId(fields.array()?), fields.u32()?));
        }
        fields.end()?;
        Ok(list)
    }
}

fn parse_info(fields: &mut Fields<'_>) -> Result<PartInfo, WireError> {
    Ok(PartInfo {
        version: fields.u64()?,
        name: fields.array()?,
        first: fields.array()?,
        entries: fields.u32()?,
        head_len: fields.u32()?,
        head_hash: fields.array()?,
    })
}

fn parse_mark(mut fields: Fields<'_>, version: u64) -> Result<[u8; 32], WireError> {
    fields.expect(VERSION_MAGIC, "no mark of an index version")?;
    fields.expect(&version.to_le_bytes(), "the mark of another version")?;
    fields.take(16)?;
    let hash = fields.array()?;
    fields.end()?;
    Ok(hash)
}

/// The newest version that exists; 0 when there is none. `known` is one that exists.
pub(super) async fn newest(store: &dyn Store, known: u64) -> Result<u64, StoreError> {
    let mut newest = known;
    if newest == 0 {
        // A listing says where to look; whether a version exists is asked of the store itself.
        let mut listed = store.list(VERSIONS_PREFIX);
        while let Some(object) = listed.try_next().await? {
            newest = newest.max(version_of(VERSIONS_PREFIX, &object.key).unwrap_or(0));
        }
    }
    while exists(store, &version_key(newest + 1)).await? {
        newest += 1;
    }
    Ok(newest)
}

/// What a version consists of. `Ok(Err(_))`: an object of it is damaged, or missing although no later version exists.
pub(super) async fn list(
    store: &dyn Store,
    key: &MarkKey,
    version: u64,
) -> Result<Result<List, WireError>, StoreError> {
    if version == 0 {
        return Ok(Ok(List::default()));
    }
    let Some(mark) = get(store, &version_key(version), MAX_VERSION_BYTES).await? else { return Ok(Err(MISSING)) };
    let hash = match key.unseal(&mark).and_then(|fields| parse_mark(fields, version)) {
        Ok(hash) => hash,
        Err(error) => return Ok(Err(error)),
    };
    let Some(list) = get(store, &list_key(version, &hash), MAX_LIST_BYTES).await? else { return Ok(Err(MISSING)) };
    if *blake3::hash(&list).as_bytes() != hash {
        return Ok(Err(WireError { what: "it is not the list that was named", at: 0 }));
    }
    Ok(key.unseal(&list).and_then(|fields| List::parse(fields, version)))
}

const MISSING: WireError = WireError { what: "an object is missing or too large", at: 0 };

async fn get(store: &dyn Store, key: &str, limit: u64) -> Result<Option<Bytes>, StoreError> {
    use crate::error::{Classified, ErrorClass};
    match store.get(key, limit).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Checks a mark or a list as far as anyone can who has no key.
pub(crate) fn verify(key: &str, bytes: &[u8]) -> Result<(), WireError> {
    let stray = || WireError { what: "the key is not one of an index version", at: 0 };
    let (body, _) = split(bytes)?;
    if let Some(version) = version_of(VERSIONS_PREFIX, key) {
        return parse_mark(Fields::new(body), version).map(drop);
    }
    let version = version_of(LISTS_PREFIX, key).ok_or_else(stray)?;
    if list_key(version, blake3::hash(bytes).as_bytes()) != key {
        return Err(WireError { what: "the list has another name", at: 0 });
    }
    List::parse(Fields::new(body), version).map(drop)
}

/// Whether these bytes, which come from a copy, are the mark or the list that lay here: a copy on which somebody merged has
/// versions of its own.
pub(crate) async fn fits_versions(
    store: &dyn Store,
    mark_key: &MarkKey,
    key: &str,
    bytes: &[u8],
) -> Result<bool, StoreError> {
    if verify(key, bytes).is_err() {
        return Ok(false);
    }
    let Ok(fields) = mark_key.unseal(bytes) else { return Ok(false) };
    let Some(version) = version_of(VERSIONS_PREFIX, key) else { return Ok(true) };
    let Ok(hash) = parse_mark(fields, version) else { return Ok(false) };
    // The list is made before it, under a name that is used once, and goes only when there is a later version.
    Ok(exists(store, &list_key(version, &hash)).await? || exists(store, &version_key(version + 1)).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_round_trip_and_forged_ones_are_refused() {
        let (key, other) = (MarkKey::new(&[1; 32]), MarkKey::new(&[2; 32]));
        let part = |first: u8| PartInfo {
            version: 4,
            name: [first; 16],
            first: [first; 14],
            entries: 9,
            head_len: 8,
            head_hash: [7; 32],
        };
        let list = List {
            runs: vec![vec![part(1), part(5)], vec![part(0)], Vec::new()],
            absorbed: BTreeSet::from([(SessionId([3; 16]), 0), (SessionId([3; 16]), u32::MAX)]),
        };
        let Sealed { list_key, list: bytes, mark } = list.seal(&key, 4);
        assert_eq!(key.unseal(&bytes).and_then(|fields| List::parse(fields, 4)), Ok(list.clone()));
        assert!(key.unseal(&bytes).and_then(|fields| List::parse(fields, 5)).is_err());
        assert!(other.unseal(&bytes).is_err() && other.unseal(&mark).is_err());
        assert_eq!((verify(&list_key, &bytes), verify(&version_key(4), &mark)), (Ok(()), Ok(())));
        assert!(verify(&version_key(5), &mark).is_err());
        for (key, bytes) in [(&list_key, &bytes), (&version_key(4), &mark)] {
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                assert!(verify(key, &changed).is_err() && verify(key, &bytes[..at]).is_err());
            }
        }
        let unsorted = List { runs: vec![vec![part(5), part(1)]], ..List::default() }.seal(&key, 4);
        assert!(verify(&unsorted.list_key, &unsorted.list).is_err());
    }

    #[test]
    fn keys_round_trip() {
        assert_eq!(version_of(VERSIONS_PREFIX, &version_key(7)), Some(7));
        assert_eq!(version_of(PARTS_PREFIX, &named_key(PARTS_PREFIX, 7, [1; 16])), Some(7));
        let named = SessionId([1; 16]);
        for (prefix, stray) in [
            (VERSIONS_PREFIX, "xv/7".to_owned()),
            (VERSIONS_PREFIX, format!("xv/0000000007/{named}")),
            (LISTS_PREFIX, "xl/0000000007".to_owned()),
            (PARTS_PREFIX, "x1/0000000007".to_owned()),
            (PARTS_PREFIX, "x1/0000000007/abc".to_owned()),
            (PARTS_PREFIX, format!("x1/7/{named}")),
        ] {
            assert_eq!(version_of(prefix, &stray), None, "{stray}");
        }
    }
}
