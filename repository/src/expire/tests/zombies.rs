//! Who sleeps at any step and wakes up when everything has moved on does no harm.

use super::*;
use crate::store::{ByteRange, Listed, Payload, PutOutcome, StoreError};
use async_trait::async_trait;
use futures::stream::BoxStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// A store that stops whoever uses it before one of its changes.
#[derive(Debug, Clone)]
struct Gate {
    inner: Memory,
    changes: Arc<AtomicUsize>,
    stops_at: usize,
    reached: Arc<Notify>,
    open: Arc<Notify>,
}

impl Gate {
    fn new(inner: Memory, stops_at: usize) -> Self {
        Self { inner, changes: Arc::default(), stops_at, reached: Arc::default(), open: Arc::default() }
    }

    async fn pass(&self) {
        if self.changes.fetch_add(1, Ordering::SeqCst) == self.stops_at {
            self.reached.notify_one();
            self.open.notified().await;
        }
    }
}

#[async_trait]
impl Store for Gate {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        self.pass().await;
        self.inner.put_if_absent(key, payload).await
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        self.inner.get(key, limit).await
    }

    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.inner.size(key).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>> {
        self.inner.list(prefix)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.pass().await;
        self.inner.delete(key).await
    }
}

/// Two lineages, of which one snapshot is forgotten, and a pack to repack.
async fn ready() -> (Memory, Expected) {
    let (store, repository) = made().await;
    let large = back_up(&repository, "a", &files(&[1, 2, 3, 4, 8, 9])).await;
    let mut expected = Expected::new();
    for (lineage, seeds) in [("a", vec![1, 5]), ("b", vec![2, 6])] {
        expected.insert(back_up(&repository, lineage, &files(&seeds)).await.id, files(&seeds));
    }
    repository.forget(&[large.id]).await.unwrap();
    (store, expected)
}

#[tokio::test(start_paused = true)]
async fn a_deleter_that_sleeps_at_any_step_is_overtaken_and_wakes_up_harmless() {
    for stops_at in 0.. {
        let (store, mut expected) = ready().await;
        let gate = Gate::new(store.clone(), stops_at);
        let sleeper = open(gate.clone()).await;
        let asleep = tokio::spawn({
            let sleeper = sleeper.clone();
            async move { sleeper.expire(impatient(), Arc::default()).await }
        });
        let stopped = tokio::select! {
            () = gate.reached.notified() => true,
            () = async { while !asleep.is_finished() { tokio::time::sleep(Duration::from_millis(1)).await } } => false,
        };
        let repository = open(store.clone()).await;
        if stopped {
            // Others go on: they expire, write what the sleeper may have taken for garbage, and expire again.
            expire(&repository, impatient()).await;
            let again = back_up(&repository, "c", &files(&[1, 3])).await;
            expected.insert(again.id, files(&[1, 3]));
            let next = back_up(&repository, "b", &files(&[4, 7])).await;
            let gone = *expected.keys().find(|id| **id != again.id).unwrap();
            expected.remove(&gone);
            expected.insert(next.id, files(&[4, 7]));
            repository.forget(&[gone]).await.unwrap();
            expire(&repository, impatient()).await;
            assert_restores(&repository, &expected).await;
            gate.open.notify_one();
        }
        // It may fail, since what it worked on is gone; it must not harm.
        let woken = asleep.await.unwrap();
        assert_restores(&open(store.clone()).await, &expected).await;
        expire(&repository, impatient()).await;
        expire(&repository, impatient()).await;
        assert_restores(&repository, &expected).await;
        assert_exact(&store, &repository).await;
        if !stopped {
            woken.unwrap();
            assert!(stops_at > 20, "{stops_at}");
            break;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_sleeps_at_any_step_past_its_abort_commits_nothing_and_harms_nobody() {
    for stops_at in 0.. {
        let (store, mut expected) = ready().await;
        let gate = Gate::new(store.clone(), stops_at);
        let sleeper = open(gate.clone()).await;
        let asleep = tokio::spawn(async move { try_back_up(&sleeper, "z", &files(&[1, 3, 50])).await });
        let stopped = tokio::select! {
            () = gate.reached.notified() => true,
            () = async { while !asleep.is_finished() { tokio::time::sleep(Duration::from_millis(1)).await } } => false,
        };
        let repository = open(store.clone()).await;
        for seeds in [[1, 60], [3, 61]] {
            expire(&repository, impatient()).await;
            expected.insert(back_up(&repository, "y", &files(&seeds)).await.id, files(&seeds));
        }
        expire(&repository, impatient()).await;
        gate.open.notify_one();
        match asleep.await.unwrap() {
            // It slept before it registered, or its commit came first.
            Ok(snapshot) => _ = expected.insert(snapshot.id, files(&[1, 3, 50])),
            Err(crate::backup::BackupError::Session(
                SessionError::AbortedByAnother { .. } | SessionError::Closed { .. },
            )) => {}
            Err(error) => panic!("{stops_at}: {error:?}"),
        }
        expire(&repository, impatient()).await;
        expire(&repository, impatient()).await;
        assert_restores(&repository, &expected).await;
        assert_exact(&store, &repository).await;
        if !stopped {
            break;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_commit_repeated_long_after_it_expired_brings_nothing_back_to_life() {
    let (store, repository) = made().await;
    let kept = back_up(&repository, "a", &files(&[1])).await;
    let gone = back_up(&repository, "a", &files(&[2])).await;
    let key = format!("d/{}", gone.session);
    let commit = store.object(&key).unwrap();
    repository.forget(&[gone.id]).await.unwrap();
    expire(&repository, impatient()).await;
    store.put_if_absent(&key, commit.into()).await.unwrap();
    // Nobody builds on it, and the next expiry that has something to do removes it.
    let session = repository.begin(crate::session::SessionOptions::default()).await.unwrap();
    assert!(session.newest_refs(&[gone.id]).await.unwrap().is_empty());
    session.abort("a test").await.unwrap();
    let next = back_up(&repository, "b", &files(&[3])).await;
    repository.forget(&[next.id]).await.unwrap();
    expire(&repository, impatient()).await;
    assert_restores(&repository, &Expected::from([(kept.id, files(&[1]))])).await;
    assert_exact(&store, &repository).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_session_publishes_while_the_index_is_merged_stays_until_it_is_decided() {
    // Nobody is taken for dead, and nobody is waited for.
    let patient = ExpireOptions { silence: Duration::from_hours(1), patience: Duration::ZERO, ..impatient() };
    for stops_at in 0.. {
        let (store, _) = ready().await;
        let gate = Gate::new(store.clone(), stops_at);
        let deleter = open(gate.clone()).await;
        let merging = tokio::spawn(async move { deleter.expire(patient, Arc::default()).await });
        let stopped = tokio::select! {
            () = gate.reached.notified() => true,
            () = async { while !merging.is_finished() { tokio::time::sleep(Duration::from_millis(1)).await } } => false,
        };
        let writer_of = open(store.clone()).await;
        let writer = begin(&writer_of).await;
        put(&writer, &noise(900, 5000)).await;
        writer.flush().await.unwrap();
        gate.open.notify_one();
        merging.await.unwrap().unwrap();
        assert!(
            store.keys().contains(&crate::index::segment_key(writer.id(), 0)),
            "stopped at {stops_at}: expiry would take its packs for unpublished"
        );
        writer.abort("enough").await.unwrap();
        if !stopped {
            assert!(stops_at > 20, "{stops_at}");
            break;
        }
    }
}
