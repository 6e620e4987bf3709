//! Backups: a live tree, entries from memory, or a stream of bytes become a committed snapshot.
//!
//! `compare` walks and tells what changed since the parent, `read` turns changed files into chunks, `assemble` brings
//! everything back into path order and bundles small files, `tree`, `entries` and `stream` are the verbs. A verb that fails or
//! is cancelled aborts its session: nothing half is visible.

mod assemble;
mod compare;
mod entries;
pub mod image;
mod inherit;
mod open;
#[cfg(test)]
mod page_tests;
mod pages;
mod parent;
mod read;
mod store;
mod stream;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::config::ConfigError;
use crate::error::{Classified, ErrorClass};
use crate::manifest::ManifestError;
pub use crate::manifest::{Reason, Skipped};
use crate::repository::FindError;
use crate::session::{Compression, SessionError, SessionOptions};
use crate::snapshot::Snapshot;

pub use entries::{VirtualFile, entries, entries_in, recovery_point};
pub use stream::stream_in;
pub use tree::{tree, tree_in};

/// How a backup is made.
#[derive(Debug, Clone, Default)]
pub struct TreeBackup {
    /// What the snapshot is a state of.
    pub lineage: String,
    /// Free labels.
    pub tags: BTreeMap<String, String>,
    /// What it is compared with; files that did not change are not read. `None`: everything is read.
    pub parent: Option<Snapshot>,
    /// Patterns of paths to leave out. Without a slash a name at any depth, else a path from the root; `*`, `?`,
    /// `[a-z]` within a name, `**` across names.
    pub excludes: Vec<String>,
    /// Whether to leave out what lies on other file systems.
    pub one_file_system: bool,
    /// The machine; the kernel's host name when empty.
    pub host: String,
    /// How hard data is compressed.
    pub compression: Compression,
}

impl TreeBackup {
    /// The session that it is made in.
    fn session_options(&self) -> SessionOptions {
        SessionOptions { purpose: "backup".to_owned(), host: self.host.clone(), compression: self.compression }
    }
}

/// What a backup made.
#[derive(Debug, Clone)]
pub struct BackupReport {
    /// The committed snapshot.
    pub snapshot: Snapshot,
    /// What is not in it as it was in the tree.
    pub skipped: Vec<Skipped>,
}

/// Why there is no snapshot.
#[derive(Debug, Error)]
pub enum BackupError {
    /// The root of the tree cannot be opened.
    #[error("cannot open {}", path.display())]
    OpenRoot {
        /// The root.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The parent's manifest cannot be read, and the reason is not that it is damaged.
    #[error("cannot read the parent snapshot")]
    ReadParent(#[source] ManifestError),
    /// The parent has no files.
    #[error("the parent is a recovery point, not a tree")]
    ParentIsNoTree,
    /// The repository's way of cutting files is not known.
    #[error("cannot cut files as the repository wants it")]
    Chunker(#[from] ConfigError),
    /// The session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A worker ended unexpectedly.
    #[error("a worker of the backup failed")]
    Worker(#[source] tokio::task::JoinError),
    /// The entries that were to be stored do not come.
    #[error("the entries to back up end with an error")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An entry's path leads elsewhere or comes too late.
    #[error("the entry {path:?} cannot be stored: {what}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A member of a recovery point does not exist.
    #[error("cannot find the members of the recovery point")]
    Members(#[source] FindError),
    /// A device or image cannot be read.
    #[error("cannot read the image at byte {offset}")]
    ReadImage {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// Someone asked to stop.
    #[error("the backup was cancelled")]
    Cancelled,
}

impl Classified for BackupError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::OpenRoot { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorClass::NotFound,
            Self::OpenRoot { .. } | Self::ReadImage { .. } | Self::Worker(_) | Self::Source(_) | Self::Cancelled => {
                ErrorClass::Local
            }
            Self::ReadParent(error) => error.class(),
            Self::Session(error) => error.class(),
            Self::Members(error) => error.class(),
            Self::ParentIsNoTree | Self::Path { .. } | Self::Chunker(_) => ErrorClass::Invalid,
        }
    }
}
