//! The parent's entries beside those that are found now.

use std::sync::Arc;

use crate::manifest::{Entry, EntryPages, Kind, ManifestError, Pages, compare_paths};
use crate::repository::Repository;
use crate::sink::{ChunkSink, ChunkSource};
use crate::snapshot::{Content, Snapshot};

/// Walks the parent's manifest in step with the new one.
pub(super) struct Parent {
    entries: EntryPages,
}

impl Parent {
    /// The parent's entries; none without a parent, or when it is no tree.
    pub(super) async fn open(repository: &Repository, parent: Option<&Snapshot>) -> Result<Self, ManifestError> {
        let Some(Content::Tree { root, .. }) = parent.map(|parent| &parent.content) else {
            return Ok(Self { entries: EntryPages::empty() });
        };
        let source: Arc<dyn ChunkSource> = repository.reader()?;
        let pages = Pages::read(&source, root).await?;
        Ok(Self { entries: pages.entries(source) })
    }

    /// The parent's entry of this path. Paths must be asked for in order.
    pub(super) async fn find(&mut self, path: &[u8]) -> Result<Option<Entry>, ManifestError> {
        while let Some(entry) = self.entries.peek().await? {
            match compare_paths(&entry.path, path) {
                std::cmp::Ordering::Less => {
                    self.entries.next().await?;
                }
                std::cmp::Ordering::Equal => return self.entries.next().await,
                std::cmp::Ordering::Greater => return Ok(None),
            }
        }
        Ok(None)
    }
}

/// Whether nothing about the entry changed, by kind, size, times and inode. The device number is left out: clones change it.
pub(super) fn is_unchanged(old: &Entry, new: &Entry) -> bool {
    let (before, now) = (&old.meta, &new.meta);
    let same_kind = match (&old.kind, &new.kind) {
        (Kind::File { size: before, .. }, Kind::File { size: now, .. }) => before == now,
        (Kind::CharDevice { device: before }, Kind::CharDevice { device: now })
        | (Kind::BlockDevice { device: before }, Kind::BlockDevice { device: now }) => before == now,
        (Kind::Directory, Kind::Directory)
        | (Kind::Symlink { .. }, Kind::Symlink { .. })
        | (Kind::Fifo, Kind::Fifo)
        | (Kind::Socket, Kind::Socket) => true,
        _ => false,
    };
    same_kind
        && before.times == now.times
        && before.times.ctime != (0, 0)
        && before.inode == now.inode
        && (before.mode, before.uid, before.gid) == (now.mode, now.uid, now.gid)
}

/// Refers to all chunks of the parent's entry. `false`: one is condemned, read the file again.
pub(super) fn inherit(sink: &dyn ChunkSink, entry: &Entry) -> bool {
    let Kind::File { extents, .. } = &entry.kind else { return true };
    extents.iter().all(|extent| sink.inherit(&extent.chunk))
}
