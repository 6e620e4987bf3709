//! Root records: which pages a manifest has, where each begins. A listing of one folder reads only its pages.

use super::FormatError;
use super::entry::shared_prefix;
use super::fields::{Fields, VERSION, put_bytes, put_number};
use super::page::read_path;
use super::pieces::ChunkTable;
use crate::sink::ChunkRef;

const MAGIC: [u8; 4] = *b"LBRL";
/// No root record is larger.
const MAX_ROOT_BYTES: usize = 4 << 20;
const MAX_UNFOLDED_BYTES: usize = 64 << 20;

/// A page of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRef {
    /// The chunk that holds it.
    pub chunk: ChunkRef,
    /// The path of its first entry.
    pub first: Vec<u8>,
    /// Number of its entries.
    pub entries: u64,
    /// Bytes of the files in it.
    pub bytes: u64,
}

/// The record that lists these pages.
pub fn encode_root(pages: &[PageRef]) -> Vec<u8> {
    let mut table = ChunkTable::default();
    let mut list = Vec::new();
    let mut before: &[u8] = &[];
    for PageRef { chunk, first, entries, bytes } in pages {
        let shared = shared_prefix(before, first);
        put_number(&mut list, shared as u64);
        put_bytes(&mut list, &first[shared..]);
        for number in [*entries, *bytes, table.number(*chunk).0] {
            put_number(&mut list, number);
        }
        before = first;
    }
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.push(VERSION);
    table.encode(&mut out);
    put_number(&mut out, pages.len() as u64);
    out.extend_from_slice(&list);
    out
}

/// The pages of a record.
pub fn decode_root(bytes: &[u8]) -> Result<Vec<PageRef>, FormatError> {
    let mut fields = Fields::of_record(bytes, MAGIC, MAX_ROOT_BYTES)?;
    let chunks = ChunkTable::decode(&mut fields)?;
    let count = fields.count(5)?;
    let mut pages: Vec<PageRef> = Vec::new();
    let mut unfolded = 0;
    for _ in 0..count {
        let first = read_path(&mut fields, pages.last().map(|page| page.first.as_slice()))?;
        unfolded += first.len();
        if unfolded > MAX_UNFOLDED_BYTES {
            return Err(fields.error("the paths of a record are too long together"));
        }
        let (entries, bytes) = (fields.number()?, fields.number()?);
        let number = usize::try_from(fields.number()?).unwrap_or(usize::MAX);
        let chunk = *chunks.get(number).ok_or_else(|| fields.error("a page names no chunk"))?;
        pages.push(PageRef { chunk, first, entries, bytes });
    }
    fields.end()?;
    Ok(pages)
}
