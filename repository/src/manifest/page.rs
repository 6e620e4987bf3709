//! A page of entries, column by column: like values lie side by side and compress well.

use std::collections::HashMap;

use super::columns::{Column, put_bytes, put_signed, put_varint};
use super::entry::{Entry, Extent, Kind, Meta, Times, Xattr, is_valid_path};
use super::{PageError, compare_paths};
use crate::id::{ChunkId, ChunkRef, PackId, Place, SessionId};
use crate::wire::{Fields, WireError};

const MAGIC: &[u8; 8] = b"LBPAGE01";
const COLUMNS: usize = 12;

// Numbers of the columns.
const NAMES: usize = 0;
const KINDS: usize = 1;
const MODES: usize = 2;
const OWNERS: usize = 3;
const MTIMES: usize = 4;
const CTIMES: usize = 5;
const INODES: usize = 6;
const NUMBERS: usize = 7;
const TEXTS: usize = 8;
const XATTRS: usize = 9;
const EXTENTS: usize = 10;
const CHUNKS: usize = 11;

/// Encodes entries that are sorted by path.
pub fn encode_page(entries: &[Entry]) -> Vec<u8> {
    let mut encoder = Encoder::default();
    let mut previous = Entry { path: Vec::new(), kind: Kind::Directory, meta: Meta::default() };
    for entry in entries {
        encoder.push(entry, &previous);
        previous.path.clone_from(&entry.path);
        previous.meta = Meta { xattrs: Vec::new(), ..entry.meta.clone() };
    }
    encoder.finish(entries.len())
}

#[derive(Default)]
struct Encoder {
    columns: [Vec<u8>; COLUMNS],
    chunks: HashMap<ChunkRef, u64>,
    sessions: HashMap<SessionId, u64>,
}

impl Encoder {
    fn push(&mut self, entry: &Entry, previous: &Entry) {
        let shared = entry.path.iter().zip(&previous.path).take_while(|(left, right)| left == right).count();
        put_varint(&mut self.columns[NAMES], shared as u64);
        put_bytes(&mut self.columns[NAMES], &entry.path[shared..]);
        let meta = &entry.meta;
        put_varint(&mut self.columns[MODES], u64::from(meta.mode));
        put_varint(&mut self.columns[OWNERS], u64::from(meta.uid));
        put_varint(&mut self.columns[OWNERS], u64::from(meta.gid));
        let (mtime, ctime) = (meta.times.mtime, meta.times.ctime);
        put_signed(&mut self.columns[MTIMES], mtime.0.wrapping_sub(previous.meta.times.mtime.0));
        put_varint(&mut self.columns[MTIMES], u64::from(mtime.1));
        put_signed(&mut self.columns[CTIMES], ctime.0.wrapping_sub(mtime.0));
        put_varint(&mut self.columns[CTIMES], u64::from(ctime.1));
        put_signed(&mut self.columns[INODES], meta.inode.wrapping_sub(previous.meta.inode).cast_signed());
        put_varint(&mut self.columns[XATTRS], meta.xattrs.len() as u64);
        for xattr in &meta.xattrs {
            put_bytes(&mut self.columns[XATTRS], &xattr.name);
            put_bytes(&mut self.columns[XATTRS], &xattr.value);
        }
        self.push_kind(&entry.kind);
    }

    fn push_kind(&mut self, kind: &Kind) {
        let number = match kind {
            Kind::File { .. } => 0,
            Kind::Directory => 1,
            Kind::Symlink { .. } => 2,
            Kind::HardLink { .. } => 3,
            Kind::CharDevice { .. } => 4,
            Kind::BlockDevice { .. } => 5,
            Kind::Fifo => 6,
            Kind::Socket => 7,
        };
        self.columns[KINDS].push(number);
        match kind {
            Kind::File { size, extents } => {
                put_varint(&mut self.columns[NUMBERS], *size);
                put_varint(&mut self.columns[EXTENTS], extents.len() as u64);
                let mut end = 0u64;
                for extent in extents {
                    let chunk = self.chunk(&extent.chunk);
                    let column = &mut self.columns[EXTENTS];
                    put_varint(column, extent.offset.wrapping_sub(end));
                    put_varint(column, chunk);
                    put_varint(column, u64::from(extent.from));
                    put_varint(column, u64::from(extent.len));
                    end = extent.offset + u64::from(extent.len);
                }
            }
            Kind::Symlink { target: text } | Kind::HardLink { to: text } => put_bytes(&mut self.columns[TEXTS], text),
            Kind::CharDevice { device } | Kind::BlockDevice { device } => {
                put_varint(&mut self.columns[NUMBERS], *device)
            }
            Kind::Directory | Kind::Fifo | Kind::Socket => {}
        }
    }

