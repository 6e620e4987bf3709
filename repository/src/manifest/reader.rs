//! Reads a manifest: the list of pages first, then only the pages that are wanted.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use thiserror::Error;

use super::FormatError;
use super::entry::{Contents, Entry, Kind, Piece, Regular, compare_paths};
use super::page::decode_page;
use super::pieces::{decode_pieces, total_len};
use super::root::{PageRef, decode_root};
use crate::error::{Classified, ErrorClass};
use crate::id::ChunkId;
use crate::read::ReadError;
use crate::sink::{ChunkRef, ChunkSource};

/// Lists of pieces that are read ahead.
const AHEAD: usize = 3;
/// Bytes of pages that are read together, most often by one request: pages lie side by side.
const TOGETHER_BYTES: u64 = 2 << 20;
/// Pages that are read together are read this many times ahead.
const GROUPS_AHEAD: usize = 2;

/// A manifest that cannot be read.
#[derive(Debug, Clone, Error)]
pub enum ManifestError {
    /// A chunk of it cannot be read.
    #[error("a part of the manifest cannot be read")]
    Read(#[from] ReadError),
    /// A chunk of it is no page, list or record.
    #[error("the chunk {chunk} of the manifest is damaged")]
    Damaged {
        /// The chunk.
        chunk: ChunkId,
        /// What does not fit.
        source: FormatError,
    },
}

impl Classified for ManifestError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Read(error) => error.class(),
            Self::Damaged { .. } => ErrorClass::Damaged,
        }
    }
}

/// A stored manifest, of which the list of pages is loaded.
#[derive(Clone)]
pub struct Manifest {
    source: Arc<dyn ChunkSource>,
    pages: Arc<Vec<PageRef>>,
}

impl Manifest {
    /// Loads the list of pages from the root records of a snapshot.
    pub async fn open(source: Arc<dyn ChunkSource>, root: &[ChunkRef]) -> Result<Self, ManifestError> {
        let mut pages: Vec<PageRef> = Vec::new();
        for chunk in root {
            let plain = source.get(chunk).await?;
            let damaged = |source| ManifestError::Damaged { chunk: chunk.id, source };
            let more = decode_root(&plain).map_err(damaged)?;
            if let (Some(last), Some(next)) = (pages.last(), more.first())
                && compare_paths(&last.first, &next.first).is_ge()
            {
                return Err(damaged(FormatError { what: "root records are not in order", at: 0 }));
            }
            pages.extend(more);
        }
        Ok(Self { source, pages: Arc::new(pages) })
    }

    /// The pages, in path order.
    pub fn pages(&self) -> &[PageRef] {
        &self.pages
    }

    /// The pages that can hold the path and all that lies below it.
    pub fn range_of(&self, path: &[u8]) -> Range<usize> {
        let start = self.pages.partition_point(|page| compare_paths(&page.first, path).is_le()).saturating_sub(1);
        // Everything below sorts before the path followed by the byte after the separator's rank.
        let after = [path, &[1]].concat();
        let end = if path.is_empty() {
            self.pages.len()
        } else {
            self.pages.partition_point(|page| compare_paths(&page.first, &after).is_lt())
        };
        start..end.max(start)
    }

    /// The entries of one page.
    pub async fn page(&self, number: usize) -> Result<Vec<Entry>, ManifestError> {
        self.decode(number, &self.source.get(&self.pages[number].chunk).await?)
    }

    /// The entries in the stored bytes of a page, if they are those that the root record means.
    fn decode(&self, number: usize, plain: &[u8]) -> Result<Vec<Entry>, ManifestError> {
        let page = &self.pages[number];
        let damaged = |what| ManifestError::Damaged { chunk: page.chunk.id, source: FormatError { what, at: 0 } };
        let entries = decode_page(plain).map_err(|source| ManifestError::Damaged { chunk: page.chunk.id, source })?;
        if entries.first().is_none_or(|entry| entry.path != page.first) || entries.len() as u64 != page.entries {
            return Err(damaged("a page is not the one that the root record means"));
        }
        let next = self.pages.get(number + 1);
        if let (Some(last), Some(next)) = (entries.last(), next)
            && compare_paths(&last.path, &next.first).is_ge()
        {
            return Err(damaged("pages overlap"));
        }
        Ok(entries)
    }

