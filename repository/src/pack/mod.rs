//! Packs: many frames, a sealed directory of them, and a trailer that anyone may check.
//!
//! `layout` says where things lie, `builder` makes packs, `directory` opens them, `experience` says whether
//! compression is worth a try. Nothing here reads a store.

mod builder;
mod directory;
mod experience;
mod frame;
mod layout;
mod squeeze;

pub(crate) use builder::PackBuilder;
pub(crate) use directory::{Directory, SlotEntry};
pub(crate) use experience::Experience;
pub(crate) use frame::{Expected, FRAME_ROOM, FrameError, SealedFrame, open_frame, seal_frame};
pub(crate) use layout::{
    DirectorySpan, MAX_PACK_BYTES, PACKS_PREFIX, PackKind, TARGET_PACK_BYTES, TRAILER_BYTES, pack_key, parse_header,
    parse_pack_key, verify_checksum,
};
pub use squeeze::Compression;
