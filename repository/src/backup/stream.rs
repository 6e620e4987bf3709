//! Backups of a stream of bytes that comes once and whose length nobody knows, as what a dump command prints: it becomes a tree
//! with one regular file.
//!
//! What is cut and not stored yet is bounded, and the stream is not asked for more meanwhile. A stream that ends with an
//! error leaves nothing behind: a part of a dump is no dump.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use tokio::task::spawn_blocking;

use super::assemble::{Assembly, Written};
use super::read::{Context, Hooks, Outcome};
use super::store::{Pieces, Storing};
use super::tree::{StopOnDrop, decide};
use super::{BackupError, BackupReport, TreeBackup};
use crate::chunk;
use crate::manifest::{Contents, Entry, Kind, Meta, Regular, Time, is_valid_path};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::Session;
use crate::sink::{ChunkId, ChunkKind, ChunkSink};

/// Bytes that are cut at once, beyond the longest chunk.
const BATCH_BYTES: usize = 1 << 20;
/// Chunks that are stored at once.
const IN_FLIGHT: usize = 8;

/// Backs up a stream as the file `name`, in a session that was begun for it. The session is decided in any case.
///
/// Only the stream's end makes the snapshot: whoever gives it must let it end with an error unless everything came. Of the
/// options, `excludes` and `one_file_system` mean nothing here; chunks of earlier snapshots are found with and without a parent.
pub async fn stream_in<E>(
    session: Arc<Session>,
    repository: &Repository,
    name: &str,
    bytes: impl Stream<Item = Result<Bytes, E>> + Send,
    options: TreeBackup,
    progress: Arc<Progress>,
) -> Result<BackupReport, BackupError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let write = async {
        let chunker = chunk::chunker(&repository.config().chunker, session.chunker_key())?;
        let sink = Arc::clone(&session) as Arc<dyn ChunkSink>;
        let context = Arc::new(Context::new(None, sink, None, chunker, Arc::clone(&progress), Hooks::default()));
        write_stream(context, name, bytes).await
    };
    decide(&session, &options, &progress, write).await
}

/// Stores a stream and the manifest of its file; also tells how many bytes came.
async fn write_stream<E>(
    context: Arc<Context>,
    name: &str,
    bytes: impl Stream<Item = Result<Bytes, E>> + Send,
) -> Result<(Written, u64), BackupError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if name.is_empty() || name.contains('/') || !is_valid_path(name.as_bytes()) {
        return Err(BackupError::Path { path: name.to_owned(), what: "it is no name of a file" });
    }
    let _stop = StopOnDrop(Arc::clone(&context));
    let mut file = StreamFile {
        context: &context,
        waiting: BytesMut::new(),
        size: 0,
        storing: VecDeque::new(),
        pieces: Pieces::new(&context),
    };
    let mut bytes = std::pin::pin!(bytes);
    while let Some(part) = bytes.next().await {
        file.push(&part.map_err(|error| BackupError::Source(error.into()))?).await?;
    }
    let (size, contents) = file.finish().await?;
    let now = crate::clock::now();
    let mtime = Time { seconds: now.as_second(), nanoseconds: u32::try_from(now.subsec_nanosecond()).unwrap_or(0) };
    let meta = |mode| Meta { mode, mtime, ..Meta::default() };
    let root = Entry { path: Vec::new(), meta: meta(0o755), kind: Kind::Directory };
    let kind = Kind::Regular(Regular { size, sparse: false, linked: false, contents, page_map: Contents::default() });
    let mut assembly = Assembly::new(Arc::clone(&context));
    assembly.push(Outcome::Done(root)).await?;
    assembly.push(Outcome::Done(Entry { path: name.into(), meta: meta(0o600), kind })).await?;
    Ok((assembly.finish().await?, context.read_bytes.load(Ordering::Relaxed)))
}

/// A file that grows as bytes come.
struct StreamFile<'a> {
    context: &'a Arc<Context>,
    /// Came and is not cut yet.
    waiting: BytesMut,
    size: u64,
    storing: VecDeque<Storing>,
    pieces: Pieces,
}

