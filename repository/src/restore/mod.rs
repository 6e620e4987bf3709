//! Restores: a snapshot becomes files again, in a directory and never outside of it.
//!
//! A repository may be hostile: names are checked when a manifest is decoded, and every call goes through a descriptor
//! below the target without following links. `select` chooses entries, `plan` gathers chunks, `write` writes what
//! arrives, `runs` large files past the page cache, `create` makes what is no file, `attributes` applies ownership, modes and times. What cannot be restored
//! is counted and listed, never left out silently.

mod attributes;
mod create;
mod image;
mod plan;
mod runs;
mod select;
mod target;
#[cfg(test)]
mod tests;
mod verb;
mod write;

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::error::{Classified, ErrorClass};
use crate::manifest::ManifestError;
use crate::read::ReadError;
use crate::session::SessionError;
use crate::snapshot::Counts;

pub use image::{ImageRestored, image};
pub(crate) use select::Selection;
pub use verb::tree;

/// What to do where something lies already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the entry is listed as failed. Directories are shared.
    #[default]
    Fail,
    /// It is removed first, unless it is a directory. Directories are shared.
    Overwrite,
}

/// How a snapshot is restored.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Paths from the root of the tree, with all that lies below; `*`, `?`, `[a-z]` within a name, `**` across names.
    /// Empty: everything.
    pub select: Vec<String>,
    /// What to do where something lies already.
    pub existing: Existing,
    /// Whether zeros of files that were sparse are left out.
    pub sparse: bool,
    /// Whether owners are restored. If not, set-id bits are left out as well: they would speak for another owner.
    pub owner: bool,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { select: Vec::new(), existing: Existing::Fail, sparse: true, owner: true }
    }
}

/// What a restore did.
#[derive(Debug, Clone, Default)]
pub struct RestoreReport {
    /// What was restored; `skipped` counts the list of failures.
    pub counts: Counts,
    /// What could not be restored in full.
    pub failed: Vec<Failed>,
}

/// An entry that could not be restored in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// Its path in the snapshot.
    pub path: Vec<u8>,
    /// What could not be done.
    pub what: What,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.reason)
    }
}

/// A step of restoring an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What {
    /// Making it at all; it is not there.
    Create,
    /// Its content; it is not there.
    Content,
    /// Making it another name of a file; it is not there.
    Link,
    /// Owner and group.
    Owner,
    /// Permissions.
    Mode,
    /// An extended attribute, an access control list or a capability.
    Attribute,
    /// Time of the last change.
    Time,
}

impl What {
    /// Whether the entry is missing altogether.
    pub fn is_missing(self) -> bool {
        matches!(self, Self::Create | Self::Content | Self::Link)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "not created",
            Self::Content => "content not restored",
            Self::Link => "not linked",
            Self::Owner => "owner not restored",
            Self::Mode => "permissions not restored",
            Self::Attribute => "extended attribute not restored",
            Self::Time => "time not restored",
        })
    }
}

/// Why a restore ended early.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The target cannot be opened.
    #[error("cannot open {}", path.display())]
    OpenTarget {
        /// The target.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The snapshot has no files.
    #[error("the snapshot is a recovery point, not a tree")]
    NotATree,
    /// The snapshot has no image of a device.
    #[error("the snapshot is not the image of a block device")]
    NotAnImage,
    /// The device is smaller than the image.
    #[error("the target has {room} bytes, the image {size}")]
    TooSmall {
        /// The image's size.
        size: u64,
        /// The target's size.
        room: u64,
    },
    /// A device or image cannot be written.
    #[error("cannot write the image at byte {offset}")]
    WriteImage {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The manifest cannot be read.
    #[error("cannot read the snapshot")]
    Manifest(#[from] ManifestError),
    /// Content cannot be read, and the reason is not that it is damaged.
    #[error("cannot read the repository")]
    Read(#[from] ReadError),
    /// The restore cannot register as a reader, so that expiry would not know of it.
    #[error("cannot register the restore")]
    Pin(#[from] SessionError),
    /// No entry is what was chosen.
    #[error("the snapshot has nothing that fits {}", select.join(", "))]
    NothingSelected {
        /// The patterns.
        select: Vec<String>,
    },
    /// The target is full.
    #[error("no room left for {path}")]
    Full {
        /// The path that was written.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The target's file system cannot keep what was written.
    #[error("the target cannot be flushed to its disk")]
    Flush(#[source] io::Error),
    /// A worker ended unexpectedly.
    #[error("a worker of the restore failed")]
    Worker(#[from] tokio::task::JoinError),
    /// Someone asked to stop; the target holds a part.
    #[error("the restore was cancelled")]
    Cancelled,
}

impl Classified for RestoreError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::OpenTarget { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorClass::NotFound,
            Self::OpenTarget { .. } | Self::Flush(_) | Self::Worker(_) | Self::Cancelled | Self::Full { .. } => {
                ErrorClass::Local
            }
            Self::WriteImage { .. } => ErrorClass::Local,
            Self::NotATree | Self::NotAnImage | Self::TooSmall { .. } | Self::NothingSelected { .. } => {
                ErrorClass::Invalid
            }
            Self::Manifest(error) => error.class(),
            Self::Read(error) => error.class(),
            Self::Pin(error) => error.class(),
        }
    }
}
