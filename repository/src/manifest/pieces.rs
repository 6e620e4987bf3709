//! Pieces of files and the chunks that they refer to: in pages, and in lists of their own for large files.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::FormatError;
use super::entry::Piece;
use super::fields::{Fields, VERSION, put_number};
use crate::id::{ChunkId, PackId, Place, SessionId};
use crate::session::SessionError;
use crate::sink::{ChunkKind, ChunkRef, ChunkSink, MAX_CHUNK_BYTES};

const MAGIC: [u8; 4] = *b"LBPL";
/// A list ends at the latest after this many pieces.
const LIST_MAX: usize = 2048;
/// Files with fewer pieces keep them in the page; no list but the last of a file is shorter.
const LISTED_MIN: usize = 256;
/// A list ends after a chunk whose id's first two bytes (little endian) have none of these bits: on average after
/// 512 more. So most lists of a changed file stay the same.
const LIST_MASK: u16 = 511;
/// No list is larger.
const MAX_LIST_BYTES: usize = 1 << 20;

const HOLE: u8 = 0;
const NEXT: u8 = 1;
const WHOLE: u8 = 2;
const PART: u8 = 3;

/// Chunks in the order of their first use, each once.
#[derive(Debug, Default)]
pub(super) struct ChunkTable {
    chunks: Vec<ChunkRef>,
    known: HashMap<ChunkRef, u64>,
    /// The last answer: files that lie in one bundle follow one another.
    last: Option<(ChunkRef, u64)>,
}

impl ChunkTable {
    /// The number of the chunk, and whether it is new.
    pub(super) fn number(&mut self, chunk: ChunkRef) -> (u64, bool) {
        if let Some((last, number)) = self.last
            && last == chunk
        {
            return (number, false);
        }
        let next = self.chunks.len() as u64;
        let number = *self.known.entry(chunk).or_insert(next);
        if number == next {
            self.chunks.push(chunk);
        }
        self.last = Some((chunk, number));
        (number, number == next)
    }

    /// Appends the sessions (count, 16 bytes each) and the chunks (count; all ids; then of each its length, the
    /// number of its session, its pack, its slot).
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let mut sessions: Vec<SessionId> = Vec::new();
        let mut known = HashMap::new();
        let mut rest = Vec::new();
        for chunk in &self.chunks {
            let PackId { session, seq } = chunk.place.pack;
            let number = *known.entry(session).or_insert_with(|| {
                sessions.push(session);
                sessions.len() as u64 - 1
            });
            for value in [u64::from(chunk.len), number, u64::from(seq), u64::from(chunk.place.slot)] {
                put_number(&mut rest, value);
            }
        }
        put_number(out, sessions.len() as u64);
        for session in &sessions {
            out.extend_from_slice(&session.0);
        }
        put_number(out, self.chunks.len() as u64);
        for chunk in &self.chunks {
            out.extend_from_slice(&chunk.id.0);
        }
        out.extend_from_slice(&rest);
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Vec<ChunkRef>, FormatError> {
        let count = fields.count(16)?;
        let sessions: Vec<_> = (0..count).map(|_| fields.array().map(SessionId)).collect::<Result<_, _>>()?;
        let count = fields.count(36)?;
        let ids: Vec<_> = (0..count).map(|_| fields.array().map(ChunkId)).collect::<Result<_, _>>()?;
        ids.into_iter()
            .map(|id| {
                let len = fields.number_u32()?;
                if len as usize > MAX_CHUNK_BYTES {
                    return Err(fields.error("a chunk is too large"));
                }
                let session = usize::try_from(fields.number()?).ok().and_then(|number| sessions.get(number)).copied();
                let session = session.ok_or_else(|| fields.error("a chunk names no session"))?;
                let seq = fields.number_u32()?;
                let slot = fields.number()?;
                let slot = u16::try_from(slot).map_err(|_| fields.error("a slot is too large"))?;
                Ok(ChunkRef { id, len, place: Place { pack: PackId { session, seq }, slot } })
            })
            .collect()
    }
}

/// Appends pieces: of each its tag and what the tag needs.
pub(super) fn put_pieces(out: &mut Vec<u8>, pieces: &[Piece], table: &mut ChunkTable) {
    for piece in pieces {
        match piece {
            Piece::Hole { len } => {
                out.push(HOLE);
                put_number(out, *len);
            }
            Piece::Data { chunk, offset, len } => {
                let (number, is_new) = table.number(*chunk);
                let is_whole = *offset == 0 && *len == chunk.len;
                if is_whole && is_new {
                    out.push(NEXT);
                    continue;
                }
                out.push(if is_whole { WHOLE } else { PART });
                put_number(out, number);
                if !is_whole {
                    put_number(out, u64::from(*offset));
                    put_number(out, u64::from(*len));
                }
            }
        }
    }
}

/// Follows the order of first use while pieces are read.
#[derive(Debug)]
pub(super) struct PieceReader<'a> {
    chunks: &'a [ChunkRef],
    used: usize,
}

