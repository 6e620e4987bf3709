//! Stores what was read, and lists it piece by piece.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::BackupError;
use super::pages::join;
use super::read::Context;
use crate::manifest::{Contents, Piece, PieceListWriter};
use crate::session::SessionError;
use crate::sink::{ChunkKind, Put};

/// Joins pieces that go on where the one before ends.
pub(super) struct Pieces {
    writer: PieceListWriter,
    last: Option<Piece>,
}

impl Pieces {
    pub(super) fn new(context: &Context) -> Self {
        Self { writer: PieceListWriter::new(Arc::clone(&context.sink)), last: None }
    }

    pub(super) async fn push(&mut self, piece: Piece) -> Result<(), SessionError> {
        let joined = self.last.as_ref().and_then(|last| join(last, &piece));
        let is_joined = joined.is_some();
        match self.last.replace(joined.unwrap_or(piece)) {
            Some(before) if !is_joined => self.writer.push(before).await,
            _ => Ok(()),
        }
    }

    pub(super) async fn finish(mut self) -> Result<Contents, SessionError> {
        if let Some(last) = self.last {
            self.writer.push(last).await?;
        }
        self.writer.finish().await
    }
}

/// A piece that is stored, or being stored.
pub(super) enum Storing {
    Done(Piece),
    Put(JoinHandle<Result<Put, SessionError>>),
}

impl Storing {
    pub(super) async fn settle(self) -> Result<Piece, BackupError> {
        match self {
            Self::Done(piece) => Ok(piece),
            Self::Put(put) => Ok(Piece::whole(put.await.map_err(BackupError::Worker)??.chunk)),
        }
    }
}

/// Stores bytes from memory as a file's content.
pub(super) async fn store_bytes(context: &Arc<Context>, mut bytes: Bytes) -> Result<Contents, BackupError> {
    let mut pieces = PieceListWriter::new(Arc::clone(&context.sink));
    while !bytes.is_empty() {
        let plain = bytes.split_to(context.chunker.cut(&bytes));
        let put = context.store(ChunkKind::Data, context.sink.chunk_id(&plain), plain).await?;
        pieces.push(Storing::Put(put).settle().await?).await?;
    }
    Ok(pieces.finish().await?)
}
