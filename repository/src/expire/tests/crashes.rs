//! The process dies, the store fails, or a listing is old: at every single step.

use super::*;
use crate::store::faulty::{Fault, Faulty, Operation};
use crate::store::memory::Mutation;
use crate::store::retry::{Retry, RetryPolicy};
use crate::store::{ByteRange, Listed, Payload, PutOutcome, Reason, StoreError};
use async_trait::async_trait;
use futures::stream::BoxStream;
use std::sync::Mutex;

/// A history with everything: two lineages, a recovery point, a dead session, forgetting, repacking, expiry, twice.
async fn history() -> (Vec<Mutation>, BTreeMap<SnapshotId, Files>) {
    let (store, repository) = made().await;
    let mut all = BTreeMap::new();
    let mut names = Vec::new();
    for (lineage, seeds) in [("a", vec![1, 2, 3, 4, 8, 9]), ("a", vec![1, 5]), ("b", vec![2, 6])] {
        let snapshot = back_up(&repository, lineage, &files(&seeds)).await;
        all.insert(snapshot.id, files(&seeds));
        names.push(snapshot.id);
    }
    repository.forget(&names[..1]).await.unwrap();
    expire(&repository, impatient()).await;
    let snapshot = back_up(&repository, "a", &files(&[1, 7])).await;
    all.insert(snapshot.id, files(&[1, 7]));
    repository.forget(&names[1..2]).await.unwrap();
    expire(&repository, impatient()).await;
    assert_exact(&store, &repository).await;
    (store.journal(), all)
}

/// What lives after these changes.
fn expected_after(
    journal: &[Mutation],
    all: &BTreeMap<SnapshotId, Files>,
    committed: &BTreeMap<String, SnapshotId>,
) -> Expected {
    let mut expected = Expected::new();
    for mutation in journal {
        match mutation {
            Mutation::Create(key, _) if key.starts_with("d/") => {
                if let Some(snapshot) = committed.get(key) {
                    expected.insert(*snapshot, all[snapshot].clone());
                }
            }
            Mutation::Create(key, _) => {
                if let Some(snapshot) = marks::parse_tombstone_key(key) {
                    expected.remove(&snapshot);
                }
            }
            Mutation::Delete(_) => {}
        }
    }
    expected
}

