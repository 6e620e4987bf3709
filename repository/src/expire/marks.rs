//! The objects of a round of expiry and the tombstones: their bytes and keys. Nothing here decides anything.
//!
//! A round K has `g/<K>/condemned`, `g/<K>/final`, `g/<K>/done` and, until the next is done, `g/<K>/live/<name>`.
//! All have a hash under a key of the domain, so that a store cannot make packs or snapshots vanish by a forged mark, and end
//! with one without a key, by which anyone finds damage.

use bytes::Bytes;

use super::packset::PackSet;
use crate::engine::Engine;
use crate::id::{SessionId, SnapshotId};
use crate::store::{Store, StoreError};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

/// Where the marks of rounds lie.
pub(crate) const MARKS_PREFIX: &str = "g/";
/// Where tombstones lie.
pub(crate) const TOMBSTONE_PREFIX: &str = "t/";
/// No mark is larger: bitmaps of packs, or 84 bytes a live snapshot.
pub(crate) const MAX_MARK_BYTES: u64 = 1 << 30;
/// No tombstone is larger.
pub(crate) const MAX_TOMBSTONE_BYTES: u64 = 256;

const CONDEMNED_MAGIC: &[u8; 8] = b"LBCOND01";
const FINAL_MAGIC: &[u8; 8] = b"LBFINA01";
const LIVE_MAGIC: &[u8; 8] = b"LBLIVE01";
const DONE_MAGIC: &[u8; 8] = b"LBDONE01";
const TOMBSTONE_MAGIC: &[u8; 8] = b"LBTOMB01";
/// What the key of the marks is derived for.
const KEY_CONTEXT: &str = "lifeboat 2026 marks of expiry v1";

/// The key that marks end with a hash under.
#[derive(Clone)]
pub(crate) struct MarkKey([u8; 32]);

impl std::fmt::Debug for MarkKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MarkKey")
    }
}

impl MarkKey {
    pub(crate) fn new(structure: &[u8; 32]) -> Self {
        Self(blake3::derive_key(KEY_CONTEXT, structure))
    }

    pub(crate) fn seal(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let hash = blake3::keyed_hash(&self.0, &bytes);
        bytes.extend_from_slice(hash.as_bytes());
        seal_hash(&mut bytes);
        bytes
    }

    pub(crate) fn unseal<'a>(&self, bytes: &'a [u8]) -> Result<Fields<'a>, WireError> {
        let (body, hash) = split(bytes)?;
        if blake3::keyed_hash(&self.0, body) == blake3::Hash::from_bytes(*hash) {
            Ok(Fields::new(body))
        } else {
            Err(WireError { what: "the mark was not written by this repository", at: body.len() })
        }
    }
}

/// What a mark says, and its hash under the key.
pub(crate) fn split(bytes: &[u8]) -> Result<(&[u8], &[u8; 32]), WireError> {
    let sealed = unseal_hash(bytes)?;
    sealed.split_last_chunk().ok_or(WireError { what: "the mark is too short for a hash", at: sealed.len() })
}

/// Checks a mark or a tombstone as far as anyone can who has no key.
pub(crate) fn verify(at: &str, bytes: &[u8]) -> Result<(), WireError> {
    let stray = WireError { what: "the key is not one of a mark", at: 0 };
    let (body, _) = split(bytes)?;
    if let Some(snapshot) = parse_tombstone_key(at) {
        return tombstone(Fields::new(body), snapshot);
    }
    let round = round_of(at).ok_or(stray)?;
    let begin = |magic| begin(Fields::new(body), magic, round);
    if at == condemned_key(round) {
        Condemned::body(begin(CONDEMNED_MAGIC)?).map(drop)
    } else if at == final_key(round) {
        Final::body(begin(FINAL_MAGIC)?).map(drop)
    } else if at == live_key(round, blake3::hash(bytes).as_bytes()) {
        Live::body(begin(LIVE_MAGIC)?).map(drop)
    } else if at == done_key(round) {
        begin(DONE_MAGIC)?.end()
    } else {
        Err(stray)
    }
}

/// As [`verify`], and whether it was written by this repository.
pub(crate) fn verify_with(key: &MarkKey, at: &str, bytes: &[u8]) -> Result<(), WireError> {
    key.unseal(bytes)?;
    verify(at, bytes)
}

