//! The parent's entries, page by page, for the thread that walks.
//!
//! Pages are read ahead on the runtime and handed over through a short channel. A damaged page only means that its
//! files are read again; any other failure ends the backup.

use std::sync::{Arc, Mutex, PoisonError};
use std::vec::IntoIter;

use futures::StreamExt;
use tokio::sync::mpsc;
use tracing::warn;

use crate::error::{Classified, ErrorClass};
use crate::manifest::{Entry, Manifest, ManifestError, compare_paths};

/// Pages in the channel.
const AHEAD: usize = 2;

/// Walks along the parent's entries.
#[derive(Default)]
pub(super) struct ParentCursor {
    pages: Option<mpsc::Receiver<Vec<Entry>>>,
    page: IntoIter<Entry>,
    next: Option<Entry>,
    is_started: bool,
}

/// Where the task that reads the parent leaves its failure.
pub(super) type Failure = Arc<Mutex<Option<ManifestError>>>;

impl ParentCursor {
    /// Begins to read the manifest.
    pub(super) fn start(manifest: Manifest, failure: Failure) -> Self {
        let (sender, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            let mut pages = manifest.read(0..manifest.pages().len());
            while let Some(page) = pages.next().await {
                match page {
                    Ok(entries) => {
                        if sender.send(entries).await.is_err() {
                            return;
                        }
                    }
                    Err(error) if is_lost(&error) => {
                        warn!(%error, "a page of the parent is damaged: its files are read again");
                    }
                    Err(error) => {
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        return;
                    }
                }
            }
        });
        Self { pages: Some(receiver), ..Self::default() }
    }

    fn advance(&mut self) {
        self.next = loop {
            if let Some(entry) = self.page.next() {
                break Some(entry);
            }
            match self.pages.as_mut().and_then(mpsc::Receiver::blocking_recv) {
                Some(page) => self.page = page.into_iter(),
                None => break None,
            }
        };
    }

    /// The parent's entry at the path. Paths must be asked for in order.
    pub(super) fn seek(&mut self, path: &[u8]) -> Option<Entry> {
        if !self.is_started {
            self.is_started = true;
            self.advance();
        }
        // In a tree that hardly changed the next entry is the one.
        while self.next.as_ref().is_some_and(|entry| entry.path != path && compare_paths(&entry.path, path).is_lt()) {
            self.advance();
        }
        self.next.take_if(|entry| entry.path == path).inspect(|_| self.is_started = false)
    }
}

/// Whether the bytes are lost, so that trying again would not help.
pub(super) fn is_lost(error: &ManifestError) -> bool {
    matches!(error.class(), ErrorClass::Damaged | ErrorClass::NotFound)
}
