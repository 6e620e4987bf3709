//! Expiry on the strict memory store, with an oracle that walks every manifest.

mod crashes;
mod protocol;
mod repacking;
mod zombies;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use super::marks::LiveRefs;
use super::*;
use crate::backup::{TreeBackup, VirtualFile, entries};
use crate::config::ChunkerConfig;
use crate::id::{ChunkRef, Place};
use crate::keys::Secret;
use crate::manifest::{Contents, Kind, Manifest, Piece, compare_paths};
use crate::pack::{PACKS_PREFIX, parse_pack_key};
use crate::refset::Refset;
use crate::repository::{InitOptions, OpenOptions};
use crate::session::references::References;
use crate::session::{Session, SessionOptions};
use crate::sink::{ChunkKind, ChunkSink};
use crate::snapshot::{Content, Snapshot};
use crate::store::Store;
use crate::store::memory::Memory;

/// Files by path.
type Files = BTreeMap<String, Vec<u8>>;
/// What each snapshot that lives must give back.
type Expected = BTreeMap<SnapshotId, Files>;

fn secret() -> Secret {
    Secret::key_file([7; 32])
}

async fn made() -> (Memory, Repository) {
    let store = Memory::new();
    let chunker = ChunkerConfig { min: 8192, average: 32768, max: 131_072, ..ChunkerConfig::default() };
    let repository = Repository::init(Arc::new(store.clone()), &secret(), InitOptions { chunker }).await.unwrap();
    (store, repository)
}

async fn open(store: impl Store + 'static) -> Repository {
    Repository::open(Arc::new(store), &secret(), OpenOptions::default()).await.unwrap()
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Files with these seeds as content, each of several chunks of its own.
fn files(seeds: &[u64]) -> Files {
    seeds.iter().map(|seed| (format!("dir/{seed}"), noise(*seed, 66_000))).collect()
}

async fn begin(repository: &Repository) -> Arc<Session> {
    repository.begin(SessionOptions::default()).await.unwrap()
}

async fn put(session: &Session, plain: &[u8]) -> (ChunkRef, bool) {
    let put = session.put(ChunkKind::Data, session.chunk_id(plain), Bytes::copy_from_slice(plain)).await.unwrap();
    (put.chunk, put.new)
}

async fn back_up(repository: &Repository, lineage: &str, files: &Files) -> Snapshot {
    try_back_up(repository, lineage, files).await.unwrap()
}

async fn try_back_up(
    repository: &Repository,
    lineage: &str,
    files: &Files,
) -> Result<Snapshot, crate::backup::BackupError> {
    let mut sorted: Vec<_> = files.iter().collect();
    sorted.sort_by(|a, b| compare_paths(a.0.as_bytes(), b.0.as_bytes()));
    let sorted: Vec<_> = sorted
        .into_iter()
        .map(|(path, bytes)| {
            Ok::<_, std::io::Error>(VirtualFile {
                path: path.clone(),
                bytes: Bytes::from(bytes.clone()),
                mtime: jiff::Timestamp::UNIX_EPOCH,
            })
        })
        .collect();
    let options = TreeBackup { lineage: lineage.to_owned(), ..TreeBackup::default() };
    Ok(entries(repository, futures::stream::iter(sorted), options, Arc::default()).await?.snapshot)
}

/// Every session that is not decided is dead.
fn merciless() -> ExpireOptions {
    ExpireOptions { silence: Duration::ZERO, ..impatient() }
}

/// Sessions are dead after a second without a sign, and nobody is waited for much longer.
fn impatient() -> ExpireOptions {
    let (silence, patience) = (Duration::from_secs(1), Duration::from_secs(5));
    // The index is merged as often as it can be, so that every test here is one of merging as well.
    ExpireOptions { silence, patience, merge_from: 1, ..ExpireOptions::default() }
}

async fn expire(repository: &Repository, options: ExpireOptions) -> ExpireReport {
    repository.expire(options, Arc::default()).await.unwrap()
}

async fn read_all(repository: &Repository, snapshot: &Snapshot) -> Files {
    let files: Vec<_> = crate::tree::read_files(repository, snapshot).await.unwrap().try_collect().await.unwrap();
    files.into_iter().map(|(path, bytes)| (String::from_utf8(path).unwrap(), bytes.to_vec())).collect()
}

/// Exactly these snapshots are there, and each gives back what was put in.
async fn assert_restores(repository: &Repository, expected: &Expected) {
    let snapshots = repository.snapshots().await.unwrap();
    let found: BTreeSet<_> = snapshots.iter().map(|snapshot| snapshot.id).collect();
    assert_eq!(found, expected.keys().copied().collect());
    for snapshot in &snapshots {
        assert!(read_all(repository, snapshot).await == expected[&snapshot.id], "{}", snapshot.id);
    }
}

/// Every chunk that the snapshot's manifest names, found by walking it.
async fn walk(repository: &Repository, snapshot: &Snapshot) -> Vec<ChunkRef> {
    let Content::Tree { root, skipped } = &snapshot.content else { return Vec::new() };
    let mut chunks: Vec<_> = root.iter().chain(skipped).copied().collect();
    let manifest = Manifest::open(repository.reader().unwrap(), root).await.unwrap();
    chunks.extend(manifest.pages().iter().map(|page| page.chunk));
    let mut pages = manifest.read(0..manifest.pages().len());
    while let Some(entries) = pages.next().await {
        for entry in entries.unwrap() {
            let Kind::Regular(file) = &entry.kind else { continue };
            for file in [file, &file.page_map_as_file()] {
                if let Contents::Listed(lists) = &file.contents {
                    chunks.extend(lists);
                }
                let pieces: Vec<_> = manifest.pieces(file).try_concat().await.unwrap();
                chunks.extend(pieces.into_iter().filter_map(|piece| match piece {
                    Piece::Data { chunk, .. } => Some(chunk),
                    Piece::Hole { .. } => None,
                }));
            }
        }
    }
    chunks
}

/// The oracle: refsets say exactly what the manifests need, every place holds the chunk that is named, and no pack lies
/// there that nothing refers to. Returns the packs.
async fn assert_exact(store: &Memory, repository: &Repository) -> PackSet {
    let engine = &repository.engine;
    let mut union = Refset::default();
    for snapshot in repository.snapshots().await.unwrap() {
        let LiveRefs { version, hash, .. } = engine.commits.references()[&snapshot.id];
        let references = References::load(engine, snapshot.id, version, &hash, &engine.commits.movers()).await.unwrap();
        let mut walked = Refset::default();
        for chunk in walk(repository, &snapshot).await {
            let place: Place = references.place(&chunk).expect("a chunk that no reference keeps");
            let directory = engine.directories.get(place.pack).await.unwrap();
            assert_eq!(directory.slots[usize::from(place.slot)].expected.id, chunk.id, "{place}");
            walked.insert(place);
        }
        assert_eq!(&walked, references.set(), "{}", snapshot.id);
        union.extend(&walked);
    }
    let stored = packs_in(store);
    assert_eq!(stored, union.pack_set(), "packs that lie there, and packs that are needed");
    stored
}

fn packs_in(store: &Memory) -> PackSet {
    store.keys().iter().filter(|key| key.starts_with(PACKS_PREFIX)).filter_map(|key| parse_pack_key(key)).collect()
}

fn count(store: &Memory, prefix: &str) -> usize {
    store.keys().iter().filter(|key| key.starts_with(prefix)).count()
}
