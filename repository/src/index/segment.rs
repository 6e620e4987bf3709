//! The index segment of a session: sorted entries, fences per block, a binary fuse filter, a hash.
//!
//! It is small, since a session publishes one every few packs, and it is fetched and checked as a whole.

use std::io;

use bytes::Bytes;

use super::filter::{self, FilterAt};
use super::spool::{Spool, Spooled};
use crate::expire::packset::PackSet;
use crate::id::{ChunkId, PackId, Place, SessionId};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

const MAGIC: &[u8; 8] = b"LBINDX01";
/// Stored bytes of an entry: id prefix 16, pack 4, slot 2, size class 2.
const ENTRY_BYTES: usize = 24;
const PREFIX_BYTES: usize = 16;
/// Entries between fences: blocks of about 4 KiB.
const BLOCK_ENTRIES: usize = 170;
const HEADER_BYTES: usize = 32;

/// What a segment says about one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentEntry {
    pub(crate) id: ChunkId,
    pub(crate) seq: u32,
    pub(crate) slot: u16,
    pub(crate) plain_len: u32,
}

/// The number of bits of the plain length: enough to estimate sizes without a directory.
fn size_class(plain_len: u32) -> u16 {
    u16::try_from(u32::BITS - plain_len.leading_zeros()).unwrap_or(u16::MAX)
}

