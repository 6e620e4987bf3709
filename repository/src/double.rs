//! A sink and source of chunks in memory, stricter than a repository: it checks ids, forgets nothing, condemns what a
//! test tells it to, and counts what is asked of it. Only for tests.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};

use crate::id::{ChunkId, ChunkRef, PackId, Place, SessionId};
use crate::read::ReadError;
use crate::session::SessionError;
use crate::sink::{ChunkKind, ChunkSink, ChunkSource, MAX_CHUNK_BYTES, Put};

#[derive(Default)]
struct State {
    chunks: HashMap<ChunkId, (Place, ChunkKind, Bytes)>,
    condemned: HashSet<ChunkId>,
    damaged: HashSet<ChunkId>,
    puts: Vec<(ChunkKind, ChunkId)>,
    inherited: Vec<ChunkId>,
    fails: bool,
    held: bool,
}

/// Chunks in memory.
#[derive(Clone, Default)]
pub(crate) struct Double(Arc<Mutex<State>>);

impl Double {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// From now on these chunks are not inherited.
    pub(crate) fn condemn(&self, kind: ChunkKind) {
        let mut state = self.state();
        let ids: Vec<_> = state.chunks.iter().filter(|(_, chunk)| chunk.1 == kind).map(|(id, _)| *id).collect();
        state.condemned.extend(ids);
    }

    /// From now on this chunk cannot be read.
    pub(crate) fn damage(&self, id: ChunkId) {
        self.state().damaged.insert(id);
    }

    /// From now on nothing can be put.
    pub(crate) fn fail(&self) {
        self.state().fails = true;
    }

    /// From now on nothing that is put comes to an end.
    pub(crate) fn hold(&self) {
        self.state().held = true;
    }

    /// What was put and inherited since the last call.
    pub(crate) fn take_log(&self) -> (Vec<(ChunkKind, ChunkId)>, Vec<ChunkId>) {
        let mut state = self.state();
        (std::mem::take(&mut state.puts), std::mem::take(&mut state.inherited))
    }

    pub(crate) fn plain(&self, id: ChunkId) -> Bytes {
        self.state().chunks[&id].2.clone()
    }
}

#[async_trait]
impl ChunkSink for Double {
    fn chunk_id(&self, plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(&[1; 32], plain).as_bytes())
    }

    fn chunker_key(&self) -> &[u8; 32] {
        &[2; 32]
    }

    async fn put(&self, kind: ChunkKind, id: ChunkId, plain: Bytes) -> Result<Put, SessionError> {
        assert!(self.chunk_id(&plain) == id && plain.len() <= MAX_CHUNK_BYTES && !plain.is_empty());
        tokio::task::yield_now().await;
        if self.state().held {
            std::future::pending::<()>().await;
        }
        let mut state = self.state();
        if state.fails {
            return Err(SessionError::Closed { session: SessionId([3; 16]) });
        }
        state.puts.push((kind, id));
        let len = u32::try_from(plain.len()).unwrap();
        let seq = u32::try_from(state.chunks.len()).unwrap();
        let is_new = state.condemned.remove(&id) || !state.chunks.contains_key(&id);
        if is_new {
            let place = Place { pack: PackId { session: SessionId([3; 16]), seq }, slot: 7 };
            state.chunks.insert(id, (place, kind, plain));
        }
        let place = state.chunks[&id].0;
        Ok(Put { chunk: ChunkRef { id, len, place }, new: is_new, stored: if is_new { len } else { 0 } })
    }

    fn inherit(&self, chunk: &ChunkRef) -> bool {
        let mut state = self.state();
        assert!(state.chunks.contains_key(&chunk.id));
        state.inherited.push(chunk.id);
        !state.condemned.contains(&chunk.id)
    }
}

#[async_trait]
impl ChunkSource for Double {
    async fn get(&self, chunk: &ChunkRef) -> Result<Bytes, ReadError> {
        let state = self.state();
        match state.chunks.get(&chunk.id).filter(|_| !state.damaged.contains(&chunk.id)) {
            Some((_, _, plain)) if plain.len() == chunk.len as usize => Ok(plain.clone()),
            _ => Err(ReadError::Missing { id: chunk.id, place: chunk.place }),
        }
    }

    fn get_many(self: Arc<Self>, chunks: Vec<ChunkRef>) -> BoxStream<'static, Result<(usize, Bytes), ReadError>> {
        // The last first: nobody may rely on the order.
        let numbered: Vec<_> = chunks.into_iter().enumerate().rev().collect();
        stream::iter(numbered)
            .then(move |(number, chunk)| {
                let this = Arc::clone(&self);
                async move { this.get(&chunk).await.map(|plain| (number, plain)) }
            })
            .boxed()
    }
}
