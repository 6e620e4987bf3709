//! The restore of an image into a block device or a file: every byte of the target is decided, zeros included, because a
//! fresh volume may hold what another left.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use rustix::fs::{FallocateFlags, FileType, fallocate, fstat, fsync, ftruncate};
use rustix::io::{Errno, pwrite};
use tokio::task::{JoinSet, spawn_blocking};

use super::RestoreError;
use crate::backup::image::{FILE, size_of};
use crate::manifest::{Entry, Kind, Manifest, Piece, Regular};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::sink::{ChunkRef, ChunkSource};
use crate::snapshot::{Content, Snapshot};

/// Chunks that are asked for together.
const BATCH: usize = 256;
/// Chunks that are being written at the same time.
const WRITERS: usize = 4;
/// Zeros that are written at once where the device cannot be told to have them.
const ZEROS: &[u8] = &[0; 256 << 10];

/// What a restore of an image did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageRestored {
    /// The image's size.
    pub size: u64,
    /// Bytes written that are not zeros of holes.
    pub written: u64,
}

/// Restores the image of a snapshot into a device, or into a file that becomes as long as the image.
///
/// A device may be larger than the image; what lies behind it becomes zeros. Anything that cannot be read or written is
/// an error: an image is whole or useless. May be done again after a failure.
pub async fn image(
    repository: &Repository,
    snapshot: &Snapshot,
    device: OwnedFd,
    progress: Arc<Progress>,
) -> Result<ImageRestored, RestoreError> {
    let Content::Tree { root, .. } = &snapshot.content else { return Err(RestoreError::NotATree) };
    let source = repository.reader()?;
    if !source.can_read_data() {
        return Err(crate::read::ReadError::NoPrivateKey.into());
    }
    // What is read must not expire meanwhile.
    let pin = repository.pin(snapshot).await?;
    let restored = tokio::select! {
        biased;
        () = progress.cancelled() => Err(RestoreError::Cancelled),
        restored = restore_image(source, root, device, Arc::clone(&progress)) => restored,
    };
    if let Some(pin) = pin {
        pin.release().await;
    }
    restored
}

/// As [`image`], from any source of chunks.
pub(super) async fn restore_image(
    source: Arc<dyn ChunkSource>,
    root: &[ChunkRef],
    device: OwnedFd,
    progress: Arc<Progress>,
) -> Result<ImageRestored, RestoreError> {
    let manifest = Manifest::open(Arc::clone(&source), root).await?;
    let Some(Entry { kind: Kind::Regular(file), .. }) = manifest.find(FILE.as_bytes()).await? else {
        return Err(RestoreError::NotAnImage);
    };
    progress.expect_bytes(file.size);
    let target = Arc::new(Target { device, progress });
    let opened = Arc::clone(&target);
    let size = file.size;
    let device_size = spawn_blocking(move || opened.prepare(size)).await?.map_err(write_failed(0))?;
    if device_size < size {
        return Err(RestoreError::TooSmall { size, room: device_size });
    }
    let written = write_pieces(&manifest, &file, source, &target).await?;
    let ending = Arc::clone(&target);
    spawn_blocking(move || {
        ending.zero(size, device_size - size).map_err(write_failed(size))?;
        fsync(&ending.device).map_err(|error| RestoreError::Flush(error.into()))
    })
    .await??;
    Ok(ImageRestored { size, written })
}

fn write_failed(offset: u64) -> impl Fn(io::Error) -> RestoreError {
    move |source| RestoreError::WriteImage { offset, source }
}

/// A part of a chunk and where it goes.
struct Write {
    at: u64,
    from: usize,
    len: usize,
}

async fn write_pieces(
    manifest: &Manifest,
    file: &Regular,
    source: Arc<dyn ChunkSource>,
    target: &Arc<Target>,
) -> Result<u64, RestoreError> {
    let mut batch: Vec<(ChunkRef, Vec<Write>)> = Vec::new();
    let mut known: HashMap<ChunkRef, usize> = HashMap::new();
    let (mut at, mut written) = (0, 0);
    let mut lists = manifest.pieces(file);
    while let Some(list) = lists.next().await {
        for piece in list? {
            match piece {
                Piece::Hole { len } => {
                    let target = Arc::clone(target);
                    spawn_blocking(move || target.zero(at, len)).await?.map_err(write_failed(at))?;
                }
                Piece::Data { chunk, offset, len } => {
                    let number = *known.entry(chunk).or_insert_with(|| {
                        batch.push((chunk, Vec::new()));
                        batch.len() - 1
                    });
                    batch[number].1.push(Write { at, from: offset as usize, len: len as usize });
                    written += u64::from(len);
                }
            }
            at += piece.len();
            if batch.len() >= BATCH {
                known.clear();
                perform(std::mem::take(&mut batch), Arc::clone(&source), target).await?;
            }
        }
    }
    perform(batch, source, target).await?;
    Ok(written)
}

/// Reads the chunks and writes them.
async fn perform(
    batch: Vec<(ChunkRef, Vec<Write>)>,
    source: Arc<dyn ChunkSource>,
    target: &Arc<Target>,
) -> Result<(), RestoreError> {
    let (chunks, mut planned): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    let mut writers: JoinSet<Result<(), RestoreError>> = JoinSet::new();
    let mut arriving = source.get_many(chunks);
    while let Some(arrived) = arriving.next().await {
        let (number, plain) = arrived?;
        let parts = planned.get_mut(number).map(std::mem::take).unwrap_or_default();
        while writers.len() >= WRITERS
            && let Some(ended) = writers.join_next().await
        {
            ended??;
        }
        let target = Arc::clone(target);
        writers.spawn_blocking(move || parts.iter().try_for_each(|part| target.write(part, &plain)));
    }
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    Ok(())
}

