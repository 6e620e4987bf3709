//! The binary fuse filter of a segment: which ids it surely does not hold. 8 bits a fingerprint, about 9 bits a key.
//!
//! Made by a crate, and read in place, three bytes a question, so that the fingerprints need not be in memory.

use std::io;

use xorf::{BinaryFuse8, Descriptor};

use super::spool::Spooled;
use crate::wire::{Fields, WireError};

/// Below this number of keys a filter saves nothing.
const FROM_KEYS: usize = 64;

/// Makes a filter over the keys; `None`: there are few of them.
pub(super) fn build(mut keys: Vec<u64>) -> Option<BinaryFuse8> {
    if keys.len() < FROM_KEYS {
        return None;
    }
    keys.sort_unstable();
    keys.dedup();
    // Construction may fail for an unlucky seed; a segment without a filter is slower, not wrong.
    BinaryFuse8::try_from(&keys).ok()
}

/// The key under which an id goes into a filter: its first 8 bytes.
pub(super) fn key(prefix: &[u8]) -> u64 {
    prefix.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Appends a filter's bytes.
pub(super) fn encode(filter: &BinaryFuse8, bytes: &mut Vec<u8>) {
    let Descriptor { seed, segment_length, segment_length_mask, segment_count_length } = filter.descriptor;
    bytes.extend_from_slice(&seed.to_le_bytes());
    let len = u32::try_from(filter.fingerprints.len()).unwrap_or(u32::MAX);
    for number in [segment_length, segment_length_mask, segment_count_length, len] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&filter.fingerprints);
}

/// A filter whose fingerprints lie in a [`Spooled`].
#[derive(Debug, Clone, Copy)]
pub(super) struct FilterAt {
    seed: u64,
    segment_length: u32,
    segment_length_mask: u32,
    segment_count_length: u32,
    /// Where the fingerprints begin.
    at: usize,
}

impl FilterAt {
    /// Reads a filter if the flag says that there is one. `all` is as for [`Self::parse`].
    pub(super) fn parse_if(flag: u32, fields: &mut Fields<'_>, all: usize) -> Result<Option<Self>, WireError> {
        match flag {
            0 => Ok(None),
            1 => Self::parse(fields, all).map(Some),
            _ => Err(fields.error("unknown flags")),
        }
    }

    /// Reads a filter's descriptor and checks that no question leaves the fingerprints. `all` is the number of bytes of which the fields are the end.
    pub(super) fn parse(fields: &mut Fields<'_>, all: usize) -> Result<Self, WireError> {
        let seed = fields.u64()?;
        let (segment_length, segment_length_mask, segment_count_length) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let len = fields.count(1)?;
        let at = all - fields.left();
        fields.take(len)?;
        // With whole segments a look-up reads at most at segment_count_length + 2 * segment_length - 1.
        let reach = u64::from(segment_count_length) + 2 * u64::from(segment_length);
        if !segment_length.is_power_of_two()
            || segment_length_mask != segment_length - 1
            || segment_count_length == 0
            || segment_count_length % segment_length != 0
            || reach > len as u64
        {
            return Err(fields.error("the filter's parameters do not fit its size"));
        }
        Ok(Self { seed, segment_length, segment_length_mask, segment_count_length, at })
    }

    /// Whether the filter's set may have the key.
    pub(super) fn may_have(&self, key: u64, bytes: &Spooled) -> io::Result<bool> {
        let hash = mix(key.wrapping_add(self.seed));
        let positions = self.positions(hash);
        let mut fingerprint = (hash ^ (hash >> 32)).to_le_bytes()[0];
        for position in positions {
            let position = usize::try_from(position).map_err(io::Error::other)?;
            fingerprint ^= bytes.array::<1>(self.at + position)?[0];
        }
        Ok(fingerprint == 0)
    }

    /// Where the fingerprints of a key lie: in three segments that follow each other.
    fn positions(&self, hash: u64) -> [u64; 3] {
        let length = u64::from(self.segment_length);
        let mask = u64::from(self.segment_length_mask);
        let first = (u128::from(hash) * u128::from(self.segment_count_length)) >> 64;
        // The product of a number below 2^64 and one below 2^32, shifted: below 2^32.
        let first = u64::try_from(first).unwrap_or(0);
        [first, (first + length) ^ ((hash >> 18) & mask), (first + 2 * length) ^ (hash & mask)]
    }
}

/// The finalizer of `MurmurHash3`, as the filter's maker uses it.
fn mix(mut key: u64) -> u64 {
    key ^= key >> 33;
    key = key.wrapping_mul(0xff51_afd7_ed55_8ccd);
    key ^= key >> 33;
    key = key.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    key ^ (key >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xorf::Filter;

    fn parsed(bytes: &[u8]) -> Result<FilterAt, WireError> {
        let mut fields = Fields::new(bytes);
        FilterAt::parse(&mut fields, bytes.len())
    }

    #[test]
    fn it_answers_as_the_maker_does() {
        for count in [64u64, 1000, 50_000] {
            let keys: Vec<u64> = (0..count).map(|number| key(blake3::hash(&number.to_le_bytes()).as_bytes())).collect();
            let made = build(keys.clone()).unwrap();
            let mut bytes = Vec::new();
            encode(&made, &mut bytes);
            let filter = parsed(&bytes).unwrap();
            let bytes = Spooled::in_memory(bytes.into());
            assert!(keys.iter().all(|key| filter.may_have(*key, &bytes).unwrap()));
            for number in count..count + 20_000 {
                let key = key(blake3::hash(&number.to_le_bytes()).as_bytes());
                assert_eq!(filter.may_have(key, &bytes).unwrap(), made.contains(&key));
            }
        }
    }

    proptest! {
        #[test]
        fn hostile_filters_never_panic(seed: u64, log in 0u32..33, count_length: u32, small in 0u32..100, len in 0usize..300, key: u64) {
            let length = 1u32.checked_shl(log).unwrap_or(0);
            for count_length in [count_length, small, small.wrapping_mul(length.max(1))] {
                let mut bytes = seed.to_le_bytes().to_vec();
                for number in [length, length.wrapping_sub(1), count_length, u32::try_from(len).unwrap()] {
                    bytes.extend_from_slice(&number.to_le_bytes());
                }
                bytes.resize(bytes.len() + len, 7);
                if let Ok(filter) = parsed(&bytes) {
                    filter.may_have(key, &Spooled::in_memory(bytes.into())).unwrap();
                }
            }
        }
    }
}
