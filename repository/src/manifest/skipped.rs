//! What a backup could not read: data, not only a warning. Kept with the snapshot.

use std::fmt;

use bytes::Bytes;

use super::entry::MAX_PATH_BYTES;
use super::fields::{Fields, VERSION, put_bytes, put_number};
use super::{FormatError, ManifestError};
use crate::session::SessionError;
use crate::sink::{ChunkKind, ChunkRef, ChunkSink, ChunkSource};

const MAGIC: [u8; 4] = *b"LBSK";
/// A record ends after this many bytes.
const RECORD_BYTES: usize = 256 << 10;
const MAX_RECORD_BYTES: usize = 1 << 20;
const MAX_TEXT_BYTES: usize = 1 << 10;

/// A path that is not in the snapshot as it was in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The path relative to the root.
    pub path: Vec<u8>,
    /// Why.
    pub reason: Reason,
}

/// Why a path was skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The operating system refused; a directory's entry may be there, but not what is in it.
    Unreadable {
        /// What it said.
        error: String,
    },
    /// It was there when the directory was read, and gone when it was opened.
    Vanished,
    /// It lost bytes while it was read.
    Shrunk,
    /// Its name or its attributes are larger than a manifest takes.
    TooLarge,
    /// Its content is stored, but not that it is another name of an earlier file: there are too many such names.
    LinkNotKept,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { error } => write!(f, "unreadable: {error}"),
            Self::Vanished => f.write_str("vanished before it could be read"),
            Self::Shrunk => f.write_str("shrank while it was read"),
            Self::TooLarge => f.write_str("its name or attributes are too large"),
            Self::LinkNotKept => f.write_str("stored as a file of its own: there are too many hard links"),
        }
    }
}

impl Reason {
    fn number(&self) -> u8 {
        match self {
            Self::Unreadable { .. } => 0,
            Self::Vanished => 1,
            Self::Shrunk => 2,
            Self::TooLarge => 3,
            Self::LinkNotKept => 4,
        }
    }
}

/// The record that lists these.
pub fn encode_skipped(skipped: &[Skipped]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.push(VERSION);
    put_number(&mut out, skipped.len() as u64);
    for Skipped { path, reason } in skipped {
        // A path that is too long for a manifest is listed by its beginning.
        put_bytes(&mut out, &path[..path.len().min(MAX_PATH_BYTES)]);
        out.push(reason.number());
        let text = if let Reason::Unreadable { error } = reason { error.as_str() } else { "" };
        put_bytes(&mut out, &text.as_bytes()[..text.floor_char_boundary(MAX_TEXT_BYTES)]);
    }
    out
}

/// What a record lists.
pub fn decode_skipped(bytes: &[u8]) -> Result<Vec<Skipped>, FormatError> {
    let mut fields = Fields::of_record(bytes, MAGIC, MAX_RECORD_BYTES)?;
    let count = fields.count(3)?;
    let mut skipped = Vec::new();
    for _ in 0..count {
        let path = fields.bytes()?.to_vec();
        if path.len() > MAX_PATH_BYTES {
            return Err(fields.error("a path is too long"));
        }
        let number = fields.take(1)?[0];
        let text = fields.bytes()?;
        if text.len() > MAX_TEXT_BYTES || (number != 0 && !text.is_empty()) {
            return Err(fields.error("a text that does not belong here"));
        }
        let reason = match number {
            0 => {
                let error = std::str::from_utf8(text).map_err(|_| fields.error("a text is no UTF-8"))?;
                Reason::Unreadable { error: error.to_owned() }
            }
            1 => Reason::Vanished,
            2 => Reason::Shrunk,
            3 => Reason::TooLarge,
            4 => Reason::LinkNotKept,
            _ => return Err(fields.error("unknown reason")),
        };
        skipped.push(Skipped { path, reason });
    }
    fields.end()?;
    Ok(skipped)
}

/// Stores the list; no chunk at all when it is empty.
pub(crate) async fn write_skipped(sink: &dyn ChunkSink, skipped: &[Skipped]) -> Result<Vec<ChunkRef>, SessionError> {
    let mut chunks = Vec::new();
    let mut rest = skipped;
    while !rest.is_empty() {
        let mut size = 0;
        let count = rest.iter().take_while(|one| {
            let fits = size < RECORD_BYTES;
            size += one.path.len() + 16;
            fits
        });
        let (record, left) = rest.split_at(count.count());
        let plain = Bytes::from(encode_skipped(record));
        chunks.push(sink.put(ChunkKind::Record, sink.chunk_id(&plain), plain).await?.chunk);
        rest = left;
    }
    Ok(chunks)
}

/// Reads the list back.
pub(crate) async fn read_skipped(source: &dyn ChunkSource, chunks: &[ChunkRef]) -> Result<Vec<Skipped>, ManifestError> {
    let mut skipped = Vec::new();
    for chunk in chunks {
        let plain = source.get(chunk).await?;
        skipped.extend(decode_skipped(&plain).map_err(|source| ManifestError::Damaged { chunk: chunk.id, source })?);
    }
    Ok(skipped)
}