/// Whether these bytes, which come from a copy, fit what else is known of the round, so that they are what lay here.
///
/// The key proves who wrote them, but not where: a copy on which somebody expired has rounds of its own.
pub(crate) async fn fits_round(engine: &Engine, at: &str, bytes: &[u8]) -> Result<bool, StoreError> {
    let key = engine.mark_key();
    if verify_with(&key, at, bytes).is_err() {
        return Ok(false);
    }
    let Some(round) = round_of(at) else { return Ok(true) };
    if at == final_key(round) {
        let Ok(found) = Final::parse(&key, round, bytes) else { return Ok(false) };
        // Made before it, under a name that is used once; gone only when a later round is done.
        return Ok(exists(&*engine.store, &live_key(round, &found.live)).await? || is_done(engine, round + 1).await?);
    }
    if at == condemned_key(round) {
        let Ok(found) = Condemned::parse(&key, round, bytes) else { return Ok(false) };
        return match finals(engine, round).await {
            Ok(Some(decided)) => {
                let mut packs = decided.packs;
                packs.remove_all(&found.packs);
                Ok(packs.is_empty())
            }
            Ok(None) => Ok(true),
            Err(MarkError::Store(error)) => Err(error),
            Err(MarkError::Damaged { .. }) => Ok(false),
        };
    }
    Ok(true)
}

pub(crate) fn condemned_key(round: u64) -> String {
    format!("{MARKS_PREFIX}{round:010}/condemned")
}

pub(crate) fn final_key(round: u64) -> String {
    format!("{MARKS_PREFIX}{round:010}/final")
}

pub(crate) fn done_key(round: u64) -> String {
    format!("{MARKS_PREFIX}{round:010}/done")
}

pub(crate) fn live_key(round: u64, hash: &[u8; 32]) -> String {
    format!("{MARKS_PREFIX}{round:010}/live/{}", SessionId(name_of(hash)))
}

fn name_of(hash: &[u8; 32]) -> [u8; 16] {
    let mut name = [0; 16];
    name.copy_from_slice(&hash[..16]);
    name
}

/// The round that a mark's key belongs to.
pub(crate) fn round_of(key: &str) -> Option<u64> {
    key.strip_prefix(MARKS_PREFIX)?.split('/').next()?.parse().ok()
}

pub(crate) fn tombstone_key(snapshot: SnapshotId) -> String {
    format!("{TOMBSTONE_PREFIX}{snapshot}")
}

pub(crate) fn parse_tombstone_key(key: &str) -> Option<SnapshotId> {
    key.strip_prefix(TOMBSTONE_PREFIX)?.parse().ok()
}

/// What a tombstone says: only whose it is, and when it was set, for people.
pub(crate) fn tombstone_bytes(key: &MarkKey, snapshot: SnapshotId, at: jiff::Timestamp) -> Vec<u8> {
    let mut bytes = TOMBSTONE_MAGIC.to_vec();
    bytes.extend_from_slice(&snapshot.0);
    bytes.extend_from_slice(&at.as_millisecond().to_le_bytes());
    bytes.extend_from_slice(&rand::random::<[u8; 16]>());
    key.seal(bytes)
}

/// Whether these bytes are a tombstone of the snapshot.
pub(crate) fn check_tombstone(key: &MarkKey, snapshot: SnapshotId, bytes: &[u8]) -> Result<(), WireError> {
    tombstone(key.unseal(bytes)?, snapshot)
}

fn tombstone(mut fields: Fields<'_>, snapshot: SnapshotId) -> Result<(), WireError> {
    fields.expect(TOMBSTONE_MAGIC, "no tombstone of a known version")?;
    fields.expect(&snapshot.0, "the tombstone of another snapshot")?;
    fields.take(24)?;
    fields.end()
}

/// `g/<round>/condemned`: what may be deleted in this round.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Condemned {
    pub(crate) packs: PackSet,
}

