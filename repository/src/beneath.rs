//! Opening what lies below a directory, and never anything else: no symbolic link on the way is followed, no `..`
//! leads out. Trees change while they are read, and a repository may be hostile when it is restored.
//!
//! `openat2` (Linux 5.6) does it in one call; where it is missing or forbidden, each component is opened on its own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use crate::manifest::is_valid_path;

/// The kernel takes paths below 4096 bytes; longer ones are opened in steps.
const STEP_BYTES: usize = 3500;
/// `openat2` asks for another try when something was renamed on the way.
const TRIES: usize = 16;
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// A directory, and all that may be opened through it.
#[derive(Debug)]
pub(crate) struct Beneath {
    root: OwnedFd,
    by_steps: AtomicBool,
}

impl Beneath {
    /// Opens the directory itself; symbolic links to it are followed.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let root = openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root, by_steps: AtomicBool::new(false) })
    }

    #[cfg(test)]
    pub(crate) fn without_openat2(path: &Path) -> io::Result<Self> {
        let beneath = Self::open(path)?;
        beneath.by_steps.store(true, Ordering::Relaxed);
        Ok(beneath)
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens what lies at the path. `flags` should hold `NOFOLLOW`, or a link at the end fails with `ELOOP` as well.
    pub(crate) fn open_at(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        if !is_valid_path(path) {
            return Err(Errno::INVAL.into());
        }
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at: Option<OwnedFd> = None;
        let mut rest = path;
        while rest.len() > STEP_BYTES {
            let Some(end) = rest[..STEP_BYTES].iter().rposition(|byte| *byte == b'/') else {
                return Err(Errno::NAMETOOLONG.into());
            };
            let from = at.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
            at = Some(self.step(from, &rest[..end], OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC)?);
            rest = &rest[end + 1..];
        }
        let from = at.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
        self.step(from, if rest.is_empty() { b"." } else { rest }, flags)
    }

    /// Opens a directory as a base for other calls; it needs no right to read it.
    pub(crate) fn open_dir(&self, path: &[u8]) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    fn step(&self, from: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        if self.by_steps.load(Ordering::Relaxed) {
            return Ok(by_components(from, path, flags)?);
        }
        let mut tries = 0;
        loop {
            match openat2(from, path, flags, Mode::empty(), RESOLVE) {
                Err(Errno::AGAIN | Errno::INTR) if tries < TRIES => tries += 1,
                Err(Errno::NOSYS) => {
                    self.by_steps.store(true, Ordering::Relaxed);
                    return Ok(by_components(from, path, flags)?);
                }
                // Old filters of system calls answer unknown ones like this; so does the kernel without a right.
                Err(Errno::PERM) => return Ok(by_components(from, path, flags)?),
                other => return Ok(other?),
            }
        }
    }
}

fn by_components(from: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let on_the_way = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at: Option<OwnedFd> = None;
    let mut names = path.split(|byte| *byte == b'/').peekable();
    while let Some(name) = names.next() {
        let is_last = names.peek().is_none();
        let from = at.as_ref().map_or(from, AsFd::as_fd);
        let flags = if is_last { flags | OFlags::NOFOLLOW } else { on_the_way };
        at = Some(openat(from, name, flags, Mode::empty())?);
    }
    at.ok_or(Errno::INVAL)
}

/// The path that stands for an open file, for calls that take no descriptor. It needs `/proc`.
pub(crate) fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// The path that stands for a name in an open directory, for calls that take no directory.
pub(crate) fn proc_path_in(directory: impl AsFd, name: &[u8]) -> Vec<u8> {
    [proc_path(directory).as_bytes(), b"/", name].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_and_parents_are_not_followed() {
        let base = tempfile::tempdir().unwrap();
        let tree = base.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/b/file"), "x").unwrap();
        fs::write(base.path().join("secret"), "s").unwrap();
        symlink("b", tree.join("a/inner")).unwrap();
        symlink("..", tree.join("up")).unwrap();
        symlink("/", tree.join("slash")).unwrap();
        symlink("a/b/file", tree.join("last")).unwrap();
        for beneath in [Beneath::open(&tree).unwrap(), Beneath::without_openat2(&tree).unwrap()] {
            assert!(beneath.open_at(b"a/b/file", OFlags::RDONLY).is_ok());
            assert!(beneath.open_dir(b"").is_ok());
            assert!(beneath.open_dir(b"a/b").is_ok());
            for path in [
                &b"a/inner/file"[..],
                b"up/secret",
                b"slash/etc",
                b"last",
                b"../secret",
                b"/etc/passwd",
                b"a/../../secret",
            ] {
                assert!(beneath.open_at(path, OFlags::RDONLY).is_err(), "{path:?}");
            }
            assert!(beneath.open_dir(b"a/b/file").is_err());
        }
    }

    #[test]
    fn paths_longer_than_the_kernel_takes_are_opened() {
        let base = tempfile::tempdir().unwrap();
        let name = "d".repeat(200);
        let mut path = Vec::new();
        let mut at = openat(CWD, base.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..30 {
            rustix::fs::mkdirat(&at, name.as_str(), Mode::RWXU).unwrap();
            at = openat(&at, name.as_str(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
            path.extend_from_slice(if path.is_empty() { b"" } else { b"/" });
            path.extend_from_slice(name.as_bytes());
        }
        assert!(path.len() > 4096);
        assert!(Beneath::open(base.path()).unwrap().open_dir(&path).is_ok());
        assert!(Beneath::without_openat2(base.path()).unwrap().open_dir(&path).is_ok());
    }
}
