//! What differs between two snapshots: a merge-join of their manifests in path order.
//!
//! Pages that both have are not read, so two snapshots of a large tree cost what lies between them. Content is the
//! same if the pieces are; where they differ at the same length (small files move between bundles) the bytes decide.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};

use crate::manifest::{Entry, Kind, Manifest, ManifestError, Piece, Regular, compare_paths};
use crate::read::Reader;
use crate::repository::Repository;
use crate::snapshot::Snapshot;
use crate::tree::{self, TreeError};

/// One path that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// Only the later snapshot has it.
    Added(Entry),
    /// Only the earlier snapshot has it.
    Removed(Entry),
    /// Both have it, and not the same.
    Modified {
        /// As it was.
        before: Box<Entry>,
        /// As it is.
        after: Box<Entry>,
        /// In what it differs; never empty.
        aspects: Vec<Aspect>,
    },
}

/// In what two entries of one path differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aspect {
    /// What it is: a file, a directory, a link.
    Type,
    /// Bytes of a file, target of a link, number of a device.
    Content,
    /// Permissions.
    Mode,
    /// Owner or group.
    Owner,
    /// Time of the last change.
    Time,
    /// Extended attributes, access control lists, capabilities.
    Attributes,
}

impl Aspect {
    /// A word for people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Type => "type",
            Self::Content => "content",
            Self::Mode => "mode",
            Self::Owner => "owner",
            Self::Time => "time",
            Self::Attributes => "attributes",
        }
    }
}

/// All differences, in path order.
///
/// Without the private key, files of the same length whose pieces differ count as changed.
pub async fn diff(
    repository: &Repository,
    before: &Snapshot,
    after: &Snapshot,
) -> Result<BoxStream<'static, Result<Difference, TreeError>>, TreeError> {
    let join = Join {
        reader: repository.reader()?,
        before: Cursor::new(tree::manifest(repository, before).await?),
        after: Cursor::new(tree::manifest(repository, after).await?),
    };
    let next = |mut join: Join| async move { Ok(join.next().await?.map(|difference| (difference, join))) };
    Ok(stream::try_unfold(join, next).boxed())
}

/// A place in a manifest.
struct Cursor {
    manifest: Manifest,
    next_page: usize,
    entries: std::vec::IntoIter<Entry>,
    head: Option<Entry>,
}

impl Cursor {
    fn new(manifest: Manifest) -> Self {
        Self { manifest, next_page: 0, entries: Vec::new().into_iter(), head: None }
    }

    /// The page that comes next, if all before it was taken.
    fn at_page(&self) -> Option<crate::id::ChunkId> {
        let is_between = self.head.is_none() && self.entries.len() == 0;
        self.manifest.pages().get(self.next_page).filter(|_| is_between).map(|page| page.chunk.id)
    }

    /// Makes the next entry, if there is one, the head.
    async fn fill(&mut self) -> Result<(), ManifestError> {
        while self.head.is_none() {
            self.head = self.entries.next();
            if self.head.is_none() {
                if self.next_page >= self.manifest.pages().len() {
                    return Ok(());
                }
                self.entries = self.manifest.page(self.next_page).await?.into_iter();
                self.next_page += 1;
            }
        }
        Ok(())
    }
}

struct Join {
    reader: Arc<Reader>,
    before: Cursor,
    after: Cursor,
}