/// What is written to.
struct Target {
    device: OwnedFd,
    progress: Arc<Progress>,
}

impl Target {
    /// Makes a file as long as the image. Gives back how much room there is. Blocking, as all here.
    fn prepare(&self, size: u64) -> io::Result<u64> {
        if FileType::from_raw_mode(fstat(&self.device)?.st_mode) == FileType::RegularFile {
            ftruncate(&self.device, size)?;
        }
        size_of(&self.device)
    }

    fn write(&self, part: &Write, plain: &Bytes) -> Result<(), RestoreError> {
        // The manifest was checked: a piece lies within its chunk, whose length the reader verified.
        let bytes = plain.get(part.from..part.from + part.len).ok_or(RestoreError::NotAnImage)?;
        self.write_all(bytes, part.at).map_err(write_failed(part.at))?;
        self.progress.add_bytes(bytes.len() as u64);
        Ok(())
    }

    fn write_all(&self, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match pwrite(&self.device, bytes, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    bytes = &bytes[count..];
                    at += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Makes a range zeros: by giving its room back where the device then promises zeros, else by writing them.
    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        // Of a device, the kernel gives zeros or an error: BLKDEV_ZERO_NOFALLBACK.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.device, punch, at, len).is_err() && fallocate(&self.device, zero, at, len).is_err() {
            let (mut at, end) = (at, at + len);
            while at < end {
                let count = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
                self.write_all(&ZEROS[..count], at)?;
                at += count as u64;
            }
        }
        self.progress.add_bytes(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::image::open;
    use crate::double::Double;
    use crate::manifest::{Contents, ManifestWriter, Meta};
    use crate::sink::{ChunkKind, ChunkSink};
    use std::fs::{File, OpenOptions};

    async fn image_of(double: &Double, size: u64, pieces: Vec<Piece>) -> Vec<ChunkRef> {
        let sink: Arc<dyn ChunkSink> = Arc::new(double.clone());
        let mut writer = ManifestWriter::new(sink);
        let (contents, page_map) = (Contents::Inline(pieces), Contents::default());
        let kind = Kind::Regular(Regular { size, sparse: true, linked: false, contents, page_map });
        writer.push(Entry { path: Vec::new(), meta: Meta::default(), kind: Kind::Directory }).await.unwrap();
        writer.push(Entry { path: FILE.into(), meta: Meta::default(), kind }).await.unwrap();
        writer.finish().await.unwrap()
    }

    async fn chunk(double: &Double, byte: u8, len: usize) -> ChunkRef {
        let plain = Bytes::from(vec![byte; len]);
        double.put(ChunkKind::Data, double.chunk_id(&plain), plain).await.unwrap().chunk
    }

    fn target(path: &std::path::Path) -> OwnedFd {
        OpenOptions::new().read(true).write(true).open(path).unwrap().into()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_another_left_is_gone_and_parts_of_chunks_go_where_they_belong() {
        let double = Double::default();
        let ones = chunk(&double, 1, 8192).await;
        let two = chunk(&double, 2, 512).await;
        let pieces = vec![
            Piece::Data { chunk: ones, offset: 4096, len: 4096 },
            Piece::Hole { len: 100_000 },
            Piece::whole(two),
            Piece::whole(ones),
            Piece::Hole { len: 1000 },
        ];
        let size = 4096 + 100_000 + 512 + 8192 + 1000;
        let root = image_of(&double, size, pieces).await;
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), vec![9; 500_000]).unwrap();
        let source: Arc<dyn ChunkSource> = Arc::new(double.clone());
        let done = restore_image(source, &root, target(path.path()), Arc::default()).await.unwrap();
        assert_eq!(done, ImageRestored { size, written: 4096 + 512 + 8192 });
        let mut wanted = vec![1; 4096];
        wanted.resize(4096 + 100_000, 0);
        wanted.extend([2; 512]);
        wanted.extend([1; 8192]);
        wanted.extend([0; 1000]);
        assert!(std::fs::read(path.path()).unwrap() == wanted);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn damage_and_a_tree_without_image_are_errors() {
        let double = Double::default();
        let lost = chunk(&double, 1, 8192).await;
        let root = image_of(&double, 8192, vec![Piece::whole(lost)]).await;
        double.damage(lost.id);
        let path = tempfile::NamedTempFile::new().unwrap();
        let source: Arc<dyn ChunkSource> = Arc::new(double.clone());
        let error = restore_image(Arc::clone(&source), &root, target(path.path()), Arc::default()).await.unwrap_err();
        assert!(matches!(error, RestoreError::Read(_)), "{error:?}");
        let mut writer = ManifestWriter::new(Arc::new(double.clone()));
        writer.push(Entry { path: Vec::new(), meta: Meta::default(), kind: Kind::Directory }).await.unwrap();
        let root = writer.finish().await.unwrap();
        let error = restore_image(source, &root, target(path.path()), Arc::default()).await.unwrap_err();
        assert!(matches!(error, RestoreError::NotAnImage), "{error:?}");
    }

    #[test]
    fn a_target_that_cannot_be_written_says_where() {
        let file = tempfile::NamedTempFile::new().unwrap();
        File::create(file.path()).unwrap();
        let target = Target { device: open(file.path()).unwrap(), progress: Arc::default() };
        assert!(target.zero(0, 4096).is_err(), "it is open for reading only");
        assert_eq!(write_failed(7)(io::ErrorKind::Other.into()).to_string(), "cannot write the image at byte 7");
    }
}