/// Encodes a segment. Entries may come in any order; of equal id prefixes one stays.
pub(crate) fn encode_segment(mut entries: Vec<SegmentEntry>) -> Vec<u8> {
    entries.sort_unstable_by_key(|entry| entry.id);
    entries.dedup_by_key(|entry| entry.id.0.first_chunk::<PREFIX_BYTES>().copied());
    let filter = filter::build(entries.iter().map(|entry| filter::key(&entry.id.0)).collect());
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&u32::try_from(entries.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(&u32::from(filter.is_some()).to_le_bytes());
    bytes.resize(HEADER_BYTES, 0);
    for entry in &entries {
        bytes.extend_from_slice(&entry.id.0[..PREFIX_BYTES]);
        bytes.extend_from_slice(&entry.seq.to_le_bytes());
        bytes.extend_from_slice(&entry.slot.to_le_bytes());
        bytes.extend_from_slice(&size_class(entry.plain_len).to_le_bytes());
    }
    for block in entries.chunks(BLOCK_ENTRIES) {
        bytes.extend_from_slice(&block[0].id.0[..PREFIX_BYTES]);
    }
    if let Some(filter) = filter {
        filter::encode(&filter, &mut bytes);
    }
    seal_hash(&mut bytes);
    bytes
}

/// A segment that answers look-ups.
#[derive(Debug)]
pub(crate) struct Segment {
    session: SessionId,
    bytes: Spooled,
    count: usize,
    fences_at: usize,
    filter: Option<FilterAt>,
}

impl Segment {
    /// Reads a segment. Its hash, sizes and filter are checked, so that look-ups cannot leave the bytes.
    pub(crate) fn parse(session: SessionId, bytes: Bytes) -> Result<Self, WireError> {
        let body = unseal_hash(&bytes)?;
        let mut fields = Fields::new(body);
        fields.expect(MAGIC, "no index segment of a known version")?;
        let count = fields.u32()? as usize;
        let filtered = fields.u32()?;
        fields.take(HEADER_BYTES - 16)?;
        if count.checked_mul(ENTRY_BYTES).is_none_or(|need| need > fields.left()) {
            return Err(fields.error("more entries than bytes"));
        }
        fields.take(count * ENTRY_BYTES)?;
        fields.take(count.div_ceil(BLOCK_ENTRIES) * PREFIX_BYTES)?;
        let filter = FilterAt::parse_if(filtered, &mut fields, body.len())?;
        fields.end()?;
        let fences_at = HEADER_BYTES + count * ENTRY_BYTES;
        Ok(Self { session, count, fences_at, filter, bytes: Spooled::in_memory(bytes) })
    }

    /// Puts the bytes into the spool.
    pub(super) fn spooled(self, spool: &Spool) -> Self {
        Self { bytes: spool.keep(self.bytes), ..self }
    }

    /// Whose packs it speaks of.
    pub(super) fn session(&self) -> SessionId {
        self.session
    }

    /// The number of entries.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Entries from this number on, at most as many: the beginning of the id, pack number and slot, sorted by id.
    pub(super) fn entries(&self, from: usize, count: usize) -> io::Result<Vec<([u8; PREFIX_BYTES], u32, u16)>> {
        let count = count.min(self.count.saturating_sub(from));
        let mut bytes = vec![0; count * ENTRY_BYTES];
        self.bytes.read(HEADER_BYTES + from * ENTRY_BYTES, &mut bytes)?;
        Ok(bytes.chunks_exact(ENTRY_BYTES).filter_map(parse_entry).collect())
    }

    /// The packs that it speaks of.
    pub(crate) fn packs(&self) -> Result<PackSet, WireError> {
        let mut packs = PackSet::default();
        for from in (0..self.count).step_by(BLOCK_ENTRIES) {
            let entries = self.entries(from, BLOCK_ENTRIES);
            for (_, seq, _) in entries.map_err(|_| WireError { what: "its bytes cannot be read", at: 0 })? {
                packs.insert(PackId { session: self.session, seq });
            }
        }
        Ok(packs)
    }

    /// Where this segment says the chunk lies.
    pub(crate) fn find(&self, id: &ChunkId) -> io::Result<Option<Place>> {
        if let Some(filter) = &self.filter
            && !filter.may_have(filter::key(&id.0), &self.bytes)?
        {
            return Ok(None);
        }
        let prefix = &id.0[..PREFIX_BYTES];
        let blocks = partition_point(self.count.div_ceil(BLOCK_ENTRIES), |block| {
            Ok(self.bytes.array::<PREFIX_BYTES>(self.fences_at + block * PREFIX_BYTES)?[..] <= *prefix)
        })?;
        let Some(block) = blocks.checked_sub(1) else { return Ok(None) };
        let entries = self.entries(block * BLOCK_ENTRIES, BLOCK_ENTRIES)?;
        let found = entries.binary_search_by(|(found, _, _)| found[..].cmp(prefix)).ok().map(|at| entries[at]);
        Ok(found.map(|(_, seq, slot)| Place { pack: PackId { session: self.session, seq }, slot }))
    }
}

fn parse_entry(bytes: &[u8]) -> Option<([u8; PREFIX_BYTES], u32, u16)> {
    let mut fields = Fields::new(bytes);
    Some((fields.array().ok()?, fields.u32().ok()?, fields.u16().ok()?))
}

/// The number of items for which `before` holds, of items of which it holds for the first ones only.
pub(super) fn partition_point(len: usize, before: impl Fn(usize) -> io::Result<bool>) -> io::Result<usize> {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low.midpoint(high);
        if before(middle)? {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(number: u32) -> SegmentEntry {
        SegmentEntry {
            id: ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes()),
            seq: number / 100,
            slot: (number % 100) as u16,
            plain_len: number,
        }
    }

    #[test]
    fn every_chunk_is_found_and_no_other() {
        let session = SessionId::random();
        for count in [0, 1, 63, 64, 170, 171, 10_000] {
            let segment = Segment::parse(session, encode_segment((0..count).map(entry).collect()).into()).unwrap();
            for number in 0..count {
                let e = entry(number);
                assert_eq!(
                    segment.find(&e.id).unwrap(),
                    Some(Place { pack: PackId { session, seq: e.seq }, slot: e.slot })
                );
            }
            assert!((count..count + 2000).all(|number| segment.find(&entry(number).id).unwrap().is_none()));
        }
    }

    #[test]
    fn damage_is_found() {
        let bytes = encode_segment((0..100).map(entry).collect());
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Segment::parse(SessionId::random(), changed.into()).is_err());
            assert!(Segment::parse(SessionId::random(), Bytes::copy_from_slice(&bytes[..at])).is_err());
        }
    }

    proptest! {
        // The hash keeps accidents out; a hostile store can compute it, so the parser must not trust what follows.
        #[test]
        fn hostile_segments_never_panic(body in proptest::collection::vec(any::<u8>(), 0..400), count in 0u32..40, filtered in 0u32..3, id: [u8; 32]) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&filtered.to_le_bytes());
            bytes.resize(HEADER_BYTES, 0);
            bytes.extend_from_slice(&body);
            seal_hash(&mut bytes);
            if let Ok(segment) = Segment::parse(SessionId::random(), bytes.into()) {
                segment.find(&ChunkId(id)).unwrap();
            }
        }
    }
}
