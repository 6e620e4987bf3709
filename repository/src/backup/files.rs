//! Backs up files that come from memory.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};

use super::assemble::{Assembler, Data, SMALL_FILE_BYTES};
use super::{BackupError, VirtualFile, Written};
use crate::chunk::{Chunker, KeyedFastCdc};
use crate::manifest::entry::is_valid_path;
use crate::manifest::{Entry, Extent, Kind, Meta, compare_paths};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::Session;
use crate::sink::{ChunkKind, ChunkSink};

/// The mode of files from memory: readable by their owner.
const MODE: u32 = 0o600;

/// Writes the files' content and manifest.
pub(super) async fn write(
    session: &Arc<Session>,
    repository: &Repository,
    mut files: Pin<Box<dyn Stream<Item = Result<VirtualFile, BackupError>> + Send + '_>>,
    progress: &Arc<Progress>,
) -> Result<Written, BackupError> {
    let sink: Arc<dyn ChunkSink> = Arc::<Session>::clone(session);
    let chunker = KeyedFastCdc::new(&repository.config().chunker, sink.chunker_key());
    let mut assembler = Assembler::new(Arc::clone(&sink), Arc::clone(progress));
    let mut last: Option<Vec<u8>> = None;
    while let Some(file) = files.try_next().await? {
        if progress.is_cancelled() {
            return Err(BackupError::Cancelled);
        }
        let in_order = last.as_ref().is_none_or(|last| compare_paths(last, &file.path).is_lt());
        if !in_order || file.path.is_empty() || !is_valid_path(&file.path) {
            return Err(BackupError::Order { path: String::from_utf8_lossy(&file.path).into_owned() });
        }
        last = Some(file.path.clone());
        let size = file.bytes.len() as u64;
        assembler.add_read(size);
        progress.add_bytes(size);
        let mut extents = Vec::new();
        let is_small = size < SMALL_FILE_BYTES;
        if !is_small {
            extents = put_all(&*sink, &chunker, file.bytes.clone()).await?;
        }
        let data = if is_small && size > 0 { Data::Small { bytes: file.bytes, changed: false } } else { Data::Placed };
        let meta = Meta { mode: MODE, ..Meta::default() };
        assembler.push(Entry { path: file.path, kind: Kind::File { size, extents }, meta }, data).await?;
    }
    drop(files);
    assembler.finish().await
}

async fn put_all(sink: &dyn ChunkSink, chunker: &KeyedFastCdc, mut bytes: Bytes) -> Result<Vec<Extent>, BackupError> {
    let mut extents = Vec::new();
    let mut offset = 0;
    while !bytes.is_empty() {
        let plain = bytes.split_to(chunker.cut(&bytes));
        let put = sink.put(ChunkKind::Data, sink.chunk_id(&plain), plain).await?;
        extents.push(Extent { offset, chunk: put.chunk, from: 0, len: put.chunk.len });
        offset += u64::from(put.chunk.len);
    }
    Ok(extents)
}