    /// The number of a chunk in this page's table.
    fn chunk(&mut self, chunk: &ChunkRef) -> u64 {
        if let Some(number) = self.chunks.get(chunk) {
            return *number;
        }
        let number = self.chunks.len() as u64;
        self.chunks.insert(*chunk, number);
        put_chunk(&mut self.columns[CHUNKS], &mut self.sessions, chunk);
        number
    }

    fn finish(self, entries: usize) -> Vec<u8> {
        let mut page = MAGIC.to_vec();
        page.extend_from_slice(&u32::try_from(entries).unwrap_or(u32::MAX).to_le_bytes());
        for column in &self.columns {
            page.extend_from_slice(&u32::try_from(column.len()).unwrap_or(u32::MAX).to_le_bytes());
        }
        for column in self.columns {
            page.extend_from_slice(&column);
        }
        page
    }
}

/// A chunk reference; a session that was named before in the same column is a number.
pub(super) fn put_chunk(column: &mut Vec<u8>, sessions: &mut HashMap<SessionId, u64>, chunk: &ChunkRef) {
    column.extend_from_slice(&chunk.id.0);
    put_varint(column, u64::from(chunk.len));
    let session = chunk.place.pack.session;
    let next = sessions.len() as u64;
    if let Some(number) = sessions.get(&session) {
        put_varint(column, *number);
    } else {
        sessions.insert(session, next);
        put_varint(column, next);
        column.extend_from_slice(&session.0);
    }
    put_varint(column, u64::from(chunk.place.pack.seq));
    put_varint(column, u64::from(chunk.place.slot));
}

/// Reads what [`put_chunk`] wrote.
pub(super) fn take_chunk(column: &mut Column<'_>, sessions: &mut Vec<SessionId>) -> Result<ChunkRef, WireError> {
    let id = ChunkId(column.array()?);
    let len = column.varint_u32()?;
    let number = usize::try_from(column.varint()?).unwrap_or(usize::MAX);
    if number == sessions.len() {
        sessions.push(SessionId(column.array()?));
    }
    let session = *sessions.get(number).ok_or(WireError { what: "a chunk names an unknown session", at: 0 })?;
    let seq = column.varint_u32()?;
    let slot = u16::try_from(column.varint()?).map_err(|_| WireError { what: "a slot is too large", at: 0 })?;
    Ok(ChunkRef { id, len, place: Place { pack: PackId { session, seq }, slot } })
}