/// `g/<round>/final`: what is deleted in this round, and what everything later builds on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Final {
    pub(crate) packs: PackSet,
    /// The hash of the list of what lives; its first half is the list's name.
    pub(crate) live: [u8; 32],
    /// Committed sessions of which nothing lives any more, with their snapshots.
    pub(crate) dropped: Vec<(SessionId, Vec<SnapshotId>)>,
    /// Refsets that nothing refers to any more.
    pub(crate) obsolete: Vec<(SnapshotId, u32)>,
}

/// The set of references of a snapshot that is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LiveRefs {
    pub(crate) snapshot: SnapshotId,
    pub(crate) version: u32,
    pub(crate) hash: [u8; 32],
    /// The session whose commit names this version.
    pub(crate) by: SessionId,
}

/// A committed session of which something lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LiveCommit {
    pub(crate) session: SessionId,
    pub(crate) snapshots: Vec<LiveRefs>,
}

/// A reader: what `r/<session>/0` refers to is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LivePin {
    pub(crate) session: SessionId,
    /// When it registered, in milliseconds.
    pub(crate) since: i64,
    pub(crate) hash: [u8; 32],
}

/// `g/<round>/live/<name>`: what lives after a round, of all epochs before it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Live {
    /// Sorted by session.
    pub(crate) commits: Vec<LiveCommit>,
    pub(crate) pins: Vec<LivePin>,
    /// Packs that lost references and may be worth repacking.
    pub(crate) worn: PackSet,
}

fn put_count(bytes: &mut Vec<u8>, count: usize) {
    bytes.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
}

fn head(magic: &[u8], round: u64) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend_from_slice(&round.to_le_bytes());
    // Two deleters never make equal objects, so that each can tell whether its own was taken.
    bytes.extend_from_slice(&rand::random::<[u8; 16]>());
    bytes
}

fn open<'a>(key: &MarkKey, magic: &[u8], round: u64, bytes: &'a [u8]) -> Result<Fields<'a>, WireError> {
    begin(key.unseal(bytes)?, magic, round)
}

fn begin<'a>(mut fields: Fields<'a>, magic: &[u8], round: u64) -> Result<Fields<'a>, WireError> {
    fields.expect(magic, "no mark of a known version")?;
    fields.expect(&round.to_le_bytes(), "the mark of another round")?;
    fields.take(16)?;
    Ok(fields)
}

/// The bytes of `g/<round>/done`.
pub(crate) fn done_bytes(key: &MarkKey, round: u64) -> Vec<u8> {
    key.seal(head(DONE_MAGIC, round))
}

impl Condemned {
    pub(crate) fn to_bytes(&self, key: &MarkKey, round: u64) -> std::io::Result<Vec<u8>> {
        let mut bytes = head(CONDEMNED_MAGIC, round);
        self.packs.encode(&mut bytes)?;
        Ok(key.seal(bytes))
    }

    pub(crate) fn parse(key: &MarkKey, round: u64, bytes: &[u8]) -> Result<Self, WireError> {
        Self::body(open(key, CONDEMNED_MAGIC, round, bytes)?)
    }

    fn body(mut fields: Fields<'_>) -> Result<Self, WireError> {
        let packs = PackSet::parse(&mut fields)?;
        fields.end()?;
        Ok(Self { packs })
    }
}

impl Final {
    pub(crate) fn to_bytes(&self, key: &MarkKey, round: u64) -> std::io::Result<Vec<u8>> {
        let mut bytes = head(FINAL_MAGIC, round);
        bytes.extend_from_slice(&self.live);
        self.packs.encode(&mut bytes)?;
        put_count(&mut bytes, self.dropped.len());
        for (session, snapshots) in &self.dropped {
            bytes.extend_from_slice(&session.0);
            put_count(&mut bytes, snapshots.len());
            for snapshot in snapshots {
                bytes.extend_from_slice(&snapshot.0);
            }
        }
        put_count(&mut bytes, self.obsolete.len());
        for (snapshot, version) in &self.obsolete {
            bytes.extend_from_slice(&snapshot.0);
            bytes.extend_from_slice(&version.to_le_bytes());
        }
        Ok(key.seal(bytes))
    }

    pub(crate) fn parse(key: &MarkKey, round: u64, bytes: &[u8]) -> Result<Self, WireError> {
        Self::body(open(key, FINAL_MAGIC, round, bytes)?)
    }

