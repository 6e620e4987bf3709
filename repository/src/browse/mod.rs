//! Browsing: any entry of a snapshot and any range of a file at any time, as a mounted file system asks for them.
//!
//! `tree` finds entries, `file` finds bytes, `memory` keeps what was read within a fixed number of bytes. An entry is known
//! by its place in the manifest, so that nothing has to be remembered for those who hold on to one.

mod file;
mod memory;
#[cfg(test)]
mod tests;
mod tree;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub use file::{FileReader, ListStarts};
use memory::Memory;
pub use tree::{Cursor, Found, Listing, Position, Tree};

use crate::read::ReadError;
use crate::repository::Repository;
use crate::sink::{ChunkRef, ChunkSource};
use crate::snapshot::{Content, Snapshot};
use crate::tree::TreeError;

/// Looks into any number of snapshots. All of them share at most about 80 MiB: pages, lists, chunks, and what is in flight.
pub struct Browser {
    memory: Memory,
    trees: AtomicU32,
}

impl Repository {
    /// Looks into snapshots of this repository. Needs a key that reads data.
    pub fn browse(&self) -> Result<Arc<Browser>, ReadError> {
        let reader = self.reader()?;
        if reader.can_read_data() { Ok(Browser::new(reader)) } else { Err(ReadError::NoPrivateKey) }
    }
}

impl Browser {
    pub(crate) fn new(source: Arc<dyn ChunkSource>) -> Arc<Self> {
        Arc::new(Self { memory: Memory::new(source), trees: AtomicU32::new(0) })
    }

    /// The tree of a snapshot; nothing is read before it is asked for.
    pub fn tree(self: &Arc<Self>, snapshot: &Snapshot) -> Result<Tree, TreeError> {
        match &snapshot.content {
            Content::Tree { root, .. } => Ok(self.tree_at(root.clone())),
            Content::RecoveryPoint { .. } => Err(TreeError::NotATree),
        }
    }

    pub(crate) fn tree_at(self: &Arc<Self>, root: Vec<ChunkRef>) -> Tree {
        Tree::new(Arc::clone(self), self.trees.fetch_add(1, Ordering::Relaxed), root)
    }
}