impl Join {
    async fn next(&mut self) -> Result<Option<Difference>, TreeError> {
        loop {
            while self.before.at_page().is_some() && self.before.at_page() == self.after.at_page() {
                self.before.next_page += 1;
                self.after.next_page += 1;
            }
            self.before.fill().await?;
            self.after.fill().await?;
            let order = match (&self.before.head, &self.after.head) {
                (None, None) => return Ok(None),
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(before), Some(after)) => compare_paths(&before.path, &after.path),
            };
            let before = if order.is_le() { self.before.head.take() } else { None };
            let after = if order.is_ge() { self.after.head.take() } else { None };
            match (before, after) {
                (Some(before), Some(after)) => {
                    let aspects = self.aspects(&before, &after).await?;
                    if !aspects.is_empty() {
                        return Ok(Some(Difference::Modified {
                            before: Box::new(before),
                            after: Box::new(after),
                            aspects,
                        }));
                    }
                }
                (Some(before), None) => return Ok(Some(Difference::Removed(before))),
                (None, after) => return Ok(after.map(Difference::Added)),
            }
        }
    }

    async fn aspects(&self, before: &Entry, after: &Entry) -> Result<Vec<Aspect>, TreeError> {
        if std::mem::discriminant(&before.kind) != std::mem::discriminant(&after.kind) {
            return Ok(vec![Aspect::Type]);
        }
        let is_same = match (&before.kind, &after.kind) {
            (Kind::Regular(before), Kind::Regular(after)) => self.is_same_content(before, after).await?,
            (before, after) => before == after,
        };
        let (one, other) = (&before.meta, &after.meta);
        Ok([
            (!is_same, Aspect::Content),
            (one.mode != other.mode, Aspect::Mode),
            ((one.uid, one.gid) != (other.uid, other.gid), Aspect::Owner),
            (one.mtime != other.mtime, Aspect::Time),
            (one.xattrs != other.xattrs, Aspect::Attributes),
        ]
        .into_iter()
        .filter_map(|(differs, aspect)| differs.then_some(aspect))
        .collect())
    }

    async fn is_same_content(&self, before: &Regular, after: &Regular) -> Result<bool, TreeError> {
        if before.size != after.size {
            return Ok(false);
        }
        if self.has_same_pieces(before, after).await? {
            return Ok(true);
        }
        if !self.reader.can_read_data() {
            return Ok(false);
        }
        let one = tree::read_pieces(self.reader.clone(), &self.before.manifest, before);
        let other = tree::read_pieces(self.reader.clone(), &self.after.manifest, after);
        is_same_stream(one, other).await
    }

    async fn has_same_pieces(&self, before: &Regular, after: &Regular) -> Result<bool, ManifestError> {
        let flat = |manifest: &Manifest, file| {
            let lists = manifest.pieces(file);
            lists.map_ok(|list| stream::iter(list.into_iter().map(Ok::<_, ManifestError>))).try_flatten().boxed()
        };
        let (mut one, mut other) = (flat(&self.before.manifest, before), flat(&self.after.manifest, after));
        loop {
            match (one.try_next().await?, other.try_next().await?) {
                (None, None) => return Ok(true),
                (Some(one), Some(other)) if is_same_piece(&one, &other) => {}
                _ => return Ok(false),
            }
        }
    }
}

/// Whether two pieces have the same bytes by their ids, wherever these lie.
fn is_same_piece(one: &Piece, other: &Piece) -> bool {
    match (one, other) {
        (
            Piece::Data { chunk, offset, len },
            Piece::Data { chunk: other_chunk, offset: other_offset, len: other_len },
        ) => (chunk.id, offset, len) == (other_chunk.id, other_offset, other_len),
        (one, other) => one == other,
    }
}

async fn is_same_stream(
    mut one: BoxStream<'static, Result<Bytes, TreeError>>,
    mut other: BoxStream<'static, Result<Bytes, TreeError>>,
) -> Result<bool, TreeError> {
    let (mut left, mut right) = (Bytes::new(), Bytes::new());
    loop {
        if left.is_empty() {
            left = one.try_next().await?.unwrap_or_default();
        }
        if right.is_empty() {
            right = other.try_next().await?.unwrap_or_default();
        }
        let len = left.len().min(right.len());
        if len == 0 {
            // Pieces are never empty: a stream that gives nothing has ended.
            return Ok(left.is_empty() && right.is_empty());
        }
        if left.split_to(len) != right.split_to(len) {
            return Ok(false);
        }
    }
}
