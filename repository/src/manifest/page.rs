//! Pages: some hundred entries in path order, column by column.

use super::FormatError;
use super::entry::{
    Contents, Entry, Kind, MAX_PATH_BYTES, Meta, Piece, Regular, Time, Xattr, compare_paths, is_valid_path,
    page_map_len, shared_prefix,
};
use super::fields::{Fields, VERSION, put_bytes, put_number, put_signed};
use super::pieces::{ChunkTable, PieceReader, put_pieces, total_len};

const MAGIC: [u8; 4] = *b"LBMP";
/// No page is larger. Pages aim at 64 to 128 KiB; one entry with many attributes may need more.
pub const MAX_PAGE_BYTES: usize = 8 << 20;
/// Paths are front-coded: this bounds what a page can unfold to.
const MAX_UNFOLDED_BYTES: usize = 16 << 20;
const MAX_ENTRIES: usize = 1 << 16;
const NANOSECONDS: u32 = 1_000_000_000;

const REGULAR: u8 = 0;
const DIRECTORY: u8 = 1;
const SYMLINK: u8 = 2;
const CHAR_DEVICE: u8 = 3;
const BLOCK_DEVICE: u8 = 4;
const FIFO: u8 = 5;
const SOCKET: u8 = 6;
const LINK: u8 = 7;
const SPARSE: u8 = 0x10;
const LINKED: u8 = 0x20;
const LISTED: u8 = 0x40;
const MAPPED: u8 = 0x80;

#[derive(Default)]
struct Columns {
    paths: Vec<u8>,
    kinds: Vec<u8>,
    modes: Vec<u8>,
    owners: Vec<u8>,
    mtimes: Vec<u8>,
    changes: Vec<u8>,
    xattrs: Vec<u8>,
    details: Vec<u8>,
    contents: Vec<u8>,
    table: ChunkTable,
}

fn put_time(out: &mut Vec<u8>, time: Time) {
    put_signed(out, time.seconds);
    put_number(out, u64::from(time.nanoseconds));
}

impl Columns {
    fn push(&mut self, entry: &Entry, before: &[u8]) {
        let shared = shared_prefix(before, &entry.path);
        put_number(&mut self.paths, shared as u64);
        put_bytes(&mut self.paths, &entry.path[shared..]);
        let Meta { mode, uid, gid, mtime, ctime, inode, xattrs } = &entry.meta;
        put_number(&mut self.modes, u64::from(*mode));
        put_number(&mut self.owners, u64::from(*uid));
        put_number(&mut self.owners, u64::from(*gid));
        put_time(&mut self.mtimes, *mtime);
        put_time(&mut self.changes, *ctime);
        put_number(&mut self.changes, *inode);
        put_number(&mut self.xattrs, xattrs.len() as u64);
        for Xattr { name, value } in xattrs {
            put_bytes(&mut self.xattrs, name);
            put_bytes(&mut self.xattrs, value);
        }
        let kind = self.push_kind(&entry.kind);
        self.kinds.push(kind);
    }

    fn push_kind(&mut self, kind: &Kind) -> u8 {
        let mut device = |major: u32, minor: u32| {
            put_number(&mut self.details, u64::from(major));
            put_number(&mut self.details, u64::from(minor));
        };
        match kind {
            Kind::Directory => DIRECTORY,
            Kind::Fifo => FIFO,
            Kind::Socket => SOCKET,
            Kind::CharDevice { major, minor } => {
                device(*major, *minor);
                CHAR_DEVICE
            }
            Kind::BlockDevice { major, minor } => {
                device(*major, *minor);
                BLOCK_DEVICE
            }
            Kind::Symlink { target } => {
                put_bytes(&mut self.details, target);
                SYMLINK
            }
            Kind::Link { to } => {
                put_bytes(&mut self.details, to);
                LINK
            }
            Kind::Regular(Regular { size, sparse, linked, contents, page_map }) => {
                put_number(&mut self.details, *size);
                let mut kind = REGULAR;
                for (is_set, flag) in [(*sparse, SPARSE), (*linked, LINKED)] {
                    kind |= if is_set { flag } else { 0 };
                }
                if self.push_contents(contents) {
                    kind |= LISTED;
                }
                if !page_map.is_empty() {
                    kind |= MAPPED;
                    self.contents.push(u8::from(matches!(page_map, Contents::Listed(_))));
                    self.push_contents(page_map);
                }
                kind
            }
        }
    }
}

impl Columns {
    /// Appends pieces, or the lists of pieces: then the answer is `true`.
    fn push_contents(&mut self, contents: &Contents) -> bool {
        let lists: Vec<_>;
        let (pieces, is_listed) = match contents {
            Contents::Inline(pieces) => (pieces, false),
            Contents::Listed(chunks) => {
                lists = chunks.iter().map(|list| Piece::whole(*list)).collect();
                (&lists, true)
            }
        };
        put_number(&mut self.contents, pieces.len() as u64);
        put_pieces(&mut self.contents, pieces, &mut self.table);
        is_listed
    }
}