    /// The entries of these pages, read ahead, in the order given.
    pub fn read(
        &self,
        numbers: impl IntoIterator<Item = usize>,
    ) -> BoxStream<'static, Result<Vec<Entry>, ManifestError>> {
        let (reads, decodes) = (self.clone(), self.clone());
        stream::iter(self.groups(numbers))
            .map(move |group| reads.clone().fetch(group))
            .buffered(GROUPS_AHEAD)
            .flat_map(move |fetched| {
                let this = decodes.clone();
                stream::iter(fetched.into_iter().map(move |(number, plain)| this.decode(number, &plain?)))
            })
            .boxed()
    }

    /// Pages that are read together.
    fn groups(&self, numbers: impl IntoIterator<Item = usize>) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut bytes = 0;
        for number in numbers {
            let len = u64::from(self.pages[number].chunk.len);
            bytes += len;
            match groups.last_mut() {
                Some(group) if bytes <= TOGETHER_BYTES => group.push(number),
                _ => {
                    bytes = len;
                    groups.push(vec![number]);
                }
            }
        }
        groups
    }

    /// The stored bytes of these pages, in the order given.
    async fn fetch(self, numbers: Vec<usize>) -> Vec<(usize, Result<Bytes, ReadError>)> {
        let chunks: Vec<_> = numbers.iter().map(|number| self.pages[*number].chunk).collect();
        let mut fetched = vec![None; numbers.len()];
        let mut arriving = Arc::clone(&self.source).get_many(chunks.clone());
        while let Some(arrived) = arriving.next().await {
            // Which page an error is of it does not say: what is missing at the end is asked for by itself.
            if let Ok((at, plain)) = arrived
                && let Some(place) = fetched.get_mut(at)
            {
                *place = Some(plain);
            }
        }
        let mut pages = Vec::with_capacity(numbers.len());
        let mut failed: Option<ReadError> = None;
        for ((number, chunk), plain) in numbers.into_iter().zip(chunks).zip(fetched) {
            let plain = match (plain, &failed) {
                (Some(plain), _) => Ok(plain),
                // A store that does not answer is not asked again for each.
                (None, Some(error)) if !matches!(error.class(), ErrorClass::Damaged | ErrorClass::NotFound) => {
                    Err(error.clone())
                }
                (None, _) => self.source.get(&chunk).await,
            };
            if let Err(error) = &plain {
                failed = Some(error.clone());
            }
            pages.push((number, plain));
        }
        pages
    }

    /// The entry at exactly this path.
    pub async fn find(&self, path: &[u8]) -> Result<Option<Entry>, ManifestError> {
        let number = self.range_of(path).start;
        if number >= self.pages.len() {
            return Ok(None);
        }
        let entries = self.page(number).await?;
        Ok(entries.into_iter().find(|entry| entry.path == path))
    }

    /// The entry at this path; of a hard link the file that it names, with the link's path.
    pub async fn find_file(&self, path: &[u8]) -> Result<Option<Entry>, ManifestError> {
        match self.find(path).await? {
            Some(Entry { kind: Kind::Link { to }, path, .. }) => {
                Ok(self.find(&to).await?.map(|file| Entry { path, ..file }))
            }
            other => Ok(other),
        }
    }

    /// The pieces of a file, list by list; together they make up its size, or the last item is an error.
    pub fn pieces(&self, file: &Regular) -> BoxStream<'static, Result<Vec<Piece>, ManifestError>> {
        pieces(Arc::clone(&self.source), file)
    }
}

/// The pieces of a file, list by list, as [`Manifest::pieces`].
pub(crate) fn pieces(
    source: Arc<dyn ChunkSource>,
    file: &Regular,
) -> BoxStream<'static, Result<Vec<Piece>, ManifestError>> {
    let lists = match &file.contents {
        Contents::Inline(pieces) => return stream::iter([Ok(pieces.clone())]).boxed(),
        Contents::Listed(lists) => lists.clone(),
    };
    let size = file.size;
    let read = stream::iter(lists.into_iter().enumerate().collect::<Vec<_>>()).map(move |(number, list)| {
        let source = Arc::clone(&source);
        async move {
            let pieces = decode_pieces(&source.get(&list).await?)
                .map_err(|source| ManifestError::Damaged { chunk: list.id, source })?;
            Ok((number, list.id, pieces))
        }
    });
    let count = match &file.contents {
        Contents::Listed(lists) => lists.len(),
        Contents::Inline(_) => 0,
    };
    read.buffered(AHEAD)
        .scan(0u64, move |sum, read: Result<(usize, ChunkId, Vec<Piece>), ManifestError>| {
            let checked = read.and_then(|(number, chunk, pieces)| {
                let total = total_len(&pieces).and_then(|len| sum.checked_add(len)).filter(|total| *total <= size);
                let is_last = number + 1 == count;
                match total {
                    Some(total) if !is_last || total == size => {
                        *sum = total;
                        Ok(pieces)
                    }
                    _ => {
                        let source = FormatError { what: "the pieces of a file do not make up its size", at: 0 };
                        Err(ManifestError::Damaged { chunk, source })
                    }
                }
            });
            std::future::ready(Some(checked))
        })
        .boxed()
}
