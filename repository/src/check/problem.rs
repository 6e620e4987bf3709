//! What can be wrong with a repository, and where.

use thiserror::Error;

use crate::id::{PackId, Place, SessionId, SnapshotId};

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Problem {
    /// An object is not what was written.
    #[error("{key}: {what}")]
    Object {
        /// Its key in the store.
        key: String,
        /// What is wrong with it.
        what: String,
    },
    /// A commit does not open.
    #[error("the commit of the session {session}: {what}")]
    Commit {
        /// The session.
        session: SessionId,
        /// What is wrong with it.
        what: String,
    },
    /// A commit that others saw is gone or is another one.
    #[error("the session {0} committed, and its commit is missing or was exchanged")]
    MissingCommit(SessionId),
    /// A snapshot's set of references is missing, damaged, or not the one committed.
    #[error("snapshot {snapshot}: its references (version {version}) {what}")]
    Refset {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Of its references, which repacking makes anew.
        version: u32,
        /// What is wrong with them.
        what: String,
    },
    /// A snapshot refers to a chunk that its set of references lacks: expiry would not keep it.
    #[error("snapshot {snapshot}: the chunk at {place} is not among its references")]
    Unreferenced {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The chunk's place.
        place: Place,
    },
    /// A snapshot's list of files cannot be read.
    #[error("snapshot {snapshot}: {what}")]
    Files {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Why.
        what: String,
    },
    /// A recovery point names a snapshot that does not exist.
    #[error("recovery point {snapshot}: its member {member} does not exist")]
    MissingMember {
        /// The recovery point.
        snapshot: SnapshotId,
        /// The missing snapshot.
        member: SnapshotId,
    },
    /// A pack is missing or damaged.
    #[error("pack {pack}: {what}")]
    Pack {
        /// The pack.
        pack: PackId,
        /// What is wrong.
        what: String,
    },
    /// A chunk in a pack is damaged or missing.
    #[error("pack {} slot {} at offset {offset}: {what}", place.pack, place.slot)]
    Chunk {
        /// Its place.
        place: Place,
        /// Byte offset in the pack; 0 when the slot does not exist.
        offset: u64,
        /// What is wrong.
        what: String,
    },
}
