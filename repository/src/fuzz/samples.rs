//! Valid objects of every kind: what a repository in memory holds and held, after backups, pins, expiry and repacking.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;

use crate::backup::{TreeBackup, VirtualFile, entries};
use crate::config::ChunkerConfig;
use crate::expire::ExpireOptions;
use crate::keys::Secret;
use crate::pack::PACKS_PREFIX;
use crate::repository::{InitOptions, Repository};
use crate::sink::ChunkSource;
use crate::snapshot::{Content, Snapshot};
use crate::store::memory::{Memory, Mutation};

/// What opens the repository.
pub(super) const KEY_FILE: [u8; 32] = [7; 32];

/// A repository and what was ever in it.
pub(super) struct Samples {
    pub(super) repository: Repository,
    /// Every object that was ever created, by key.
    pub(super) objects: Vec<(String, Bytes)>,
    pub(super) snapshots: Vec<Snapshot>,
}

impl Samples {
    /// Objects whose key begins so; of packs only small ones.
    pub(super) fn of(&self, prefixes: &[&str]) -> Vec<(String, Bytes)> {
        let mut found: Vec<_> = self
            .objects
            .iter()
            .filter(|(key, bytes)| {
                prefixes.iter().any(|prefix| key.starts_with(prefix))
                    && (!key.starts_with(PACKS_PREFIX) || bytes.len() < 20_000)
            })
            .cloned()
            .collect();
        found.truncate(64);
        found
    }
}

/// Made once for all targets.
pub(super) fn samples() -> &'static Samples {
    static SAMPLES: OnceLock<Samples> = OnceLock::new();
    SAMPLES.get_or_init(|| {
        // A target may have been begun in a runtime of its own.
        let made = std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(make())
        });
        made.join().unwrap()
    })
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

async fn back_up(repository: &Repository, lineage: &str, seeds: std::ops::Range<u64>) -> Snapshot {
    let files = seeds.map(|seed| {
        Ok::<_, std::io::Error>(VirtualFile {
            path: format!("dir/{seed:04}"),
            bytes: Bytes::from(noise(seed, 300 + usize::try_from(seed).unwrap() * 40)),
            mtime: jiff::Timestamp::UNIX_EPOCH,
        })
    });
    let options = TreeBackup { lineage: lineage.to_owned(), ..TreeBackup::default() };
    let files = futures::stream::iter(files.collect::<Vec<_>>());
    entries(repository, files, options, Arc::default()).await.unwrap().snapshot
}

async fn make() -> Samples {
    let store = Memory::new();
    let chunker = ChunkerConfig { min: 1024, average: 4096, max: 16_384, ..ChunkerConfig::default() };
    let secret = Secret::key_file(KEY_FILE);
    let repository = Repository::init(Arc::new(store.clone()), &secret, InitOptions { chunker }).await.unwrap();
    let options = || ExpireOptions {
        silence: Duration::ZERO,
        patience: Duration::ZERO,
        merge_from: 1,
        ..ExpireOptions::default()
    };
    for round in 0..3u64 {
        let first = back_up(&repository, "a", round * 40..round * 40 + 60).await;
        back_up(&repository, "a", round * 40 + 30..round * 40 + 70).await;
        back_up(&repository, "b", 0..5).await;
        let pin = repository.pin(&first).await.unwrap();
        repository.forget(&[first.id]).await.unwrap();
        repository.expire(options(), Arc::default()).await.unwrap();
        if let Some(pin) = pin {
            pin.release().await;
        }
        repository.abort_session(crate::id::SessionId::random(), "a test").await.unwrap();
    }
    let mut lost = crate::refset::Refset::default();
    let snapshots = repository.snapshots().await.unwrap();
    for snapshot in &snapshots {
        if let Content::Tree { root, .. } = &snapshot.content {
            for chunk in root {
                lost.insert(chunk.place);
            }
        }
    }
    let shared: Arc<dyn crate::store::Store> = Arc::new(store.clone());
    repository.engine.lost.add(&shared, &lost).await.unwrap();
    let created = store.journal().into_iter().filter_map(|change| match change {
        Mutation::Create(key, bytes) => Some((key, bytes)),
        Mutation::Delete(_) => None,
    });
    Samples { objects: created.collect(), repository, snapshots }
}

/// The plain chunks of all manifests: root records and pages.
pub(super) fn manifests() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let read = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let Samples { repository, snapshots, .. } = samples();
            let reader = repository.reader().unwrap();
            let (mut roots, mut pages) = (Vec::new(), Vec::new());
            for snapshot in snapshots {
                let Content::Tree { root, .. } = &snapshot.content else { continue };
                for chunk in root {
                    roots.push(reader.get(chunk).await.unwrap().to_vec());
                }
                let manifest = crate::tree::manifest(repository, snapshot).await.unwrap();
                let chunks = manifest.pages().iter().map(|page| page.chunk).collect();
                let read: Vec<_> = std::sync::Arc::clone(&reader).get_many(chunks).try_collect().await.unwrap();
                pages.extend(read.into_iter().map(|(_, bytes)| bytes.to_vec()));
            }
            (roots, pages)
        })
    });
    read.join().unwrap()
}
