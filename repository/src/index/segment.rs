//! One index segment: sorted entries, fences per block, a binary fuse filter, a hash.

use std::collections::BTreeSet;

use bytes::Bytes;
use xorf::{BinaryFuse8, Descriptor, Filter};

use crate::id::{ChunkId, PackId, Place, SessionId};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

const MAGIC: &[u8; 8] = b"LBINDX01";
/// Stored bytes of an entry: id prefix 16, pack 4, slot 2, size class 2.
const ENTRY_BYTES: usize = 24;
const PREFIX_BYTES: usize = 16;
/// Entries between fences: blocks of about 4 KiB.
const BLOCK_ENTRIES: usize = 170;
const HEADER_BYTES: usize = 32;
/// Stored bytes of the filter's descriptor and length.
const FILTER_HEAD_BYTES: usize = 24;
/// Below this number of entries the filter saves nothing.
const FILTER_FROM_ENTRIES: usize = 64;

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

/// The key under which an id goes into the filter.
fn filter_key(id: &ChunkId) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&id.0[..8]);
    u64::from_le_bytes(bytes)
}

/// Encodes a segment. Entries may come in any order; of equal id prefixes one stays.
pub(crate) fn encode_segment(mut entries: Vec<SegmentEntry>) -> Vec<u8> {
    entries.sort_unstable_by_key(|entry| entry.id);
    entries.dedup_by_key(|entry| entry.id.0.first_chunk::<PREFIX_BYTES>().copied());
    let filter = build_filter(&entries);
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
        bytes.extend_from_slice(&filter.descriptor.seed.to_le_bytes());
        let Descriptor { segment_length, segment_length_mask, segment_count_length, .. } = filter.descriptor;
        let len = u32::try_from(filter.fingerprints.len()).unwrap_or(u32::MAX);
        for number in [segment_length, segment_length_mask, segment_count_length, len] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&filter.fingerprints);
    }
    seal_hash(&mut bytes);
    bytes
}

fn build_filter(entries: &[SegmentEntry]) -> Option<BinaryFuse8> {
    if entries.len() < FILTER_FROM_ENTRIES {
        return None;
    }
    let mut keys: Vec<u64> = entries.iter().map(|entry| filter_key(&entry.id)).collect();
    keys.sort_unstable();
    keys.dedup();
    // Construction may fail for an unlucky seed; a segment without a filter is slower, not wrong.
    BinaryFuse8::try_from(&keys).ok()
}

/// A segment that answers look-ups.
#[derive(Debug)]
pub(crate) struct Segment {
    session: SessionId,
    bytes: Bytes,
    count: usize,
    fences_at: usize,
    filter: Option<BinaryFuse8>,
}

impl Segment {
    /// Reads a segment. Its hash, sizes and filter are checked, so that look-ups cannot leave the bytes.
    pub(crate) fn parse(session: SessionId, bytes: Bytes) -> Result<Self, WireError> {
        let mut fields = Fields::new(unseal_hash(&bytes)?);
        fields.expect(MAGIC, "no index segment of a known version")?;
        let count = fields.u32()? as usize;
        let filtered = fields.u32()?;
        fields.take(HEADER_BYTES - 16)?;
        if count.checked_mul(ENTRY_BYTES).is_none_or(|need| need > fields.left()) {
            return Err(fields.error("more entries than bytes"));
        }
        fields.take(count * ENTRY_BYTES)?;
        fields.take(count.div_ceil(BLOCK_ENTRIES) * PREFIX_BYTES)?;
        let filter = match filtered {
            0 => None,
            1 => Some(parse_filter(&mut fields)?),
            _ => return Err(fields.error("unknown flags")),
        };
        fields.end()?;
        Ok(Self { session, count, fences_at: HEADER_BYTES + count * ENTRY_BYTES, filter, bytes })
    }

    fn entry(&self, number: usize) -> &[u8] {
        &self.bytes[HEADER_BYTES + number * ENTRY_BYTES..][..ENTRY_BYTES]
    }

    fn fence(&self, block: usize) -> &[u8] {
        &self.bytes[self.fences_at + block * PREFIX_BYTES..][..PREFIX_BYTES]
    }

    /// The numbers of the packs that it speaks of.
    pub(crate) fn packs(&self) -> BTreeSet<u32> {
        let number = |entry: &[u8]| entry[PREFIX_BYTES..].first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        (0..self.count).filter_map(|at| number(self.entry(at))).collect()
    }

    /// Where this segment says the chunk lies.
    pub(crate) fn find(&self, id: &ChunkId) -> Option<Place> {
        if self.filter.as_ref().is_some_and(|filter| !filter.contains(&filter_key(id))) {
            return None;
        }
        let prefix = &id.0[..PREFIX_BYTES];
        let blocks = partition_point(self.count.div_ceil(BLOCK_ENTRIES), |block| self.fence(block) <= prefix);
        let first = blocks.checked_sub(1)? * BLOCK_ENTRIES;
        let len = BLOCK_ENTRIES.min(self.count - first);
        let number = first + partition_point(len, |at| &self.entry(first + at)[..PREFIX_BYTES] < prefix);
        if number >= self.count || &self.entry(number)[..PREFIX_BYTES] != prefix {
            return None;
        }
        let mut fields = Fields::new(&self.entry(number)[PREFIX_BYTES..]);
        let (seq, slot) = (fields.u32().ok()?, fields.u16().ok()?);
        Some(Place { pack: PackId { session: self.session, seq }, slot })
    }
}

fn partition_point(len: usize, before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low.midpoint(high);
        if before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

fn parse_filter(fields: &mut Fields<'_>) -> Result<BinaryFuse8, WireError> {
    let seed = fields.u64()?;
    let (segment_length, segment_length_mask, segment_count_length) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let fingerprints: Box<[u8]> = {
        let len = fields.count(1)?;
        fields.take(len)?.into()
    };
    // With whole segments a look-up reads at most at segment_count_length + 2 * segment_length - 1.
    let reach = u64::from(segment_count_length) + 2 * u64::from(segment_length);
    if !segment_length.is_power_of_two()
        || segment_length_mask != segment_length - 1
        || segment_count_length % segment_length != 0
        || reach > fingerprints.len() as u64
    {
        return Err(fields.error("the filter's parameters do not fit its size"));
    }
    Ok(BinaryFuse8 {
        descriptor: Descriptor { seed, segment_length, segment_length_mask, segment_count_length },
        fingerprints,
    })
}

const _: () = assert!(FILTER_HEAD_BYTES == 8 + 4 * 4);

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
                assert_eq!(segment.find(&e.id), Some(Place { pack: PackId { session, seq: e.seq }, slot: e.slot }));
            }
            assert!((count..count + 2000).all(|number| segment.find(&entry(number).id).is_none()));
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
                segment.find(&ChunkId(id));
            }
        }

        #[test]
        fn hostile_filters_never_panic(seed: u64, log in 0u32..8, count_length in 0u32..100, len in 0usize..300, id: [u8; 32]) {
            let mut bytes = seed.to_le_bytes().to_vec();
            for number in [1 << log, (1u32 << log) - 1, count_length, u32::try_from(len).unwrap()] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.resize(bytes.len() + len, 7);
            if let Ok(filter) = parse_filter(&mut Fields::new(&bytes)) {
                filter.contains(&filter_key(&ChunkId(id)));
            }
        }
    }
}
