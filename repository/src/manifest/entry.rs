//! What a manifest says about one path.
//!
//! Plain data; paths are bytes relative to the root of the tree, which itself has the empty path.

use std::cmp::Ordering;

use jiff::Timestamp;

use crate::sink::ChunkRef;

/// No path in a manifest is longer.
pub const MAX_PATH_BYTES: usize = 32 << 10;

/// One path of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Components separated by `/`, without a leading one; empty for the root.
    pub path: Vec<u8>,
    /// Ownership, times, attributes.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
}

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular(Regular),
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink {
        /// What it points to, as it is.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// Another name of a regular file that comes earlier.
    Link {
        /// The first path of the file.
        to: Vec<u8>,
    },
}

/// A regular file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regular {
    /// Length in bytes.
    pub size: u64,
    /// Whether it took less room than its length: zeros need not be written when it is restored.
    pub sparse: bool,
    /// Whether later entries are links to it.
    pub linked: bool,
    /// Its bytes.
    pub contents: Contents,
    /// Short hashes of its pages, so that the next backup sees which of them changed; empty: there are none.
    pub page_map: Contents,
}

impl Regular {
    /// The page map, as if it were a file.
    #[must_use]
    pub fn page_map_as_file(&self) -> Self {
        let (size, contents) = (page_map_len(self.size), self.page_map.clone());
        Self { size, sparse: false, linked: false, contents, page_map: Contents::default() }
    }
}

/// The unit in which changes of large files are noticed: what databases write at once, or a multiple of it.
pub const PAGE_BYTES: u64 = 8 << 10;
/// Bytes of a page's hash in a page map.
pub const PAGE_HASH_BYTES: usize = 16;

/// Bytes of the page map of a file with this size.
pub fn page_map_len(size: u64) -> u64 {
    size.div_ceil(PAGE_BYTES) * PAGE_HASH_BYTES as u64
}

/// The bytes of a file: pieces from its start to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contents {
    /// All pieces.
    Inline(Vec<Piece>),
    /// The chunks that hold the lists of pieces.
    Listed(Vec<ChunkRef>),
}

impl Default for Contents {
    fn default() -> Self {
        Self::Inline(Vec::new())
    }
}

impl Contents {
    /// Whether there are no pieces.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Inline(pieces) if pieces.is_empty())
    }
}

/// A run of bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Zeros that take no room.
    Hole {
        /// Bytes.
        len: u64,
    },
    /// A part of a chunk.
    Data {
        /// The chunk.
        chunk: ChunkRef,
        /// First byte in the chunk.
        offset: u32,
        /// Bytes.
        len: u32,
    },
}

impl Piece {
    /// A whole chunk.
    pub fn whole(chunk: ChunkRef) -> Self {
        Self::Data { chunk, offset: 0, len: chunk.len }
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        match self {
            Self::Hole { len } => *len,
            Self::Data { len, .. } => u64::from(*len),
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A point in time, as file systems keep it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds after them, below 10⁹.
    pub nanoseconds: u32,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Full name with its namespace.
    pub name: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
}

/// Ownership, times, attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with set-id and sticky: 0 to 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of the inode. With the inode, the size and `mtime` it is the key that shows a change.
    pub ctime: Time,
    /// Number of the inode; 0: unknown, or the file was changed too recently for its times to show another change.
    pub inode: u64,
    /// Extended attributes, access control lists and capabilities among them, by name.
    pub xattrs: Vec<Xattr>,
}

impl Meta {
    /// `mtime` for people.
    pub fn mtime_text(&self) -> String {
        i32::try_from(self.mtime.nanoseconds)
            .ok()
            .and_then(|nanoseconds| Timestamp::new(self.mtime.seconds, nanoseconds).ok())
            .map_or_else(|| format!("@{}.{:09}", self.mtime.seconds, self.mtime.nanoseconds), |time| time.to_string())
    }
}

impl Kind {
    /// A word for people and programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Regular(_) => "file",
            Self::Directory => "dir",
            Self::Symlink { .. } => "symlink",
            Self::CharDevice { .. } => "char",
            Self::BlockDevice { .. } => "block",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
            Self::Link { .. } => "link",
        }
    }
}

