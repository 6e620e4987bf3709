//! Writes the bytes of files as they arrive, in any order, and finishes each file with its last byte.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustix::fs::ftruncate;
use rustix::io::{Errno, pwrite};

use super::What;
use super::create::LinkedFiles;
use super::runs::{self, Runs};
use super::target::Target;
use crate::manifest::{Entry, Kind};

/// Zeros of this length at a multiple of it are left out of sparse files.
const BLOCK_BYTES: usize = 4096;

/// A file that is being restored. It is made when its first bytes arrive.
pub(super) struct OutFile {
    target: Arc<Target>,
    linked: Arc<Mutex<LinkedFiles>>,
    pub(super) entry: Entry,
    size: u64,
    is_sparse: bool,
    is_linked: bool,
    file: Mutex<State>,
    /// Writes that are to come, and one until all of them are planned.
    left: AtomicU64,
    is_lost: AtomicBool,
    /// The end of what was surely written, so that most files need no call to set their length.
    written_to: AtomicU64,
}

enum State {
    New,
    Open(Arc<Open>),
    Ended,
}

struct Open {
    file: OwnedFd,
    /// Of large files that have no holes.
    runs: Option<Runs>,
}

/// A part of a chunk that goes into a file.
pub(super) struct Write {
    pub(super) file: Arc<OutFile>,
    /// Offset in the file.
    pub(super) at: u64,
    /// Offset in the chunk.
    pub(super) from: u32,
    pub(super) len: u32,
}

impl OutFile {
    /// `None` if the entry is no regular file.
    pub(super) fn new(target: &Arc<Target>, linked: &Arc<Mutex<LinkedFiles>>, mut entry: Entry) -> Option<Arc<Self>> {
        let Kind::Regular(file) = &mut entry.kind else { return None };
        // The pieces are planned elsewhere and may be large.
        file.contents = crate::manifest::Contents::default();
        file.page_map = crate::manifest::Contents::default();
        let (size, is_linked) = (file.size, file.linked);
        let is_sparse = file.sparse && target.options.sparse;
        Some(Arc::new(Self {
            target: Arc::clone(target),
            linked: Arc::clone(linked),
            entry,
            size,
            is_sparse,
            is_linked,
            file: Mutex::new(State::New),
            left: AtomicU64::new(1),
            is_lost: AtomicBool::new(false),
            written_to: AtomicU64::new(0),
        }))
    }

    /// Announces one more write.
    pub(super) fn plan(&self) {
        self.left.fetch_add(1, Ordering::SeqCst);
    }

    /// One write is over. The last one finishes the file. Blocking.
    pub(super) fn done(&self) {
        if self.is_last() {
            self.finish();
        }
    }

    /// One write, or the planning, is over; whether it was the last, so that the file is to be finished.
    pub(super) fn is_last(&self) -> bool {
        self.left.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// A part of the content does not come.
    pub(super) fn lose(&self, reason: String) {
        if !self.is_lost.swap(true, Ordering::SeqCst) {
            self.target.fail_with(&self.entry.path, What::Content, reason);
        }
    }

    fn lose_by(&self, what: What, error: &io::Error) {
        if !self.is_lost.swap(true, Ordering::SeqCst) {
            self.target.fail(&self.entry.path, what, error);
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Option<Arc<Open>> {
        let mut state = self.state();
        match &*state {
            State::Open(file) => return Some(Arc::clone(file)),
            State::Ended => return None,
            State::New => {}
        }
        match self.target.create_file(&self.entry.path) {
            Ok(file) => {
                let is_gathered = !self.is_sparse && self.size >= runs::MIN_BYTES;
                let runs = if is_gathered { Runs::new(&file, self.size, &self.target.room) } else { None };
                let open = Arc::new(Open { file, runs });
                *state = State::Open(Arc::clone(&open));
                Some(open)
            }
            Err(error) => {
                *state = State::Ended;
                self.lose_by(What::Create, &error);
                None
            }
        }
    }

    /// Writes a part of a chunk. Blocking.
    fn write(&self, at: u64, bytes: &[u8]) {
        if self.is_lost.load(Ordering::SeqCst) {
            return;
        }
        let Some(open) = self.open() else { return };
        self.target.progress.add_bytes(bytes.len() as u64);
        let written = match &open.runs {
            Some(runs) => runs.write(&open.file, at, bytes),
            None if self.is_sparse => write_sparse(&open.file, bytes, at),
            None => write_all(&open.file, bytes, at),
        };
        match written {
            // What ends in zeros may have ended before them.
            Ok(()) if self.is_sparse => {}
            Ok(()) => {
                self.written_to.fetch_max(at + bytes.len() as u64, Ordering::SeqCst);
            }
            Err(error) => self.lose_by(What::Content, &error.into()),
        }
    }

    /// Finishes the file after its last write. Blocking.
    pub(super) fn finish(&self) {
        if !self.is_lost.load(Ordering::SeqCst)
            && let Some(open) = self.open()
        {
            let file = &open.file;
            let gathered = open.runs.as_ref().map_or(Ok(()), |runs| runs.finish(file));
            let is_short = self.written_to.load(Ordering::SeqCst) < self.size;
            let whole = gathered.and_then(|()| if is_short { ftruncate(file, self.size) } else { Ok(()) });
            if let Err(error) = whole {
                self.lose_by(What::Content, &error.into());
            } else {
                self.target.apply(file, &self.entry);
                if self.is_linked {
                    let noted = self.linked.lock().unwrap_or_else(PoisonError::into_inner).note(&self.entry.path, file);
                    if let Err(error) = noted {
                        self.target.fail(&self.entry.path, What::Link, &error);
                    }
                }
                self.target.count(&self.entry);
            }
        }
        let state = std::mem::replace(&mut *self.state(), State::Ended);
        if let State::Open(_) = state
            && self.is_lost.load(Ordering::SeqCst)
        {
            // Nobody may take a part for the whole.
            self.target.remove_file(&self.entry.path);
        }
    }
}

impl Write {
    /// Performs the write with the chunk's bytes. Blocking.
    pub(super) fn perform(&self, chunk: &Bytes) {
        let from = self.from as usize;
        match chunk.get(from..from + self.len as usize) {
            Some(bytes) => self.file.write(self.at, bytes),
            None => self.file.lose("a chunk is shorter than the manifest says".to_owned()),
        }
        self.file.done();
    }
}

pub(super) fn write_all(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match pwrite(file, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                bytes = &bytes[count..];
                at += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all but the blocks of the file that are wholly zero: the file is new and reads as zeros there.
fn write_sparse(file: &OwnedFd, bytes: &[u8], at: u64) -> Result<(), Errno> {
    let block = BLOCK_BYTES as u64;
    let mut start = 0;
    let mut end = 0;
    while end < bytes.len() {
        let to_border = usize::try_from(block - (at + end as u64) % block).unwrap_or(BLOCK_BYTES);
        let next = (end + to_border).min(bytes.len());
        let is_block = next - end == BLOCK_BYTES;
        if is_block && bytes[end..next].iter().all(|byte| *byte == 0) {
            write_all(file, &bytes[start..end], at + start as u64)?;
            start = next;
        }
        end = next;
    }
    write_all(file, &bytes[start..], at + start as u64)
}
