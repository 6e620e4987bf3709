//! The list of pages of a manifest: one or more records, so that one file is found by reading few pages.

use std::collections::HashMap;

use super::columns::{Column, put_bytes, put_varint};
use super::page::{put_chunk, take_chunk};
use super::{PageError, compare_paths};
use crate::id::ChunkRef;
use crate::wire::Fields;

const MAGIC: &[u8; 8] = b"LBROOT01";

/// One page, as the list knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageInfo {
    /// The chunk that holds it.
    pub chunk: ChunkRef,
    /// Its first path.
    pub first: Vec<u8>,
    /// Its last path.
    pub last: Vec<u8>,
    /// Its number of entries.
    pub entries: u64,
}

/// Encodes a list of pages.
pub(super) fn encode_root(pages: &[PageInfo]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    let mut column = Vec::new();
    let mut sessions = HashMap::new();
    put_varint(&mut column, pages.len() as u64);
    for page in pages {
        put_chunk(&mut column, &mut sessions, &page.chunk);
        put_bytes(&mut column, &page.first);
        put_bytes(&mut column, &page.last);
        put_varint(&mut column, page.entries);
    }
    bytes.append(&mut column);
    bytes
}

/// Decodes a list of pages; they must be in order.
pub fn decode_root(bytes: &[u8]) -> Result<Vec<PageInfo>, PageError> {
    let mut fields = Fields::new(bytes);
    fields.expect(MAGIC, "no page list of a known version")?;
    let mut column = Column::new(fields.take(fields.left())?);
    let mut sessions = Vec::new();
    let mut pages: Vec<PageInfo> = Vec::new();
    for number in 0..column.count()? {
        let chunk = take_chunk(&mut column, &mut sessions)?;
        let (first, last) = (column.bytes()?.to_vec(), column.bytes()?.to_vec());
        let entries = column.varint()?;
        let follows = pages.last().is_none_or(|before| compare_paths(&before.last, &first).is_lt());
        if !follows || compare_paths(&first, &last).is_gt() {
            return Err(PageError::Entry { number, what: "the pages are not in order" });
        }
        pages.push(PageInfo { chunk, first, last, entries });
    }
    column.end()?;
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{ChunkId, PackId, Place, SessionId};
    use proptest::prelude::*;

    fn page(number: u8) -> PageInfo {
        let place = Place { pack: PackId { session: SessionId([number / 2; 16]), seq: 1 }, slot: 2 };
        PageInfo {
            chunk: ChunkRef { id: ChunkId([number; 32]), len: 100, place },
            first: vec![b'a' + number, b'1'],
            last: vec![b'a' + number, b'2'],
            entries: u64::from(number),
        }
    }

    #[test]
    fn lists_round_trip_and_disorder_is_refused() {
        let pages: Vec<_> = (0..5).map(page).collect();
        assert_eq!(decode_root(&encode_root(&pages)).unwrap(), pages);
        let wrong: Vec<_> = [1, 0].into_iter().map(page).collect();
        assert!(decode_root(&encode_root(&wrong)).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(tail: Vec<u8>) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(tail);
            let _ = decode_root(&bytes);
        }
    }
}
