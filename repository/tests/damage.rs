//! Damage: a changed byte anywhere in any kind of object is found and located, by scrub without a key, by check with one.
#![allow(clippy::unwrap_used, clippy::panic)]

mod trees;

use std::collections::BTreeSet;
use std::sync::Arc;

use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::check::{CheckOptions, Problem};
use lifeboat_repository::config::ChunkerConfig;
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::expire::ExpireOptions;
use lifeboat_repository::heal::HealOptions;
use lifeboat_repository::keys::Secret;
use lifeboat_repository::repository::{InitOptions, OpenOptions, Repository};
use lifeboat_repository::restore::{self, RestoreOptions};
use lifeboat_repository::scrub::{ScrubOptions, ScrubReport, scrub};
use lifeboat_repository::session::SessionOptions;
use lifeboat_repository::share::Share;
use lifeboat_repository::snapshot::Snapshot;
use lifeboat_repository::store::faulty::{Fault, Faulty, Operation};
use lifeboat_repository::store::memory::Memory;
use lifeboat_repository::store::{Reason, Store};

use trees::{made, made_with, noise, write};

/// A repository with all kinds of objects: two snapshots, one expired, one forgotten; sessions that committed, aborted, and
/// read; a lost chunk, a heartbeat.
async fn filled() -> (Memory, Vec<Snapshot>) {
    let chunker = ChunkerConfig { min: 2048, average: 8192, max: 32768, ..ChunkerConfig::default() };
    let (store, repository) = made_with(InitOptions { chunker }).await;
    let source = tempfile::tempdir().unwrap();
    write(source.path(), "file", &noise(1, 3000));
    // Enough chunks for an index with a filter.
    write(source.path(), "large", &noise(2, 600_000));
    let plan = TreeBackup { lineage: "a".into(), ..TreeBackup::default() };
    let first = backup::tree(&repository, source.path(), plan.clone(), Arc::default()).await.unwrap().snapshot;
    write(source.path(), "other", &noise(2, 3000));
    let plan = TreeBackup { parent: Some(first.clone()), ..plan };
    let second = backup::tree(&repository, source.path(), plan, Arc::default()).await.unwrap().snapshot;
    let small = tempfile::tempdir().unwrap();
    write(small.path(), "file", &noise(3, 5000));
    let plan = TreeBackup { lineage: "b".into(), ..TreeBackup::default() };
    for _ in 0..2 {
        let gone = backup::tree(&repository, small.path(), plan.clone(), Arc::default()).await.unwrap().snapshot;
        let mut decisions = 0;
        let faulty = Faulty::new(Arc::new(store.clone()), move |operation, key: &str| {
            decisions += usize::from(operation == Operation::Put && key.starts_with("d/"));
            // Its commit; not the abort after it.
            if decisions == 1 && key.starts_with("d/") { Fault::Before(Reason::Unreachable) } else { Fault::None }
        });
        let secret = Secret::key_file([7; 32]);
        let aborts = Repository::open(Arc::new(faulty), &secret, OpenOptions::default()).await.unwrap();
        write(small.path(), "file", &noise(4, 5000));
        assert!(backup::tree(&aborts, small.path(), plan.clone(), Arc::default()).await.is_err());
        repository.forget(&[gone.id]).await.unwrap();
        if store.keys().iter().all(|key| !key.starts_with("g/")) {
            repository.expire(ExpireOptions::default(), Arc::default()).await.unwrap();
        }
    }
    let pack = store.keys().into_iter().find(|key| key.starts_with(&format!("p/{}", second.session))).unwrap();
    let whole = store.object(&pack).unwrap();
    store.overwrite(&pack, whole.slice(..100));
    trees::open(&store).await.heal(HealOptions::default(), Arc::default()).await.unwrap();
    store.overwrite(&pack, whole);
    drop(repository.pin(&second).await.unwrap().unwrap());
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    let time = lifeboat_repository::clock::now().to_string();
    store.put_if_absent(&format!("hb/{}/00000000", session.id()), time.into_bytes().into()).await.unwrap();
    (store, vec![first, second])
}

async fn scrubbed(store: &Memory) -> ScrubReport {
    let options = ScrubOptions { share: Share::ALL, cache_dir: None };
    scrub(Arc::new(store.clone()), options, Arc::default()).await.unwrap()
}

fn names(problem: &Problem, key: &str) -> bool {
    match problem {
        Problem::Object { key: found, .. } => found == key,
        Problem::Pack { pack, .. } => key == format!("p/{}/{:08x}", pack.session, pack.seq),
        _ => false,
    }
}

/// A digit of a time may become another digit: heartbeats are hints, and no harm is done.
fn is_hint(key: &str) -> bool {
    key.starts_with("hb/")
}

