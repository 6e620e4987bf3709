//! The copy of one tree, entry by entry, into a session of the target.
//!
//! A merge-join with a base that both repositories have: a file that is the same in it takes the base's chunks at the
//! target, unread. Of any other file each chunk is looked up, and read only if the target lacks it.

use std::collections::HashMap;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};

use super::ReplicateError;
use crate::id::ChunkId;
use crate::manifest::{
    Contents, Entry, Kind, Manifest, ManifestError, ManifestWriter, Piece, PieceListWriter, Regular, compare_paths,
    read_skipped, write_skipped,
};
use crate::progress::Progress;
use crate::read::{ReadError, Reader};
use crate::repository::Repository;
use crate::session::Session;
use crate::sink::{ChunkKind, ChunkRef, ChunkSink, ChunkSource};
use crate::snapshot::{Content, Snapshot};

/// Chunks of a file that are copied at once.
const PARALLEL_CHUNKS: usize = 4;
/// Chunks remembered, because files that are bundled share them.
const REMEMBERED: usize = 1 << 16;

/// Copies the tree; its content at the target, and the plain bytes that were read.
pub(super) async fn tree(
    source: &Repository,
    target: &Repository,
    session: &Arc<Session>,
    (root, skipped): (&[ChunkRef], &[ChunkRef]),
    base: Option<(&Snapshot, &Snapshot)>,
    progress: &Progress,
) -> Result<(Content, u64), ReplicateError> {
    let reader = source.reader()?;
    let manifest = Manifest::open(reader.clone(), root).await?;
    let base = match base.map(|(base, replica)| (&base.content, &replica.content)) {
        Some((Content::Tree { root: base, .. }, Content::Tree { root: replica, .. })) => {
            Some(Base::open(source, target, base, replica).await?)
        }
        _ => None,
    };
    let has_same_ids = source.engine.keys.domain().id == target.engine.keys.domain().id;
    let mut copy = Copy {
        reader,
        session: Arc::clone(session),
        manifest,
        base,
        has_same_ids,
        known: HashMap::new(),
        read_bytes: 0,
    };
    let mut writer = ManifestWriter::new(session.clone());
    let mut pages = copy.manifest.read(0..copy.manifest.pages().len());
    while let Some(entries) = pages.try_next().await? {
        for entry in entries {
            progress.set_current(&entry.path);
            let size = if let Kind::Regular(file) = &entry.kind { file.size } else { 0 };
            writer.push(copy.entry(entry).await?).await?;
            progress.add_bytes(size);
        }
    }
    let skipped = read_skipped(&*copy.reader, skipped).await?;
    let skipped = write_skipped(&**session, &skipped).await?;
    Ok((Content::Tree { root: writer.finish().await?, skipped }, copy.read_bytes))
}

struct Copy {
    reader: Arc<Reader>,
    session: Arc<Session>,
    manifest: Manifest,
    base: Option<Base>,
    has_same_ids: bool,
    /// Chunks of this session by their id at the source.
    known: HashMap<ChunkId, ChunkRef>,
    read_bytes: u64,
}

impl Copy {
    async fn entry(&mut self, entry: Entry) -> Result<Entry, ReplicateError> {
        let Kind::Regular(file) = entry.kind else { return Ok(entry) };
        let mut known = None;
        if let Some(base) = &mut self.base
            && let Some((before, replica)) = base.find(&entry.path).await?
            && before.contents == file.contents
            && before.page_map == file.page_map
            && before.size == file.size
            && base.inherit(&replica, &self.session).await?
            && base.inherit(&replica.page_map_as_file(), &self.session).await?
        {
            known = Some((replica.contents, replica.page_map));
        }
        let (contents, page_map) = match known {
            Some(known) => known,
            None => (self.contents(&file, None).await?, self.page_map(&file).await?),
        };
        Ok(Entry { kind: Kind::Regular(Regular { contents, page_map, ..file }), ..entry })
    }

    /// The page map, if its hashes say anything at the target: they are made under a key.
    async fn page_map(&mut self, file: &Regular) -> Result<Contents, ReplicateError> {
        if file.page_map.is_empty() || !self.has_same_ids {
            return Ok(Contents::default());
        }
        self.contents(&file.page_map_as_file(), Some(ChunkKind::Manifest)).await
    }

    /// Copies the pieces of a file, with chunks of this kind; `None`: of data.
    async fn contents(&mut self, file: &Regular, kind: Option<ChunkKind>) -> Result<Contents, ReplicateError> {
        let mut writer = PieceListWriter::new(self.session.clone());
        let mut lists = self.manifest.pieces(file);
        while let Some(pieces) = lists.try_next().await? {
            self.copy_chunks(&pieces, kind).await?;
            for piece in pieces {
                let piece = match piece {
                    Piece::Data { chunk, offset, len } => {
                        let missing = ReadError::Missing { id: chunk.id, place: chunk.place };
                        let chunk = *self.known.get(&chunk.id).ok_or(missing)?;
                        Piece::Data { chunk, offset, len }
                    }
                    hole @ Piece::Hole { .. } => hole,
                };
                writer.push(piece).await?;
            }
        }
        Ok(writer.finish().await?)
    }

