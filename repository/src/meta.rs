//! Ownership, times and extended attributes: as the file system gives them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Stat, fgetxattr, flistxattr, lgetxattr, llistxattr};
use rustix::io::Errno;

use crate::beneath::proc_path_in;
use crate::manifest::{Meta, Time, Xattr};

/// More attributes than this of one file are not kept (it is listed as skipped).
pub(crate) const MAX_XATTR_BYTES: usize = 1 << 20;

/// Permissions, owner, times and inode; the attributes are empty.
pub(crate) fn of_stat(stat: &Stat) -> Meta {
    // The kernel keeps nanoseconds below 10⁹.
    let time = |seconds, nanoseconds| Time { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) };
    Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
        xattrs: Vec::new(),
    }
}

/// Whose attributes are read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Subject<'a> {
    /// An open file.
    Open(BorrowedFd<'a>),
    /// A name in an open directory; a link is not followed. An empty name is the directory itself.
    Name(BorrowedFd<'a>, &'a [u8]),
}

impl Subject<'_> {
    fn list(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Open(fd) => flistxattr(fd, buffer),
            Self::Name(directory, b"") => flistxattr(directory, buffer),
            Self::Name(directory, name) => llistxattr(proc_path_in(directory, name), buffer),
        }
    }

    fn get(&self, attribute: &[u8], buffer: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Open(fd) => fgetxattr(fd, attribute, buffer),
            Self::Name(directory, b"") => fgetxattr(directory, attribute, buffer),
            Self::Name(directory, name) => lgetxattr(proc_path_in(directory, name), attribute, buffer),
        }
    }
}

/// Calls with a growing buffer until the answer fits.
fn with_buffer(mut call: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 512];
    loop {
        match call(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < MAX_XATTR_BYTES => buffer.resize(buffer.len() * 8, 0),
            Err(Errno::RANGE) => return Err(Errno::TOOBIG),
            Err(error) => return Err(error),
        }
    }
}

/// The names of the extended attributes, sorted.
pub(crate) fn xattr_names(subject: Subject<'_>) -> io::Result<Vec<Vec<u8>>> {
    let list = match with_buffer(|buffer| subject.list(buffer)) {
        Ok(list) => list,
        // A file system without attributes.
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut names: Vec<_> = list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect();
    names.sort_unstable();
    Ok(names)
}

/// The extended attributes by name: access control lists and capabilities among them.
pub(crate) fn xattrs(subject: Subject<'_>) -> io::Result<Vec<Xattr>> {
    let mut xattrs = Vec::new();
    let mut total = 0;
    for name in xattr_names(subject)? {
        let value = match with_buffer(|buffer| subject.get(&name, buffer)) {
            Ok(value) => value,
            // Removed since the names were read.
            Err(Errno::NODATA) => continue,
            Err(error) => return Err(error.into()),
        };
        total += name.len() + value.len();
        if total > MAX_XATTR_BYTES {
            return Err(Errno::TOOBIG.into());
        }
        xattrs.push(Xattr { name, value });
    }
    Ok(xattrs)
}

/// The attributes of an open file.
pub(crate) fn xattrs_of(file: &impl AsFd) -> io::Result<Vec<Xattr>> {
    xattrs(Subject::Open(file.as_fd()))
}
