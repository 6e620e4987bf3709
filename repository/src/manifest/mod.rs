//! File manifests: what a tree contains, in path order, in pages that are chunks.
//!
//! `FORMAT-files.md` says every byte. Encoding never fails; decoding trusts nothing: sizes are capped before anything
//! is allocated, names and orders are checked, and no bytes make it panic. Nothing here touches a file system.

mod entry;
mod fields;
mod page;
mod pieces;
mod reader;
mod root;
mod skipped;
mod writer;

use thiserror::Error;

pub use entry::{
    Contents, Entry, Kind, MAX_PATH_BYTES, Meta, PAGE_BYTES, PAGE_HASH_BYTES, Piece, Regular, Time, Xattr,
    compare_paths, is_valid_path, page_map_len,
};
pub(crate) use entry::{is_in, split_path};
pub use page::{MAX_PAGE_BYTES, decode_page, encode_page};
pub(crate) use pieces::PieceListWriter;
pub use pieces::{decode_pieces, encode_pieces};
pub(crate) use reader::pieces;
pub use reader::{Manifest, ManifestError};
pub use root::{PageRef, decode_root, encode_root};
pub use skipped::{Reason, Skipped, decode_skipped, encode_skipped};
pub(crate) use skipped::{read_skipped, write_skipped};
pub use writer::ManifestWriter;

/// Bytes that are no page, list or record of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{what} at byte {at}")]
pub struct FormatError {
    /// What does not fit.
    pub what: &'static str,
    /// Offset in the bytes of the record, or of its column.
    pub at: usize,
}