/// Check looks at what snapshots refer to, scrub at everything.
fn is_unused_pack(living: &[Snapshot], key: &str) -> bool {
    key.starts_with("p/") && living.iter().all(|of| !key[2..].starts_with(&of.session.to_string()))
}

/// What a scrub needs to begin, and this object.
fn alone(store: &Memory, key: &str) -> Memory {
    let small = Memory::new();
    for needed in store.keys().iter().filter(|found| *found == "config" || found.starts_with("keys/") || *found == key)
    {
        small.overwrite(needed, store.object(needed).unwrap());
    }
    small
}

/// Places in an object: some everywhere, all near its ends, where headers and trailers are.
fn places(len: usize) -> BTreeSet<usize> {
    (0..len.min(40))
        .step_by(2)
        .chain((len.saturating_sub(140)..len).step_by(3))
        .chain((0..len).step_by((len / 20).max(1)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_byte_anywhere_is_found_and_located_without_a_key() {
    let (full, _) = filled().await;
    assert_eq!(scrubbed(&full).await.problems, []);
    let store = &full;
    let kinds: BTreeSet<_> = store.keys().iter().map(|key| key.split('/').next().unwrap().to_owned()).collect();
    assert_eq!(
        kinds.into_iter().collect::<Vec<_>>(),
        ["b", "config", "d", "e", "g", "hb", "k", "keys", "p", "r", "t", "x0"]
    );
    let begins = |prefix: &str, magic: &[u8]| {
        store.keys().iter().any(|key| key.starts_with(prefix) && store.object(key).unwrap().starts_with(magic))
    };
    assert!(begins("e/", b"LBPINR01") && begins("e/", b"LBSEAL01") && begins("x0/", b"LBSEAL01"));
    for key in full.keys() {
        let store = alone(&full, &key);
        let whole = store.object(&key).unwrap();
        for at in places(whole.len()) {
            let mut changed = whole.to_vec();
            changed[at] ^= 0x04;
            store.overwrite(&key, changed.into());
            let report = scrubbed(&store).await;
            let is_found = report.problems.iter().any(|problem| names(problem, &key));
            assert!(is_found || is_hint(&key), "{key} byte {at}");
            assert!(report.problems.len() <= 1, "{key} byte {at}: {:?}", report.problems);
        }
        for len in [0, 1, whole.len() / 2, whole.len() - 1] {
            store.overwrite(&key, whole.slice(..len));
            let report = scrubbed(&store).await;
            assert!(is_hint(&key) || report.problems.iter().any(|problem| names(problem, &key)), "{key} cut to {len}");
        }
        store.overwrite(&key, [&whole[..], b"x"].concat().into());
        let is_found = scrubbed(&store).await.problems.iter().any(|problem| names(problem, &key));
        assert!(is_found || is_hint(&key), "{key} with more");
        // And among all the others.
        let whole = full.object(&key).unwrap();
        full.overwrite(&key, whole.slice(..whole.len() - 1));
        let report = scrubbed(&full).await;
        assert!(is_hint(&key) || report.problems.len() == 1 && names(&report.problems[0], &key), "{key}");
        full.overwrite(&key, whole);
    }
    assert_eq!(scrubbed(&full).await.problems, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_finds_and_locates_it_as_well_and_never_panics() {
    let (store, living) = filled().await;
    let open =
        async || Repository::open(Arc::new(store.clone()), &Secret::key_file([7; 32]), OpenOptions::default()).await;
    let clean = open().await.unwrap().check(CheckOptions::all_data(), Arc::default()).await.unwrap();
    assert_eq!((clean.snapshots, clean.problems), (2, vec![]));
    for key in store.keys() {
        let whole = store.object(&key).unwrap();
        let some: Vec<_> = places(whole.len()).into_iter().step_by(23).collect();
        let damaged = some.iter().map(|at| {
            let mut changed = whole.to_vec();
            changed[*at] ^= 0x80;
            changed
        });
        for changed in damaged.chain([whole[..whole.len() / 2].to_vec(), vec![]]) {
            store.overwrite(&key, changed.into());
            let found = match open().await {
                Ok(repository) => {
                    let report = repository.check(CheckOptions::all_data(), Arc::default()).await.unwrap();
                    report.problems.iter().any(|problem| names(problem, &key))
                }
                // Only what is needed to open anything keeps a repository from being opened.
                Err(error) => {
                    assert!(key == "config" || key.starts_with("keys/"), "{key}: {error}");
                    matches!(error.class(), ErrorClass::Damaged | ErrorClass::Unsupported | ErrorClass::Key)
                }
            };
            assert!(found || is_hint(&key) || is_unused_pack(&living, &key), "{key}");
        }
        store.overwrite(&key, whole);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_object_is_found_where_somebody_needs_it() {
    let (store, living) = filled().await;
    let is_commit = |key: &String| key.starts_with("d/") && store.object(key).unwrap().starts_with(b"LBCOMM01");
    let commits: String = store.keys().into_iter().filter(is_commit).collect();
    for key in store.keys() {
        // Nobody misses these: the record of a finished session, a hint, an index that deduplication finds poorer, a
        // tombstone without which a snapshot shows again, and what only forgotten snapshots and readers need.
        let is_needed =
            !["e/", "hb/", "x0/", "config", "keys/", "t/", "b/"].iter().any(|prefix| key.starts_with(prefix))
                && !is_unused_pack(&living, &key)
                && (!key.starts_with("r/") || living.iter().any(|of| key[2..].starts_with(&of.id.to_string())))
                && !key.contains("/done")
                && !key.contains("/live/");
        let whole = store.object(&key).unwrap();
        store.delete(&key).await.unwrap();
        if is_needed {
            let opened = trees::open(&store).await;
            let report = opened.check(CheckOptions::default(), Arc::default()).await.unwrap();
            // An aborted session, and a commit that no later one saw, are gone without a trace.
            let is_unseen = key.starts_with("d/") || key.starts_with("k/") && !commits.contains(&key[2..34]);
            assert!(is_unseen || !report.problems.is_empty(), "{key}");
        }
        store.overwrite(&key, whole);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_go_round_and_a_run_goes_on_where_the_last_one_stopped() {
    let (store, repository) = made().await;
    for seed in 0..9 {
        let source = tempfile::tempdir().unwrap();
        write(source.path(), "file", &noise(seed, 10_000));
        let plan = TreeBackup { lineage: format!("{seed}"), ..TreeBackup::default() };
        backup::tree(&repository, source.path(), plan, Arc::default()).await.unwrap();
    }
    let packs: Vec<_> = store.keys().into_iter().filter(|key| key.starts_with("p/")).collect();
    for key in &packs {
        let mut bytes = store.object(key).unwrap().to_vec();
        bytes[100] ^= 1;
        store.overwrite(key, bytes.into());
    }
    let cache = tempfile::tempdir().unwrap();
    let mut found = BTreeSet::new();
    for _ in 0..3 {
        let options = ScrubOptions { share: "1/3".parse().unwrap(), cache_dir: Some(cache.path().to_owned()) };
        let report = scrub(Arc::new(store.clone()), options, Arc::default()).await.unwrap();
        assert!(report.packs_read < report.packs);
        found.extend(report.problems.iter().map(ToString::to_string));
    }
    assert_eq!(found.len(), packs.len());
    // The same of a check, which counts packs.
    let options = CheckOptions { read_data: Some("1/3".parse().unwrap()), cache_dir: Some(cache.path().to_owned()) };
    let mut read = 0;
    for _ in 0..3 {
        let report = repository.check(options.clone(), Arc::default()).await.unwrap();
        read += report.problems.iter().filter(|problem| matches!(problem, Problem::Pack { .. })).count();
    }
    assert_eq!(read, packs.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_expires_while_a_commit_is_damaged_or_missing() {
    let (store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    let mut snapshots = Vec::new();
    for seed in 0..3 {
        write(source.path(), "file", &noise(seed, 50_000));
        let plan = TreeBackup { lineage: "a".into(), ..TreeBackup::default() };
        snapshots.push(backup::tree(&repository, source.path(), plan, Arc::default()).await.unwrap().snapshot);
    }
    repository.forget(&[snapshots[0].id]).await.unwrap();
    let commit = format!("d/{}", snapshots[1].session);
    let whole = store.object(&commit).unwrap();
    let packs = || store.keys().into_iter().filter(|key| key.starts_with("p/")).collect::<Vec<_>>();
    let options = ExpireOptions { silence: std::time::Duration::ZERO, ..ExpireOptions::default() };
    for damaged in [Some(whole.slice(..40)), None] {
        match damaged {
            Some(bytes) => store.overwrite(&commit, bytes),
            None => store.delete(&commit).await.unwrap(),
        }
        let before = packs();
        let refused = trees::open(&store).await.expire(options, Arc::default()).await.unwrap_err();
        assert_eq!(refused.class(), ErrorClass::Damaged, "{refused}");
        assert_eq!(packs(), before);
        // Restores go on without a pin, backups without what they would inherit.
        let opened = trees::open(&store).await;
        let target = tempfile::tempdir().unwrap();
        let restored = restore::tree(&opened, &snapshots[2], target.path(), RestoreOptions::default(), Arc::default());
        assert_eq!(restored.await.unwrap().failed, []);
        let plan = TreeBackup { lineage: "a".into(), parent: Some(snapshots[2].clone()), ..TreeBackup::default() };
        backup::tree(&opened, source.path(), plan, Arc::default()).await.unwrap();
    }
    store.overwrite(&commit, whole);
    let report = trees::open(&store).await.expire(options, Arc::default()).await.unwrap();
    assert_eq!((report.snapshots, report.snapshots_removed), (4, 1));
}
