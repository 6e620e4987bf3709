//! Sessions on the strict memory store: what is committed exists wholly, what is not does not exist at all.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::keys::Secret;
use lifeboat_repository::read::ReadError;
use lifeboat_repository::repository::{
    AbortOutcome, FindError, InitError, InitOptions, OpenError, OpenOptions, Repository,
};
use lifeboat_repository::session::{Session, SessionError, SessionOptions};
use lifeboat_repository::sink::{ChunkKind, ChunkRef, ChunkSink, ChunkSource, Place};
use lifeboat_repository::snapshot::{Content, Counts, NewSnapshot, WriteStats};
use lifeboat_repository::store::memory::{Memory, Mutation};
use lifeboat_repository::store::{ByteRange, Store};

fn secret() -> Secret {
    Secret::key_file([7; 32])
}

async fn open(store: &Memory) -> Repository {
    Repository::open(Arc::new(store.clone()), &secret(), OpenOptions::default()).await.unwrap()
}

async fn made() -> (Memory, Repository) {
    let store = Memory::new();
    let repository = Repository::init(Arc::new(store.clone()), &secret(), InitOptions::default()).await.unwrap();
    (store, repository)
}

async fn put(session: &Session, kind: ChunkKind, plain: &[u8]) -> (ChunkRef, bool) {
    let put = session.put(kind, session.chunk_id(plain), Bytes::copy_from_slice(plain)).await.unwrap();
    (put.chunk, put.new)
}

