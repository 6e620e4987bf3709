//! What the kernel asks, one function for each question. Every failure was told before it is answered.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::Errno;
use lifeboat_repository::browse::Found;
use lifeboat_repository::manifest::Kind;

use super::{Entries, Handle, Item, Served, Shown, lock};
use crate::mount::layout::{Child, Node};
use crate::mount::number::{FIRST_OFFSET, cursor_of, offset_of, root_of};

impl Served {
    pub(in crate::mount) async fn attributes(&self, number: u64) -> Result<Item, Errno> {
        if self.is_above(number) {
            return self.above(number);
        }
        if let Some(snapshot) = root_of(number) {
            return self.child(Child::Snapshot(snapshot)).await;
        }
        let (shown, found) = self.entry(number).await?;
        self.item(&shown, &found).await
    }

    pub(in crate::mount) async fn look_up(&self, folder: u64, name: &[u8]) -> Result<Item, Errno> {
        if self.is_above(folder) {
            self.refresh().await;
            let child = match lock(&self.listed).layout.get(folder) {
                Some(Node::Folder { children, .. }) => {
                    str::from_utf8(name).ok().and_then(|name| children.get(name)).copied()
                }
                _ => return Err(Errno::ENOTDIR),
            };
            return self.child(child.ok_or(Errno::ENOENT)?).await;
        }
        let (shown, found) = self.entry(folder).await?;
        if found.entry().kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        let path = found.entry().path.clone();
        let child = shown.tree.child(&path, name).await;
        let below = if path.is_empty() { name.to_vec() } else { [&path, name].join(&b'/') };
        let child = child.map_err(|error| self.fail(&shown, &below, &error))?;
        let child = self.resolve(&shown, child.ok_or(Errno::ENOENT)?).await?;
        self.item(&shown, &child).await
    }

