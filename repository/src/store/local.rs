//! A repository in a directory.
//!
//! Objects are written to a staging file, flushed, and linked to their name (link(2) fails when it exists); then the
//! directories are flushed. Staging files have the names that `object_store`, which does everything else, leaves out of
//! its listings.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::local::LocalFileSystem;
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;
use tracing::debug;

use super::direct;
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

    fn failed(
        root: &Path,
        operation: &'static str,
        key: &str,
        reason: Reason,
        source: Box<dyn std::error::Error + Send + Sync>,
    ) -> StoreError {
        let store = root.display().to_string();
        StoreError { operation, key: key.to_owned(), store, reason, source: Some(source) }
    }

    fn attach(root: &Path, key: &str) -> Result<ObjectBacked, StoreError> {
        // Asked by itself, because object_store wraps the reason.
        std::fs::metadata(root)
            .map_err(|error| Self::failed(root, "open", key, reason_of_io(error.kind()), Box::new(error)))?;
        let files = LocalFileSystem::new_with_prefix(root)
            .map_err(|error| Self::failed(root, "open", key, Reason::Refused, Box::new(error)))?;
        Ok(ObjectBacked::new(Arc::new(files), root.display().to_string(), ""))
    }

    async fn existing(&self, key: &str) -> Result<&ObjectBacked, StoreError> {
        self.opened.get_or_try_init(|| async { Self::attach(&self.root, key) }).await
    }
}

/// Creates the object's file unless it exists; it is durable with all directories that lead to it from `root`.
fn create(root: &Path, key: &str, payload: &Payload) -> io::Result<PutOutcome> {
    if key.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return Err(ErrorKind::InvalidInput.into());
    }
    let path = root.join(key);
    let (file, staging) = stage(&path)?;
    let written = direct::write(&file, payload).and_then(|()| file.sync_all());
    drop(file);
    let linked = written.and_then(|()| std::fs::hard_link(&staging, &path));
    // What stays in its place is in no listing and in nobody's way.
    if let Err(error) = std::fs::remove_file(&staging) {
        debug!(path = %staging.display(), %error, "a staging file stays");
    }
    match linked {
        Ok(()) => {
            sync_way(root, &path)?;
            Ok(PutOutcome::Created)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            // Who relies on the object may find it after a crash as well.
            sync_way(root, &path)?;
            Ok(PutOutcome::Exists)
        }
        Err(error) => Err(error),
    }
}

/// A new file beside `path`; its directory is made if it is missing.
fn stage(path: &Path) -> io::Result<(File, PathBuf)> {
    let mut number = 1_u64;
    loop {
        let mut staging = path.as_os_str().to_owned();
        staging.push(format!("#{number}"));
        let staging = PathBuf::from(staging);
        match OpenOptions::new().write(true).create_new(true).open(&staging) {
            Ok(file) => return Ok((file, staging)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            Err(error) if error.kind() == ErrorKind::NotFound => create_parents(path)?,
            Err(error) => return Err(error),
        }
    }
}

/// Makes the directories that lead to the path, and flushes those that got an entry.
fn create_parents(path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let missing: Vec<_> = parent.ancestors().take_while(|above| !above.exists()).collect();
    std::fs::create_dir_all(parent)?;
    missing.iter().try_for_each(|made| sync_parent(made))
}

/// Flushes every directory from `root` to the path. Another may have made them a moment ago and not have flushed them yet.
fn sync_way(root: &Path, path: &Path) -> io::Result<()> {
    path.ancestors().take_while(|above| *above != root).try_for_each(sync_parent)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[async_trait]
impl Store for Local {
    fn describe(&self) -> String {
        self.root.display().to_string()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        let (root, name) = (self.root.clone(), key.to_owned());
        let created = match spawn_blocking(move || create(&root, &name, &payload)).await {
            Ok(created) => created,
            Err(error) => return Err(Self::failed(&self.root, "create", key, Reason::Refused, Box::new(error))),
        };
        created.map_err(|error| Self::failed(&self.root, "create", key, reason_of_io(error.kind()), Box::new(error)))
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
