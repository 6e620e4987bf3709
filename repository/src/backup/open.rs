//! Opens files to be read, reads from them, and says why one cannot be read. Stores nothing.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::{Errno, ReadWriteFlags, pread, preadv2};

use super::compare::{size_and_sparse, without_xattrs};
use super::read::Context;
use crate::manifest::{Contents, Entry, Kind, Reason};
use crate::meta;

/// File systems keep times in steps of up to 10 ms. A file that was changed so shortly before it was read could be
/// changed again with the same times; it is read again by the next backup.
const TIME_STEP_MS: i128 = 20;

pub(super) fn reason(error: Errno) -> Reason {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Reason::Vanished,
        other => Reason::Unreadable { error: std::io::Error::from(other).to_string() },
    }
}

fn reason_of(error: &std::io::Error) -> Reason {
    match error.raw_os_error() {
        Some(number) => reason(Errno::from_raw_os_error(number)),
        None => Reason::Unreadable { error: error.to_string() },
    }
}

/// A file that was opened to be read.
pub(super) struct Opened {
    pub(super) file: OwnedFd,
    /// Why its entry lacks the extended attributes, if it does.
    pub(super) without_xattrs: Option<Reason>,
}

/// Opens a file and brings its entry up to the state at this moment, extended attributes included.
pub(super) fn open(context: &Context, entry: &mut Entry) -> Result<Opened, Reason> {
    if let Some(hook) = &context.hooks.before_open {
        hook(&entry.path);
    }
    let Some(root) = &context.root else { return Err(Reason::Vanished) };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    // Only the owner may leave the access time alone.
    let file = root
        .open_at(&entry.path, flags | OFlags::NOATIME)
        .or_else(|error| match error.raw_os_error() {
            Some(number) if number == Errno::PERM.raw_os_error() => root.open_at(&entry.path, flags),
            _ => Err(error),
        })
        .map_err(|error| reason_of(&error))?;
    let stat = fstat(&file).map_err(reason)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Reason::Vanished);
    }
    let found = meta::of_stat(&stat);
    if (found.ctime, found.inode) != (entry.meta.ctime, entry.meta.inode) && entry.meta.inode != 0 {
        entry.meta = found;
    }
    let mut without = None;
    match meta::xattrs_of(&file) {
        Ok(xattrs) => entry.meta.xattrs = xattrs,
        Err(error) => {
            // The entry is kept without them, listed, and looked at again next time.
            entry.meta.inode = 0;
            without = Some(without_xattrs(&error));
        }
    }
    let changed_ms = i128::from(entry.meta.ctime.seconds) * 1000 + i128::from(entry.meta.ctime.nanoseconds / 1_000_000);
    if (i128::from(crate::clock::now().as_millisecond()) - changed_ms).abs() < TIME_STEP_MS {
        entry.meta.inode = 0;
    }
    if let Kind::Regular(regular) = &mut entry.kind {
        (regular.size, regular.sparse) = size_and_sparse(&stat);
        regular.contents = Contents::default();
        regular.page_map = Contents::default();
    }
    Ok(Opened { file, without_xattrs: without })
}

/// Reads until `buffer` is full.
pub(super) fn read_full(file: &OwnedFd, buffer: &mut [u8], offset: u64) -> Result<(), Reason> {
    fill(buffer, |rest, done| pread(file, rest, offset + done))
}

/// `RWF_DONTCACHE` of Linux 6.14: pages that the read brought into the page cache leave it again, others stay.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// As [`read_full`], but leaves the page cache as it was, if the kernel and the file system can do that; else `can` is
/// set to `false`, and no longer tried.
pub(super) fn read_uncached(file: &OwnedFd, buffer: &mut [u8], offset: u64, can: &mut bool) -> Result<(), Reason> {
    fill(buffer, |rest, done| {
        let at = offset + done;
        if *can {
            match preadv2(file, &mut [IoSliceMut::new(rest)], at, DONTCACHE) {
                // What old kernels, file systems without it and filters of system calls say.
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::PERM) => *can = false,
                read => return read,
            }
        }
        pread(file, rest, at)
    })
}

fn fill(buffer: &mut [u8], mut read: impl FnMut(&mut [u8], u64) -> Result<usize, Errno>) -> Result<(), Reason> {
    let mut done = 0;
    while done < buffer.len() {
        match read(&mut buffer[done..], done as u64) {
            Ok(0) => return Err(Reason::Shrunk),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(reason(error)),
        }
    }
    Ok(())
}
