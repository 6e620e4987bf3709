//! Where the parts of segments lie that look-ups need at once: in memory while they are few, then in one file.
//!
//! The file has no name, so that nothing is left behind; the kernel's page cache decides what of it is in memory. When a
//! file cannot be made, everything stays in memory: slower machines are served, and the log says so.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tracing::warn;

/// Kept in memory before the file is used.
const MEMORY_BYTES: u64 = 16 << 20;

/// Takes bytes that are looked into often.
#[derive(Debug)]
pub(crate) struct Spool {
    directory: PathBuf,
    limit: u64,
    in_memory: Arc<AtomicU64>,
    file: Mutex<Option<Tail>>,
}

/// The file and where it ends.
#[derive(Debug)]
struct Tail {
    file: Arc<File>,
    end: u64,
}

/// Bytes that a spool took. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Spooled {
    at: At,
    len: usize,
}

#[derive(Debug)]
enum At {
    Memory { bytes: Bytes, counter: Option<Arc<AtomicU64>> },
    File { file: Arc<File>, start: u64 },
}

impl Spool {
    /// A spool whose file is made in this directory, or in that of temporary files.
    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        Self::with_limit(directory, MEMORY_BYTES)
    }

    pub(super) fn with_limit(directory: Option<PathBuf>, limit: u64) -> Self {
        let directory = directory.unwrap_or_else(std::env::temp_dir);
        Self { directory, limit, in_memory: Arc::default(), file: Mutex::default() }
    }

    /// Takes the bytes.
    pub(crate) fn take(&self, bytes: Bytes) -> Spooled {
        let len = bytes.len();
        let weight = len as u64;
        if self.in_memory.fetch_add(weight, Ordering::Relaxed) + weight > self.limit {
            match self.append(&bytes) {
                Ok((file, start)) => {
                    self.in_memory.fetch_sub(weight, Ordering::Relaxed);
                    return Spooled { at: At::File { file, start }, len };
                }
                Err(error) => warn!(%error, "no file for the index: it takes more memory than it should"),
            }
        }
        Spooled { at: At::Memory { bytes, counter: Some(Arc::clone(&self.in_memory)) }, len }
    }

    /// Takes bytes that no spool has; others stay where they are.
    pub(crate) fn keep(&self, bytes: Spooled) -> Spooled {
        match &bytes.at {
            At::Memory { bytes, counter: None } => self.take(bytes.clone()),
            _ => bytes,
        }
    }

    /// Bytes that it has in memory.
    #[cfg(test)]
    pub(super) fn in_memory(&self) -> u64 {
        self.in_memory.load(Ordering::Relaxed)
    }

    fn append(&self, bytes: &[u8]) -> io::Result<(Arc<File>, u64)> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let tail = match &mut *file {
            Some(tail) => tail,
            None => file.insert(Tail { file: Arc::new(self.unnamed()?), end: 0 }),
        };
        tail.file.write_all_at(bytes, tail.end)?;
        let start = tail.end;
        tail.end += bytes.len() as u64;
        Ok((Arc::clone(&tail.file), start))
    }

    fn unnamed(&self) -> io::Result<File> {
        std::fs::create_dir_all(&self.directory)?;
        let path = self.directory.join(format!("lifeboat-index-{:032x}.tmp", rand::random::<u128>()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }
}

impl Spooled {
    /// Bytes of no spool.
    pub(crate) fn in_memory(bytes: Bytes) -> Self {
        let len = bytes.len();
        Self { at: At::Memory { bytes, counter: None }, len }
    }

    /// Reads what begins at this offset.
    pub(crate) fn read(&self, at: usize, buffer: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(buffer.len()).filter(|end| *end <= self.len);
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        match &self.at {
            At::Memory { bytes, .. } => buffer.copy_from_slice(&bytes[at..end]),
            At::File { file, start } => file.read_exact_at(buffer, start + at as u64)?,
        }
        Ok(())
    }

    /// The array at this offset.
    pub(crate) fn array<const N: usize>(&self, at: usize) -> io::Result<[u8; N]> {
        let mut array = [0; N];
        self.read(at, &mut array)?;
        Ok(array)
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        match &self.at {
            At::Memory { counter: Some(counter), .. } => _ = counter.fetch_sub(self.len as u64, Ordering::Relaxed),
            At::Memory { counter: None, .. } => {}
            At::File { file, start } => {
                use rustix::fs::FallocateFlags;
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                // Where holes are not supported the space comes back when the file is closed.
                _ = rustix::fs::fallocate(file, flags, *start, self.len as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_too_much_for_memory_goes_to_a_file_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::with_limit(Some(folder.path().join("cache")), 100_000);
        let take = |byte: u8| spool.take(vec![byte; 60_000].into());
        let (small, large) = (take(1), take(2));
        assert!(matches!(small.at, At::Memory { .. }));
        let At::File { file, .. } = &large.at else { panic!("not in the file") };
        assert_eq!(large.array::<3>(59_997).unwrap(), [2; 3]);
        assert!(large.array::<3>(59_998).is_err() && large.array::<1>(usize::MAX).is_err());
        let mut all = vec![0; 60_000];
        large.read(0, &mut all).unwrap();
        assert_eq!(all, vec![2; 60_000]);
        assert!(matches!(spool.keep(Spooled::in_memory(vec![4; 60_000].into())).at, At::File { .. }));
        assert_eq!(std::fs::read_dir(folder.path().join("cache")).unwrap().count(), 0);
        let (file, used) = (Arc::clone(file), file.metadata().unwrap().blocks());
        drop(large);
        assert!(file.metadata().unwrap().blocks() < used);
        drop(small);
        assert!(matches!(take(3).at, At::Memory { .. }));
    }

    #[test]
    fn without_a_file_everything_stays_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::with_limit(Some(folder.path().join("file/none")), 0);
        std::fs::write(folder.path().join("file"), b"no directory").unwrap();
        assert_eq!(spool.take(Bytes::from_static(b"abc")).array::<3>(0).unwrap(), *b"abc");
    }
}