    pub(in crate::mount) async fn link_target(&self, number: u64) -> Result<Vec<u8>, Errno> {
        if self.is_above(number) {
            self.refresh().await;
            return match lock(&self.listed).layout.get(number) {
                Some(Node::Link(target)) => Ok(target.clone().into_bytes()),
                _ => Err(Errno::EINVAL),
            };
        }
        match &self.entry(number).await?.1.entry().kind {
            Kind::Symlink { target } => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Gives the entries of a directory from an offset on, as many as there is room for.
    pub(in crate::mount) async fn list(
        &self,
        number: u64,
        offset: u64,
        entries: &mut impl Entries,
    ) -> Result<(), Errno> {
        if self.is_above(number) {
            self.list_above(number, offset, entries).await
        } else {
            self.list_tree(number, offset, entries).await
        }
    }

    async fn list_above(&self, number: u64, offset: u64, entries: &mut impl Entries) -> Result<(), Errno> {
        if offset == 0 {
            self.refresh().await;
        }
        let (parent, children) = match lock(&self.listed).layout.get(number) {
            Some(Node::Folder { parent, children }) => (*parent, children.clone()),
            _ => return Err(Errno::ENOTDIR),
        };
        if is_full_with_dots(&self.above(number)?, &self.above(parent)?, offset, entries) {
            return Ok(());
        }
        let skipped = usize::try_from(offset.saturating_sub(FIRST_OFFSET)).unwrap_or(usize::MAX);
        for (at, (name, child)) in children.into_iter().enumerate().skip(skipped) {
            let item = self.listed_child(child)?;
            if entries.add(&item, FIRST_OFFSET + at as u64 + 1, name.as_bytes()) {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn list_tree(&self, number: u64, offset: u64, entries: &mut impl Entries) -> Result<(), Errno> {
        let (shown, found) = self.entry(number).await?;
        if found.entry().kind != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        let directory = found.entry().path.clone();
        let this = self.item(&shown, &found).await?;
        let above = self.folder_of(&shown, &found).await?;
        if is_full_with_dots(&this, above.as_ref().unwrap_or(&this), offset, entries) {
            return Ok(());
        }
        let mut is_any = offset < FIRST_OFFSET;
        let mut next = Some(cursor_of(offset).unwrap_or(found.position.next()));
        while let Some(from) = next {
            let listing = match shown.tree.list(&directory, from).await {
                Ok(listing) => listing,
                // What was found is given first; the next call fails.
                Err(_) if is_any => return Ok(()),
                Err(error) => return Err(self.fail(&shown, &directory, &error)),
            };
            for child in listing.children {
                let offset = offset_of(child.position.next());
                let name = child.entry().parent_and_name().1.to_vec();
                let item = match self.resolve(&shown, child.clone()).await {
                    Ok(child) => self.item(&shown, &child).await?,
                    // Another name of what cannot be found is listed as well; opening it fails.
                    Err(_) => self.item(&shown, &child).await?,
                };
                if entries.add(&item, offset, &name) {
                    return Ok(());
                }
                is_any = true;
            }
            next = listing.next;
        }
        Ok(())
    }

    /// The folder that holds a directory of a tree; `None`: it is not told.
    async fn folder_of(&self, shown: &Shown, found: &Found) -> Result<Option<Item>, Errno> {
        let entry = found.entry();
        if entry.path.is_empty() {
            return Ok(None);
        }
        let parent = shown.tree.find(entry.parent_and_name().0).await;
        match parent.map_err(|error| self.fail(shown, &entry.path, &error))? {
            Some(parent) => self.item(shown, &parent).await.map(Some),
            None => Ok(None),
        }
    }

    /// All extended attributes of an entry.
    pub(in crate::mount) async fn xattrs(&self, number: u64) -> Result<Vec<(Vec<u8>, Vec<u8>)>, Errno> {
        if self.is_above(number) {
            return Ok(Vec::new());
        }
        let (_, found) = self.entry(number).await?;
        let xattrs = found.entry().meta.xattrs.iter();
        Ok(xattrs.map(|xattr| (xattr.name.clone(), xattr.value.clone())).collect())
    }

    /// Opens a regular file; the number of its handle.
    pub(in crate::mount) async fn open(&self, number: u64) -> Result<u64, Errno> {
        if self.is_above(number) {
            return Err(Errno::EISDIR);
        }
        let (_, found) = self.entry(number).await?;
        if !matches!(found.entry().kind, Kind::Regular(_)) {
            return Err(Errno::EINVAL);
        }
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        lock(&self.handles).insert(handle, Arc::default());
        Ok(handle)
    }

    pub(in crate::mount) fn close(&self, handle: u64) {
        lock(&self.handles).remove(&handle);
    }

    fn handle(&self, handle: u64) -> Arc<Handle> {
        lock(&self.handles).get(&handle).cloned().unwrap_or_default()
    }

    pub(in crate::mount) async fn read(
        &self,
        number: u64,
        handle: u64,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, Errno> {
        let (shown, found) = self.entry(number).await?;
        let handle = self.handle(handle);
        let is_next = offset != 0 && handle.end.swap(offset.saturating_add(len as u64), Ordering::Relaxed) == offset;
        let read = match shown.tree.reader(&found, &handle.starts) {
            Ok(reader) => reader.read(offset, len, is_next).await,
            Err(error) => Err(error),
        };
        read.map_err(|error| self.fail(&shown, &found.entry().path, &error))
    }

    /// Where data (or a hole) begins at or behind the offset.
    pub(in crate::mount) async fn seek(&self, number: u64, handle: u64, offset: u64, data: bool) -> Result<u64, Errno> {
        let (shown, found) = self.entry(number).await?;
        if offset >= found.entry().size() {
            return Err(Errno::ENXIO);
        }
        let handle = self.handle(handle);
        let sought = match shown.tree.reader(&found, &handle.starts) {
            Ok(reader) => reader.seek(offset, data).await,
            Err(error) => Err(error),
        };
        sought.map_err(|error| self.fail(&shown, &found.entry().path, &error))?.ok_or(Errno::ENXIO)
    }
}

/// Gives `.` and `..`, as far as they come after the offset; `true`: there is no room for more.
fn is_full_with_dots(this: &Item, above: &Item, offset: u64, entries: &mut impl Entries) -> bool {
    let dots = [(this, &b"."[..]), (above, b"..")];
    let skipped = usize::try_from(offset.min(FIRST_OFFSET)).unwrap_or(0);
    dots.iter().enumerate().skip(skipped).any(|(at, (item, name))| entries.add(item, at as u64 + 1, name))
}
