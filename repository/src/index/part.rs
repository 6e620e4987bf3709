//! One object of a merged run: sorted entries of many sessions in a range of ids, and a head that finds the block to read.
//!
//! The head (sessions, fences, filter) is fetched alone and compared with the hash that the index version names; entries are
//! read by blocks, unchecked, because an answer is compared with a pack's directory before anybody relies on it. Who merges
//! reads the whole and checks its hash.

use std::collections::HashMap;
use std::io;

use super::filter::{self, FilterAt};
use super::segment::partition_point;
use super::spool::Spooled;
use crate::id::{PackId, Place, SessionId};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

const MAGIC: &[u8; 8] = b"LBINDX02";
pub(super) const HEADER_BYTES: usize = 32;
/// Stored bytes of an entry: id prefix 14, session 4, pack 4, slot 2.
pub(super) const ENTRY_BYTES: usize = 24;
/// Entries of a block, of about 4 KiB.
pub(super) const BLOCK_ENTRIES: usize = 170;
/// A part is closed after so many entries: 12 MiB, so that one in the making is small in memory.
const FULL_ENTRIES: usize = 1 << 19;
/// No part is larger.
pub(crate) const MAX_PART_BYTES: u64 = 64 << 20;

/// The beginning of an id.
pub(crate) type Prefix = [u8; 14];

/// The beginning of an id, of which at least as many bytes are known.
pub(super) fn prefix_of<const N: usize>(id: &[u8; N]) -> Prefix {
    let mut prefix = Prefix::default();
    prefix.copy_from_slice(&id[..size_of::<Prefix>()]);
    prefix
}

/// What a run says about one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) prefix: Prefix,
    pub(super) place: Place,
}

/// What an index version says of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PartInfo {
    /// The version that it was made for.
    pub(super) version: u64,
    pub(super) name: [u8; 16],
    pub(super) first: Prefix,
    pub(super) entries: u32,
    pub(super) head_len: u32,
    pub(super) head_hash: [u8; 32],
}

impl PartInfo {
    /// Where the head begins.
    pub(super) fn head_at(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.entries) * ENTRY_BYTES as u64
    }
}

/// A part that is being made.
#[derive(Default)]
pub(super) struct PartBuilder {
    entries: Vec<u8>,
    fences: Vec<Prefix>,
    keys: Vec<u64>,
    ordinals: HashMap<SessionId, u32>,
    sessions: Vec<SessionId>,
    last: Option<Entry>,
}

impl PartBuilder {
    /// Whether the part should be closed before this entry. Places of one chunk are never in two parts.
    pub(super) fn is_full(&self, next: &Entry) -> bool {
        self.keys.len() >= FULL_ENTRIES && self.last.is_some_and(|last| last.prefix != next.prefix)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Appends an entry; they come sorted. The same one again is left out.
    pub(super) fn push(&mut self, entry: Entry) {
        if self.last.replace(entry) == Some(entry) {
            return;
        }
        if self.keys.len().is_multiple_of(BLOCK_ENTRIES) {
            self.fences.push(entry.prefix);
        }
        self.keys.push(filter::key(&entry.prefix));
        let Place { pack, slot } = entry.place;
        let next = u32::try_from(self.sessions.len()).unwrap_or(u32::MAX);
        let ordinal = *self.ordinals.entry(pack.session).or_insert_with(|| {
            self.sessions.push(pack.session);
            next
        });
        self.entries.extend_from_slice(&entry.prefix);
        self.entries.extend_from_slice(&ordinal.to_le_bytes());
        self.entries.extend_from_slice(&pack.seq.to_le_bytes());
        self.entries.extend_from_slice(&slot.to_le_bytes());
    }

    /// The object's bytes, and what a version says of it.
    pub(super) fn finish(self, version: u64) -> (Vec<u8>, PartInfo) {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let entries = count(self.keys.len());
        let first = self.fences.first().copied().unwrap_or_default();
        let filter = filter::build(self.keys);
        let mut head = count(self.sessions.len()).to_le_bytes().to_vec();
        head.extend_from_slice(&u32::from(filter.is_some()).to_le_bytes());
        self.sessions.iter().for_each(|session| head.extend_from_slice(&session.0));
        self.fences.iter().for_each(|fence| head.extend_from_slice(fence));
        if let Some(filter) = filter {
            filter::encode(&filter, &mut head);
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&entries.to_le_bytes());
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend_from_slice(&self.entries);
        bytes.extend_from_slice(&head);
        seal_hash(&mut bytes);
        let info = PartInfo {
            version,
            name: rand::random(),
            first,
            entries,
            head_len: count(head.len()),
            head_hash: *blake3::hash(&head).as_bytes(),
        };
        (bytes, info)
    }
}

/// What of a part is kept at hand.
#[derive(Debug)]
pub(super) struct Head {
    bytes: Spooled,
    entries: usize,
    sessions: usize,
    fences_at: usize,
    filter: Option<FilterAt>,
}

const SESSIONS_AT: usize = 8;

impl Head {
    /// Checks the sizes, so that no look-up leaves the bytes. `keep` takes the bytes.
    pub(super) fn parse(entries: u32, bytes: &[u8], keep: impl FnOnce() -> Spooled) -> Result<Self, WireError> {
        let entries = entries as usize;
        let mut fields = Fields::new(bytes);
        let sessions = fields.u32()? as usize;
        let filtered = fields.u32()?;
        if sessions.checked_mul(16).is_none_or(|need| need > fields.left()) {
            return Err(fields.error("more sessions than bytes"));
        }
        fields.take(sessions * 16)?;
        let fences_at = bytes.len() - fields.left();
        fields.take(entries.div_ceil(BLOCK_ENTRIES) * size_of::<Prefix>())?;
        let filter = FilterAt::parse_if(filtered, &mut fields, bytes.len())?;
        fields.end()?;
        Ok(Self { bytes: keep(), entries, sessions, fences_at, filter })
    }

