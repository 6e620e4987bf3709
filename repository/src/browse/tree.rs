//! Entries of one snapshot: by place, by name, and those of a directory from any point on.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::Browser;
use super::file::{FileReader, ListStarts};
use crate::manifest::{Entry, Kind, Manifest, ManifestError, compare_paths, is_in};
use crate::sink::ChunkRef;
use crate::tree::{TreeError, child_below};

/// Where an entry is in the manifest. The same as long as the snapshot exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Number of the page.
    pub page: u32,
    /// Number of the entry in its page; pages have at most 65,536.
    pub index: u16,
}

/// Where a listing goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// Number of the page.
    pub page: u32,
    /// The first entry of the page to look at; it may lie behind the last.
    pub index: u32,
}

impl Position {
    /// The place behind it.
    #[must_use]
    pub fn next(self) -> Cursor {
        Cursor { page: self.page, index: u32::from(self.index) + 1 }
    }
}

/// An entry and its place.
#[derive(Debug, Clone)]
pub struct Found {
    page: Arc<Vec<Entry>>,
    /// The place.
    pub position: Position,
}

impl Found {
    /// The entry.
    pub fn entry(&self) -> &Entry {
        // Made only with places that the page has.
        &self.page[usize::from(self.position.index)]
    }
}

/// Some entries of a directory, in order.
#[derive(Debug, Default)]
pub struct Listing {
    /// The entries.
    pub children: Vec<Found>,
    /// Where it goes on; `None`: these were the last.
    pub next: Option<Cursor>,
}

/// The tree of a snapshot.
pub struct Tree {
    browser: Arc<Browser>,
    number: u32,
    root: Vec<ChunkRef>,
    /// Held by the one who opens the manifest.
    opening: Mutex<()>,
}

impl Tree {
    pub(super) fn new(browser: Arc<Browser>, number: u32, root: Vec<ChunkRef>) -> Self {
        Self { browser, number, root, opening: Mutex::new(()) }
    }

    async fn manifest(&self) -> Result<Manifest, ManifestError> {
        let memory = &self.browser.memory;
        if let Some(manifest) = memory.manifest(self.number) {
            return Ok(manifest);
        }
        let _opening = self.opening.lock().await;
        if let Some(manifest) = memory.manifest(self.number) {
            return Ok(manifest);
        }
        let manifest = Manifest::open(memory.source(), &self.root).await?;
        memory.keep(self.number, manifest.clone());
        Ok(manifest)
    }

    /// A page that the manifest has.
    async fn page(&self, manifest: &Manifest, number: u32) -> Result<Arc<Vec<Entry>>, ManifestError> {
        let read = async { manifest.page(number as usize).await.map(Arc::new) };
        self.browser.memory.pages.get_or_insert_async(&(self.number, number), read).await
    }

    /// The entry at a place.
    pub async fn at(&self, position: Position) -> Result<Option<Found>, TreeError> {
        let manifest = self.manifest().await?;
        if position.page as usize >= manifest.pages().len() {
            return Ok(None);
        }
        let page = self.page(&manifest, position.page).await?;
        Ok((usize::from(position.index) < page.len()).then_some(Found { page, position }))
    }

    /// The root of the tree.
    pub async fn root(&self) -> Result<Found, TreeError> {
        let missing = || TreeError::NotFound { path: "root".to_owned() };
        self.find(b"").await?.ok_or_else(missing)
    }

    /// The entry with this path.
    pub async fn find(&self, path: &[u8]) -> Result<Option<Found>, TreeError> {
        let manifest = self.manifest().await?;
        let number = manifest.range_of(path).start;
        if number >= manifest.pages().len() {
            return Ok(None);
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let page = self.page(&manifest, number).await?;
        let found = page.binary_search_by(|entry| compare_paths(&entry.path, path)).ok();
        let index = found.and_then(|index| u16::try_from(index).ok());
        Ok(index.map(|index| Found { page, position: Position { page: number, index } }))
    }

    /// The entry with this name in a directory.
    pub async fn child(&self, directory: &[u8], name: &[u8]) -> Result<Option<Found>, TreeError> {
        let path = if directory.is_empty() { name.to_vec() } else { [directory, name].join(&b'/') };
        self.find(&path).await
    }

    /// The file that a hard link is another name of; everything else is what it is. `None`: the file is missing.
    pub async fn resolve(&self, found: Found) -> Result<Option<Found>, TreeError> {
        let Kind::Link { to } = &found.entry().kind else { return Ok(Some(found)) };
        let file = self.find(to).await?;
        Ok(file.filter(|file| matches!(file.entry().kind, Kind::Regular(_))))
    }

    /// Entries of a directory, those of one page at most. Begin behind the directory's own place.
    pub async fn list(&self, directory: &[u8], from: Cursor) -> Result<Listing, TreeError> {
        let manifest = self.manifest().await?;
        let mut at = from;
        loop {
            if at.page as usize >= manifest.pages().len() {
                return Ok(Listing::default());
            }
            let page = self.page(&manifest, at.page).await?;
            let mut children = Vec::new();
            for index in at.index as usize..page.len() {
                let entry = &page[index];
                if !is_in(&entry.path, directory) {
                    // All that is in a directory follows it directly.
                    return Ok(Listing { children, next: None });
                }
                if entry.path != directory
                    && entry.parent_and_name().0 == directory
                    && let Ok(index) = u16::try_from(index)
                {
                    children.push(Found { page: Arc::clone(&page), position: Position { page: at.page, index } });
                }
            }
            at = Cursor { page: page_behind(&manifest, at.page, &page, directory), index: 0 };
            if !children.is_empty() {
                return Ok(Listing { children, next: Some(at) });
            }
        }
    }

    /// Reads a regular file. `starts` may be kept between reads of the same file.
    pub fn reader<'a>(&'a self, file: &'a Found, starts: &'a ListStarts) -> Result<FileReader<'a>, TreeError> {
        match &file.entry().kind {
            Kind::Regular(regular) => Ok(FileReader::new(&self.browser, regular, starts)),
            kind => {
                let path = String::from_utf8_lossy(&file.entry().path).into_owned();
                Err(TreeError::NotAFile { path, kind: kind.name() })
            }
        }
    }
}

/// The next page that can hold an entry of the directory itself: pages that lie wholly below one of its entries are left out.
fn page_behind(manifest: &Manifest, number: u32, page: &[Entry], directory: &[u8]) -> u32 {
    let below = page.last().and_then(|last| child_below(&last.path, directory));
    let last_below = below.map_or(0, |name| {
        let child = if directory.is_empty() { name.to_vec() } else { [directory, name].join(&b'/') };
        // The last page that begins at or below the child may go on with what follows it.
        manifest.range_of(&child).end.saturating_sub(1)
    });
    u32::try_from(last_below).unwrap_or(u32::MAX).max(number.saturating_add(1))
}
