//! Reads a manifest back, page by page.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use thiserror::Error;

use super::entry::Entry;
use super::page::decode_page;
use super::root::{PageInfo, decode_root};
use super::{PageError, compare_paths, is_within};
use crate::error::{Classified, ErrorClass};
use crate::id::{ChunkId, ChunkRef};
use crate::read::ReadError;
use crate::sink::ChunkSource;

/// Pages fetched ahead.
const PAGES_AHEAD: usize = 8;

/// A manifest that cannot be read.
#[derive(Debug, Clone, Error)]
pub enum ManifestError {
    /// A chunk of it cannot be read.
    #[error("a part of the file list cannot be read")]
    Read(#[from] ReadError),
    /// A page is not of the format.
    #[error("the page {page} of the file list is damaged")]
    Page {
        /// The page's chunk.
        page: ChunkId,
        /// What does not fit.
        source: PageError,
    },
}

impl Classified for ManifestError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Read(error) => error.class(),
            Self::Page { .. } => ErrorClass::Damaged,
        }
    }
}

/// The pages of a manifest.
#[derive(Debug, Clone)]
pub struct Pages {
    pages: Vec<PageInfo>,
}

impl Pages {
    /// Reads the list of pages.
    pub async fn read(source: &Arc<dyn ChunkSource>, root: &[ChunkRef]) -> Result<Self, ManifestError> {
        let mut pages: Vec<PageInfo> = Vec::new();
        for chunk in root {
            let bytes = source.get(chunk).await?;
            let more = decode_root(&bytes).map_err(|source| ManifestError::Page { page: chunk.id, source })?;
            let follows = match (pages.last(), more.first()) {
                (Some(before), Some(first)) => compare_paths(&before.last, &first.first).is_lt(),
                _ => true,
            };
            if !follows {
                let source = PageError::Entry { number: 0, what: "the records of the page list are not in order" };
                return Err(ManifestError::Page { page: chunk.id, source });
            }
            pages.extend(more);
        }
        Ok(Self { pages })
    }

    /// The pages, in order.
    pub fn list(&self) -> &[PageInfo] {
        &self.pages
    }

    /// Only the pages that may hold something in or below a directory.
    pub fn within(mut self, directory: &[u8]) -> Self {
        self.pages.retain(|page| {
            let ends_before = compare_paths(&page.last, directory).is_lt();
            let begins_after = compare_paths(&page.first, directory).is_gt() && !is_within(&page.first, directory);
            !ends_before && !begins_after
        });
        self
    }

    /// The entries, one page at a time, in order.
    pub fn entries(self, source: Arc<dyn ChunkSource>) -> EntryPages {
        let pages = futures::stream::iter(self.pages)
            .map(move |page| {
                let source = Arc::clone(&source);
                async move {
                    let bytes = source.get(&page.chunk).await?;
                    decode_page(&bytes).map_err(|source| ManifestError::Page { page: page.chunk.id, source })
                }
            })
            .buffered(PAGES_AHEAD);
        EntryPages { pages: pages.boxed(), ready: VecDeque::new() }
    }
}

/// A stream of entries.
pub struct EntryPages {
    pages: BoxStream<'static, Result<Vec<Entry>, ManifestError>>,
    ready: VecDeque<Entry>,
}

impl EntryPages {
    /// No entries.
    pub fn empty() -> Self {
        Self { pages: futures::stream::empty().boxed(), ready: VecDeque::new() }
    }

    /// The next entry.
    pub async fn next(&mut self) -> Result<Option<Entry>, ManifestError> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(Some(entry));
            }
            match self.pages.next().await {
                Some(page) => self.ready.extend(page?),
                None => return Ok(None),
            }
        }
    }

    /// The next entry without taking it.
    pub async fn peek(&mut self) -> Result<Option<&Entry>, ManifestError> {
        if self.ready.is_empty()
            && let Some(entry) = self.next().await?
        {
            self.ready.push_front(entry);
        }
        Ok(self.ready.front())
    }
}
