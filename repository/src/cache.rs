//! A local copy of small immutable objects, so that the next run need not fetch them again.
//!
//! Every object carries its own hash, or its parts their tags, which the reader of the object checks: a damaged copy is
//! found, forgotten and fetched anew. Nothing here is needed for correctness, so a full or read-only disk is only logged.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use tracing::debug;

use crate::id::{PackId, RepositoryId};
use crate::pack::{PACKS_PREFIX, pack_key};
use crate::store::{Payload, Store, StoreError};

/// Bytes of packs that are kept of all repositories together: manifests of some million files.
const PACKS_BYTES: u64 = 256 << 20;

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

    /// What is remembered of a repository by its location, before its name is known.
    pub(crate) fn of_location(directory: Option<&Path>, location: &str) -> Self {
        let name = blake3::hash(location.as_bytes()).to_hex();
        Self { directory: directory.map(|directory| directory.join("locations").join(&name[..32])) }
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
        self.put_pieces(key, std::slice::from_ref(bytes));
    }

    fn put_pieces(&self, key: &str, pieces: &[Bytes]) {
        let Some(path) = self.path(key) else { return };
        let Some(parent) = path.parent() else { return };
        let written = fs::create_dir_all(parent).and_then(|()| {
            // A rename makes the copy whole or absent, also with two processes at once.
            let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
            let mut file = File::create(&temporary)?;
            pieces.iter().try_for_each(|piece| file.write_all(piece))?;
            fs::rename(&temporary, &path)
        });
        if let Err(error) = written {
            debug!(key, %error, "an object was not cached");
        }
    }

    /// Drops a copy that proved damaged, or of an object that was deleted.
    pub(crate) fn forget(&self, key: &str) {
        if let Some(path) = self.path(key)
            && let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            debug!(key, %error, "a cached object was not removed");
        }
    }

    /// Keeps a pack of manifests, which the next backup reads; the oldest go when there are too many.
    pub(crate) fn put_pack(&self, pack: PackId, payload: &Payload) {
        self.put_pieces(&pack_key(pack), payload.pieces());
        if let Some(all) = self.directory.as_ref().and_then(|directory| directory.parent())
            && let Err(error) = keep_newest(all, PACKS_BYTES)
        {
            debug!(%error, "old packs stay in the cache");
        }
    }

    /// These bytes of a pack that is kept. They say nothing about whether the repository still has the pack.
    pub(crate) fn pack_range(&self, pack: PackId, range: &Range<u64>) -> Option<Bytes> {
        let file = File::open(self.path(&pack_key(pack))?).ok()?;
        let mut bytes = vec![0; usize::try_from(range.end.checked_sub(range.start)?).ok()?];
        file.read_exact_at(&mut bytes, range.start).ok()?;
        Some(bytes.into())
    }
}

/// Removes the oldest packs of all caches in the folder until those that stay have at most so many bytes.
fn keep_newest(folder: &Path, limit: u64) -> io::Result<()> {
    let mut found: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for cache in fs::read_dir(folder)? {
        let sessions = match fs::read_dir(cache?.path().join(PACKS_PREFIX)) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            sessions => sessions?,
        };
        for session in sessions {
            for pack in fs::read_dir(session?.path())? {
                let pack = pack?;
                let meta = pack.metadata()?;
                found.push((meta.modified()?, meta.len(), pack.path()));
            }
        }
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    let mut kept = 0;
    for (_, len, path) in found {
        kept += len;
        if kept > limit {
            fs::remove_file(&path)?;
            // Fails while others are in it.
            let _ = path.parent().map(fs::remove_dir);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SessionId;

    #[test]
    fn packs_are_kept_up_to_a_size_and_the_oldest_go_first() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("of another program"), "").unwrap();
        let cache = ObjectCache::new(Some(folder.path()), RepositoryId::random());
        ObjectCache::of_location(Some(folder.path()), "a place").put("slot", &Bytes::from_static(b"x"));
        let packs = [0, 1, 2].map(|seq| PackId { session: SessionId::random(), seq });
        for (age, pack) in packs.iter().rev().enumerate() {
            cache.put_pack(*pack, &Payload::from(Bytes::from(vec![u8::try_from(pack.seq).unwrap(); 100])));
            let file = File::options().write(true).open(cache.path(&pack_key(*pack)).unwrap()).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(age as u64)).unwrap();
        }
        let kept = || packs.map(|pack| cache.pack_range(pack, &(10..20)));
        assert_eq!(kept(), [0, 1, 2].map(|seq| Some(Bytes::from(vec![seq; 10]))));
        assert_eq!(cache.pack_range(packs[0], &(95..101)), None, "it does not have them all");
        keep_newest(folder.path(), 250).unwrap();
        assert_eq!(kept().map(|found| found.is_some()), [true, true, false]);
        cache.forget(&pack_key(packs[0]));
        assert_eq!(kept().map(|found| found.is_some()), [false, true, false]);
    }
}