    fn body(mut fields: Fields<'_>) -> Result<Self, WireError> {
        let live = fields.array()?;
        let packs = PackSet::parse(&mut fields)?;
        let mut dropped = Vec::new();
        for _ in 0..fields.count(20)? {
            let session = SessionId(fields.array()?);
            let count = fields.count(16)?;
            let snapshots = (0..count).map(|_| fields.array().map(SnapshotId)).collect::<Result<_, _>>()?;
            dropped.push((session, snapshots));
        }
        let count = fields.count(20)?;
        let obsolete = (0..count)
            .map(|_| Ok::<_, WireError>((SnapshotId(fields.array()?), fields.u32()?)))
            .collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(Self { packs, live, dropped, obsolete })
    }
}

impl Live {
    /// The object's bytes and the hash that names it.
    pub(crate) fn to_bytes(&self, key: &MarkKey, round: u64) -> std::io::Result<(Vec<u8>, [u8; 32])> {
        let mut bytes = head(LIVE_MAGIC, round);
        put_count(&mut bytes, self.commits.len());
        for commit in &self.commits {
            bytes.extend_from_slice(&commit.session.0);
            put_count(&mut bytes, commit.snapshots.len());
            for refs in &commit.snapshots {
                bytes.extend_from_slice(&refs.snapshot.0);
                bytes.extend_from_slice(&refs.version.to_le_bytes());
                bytes.extend_from_slice(&refs.hash);
                bytes.extend_from_slice(&refs.by.0);
            }
        }
        put_count(&mut bytes, self.pins.len());
        for pin in &self.pins {
            bytes.extend_from_slice(&pin.session.0);
            bytes.extend_from_slice(&pin.since.to_le_bytes());
            bytes.extend_from_slice(&pin.hash);
        }
        self.worn.encode(&mut bytes)?;
        let bytes = key.seal(bytes);
        let hash = *blake3::hash(&bytes).as_bytes();
        Ok((bytes, hash))
    }

    pub(crate) fn parse(key: &MarkKey, round: u64, bytes: &[u8]) -> Result<Self, WireError> {
        Self::body(open(key, LIVE_MAGIC, round, bytes)?)
    }

    fn body(mut fields: Fields<'_>) -> Result<Self, WireError> {
        let mut commits = Vec::new();
        for _ in 0..fields.count(20)? {
            let session = SessionId(fields.array()?);
            let count = fields.count(68)?;
            let snapshots = (0..count).map(|_| parse_refs(&mut fields)).collect::<Result<_, _>>()?;
            commits.push(LiveCommit { session, snapshots });
        }
        let count = fields.count(56)?;
        let pins = (0..count).map(|_| parse_pin(&mut fields)).collect::<Result<_, _>>()?;
        let worn = PackSet::parse(&mut fields)?;
        fields.end()?;
        Ok(Self { commits, pins, worn })
    }
}

fn parse_refs(fields: &mut Fields<'_>) -> Result<LiveRefs, WireError> {
    Ok(LiveRefs {
        snapshot: SnapshotId(fields.array()?),
        version: fields.u32()?,
        hash: fields.array()?,
        by: SessionId(fields.array()?),
    })
}

fn parse_pin(fields: &mut Fields<'_>) -> Result<LivePin, WireError> {
    Ok(LivePin {
        session: SessionId(fields.array()?),
        since: fields.array().map(i64::from_le_bytes)?,
        hash: fields.array()?,
    })
}

/// A mark that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MarkError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the mark {key} cannot be used: {source}")]
    Damaged { key: String, source: WireError },
}

