//! The walk compared with the parent: what is the same is taken over, the rest is handed on to be read.
//!
//! A merge-join: both come in path order. The key of a file is its path, size, mtime, ctime and inode; not the device,
//! whose number changes on clones. Runs on the thread that walks; reads no file's content.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use rustix::fs::{FileType, Stat, major, minor, readlinkat};
use tokio::sync::mpsc;

use super::parent::ParentCursor;
use super::read::{Context, SMALL_BYTES};
use crate::manifest::{Contents, Entry, Kind, Meta, Piece, Reason, Regular, Skipped};
use crate::meta::{self, Subject};
use crate::sink::ChunkRef;
use crate::walk::{Visit, Visitor};

/// Entries that are handed on together.
const GROUP_ENTRIES: usize = 256;
/// Bytes of small files that are handed on together.
const GROUP_BYTES: u64 = 512 << 10;
/// Bytes of paths that are remembered to find other names of a file.
const LINK_BYTES: usize = 32 << 20;

/// What is left to do for an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Todo {
    /// It is complete.
    Nothing,
    /// The file did not change: its lists of pieces are to be taken over.
    Inherit,
    /// The file is to be read. Whether the parent has it, with other content; and what it has of a file with a page map.
    /// Its extended attributes are read with it: that is cheaper through an open file than by name.
    Read { changed: bool, before: Option<Box<Regular>> },
}

/// What a walk hands on.
#[derive(Debug)]
pub(super) enum Item {
    Entry(Entry, Todo),
    Skipped(Skipped),
}

/// The first path of a file, and how many other names of it were not met yet.
struct FirstName {
    path: Box<[u8]>,
    left: u64,
}

/// Files with several names, by device and inode.
#[derive(Default)]
struct Links {
    first: HashMap<(u64, u64), FirstName>,
    bytes: usize,
}

/// What is known about a file with several names.
enum LinkState {
    First,
    Other { to: Vec<u8> },
    NotKept,
}

impl Links {
    fn meet(&mut self, stat: &Stat, path: &[u8]) -> LinkState {
        let key = (stat.st_dev, stat.st_ino);
        if let Some(first) = self.first.get_mut(&key) {
            let to = first.path.to_vec();
            first.left -= 1;
            if first.left == 0 {
                self.first.remove(&key);
                self.bytes -= to.len();
            }
            return LinkState::Other { to };
        }
        if self.bytes + path.len() > LINK_BYTES {
            return LinkState::NotKept;
        }
        self.bytes += path.len();
        // The type of the count differs between machines.
        #[allow(clippy::useless_conversion, reason = "not the same type everywhere")]
        let names = u64::from(stat.st_nlink);
        self.first.insert(key, FirstName { path: path.into(), left: names - 1 });
        LinkState::First
    }
}

/// The receiver is gone or someone asked to stop.
pub(super) struct Stopped;

/// Compares what a walk finds with the parent.
pub(super) struct Comparison {
    context: Arc<Context>,
    parent: ParentCursor,
    sender: mpsc::Sender<Vec<Item>>,
    group: Vec<Item>,
    group_bytes: u64,
    links: Links,
    /// The chunk that was taken over last: files of one bundle follow one another.
    inherited: Option<ChunkRef>,
}

impl Comparison {
    pub(super) fn new(context: Arc<Context>, parent: ParentCursor, sender: mpsc::Sender<Vec<Item>>) -> Self {
        Self { context, parent, sender, group: Vec::new(), group_bytes: 0, links: Links::default(), inherited: None }
    }

