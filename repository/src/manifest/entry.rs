//! What is known of one file, directory or other entry.

use crate::id::ChunkRef;

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path from the root, without a leading slash; empty for the root itself. Any bytes but NUL.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Owner, mode, times, attributes.
    pub meta: Meta,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Its length in bytes, holes included.
        size: u64,
        /// Where its data lies, in order; what no extent covers is a hole.
        extents: Vec<Extent>,
    },
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: Vec<u8>,
    },
    /// Another name of a file that comes earlier.
    HardLink {
        /// The path of that file.
        to: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major and minor number, as the kernel packs them.
        device: u64,
    },
    /// A block device.
    BlockDevice {
        /// Major and minor number, as the kernel packs them.
        device: u64,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A piece of a file's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it lies in the file.
    pub offset: u64,
    /// The chunk that holds it.
    pub chunk: ChunkRef,
    /// Where it begins in the chunk: not 0 in a bundle of small files.
    pub from: u32,
    /// Its length in bytes.
    pub len: u32,
}

/// Owner, mode, times, attributes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Times.
    pub times: Times,
    /// Inode number: a part of the key by which a change is found.
    pub inode: u64,
    /// Extended attributes, ACLs and capabilities among them, sorted by name.
    pub xattrs: Vec<Xattr>,
}

/// Times of an entry: seconds since 1970 and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// When the content changed.
    pub mtime: (i64, u32),
    /// When anything changed; not restored, a part of the key by which a change is found.
    ///
    /// (0, 0) when the entry changed so shortly before it was read that the next backup must look again.
    pub ctime: (i64, u32),
}

/// One extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Its name with the name space.
    pub name: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

impl Kind {
    /// What it is, in a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Directory => "directory",
            Self::Symlink { .. } => "symlink",
            Self::HardLink { .. } => "hardlink",
            Self::CharDevice { .. } => "chardev",
            Self::BlockDevice { .. } => "blockdev",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
        }
    }
}

impl Entry {
    /// Length in bytes of a regular file; else 0.
    pub fn size(&self) -> u64 {
        if let Kind::File { size, .. } = self.kind { size } else { 0 }
    }

    /// The last component of the path; empty for the root.
    pub fn file_name(&self) -> &[u8] {
        split_last(&self.path).1
    }
}

/// The directory of a path and the last component.
pub fn split_last(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// Whether a path is one that a walk can have found: no empty, `.` or `..` component, no NUL, not absolute.
pub fn is_valid_path(path: &[u8]) -> bool {
    path.is_empty()
        || path
            .split(|byte| *byte == b'/')
            .all(|part| !part.is_empty() && part != b"." && part != b".." && part.len() <= 255 && !part.contains(&0))
}

impl Meta {
    /// The modification time as people read it, in UTC.
    pub fn mtime_text(&self) -> String {
        let (seconds, nanos) = self.times.mtime;
        match jiff::Timestamp::new(seconds, i32::try_from(nanos).unwrap_or(0)) {
            Ok(time) => format!("{time:.0}"),
            Err(_) => format!("@{seconds}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_paths_are_known() {
        for path in [&b"/etc"[..], b"..", b"a/../b", b"a//b", b"a/", b".", b"a/\0", &[b'x'; 256]] {
            assert!(!is_valid_path(path), "{path:?}");
        }
        for path in [&b""[..], b"a", b"a/b", b"...", b"a\xff/\n", &[b'x'; 255]] {
            assert!(is_valid_path(path), "{path:?}");
        }
    }
}
