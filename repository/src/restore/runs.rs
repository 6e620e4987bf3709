//! Writes a large file past the page cache: what arrives in any order and at any offset is gathered to long aligned runs.
//!
//! A restore writes much that nobody reads at once. Through the page cache it cost more CPU time than all the rest of a
//! restore, and pushed out what others have there.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use roaring::RoaringTreemap;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::write::write_all;
use crate::aligned::{ALIGNMENT, AlignedBuffer, RUN_BYTES};
use crate::beneath::proc_path;

/// Smaller files go through the page cache.
pub(super) const MIN_BYTES: u64 = 1 << 20;
/// Runs that are gathered at the same time, all files together: 32 MiB. What finds no room goes through the page cache.
const MAX_OPEN: usize = 16;
/// Parts up to this length open no run, they wait for it: pages that changed arrive before what lies around them.
const SMALL_BYTES: usize = 64 << 10;
/// So many bytes wait at most, all files together.
const MAX_WAITING_BYTES: usize = 8 << 20;

/// Room for runs and for parts that wait, shared by the files of a restore.
#[derive(Debug, Default)]
pub(super) struct Room {
    runs: AtomicUsize,
    waiting: AtomicUsize,
}

/// A place in [`Room`]: so much of one of its counts.
struct Taken {
    room: Arc<Room>,
    count: fn(&Room) -> &AtomicUsize,
    much: usize,
}

impl Taken {
    fn take(room: &Arc<Room>, count: fn(&Room) -> &AtomicUsize, much: usize, most: usize) -> Option<Self> {
        let more = |taken: usize| taken.checked_add(much).filter(|taken| *taken <= most);
        count(room).try_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        Some(Self { room: Arc::clone(room), count, much })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        (self.count)(&self.room).fetch_sub(self.much, Ordering::SeqCst);
    }
}

/// A run that is not whole yet.
struct Run {
    buffer: AlignedBuffer,
    /// What of the buffer was written, in order, apart from each other. Only this may reach the file: the rest of the
    /// buffer is what another file left there.
    filled: Vec<Range<usize>>,
    _room: Option<Taken>,
}

impl Run {
    fn new(room: Option<Taken>) -> Self {
        Self { buffer: AlignedBuffer::take(), filled: Vec::new(), _room: room }
    }

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

/// A part that waits for its run to be opened.
struct Waiting {
    bytes: Vec<u8>,
    _room: Taken,
}

/// What of a file is not written yet, by the offset in the file.
#[derive(Default)]
struct Gathered {
    open: BTreeMap<u64, Run>,
    waiting: BTreeMap<u64, Waiting>,
    /// The numbers of runs of which a part was written without them: they will never be whole, and must not keep others out.
    passed: RoaringTreemap,
}

impl Gathered {
    /// Keeps a small part until its run is opened; `false` if there is no need or no room.
    fn wait(&mut self, start: u64, at: u64, part: &[u8], room: &Arc<Room>) -> bool {
        if part.len() > SMALL_BYTES || self.open.contains_key(&start) || self.passed.contains(number(start)) {
            return false;
        }
        let Some(room) = Taken::take(room, |room| &room.waiting, part.len(), MAX_WAITING_BYTES) else { return false };
        self.waiting.insert(at, Waiting { bytes: part.to_vec(), _room: room });
        true
    }

    /// The run that begins at `start`, opened if there is room for it, with what has waited for it.
    fn run(&mut self, start: u64, room: &Arc<Room>) -> Option<&mut Run> {
        match self.open.entry(start) {
            Entry::Occupied(run) => Some(run.into_mut()),
            Entry::Vacant(_) if self.passed.contains(number(start)) => None,
            Entry::Vacant(place) => {
                let room = Taken::take(room, |room| &room.runs, 1, MAX_OPEN)?;
                let run = place.insert(Run::new(Some(room)));
                for (at, part) in self.waiting.extract_if(within_run(start), |_, _| true) {
                    run.fill(usize::try_from(at - start).unwrap_or(0), &part.bytes);
                }
                Some(run)
            }
        }
    }