impl StreamFile<'_> {
    async fn push(&mut self, mut part: &[u8]) -> Result<(), BackupError> {
        let until = self.context.chunker.max() + BATCH_BYTES;
        let count = part.len() as u64;
        // However long the part is, no more of it is copied than is cut at once.
        while !part.is_empty() {
            let (now, later) = part.split_at(part.len().min(until - self.waiting.len()));
            self.waiting.extend_from_slice(now);
            part = later;
            if self.waiting.len() == until {
                self.cut(false).await?;
            }
        }
        self.size += count;
        self.context.read_bytes.fetch_add(count, Ordering::Relaxed);
        self.context.progress.add_bytes(count);
        Ok(())
    }

    /// Cuts chunks off what waits, all of it at the end of the stream, and begins to store them.
    async fn cut(&mut self, is_end: bool) -> Result<(), BackupError> {
        let (context, mut waiting) = (Arc::clone(self.context), std::mem::take(&mut self.waiting));
        let (chunks, rest) = spawn_blocking(move || {
            let chunks = cut_chunks(&context, &mut waiting, is_end);
            (chunks, waiting)
        })
        .await
        .map_err(BackupError::Worker)?;
        self.waiting = rest;
        for (id, plain) in chunks {
            self.storing.push_back(Storing::Put(self.context.store(ChunkKind::Data, id, plain).await?));
            while self.storing.len() >= IN_FLIGHT {
                self.settle().await?;
            }
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), BackupError> {
        if let Some(oldest) = self.storing.pop_front() {
            self.pieces.push(oldest.settle().await?).await?;
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(u64, Contents), BackupError> {
        self.cut(true).await?;
        while !self.storing.is_empty() {
            self.settle().await?;
        }
        Ok((self.size, self.pieces.finish().await?))
    }
}

fn cut_chunks(context: &Context, waiting: &mut BytesMut, is_end: bool) -> Vec<(ChunkId, Bytes)> {
    let mut chunks = Vec::new();
    while waiting.len() >= context.chunker.max() || is_end && !waiting.is_empty() {
        let len = context.chunker.cut(waiting);
        // Copied, so that a chunk that waits to be stored keeps no more memory than its own.
        let plain = Bytes::copy_from_slice(&waiting.split_to(len));
        chunks.push((context.sink.chunk_id(&plain), plain));
    }
    chunks
}

#[cfg(test)]
mod tests {
    use std::io;

    use futures::{TryStreamExt, stream};
    use proptest::prelude::*;

    use super::*;
    use crate::backup::tests::noise;
    use crate::backup::{VirtualFile, entries};
    use crate::config::ChunkerConfig;
    use crate::double::Double;
    use crate::keys::Secret;
    use crate::manifest::Manifest;
    use crate::repository::InitOptions;
    use crate::session::SessionOptions;
    use crate::store::memory::Memory;
    use crate::tree::read_pieces;

    fn context(double: &Double) -> Arc<Context> {
        let small = ChunkerConfig { min: 16 << 10, average: 64 << 10, max: 256 << 10, ..ChunkerConfig::default() };
        let chunker = chunk::chunker(&small, &[2; 32]).unwrap();
        Arc::new(Context::new(None, Arc::new(double.clone()), None, chunker, Arc::default(), Hooks::default()))
    }

    async fn back_up(double: &Double, parts: Vec<io::Result<Bytes>>) -> Result<(Written, u64), BackupError> {
        write_stream(context(double), "shop.sql", stream::iter(parts)).await
    }

    fn parts(bytes: &[u8], len: usize) -> Vec<io::Result<Bytes>> {
        bytes.chunks(len.max(1)).map(|part| Ok(Bytes::copy_from_slice(part))).collect()
    }

    async fn read(double: &Double, written: &Written) -> Vec<u8> {
        let source = Arc::new(double.clone());
        let manifest = Manifest::open(source.clone(), &written.root).await.unwrap();
        let Kind::Regular(file) = manifest.find(b"shop.sql").await.unwrap().unwrap().kind else { unreachable!() };
        let parts: Vec<_> = read_pieces(source, &manifest, &file).try_collect().await.unwrap();
        let bytes = parts.concat();
        assert_eq!(file.size, bytes.len() as u64);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_stream_comes_back_as_it_was_however_it_was_cut(
            seed: u64,
            len in prop_oneof![Just(0_usize), 1..200_000_usize, 1_200_000..3_000_000_usize],
            part in prop_oneof![200..9000_usize, 100_000..4_000_000_usize],
        ) {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (double, bytes) = (Double::default(), noise(seed, len));
                let (written, count) = back_up(&double, parts(&bytes, part)).await.unwrap();
                assert_eq!((count, written.counts.files, written.counts.bytes), (len as u64, 1, len as u64));
                assert!(read(&double, &written).await == bytes);
            });
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_dump_like_the_one_before_stores_what_is_new() {
        let (double, mut bytes) = (Double::default(), noise(1, 4 << 20));
        back_up(&double, parts(&bytes, 70_000)).await.unwrap();
        let all = double.take_log().0.len();
        bytes.splice(2_000_000..2_000_000, noise(2, 1000));
        // Cut elsewhere on its way, and with something in between.
        let (written, _) = back_up(&double, parts(&bytes, 33_333)).await.unwrap();
        let (puts, _) = double.take_log();
        let before: std::collections::HashSet<_> = {
            back_up(&double, parts(&noise(1, 4 << 20), 70_000)).await.unwrap();
            double.take_log().0.into_iter().collect()
        };
        let new = puts.iter().filter(|(kind, id)| *kind == ChunkKind::Data && !before.contains(&(*kind, *id))).count();
        assert!(all > 30 && new <= 4, "{new} of {all} chunks are new");
        assert!(read(&double, &written).await == bytes);
    }

    /// As the repository's config says, whatever that is: a file and a stream of the same bytes share their chunks.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_stream_is_cut_as_files_are() {
        for chunker in [ChunkerConfig::default(), ChunkerConfig::fastcdc()] {
            let secret = Secret::key_file([7; 32]);
            let options = InitOptions { chunker };
            let repository = Repository::init(Arc::new(Memory::new()), &secret, options).await.unwrap();
            let bytes = Bytes::from(noise(1, 8 << 20));
            let file = VirtualFile { path: "file".into(), bytes: bytes.clone(), mtime: jiff::Timestamp::UNIX_EPOCH };
            let files = stream::iter([io::Result::Ok(file)]);
            entries(&repository, files, TreeBackup::default(), Arc::default()).await.unwrap();
            let session = repository.begin(SessionOptions::default()).await.unwrap();
            let parts = stream::iter(parts(&bytes, 70_000));
            let streamed =
                stream_in(session, &repository, "stream", parts, TreeBackup::default(), Arc::default()).await;
            let stats = streamed.unwrap().snapshot.stats;
            assert!(stats.new_bytes < 10_000, "{} of {} bytes are new", stats.new_bytes, bytes.len());
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stream_that_breaks_off_and_a_strange_name_are_no_backup() {
        let double = Double::default();
        let mut broken = parts(&noise(1, 3 << 20), 70_000);
        broken.push(Err(io::Error::other("exit code 1")));
        let error = back_up(&double, broken).await.unwrap_err();
        assert!(matches!(&error, BackupError::Source(why) if why.to_string() == "exit code 1"), "{error:?}");
        for name in ["", "a/b", "..", "/"] {
            let error = write_stream(context(&double), name, stream::empty::<io::Result<Bytes>>()).await.unwrap_err();
            assert!(matches!(error, BackupError::Path { .. }), "{name}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_not_stored_yet_is_bounded_and_the_stream_waits() {
        let double = Double::default();
        double.hold();
        let asked = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counted = Arc::clone(&asked);
        let endless = stream::iter(0_u64..).map(move |number| {
            counted.fetch_add(256 << 10, Ordering::Relaxed);
            Ok::<_, io::Error>(Bytes::from(noise(number, 256 << 10)))
        });
        let writing = write_stream(context(&double), "endless", endless);
        assert!(tokio::time::timeout(std::time::Duration::from_secs(2), writing).await.is_err());
        let asked = asked.load(Ordering::Relaxed);
        assert!((1 << 20..40 << 20).contains(&asked), "{asked} bytes were asked for while nothing could be stored");
    }
}
