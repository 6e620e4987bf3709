//! What a session counts while it writes.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a session did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Chunks put or inherited.
    pub chunks: u64,
    /// Chunks that the repository lacked.
    pub new_chunks: u64,
    /// Their plain bytes.
    pub new_bytes: u64,
    /// Their bytes in packs.
    pub stored_bytes: u64,
    /// Bytes of uploaded packs, with headers and padding.
    pub uploaded_bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) chunks: AtomicU64,
    pub(super) new_chunks: AtomicU64,
    pub(super) new_bytes: AtomicU64,
    pub(super) stored_bytes: AtomicU64,
    pub(super) uploaded_bytes: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self) -> SessionStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SessionStats {
            chunks: read(&self.chunks),
            new_chunks: read(&self.new_chunks),
            new_bytes: read(&self.new_bytes),
            stored_bytes: read(&self.stored_bytes),
            uploaded_bytes: read(&self.uploaded_bytes),
        }
    }
}