/// Which decision commits which snapshot.
async fn commits_in(journal: &[Mutation]) -> BTreeMap<String, SnapshotId> {
    let only_created: Vec<_> =
        journal.iter().filter(|m| matches!(m, Mutation::Create(key, _) if !key.starts_with("t/"))).cloned().collect();
    let snapshots = open(Memory::replay(&only_created)).await.snapshots().await.unwrap();
    snapshots.into_iter().map(|snapshot| (format!("d/{}", snapshot.session), snapshot.id)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_crash_after_any_change_loses_nothing_and_the_next_expiry_ends_it() {
    let (journal, all) = history().await;
    let committed = commits_in(&journal).await;
    let first = journal.iter().position(|m| matches!(m, Mutation::Create(key, _) if key == "config")).unwrap() + 1;
    assert!(journal.len() > first + 60, "{}", journal.len());
    for crash in first..=journal.len() {
        let expected = expected_after(&journal[..crash], &all, &committed);
        let store = Memory::replay(&journal[..crash]);
        let repository = open(store.clone()).await;
        assert_restores(&repository, &expected).await;
        // The dead process's registration is some milliseconds old by the clock of the machine, which does not stand still.
        std::thread::sleep(Duration::from_millis(1));
        expire(&repository, merciless()).await;
        // What the dead process left behind in this round is garbage for the next.
        expire(&repository, merciless()).await;
        assert_restores(&repository, &expected).await;
        assert_exact(&store, &repository).await;
        if crash % 7 == 0 {
            let snapshot = back_up(&repository, "a", &files(&[1, 2])).await;
            assert!(read_all(&open(store.clone()).await, &snapshot).await == files(&[1, 2]));
        }
    }
}

/// The state in which there is most to do: one forgotten snapshot, a pack to repack, a dead session.
async fn before_expiry() -> (Vec<Mutation>, Expected) {
    let (store, repository) = made().await;
    let large = back_up(&repository, "a", &files(&[1, 2, 3, 4, 8, 9])).await;
    let mut expected = Expected::new();
    for (lineage, seeds) in [("a", vec![1, 5]), ("b", vec![2, 6])] {
        expected.insert(back_up(&repository, lineage, &files(&seeds)).await.id, files(&seeds));
    }
    let dead = repository.begin(crate::session::SessionOptions::default()).await.unwrap();
    drop(dead);
    repository.forget(&[large.id]).await.unwrap();
    (store.journal(), expected)
}

/// Expires over a store of which one request fails, then without failures. Whether the first one said so, and how many
/// requests it made.
async fn fail_once(
    journal: &[Mutation],
    expected: &Expected,
    fault: Fault,
    failing: usize,
    counts: fn(Operation) -> bool,
) -> (bool, usize) {
    let store = Memory::replay(journal);
    let requests = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&requests);
    let faulty = Faulty::new(Arc::new(store.clone()), move |operation, _| {
        let mut requests = requests.lock().unwrap();
        *requests += usize::from(counts(operation));
        if *requests == failing && counts(operation) { fault } else { Fault::None }
    });
    let failed = match Repository::open(Arc::new(faulty), &secret(), OpenOptions::default()).await {
        Ok(repository) => repository.expire(impatient(), Arc::default()).await.is_err(),
        Err(_) => true,
    };
    let other = open(store.clone()).await;
    expire(&other, merciless()).await;
    expire(&other, merciless()).await;
    assert_restores(&other, expected).await;
    assert_exact(&store, &other).await;
    let requests = *seen.lock().unwrap();
    (failed, requests)
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_any_change_before_or_after_its_effect_is_survived() {
    let (journal, expected) = before_expiry().await;
    for fault in [Fault::Before(Reason::Busy), Fault::After(Reason::Busy)] {
        let mut failures = 0;
        for failing in 1.. {
            let counts = |operation| matches!(operation, Operation::Put | Operation::Delete);
            let (failed, requests) = fail_once(&journal, &expected, fault, failing, counts).await;
            failures += usize::from(failed);
            if requests < failing {
                break;
            }
        }
        assert!(failures > 20, "{failures}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_read_is_survived() {
    let (journal, expected) = before_expiry().await;
    let mut failing = 1;
    loop {
        let counts = |operation| matches!(operation, Operation::Get | Operation::GetRange | Operation::Size);
        let (failed, requests) = fail_once(&journal, &expected, Fault::Before(Reason::Busy), failing, counts).await;
        assert!(failed || requests < failing, "no failed read goes unnoticed: {failing}");
        if requests < failing {
            break;
        }
        // A prime, so that other requests are hit when their number changes.
        failing += 7;
    }
}

#[tokio::test(start_paused = true)]
async fn with_retries_lost_answers_throttling_and_conflicts_do_not_even_show() {
    let (journal, expected) = before_expiry().await;
    for shift in 0..3 {
        let store = Memory::replay(&journal);
        let mut number = shift;
        let faulty = Faulty::new(Arc::new(store.clone()), move |operation, _| {
            number += 1;
            match number % 3 {
                // Listings retry on their own, page by page.
                _ if operation == Operation::List => Fault::None,
                0 => Fault::After(Reason::Busy),
                1 => Fault::Before(Reason::Busy),
                _ => Fault::None,
            }
        });
        let retry = Retry::new(Arc::new(faulty), RetryPolicy::immediate(12));
        let repository = open(retry).await;
        expire(&repository, impatient()).await;
        assert_restores(&repository, &expected).await;
        assert_exact(&store, &open(store.clone()).await).await;
    }
}

/// A store whose listings are those of an earlier time.
#[derive(Debug)]
struct Stale {
    now: Memory,
    then: Memory,
}

#[async_trait]
impl Store for Stale {
    fn describe(&self) -> String {
        self.now.describe()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        self.now.put_if_absent(key, payload).await
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        self.now.get(key, limit).await
    }

    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError> {
        self.now.get_range(key, range).await
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.now.size(key).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>> {
        // Without slots a repository cannot be opened, and they are not what this is about.
        if prefix == "keys/" { self.now.list(prefix) } else { self.then.list(prefix) }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.now.delete(key).await
    }
}

#[tokio::test(start_paused = true)]
async fn listings_of_any_earlier_time_cost_work_and_never_data() {
    let (mut journal, all) = history().await;
    // One more expiry with much to do, of which no listing knows.
    let store = Memory::replay(&journal);
    let repository = open(store.clone()).await;
    let more = back_up(&repository, "c", &files(&[1, 2, 30])).await;
    let forgotten = repository.snapshots().await.unwrap()[0].id;
    repository.forget(&[forgotten]).await.unwrap();
    let mut all = all;
    all.insert(more.id, files(&[1, 2, 30]));
    journal.extend(store.journal());
    let expected: Expected = repository
        .snapshots()
        .await
        .unwrap()
        .into_iter()
        .map(|snapshot| (snapshot.id, all[&snapshot.id].clone()))
        .collect();
    for then in (0..=journal.len()).step_by(3) {
        let now = Memory::replay(&journal);
        let stale = open(Stale { now: now.clone(), then: Memory::replay(&journal[..then]) }).await;
        stale.expire(impatient(), Arc::default()).await.unwrap();
        let written = try_back_up(&stale, "d", &files(&[1, 2, 30])).await.unwrap();
        stale.expire(impatient(), Arc::default()).await.unwrap();
        let fresh = open(now.clone()).await;
        let mut expected = expected.clone();
        expected.insert(written.id, files(&[1, 2, 30]));
        assert_restores(&fresh, &expected).await;
        expire(&fresh, impatient()).await;
        expire(&fresh, impatient()).await;
        assert_restores(&fresh, &expected).await;
        assert_exact(&now, &fresh).await;
    }
}
