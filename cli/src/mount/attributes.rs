//! What an entry looks like to the kernel.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use jiff::Timestamp;
use lifeboat_repository::manifest::{Entry, Kind, Time};

/// The unit in which programs should read.
const READ_BYTES: u32 = 128 << 10;
const SECTOR_BYTES: u64 = 512;
/// A file that has holes, of which nobody knows how many, is shown by so many sectors smaller than it is: programs look
/// for holes then.
const UNKNOWN_HOLE_SECTORS: u64 = 8;

/// The attributes of an entry, which is no hard link; `allocated`: bytes of a file that are no holes, if that is known.
pub(super) fn of_entry(number: u64, entry: &Entry, allocated: Option<u64>) -> FileAttr {
    let (kind, device) = match &entry.kind {
        Kind::Directory => (FileType::Directory, 0),
        Kind::Symlink { .. } => (FileType::Symlink, 0),
        Kind::Fifo => (FileType::NamedPipe, 0),
        Kind::Socket => (FileType::Socket, 0),
        Kind::CharDevice { major, minor } => (FileType::CharDevice, device(*major, *minor)),
        Kind::BlockDevice { major, minor } => (FileType::BlockDevice, device(*major, *minor)),
        Kind::Regular(_) | Kind::Link { .. } => (FileType::RegularFile, 0),
    };
    let sectors = entry.size().div_ceil(SECTOR_BYTES);
    let blocks = match (&entry.kind, allocated) {
        (Kind::Regular(_), Some(bytes)) => bytes.div_ceil(SECTOR_BYTES),
        (Kind::Regular(_), None) => sectors.saturating_sub(UNKNOWN_HOLE_SECTORS).max(1),
        _ => 0,
    };
    let mtime = time(entry.meta.mtime);
    // The time of the inode is kept only where a later backup may rely on it.
    let ctime = if entry.meta.ctime == Time::default() { mtime } else { time(entry.meta.ctime) };
    FileAttr {
        ino: INodeNo(number),
        size: entry.size(),
        blocks,
        atime: mtime,
        mtime,
        ctime,
        crtime: UNIX_EPOCH,
        kind,
        perm: u16::try_from(entry.meta.mode & 0o7777).unwrap_or(0),
        // How many other names a file has is known only after reading the whole manifest; more than one makes programs
        // look for them. A directory with 1 is one whose subdirectories are not counted.
        nlink: if matches!(&entry.kind, Kind::Regular(file) if file.linked) { 2 } else { 1 },
        uid: entry.meta.uid,
        gid: entry.meta.gid,
        rdev: device,
        blksize: READ_BYTES,
        flags: 0,
    }
}

/// The attributes of a folder or link above the trees.
pub(super) fn above(number: u64, link: Option<&str>, time: Timestamp, owner: (u32, u32)) -> FileAttr {
    let time = SystemTime::from(time);
    FileAttr {
        ino: INodeNo(number),
        size: link.map_or(0, str::len) as u64,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: UNIX_EPOCH,
        kind: if link.is_some() { FileType::Symlink } else { FileType::Directory },
        perm: if link.is_some() { 0o777 } else { 0o755 },
        nlink: 1,
        uid: owner.0,
        gid: owner.1,
        rdev: 0,
        blksize: READ_BYTES,
        flags: 0,
    }
}

/// A device's number as the kernel encodes it in 32 bits: 12 of the major number around 20 of the minor one.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// Times of all that file systems keep; what no clock can show becomes the epoch.
fn time(time: Time) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    let nanoseconds = Duration::from_nanos(time.nanoseconds.into());
    whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_time_has_a_form() {
        let half_before = time(Time { seconds: -1, nanoseconds: 500_000_000 });
        assert_eq!(UNIX_EPOCH.duration_since(half_before).unwrap(), Duration::from_millis(500));
        let later = time(Time { seconds: 5, nanoseconds: 7 });
        assert_eq!(later.duration_since(UNIX_EPOCH).unwrap(), Duration::new(5, 7));
        time(Time { seconds: i64::MAX, nanoseconds: 999_999_999 });
        time(Time { seconds: i64::MIN, nanoseconds: 0 });
    }

    #[test]
    fn devices_are_encoded_as_the_kernel_does() {
        assert_eq!(device(1, 3), 0x0103);
        assert_eq!(device(0x103, 0x1_1170), 0x1111_0370);
    }
}