    /// Hands on what is left.
    pub(super) fn finish(mut self) -> Result<(), Stopped> {
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Stopped> {
        self.group_bytes = 0;
        if self.group.is_empty() {
            return Ok(());
        }
        self.sender.blocking_send(std::mem::take(&mut self.group)).map_err(|_| Stopped)
    }

    fn push(&mut self, item: Item) -> Result<(), Stopped> {
        let (bytes, is_alone) = match &item {
            Item::Entry(entry, Todo::Read { .. }) => (entry.size(), entry.size() >= SMALL_BYTES),
            Item::Entry(_, Todo::Inherit) => (0, true),
            _ => (0, false),
        };
        if is_alone {
            self.flush()?;
        }
        self.group.push(item);
        self.group_bytes += bytes;
        if is_alone || self.group.len() >= GROUP_ENTRIES || self.group_bytes >= GROUP_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// The extended attributes, by name.
    fn xattrs(&mut self, found: &Visit<'_>, meta: &mut Meta) -> Result<(), Stopped> {
        match meta::xattrs(Subject::Name(found.directory, found.name)) {
            Ok(xattrs) => meta.xattrs = xattrs,
            Err(error) => {
                // The entry is kept without them, listed, and looked at again next time.
                meta.inode = 0;
                let reason = without_xattrs(&error);
                self.push(Item::Skipped(Skipped { path: found.path.to_vec(), reason }))?;
            }
        }
        Ok(())
    }

    /// As [`Context::inherits`]; a chunk that was just taken over is not looked up again.
    fn inherits(&mut self, pieces: &[Piece]) -> bool {
        if let [Piece::Data { chunk, .. }] = pieces {
            if self.inherited.as_ref() == Some(chunk) {
                return true;
            }
            let inherits = self.context.inherits(pieces);
            self.inherited = inherits.then_some(*chunk);
            return inherits;
        }
        self.context.inherits(pieces)
    }

    fn regular(&mut self, found: &Visit<'_>, meta: &Meta, parent: Option<Entry>) -> Result<(Kind, Todo), Stopped> {
        let stat = found.stat;
        let mut linked = false;
        if stat.st_nlink > 1 {
            match self.links.meet(stat, found.path) {
                LinkState::Other { to } => return Ok((Kind::Link { to }, Todo::Nothing)),
                LinkState::First => linked = true,
                LinkState::NotKept => {
                    self.push(Item::Skipped(Skipped { path: found.path.to_vec(), reason: Reason::LinkNotKept }))?;
                }
            }
        }
        let (size, sparse) = size_and_sparse(stat);
        let file = Regular { size, sparse, linked, contents: Contents::default(), page_map: Contents::default() };
        if size == 0 {
            return Ok((Kind::Regular(file), Todo::Nothing));
        }
        let changed = parent.is_some();
        let Some(Entry { meta: old, kind: Kind::Regular(before), .. }) = parent else {
            return Ok((Kind::Regular(file), Todo::Read { changed, before: None }));
        };
        let is_same = old.inode != 0
            && (before.size, old.mtime, old.ctime, old.inode) == (size, meta.mtime, meta.ctime, meta.inode);
        if is_same {
            let todo = match (&before.contents, &before.page_map) {
                (Contents::Inline(pieces), Contents::Inline(map)) => {
                    (self.inherits(pieces) && self.context.inherits(map)).then_some(Todo::Nothing)
                }
                _ => Some(Todo::Inherit),
            };
            if let Some(todo) = todo {
                let Regular { contents, page_map, .. } = before;
                return Ok((Kind::Regular(Regular { contents, page_map, ..file }), todo));
            }
            // Condemned: the same bytes go back into an ordinary bundle.
        }
        let before = (!before.page_map.is_empty()).then(|| Box::new(before));
        Ok((Kind::Regular(file), Todo::Read { changed: !is_same, before }))
    }
}

/// The length of a file, and whether it takes less room than that.
pub(super) fn size_and_sparse(stat: &Stat) -> (u64, bool) {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    (size, blocks.saturating_mul(512) < size)
}

/// Why an entry is kept without its extended attributes.
pub(super) fn without_xattrs(error: &io::Error) -> Reason {
    if error.raw_os_error() == Some(rustix::io::Errno::TOOBIG.raw_os_error()) {
        Reason::TooLarge
    } else {
        Reason::Unreadable { error: format!("extended attributes: {error}") }
    }
}

fn unreadable(path: &[u8], error: &io::Error) -> Skipped {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => Reason::Vanished,
        _ => Reason::Unreadable { error: error.to_string() },
    };
    Skipped { path: path.to_vec(), reason }
}

impl Visitor for Comparison {
    type Stop = Stopped;

    fn visit(&mut self, found: &Visit<'_>) -> Result<(), Stopped> {
        if self.context.is_stopped() {
            return Err(Stopped);
        }
        let parent = self.parent.seek(found.path);
        let mut meta = meta::of_stat(found.stat);
        // Those of the parent if nothing about the inode changed.
        let same = parent.as_ref().map(|parent| &parent.meta);
        let same = same.filter(|old| (old.inode, old.ctime) == (meta.inode, meta.ctime));
        let are_known = same.is_some();
        if let Some(old) = same {
            meta.xattrs.clone_from(&old.xattrs);
        }
        let rdev = found.stat.st_rdev;
        let (kind, todo) = match found.file_type() {
            FileType::RegularFile => self.regular(found, &meta, parent)?,
            FileType::Directory => (Kind::Directory, Todo::Nothing),
            FileType::Symlink => match readlinkat(found.directory, found.name, Vec::new()) {
                Ok(target) => (Kind::Symlink { target: target.into_bytes() }, Todo::Nothing),
                Err(error) => return self.skip(unreadable(found.path, &error.into())),
            },
            FileType::CharacterDevice => (Kind::CharDevice { major: major(rdev), minor: minor(rdev) }, Todo::Nothing),
            FileType::BlockDevice => (Kind::BlockDevice { major: major(rdev), minor: minor(rdev) }, Todo::Nothing),
            FileType::Fifo => (Kind::Fifo, Todo::Nothing),
            FileType::Socket => (Kind::Socket, Todo::Nothing),
            FileType::Unknown => {
                let reason = Reason::Unreadable { error: "a kind of file that is not known".to_owned() };
                return self.skip(Skipped { path: found.path.to_vec(), reason });
            }
        };
        if !are_known && !matches!(todo, Todo::Read { .. }) {
            self.xattrs(found, &mut meta)?;
        }
        self.push(Item::Entry(Entry { path: found.path.to_vec(), meta, kind }, todo))
    }

    fn skip(&mut self, skipped: Skipped) -> Result<(), Stopped> {
        self.push(Item::Skipped(skipped))
    }
}
