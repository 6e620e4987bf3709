//! A local copy of small immutable objects, so that the next run need not fetch them again.
//!
//! Every object carries its own hash, which the reader of the object checks: a damaged copy is found, forgotten
//! and fetched anew. Nothing here is needed for correctness, so a full or read-only disk is only logged.

use std::io::Write;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tracing::debug;

use crate::id::RepositoryId;
use crate::store::{Store, StoreError};

/// The cache of one repository; without a directory it keeps nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct ObjectCache {
    directory: Option<PathBuf>,
}

impl ObjectCache {
    /// A cache below `directory`, in a folder of the repository's name.
    pub(crate) fn new(directory: Option<&Path>, repository: RepositoryId) -> Self {
        Self { directory: directory.map(|directory| directory.join(repository.to_string())) }
    }

    /// Where it is kept.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        self.directory.clone()
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.directory.as_ref().map(|directory| directory.join(key))
    }

    /// The object, from the cache or the store.
    pub(crate) async fn get(&self, store: &dyn Store, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        if let Some(path) = self.path(key)
            && let Ok(bytes) = tokio::fs::read(&path).await
        {
            return Ok(bytes.into());
        }
        let bytes = store.get(key, limit).await?;
        self.put(key, &bytes);
        Ok(bytes)
    }

    /// What this cache alone keeps: derived data, which ends with a hash of its own.
    pub(crate) async fn get_local(&self, key: &str) -> Option<Bytes> {
        tokio::fs::read(self.path(key)?).await.ok().map(Bytes::from)
    }

    pub(crate) fn put(&self, key: &str, bytes: &Bytes) {
        let Some(path) = self.path(key) else { return };
        let Some(parent) = path.parent() else { return };
        let written = std::fs::create_dir_all(parent).and_then(|()| {
            // A rename makes the copy whole or absent, also with two processes at once.
            let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
            std::fs::File::create(&temporary)?.write_all(bytes)?;
            std::fs::rename(&temporary, &path)
        });
        if let Err(error) = written {
            debug!(key, %error, "an object was not cached");
        }
    }

    /// Drops a copy that proved damaged, or of an object that was deleted.
    pub(crate) fn forget(&self, key: &str) {
        if let Some(path) = self.path(key)
            && let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            debug!(key, %error, "a cached object was not removed");
        }
    }
}