/// Decodes a page. Whatever the bytes are: sorted valid paths, extents in order and within file and chunk, or an error.
pub fn decode_page(bytes: &[u8]) -> Result<Vec<Entry>, PageError> {
    let mut fields = Fields::new(bytes);
    fields.expect(MAGIC, "no manifest page of a known version")?;
    let count = fields.u32()? as usize;
    let mut lengths = [0usize; COLUMNS];
    for length in &mut lengths {
        *length = fields.u32()? as usize;
    }
    let mut columns = Vec::with_capacity(COLUMNS);
    for length in lengths {
        columns.push(Column::new(fields.take(length)?));
    }
    fields.end()?;
    if count > columns[KINDS].left() {
        return Err(fields.error("more entries than kinds").into());
    }
    let mut chunks = Vec::new();
    let mut sessions = Vec::new();
    while columns[CHUNKS].left() > 0 {
        chunks.push(take_chunk(&mut columns[CHUNKS], &mut sessions)?);
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(count);
    for number in 0..count {
        let entry = take_entry(&mut columns, &chunks, entries.last(), number)?;
        entries.push(entry);
    }
    for column in &columns {
        column.end()?;
    }
    Ok(entries)
}

fn take_entry(
    columns: &mut [Column<'_>],
    chunks: &[ChunkRef],
    previous: Option<&Entry>,
    number: usize,
) -> Result<Entry, PageError> {
    let refuse = |what| PageError::Entry { number, what };
    let before = previous.map_or(&[][..], |entry| &entry.path);
    let shared = usize::try_from(columns[NAMES].varint()?).unwrap_or(usize::MAX);
    let mut path = before.get(..shared).ok_or(refuse("it shares more than there is"))?.to_vec();
    path.extend_from_slice(columns[NAMES].bytes()?);
    if !is_valid_path(&path) {
        return Err(refuse("its path is not one that a walk finds"));
    }
    if previous.is_some() && compare_paths(before, &path).is_ge() {
        return Err(refuse("it does not follow the one before"));
    }
    let mode = columns[MODES].varint_u32()?;
    let (uid, gid) = (columns[OWNERS].varint_u32()?, columns[OWNERS].varint_u32()?);
    let old = previous.map_or((Times::default(), 0), |entry| (entry.meta.times, entry.meta.inode));
    let mtime = (old.0.mtime.0.wrapping_add(columns[MTIMES].signed()?), columns[MTIMES].varint_u32()?);
    let ctime = (mtime.0.wrapping_add(columns[CTIMES].signed()?), columns[CTIMES].varint_u32()?);
    if mtime.1 >= 1_000_000_000 || ctime.1 >= 1_000_000_000 || mode > 0o7777 {
        return Err(refuse("its mode or times are impossible"));
    }
    let inode = old.1.wrapping_add(columns[INODES].signed()?.cast_unsigned());
    let mut xattrs = Vec::new();
    for _ in 0..columns[XATTRS].count()? {
        xattrs.push(Xattr { name: columns[XATTRS].bytes()?.to_vec(), value: columns[XATTRS].bytes()?.to_vec() });
    }
    let kind = take_kind(columns, chunks, number)?;
    Ok(Entry { path, kind, meta: Meta { mode, uid, gid, times: Times { mtime, ctime }, inode, xattrs } })
}

fn take_kind(columns: &mut [Column<'_>], chunks: &[ChunkRef], number: usize) -> Result<Kind, PageError> {
    let refuse = |what| PageError::Entry { number, what };
    Ok(match columns[KINDS].u8()? {
        0 => {
            let size = columns[NUMBERS].varint()?;
            let mut extents = Vec::new();
            let mut end = 0u64;
            for _ in 0..columns[EXTENTS].count()? {
                let column = &mut columns[EXTENTS];
                let offset = end.checked_add(column.varint()?).ok_or(refuse("an extent is out of range"))?;
                let chunk = usize::try_from(column.varint()?).ok().and_then(|number| chunks.get(number));
                let chunk = *chunk.ok_or(refuse("an extent names an unknown chunk"))?;
                let (from, len) = (column.varint_u32()?, column.varint_u32()?);
                end = offset.checked_add(u64::from(len)).ok_or(refuse("an extent is out of range"))?;
                if u64::from(from) + u64::from(len) > u64::from(chunk.len) || end > size || len == 0 {
                    return Err(refuse("an extent is out of range"));
                }
                extents.push(Extent { offset, chunk, from, len });
            }
            Kind::File { size, extents }
        }
        1 => Kind::Directory,
        2 => Kind::Symlink { target: columns[TEXTS].bytes()?.to_vec() },
        3 => {
            let to = columns[TEXTS].bytes()?.to_vec();
            if to.is_empty() || !is_valid_path(&to) {
                return Err(refuse("it links to a path that is not one that a walk finds"));
            }
            Kind::HardLink { to }
        }
        4 => Kind::CharDevice { device: columns[NUMBERS].varint()? },
        5 => Kind::BlockDevice { device: columns[NUMBERS].varint()? },
        6 => Kind::Fifo,
        7 => Kind::Socket,
        _ => return Err(refuse("unknown kind")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(seed: u8, len: u32) -> ChunkRef {
        let pack = PackId { session: SessionId([seed % 3; 16]), seq: u32::from(seed) };
        ChunkRef { id: ChunkId([seed; 32]), len, place: Place { pack, slot: u16::from(seed) } }
    }

    fn kinds() -> impl Strategy<Value = Kind> {
        let extents = proptest::collection::vec((0u64..5000, any::<u8>(), 0u32..50, 1u32..1000), 0..5);
        prop_oneof![
            (extents, 0u64..100).prop_map(|(parts, more)| {
                let mut end = 0;
                let extents: Vec<_> = parts
                    .into_iter()
                    .map(|(gap, seed, from, len)| {
                        let offset = end + gap;
                        end = offset + u64::from(len);
                        Extent { offset, chunk: chunk(seed, from + len), from, len }
                    })
                    .collect();
                Kind::File { size: end + more, extents }
            }),
            Just(Kind::Directory),
            any::<Vec<u8>>().prop_map(|target| Kind::Symlink { target }),
            Just(Kind::HardLink { to: b"a/b".to_vec() }),
            any::<u64>().prop_map(|device| Kind::CharDevice { device }),
            any::<u64>().prop_map(|device| Kind::BlockDevice { device }),
            Just(Kind::Fifo),
            Just(Kind::Socket),
        ]
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let meta =
            (0u32..0o10000, any::<u32>(), any::<u32>(), any::<i64>(), 0u32..1_000_000_000, any::<u64>(), any::<i64>())
                .prop_map(|(mode, uid, gid, seconds, nanos, inode, changed)| Meta {
                    mode,
                    uid,
                    gid,
                    times: Times { mtime: (seconds, nanos), ctime: (changed, 999_999_999 - nanos) },
                    inode,
                    xattrs: vec![Xattr { name: b"user.x".to_vec(), value: nanos.to_le_bytes().to_vec() }],
                });
        let names = proptest::collection::btree_set("[a-c]{1,3}(/[a-c\u{ff}]{1,3}){0,3}", 0..40);
        (names, proptest::collection::vec((kinds(), meta), 40)).prop_map(|(names, others)| {
            let mut entries: Vec<_> = names
                .into_iter()
                .zip(others)
                .map(|(path, (kind, meta))| Entry { path: path.into_bytes(), kind, meta })
                .collect();
            entries.sort_by(|l, r| compare_paths(&l.path, &r.path));
            entries
        })
    }

    proptest! {
        #[test]
        fn pages_round_trip(entries in entries()) {
            prop_assert_eq!(decode_page(&encode_page(&entries)).unwrap(), entries);
        }

        #[test]
        fn changed_pages_never_panic(entries in entries(), at: prop::sample::Index, bit in 0u8..8, cut: prop::sample::Index) {
            let mut bytes = encode_page(&entries);
            let place = at.index(bytes.len());
            bytes[place] ^= 1 << bit;
            let _ = decode_page(&bytes);
            let _ = decode_page(&bytes[..cut.index(bytes.len())]);
        }
    }

    #[test]
    fn hostile_paths_and_links_are_refused() {
        let entry = |path: &[u8], kind| Entry { path: path.to_vec(), kind, meta: Meta::default() };
        for bad in [
            vec![entry(b"../etc/passwd", Kind::Fifo)],
            vec![entry(b"/etc/passwd", Kind::Fifo)],
            vec![entry(b"b", Kind::Fifo), entry(b"a", Kind::Fifo)],
            vec![entry(b"a", Kind::Fifo), entry(b"a", Kind::Directory)],
            vec![entry(b"a", Kind::HardLink { to: b"../../etc/shadow".to_vec() })],
            vec![entry(b"a", Kind::HardLink { to: Vec::new() })],
        ] {
            assert!(decode_page(&encode_page(&bad)).is_err(), "{bad:?}");
        }
        let beyond = Extent { offset: 0, chunk: chunk(1, 10), from: 5, len: 6 };
        assert!(decode_page(&encode_page(&[entry(b"a", Kind::File { size: 100, extents: vec![beyond] })])).is_err());
    }
}
