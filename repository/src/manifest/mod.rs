//! File manifests: a flat, sorted stream of entries in pages that are chunks.
//!
//! `entry` is what is known of one file, `page` its columnar form, `root` the list of pages, `writer` cuts pages,
//! `reader` reads them back. Unchanged pages are the same chunks, so an unchanged tree costs next to nothing.

mod columns;
pub mod entry;
mod page;
mod reader;
mod root;
mod writer;

use std::cmp::Ordering;

use thiserror::Error;

pub use entry::{Entry, Extent, Kind, Meta, Times, Xattr, split_last as split_path};
pub use reader::{EntryPages, ManifestError, Pages};
pub(crate) use writer::ManifestWriter;

pub use page::{decode_page, encode_page};
pub use root::{PageInfo, decode_root};

/// Bytes that are not a page or a page list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PageError {
    /// The fixed fields do not fit.
    #[error("malformed manifest: {0}")]
    Wire(#[from] crate::wire::WireError),
    /// An entry is not what a writer writes.
    #[error("malformed manifest entry {number}: {what}")]
    Entry {
        /// Number of the entry in its page.
        number: usize,
        /// What does not fit.
        what: &'static str,
    },
}

/// Compares paths so that everything in a directory follows it at once: `/` sorts before every other byte.
pub fn compare_paths(left: &[u8], right: &[u8]) -> Ordering {
    let rank = |byte: &u8| if *byte == b'/' { 0 } else { u16::from(*byte) + 1 };
    left.iter().map(rank).cmp(right.iter().map(rank))
}

/// Whether `path` is `directory` or lies in it. The empty directory is the root.
pub fn is_within(path: &[u8], directory: &[u8]) -> bool {
    directory.is_empty() || path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_contiguous() {
        let mut paths: Vec<&[u8]> = vec![b"a-b", b"a", b"a/b", b"a/b/c", b"a/b-c", b"b", b"", b"a\x01"];
        paths.sort_by(|l, r| compare_paths(l, r));
        assert_eq!(paths, [&b""[..], b"a", b"a/b", b"a/b/c", b"a/b-c", b"a\x01", b"a-b", b"b"]);
        assert!(is_within(b"a/b", b"a") && is_within(b"a", b"a") && !is_within(b"ab", b"a") && is_within(b"x", b""));
    }
}