impl<'a> PieceReader<'a> {
    pub(super) fn new(chunks: &'a [ChunkRef]) -> Self {
        Self { chunks, used: 0 }
    }

    fn chunk(&mut self, number: u64, fields: &Fields<'_>) -> Result<ChunkRef, FormatError> {
        let found = usize::try_from(number).ok().filter(|number| *number <= self.used);
        let found = found.and_then(|number| self.chunks.get(number).map(|chunk| (number, *chunk)));
        let (number, chunk) = found.ok_or_else(|| fields.error("a piece names no chunk"))?;
        self.used = self.used.max(number + 1);
        Ok(chunk)
    }

    /// The pieces of one file or list.
    pub(super) fn read(&mut self, count: usize, fields: &mut Fields<'_>) -> Result<Vec<Piece>, FormatError> {
        let mut pieces = Vec::with_capacity(count);
        for _ in 0..count {
            let piece = match fields.take(1)?[0] {
                HOLE => Piece::Hole { len: fields.number()? },
                NEXT => Piece::whole(self.chunk(self.used as u64, fields)?),
                tag @ (WHOLE | PART) => {
                    let number = fields.number()?;
                    let chunk = self.chunk(number, fields)?;
                    if tag == WHOLE {
                        Piece::whole(chunk)
                    } else {
                        let (offset, len) = (fields.number_u32()?, fields.number_u32()?);
                        if offset.checked_add(len).is_none_or(|end| end > chunk.len) {
                            return Err(fields.error("a piece lies outside of its chunk"));
                        }
                        Piece::Data { chunk, offset, len }
                    }
                }
                _ => return Err(fields.error("unknown kind of piece")),
            };
            if piece.is_empty() {
                return Err(fields.error("a piece is empty"));
            }
            pieces.push(piece);
        }
        Ok(pieces)
    }

    /// All chunks of the table must have been used.
    pub(super) fn end(&self, fields: &Fields<'_>) -> Result<(), FormatError> {
        if self.used == self.chunks.len() { Ok(()) } else { Err(fields.error("a chunk is not used")) }
    }
}

/// Bytes of the file that the pieces make, unless that overflows.
pub(super) fn total_len(pieces: &[Piece]) -> Option<u64> {
    pieces.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.len()))
}

/// The record that holds a list of pieces.
pub fn encode_pieces(pieces: &[Piece]) -> Vec<u8> {
    let mut table = ChunkTable::default();
    let mut tags = Vec::new();
    put_pieces(&mut tags, pieces, &mut table);
    let mut out = Vec::with_capacity(tags.len() + pieces.len() * 40);
    out.extend_from_slice(&MAGIC);
    out.push(VERSION);
    table.encode(&mut out);
    put_number(&mut out, pieces.len() as u64);
    out.extend_from_slice(&tags);
    out
}

/// The pieces of a list.
pub fn decode_pieces(bytes: &[u8]) -> Result<Vec<Piece>, FormatError> {
    let mut fields = Fields::of_record(bytes, MAGIC, MAX_LIST_BYTES)?;
    let chunks = ChunkTable::decode(&mut fields)?;
    let count = fields.count(1)?;
    let mut reader = PieceReader::new(&chunks);
    let pieces = reader.read(count, &mut fields)?;
    reader.end(&fields)?;
    fields.end()?;
    if pieces.is_empty() || total_len(&pieces).is_none() {
        return Err(fields.error("a list without bytes"));
    }
    Ok(pieces)
}

/// Collects the pieces of one file; those of a large one go into lists as they come.
pub(crate) struct PieceListWriter {
    sink: Arc<dyn ChunkSink>,
    pieces: Vec<Piece>,
    lists: Vec<ChunkRef>,
}

impl PieceListWriter {
    pub(crate) fn new(sink: Arc<dyn ChunkSink>) -> Self {
        Self { sink, pieces: Vec::new(), lists: Vec::new() }
    }

    pub(crate) async fn push(&mut self, piece: Piece) -> Result<(), SessionError> {
        self.pieces.push(piece);
        let count = self.pieces.len();
        let is_cut = count >= LISTED_MIN
            && matches!(piece, Piece::Data { chunk, .. }
                if u16::from_le_bytes([chunk.id.0[0], chunk.id.0[1]]) & LIST_MASK == 0);
        if is_cut || count == LIST_MAX { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), SessionError> {
        let plain = Bytes::from(encode_pieces(&std::mem::take(&mut self.pieces)));
        let put = self.sink.put(ChunkKind::Manifest, self.sink.chunk_id(&plain), plain).await?;
        self.lists.push(put.chunk);
        Ok(())
    }

    pub(crate) async fn finish(mut self) -> Result<super::Contents, SessionError> {
        if self.lists.is_empty() && self.pieces.len() < LISTED_MIN {
            return Ok(super::Contents::Inline(self.pieces));
        }
        if !self.pieces.is_empty() {
            self.flush().await?;
        }
        Ok(super::Contents::Listed(self.lists))
    }
}
