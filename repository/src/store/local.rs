//! A repository in a directory.
//!
//! Objects are written to a staging file, flushed, linked to their name (link(2) fails when it exists), and
//! the directories are flushed: `object_store` does this when its fsync option is on, which is not its default.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::local::LocalFileSystem;
use tokio::sync::OnceCell;

use super::object::{ObjectBacked, reason_of_io};
use super::{ByteRange, Listed, Payload, PutOutcome, Reason, Store, StoreError};

/// A store in a directory, which the first write creates.
#[derive(Debug)]
pub struct Local {
    root: PathBuf,
    opened: Arc<OnceCell<ObjectBacked>>,
}

impl Local {
    /// A store in this directory. Nothing is touched yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), opened: Arc::default() }
    }

    fn failed(root: &Path, key: &str, reason: Reason, source: Box<dyn std::error::Error + Send + Sync>) -> StoreError {
        let store = root.display().to_string();
        StoreError { operation: "open", key: key.to_owned(), store, reason, source: Some(source) }
    }

    fn attach(root: &Path, key: &str) -> Result<ObjectBacked, StoreError> {
        // Asked by itself, because object_store wraps the reason.
        std::fs::metadata(root)
            .map_err(|error| Self::failed(root, key, reason_of_io(error.kind()), Box::new(error)))?;
        let files = LocalFileSystem::new_with_prefix(root)
            .map_err(|error| Self::failed(root, key, Reason::Refused, Box::new(error)))?;
        Ok(ObjectBacked::new(Arc::new(files.with_fsync(true)), root.display().to_string(), ""))
    }

    async fn existing(&self, key: &str) -> Result<&ObjectBacked, StoreError> {
        self.opened.get_or_try_init(|| async { Self::attach(&self.root, key) }).await
    }

    async fn created(&self, key: &str) -> Result<&ObjectBacked, StoreError> {
        let make = || async {
            std::fs::create_dir_all(&self.root)
                .map_err(|error| Self::failed(&self.root, key, reason_of_io(error.kind()), Box::new(error)))?;
            Self::attach(&self.root, key)
        };
        self.opened.get_or_try_init(make).await
    }
}

#[async_trait]
impl Store for Local {
    fn describe(&self) -> String {
        self.root.display().to_string()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        self.created(key).await?.put_if_absent(key, payload).await
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        self.existing(key).await?.get(key, limit).await
    }

    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError> {
        self.existing(key).await?.get_range(key, range).await
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.existing(key).await?.size(key).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>> {
        let attached = match self.opened.get() {
            Some(store) => Ok(store.clone()),
            None => Self::attach(&self.root, prefix),
        };
        match attached {
            Ok(store) => store.list(prefix),
            Err(error) if error.is_not_found() => stream::empty().boxed(),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        match self.existing(key).await {
            Ok(store) => store.delete(key).await,
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }
}
