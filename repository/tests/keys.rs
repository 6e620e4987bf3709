//! What opens a repository, and what each role can and cannot do with it.
#![allow(clippy::unwrap_used, clippy::panic)]

mod trees;

use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::check::{CheckError, CheckOptions};
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::keys::{KeySlotsError, Role, Secret, SlotKind};
use lifeboat_repository::repository::{OpenError, OpenOptions, Repository};
use lifeboat_repository::restore::{self, RestoreOptions};
use lifeboat_repository::scrub::{ScrubOptions, scrub};
use lifeboat_repository::share::Share;
use lifeboat_repository::store::memory::Memory;
use lifeboat_repository::tree;

use trees::{made, noise, write};

const WRITER: [u8; 32] = [8; 32];

async fn open_with(store: &Memory, secret: &Secret) -> Result<Repository, OpenError> {
    Repository::open(Arc::new(store.clone()), secret, OpenOptions::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_come_and_go_and_the_last_that_reads_stays() {
    let (store, repository) = made().await;
    let (words, file) = (Secret::passphrase("correct horse".into()), Secret::key_file([9; 32]));
    let by_words = repository.add_key(&words, Role::Full).await.unwrap();
    let slots = repository.key_slots().await.unwrap();
    assert_eq!(slots.len(), 2);
    let mine = slots.iter().find(|slot| slot.opened).unwrap();
    assert_eq!(mine.usable, Some((SlotKind::KeyFile, Role::Full)));
    let other = slots.iter().find(|slot| slot.name == by_words).unwrap();
    assert_eq!(other.usable, Some((SlotKind::Passphrase, Role::Full)));

    let opened = open_with(&store, &words).await.unwrap();
    opened.remove_key(&mine.name[..8]).await.unwrap();
    assert!(matches!(open_with(&store, &Secret::key_file([7; 32])).await, Err(OpenError::WrongSecret { .. })));
    let error = opened.remove_key(&by_words).await.unwrap_err();
    assert!(matches!(error, KeySlotsError::Last { .. }), "{error}");
    // A writer's slot does not count: nobody could read with it.
    let writer = opened.add_key(&Secret::key_file(WRITER), Role::Writer).await.unwrap();
    assert!(matches!(opened.remove_key(&by_words).await, Err(KeySlotsError::Last { .. })));

    opened.change_key(&file).await.unwrap();
    assert!(matches!(open_with(&store, &words).await, Err(OpenError::WrongSecret { .. })));
    let opened = open_with(&store, &file).await.unwrap();
    opened.remove_key(&writer).await.unwrap();
    assert_eq!(opened.key_slots().await.unwrap().len(), 1);
    for (wanted, class) in [("abc", ErrorClass::NotFound), ("0123abcd", ErrorClass::NotFound)] {
        assert_eq!(opened.remove_key(wanted).await.unwrap_err().class(), class);
    }
    let empty = opened.add_key(&Secret::passphrase(String::new()), Role::Full).await.unwrap_err();
    assert_eq!(empty.class(), ErrorClass::Key);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_remove_the_last_two_keys_one_is_stopped() {
    for _ in 0..20 {
        let (store, repository) = made().await;
        let second = repository.add_key(&Secret::key_file([9; 32]), Role::Full).await.unwrap();
        let slots = repository.key_slots().await.unwrap();
        let first = slots.iter().find(|slot| slot.name != second).unwrap().name.clone();
        let _ = futures::join!(repository.remove_key(&first), repository.remove_key(&second));
        let left = open_with(&store, &Secret::key_file([7; 32])).await.is_ok();
        assert!(left || open_with(&store, &Secret::key_file([9; 32])).await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_slots_are_shown_and_can_be_removed() {
    let (store, repository) = made().await;
    let name = repository.add_key(&Secret::key_file([9; 32]), Role::Full).await.unwrap();
    store.overwrite(&format!("keys/{name}"), vec![1, 2, 3].into());
    let slots = repository.key_slots().await.unwrap();
    assert!(slots.iter().any(|slot| slot.name == name && slot.usable.is_none()));
    let sound = slots.iter().find(|slot| slot.opened).unwrap();
    assert!(matches!(repository.remove_key(&sound.name).await, Err(KeySlotsError::Last { .. })));
    repository.remove_key(&name).await.unwrap();
}

/// A repository with a backup of a file, and the same repository as a writer opens it.
async fn with_writer() -> (Memory, Repository, Repository, tempfile::TempDir) {
    let (store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    write(source.path(), "secret", &noise(1, 200_000));
    write(source.path(), "small", b"small secret");
    repository.add_key(&Secret::key_file(WRITER), Role::Writer).await.unwrap();
    let plan = TreeBackup { lineage: "old".into(), ..TreeBackup::default() };
    backup::tree(&repository, source.path(), plan, Arc::default()).await.unwrap();
    let writer = open_with(&store, &Secret::key_file(WRITER)).await.unwrap();
    (store, repository, writer, source)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_backs_up_and_deduplicates_but_reads_no_data_not_even_its_own() {
    let (_store, owner, writer, source) = with_writer().await;
    let old = writer.latest_of("old").await.unwrap().unwrap();
    write(source.path(), "new", &noise(2, 50_000));
    let plan = TreeBackup { lineage: "old".into(), parent: Some(old.clone()), ..TreeBackup::default() };
    let new = backup::tree(&writer, source.path(), plan, Arc::default()).await.unwrap().snapshot;
    assert!(new.stats.new_bytes < 60_000, "{}", new.stats.new_bytes);

    let target = tempfile::tempdir().unwrap();
    for snapshot in [&old, &new] {
        let names = tree::list(&writer, snapshot, None, true).await.unwrap();
        assert!(names.iter().any(|entry| entry.path == b"secret"), "names are a writer's to see");
        for path in ["secret", "small"] {
            let stream = tree::read_file(&writer, snapshot, Path::new(path)).await.unwrap();
            let error = stream.try_collect::<Vec<_>>().await.unwrap_err();
            assert_eq!(error.class(), ErrorClass::Key, "{path}: {error}");
        }
        let restored = restore::tree(&writer, snapshot, target.path(), RestoreOptions::default(), Arc::default()).await;
        assert_eq!(restored.unwrap_err().class(), ErrorClass::Key);
    }
    let restored = restore::tree(&owner, &new, target.path(), RestoreOptions::default(), Arc::default()).await.unwrap();
    assert_eq!(restored.failed, []);
    assert_eq!(std::fs::read(target.path().join("new")).unwrap(), noise(2, 50_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn maintenance_checks_and_scrubs_but_cannot_decrypt() {
    let (store, _owner, maintenance, _source) = with_writer().await;
    let report = maintenance.check(CheckOptions::default(), Arc::default()).await.unwrap();
    assert_eq!((report.snapshots, report.problems), (1, vec![]));
    let error = maintenance.check(CheckOptions::all_data(), Arc::default()).await.unwrap_err();
    assert!(matches!(error, CheckError::NoPrivateKey), "{error}");
    // No key at all is needed for this one.
    let options = ScrubOptions { share: Share::ALL, cache_dir: None };
    let report = scrub(Arc::new(store), options, Arc::default()).await.unwrap();
    assert_eq!((report.packs, report.packs_read, report.problems), (2, 2, vec![]));
    // It can shut others out, which it could by deleting objects, but it cannot let anybody read.
    let error = maintenance.add_key(&Secret::key_file([3; 32]), Role::Full).await.unwrap_err();
    assert!(matches!(error, KeySlotsError::NoPrivateKey), "{error}");
    assert!(!maintenance.reader().unwrap().can_read_data());
}