    /// Whether the part may have an entry of this id.
    pub(super) fn may_have(&self, prefix: &Prefix) -> io::Result<bool> {
        self.filter.as_ref().map_or(Ok(true), |filter| filter.may_have(filter::key(prefix), &self.bytes))
    }

    /// The first block that may have it.
    pub(super) fn block_of(&self, prefix: &Prefix) -> io::Result<usize> {
        let before = |block| Ok(self.fence(block)? < *prefix);
        Ok(partition_point(self.blocks(), before)?.saturating_sub(1))
    }

    /// Whether this block begins with it, so that a look-up that began before goes on.
    pub(super) fn begins_with(&self, block: usize, prefix: &Prefix) -> io::Result<bool> {
        Ok(block < self.blocks() && self.fence(block)? == *prefix)
    }

    fn blocks(&self) -> usize {
        self.entries.div_ceil(BLOCK_ENTRIES)
    }

    fn fence(&self, block: usize) -> io::Result<Prefix> {
        self.bytes.array(self.fences_at + block * size_of::<Prefix>())
    }

    /// Where a block lies in the object.
    pub(super) fn span(&self, block: usize) -> std::ops::Range<u64> {
        let at = |entry: usize| (HEADER_BYTES + entry.min(self.entries) * ENTRY_BYTES) as u64;
        at(block * BLOCK_ENTRIES)..at((block + 1) * BLOCK_ENTRIES)
    }

    /// The places that a block names for this id.
    pub(super) fn places(&self, block: &[u8], prefix: &Prefix) -> io::Result<Vec<Place>> {
        let mut places = Vec::new();
        for entry in block.chunks_exact(ENTRY_BYTES).filter(|entry| entry.starts_with(prefix)) {
            places.extend(self.entry(entry)?.map(|entry| entry.place));
        }
        Ok(places)
    }

    /// Reads an entry; `None`: it names a session that is not there.
    pub(super) fn entry(&self, bytes: &[u8]) -> io::Result<Option<Entry>> {
        let mut fields = Fields::new(bytes);
        let parse = |fields: &mut Fields<'_>| {
            Ok::<_, WireError>((fields.array::<14>()?, fields.u32()? as usize, fields.u32()?, fields.u16()?))
        };
        let Ok((prefix, ordinal, seq, slot)) = parse(&mut fields) else { return Ok(None) };
        if ordinal >= self.sessions {
            return Ok(None);
        }
        let session = SessionId(self.bytes.array(SESSIONS_AT + ordinal * 16)?);
        Ok(Some(Entry { prefix, place: Place { pack: PackId { session, seq }, slot } }))
    }
}

