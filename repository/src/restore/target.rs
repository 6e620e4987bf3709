//! The directory that is restored into, and what went wrong there.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, statat, unlinkat};
use rustix::io::Errno;

use super::runs::Room;
use super::{Existing, Failed, RestoreError, RestoreOptions, What};
use crate::beneath::Beneath;
use crate::manifest::{Entry, Kind};
use crate::progress::Progress;
use crate::snapshot::Counts;

/// Shared by all who write.
pub(super) struct Target {
    pub(super) beneath: Beneath,
    pub(super) options: RestoreOptions,
    pub(super) progress: Arc<Progress>,
    outcome: Mutex<Outcome>,
    /// For large files that are being written.
    pub(super) room: Arc<Room>,
    /// The directory of the file that was made last: the next one is nearly always in it.
    last: Mutex<Option<LastDirectory>>,
}

struct LastDirectory {
    path: Vec<u8>,
    directory: Arc<OwnedFd>,
}

#[derive(Default)]
struct Outcome {
    counts: Counts,
    failed: Vec<Failed>,
    /// Ends the restore.
    fatal: Option<RestoreError>,
}

impl Target {
    pub(super) fn new(beneath: Beneath, options: RestoreOptions, progress: Arc<Progress>) -> Self {
        Self { beneath, options, progress, outcome: Mutex::default(), room: Arc::default(), last: Mutex::default() }
    }

    fn outcome(&self) -> std::sync::MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a failure. A full file system ends the restore: nothing after it would fit either.
    pub(super) fn fail(&self, path: &[u8], what: What, error: &io::Error) {
        if let Some(number) = error.raw_os_error()
            && [Errno::NOSPC, Errno::DQUOT].contains(&Errno::from_raw_os_error(number))
        {
            let path = String::from_utf8_lossy(path).into_owned();
            let source = io::Error::from_raw_os_error(number);
            self.outcome().fatal.get_or_insert(RestoreError::Full { path, source });
        }
        self.fail_with(path, what, error.to_string());
    }

    pub(super) fn fail_with(&self, path: &[u8], what: What, reason: String) {
        self.progress.add_skipped();
        let mut outcome = self.outcome();
        outcome.counts.skipped += 1;
        outcome.failed.push(Failed { path: path.to_vec(), what, reason });
    }

    /// Counts a restored entry.
    pub(super) fn count(&self, entry: &Entry) {
        self.progress.add_entry();
        let counts = &mut self.outcome().counts;
        match &entry.kind {
            Kind::Regular(file) => {
                counts.files += 1;
                counts.bytes += file.size;
            }
            Kind::Link { .. } => counts.files += 1,
            Kind::Directory => counts.directories += 1,
            _ => counts.others += 1,
        }
    }

    /// Makes everything durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(self.beneath.root())?)
    }

    /// Whether to go on.
    pub(super) fn check(&self) -> Result<(), RestoreError> {
        if let Some(fatal) = self.outcome().fatal.take() {
            return Err(fatal);
        }
        if self.progress.is_cancelled() { Err(RestoreError::Cancelled) } else { Ok(()) }
    }

    pub(super) fn report(&self) -> (Counts, Vec<Failed>) {
        let mut outcome = self.outcome();
        (outcome.counts, std::mem::take(&mut outcome.failed))
    }

    /// Runs `make`, which must fail with `EEXIST` where something lies already; then clears the place if that is
    /// allowed and tries again.
    pub(super) fn make<T>(
        &self,
        directory: &OwnedFd,
        name: &[u8],
        mut make: impl FnMut() -> Result<T, Errno>,
    ) -> io::Result<T> {
        match make() {
            Err(Errno::EXIST) if self.options.existing == Existing::Overwrite => {
                // Fails for directories: they are not removed with all that is in them.
                unlinkat(directory, name, AtFlags::empty())?;
                Ok(make()?)
            }
            other => Ok(other?),
        }
    }

    fn directory(&self, path: &[u8]) -> io::Result<Arc<OwnedFd>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref().filter(|last| last.path == path) {
            return Ok(Arc::clone(&last.directory));
        }
        let directory = Arc::new(self.beneath.open_dir(path)?);
        *last = Some(LastDirectory { path: path.to_vec(), directory: Arc::clone(&directory) });
        Ok(directory)
    }

    /// Makes a new empty file that nobody else can open yet.
    pub(super) fn create_file(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let (parent, name) = crate::manifest::split_path(path);
        let directory = self.directory(parent)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.make(&directory, name, || openat(&directory, name, flags, Mode::RUSR | Mode::WUSR))
    }

    /// Removes a file that was not finished.
    pub(super) fn remove_file(&self, path: &[u8]) {
        let (parent, name) = crate::manifest::split_path(path);
        let removed =
            self.beneath.open_dir(parent).and_then(|directory| Ok(unlinkat(directory, name, AtFlags::empty())?));
        if let Err(error) = removed {
            self.fail(path, What::Create, &error);
        }
    }

    /// Whether a directory is at the name, not a link to one.
    pub(super) fn is_directory(directory: &OwnedFd, name: &[u8]) -> bool {
        statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    }
}