/// A page that takes entries in path order.
#[derive(Default)]
pub(super) struct PageBuilder {
    columns: Columns,
    entries: u64,
    /// Path of the entry that was pushed last.
    last: Vec<u8>,
}

impl PageBuilder {
    /// Appends an entry.
    pub(super) fn push(&mut self, entry: &Entry) {
        self.columns.push(entry, &self.last);
        self.entries += 1;
        self.last.clear();
        self.last.extend_from_slice(&entry.path);
    }

    /// Number of entries.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Path of the last entry; empty before the first.
    pub(super) fn last(&self) -> &[u8] {
        &self.last
    }

    /// The page.
    pub(super) fn encode(self) -> Vec<u8> {
        let Columns { paths, kinds, modes, owners, mtimes, changes, xattrs, details, contents, table } = self.columns;
        let mut chunks = Vec::new();
        table.encode(&mut chunks);
        let columns = [chunks, paths, kinds, modes, owners, mtimes, changes, xattrs, details, contents];
        let mut out = Vec::with_capacity(32 + columns.iter().map(|column| column.len() + 5).sum::<usize>());
        out.extend_from_slice(&MAGIC);
        out.push(VERSION);
        put_number(&mut out, self.entries);
        for column in &columns {
            put_bytes(&mut out, column);
        }
        out
    }
}

/// The page that holds these entries, which must be in path order.
pub fn encode_page(entries: &[Entry]) -> Vec<u8> {
    let mut page = PageBuilder::default();
    for entry in entries {
        page.push(entry);
    }
    page.encode()
}

/// The entries of a page.
///
/// Their paths are valid and in order; what they refer to lies within chunks; pieces make up the size.
pub fn decode_page(bytes: &[u8]) -> Result<Vec<Entry>, FormatError> {
    let mut fields = Fields::of_record(bytes, MAGIC, MAX_PAGE_BYTES)?;
    let count = fields.count(1)?;
    if !(1..=MAX_ENTRIES).contains(&count) {
        return Err(fields.error("a page has no or too many entries"));
    }
    let mut chunk_column = fields.column()?;
    let chunks = ChunkTable::decode(&mut chunk_column)?;
    chunk_column.end()?;
    let mut columns = Reading {
        paths: fields.column()?,
        kinds: fields.column()?,
        modes: fields.column()?,
        owners: fields.column()?,
        mtimes: fields.column()?,
        changes: fields.column()?,
        xattrs: fields.column()?,
        details: fields.column()?,
        contents: fields.column()?,
        pieces: PieceReader::new(&chunks),
        unfolded: 0,
    };
    fields.end()?;
    // Each entry has its byte in the column of kinds.
    if columns.kinds.left() != count {
        return Err(columns.kinds.error("the count does not fit the entries"));
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(count);
    for _ in 0..count {
        let before = entries.last().map(|entry| entry.path.as_slice());
        let entry = columns.entry(before)?;
        entries.push(entry);
    }
    columns.end()?;
    Ok(entries)
}

struct Reading<'a> {
    paths: Fields<'a>,
    kinds: Fields<'a>,
    modes: Fields<'a>,
    owners: Fields<'a>,
    mtimes: Fields<'a>,
    changes: Fields<'a>,
    xattrs: Fields<'a>,
    details: Fields<'a>,
    contents: Fields<'a>,
    pieces: PieceReader<'a>,
    unfolded: usize,
}

