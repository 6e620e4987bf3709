//! Walks a live tree in the order of a manifest: each directory before what is in it, names sorted by bytes.
//!
//! Blocking; runs on its own thread. Holds the names of the directories on the way, sorted, and few descriptors
//! however deep the tree is. Never follows a symbolic link.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, OFlags, Stat, fstat, statat};
use rustix::io::Errno;

use crate::beneath::Beneath;
use crate::glob::Glob;
use crate::manifest::{MAX_PATH_BYTES, Reason, Skipped};

/// Directories on the way that stay open; above them they are opened again when they are needed.
const OPEN_LEVELS: usize = 48;

/// What to leave out.
#[derive(Debug, Clone, Default)]
pub(crate) struct WalkOptions {
    pub(crate) excludes: Vec<Glob>,
    /// Directories on other file systems are entries, but nothing in them is.
    pub(crate) one_file_system: bool,
}

/// A path that was found.
pub(crate) struct Visit<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) stat: &'a Stat,
    /// The directory that holds it; of the root itself.
    pub(crate) directory: BorrowedFd<'a>,
    /// The name there; empty for the root.
    pub(crate) name: &'a [u8],
}

impl Visit<'_> {
    pub(crate) fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }
}

/// Takes what a walk finds.
pub(crate) trait Visitor {
    /// Why the walk ends early.
    type Stop;
    fn visit(&mut self, found: &Visit<'_>) -> Result<(), Self::Stop>;
    fn skip(&mut self, skipped: Skipped) -> Result<(), Self::Stop>;
}

/// Names of a directory in one allocation.
struct Names {
    bytes: Vec<u8>,
    ends: Vec<(u32, u32)>,
    next: usize,
}

impl Names {
    fn read(directory: BorrowedFd<'_>) -> (Self, Option<io::Error>) {
        let mut names = Self { bytes: Vec::new(), ends: Vec::new(), next: 0 };
        let failed = names.fill(directory).err();
        let Self { bytes, ends, .. } = &mut names;
        ends.sort_unstable_by(|one, other| {
            bytes[one.0 as usize..one.1 as usize].cmp(&bytes[other.0 as usize..other.1 as usize])
        });
        (names, failed)
    }

