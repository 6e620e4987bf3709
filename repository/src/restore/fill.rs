//! Fills several files at once from chunks that come in any order.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use rustix::io::Errno;

use super::RestoreError;
use crate::id::ChunkRef;
use crate::manifest::{Entry, Extent, Kind};
use crate::progress::Progress;
use crate::read::ReadError;
use crate::sink::ChunkSource;

/// Files that are open at once.
const MAX_FILES: usize = 256;
/// Extents planned at once: 128 MiB to 1 GiB of data, whatever the files' sizes.
const MAX_EXTENTS: usize = 16_384;

/// Files that wait to be filled.
#[derive(Default)]
pub(super) struct Batch {
    files: Vec<(Entry, OwnedFd)>,
    extents: usize,
}

/// A file after filling.
pub(super) struct Filled {
    pub(super) entry: Entry,
    /// Why its content is not complete.
    pub(super) failure: Option<String>,
}

/// Where a chunk's bytes go.
struct Target {
    file: usize,
    extent: Extent,
}

impl Batch {
    pub(super) fn push(&mut self, entry: Entry, file: OwnedFd) {
        if let Kind::File { extents, .. } = &entry.kind {
            self.extents += extents.len();
        }
        self.files.push((entry, file));
    }

    pub(super) fn is_full(&self) -> bool {
        self.files.len() >= MAX_FILES || self.extents >= MAX_EXTENTS
    }

    /// Reads all chunks and writes them where they belong. A damaged chunk costs the files that need it, no others.
    pub(super) async fn fill(
        self,
        source: Arc<dyn ChunkSource>,
        progress: &Progress,
    ) -> Result<Vec<Filled>, RestoreError> {
        let (entries, files): (Vec<_>, Vec<_>) = self.files.into_iter().unzip();
        let files: Arc<Vec<OwnedFd>> = Arc::new(files);
        let (chunks, targets) = plan(&entries);
        let mut left: Vec<usize> = vec![0; entries.len()];
        for target in targets.iter().flatten() {
            left[target.file] += 1;
        }
        let mut failures: Vec<Option<String>> = vec![None; entries.len()];
        let mut last_error = None;
        let mut reading = source.get_many(chunks);
        loop {
            let read = tokio::select! {
                read = reading.next() => read,
                () = progress.cancelled() => return Err(RestoreError::Cancelled),
            };
            match read {
                None => break,
                Some(Ok((index, bytes))) => {
                    write_all(&targets[index], &bytes, &files, &mut failures)?;
                    for target in &targets[index] {
                        left[target.file] -= 1;
                        progress.add_bytes(u64::from(target.extent.len));
                    }
                }
                // Without the key or the store no other chunk can be read either.
                Some(Err(error @ (ReadError::NoPrivateKey | ReadError::Store { .. }))) => return Err(error.into()),
                Some(Err(error)) => last_error = Some(error.to_string()),
            }
        }
        for (file, left) in left.into_iter().enumerate() {
            if left > 0 {
                failures[file]
                    .get_or_insert_with(|| last_error.clone().unwrap_or_else(|| "chunks are missing".to_owned()));
            }
        }
        Ok(entries.into_iter().zip(failures).map(|(entry, failure)| Filled { entry, failure }).collect())
    }
}

/// Each chunk once, and everywhere that it goes.
fn plan(entries: &[Entry]) -> (Vec<ChunkRef>, Vec<Vec<Target>>) {
    let mut numbers: HashMap<ChunkRef, usize> = HashMap::new();
    let (mut chunks, mut targets) = (Vec::new(), Vec::<Vec<Target>>::new());
    for (file, entry) in entries.iter().enumerate() {
        let Kind::File { extents, .. } = &entry.kind else { continue };
        for extent in extents {
            let number = *numbers.entry(extent.chunk).or_insert_with(|| {
                chunks.push(extent.chunk);
                targets.push(Vec::new());
                chunks.len() - 1
            });
            targets[number].push(Target { file, extent: *extent });
        }
    }
    (chunks, targets)
}

/// Writes a chunk wherever it goes. A full disk ends the restore; other errors cost the file.
fn write_all(
    targets: &[Target],
    bytes: &Bytes,
    files: &[OwnedFd],
    failures: &mut [Option<String>],
) -> Result<(), RestoreError> {
    for target in targets {
        let Extent { offset, from, len, .. } = target.extent;
        let from = from as usize;
        let Some(piece) = bytes.get(from..from + len as usize) else {
            failures[target.file].get_or_insert_with(|| "a chunk is shorter than the file list says".to_owned());
            continue;
        };
        match write_at(&files[target.file], piece, offset) {
            Ok(()) => {}
            Err(Errno::NOSPC | Errno::DQUOT) => return Err(RestoreError::Full),
            Err(error) => {
                failures[target.file].get_or_insert_with(|| error.to_string());
            }
        }
    }
    Ok(())
}

/// Writes the piece; zeros are left as a hole, which the new file has there anyway.
fn write_at(file: &OwnedFd, mut piece: &[u8], mut offset: u64) -> Result<(), Errno> {
    if piece.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    while !piece.is_empty() {
        let count = rustix::io::pwrite(file, piece, offset)?;
        piece = &piece[count..];
        offset += count as u64;
    }
    Ok(())
}
