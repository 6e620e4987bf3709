//! Freezes and thaws a file system by the kernel's own calls, FIFREEZE and FITHAW.
//!
//! The one module with `unsafe`: these two calls have no safe wrapper.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};
use thiserror::Error;

const FIFREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
const FITHAW: Opcode = opcode::read_write::<i32>(b'X', 120);

/// A file system that cannot be frozen or thawed.
#[derive(Debug, Error)]
pub(crate) enum FreezeError {
    #[error("cannot open the volume")]
    Open(#[source] io::Error),
    #[error(
        "the volume lies on the node's own file system, which must not be frozen; use exec, hold or a template instead"
    )]
    NodesOwn,
    #[error("somebody else has frozen the file system already")]
    AlreadyFrozen,
    #[error("its file system cannot be frozen; use exec, hold or a template instead")]
    Unsupported,
    #[error("the kernel does not freeze the file system")]
    Freeze(#[source] io::Error),
    #[error("the kernel does not thaw the file system")]
    Thaw(#[source] io::Error),
}

/// A volume's file system, held open so that it can be thawed also when its path is gone.
#[derive(Debug)]
pub(crate) struct FileSystem {
    root: File,
    path: PathBuf,
}

impl FileSystem {
    /// Opens the volume at `path`; refuses one that shares its file system with `nodes_own`.
    pub(crate) fn open(path: &Path, nodes_own: &Path) -> Result<Self, FreezeError> {
        let root = File::open(path).map_err(FreezeError::Open)?;
        let device = root.metadata().map_err(FreezeError::Open)?.dev();
        if device == std::fs::metadata(nodes_own).map_err(FreezeError::Open)?.dev() {
            return Err(FreezeError::NodesOwn);
        }
        Ok(Self { root, path: path.to_owned() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Freezes it. What is dirty is written before, so that writers are blocked for a moment only.
    pub(crate) fn freeze(&self) -> Result<(), FreezeError> {
        rustix::fs::syncfs(&self.root).map_err(|error| FreezeError::Freeze(error.into()))?;
        match call::<FIFREEZE>(&self.root) {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(FreezeError::AlreadyFrozen),
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => Err(FreezeError::Unsupported),
            Err(error) => Err(FreezeError::Freeze(error.into())),
        }
    }

    /// Thaws it; one that is not frozen is left as it is.
    pub(crate) fn thaw(&self) -> Result<(), FreezeError> {
        match call::<FITHAW>(&self.root) {
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(error) => Err(FreezeError::Thaw(error.into())),
        }
    }
}

/// Thaws what is mounted at `path`, if anything is.
pub(crate) fn thaw_at(path: &Path) -> Result<(), FreezeError> {
    match File::open(path) {
        Ok(root) => FileSystem { root, path: path.to_owned() }.thaw(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(FreezeError::Open(error)),
    }
}

fn call<const CODE: Opcode>(root: &impl AsFd) -> Result<(), Errno> {
    // SAFETY: both calls take a number that the kernel does not look at, and touch no memory of this process.
    unsafe { ioctl(root, NoArg::<CODE>::new()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_own_file_system_is_never_frozen() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        assert!(matches!(FileSystem::open(&volume, folder.path()), Err(FreezeError::NodesOwn)));
        assert!(matches!(FileSystem::open(&folder.path().join("none"), folder.path()), Err(FreezeError::Open(_))));
        thaw_at(&folder.path().join("none")).unwrap();
    }

    #[test]
    fn the_numbers_of_the_calls_are_the_kernels() {
        assert_eq!((FIFREEZE, FITHAW), (0xC004_5877, 0xC004_5878));
    }
}