    fn fill(&mut self, directory: BorrowedFd<'_>) -> io::Result<()> {
        for found in Dir::read_from(directory)? {
            let found = found?;
            let name = found.file_name().to_bytes();
            if name != b"." && name != b".." {
                let start = u32::try_from(self.bytes.len()).map_err(|_| io::Error::from(Errno::OVERFLOW))?;
                self.bytes.extend_from_slice(name);
                let end = u32::try_from(self.bytes.len()).map_err(|_| io::Error::from(Errno::OVERFLOW))?;
                self.ends.push((start, end));
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Option<&[u8]> {
        let (start, end) = *self.ends.get(self.next)?;
        self.next += 1;
        Some(&self.bytes[start as usize..end as usize])
    }
}

struct Level {
    directory: Option<OwnedFd>,
    /// Device and inode, to notice when another directory took the place.
    identity: (u64, u64),
    names: Names,
    path_len: usize,
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn reason_of(error: &io::Error) -> Reason {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Reason::Vanished,
        _ => Reason::Unreadable { error: error.to_string() },
    }
}

/// Walks the tree; `visitor` gets each path once, in order.
pub(crate) fn walk<V: Visitor>(root: &Beneath, options: &WalkOptions, visitor: &mut V) -> Result<(), V::Stop> {
    let stat = match fstat(root.root()) {
        Ok(stat) => stat,
        Err(error) => return visitor.skip(Skipped { path: Vec::new(), reason: reason_of(&error.into()) }),
    };
    visitor.visit(&Visit { path: b"", stat: &stat, directory: root.root(), name: b"" })?;
    let mut walk = Walk { root, options, device: stat.st_dev, path: Vec::new(), levels: Vec::new() };
    walk.enter(visitor, identity(&stat))?;
    while !walk.levels.is_empty() {
        walk.step(visitor)?;
    }
    Ok(())
}

struct Walk<'a> {
    root: &'a Beneath,
    options: &'a WalkOptions,
    device: u64,
    path: Vec<u8>,
    levels: Vec<Level>,
}

impl Walk<'_> {
    /// Goes on with the next name of the innermost directory, or leaves it.
    fn step<V: Visitor>(&mut self, visitor: &mut V) -> Result<(), V::Stop> {
        let Some(level) = self.levels.last_mut() else { return Ok(()) };
        self.path.truncate(level.path_len);
        let name_at = if level.path_len == 0 { 0 } else { level.path_len + 1 };
        let Some(name) = level.names.next() else {
            self.levels.pop();
            return Ok(());
        };
        if level.path_len > 0 {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        if self.options.excludes.iter().any(|exclude| exclude.matches(&self.path)) {
            return Ok(());
        }
        if self.path.len() > MAX_PATH_BYTES {
            // Listed by its beginning: lists have the same limit.
            let path = self.path[..MAX_PATH_BYTES].to_vec();
            return visitor.skip(Skipped { path, reason: Reason::TooLarge });
        }
        if let Err(error) = self.reopen() {
            // The rest of this directory is out of reach.
            let path_len = self.levels.pop().map_or(0, |level| level.path_len);
            self.path.truncate(path_len);
            return visitor.skip(Skipped { path: self.path.clone(), reason: reason_of(&error) });
        }
        let Some(directory) = self.levels.last().and_then(|level| level.directory.as_ref()) else { return Ok(()) };
        let name = &self.path[name_at..];
        let stat = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(error) => {
                return visitor.skip(Skipped { path: self.path.clone(), reason: reason_of(&error.into()) });
            }
        };
        visitor.visit(&Visit { path: &self.path, stat: &stat, directory: directory.as_fd(), name })?;
        let is_here = !self.options.one_file_system || stat.st_dev == self.device;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && is_here {
            self.enter(visitor, identity(&stat))?;
        }
        Ok(())
    }

    /// Makes the directory at the current path the innermost one.
    fn enter<V: Visitor>(&mut self, visitor: &mut V, expected: (u64, u64)) -> Result<(), V::Stop> {
        match self.open(expected) {
            Ok(directory) => {
                let (names, failed) = Names::read(directory.as_fd());
                if let Some(error) = failed {
                    visitor.skip(Skipped { path: self.path.clone(), reason: reason_of(&error) })?;
                }
                if let Some(far) = self.levels.len().checked_sub(OPEN_LEVELS) {
                    self.levels[far].directory = None;
                }
                let path_len = self.path.len();
                self.levels.push(Level { directory: Some(directory), identity: expected, names, path_len });
                Ok(())
            }
            Err(error) => visitor.skip(Skipped { path: self.path.clone(), reason: reason_of(&error) }),
        }
    }

    fn open(&self, expected: (u64, u64)) -> io::Result<OwnedFd> {
        let directory = self.root.open_at(&self.path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        if identity(&fstat(&directory)?) == expected {
            Ok(directory)
        } else {
            // Another directory took the place; a mount on it, for one.
            Err(Errno::NOENT.into())
        }
    }

    /// Opens the innermost directory again if it was closed for being far from the leaves.
    fn reopen(&mut self) -> io::Result<()> {
        let Some(level) = self.levels.last() else { return Ok(()) };
        if level.directory.is_some() {
            return Ok(());
        }
        let directory = self.root.open_at(&self.path[..level.path_len], OFlags::RDONLY | OFlags::DIRECTORY)?;
        if identity(&fstat(&directory)?) != level.identity {
            return Err(Errno::NOENT.into());
        }
        if let Some(level) = self.levels.last_mut() {
            level.directory = Some(directory);
        }
        Ok(())
    }
}
