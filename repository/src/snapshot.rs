//! Snapshots: what a committed session says about the state that it saved.
//!
//! Plain data and its sealed form; this module touches no store.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{ChunkRef, SessionId, SnapshotId};

/// A committed snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub id: SnapshotId,
    /// The session that committed it.
    pub session: SessionId,
    /// When the state was saved.
    pub time: Timestamp,
    /// What it is a state of: the same for all snapshots of one directory, volume or application.
    pub lineage: String,
    /// Free labels.
    pub tags: BTreeMap<String, String>,
    /// The machine that wrote it.
    pub host: String,
    /// The snapshot that it was compared with.
    pub parent: Option<SnapshotId>,
    /// Where the content lies.
    pub content: Content,
    /// What it contains.
    pub counts: Counts,
    /// What making it took.
    pub stats: WriteStats,
}

/// A snapshot that is to be committed: a [`Snapshot`] without the session's part.
#[derive(Debug, Clone, PartialEq)]
pub struct NewSnapshot {
    /// Its name; random.
    pub id: SnapshotId,
    /// When the state was saved.
    pub time: Timestamp,
    /// What it is a state of.
    pub lineage: String,
    /// Free labels.
    pub tags: BTreeMap<String, String>,
    /// The machine that wrote it; the session's host when empty.
    pub host: String,
    /// The snapshot that it was compared with.
    pub parent: Option<SnapshotId>,
    /// Where the content lies.
    pub content: Content,
    /// What it contains.
    pub counts: Counts,
    /// What making it took.
    pub stats: WriteStats,
}

impl NewSnapshot {
    /// What it becomes when the session commits it.
    pub(crate) fn commit(self, session: SessionId, host: &str) -> Snapshot {
        Snapshot {
            id: self.id,
            session,
            time: self.time,
            lineage: self.lineage,
            tags: self.tags,
            host: if self.host.is_empty() { host.to_owned() } else { self.host },
            parent: self.parent,
            content: self.content,
            counts: self.counts,
            stats: self.stats,
        }
    }
}

/// The name of this machine, as the kernel gives it.
pub(crate) fn this_host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The content of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Content {
    /// A file tree.
    Tree {
        /// The chunks that hold the list of manifest pages.
        root: Vec<ChunkRef>,
        /// The chunks that hold the list of skipped files; empty when there are none.
        #[serde(default)]
        skipped: Vec<ChunkRef>,
    },
    /// Several snapshots that belong together.
    RecoveryPoint {
        /// The snapshots.
        members: Vec<SnapshotId>,
        /// What they are, for those who made it.
        description: serde_json::Value,
    },
}

/// What a snapshot contains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links, devices, sockets, pipes.
    pub others: u64,
    /// Plain bytes of all files.
    pub bytes: u64,
    /// Entries that could not be read.
    pub skipped: u64,
}

/// What making a snapshot took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteStats {
    /// Bytes read from the source.
    pub read_bytes: u64,
    /// Plain bytes that the repository lacked.
    pub new_bytes: u64,
    /// Bytes that they take in packs.
    pub stored_bytes: u64,
    /// Wall-clock time in milliseconds.
    pub duration_ms: u64,
}
