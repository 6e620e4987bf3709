//! What a backup over a network asks of its store, request by request, and that what is remembered of earlier runs is never
//! trusted where it could be wrong.
#![allow(clippy::unwrap_used)]

mod trees;

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::keys::{Role, Secret};
use lifeboat_repository::repository::{InitOptions, OpenError, OpenOptions, Repository};
use lifeboat_repository::restore::{self, RestoreOptions};
use lifeboat_repository::snapshot::Snapshot;
use lifeboat_repository::store::Store;
use lifeboat_repository::store::faulty::{Fault, Faulty};
use lifeboat_repository::store::memory::Memory;
use lifeboat_repository::tree;
use tempfile::TempDir;
use trees::{noise, secret, write};

/// A machine: its cache, and what it asked of the store.
struct Machine {
    store: Memory,
    cache: TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Machine {
    fn new(store: &Memory) -> Self {
        Self { store: store.clone(), cache: tempfile::tempdir().unwrap(), asked: Arc::default() }
    }

    async fn open(&self, secret: &Secret) -> Result<Repository, OpenError> {
        let asked = Arc::clone(&self.asked);
        let store = Faulty::new(Arc::new(self.store.clone()), move |operation, key| {
            let kind = key.split('/').next().unwrap_or_default();
            asked.lock().unwrap().push(format!("{operation:?} {kind}"));
            Fault::None
        });
        let options = OpenOptions { cache_dir: Some(self.cache.path().to_owned()) };
        Repository::open(Arc::new(store), secret, options).await
    }

    async fn back_up(&self, root: &Path) -> Snapshot {
        let repository = self.open(&secret()).await.unwrap();
        let parent = repository.latest_of("test").await.unwrap();
        let plan = TreeBackup { lineage: "test".into(), parent, ..TreeBackup::default() };
        backup::tree(&repository, root, plan, Arc::default()).await.unwrap().snapshot
    }

    /// What was asked since the last look, sorted.
    fn asked(&self) -> Vec<String> {
        let mut asked = std::mem::take(&mut *self.asked.lock().unwrap());
        asked.sort();
        asked
    }
}

async fn made(files: u64) -> (Memory, Repository, TempDir) {
    let (store, repository) = trees::made_with(InitOptions::default()).await;
    let source = tempfile::tempdir().unwrap();
    for number in 0..files {
        // Names that do not compress: a manifest of 300 is small, one of 3,000 is larger than what comes along with a directory.
        let name = blake3::hash(&number.to_le_bytes()).to_hex();
        write(source.path(), &format!("d{}/{name}", number % 7), &noise(number, 300));
    }
    // Until the times of the files show their next change.
    tokio::time::sleep(std::time::Duration::from_millis(40)).await;
    (store, repository, source)
}

#[tokio::test]
async fn an_unchanged_backup_asks_only_for_what_may_have_changed() {
    let (store, _, source) = made(300).await;
    let machine = Machine::new(&store);
    machine.back_up(source.path()).await;
    machine.back_up(source.path()).await;
    machine.asked();
    let snapshot = machine.back_up(source.path()).await;
    assert_eq!((snapshot.stats.read_bytes, snapshot.stats.new_bytes), (0, 0));
    let expected = [
        "Get config",
        "Get e",
        "Get keys",
        "GetRange p",
        "List b",
        "List d",
        "List t",
        "Put d",
        "Put e",
        "Put k",
        "Put r",
    ];
    assert_eq!(machine.asked(), expected);
}

#[tokio::test]
async fn a_damaged_copy_of_a_pack_is_fetched_again_and_a_lost_pack_is_noticed_in_spite_of_its_copy() {
    let (store, repository, source) = made(3000).await;
    let machine = Machine::new(&store);
    machine.back_up(source.path()).await;
    let packs = machine.cache.path().join(repository.id().to_string()).join("p");
    let copies = || {
        let sessions = fs::read_dir(&packs).unwrap();
        sessions.flat_map(|session| fs::read_dir(session.unwrap().path()).unwrap()).map(|copy| copy.unwrap().path())
    };
    let copy = copies().next().unwrap();
    let mut bytes = fs::read(&copy).unwrap();
    assert!(bytes.len() > 64 << 10, "it would come along with its directory");
    let end = bytes.len();
    bytes[100..end].fill(0xee);
    fs::write(&copy, &bytes).unwrap();
    machine.asked();
    let snapshot = machine.back_up(source.path()).await;
    assert_eq!((snapshot.stats.read_bytes, snapshot.stats.new_bytes), (0, 0));
    let reads = machine.asked().iter().filter(|asked| *asked == "GetRange p").count();
    assert!(reads > 1, "the directory, and what the copy had");
    assert!(!copy.exists());
    // A new copy, whose pack then gets lost: the files are read again, and nothing refers to what is lost.
    write(source.path(), "new", &noise(1000, 3000));
    machine.back_up(source.path()).await;
    let copy = copies().next().unwrap();
    let name = copy.strip_prefix(packs.parent().unwrap()).unwrap().to_str().unwrap();
    store.delete(name).await.unwrap();
    let last = machine.back_up(source.path()).await;
    let target = tempfile::tempdir().unwrap();
    let reopened = trees::open(&store).await;
    restore::tree(&reopened, &last, target.path(), RestoreOptions::default(), Arc::default()).await.unwrap();
    assert_eq!(fs::read(target.path().join("new")).unwrap(), noise(1000, 3000));
}

#[tokio::test]
async fn the_last_key_slot_is_tried_first_and_others_when_it_is_gone_or_opens_with_another_secret() {
    let (store, repository, _) = made(300).await;
    let machine = Machine::new(&store);
    let other = Secret::key_file([8; 32]);
    let slot = repository.add_key(&other, Role::Full).await.unwrap();
    machine.open(&other).await.unwrap();
    machine.asked();
    machine.open(&other).await.unwrap();
    assert_eq!(machine.asked(), ["Get config", "Get keys"]);
    machine.open(&secret()).await.unwrap();
    assert_eq!(machine.asked().iter().filter(|asked| *asked == "List keys").count(), 1);
    machine.open(&secret()).await.unwrap();
    assert_eq!(machine.asked(), ["Get config", "Get keys"]);
    machine.open(&other).await.unwrap();
    repository.remove_key(&slot).await.unwrap();
    assert!(matches!(machine.open(&other).await, Err(OpenError::WrongSecret { .. })));
    machine.open(&secret()).await.unwrap();
}

#[tokio::test]
async fn a_restore_registers_once_and_reads_small_packs_with_their_directories() {
    let (store, _, source) = made(300).await;
    let machine = Machine::new(&store);
    machine.back_up(source.path()).await;
    machine.asked();
    let repository = machine.open(&secret()).await.unwrap();
    let snapshot = repository.find("latest").await.unwrap();
    let target = tempfile::tempdir().unwrap();
    restore::tree(&repository, &snapshot, target.path(), RestoreOptions::default(), Arc::default()).await.unwrap();
    let expected = [
        "Delete r",
        "Get config",
        "Get e",
        "Get keys",
        "GetRange p",
        "GetRange p",
        "GetRange p",
        "List d",
        "List t",
        "Put d",
        "Put e",
        "Put r",
    ];
    assert_eq!(machine.asked(), expected);
}

#[tokio::test]
async fn pages_of_a_manifest_are_read_together_and_its_root_comes_with_the_directory() {
    let (store, _, source) = made(3000).await;
    let machine = Machine::new(&store);
    let snapshot = machine.back_up(source.path()).await;
    let repository = machine.open(&secret()).await.unwrap();
    machine.asked();
    let entries = tree::list(&repository, &snapshot, None, true).await.unwrap();
    assert_eq!(entries.len(), 3007);
    // The directory of the pack and the root, then all pages.
    assert_eq!(machine.asked(), ["GetRange p", "GetRange p"]);
}
