//! Healing: what a copy has comes back, what is lost is stored again by the next backup, and nothing whole is touched.
#![allow(clippy::unwrap_used, clippy::panic)]

mod trees;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::check::CheckOptions;
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::expire::ExpireOptions;
use lifeboat_repository::heal::{HealError, HealOptions, HealReport, heal_locks};
use lifeboat_repository::keys::Secret;
use lifeboat_repository::repository::{OpenOptions, Repository};
use lifeboat_repository::session::SessionOptions;
use lifeboat_repository::snapshot::Snapshot;
use lifeboat_repository::store::faulty::{Fault, Faulty, Operation};
use lifeboat_repository::store::memory::Memory;
use lifeboat_repository::store::{Reason, Store};
use lifeboat_repository::tree;

use trees::{made, noise, open, write};

struct Scene {
    store: Memory,
    /// As it was before anything was damaged.
    copy: Memory,
    source: tempfile::TempDir,
    snapshots: Vec<Snapshot>,
}

async fn back_up(store: &Memory, source: &Path, parent: Option<&Snapshot>) -> Snapshot {
    let plan = TreeBackup { lineage: "a".into(), parent: parent.cloned(), ..TreeBackup::default() };
    backup::tree(&open(store).await, source, plan, Arc::default()).await.unwrap().snapshot
}

async fn scene() -> Scene {
    let (store, _) = made().await;
    let source = tempfile::tempdir().unwrap();
    write(source.path(), "large", &noise(1, 3 << 20));
    write(source.path(), "small", b"small");
    let first = back_up(&store, source.path(), None).await;
    write(source.path(), "second", &noise(2, 100_000));
    let second = back_up(&store, source.path(), Some(&first)).await;
    let copy = Memory::replay(&store.journal());
    Scene { store, copy, source, snapshots: vec![first, second] }
}

fn damage(store: &Memory, key: &str, at: usize) {
    let mut bytes = store.object(key).unwrap().to_vec();
    bytes[at] ^= 0x20;
    store.overwrite(key, bytes.into());
}

async fn heal(store: &Memory, from: Option<&Memory>) -> HealReport {
    let from = from.map(|from| Arc::new(from.clone()) as Arc<dyn Store>);
    let options = HealOptions { from, check: CheckOptions::all_data(), dry_run: false };
    open(store).await.heal(options, Arc::default()).await.unwrap()
}

async fn read(store: &Memory, snapshot: &Snapshot, path: &str) -> Result<Bytes, ErrorClass> {
    let repository = open(store).await;
    let pieces = tree::read_file(&repository, snapshot, Path::new(path)).await.map_err(|error| error.class())?;
    let pieces: Vec<Bytes> = pieces.try_collect().await.map_err(|error| error.class())?;
    Ok(pieces.concat().into())
}

fn objects(store: &Memory) -> Vec<(String, Bytes)> {
    store.keys().into_iter().map(|key| (key.clone(), store.object(&key).unwrap())).collect()
}

