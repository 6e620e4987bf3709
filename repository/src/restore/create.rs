//! Makes what is no regular file: directories, symbolic links, devices, pipes, sockets; and hard links.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Mode, fstat, linkat, makedev, mkdirat, mknodat, symlinkat};
use rustix::io::Errno;

use super::target::Target;
use super::{Existing, What};
use crate::manifest::{Entry, Kind, split_path};

impl Target {
    /// Makes the entry and applies its attributes; those of directories come later.
    pub(super) fn create(&self, entry: &Entry) {
        let made = match &entry.kind {
            Kind::Directory => self.create_directory(&entry.path),
            Kind::Symlink { target } => {
                self.create_with(entry, |directory, name| symlinkat(&target[..], directory, name))
            }
            Kind::CharDevice { major, minor } => self.create_node(entry, FileType::CharacterDevice, (*major, *minor)),
            Kind::BlockDevice { major, minor } => self.create_node(entry, FileType::BlockDevice, (*major, *minor)),
            Kind::Fifo => self.create_node(entry, FileType::Fifo, (0, 0)),
            Kind::Socket => self.create_node(entry, FileType::Socket, (0, 0)),
            // These have their own ways.
            Kind::Regular(_) | Kind::Link { .. } => Ok(()),
        };
        if let Err(error) = made {
            self.fail(&entry.path, What::Create, &error);
        }
    }

    fn create_node(&self, entry: &Entry, kind: FileType, (major, minor): (u32, u32)) -> io::Result<()> {
        let mode = Mode::RUSR | Mode::WUSR;
        self.create_with(entry, |directory, name| mknodat(directory, name, kind, mode, makedev(major, minor)))
    }

    fn create_with(&self, entry: &Entry, make: impl Fn(&OwnedFd, &[u8]) -> Result<(), Errno>) -> io::Result<()> {
        let (parent, name) = split_path(&entry.path);
        let directory = self.beneath.open_dir(parent)?;
        self.make(&directory, name, || make(&directory, name))?;
        self.apply_by_name(&directory, name, entry);
        self.count(entry);
        Ok(())
    }

    /// Makes a directory that only its owner can enter until it is finished; one that exists is shared.
    pub(super) fn create_directory(&self, path: &[u8]) -> io::Result<()> {
        if path.is_empty() {
            return Ok(());
        }
        let (parent, name) = split_path(path);
        let directory = self.beneath.open_dir(parent)?;
        match mkdirat(&directory, name, Mode::RWXU) {
            Err(Errno::EXIST) if Self::is_directory(&directory, name) => Ok(()),
            Err(Errno::EXIST) if self.options.existing == Existing::Overwrite => {
                rustix::fs::unlinkat(&directory, name, AtFlags::empty())?;
                Ok(mkdirat(&directory, name, Mode::RWXU)?)
            }
            other => Ok(other?),
        }
    }

    /// Makes another name of a file that this restore wrote.
    pub(super) fn create_link(&self, entry: &Entry, to: &[u8], files: &LinkedFiles) -> io::Result<()> {
        let expected =
            files.known.get(to).ok_or_else(|| io::Error::other("the file that it names was not restored"))?;
        let (from, from_name) = split_path(to);
        let (parent, name) = split_path(&entry.path);
        let from = self.beneath.open_dir(from)?;
        let directory = self.beneath.open_dir(parent)?;
        // What lies at the first path must still be the file that was written.
        let found = rustix::fs::statat(&from, from_name, AtFlags::SYMLINK_NOFOLLOW)?;
        if (found.st_dev, found.st_ino) != *expected {
            return Err(io::Error::other("the file that it names was replaced"));
        }
        self.make(&directory, name, || linkat(&from, from_name, &directory, name, AtFlags::empty()))?;
        self.count(entry);
        Ok(())
    }
}

/// Files that this restore wrote and that have other names: by path their device and inode.
#[derive(Debug, Default)]
pub(super) struct LinkedFiles {
    known: HashMap<Vec<u8>, (u64, u64)>,
}

impl LinkedFiles {
    pub(super) fn note(&mut self, path: &[u8], file: &OwnedFd) -> io::Result<()> {
        let stat = fstat(file)?;
        self.known.insert(path.to_vec(), (stat.st_dev, stat.st_ino));
        Ok(())
    }
}
