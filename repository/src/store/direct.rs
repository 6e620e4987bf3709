//! Writes large objects to a file past the page cache, as far as the file system allows it.
//!
//! A backup writes much that it does not read again. Through the page cache the kernel finds a fresh page for every
//! 4 KiB, copies, and pushes out what others have there; more CPU time than compression and encryption of the same
//! bytes. Bytes are gathered in a buffer, because direct writes want aligned memory, and written in long runs.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::Payload;
use crate::aligned::{ALIGNMENT, AlignedBuffer, RUN_BYTES};

/// Smaller objects go through the page cache: many of them are read again soon.
const MIN_BYTES: u64 = 1 << 20;

/// A run that is being filled.
struct Run {
    buffer: AlignedBuffer,
    len: usize,
}

impl Run {
    /// Takes as many bytes as it has room for; gives back the others.
    fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(bytes.len().min(RUN_BYTES - self.len));
        self.buffer[self.len..self.len + taken.len()].copy_from_slice(taken);
        self.len += taken.len();
        rest
    }

    fn is_full(&self) -> bool {
        self.len == RUN_BYTES
    }

    fn filled(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

/// Writes the payload to an empty file. Nothing is flushed.
pub(super) fn write(file: &File, payload: &Payload) -> io::Result<()> {
    if payload.len() < MIN_BYTES {
        let mut file = file;
        return payload.pieces().iter().try_for_each(|piece| file.write_all(piece));
    }
    let mut run = Run { buffer: AlignedBuffer::take(), len: 0 };
    let mut is_direct = set_direct(file, true);
    let mut at = 0;
    let mut flush = |run: &mut Run| -> io::Result<()> {
        let whole = run.len / ALIGNMENT * ALIGNMENT;
        let mut done = 0;
        if is_direct {
            match file.write_all_at(&run.filled()[..whole], at) {
                Ok(()) => done = whole,
                // Larger blocks than ours, or a file system that finds out late: the run is written again.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        if done < run.len {
            if is_direct {
                set_direct(file, false);
                is_direct = false;
            }
            file.write_all_at(&run.filled()[done..], at + done as u64)?;
        }
        at += run.len as u64;
        run.len = 0;
        Ok(())
    };
    for piece in payload.pieces() {
        let mut rest = run.fill(piece);
        while run.is_full() {
            flush(&mut run)?;
            rest = run.fill(rest);
        }
    }
    flush(&mut run)
}

/// Switches direct writes on or off; whether they are on now.
fn set_direct(file: &File, wanted: bool) -> bool {
    let Ok(flags) = fcntl_getfl(file) else { return false };
    fcntl_setfl(file, if wanted { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT }).is_ok() && wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    /// Of pieces that fit nothing, on whatever file system the tests have, and on one in memory.
    #[test]
    fn what_is_written_is_what_was_given() {
        for folder in [std::env::temp_dir().as_path(), std::path::Path::new("/dev/shm")] {
            for total in [0, 1, 5000, 1 << 20, RUN_BYTES, RUN_BYTES + 1, 3 * RUN_BYTES + 12_345] {
                let mut bytes = vec![0; total];
                blake3::Hasher::new().update(&total.to_le_bytes()).finalize_xof().fill(&mut bytes);
                let bytes = Bytes::from(bytes);
                for size in [4096, 700_001, 5 << 20] {
                    let mut payload = Payload::default();
                    let mut rest = bytes.clone();
                    while !rest.is_empty() {
                        payload.push(rest.split_to(size.min(rest.len())));
                    }
                    let file = tempfile::NamedTempFile::new_in(folder).unwrap();
                    write(file.as_file(), &payload).unwrap();
                    assert!(std::fs::read(file.path()).unwrap() == bytes, "{total} by {size} in {}", folder.display());
                }
            }
        }
    }
}
