//! Metadata of entries, from and to the file system.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{FileType, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use crate::manifest::{Entry, Kind, Meta, Times, Xattr};

/// Values of extended attributes are at most 64 KiB in Linux.
const MAX_XATTR_BYTES: usize = 64 << 10;

/// The metadata of a stat, without attributes.
pub(crate) fn of_stat(stat: &Stat) -> Meta {
    let nanos = |value: u64| u32::try_from(value).unwrap_or(0);
    Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        times: Times {
            mtime: (stat.st_mtime, nanos(stat.st_mtime_nsec)),
            ctime: (stat.st_ctime, nanos(stat.st_ctime_nsec)),
        },
        inode: stat.st_ino,
        xattrs: Vec::new(),
    }
}

/// What a stat says an entry is; a symbolic link's target and a file's data are filled in by the caller.
pub(crate) fn kind_of_stat(stat: &Stat) -> Option<Kind> {
    Some(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File { size: stat.st_size.cast_unsigned(), extents: Vec::new() },
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink { target: Vec::new() },
        FileType::CharacterDevice => Kind::CharDevice { device: stat.st_rdev },
        FileType::BlockDevice => Kind::BlockDevice { device: stat.st_rdev },
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::Unknown => return None,
    })
}

/// The path of an entry of an open directory, for calls that only take paths. It never follows a link in the last part.
fn proc_path(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<CString> {
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend_from_slice(if name.is_empty() { b"." } else { name });
    CString::new(path).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn with_growing_buffer(call: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 256];
    loop {
        match call(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < MAX_XATTR_BYTES => buffer.resize(buffer.len() * 4, 0),
            Err(error) => return Err(error),
        }
    }
}

/// All extended attributes of an entry, sorted by name. A file system without them has none.
pub(crate) fn read_xattrs(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<Xattr>> {
    let path = proc_path(directory, name)?;
    let names = match with_growing_buffer(|buffer| rustix::fs::llistxattr(&path, buffer)) {
        Ok(names) => names,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut xattrs = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let attribute = CString::new(name)?;
        match with_growing_buffer(|buffer| rustix::fs::lgetxattr(&path, &attribute, buffer)) {
            Ok(value) => xattrs.push(Xattr { name: name.to_vec(), value }),
            // Removed meanwhile, or one that this file system lists but does not give.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    xattrs.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(xattrs)
}

/// What could not be restored of an entry's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MetaFailure {
    pub(crate) what: &'static str,
    pub(crate) errno: Errno,
}

/// Restores owner, attributes, mode and times, in an order in which none undoes another.
///
/// Goes on after a failure and returns all of them.
pub(crate) fn apply(directory: BorrowedFd<'_>, name: &[u8], entry: &Entry, owner: bool) -> Vec<MetaFailure> {
    let mut failures = Vec::new();
    let mut note = |what, result: Result<(), Errno>| {
        if let Err(errno) = result {
            failures.push(MetaFailure { what, errno });
        }
    };
    let meta = &entry.meta;
    let is_link = matches!(entry.kind, Kind::Symlink { .. });
    // An empty name stands for the directory itself.
    let at = if name.is_empty() { b"." } else { name };
    let nofollow = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    if owner {
        let (uid, gid) = (rustix::fs::Uid::from_raw(meta.uid), rustix::fs::Gid::from_raw(meta.gid));
        note("owner", rustix::fs::chownat(directory, at, Some(uid), Some(gid), nofollow));
    }
    // Changing the owner clears set-user-id and capabilities: these come after it.
    if !is_link {
        let mode = rustix::fs::Mode::from_raw_mode(meta.mode);
        note("mode", chmod(directory, at, mode));
    }
    if let Ok(path) = proc_path(directory, name) {
        for xattr in &meta.xattrs {
            let Ok(attribute) = CString::new(xattr.name.clone()) else { continue };
            note(
                "extended attribute",
                rustix::fs::lsetxattr(&path, &attribute, &xattr.value, rustix::fs::XattrFlags::empty()),
            );
        }
    }
    let mtime = Timespec { tv_sec: meta.times.mtime.0, tv_nsec: i64::from(meta.times.mtime.1) };
    note(
        "times",
        rustix::fs::utimensat(directory, at, &Timestamps { last_access: mtime, last_modification: mtime }, nofollow),
    );
    failures
}

/// Linux has no chmod that refuses to follow links before `fchmodat2`; the name was created by us and is no link.
fn chmod(directory: BorrowedFd<'_>, name: &[u8], mode: rustix::fs::Mode) -> Result<(), Errno> {
    use rustix::fs::{AtFlags, OFlags};
    let file = rustix::fs::openat(
        directory,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) == FileType::Symlink {
        return Err(Errno::LOOP);
    }
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    rustix::fs::chmodat(rustix::fs::CWD, path, mode, AtFlags::empty())
}