/// Everything is as in the copy; a pack that is put back is kept from expiring meanwhile, which a registration tells of.
fn is_like(store: &Memory, copy: &Memory) -> bool {
    let is_trace = |key: &String| copy.object(key).is_none() && (key.starts_with("e/") || key.starts_with("d/"));
    objects(store).into_iter().filter(|(key, _)| !is_trace(key)).collect::<Vec<_>>() == objects(copy)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_object_comes_back_from_a_copy() {
    let Scene { store, copy, .. } = scene().await;
    let needed = ["p/", "k/", "d/", "r/", "x0/", "e/"];
    for key in store.keys().into_iter().filter(|key| needed.iter().any(|prefix| key.starts_with(prefix))) {
        let len = store.object(&key).unwrap().len();
        for at in [0, len / 2, len - 1] {
            damage(&store, &key, at);
            let report = heal(&store, Some(&copy)).await;
            assert_eq!(report.replaced, std::slice::from_ref(&key), "{key} byte {at}: {:?}", report.found);
            assert_eq!((report.masked, report.left), (0, vec![]), "{key} byte {at}");
            assert!(is_like(&store, &copy), "{key} byte {at}");
        }
    }
    // Packs and references that are missing altogether are known by name.
    for prefix in ["p/", "r/"] {
        let key = store.keys().into_iter().find(|key| key.starts_with(prefix)).unwrap();
        store.delete(&key).await.unwrap();
        assert_eq!(heal(&store, Some(&copy)).await.replaced, [key]);
        assert!(is_like(&store, &copy));
    }
    let untouched = heal(&store, Some(&copy)).await;
    assert!(untouched.replaced.is_empty() && untouched.found.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_does_not_open_gets_its_locks_back() {
    let Scene { store, copy, .. } = scene().await;
    let shared: Arc<dyn Store> = Arc::new(store.clone());
    let slot = store.keys().into_iter().find(|key| key.starts_with("keys/")).unwrap();
    for key in ["config", &slot] {
        damage(&store, key, 30);
        let opened = Repository::open(shared.clone(), &Secret::key_file([7; 32]), OpenOptions::default()).await;
        assert!(opened.is_err(), "{key}");
        assert_eq!(heal_locks(&shared, &copy).await.unwrap(), [key.to_owned()]);
        assert!(objects(&store) == objects(&copy), "{key}");
    }
    // The locks of another repository do not fit.
    let (other, _) = made().await;
    damage(&store, "config", 30);
    assert!(heal_locks(&shared, &other).await.unwrap().is_empty());
    // A slot that was removed on purpose stays away.
    assert_eq!(heal_locks(&shared, &copy).await.unwrap(), ["config"]);
    store.delete(&slot).await.unwrap();
    assert!(heal_locks(&shared, &copy).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_damaged_or_forged_is_not_taken() {
    let Scene { store, copy, .. } = scene().await;
    let pack = store.keys().into_iter().find(|key| key.starts_with("p/")).unwrap();
    damage(&store, &pack, 100);
    damage(&copy, &pack, 90);
    let before = objects(&store);
    let report = heal(&store, Some(&copy)).await;
    assert_eq!(report.replaced, [""; 0]);
    assert!(!report.left.is_empty() && report.masked > 0);
    assert!(before.iter().all(|(key, bytes)| store.object(key).as_ref() == Some(bytes)), "nothing was changed");
    // With a fitting hash, as anyone can make it, and other bytes.
    let mut forged = copy.object(&pack).unwrap().to_vec();
    let hash_at = forged.len() - 48;
    let hash = blake3::hash(&forged[..hash_at]);
    forged[hash_at..hash_at + 32].copy_from_slice(hash.as_bytes());
    copy.overwrite(&pack, forged.into());
    assert_eq!(heal(&store, Some(&copy)).await.replaced, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_copy_the_next_backup_stores_what_was_lost_and_old_snapshots_read_it() {
    let Scene { store, source, snapshots, .. } = scene().await;
    let [first, second] = &snapshots[..] else { panic!() };
    // The data pack of the first snapshot: the content of `large` begins right after the header.
    let prefix = format!("p/{}/", first.session);
    let data = store.keys().into_iter().filter(|key| key.starts_with(&prefix));
    let pack = data.max_by_key(|key| store.object(key).unwrap().len()).unwrap();
    damage(&store, &pack, 100);
    assert_eq!(read(&store, second, "large").await, Err(ErrorClass::Damaged));

    // A look changes nothing.
    let options = HealOptions { from: None, check: CheckOptions::all_data(), dry_run: true };
    let look = open(&store).await.heal(options, Arc::default()).await.unwrap();
    assert_eq!(look.masked, 1);
    assert!(store.keys().iter().all(|key| !key.starts_with("b/")));
    // Unmasked, the damaged chunk is inherited again and again.
    let third = back_up(&store, source.path(), Some(second)).await;
    assert_eq!(read(&store, &third, "large").await, Err(ErrorClass::Damaged));

    let report = heal(&store, None).await;
    assert_eq!((report.replaced.len(), report.masked), (0, 1));
    assert!(!report.left.is_empty(), "lost is lost until the next backup");
    assert_eq!(heal(&store, None).await.masked, 0, "it is masked already");
    let healed = back_up(&store, source.path(), Some(&third)).await;
    assert!(healed.stats.new_bytes > 0 && healed.stats.new_bytes <= 2 << 20, "{}", healed.stats.new_bytes);
    for snapshot in [first, second, &third, &healed] {
        assert_eq!(read(&store, snapshot, "large").await.unwrap(), noise(1, 3 << 20), "{}", snapshot.id);
        assert_eq!(read(&store, snapshot, "small").await.unwrap(), &b"small"[..]);
    }
    // What is masked is no less alive: expiry, which repacks what it can, takes nothing of the others.
    let repository = open(&store).await;
    repository.forget(&[third.id]).await.unwrap();
    repository.expire(ExpireOptions::default(), Arc::default()).await.unwrap();
    for snapshot in [first, second, &healed] {
        assert_eq!(read(&store, snapshot, "large").await.unwrap(), noise(1, 3 << 20), "{}", snapshot.id);
        assert_eq!(read(&store, snapshot, "small").await.unwrap(), &b"small"[..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_marks_and_tombstones_come_back_from_a_copy_that_nobody_worked_on() {
    let Scene { store, snapshots, .. } = scene().await;
    let repository = open(&store).await;
    repository.forget(&[snapshots[0].id]).await.unwrap();
    repository.expire(ExpireOptions::default(), Arc::default()).await.unwrap();
    repository.forget(&[snapshots[1].id]).await.unwrap();
    let copy = Memory::replay(&store.journal());
    let kinds = ["e/", "g/", "t/"];
    let keys: Vec<_> = store.keys().into_iter().filter(|key| kinds.iter().any(|kind| key.starts_with(kind))).collect();
    assert!(keys.len() >= 11, "{keys:?}");
    for key in &keys {
        damage(&store, key, store.object(key).unwrap().len() / 2);
        let report = heal(&store, Some(&copy)).await;
        assert_eq!((report.replaced, report.left), (vec![key.clone()], vec![]), "{:?}", report.found);
        assert!(objects(&store) == objects(&copy), "{key}");
    }
    // Both went on by themselves: what lies in a slot of the one is none of the other's.
    let fresh = |store: &Memory| store.keys().into_iter().find(|key| key.starts_with("e/") && !keys.contains(key));
    let mut key = None;
    while key.is_none() || key != fresh(&copy) {
        for store in [&store, &copy] {
            // The lane is chosen at random.
            open(store).await.begin(SessionOptions::default()).await.unwrap().abort("test").await.unwrap();
        }
        key = fresh(&store);
    }
    let key = key.unwrap();
    damage(&store, &key, 20);
    let report = heal(&store, Some(&copy)).await;
    assert_eq!((report.replaced, report.left.len()), (vec![], 1));
    // A replica has the same keys, and slots and rounds of its own.
    let other = Memory::new();
    repository.init_replica(Arc::new(other.clone()), &Secret::key_file([7; 32])).await.unwrap();
    let options = HealOptions { from: Some(Arc::new(other)), ..HealOptions::default() };
    let refused = open(&store).await.heal(options, Arc::default()).await.unwrap_err();
    assert!(matches!(refused, HealError::NotACopy), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expired_while_a_heal_was_dead_does_not_come_back() {
    let Scene { store, copy, snapshots, .. } = scene().await;
    let prefix = format!("p/{}/", snapshots[0].session);
    let pack = store.keys().into_iter().find(|key| key.starts_with(&prefix)).unwrap();
    for expires in [false, true] {
        damage(&store, &pack, 100);
        let dying = Faulty::new(Arc::new(store.clone()), |operation, key: &str| {
            let is_last = operation == Operation::Put && key.starts_with("p/");
            if is_last { Fault::Before(Reason::Unreachable) } else { Fault::None }
        });
        let secret = Secret::key_file([7; 32]);
        let opened = Repository::open(Arc::new(dying), &secret, OpenOptions::default()).await.unwrap();
        let options = HealOptions { from: Some(Arc::new(copy.clone())), ..HealOptions::default() };
        let options = HealOptions { check: CheckOptions::all_data(), ..options };
        assert!(opened.heal(options, Arc::default()).await.is_err());
        assert!(store.object(&pack).is_none() && store.keys().iter().any(|key| key.starts_with("h/")));
        if expires {
            let repository = open(&store).await;
            repository.forget(&snapshots.iter().map(|snapshot| snapshot.id).collect::<Vec<_>>()).await.unwrap();
            let options = ExpireOptions { silence: std::time::Duration::ZERO, ..ExpireOptions::default() };
            repository.expire(options, Arc::default()).await.unwrap();
        }
        let replaced = heal(&store, None).await.replaced;
        assert_eq!(replaced, if expires { vec![] } else { vec![pack.clone()] });
        assert!(store.keys().iter().all(|key| !key.starts_with("h/")));
        assert_eq!(store.object(&pack).is_some(), !expires);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_pack_is_stored_again_too() {
    let Scene { store, source, snapshots, .. } = scene().await;
    let prefix = format!("p/{}/", snapshots[0].session);
    let data = store.keys().into_iter().filter(|key| key.starts_with(&prefix));
    let pack = data.max_by_key(|key| store.object(key).unwrap().len()).unwrap();
    store.delete(&pack).await.unwrap();
    assert!(heal(&store, None).await.masked > 1);
    let healed = back_up(&store, source.path(), Some(&snapshots[1])).await;
    for snapshot in snapshots.iter().chain([&healed]) {
        assert_eq!(read(&store, snapshot, "large").await.unwrap(), noise(1, 3 << 20));
    }
}