impl Reading<'_> {
    fn entry(&mut self, before: Option<&[u8]>) -> Result<Entry, FormatError> {
        let path = read_path(&mut self.paths, before)?;
        self.unfolded += path.len();
        if self.unfolded > MAX_UNFOLDED_BYTES {
            return Err(self.paths.error("the paths of a page are too long together"));
        }
        let mode = self.modes.number_u32()?;
        if mode > 0o7777 {
            return Err(self.modes.error("a mode has other bits than permissions"));
        }
        let (uid, gid) = (self.owners.number_u32()?, self.owners.number_u32()?);
        // The kernel takes this number for "leave it as it is".
        if uid == u32::MAX || gid == u32::MAX {
            return Err(self.owners.error("an owner is not a number of a user"));
        }
        let mtime = read_time(&mut self.mtimes)?;
        let ctime = read_time(&mut self.changes)?;
        let inode = self.changes.number()?;
        let xattrs = self.xattrs()?;
        let kind = self.kind(&path)?;
        Ok(Entry { path, meta: Meta { mode, uid, gid, mtime, ctime, inode, xattrs }, kind })
    }

    fn xattrs(&mut self) -> Result<Vec<Xattr>, FormatError> {
        let count = self.xattrs.count(2)?;
        let mut xattrs = Vec::new();
        for _ in 0..count {
            let name = self.xattrs.bytes()?;
            if name.is_empty() || name.len() > 255 || name.contains(&0) {
                return Err(self.xattrs.error("a name of an attribute that cannot be"));
            }
            xattrs.push(Xattr { name: name.to_vec(), value: self.xattrs.bytes()?.to_vec() });
        }
        Ok(xattrs)
    }

    fn kind(&mut self, path: &[u8]) -> Result<Kind, FormatError> {
        let byte = self.kinds.take(1)?[0];
        if byte & 0x0f == REGULAR {
            return self.regular(byte).map(Kind::Regular);
        }
        let details = &mut self.details;
        let kind = match byte {
            DIRECTORY => Kind::Directory,
            FIFO => Kind::Fifo,
            SOCKET => Kind::Socket,
            CHAR_DEVICE => Kind::CharDevice { major: details.number_u32()?, minor: details.number_u32()? },
            BLOCK_DEVICE => Kind::BlockDevice { major: details.number_u32()?, minor: details.number_u32()? },
            SYMLINK => {
                let target = details.bytes()?;
                if target.is_empty() || target.len() > MAX_PATH_BYTES || target.contains(&0) {
                    return Err(details.error("a symbolic link that cannot be"));
                }
                Kind::Symlink { target: target.to_vec() }
            }
            LINK => {
                let to = details.bytes()?;
                if to.is_empty() || !is_valid_path(to) || compare_paths(to, path).is_ge() {
                    return Err(details.error("a hard link to no earlier path"));
                }
                Kind::Link { to: to.to_vec() }
            }
            _ => return Err(self.kinds.error("unknown kind of entry")),
        };
        if path.is_empty() && kind != Kind::Directory {
            return Err(self.kinds.error("the root is no directory"));
        }
        Ok(kind)
    }

    fn regular(&mut self, byte: u8) -> Result<Regular, FormatError> {
        if byte & !(SPARSE | LINKED | LISTED | MAPPED) != REGULAR {
            return Err(self.kinds.error("unknown flags of a file"));
        }
        let size = self.details.number()?;
        // Offsets in files are signed in the kernel.
        if i64::try_from(size).is_err() {
            return Err(self.details.error("a file is too large"));
        }
        let contents = self.contents(byte & LISTED != 0, size)?;
        let page_map = if byte & MAPPED == 0 {
            Contents::default()
        } else {
            let is_listed = match self.contents.take(1)?[0] {
                0 => false,
                1 => true,
                _ => return Err(self.contents.error("unknown form of a page map")),
            };
            if size == 0 {
                return Err(self.contents.error("a page map of no pages"));
            }
            self.contents(is_listed, page_map_len(size))?
        };
        Ok(Regular { size, sparse: byte & SPARSE != 0, linked: byte & LINKED != 0, contents, page_map })
    }

    /// Pieces that make up `size` bytes, or chunks with lists of them.
    fn contents(&mut self, is_listed: bool, size: u64) -> Result<Contents, FormatError> {
        let count = self.contents.count(1)?;
        let pieces = self.pieces.read(count, &mut self.contents)?;
        if is_listed {
            let lists: Option<Vec<_>> = pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Data { chunk, offset: 0, len } if *len == chunk.len => Some(*chunk),
                    _ => None,
                })
                .collect();
            let lists = lists.filter(|lists| !lists.is_empty() && size > 0);
            Ok(Contents::Listed(lists.ok_or_else(|| self.contents.error("a list of pieces that is no chunk"))?))
        } else if total_len(&pieces) == Some(size) {
            Ok(Contents::Inline(pieces))
        } else {
            Err(self.contents.error("the pieces of a file do not make up its size"))
        }
    }

    fn end(&self) -> Result<(), FormatError> {
        let columns = [
            &self.paths,
            &self.kinds,
            &self.modes,
            &self.owners,
            &self.mtimes,
            &self.changes,
            &self.xattrs,
            &self.details,
            &self.contents,
        ];
        columns.into_iter().try_for_each(Fields::end)?;
        self.pieces.end(&self.contents)
    }
}

/// The next front-coded path: after the one before, and valid.
pub(super) fn read_path(fields: &mut Fields<'_>, before: Option<&[u8]>) -> Result<Vec<u8>, FormatError> {
    let shared = usize::try_from(fields.number()?).unwrap_or(usize::MAX);
    let shared = before.unwrap_or_default().get(..shared).ok_or_else(|| fields.error("a path shares too much"))?;
    let rest = fields.bytes()?;
    if shared.len() + rest.len() > MAX_PATH_BYTES {
        return Err(fields.error("a path is too long"));
    }
    let path = [shared, rest].concat();
    if !is_valid_path(&path) {
        return Err(fields.error("a path that leads elsewhere"));
    }
    if before.is_some_and(|before| compare_paths(before, &path).is_ge()) {
        return Err(fields.error("paths are not in order"));
    }
    Ok(path)
}

fn read_time(fields: &mut Fields<'_>) -> Result<Time, FormatError> {
    let (seconds, nanoseconds) = (fields.signed()?, fields.number_u32()?);
    if nanoseconds >= NANOSECONDS {
        return Err(fields.error("a time has too many nanoseconds"));
    }
    Ok(Time { seconds, nanoseconds })
}