    /// There is no run for what begins at `start`: its parts are written as they come, first those that have waited.
    fn pass(&mut self, start: u64) -> Vec<(u64, Waiting)> {
        self.passed.insert(number(start));
        self.waiting.extract_if(within_run(start), |_, _| true).collect()
    }
}

fn number(start: u64) -> u64 {
    start / RUN_BYTES as u64
}

fn within_run(start: u64) -> Range<u64> {
    start..start.saturating_add(RUN_BYTES as u64)
}

/// A file of which runs are gathered.
pub(super) struct Runs {
    /// The file again, opened for direct writes: others write through the cache at the same time.
    direct: OwnedFd,
    /// Whether the file system takes them.
    is_direct: AtomicBool,
    size: u64,
    gathered: Mutex<Gathered>,
    room: Arc<Room>,
}

impl Runs {
    /// `None` where the file cannot be written directly.
    pub(super) fn new(file: &OwnedFd, size: u64, room: &Arc<Room>) -> Option<Self> {
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let direct = openat(CWD, proc_path(file), flags, Mode::empty()).ok()?;
        let (is_direct, room) = (AtomicBool::new(true), Arc::clone(room));
        Some(Self { direct, is_direct, size, gathered: Mutex::default(), room })
    }

    fn gathered(&self) -> std::sync::MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
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
        let at = start + within as u64;
        let whole = {
            let mut gathered = self.gathered();
            if gathered.wait(start, at, part, &self.room) {
                return Ok(());
            }
            let Some(run) = gathered.run(start, &self.room) else {
                let waited = gathered.pass(start);
                drop(gathered);
                waited.iter().try_for_each(|(at, part)| write_all(file, &part.bytes, *at))?;
                return write_all(file, part, at);
            };
            run.fill(within, part);
            let len = self.size.saturating_sub(start).min(RUN_BYTES as u64);
            let is_whole = run.is_whole(usize::try_from(len).unwrap_or(RUN_BYTES));
            if is_whole { gathered.open.remove(&start) } else { None }
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
        let Gathered { open, mut waiting, .. } = std::mem::take(&mut *self.gathered());
        open.into_iter().try_for_each(|(start, run)| self.write_run(file, start, &run))?;
        // A run for each after the other, for which there is always room.
        while let Some((at, _)) = waiting.first_key_value() {
            let start = at - at % RUN_BYTES as u64;
            let mut run = Run::new(None);
            for (at, part) in waiting.extract_if(within_run(start), |_, _| true) {
                run.fill(usize::try_from(at - start).unwrap_or(0), &part.bytes);
            }
            self.write_run(file, start, &run)?;
        }
        Ok(())
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
                    assert!(room.runs.load(Ordering::SeqCst) <= MAX_OPEN);
                    assert!(room.waiting.load(Ordering::SeqCst) <= MAX_WAITING_BYTES);
                    runs.finish(&file).unwrap();
                    assert_eq!((room.runs.load(Ordering::SeqCst), room.waiting.load(Ordering::SeqCst)), (0, 0));
                    rustix::fs::ftruncate(&file, size as u64).unwrap();
                    let mut expected = bytes.clone();
                    expected[left_out].fill(0);
                    assert!(std::fs::read(path.path()).unwrap() == expected, "{size} in {}", folder.display());
                }
            }
        }
    }

    /// Pages that changed come from other packs than what lies around them: every run becomes whole all the same.
    #[test]
    fn pages_that_come_first_wait_for_the_rest() {
        const PAGE: usize = 8 << 10;
        let size = 3 * MAX_OPEN * RUN_BYTES;
        let bytes = vec![7; size];
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = OwnedFd::from(std::fs::File::options().write(true).open(path.path()).unwrap());
        let room = Arc::default();
        let runs = Runs::new(&file, size as u64, &room).expect("a file system that takes direct writes");
        let write = |range: Range<usize>| runs.write(&file, range.start as u64, &bytes[range]).unwrap();
        for start in (0..size).step_by(RUN_BYTES) {
            write(start + PAGE..start + 2 * PAGE);
        }
        assert_eq!(
            (room.runs.load(Ordering::SeqCst), room.waiting.load(Ordering::SeqCst)),
            (0, size / RUN_BYTES * PAGE)
        );
        for start in (0..size).step_by(RUN_BYTES) {
            write(start + 2 * PAGE..start + RUN_BYTES);
            write(start..start + PAGE);
        }
        assert!(runs.gathered().passed.is_empty(), "all went through runs");
        assert_eq!((room.runs.load(Ordering::SeqCst), room.waiting.load(Ordering::SeqCst)), (0, 0));
        runs.finish(&file).unwrap();
        assert!(std::fs::read(path.path()).unwrap() == bytes);
    }
}