impl Entry {
    /// Length of a regular file; of a symbolic link the length of its target; else 0.
    pub fn size(&self) -> u64 {
        match &self.kind {
            Kind::Regular(regular) => regular.size,
            Kind::Symlink { target } => target.len() as u64,
            _ => 0,
        }
    }

    /// The path of the directory that holds it, and its name there.
    pub fn parent_and_name(&self) -> (&[u8], &[u8]) {
        split_path(&self.path)
    }
}

/// Splits a path into the directory and the name in it.
pub(crate) fn split_path(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// The order of a manifest: by component, so that all that is in a directory follows it directly.
pub fn compare_paths(one: &[u8], other: &[u8]) -> Ordering {
    let shared = shared_prefix(one, other);
    // No name holds a zero byte, so a separator that counts as zero sorts before every other byte.
    let rank = |path: &[u8]| path.get(shared).map(|byte| if *byte == b'/' { 0 } else { *byte });
    rank(one).cmp(&rank(other))
}

/// Bytes that both paths begin with.
pub(super) fn shared_prefix(one: &[u8], other: &[u8]) -> usize {
    // Paths that follow one another share most of their bytes: eight are compared at a time.
    let (words, rest) = (one.as_chunks::<8>().0, other.as_chunks::<8>().0);
    let shared = 8 * words.iter().zip(rest).take_while(|(a, b)| a == b).count();
    shared + one[shared..].iter().zip(&other[shared..]).take_while(|(a, b)| a == b).count()
}

/// Whether `path` is `above` or lies below it.
pub(crate) fn is_in(path: &[u8], above: &[u8]) -> bool {
    above.is_empty() || path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// Whether the path may be in a manifest: no empty component, no `.` or `..`, no zero byte, not too long.
pub fn is_valid_path(path: &[u8]) -> bool {
    path.len() <= MAX_PATH_BYTES && (path.is_empty() || path.split(|byte| *byte == b'/').all(is_valid_name))
}

/// Whether the name may be the name of an entry.
pub(crate) fn is_valid_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_contiguous() {
        let mut paths = [&b"a.b"[..], b"a/b", b"a", b"", b"a/b/c", b"a/b.c", b"a-", b"a/\x01"];
        paths.sort_by(|one, other| compare_paths(one, other));
        assert_eq!(paths, [&b""[..], b"a", b"a/\x01", b"a/b", b"a/b/c", b"a/b.c", b"a-", b"a.b"]);
    }

    #[test]
    fn the_shared_beginning_of_paths_is_counted_by_bytes() {
        for len in 0..40 {
            let one: Vec<u8> = (0..40).collect();
            let mut other = one.clone();
            other[len] = 99;
            assert_eq!(shared_prefix(&one, &other), len);
            assert_eq!(shared_prefix(&one, &one[..len]), len);
            assert_eq!(compare_paths(&one[..len], &one), Ordering::Less);
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_not_valid() {
        for path in [&b"."[..], b"..", b"/", b"/a", b"a/", b"a//b", b"a/./b", b"a/../b", b"a\0", b"../a"] {
            assert!(!is_valid_path(path), "{path:?}");
        }
        for path in [&b""[..], b"a", b"...", b"a/..b/ c", b"\xff\xfe"] {
            assert!(is_valid_path(path), "{path:?}");
        }
        assert!(!is_valid_path(&vec![b'a'; MAX_PATH_BYTES + 1]));
    }

    #[test]
    fn times_before_1970_and_absurd_ones_have_a_text() {
        let text = |seconds, nanoseconds| Meta { mtime: Time { seconds, nanoseconds }, ..Meta::default() }.mtime_text();
        assert_eq!(text(0, 5), "1970-01-01T00:00:00.000000005Z");
        assert_eq!(text(-1, 500_000_000), "1969-12-31T23:59:59.5Z");
        assert_eq!(text(i64::MAX, 0), "@9223372036854775807.000000000");
    }
}