/// Checks a whole part as far as anyone can.
pub(crate) fn verify(bytes: &[u8]) -> Result<(), WireError> {
    let mut fields = Fields::new(unseal_hash(bytes)?);
    fields.expect(MAGIC, "no part of an index of a known version")?;
    let entries = fields.u32()?;
    fields.take(HEADER_BYTES - 12)?;
    let need = (entries as usize).checked_mul(ENTRY_BYTES).filter(|need| *need <= fields.left());
    fields.take(need.ok_or_else(|| fields.error("more entries than bytes"))?)?;
    let head = fields.take(fields.left())?;
    Head::parse(entries, head, || Spooled::in_memory(bytes::Bytes::new())).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(number: u32) -> Entry {
        let mut prefix = [0; 14];
        prefix.copy_from_slice(&blake3::hash(&number.to_le_bytes()).as_bytes()[..14]);
        let session = SessionId([(number % 3) as u8; 16]);
        Entry { prefix, place: Place { pack: PackId { session, seq: number / 7 }, slot: (number % 7) as u16 } }
    }

    fn made(count: u32) -> (Vec<u8>, PartInfo, Vec<Entry>) {
        let mut entries: Vec<_> = (0..count).map(entry).collect();
        // Many places of one chunk, over several blocks.
        entries.extend((0..400).map(|slot| Entry { place: Place { slot, ..entry(5).place }, ..entry(5) }));
        entries.sort_by_key(|entry| (entry.prefix, entry.place));
        entries.dedup();
        let mut builder = PartBuilder::default();
        for entry in entries.iter().flat_map(|entry| [*entry, *entry]) {
            assert!(!builder.is_full(&entry));
            builder.push(entry);
        }
        let (bytes, info) = builder.finish(3);
        (bytes, info, entries)
    }

    fn head(bytes: &[u8], info: &PartInfo) -> Head {
        let at = usize::try_from(info.head_at()).unwrap();
        let head = bytes[at..at + info.head_len as usize].to_vec();
        assert_eq!(*blake3::hash(&head).as_bytes(), info.head_hash);
        Head::parse(info.entries, &head.clone(), || Spooled::in_memory(head.into())).unwrap()
    }

    fn find(bytes: &[u8], head: &Head, prefix: &Prefix) -> Vec<Place> {
        let mut found = Vec::new();
        if !head.may_have(prefix).unwrap() {
            return found;
        }
        let mut block = head.block_of(prefix).unwrap();
        loop {
            let span = head.span(block);
            let span = usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap();
            found.extend(head.places(&bytes[span], prefix).unwrap());
            block += 1;
            if !head.begins_with(block, prefix).unwrap() {
                return found;
            }
        }
    }

    #[test]
    fn every_place_of_every_chunk_is_found_and_no_other() {
        for count in [6, 170, 5000] {
            let (bytes, info, entries) = made(count);
            assert_eq!((verify(&bytes), info.entries as usize), (Ok(()), entries.len()));
            let head = head(&bytes, &info);
            for entry in entries.iter().step_by(7) {
                let expected: Vec<_> =
                    entries.iter().filter(|other| other.prefix == entry.prefix).map(|e| e.place).collect();
                assert_eq!(find(&bytes, &head, &entry.prefix), expected);
            }
            assert!((10_000..12_000).all(|number| find(&bytes, &head, &entry(number).prefix).is_empty()));
        }
    }

    #[test]
    fn damage_is_found() {
        let (bytes, ..) = made(6);
        for at in (0..bytes.len()).step_by(11) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(verify(&changed).is_err() && verify(&bytes[..at]).is_err());
        }
    }

    proptest! {
        #[test]
        fn hostile_parts_never_panic(body in proptest::collection::vec(any::<u8>(), 0..600), entries in 0u32..20, sessions in 0u32..4, filtered in 0u32..3, prefix: Prefix) {
            let mut head = sessions.to_le_bytes().to_vec();
            head.extend_from_slice(&filtered.to_le_bytes());
            head.extend_from_slice(&body);
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&entries.to_le_bytes());
            bytes.resize(HEADER_BYTES + entries as usize * ENTRY_BYTES, 1);
            bytes.extend_from_slice(&head);
            seal_hash(&mut bytes);
            let _ = verify(&bytes);
            if let Ok(head) = Head::parse(entries, &head, || Spooled::in_memory(head.clone().into())) {
                head.may_have(&prefix).unwrap();
                head.block_of(&prefix).unwrap();
                head.places(&body, &prefix).unwrap();
            }
        }
    }
}