/// Reads a mark; `None` when it does not exist.
async fn read<T>(
    engine: &Engine,
    key: String,
    parse: impl FnOnce(&MarkKey, &[u8]) -> Result<T, WireError>,
) -> Result<Option<T>, MarkError> {
    let bytes: Bytes = match engine.store.get(&key, MAX_MARK_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    parse(&engine.mark_key(), &bytes).map(Some).map_err(|source| MarkError::Damaged { key, source })
}

/// What round `round` condemned.
pub(crate) async fn condemned(engine: &Engine, round: u64) -> Result<Option<Condemned>, MarkError> {
    read(engine, condemned_key(round), |key, bytes| Condemned::parse(key, round, bytes)).await
}

/// What round `round` deletes.
pub(crate) async fn finals(engine: &Engine, round: u64) -> Result<Option<Final>, MarkError> {
    read(engine, final_key(round), |key, bytes| Final::parse(key, round, bytes)).await
}

/// What lives after round `round`; `None` when a later round is done and this list was removed.
pub(crate) async fn live(engine: &Engine, round: u64, hash: &[u8; 32]) -> Result<Option<Live>, MarkError> {
    read(engine, live_key(round, hash), |key, bytes| {
        if blake3::hash(bytes).as_bytes() != hash {
            return Err(WireError { what: "it is not the list that was named", at: 0 });
        }
        Live::parse(key, round, bytes)
    })
    .await
}

/// Whether everything of the round was deleted.
pub(crate) async fn is_done(engine: &Engine, round: u64) -> Result<bool, StoreError> {
    exists(&*engine.store, &done_key(round)).await
}

pub(crate) async fn exists(store: &dyn Store, key: &str) -> Result<bool, StoreError> {
    match store.size(key).await {
        Ok(_) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// The newest round that was begun; 0 when there is none.
///
/// A listing says where to look; whether a round exists is asked of the store itself.
pub(crate) async fn newest_round(engine: &Engine) -> Result<u64, StoreError> {
    use futures::TryStreamExt;
    let mut newest = 0;
    let mut listed = engine.store.list(MARKS_PREFIX);
    while let Some(object) = listed.try_next().await? {
        if object.key.ends_with("/condemned") {
            newest = newest.max(round_of(&object.key).unwrap_or(0));
        }
    }
    while exists(&*engine.store, &condemned_key(newest + 1)).await? {
        newest += 1;
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::PackId;

    #[test]
    fn marks_round_trip_and_forged_ones_are_refused() {
        let (key, other) = (MarkKey::new(&[1; 32]), MarkKey::new(&[2; 32]));
        let session = SessionId::random();
        let packs: PackSet = [0, 1, 7].map(|seq| PackId { session, seq }).into_iter().collect();
        let refs = LiveRefs { snapshot: SnapshotId::random(), version: 3, hash: [9; 32], by: session };
        let pin = LivePin { session, since: -5, hash: [8; 32] };
        let live =
            Live { commits: vec![LiveCommit { session, snapshots: vec![refs] }], pins: vec![pin], worn: packs.clone() };
        let (live_bytes, hash) = live.to_bytes(&key, 4).unwrap();
        assert_eq!(Live::parse(&key, 4, &live_bytes), Ok(live.clone()));
        let dropped = vec![(session, vec![SnapshotId::random(), SnapshotId::random()])];
        let last = Final { packs: packs.clone(), live: hash, dropped, obsolete: vec![(refs.snapshot, 1)] };
        let final_bytes = last.to_bytes(&key, 4).unwrap();
        assert_eq!(Final::parse(&key, 4, &final_bytes), Ok(last));
        let condemned = Condemned { packs };
        let condemned_bytes = condemned.to_bytes(&key, 4).unwrap();
        assert_eq!(Condemned::parse(&key, 4, &condemned_bytes), Ok(condemned));
        let tombstone = tombstone_bytes(&key, refs.snapshot, jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(check_tombstone(&key, refs.snapshot, &tombstone), Ok(()));

        assert!(Live::parse(&other, 4, &live_bytes).is_err());
        assert!(Final::parse(&key, 5, &final_bytes).is_err());
        assert!(Condemned::parse(&key, 4, &final_bytes).is_err());
        assert!(check_tombstone(&other, refs.snapshot, &tombstone).is_err());
        assert!(check_tombstone(&key, SnapshotId::random(), &tombstone).is_err());
        for bytes in [&live_bytes, &final_bytes, &condemned_bytes] {
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                assert!(Live::parse(&key, 4, &changed).is_err() && Live::parse(&key, 4, &bytes[..at]).is_err());
                assert!(Final::parse(&key, 4, &changed).is_err() && Final::parse(&key, 4, &bytes[..at]).is_err());
                assert!(Condemned::parse(&key, 4, &changed).is_err());
            }
        }
    }
}
