//! Writes a large file past the page cache: what arrives in any order and at any offset is gathered to long aligned runs.
//!
//! A restore writes much that nobody reads at once. Through the page cache it cost more CPU time than all the rest of a
//! restore, and pushed out what others have there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::write::write_all;
use crate::aligned::{ALIGNMENT, AlignedBuffer, RUN_BYTES};
use crate::beneath::proc_path;

/// Smaller files go through the page cache.
pub(super) const MIN_BYTES: u64 = 1 << 20;
/// Runs that are gathered at the same time, all files together: 32 MiB. What finds no room goes through the page cache.
const MAX_OPEN: usize = 16;

/// Room for runs, shared by the files of a restore.
#[derive(Debug, Default)]
pub(super) struct Room(AtomicUsize);

/// A run's place in [`Room`].
struct Taken(Arc<Room>);

impl Room {
    fn take(self: &Arc<Self>) -> Option<Taken> {
        let taken =
            self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |open| (open < MAX_OPEN).then_some(open + 1));
        taken.ok().map(|_| Taken(Arc::clone(self)))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A run that is not whole yet.
struct Run {
    buffer: AlignedBuffer,
    /// What of the buffer was written, in order, apart from each other. Only this may reach the file: the rest of the
    /// buffer is what another file left there.
    filled: Vec<Range<usize>>,
    _room: Taken,
}

impl Run {
    fn fill(&mut self, at: usize, bytes: &[u8]) {
        let range = at..at + bytes.len();
        self.buffer[range.clone()].copy_from_slice(bytes);
        let place = self.filled.partition_point(|before| before.start < at);
        self.filled.insert(place, range);
        self.filled.dedup_by(|next, before| {
            let joins = next.start <= before.end;
            if joins {
                before.end = before.end.max(next.end);
            }
            joins
        });
    }

    fn is_whole(&self, len: usize) -> bool {
        self.filled.first().is_some_and(|first| *first == (0..len))
    }
}

/// A file of which runs are gathered.
pub(super) struct Runs {
    /// The file again, opened for direct writes: others write through the cache at the same time.
    direct: OwnedFd,
    /// Whether the file system takes them.
    is_direct: AtomicBool,
    size: u64,
    /// By their offset in the file.
    open: Mutex<BTreeMap<u64, Run>>,
    room: Arc<Room>,
}

impl Runs {
    /// `None` where the file cannot be written directly.
    pub(super) fn new(file: &OwnedFd, size: u64, room: &Arc<Room>) -> Option<Self> {
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let direct = openat(CWD, proc_path(file), flags, Mode::empty()).ok()?;
        let (is_direct, room) = (AtomicBool::new(true), Arc::clone(room));
        Some(Self { direct, is_direct, size, open: Mutex::default(), room })
    }

    fn open(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Run>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a part of the file, and writes the runs that it makes whole. Blocking.
    pub(super) fn write(&self, file: &OwnedFd, mut at: u64, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let within = usize::try_from(at % RUN_BYTES as u64).unwrap_or(0);
            let (part, rest) = bytes.split_at(bytes.len().min(RUN_BYTES - within));
            self.write_part(file, at - within as u64, within, part)?;
            at += part.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    fn write_part(&self, file: &OwnedFd, start: u64, within: usize, part: &[u8]) -> Result<(), Errno> {
        let whole = {
            let mut open = self.open();
            if !open.contains_key(&start)
                && let Some(room) = self.room.take()
            {
                open.insert(start, Run { buffer: AlignedBuffer::take(), filled: Vec::new(), _room: room });
            }
            let Some(run) = open.get_mut(&start) else {
                drop(open);
                return write_all(file, part, start + within as u64);
            };
            run.fill(within, part);
            let len = self.size.saturating_sub(start).min(RUN_BYTES as u64);
            let is_whole = run.is_whole(usize::try_from(len).unwrap_or(RUN_BYTES));
            if is_whole { open.remove(&start) } else { None }
        };
        whole.map_or(Ok(()), |run| self.write_run(file, start, &run))
    }

    /// What is in the run goes to the file, as much of it as possible directly.
    fn write_run(&self, file: &OwnedFd, start: u64, run: &Run) -> Result<(), Errno> {
        for range in &run.filled {
            let mut range = range.clone();
            let aligned = range.end / ALIGNMENT * ALIGNMENT;
            if range.start == 0 && aligned > 0 && self.is_direct.load(Ordering::Relaxed) {
                match write_all(&self.direct, &run.buffer[..aligned], start) {
                    Ok(()) => range.start = aligned,
                    // Larger blocks than ours, or a file system that finds out late: it is written again.
                    Err(Errno::INVAL) => self.is_direct.store(false, Ordering::Relaxed),
                    Err(error) => return Err(error),
                }
            }
            write_all(file, &run.buffer[range.clone()], start + range.start as u64)?;
        }
        Ok(())
    }

    /// Writes what did not become whole. Blocking.
    pub(super) fn finish(&self, file: &OwnedFd) -> Result<(), Errno> {
        let open = std::mem::take(&mut *self.open());
        open.iter().try_for_each(|(start, run)| self.write_run(file, *start, run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};
    use std::path::Path;

    /// Parts in any order, one of them missing; on the file system that the tests have, and on one in memory.
    #[test]
    fn what_arrives_in_any_order_is_what_lies_there() {
        let mut random = rand::rngs::SmallRng::seed_from_u64(1);
        for folder in [std::env::temp_dir().as_path(), Path::new("/dev/shm")] {
            for size in [1, RUN_BYTES, 5 * RUN_BYTES + 4096, 20 * RUN_BYTES + 12_345] {
                let mut bytes = vec![0; size];
                blake3::Hasher::new().update(&size.to_le_bytes()).finalize_xof().fill(&mut bytes);
                let mut parts = Vec::new();
                let mut at = 0;
                while at < size {
                    let end = size.min(at + random.random_range(1..1_500_000));
                    parts.push(at..end);
                    at = end;
                }
                for shuffled in [false, true] {
                    if shuffled {
                        parts.shuffle(&mut random);
                    }
                    let left_out = parts[parts.len() / 2].clone();
                    let path = tempfile::NamedTempFile::new_in(folder).unwrap();
                    let file = OwnedFd::from(std::fs::File::options().write(true).open(path.path()).unwrap());
                    let room = Arc::default();
                    let Some(runs) = Runs::new(&file, size as u64, &room) else {
                        panic!("{} takes no direct writes", folder.display())
                    };
                    for part in parts.iter().filter(|part| **part != left_out) {
                        runs.write(&file, part.start as u64, &bytes[part.clone()]).unwrap();
                    }
                    assert!(room.0.load(Ordering::SeqCst) <= MAX_OPEN);
                    runs.finish(&file).unwrap();
                    assert_eq!(room.0.load(Ordering::SeqCst), 0);
                    rustix::fs::ftruncate(&file, size as u64).unwrap();
                    let mut expected = bytes.clone();
                    expected[left_out].fill(0);
                    assert!(std::fs::read(path.path()).unwrap() == expected, "{size} in {}", folder.display());
                }
            }
        }
    }
}
