//! Creates entries in the target and restores their metadata.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Existing;
use crate::beneath::Beneath;
use crate::manifest::{Entry, Kind, split_path};
use crate::meta::{self, MetaFailure};

/// What became of an entry.
pub(super) enum Placed {
    /// It is there; these parts of its metadata are not.
    Done(Vec<MetaFailure>),
    /// A directory, whose metadata comes later.
    Directory,
    /// An empty file of the right length, to be filled.
    File(OwnedFd),
}

/// Metadata that was not restored.
pub(super) struct Unfinished {
    pub(super) what: &'static str,
    pub(super) reason: String,
}

/// Creates entries.
pub(super) struct Placer {
    beneath: Beneath,
    existing: Existing,
    owner: bool,
    /// The directory of the last entry: the next one is mostly in the same.
    last: Option<(Vec<u8>, Arc<OwnedFd>)>,
}

impl Placer {
    pub(super) fn new(beneath: Beneath, existing: Existing, owner: bool) -> Self {
        Self { beneath, existing, owner, last: None }
    }

    fn directory(&mut self, path: &[u8]) -> io::Result<Arc<OwnedFd>> {
        if let Some((last, directory)) = &self.last
            && last == path
        {
            return Ok(Arc::clone(directory));
        }
        let directory = self.beneath.open_directory(path)?;
        self.last = Some((path.to_vec(), Arc::clone(&directory)));
        Ok(directory)
    }

    /// Makes the directories of a path that a selection left out, with default metadata.
    pub(super) fn make_parents(&mut self, path: &[u8]) -> io::Result<()> {
        match self.directory(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened.map(|_| ()),
        }
        let (parent, name) = split_path(path);
        self.make_parents(parent)?;
        let parent = self.directory(parent)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        self.directory(path).map(|_| ())
    }

    /// Creates the entry.
    pub(super) fn place(&mut self, entry: &Entry) -> io::Result<Placed> {
        if entry.path.is_empty() {
            return if entry.kind == Kind::Directory { Ok(Placed::Directory) } else { Err(Errno::INVAL.into()) };
        }
        let (parent, name) = split_path(&entry.path);
        let directory = self.directory(parent)?;
        if entry.kind == Kind::Directory {
            return self.make_directory(&directory, name);
        }
        match self.create(&directory, name, entry) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && self.existing == Existing::Overwrite => {
                rustix::fs::unlinkat(&directory, name, AtFlags::empty())?;
                self.create(&directory, name, entry)
            }
            placed => placed,
        }
    }

    fn make_directory(&self, parent: &OwnedFd, name: &[u8]) -> io::Result<Placed> {
        // Nobody else looks in before the owner and mode are restored.
        match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let found = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
                    if self.existing == Existing::Fail {
                        return Err(Errno::EXIST.into());
                    }
                    rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                    rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Placed::Directory)
    }

    fn create(&self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> io::Result<Placed> {
        let mode = Mode::RUSR | Mode::WUSR;
        match &entry.kind {
            Kind::File { size, .. } => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(parent, name, flags, mode)?;
                rustix::fs::ftruncate(&file, *size)?;
                return Ok(Placed::File(file));
            }
            Kind::Symlink { target } => rustix::fs::symlinkat(target.as_slice(), parent, name)?,
            Kind::HardLink { to } => {
                let (directory, first) = self.beneath.parent(to)?;
                rustix::fs::linkat(&directory, first, parent, name, AtFlags::empty())?;
                return Ok(Placed::Done(Vec::new()));
            }
            Kind::CharDevice { device } => rustix::fs::mknodat(parent, name, FileType::CharacterDevice, mode, *device)?,
            Kind::BlockDevice { device } => rustix::fs::mknodat(parent, name, FileType::BlockDevice, mode, *device)?,
            Kind::Fifo => rustix::fs::mknodat(parent, name, FileType::Fifo, mode, 0)?,
            Kind::Socket => rustix::fs::mknodat(parent, name, FileType::Socket, mode, 0)?,
            Kind::Directory => return Err(Errno::INVAL.into()),
        }
        Ok(Placed::Done(meta::apply(parent.as_fd(), name, entry, self.owner)))
    }

    /// Restores the metadata of a file that is filled, or of a directory that nothing more goes into.
    pub(super) fn finish(&mut self, entry: &Entry) -> Vec<Unfinished> {
        let (parent, name) = split_path(&entry.path);
        match self.directory(parent) {
            Ok(directory) => meta::apply(directory.as_fd(), name, entry, self.owner)
                .into_iter()
                .map(|MetaFailure { what, errno }| Unfinished { what, reason: errno.to_string() })
                .collect(),
            Err(error) => vec![Unfinished { what: "metadata", reason: error.to_string() }],
        }
    }

    /// Makes everything durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(self.beneath.root())?)
    }
}
