//! File system calls that cannot leave a target directory, whatever paths and links say.
//!
//! A repository may be hostile, and the target may be written by others meanwhile: directories are opened with
//! `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`, and only last components are created.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::manifest::entry::{is_valid_path, split_last};

/// A directory that nothing is written outside of.
#[derive(Debug, Clone)]
pub(crate) struct Beneath {
    root: Arc<OwnedFd>,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Beneath {
    /// Opens the target; the last part of its own path may be a link.
    pub(crate) fn new(root: &Path) -> io::Result<Self> {
        Ok(Self { root: Arc::new(rustix::fs::open(root, DIRECTORY, Mode::empty())?) })
    }

    /// The target itself.
    pub(crate) fn root(&self) -> &Arc<OwnedFd> {
        &self.root
    }

    /// Opens a directory below the target, through directories only.
    pub(crate) fn open_directory(&self, path: &[u8]) -> io::Result<Arc<OwnedFd>> {
        if path.is_empty() {
            return Ok(Arc::clone(&self.root));
        }
        if !is_valid_path(path) {
            return Err(Errno::INVAL.into());
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(&self.root, path, DIRECTORY | OFlags::NOFOLLOW, Mode::empty(), resolve) {
            Ok(directory) => Ok(Arc::new(directory)),
            // Kernels before 5.6, and sandboxes that refuse calls that they do not know.
            Err(Errno::NOSYS | Errno::PERM) => self.open_by_steps(path),
            Err(error) => Err(error.into()),
        }
    }

    /// The same without `openat2`: one component at a time, none of them a link.
    fn open_by_steps(&self, path: &[u8]) -> io::Result<Arc<OwnedFd>> {
        let mut directory = Arc::clone(&self.root);
        for part in path.split(|byte| *byte == b'/') {
            directory = Arc::new(rustix::fs::openat(&directory, part, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?);
        }
        Ok(directory)
    }

    /// The open parent of a path, and the last component.
    pub(crate) fn parent<'a>(&self, path: &'a [u8]) -> io::Result<(Arc<OwnedFd>, &'a [u8])> {
        if path.is_empty() || !is_valid_path(path) {
            return Err(Errno::INVAL.into());
        }
        let (parent, name) = split_last(path);
        Ok((self.open_directory(parent)?, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_dots_do_not_lead_out() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a/b")).unwrap();
        std::os::unix::fs::symlink("/etc", root.path().join("out")).unwrap();
        std::os::unix::fs::symlink("a", root.path().join("in")).unwrap();
        let beneath = Beneath::new(root.path()).unwrap();
        assert!(beneath.open_directory(b"a/b").is_ok());
        assert!(beneath.open_by_steps(b"a/b").is_ok());
        for path in [&b"out"[..], b"in", b"in/b", b"..", b"a/../..", b"/etc", b"a//b"] {
            assert!(beneath.open_directory(path).is_err(), "{path:?}");
        }
        for path in [&b"out"[..], b"in/b"] {
            assert!(beneath.open_by_steps(path).is_err(), "{path:?}");
        }
        assert!(beneath.parent(b"out/passwd").is_err());
        assert!(beneath.parent(b"a/new").is_ok());
    }
}
