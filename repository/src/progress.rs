//! How far a verb has come, and the wish to stop it. Shared between the work and whoever shows it.
//!
//! Numbers are for people: they are read without locking and may lag behind each other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

/// Counters of a running verb.
#[derive(Debug, Default)]
pub struct Progress {
    bytes_total: AtomicU64,
    bytes_done: AtomicU64,
    entries_done: AtomicU64,
    skipped: AtomicU64,
    new_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    current: Mutex<String>,
    cancelled: AtomicBool,
    wake: Notify,
}

/// The counters at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProgressSnapshot {
    /// Plain bytes that there are to do; 0 while unknown.
    pub bytes_total: u64,
    /// Plain bytes of the entries that are done, whether they had to be read or not.
    pub bytes_done: u64,
    /// Entries that are done.
    pub entries_done: u64,
    /// Entries that could not be read or not be restored in full.
    pub skipped: u64,
    /// Plain bytes that the repository lacked.
    pub new_bytes: u64,
    /// Bytes that they take in packs.
    pub stored_bytes: u64,
    /// What is being worked on.
    pub current: String,
}

impl Progress {
    /// The counters now.
    pub fn snapshot(&self) -> ProgressSnapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ProgressSnapshot {
            bytes_total: read(&self.bytes_total),
            bytes_done: read(&self.bytes_done),
            entries_done: read(&self.entries_done),
            skipped: read(&self.skipped),
            new_bytes: read(&self.new_bytes),
            stored_bytes: read(&self.stored_bytes),
            current: self.current.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Asks the work to stop; it ends with its own `Cancelled` error after it cleaned up.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        self.wake.notify_waiters();
    }

    /// Whether someone asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Ends when someone asks to stop.
    pub async fn cancelled(&self) {
        loop {
            let woken = self.wake.notified();
            tokio::pin!(woken);
            // Registered before the flag is looked at, so that no wish is missed in between.
            woken.as_mut().enable();
            if self.is_cancelled() {
                return;
            }
            woken.await;
        }
    }

    pub(crate) fn expect_bytes(&self, total: u64) {
        self.bytes_total.store(total, Ordering::Relaxed);
    }

    /// Counts plain bytes that are done.
    pub fn add_bytes(&self, count: u64) {
        self.bytes_done.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_entry(&self) {
        self.entries_done.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_skipped(&self) {
        self.skipped.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_stored(&self, plain: u64, stored: u64) {
        self.new_bytes.fetch_add(plain, Ordering::Relaxed);
        self.stored_bytes.fetch_add(stored, Ordering::Relaxed);
    }

    pub(crate) fn set_current(&self, path: &[u8]) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clear();
        current.push_str(&String::from_utf8_lossy(path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn a_wish_to_stop_wakes_those_who_wait_and_those_who_come_later() {
        let progress = Arc::new(Progress::default());
        let waiting = tokio::spawn({
            let progress = Arc::clone(&progress);
            async move { progress.cancelled().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        progress.cancel();
        waiting.await.unwrap();
        progress.cancelled().await;
    }
}