fn snapshot(lineage: &str, root: Vec<ChunkRef>) -> NewSnapshot {
    NewSnapshot {
        id: SnapshotId::random(),
        time: lifeboat_repository::clock::now(),
        lineage: lineage.to_owned(),
        tags: BTreeMap::new(),
        host: String::new(),
        parent: None,
        content: Content::Tree { root, skipped: Vec::new() },
        counts: Counts::default(),
        stats: WriteStats::default(),
    }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Commits one snapshot with these chunks and returns it with its references.
async fn commit(repository: &Repository, lineage: &str, chunks: &[&[u8]]) -> (SnapshotId, Vec<ChunkRef>) {
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    let mut refs = Vec::new();
    for plain in chunks {
        refs.push(put(&session, ChunkKind::Data, plain).await.0);
    }
    let committed = session.commit(vec![snapshot(lineage, refs.clone())]).await.unwrap();
    (committed[0].id, refs)
}

#[tokio::test]
async fn what_is_committed_reads_back_in_another_process() {
    let (store, repository) = made().await;
    let (large, small) = (noise(1, 3 << 20), b"small".to_vec());
    let (id, refs) = commit(&repository, "a", &[&large, &small, b""]).await;

    let other = open(&store).await;
    let found = other.find(&id.to_string()[..6]).await.unwrap();
    assert_eq!(found.content, Content::Tree { root: refs.clone(), skipped: Vec::new() });
    assert_eq!(other.find("latest").await.unwrap().id, id);
    let reader = other.reader().unwrap();
    assert_eq!(reader.get(&refs[0]).await.unwrap(), large);
    assert_eq!(reader.get(&refs[2]).await.unwrap(), Bytes::new());
    let mut all: Vec<_> = reader.get_many(refs.clone()).try_collect().await.unwrap();
    all.sort_by_key(|(index, _)| *index);
    assert_eq!(all, [(0, Bytes::from(large)), (1, Bytes::from(small)), (2, Bytes::new())]);
}

#[tokio::test]
async fn known_chunks_are_not_stored_again() {
    let (store, repository) = made().await;
    let plain = noise(2, 1 << 20);
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    assert!(put(&session, ChunkKind::Data, &plain).await.1);
    assert!(!put(&session, ChunkKind::Data, &plain).await.1, "the same session");
    let stats = session.stats();
    assert_eq!((stats.chunks, stats.new_chunks, stats.new_bytes), (2, 1, 1 << 20));
    let parent = session.commit(vec![snapshot("a", Vec::new())]).await.unwrap().remove(0);

    let session = repository.begin(SessionOptions::default()).await.unwrap();
    assert!(!put(&session, ChunkKind::Data, &plain).await.1, "the same process");
    session.abort("only a test").await.unwrap();
    let session = open(&store).await.begin(SessionOptions::default()).await.unwrap();
    let (chunk, new) = put(&session, ChunkKind::Data, &plain).await;
    assert!(!new, "another process");
    assert!(!session.inherit(&chunk), "no parent was named");
    session.inherit_from(&parent).await.unwrap();
    assert!(session.inherit(&chunk));
    let other = ChunkRef { place: Place { slot: 77, ..chunk.place }, ..chunk };
    assert!(!session.inherit(&other), "the parent does not refer to it");
}

#[tokio::test]
async fn many_writers_at_once_lose_nothing() {
    let (store, _) = made().await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8u64 {
        let store = store.clone();
        writers.spawn(async move {
            let repository = open(&store).await;
            let session = repository.begin(SessionOptions::default()).await.unwrap();
            let mut refs = Vec::new();
            for chunk in 0..40 {
                // Half of the chunks are the same for all writers.
                let seed = if chunk % 2 == 0 { chunk } else { 1000 * (writer + 1) + chunk };
                refs.push((seed, put(&session, ChunkKind::Data, &noise(seed, 30_000)).await.0));
            }
            session.commit(vec![snapshot("w", refs.iter().map(|(_, chunk)| *chunk).collect())]).await.unwrap();
            refs
        });
    }
    let written = writers.join_all().await;
    let repository = open(&store).await;
    assert_eq!(repository.snapshots().await.unwrap().len(), 8);
    let reader = repository.reader().unwrap();
    for (seed, chunk) in written.into_iter().flatten() {
        assert_eq!(reader.get(&chunk).await.unwrap(), noise(seed, 30_000));
    }
}

#[tokio::test]
async fn concurrent_puts_of_one_chunk_store_it_once() {
    let (_, repository) = made().await;
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    let plain = noise(3, 200_000);
    let puts = (0..16).map(|_| put(&session, ChunkKind::Data, &plain));
    let results = futures::future::join_all(puts).await;
    assert_eq!(results.iter().filter(|(_, new)| *new).count(), 1);
    assert!(results.iter().all(|(chunk, _)| *chunk == results[0].0));
}

#[tokio::test]
async fn more_than_a_budget_of_data_flows_through() {
    let (store, repository) = made().await;
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    let mut refs = Vec::new();
    for seed in 0..60 {
        refs.push(put(&session, ChunkKind::Data, &noise(seed, 4 << 20)).await.0);
    }
    session.commit(vec![snapshot("big", refs.clone())]).await.unwrap();
    let packs = store.keys().into_iter().filter(|key| key.starts_with("p/")).count();
    assert!((7..=9).contains(&packs), "{packs} packs for 240 MiB");
    assert_eq!(open(&store).await.reader().unwrap().get(&refs[59]).await.unwrap(), noise(59, 4 << 20));
}

/// Each takes a KiB of the budget, however small it is: two packs of nothing else must not take it all.
#[tokio::test]
async fn very_many_very_small_chunks_leave_room_for_a_large_one() {
    let (_, repository) = made().await;
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    for number in 0..33_500_u32 {
        let bytes = number.to_le_bytes();
        put(&session, ChunkKind::Data, &bytes).await;
        put(&session, ChunkKind::Manifest, &[&bytes[..], b"m"].concat()).await;
    }
    let large = noise(1, 16 << 20);
    let put = tokio::time::timeout(Duration::from_mins(1), put(&session, ChunkKind::Data, &large));
    assert!(put.await.unwrap().1);
}

#[tokio::test]
async fn an_aborted_session_is_invisible_and_its_data_is_found_again() {
    let (store, repository) = made().await;
    let plain = noise(4, 33 << 20);
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    for piece in plain.chunks(1 << 20) {
        put(&session, ChunkKind::Data, piece).await;
    }
    // The first pack is uploaded in the background.
    while session.stats().uploaded_bytes == 0 {
        tokio::task::yield_now().await;
    }
    session.abort("cancelled").await.unwrap();
    let other = open(&store).await;
    assert!(other.snapshots().await.unwrap().is_empty());
    let again = other.begin(SessionOptions::default()).await.unwrap();
    assert!(!put(&again, ChunkKind::Data, &plain[..1 << 20]).await.1);
    assert!(matches!(Arc::clone(&session).commit(vec![]).await, Err(SessionError::Closed { .. })));
}

#[tokio::test]
async fn a_session_that_another_aborted_cannot_commit_and_the_other_way_round() {
    let (_, repository) = made().await;
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    put(&session, ChunkKind::Data, b"x").await;
    assert_eq!(repository.abort_session(session.id(), "looked dead").await.unwrap(), AbortOutcome::Aborted);
    let error = Arc::clone(&session).commit(vec![snapshot("a", vec![])]).await.unwrap_err();
    assert!(matches!(error, SessionError::AbortedByAnother { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Conflict);
    assert!(repository.snapshots().await.unwrap().is_empty());

    let session = repository.begin(SessionOptions::default()).await.unwrap();
    let id = session.id();
    session.commit(vec![snapshot("a", vec![])]).await.unwrap();
    assert_eq!(repository.abort_session(id, "too late").await.unwrap(), AbortOutcome::Committed);
    assert_eq!(repository.snapshots().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_wrong_key_and_a_missing_repository_are_told_apart() {
    let (store, _) = made().await;
    let wrong =
        Repository::open(Arc::new(store), &Secret::key_file([8; 32]), OpenOptions::default()).await.unwrap_err();
    assert!(matches!(wrong, OpenError::WrongSecret { .. }), "{wrong}");
    assert_eq!(wrong.class(), ErrorClass::Key);
    let none = Repository::open(Arc::new(Memory::new()), &secret(), OpenOptions::default()).await.unwrap_err();
    assert!(matches!(none, OpenError::NoRepository { .. }), "{none}");
    assert_eq!(none.class(), ErrorClass::NotFound);
    let empty =
        Repository::open(Arc::new(Memory::new()), &Secret::passphrase(String::new()), OpenOptions::default()).await;
    assert!(matches!(empty.unwrap_err(), OpenError::Secret(_)));
}

#[tokio::test]
async fn of_two_inits_at_once_one_wins() {
    let store = Memory::new();
    let init = |key: u8| {
        let store = Arc::new(store.clone());
        async move { Repository::init(store, &Secret::key_file([key; 32]), InitOptions::default()).await }
    };
    let (first, second) = futures::join!(init(1), init(2));
    let winner = match (&first, &second) {
        (Ok(_), Err(InitError::Exists { .. })) => 1,
        (Err(InitError::Exists { .. }), Ok(_)) => 2,
        other => panic!("{other:?}"),
    };
    Repository::open(Arc::new(store.clone()), &Secret::key_file([winner; 32]), OpenOptions::default()).await.unwrap();
    let again = Repository::init(Arc::new(store), &secret(), InitOptions::default()).await.unwrap_err();
    assert!(matches!(again, InitError::Exists { .. }));
}

#[tokio::test]
async fn names_of_snapshots_are_checked() {
    let (_, repository) = made().await;
    for wanted in ["abc", "ABCD", "zzzz", "../../etc", ""] {
        assert!(matches!(repository.find(wanted).await, Err(FindError::Malformed { .. })), "{wanted:?}");
    }
    assert!(matches!(repository.find("latest").await, Err(FindError::None { .. })));
    assert!(matches!(repository.find("abcd").await, Err(FindError::None { .. })));
}

#[tokio::test]
async fn a_crash_after_any_change_of_the_store_leaves_all_commits_whole() {
    let (store, repository) = made().await;
    let (_, first) = commit(&repository, "a", &[&noise(1, 50_000), b"shared"]).await;
    let (_, second) = commit(&repository, "a", &[&noise(2, 50_000), b"shared"]).await;
    let journal = store.journal();
    let commits: Vec<_> = journal
        .iter()
        .enumerate()
        .filter(|(_, m)| matches!(m, Mutation::Create(key, _) if key.starts_with("d/")))
        .map(|(n, _)| n)
        .collect();
    assert_eq!(commits.len(), 2);
    let configured = journal.iter().position(|m| matches!(m, Mutation::Create(key, _) if key == "config")).unwrap();
    for crash in configured + 1..=journal.len() {
        let survivor = Memory::replay(&journal[..crash]);
        let repository = open(&survivor).await;
        let expected = commits.iter().filter(|commit| **commit < crash).count();
        assert_eq!(repository.snapshots().await.unwrap().len(), expected, "after {crash} changes");
        let reader = repository.reader().unwrap();
        for refs in [&first, &second].into_iter().take(expected) {
            let read: Vec<_> = Arc::clone(&reader).get_many(refs.clone()).try_collect().await.unwrap();
            assert_eq!(read.len(), 2);
        }
        // What a dead writer left behind does not hinder the next one.
        let (_, again) = commit(&repository, "a", &[&noise(2, 50_000), b"shared"]).await;
        assert_eq!(reader.get(&again[0]).await.unwrap(), noise(2, 50_000));
    }
}

/// The store with one byte of one object changed.
fn with_damage(journal: &[Mutation], damaged: &str, at: usize) -> Memory {
    let changed: Vec<_> = journal
        .iter()
        .map(|mutation| match mutation {
            Mutation::Create(key, bytes) if key == damaged => {
                let mut bytes = bytes.to_vec();
                bytes[at] ^= 0x40;
                Mutation::Create(key.clone(), bytes.into())
            }
            other => other.clone(),
        })
        .collect();
    Memory::replay(&changed)
}

#[tokio::test]
async fn damage_in_any_object_is_an_error_or_harmless_and_never_wrong_data() {
    let (store, repository) = made().await;
    let plain = noise(5, 3000);
    let (_, refs) = commit(&repository, "a", &[&plain]).await;
    let journal = store.journal();
    for mutation in &journal {
        let Mutation::Create(key, bytes) = mutation else { continue };
        let step = (bytes.len() / 60).max(1);
        for at in (0..bytes.len()).step_by(step) {
            let damaged = Arc::new(with_damage(&journal, key, at));
            let Ok(repository) = Repository::open(damaged, &secret(), OpenOptions::default()).await else { continue };
            let Ok(snapshots) = repository.snapshots().await else { continue };
            assert_eq!(snapshots.len(), 1, "{key} byte {at}");
            match repository.reader().unwrap().get(&refs[0]).await {
                Ok(read) => assert_eq!(read, plain, "{key} byte {at}"),
                Err(error) => assert_eq!(error.class(), ErrorClass::Damaged, "{key} byte {at}: {error}"),
            }
        }
    }
}

#[tokio::test]
async fn a_missing_pack_is_named() {
    let (store, repository) = made().await;
    let (_, refs) = commit(&repository, "a", &[b"gone"]).await;
    let pack = store.keys().into_iter().find(|key| key.starts_with("p/")).unwrap();
    store.delete(&pack).await.unwrap();
    let error = open(&store).await.reader().unwrap().get(&refs[0]).await.unwrap_err();
    assert!(matches!(error, ReadError::Missing { .. }), "{error}");
    // The index still names the pack; the next backup must not believe it.
    let (_, again) = commit(&open(&store).await, "a", &[b"gone"]).await;
    assert_eq!(open(&store).await.reader().unwrap().get(&again[0]).await.unwrap(), &b"gone"[..]);
    // The old reference is served by the new copy.
    assert_eq!(open(&store).await.reader().unwrap().get(&refs[0]).await.unwrap(), &b"gone"[..]);
}

#[tokio::test]
async fn a_later_format_and_marks_of_expiry_that_cannot_be_read_are_refused() {
    let (store, repository) = made().await;
    for lane in 0..4 {
        let slot = format!("e/0000000000/{lane:04}/0000000000");
        store.put_if_absent(&slot, b"LBSEAL01".to_vec().into()).await.unwrap();
    }
    let error = repository.begin(SessionOptions::default()).await.unwrap_err();
    assert!(matches!(error, SessionError::Marks { .. }), "the epoch before is sealed, so there must be marks: {error}");
    store.put_if_absent("g/0000000001/condemned", b"x".to_vec().into()).await.unwrap();
    let error = repository.begin(SessionOptions::default()).await.unwrap_err();
    assert!(matches!(error, SessionError::Marks { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Damaged);
    let config = store.get_range("config", ByteRange::Suffix(1 << 20)).await.unwrap();
    let newer = String::from_utf8(config.to_vec()).unwrap().replace("\"format\": 1", "\"format\": 2");
    let other = Memory::new();
    other.put_if_absent("config", newer.into_bytes().into()).await.unwrap();
    let error = Repository::open(Arc::new(other), &secret(), OpenOptions::default()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Unsupported, "{error}");
}

#[tokio::test]
async fn the_local_cache_serves_and_heals_itself() {
    let (store, repository) = made().await;
    let (id, _) = commit(&repository, "a", &[b"x"]).await;
    let cache = tempfile::tempdir().unwrap();
    let options = || OpenOptions { cache_dir: Some(cache.path().to_owned()) };
    for _ in 0..2 {
        let opened = Repository::open(Arc::new(store.clone()), &secret(), options()).await.unwrap();
        assert_eq!(opened.snapshots().await.unwrap()[0].id, id);
    }
    let decisions = cache.path().join(repository.id().to_string()).join("d");
    let cached = std::fs::read_dir(&decisions).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&cached, b"damaged").unwrap();
    let opened = Repository::open(Arc::new(store.clone()), &secret(), options()).await.unwrap();
    assert!(opened.snapshots().await.is_err(), "a damaged copy is found");
    assert_eq!(opened.snapshots().await.unwrap()[0].id, id, "and fetched anew");
}

#[tokio::test]
async fn what_a_session_stored_is_in_the_cache_of_the_next() {
    let (store, repository) = made().await;
    let cache = tempfile::tempdir().unwrap();
    let options = OpenOptions { cache_dir: Some(cache.path().to_owned()) };
    let opened = Repository::open(Arc::new(store.clone()), &secret(), options).await.unwrap();
    commit(&opened, "a", &[b"x"]).await;
    let cache = cache.path().join(repository.id().to_string());
    let small: Vec<_> =
        store.keys().into_iter().filter(|key| ["d/", "k/", "r/", "x0/"].iter().any(|of| key.starts_with(of))).collect();
    assert_eq!(small.len(), 4, "{small:?}");
    for key in small {
        assert_eq!(std::fs::read(cache.join(&key)).unwrap(), store.object(&key).unwrap(), "{key}");
    }
}
