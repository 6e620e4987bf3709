//! Gathers the chunks of many files, so that they are read together, each once.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;

use futures::StreamExt;
use tokio::task::{JoinSet, spawn_blocking};

use super::RestoreError;
use super::target::Target;
use super::write::{OutFile, Write};
use crate::error::{Classified, ErrorClass};
use crate::id::ChunkId;
use crate::manifest::Piece;
use crate::read::ReadError;
use crate::sink::{ChunkRef, ChunkSource};

/// Chunks that are asked for together.
const MAX_CHUNKS: usize = 1024;
/// Files that are written together: each may be open.
const MAX_OPEN: usize = 256;
/// Writes that are planned together.
const MAX_WRITES: usize = 16 << 10;
/// Bytes that are planned together when chunks have several places each, as where pages changed: so little of a file waits for them
/// that its runs become whole.
const MAX_MIXED_BYTES: u64 = 96 << 20;
/// Chunks that are being written at the same time.
const WRITERS: usize = 4;

/// Chunks, and the writes that each is for.
#[derive(Default)]
pub(super) struct Batch {
    chunks: Vec<ChunkRef>,
    writes: Vec<Vec<Write>>,
    known: HashMap<ChunkRef, usize>,
    count: usize,
    bytes: u64,
    open: usize,
}

impl Batch {
    /// Plans one piece of a file.
    pub(super) fn push(&mut self, file: &Arc<OutFile>, at: u64, piece: &Piece) {
        let Piece::Data { chunk, offset, len } = *piece else { return };
        file.plan();
        let number = *self.known.entry(chunk).or_insert_with(|| {
            self.chunks.push(chunk);
            self.writes.push(Vec::new());
            self.chunks.len() - 1
        });
        self.writes[number].push(Write { file: Arc::clone(file), at, from: offset, len });
        self.count += 1;
        self.bytes += u64::from(len);
    }

    /// Notes that a file may stay open while the batch is written.
    pub(super) fn note_open(&mut self) {
        self.open += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        let is_mixed = self.count > 2 * self.chunks.len();
        self.chunks.len() >= MAX_CHUNKS
            || self.open >= MAX_OPEN
            || self.count >= MAX_WRITES
            || is_mixed && self.bytes >= MAX_MIXED_BYTES
    }

    pub(super) fn take(&mut self) -> Self {
        mem::take(self)
    }

    /// Reads the chunks and writes them.
    ///
    /// A damaged or missing chunk costs the files that need it; any other failure ends the restore.
    pub(super) async fn perform(self, source: Arc<dyn ChunkSource>, target: Arc<Target>) -> Result<(), RestoreError> {
        let Self { chunks, writes: mut planned, .. } = self;
        let mut failures: HashMap<ChunkId, String> = HashMap::new();
        let mut writers = JoinSet::new();
        let mut arriving = source.get_many(chunks.clone());
        while let Some(arrived) = arriving.next().await {
            target.check()?;
            match arrived {
                Ok((number, plain)) => {
                    let Some(parts) = planned.get_mut(number).map(mem::take) else { continue };
                    while writers.len() >= WRITERS
                        && let Some(ended) = writers.join_next().await
                    {
                        ended?;
                    }
                    writers.spawn_blocking(move || parts.iter().for_each(|part| part.perform(&plain)));
                }
                Err(error) if matches!(error.class(), ErrorClass::Damaged | ErrorClass::NotFound) => {
                    if let ReadError::Missing { id, .. } | ReadError::DamagedChunk { id, .. } = &error {
                        failures.insert(*id, error.to_string());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        while let Some(ended) = writers.join_next().await {
            ended?;
        }
        // What did not arrive will not.
        let lost: Vec<_> = chunks
            .iter()
            .zip(planned)
            .filter(|(_, writes)| !writes.is_empty())
            .map(|(chunk, writes)| {
                let reason = failures.remove(&chunk.id);
                (reason.unwrap_or_else(|| format!("the chunk {} cannot be read", chunk.id)), writes)
            })
            .collect();
        spawn_blocking(move || {
            for (reason, writes) in lost {
                for write in writes {
                    write.file.lose(reason.clone());
                    write.file.done();
                }
            }
        })
        .await?;
        target.check()
    }
}
