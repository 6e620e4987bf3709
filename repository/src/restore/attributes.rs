//! Owners, permissions, extended attributes and times of what was restored.
//!
//! The order matters: a change of owner clears set-id bits and capabilities, writing does as well, and everything
//! changes times. Each failure is listed on its own and the others are still tried.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmod, chownat, fchmod, fchown,
    fremovexattr, fsetxattr, futimens, lremovexattr, lsetxattr, utimensat,
};
use rustix::io::Errno;

use super::What;
use super::target::Target;
use crate::beneath::{proc_path, proc_path_in};
use crate::manifest::{Entry, Kind, Meta, Time, Xattr, split_path};
use crate::meta::{Subject, xattr_names};

const SET_ID_BITS: u32 = 0o6000;
/// Attributes of these kinds that a new file got from its directory are removed if the entry has none.
const INHERITED: &[u8] = b"system.posix_acl_";

fn times(time: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanoseconds) },
    }
}

/// What attributes are applied to.
enum Object<'a> {
    /// An open file or directory.
    Open(BorrowedFd<'a>),
    /// A name in a directory that is not to be opened: a link, a device, a pipe, a socket. With a handle to it.
    Name { directory: BorrowedFd<'a>, name: &'a [u8], handle: BorrowedFd<'a>, is_link: bool },
}

impl Object<'_> {
    fn chown(&self, uid: Uid, gid: Gid) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => fchown(fd, Some(uid), Some(gid)),
            Self::Name { handle, .. } => chownat(handle, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH),
        }
    }

    fn chmod(&self, mode: Mode) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => fchmod(fd, mode),
            // Links have no permissions of their own.
            Self::Name { is_link: true, .. } => Ok(()),
            Self::Name { handle, .. } => chmod(proc_path(handle), mode),
        }
    }

    fn set(&self, xattr: &Xattr) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => fsetxattr(fd, &xattr.name[..], &xattr.value, XattrFlags::empty()),
            Self::Name { directory, name, .. } => {
                lsetxattr(proc_path_in(directory, name), &xattr.name[..], &xattr.value, XattrFlags::empty())
            }
        }
    }

    fn remove(&self, attribute: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => fremovexattr(fd, attribute),
            Self::Name { directory, name, .. } => lremovexattr(proc_path_in(directory, name), attribute),
        }
    }

    fn touch(&self, times: &Timestamps) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => futimens(fd, times),
            Self::Name { directory, name, .. } => utimensat(directory, *name, times, AtFlags::SYMLINK_NOFOLLOW),
        }
    }

    fn subject(&self) -> Subject<'_> {
        match self {
            Self::Open(fd) => Subject::Open(*fd),
            Self::Name { directory, name, .. } => Subject::Name(*directory, name),
        }
    }
}

impl Target {
    /// Applies the attributes of an open file or directory.
    pub(super) fn apply(&self, fd: &OwnedFd, entry: &Entry) {
        self.apply_to(&Object::Open(fd.as_fd()), entry);
    }

    /// Applies the attributes of what cannot be opened.
    pub(super) fn apply_by_name(&self, directory: &OwnedFd, name: &[u8], entry: &Entry) {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Ok(handle) => {
                let is_link = matches!(entry.kind, Kind::Symlink { .. });
                let (directory, handle) = (directory.as_fd(), handle.as_fd());
                self.apply_to(&Object::Name { directory, name, handle, is_link }, entry);
            }
            Err(error) => self.fail(&entry.path, What::Owner, &error.into()),
        }
    }

    fn apply_to(&self, object: &Object<'_>, entry: &Entry) {
        let Meta { mode, uid, gid, mtime, xattrs, .. } = &entry.meta;
        let mut mode = *mode;
        if self.options.owner {
            let chowned = object.chown(Uid::from_raw(*uid), Gid::from_raw(*gid));
            if let Err(error) = chowned {
                self.fail(&entry.path, What::Owner, &error.into());
                mode = without_set_id(mode, &entry.kind);
            }
        } else {
            mode = without_set_id(mode, &entry.kind);
        }
        if let Err(error) = object.chmod(Mode::from_raw_mode(mode)) {
            self.fail(&entry.path, What::Mode, &error.into());
        }
        self.remove_inherited(object, entry);
        for xattr in xattrs {
            if let Err(error) = object.set(xattr) {
                let name = String::from_utf8_lossy(&xattr.name);
                self.fail_with(&entry.path, What::Attribute, format!("{name}: {}", std::io::Error::from(error)));
            }
        }
        if let Err(error) = object.touch(&times(*mtime)) {
            self.fail(&entry.path, What::Time, &error.into());
        }
    }

    /// Removes access control lists that the entry does not have: a default list of the directory gave them.
    fn remove_inherited(&self, object: &Object<'_>, entry: &Entry) {
        let names = match xattr_names(object.subject()) {
            Ok(names) => names,
            Err(error) => return self.fail(&entry.path, What::Attribute, &error),
        };
        let of_entry = |name: &[u8]| entry.meta.xattrs.iter().any(|xattr| xattr.name == name);
        for name in names.iter().filter(|name| name.starts_with(INHERITED) && !of_entry(name)) {
            if let Err(error) = object.remove(name) {
                self.fail(&entry.path, What::Attribute, &error.into());
            }
        }
    }

    /// Applies the attributes of a directory, after everything in it is there.
    pub(super) fn finish_directory(&self, entry: &Entry) {
        match self.beneath.open_at(&entry.path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(directory) => {
                self.apply(&directory, entry);
                self.count(entry);
            }
            Err(error) => {
                let (parent, name) = split_path(&entry.path);
                // That it could not be made is listed already.
                let is_there = self.beneath.open_dir(parent).is_ok_and(|parent| Self::is_directory(&parent, name));
                if is_there {
                    self.fail(&entry.path, What::Mode, &error);
                    self.count(entry);
                }
            }
        }
    }
}

/// For a regular file, the mode without the bits that give the rights of its owner to whoever runs it.
fn without_set_id(mode: u32, kind: &Kind) -> u32 {
    if matches!(kind, Kind::Regular(_)) { mode & !SET_ID_BITS } else { mode }
}