    /// Sees to it that the target has the chunks of these pieces, and that they are known.
    async fn copy_chunks(&mut self, pieces: &[Piece], kind: Option<ChunkKind>) -> Result<(), ReplicateError> {
        if self.known.len() > REMEMBERED {
            self.known.clear();
        }
        let mut wanted = HashMap::new();
        for piece in pieces {
            if let Piece::Data { chunk, .. } = piece
                && !self.known.contains_key(&chunk.id)
            {
                let is_whole = *piece == Piece::whole(*chunk);
                let of_data = if is_whole { ChunkKind::Data } else { ChunkKind::Bundle };
                wanted.entry(chunk.id).or_insert((*chunk, kind.unwrap_or(of_data)));
            }
        }
        let (reader, session, has_same_ids) = (&self.reader, &self.session, self.has_same_ids);
        let copies: Vec<_> = stream::iter(wanted.into_values())
            .map(|(chunk, kind)| async move {
                let (copy, read) = copy_chunk(reader, session, has_same_ids, &chunk, kind).await?;
                Ok::<_, ReplicateError>((chunk.id, copy, read))
            })
            .buffer_unordered(PARALLEL_CHUNKS)
            .try_collect()
            .await?;
        for (id, copy, read) in copies {
            self.read_bytes += read;
            self.known.insert(id, copy);
        }
        Ok(())
    }
}

/// The chunk at the target, and the bytes that were read for it.
async fn copy_chunk(
    reader: &Reader,
    session: &Session,
    has_same_ids: bool,
    chunk: &ChunkRef,
    kind: ChunkKind,
) -> Result<(ChunkRef, u64), ReplicateError> {
    if has_same_ids && let Some(known) = session.refer_to_known(chunk.id, chunk.len).await? {
        return Ok((known, 0));
    }
    let plain = reader.get(chunk).await?;
    let read = plain.len() as u64;
    let put = session.put(kind, session.chunk_id(&plain), plain).await?;
    Ok((put.chunk, read))
}

/// A tree that both have, walked on both sides at once: a replica has the entries of its original in their order.
struct Base {
    before: Side,
    replica: Side,
    source_of_lists: Arc<Reader>,
}

struct Side {
    manifest: Manifest,
    next: usize,
    entries: std::vec::IntoIter<Entry>,
    head: Option<Entry>,
}

impl Side {
    async fn open(repository: &Repository, root: &[ChunkRef]) -> Result<Self, ReplicateError> {
        let manifest = Manifest::open(repository.reader()?, root).await?;
        Ok(Self { manifest, next: 0, entries: Vec::new().into_iter(), head: None })
    }

    /// The entry at this path. Paths must be asked for in their order.
    async fn find(&mut self, path: &[u8]) -> Result<Option<&Entry>, ManifestError> {
        loop {
            while self.head.is_none() {
                self.head = self.entries.next();
                if self.head.is_none() {
                    // Pages that end before the path are not read.
                    let pages = self.manifest.pages();
                    while pages.get(self.next + 1).is_some_and(|page| compare_paths(&page.first, path).is_le()) {
                        self.next += 1;
                    }
                    if self.next >= pages.len() {
                        return Ok(None);
                    }
                    self.entries = self.manifest.page(self.next).await?.into_iter();
                    self.next += 1;
                }
            }
            match self.head.as_ref().map(|head| compare_paths(&head.path, path)) {
                Some(std::cmp::Ordering::Less) => self.head = None,
                Some(std::cmp::Ordering::Equal) => return Ok(self.head.as_ref()),
                _ => return Ok(None),
            }
        }
    }
}

impl Base {
    async fn open(
        source: &Repository,
        target: &Repository,
        before: &[ChunkRef],
        replica: &[ChunkRef],
    ) -> Result<Self, ReplicateError> {
        Ok(Self {
            before: Side::open(source, before).await?,
            replica: Side::open(target, replica).await?,
            source_of_lists: target.reader()?,
        })
    }

    /// The file at this path before, and its replica.
    async fn find(&mut self, path: &[u8]) -> Result<Option<(Regular, Regular)>, ReplicateError> {
        let file = |entry: Option<&Entry>| match entry {
            Some(Entry { kind: Kind::Regular(file), .. }) => Some(file.clone()),
            _ => None,
        };
        let Some(before) = file(self.before.find(path).await?) else { return Ok(None) };
        Ok(file(self.replica.find(path).await?).map(|replica| (before, replica)))
    }

    /// Takes over all chunks of a replica's file; `false`: not all can be, so it has to be copied.
    async fn inherit(&self, file: &Regular, session: &Session) -> Result<bool, ReplicateError> {
        if let Contents::Listed(lists) = &file.contents
            && !lists.iter().all(|list| session.inherit(list))
        {
            return Ok(false);
        }
        let mut lists = crate::manifest::pieces(self.source_of_lists.clone(), file);
        while let Some(pieces) = lists.try_next().await? {
            for piece in pieces {
                if let Piece::Data { chunk, .. } = piece
                    && !session.inherit(&chunk)
                {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
