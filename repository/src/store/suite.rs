//! The conformance suite: what every store must do for a repository to be safe on it.
//!
//! Each check names itself in its failure. Run by the tests on every backend, and by whoever adds one.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use futures::stream::TryStreamExt;
use thiserror::Error;

use super::{ByteRange, Payload, PutOutcome, Store, StoreError};

/// A store that does not conform.
#[derive(Debug, Error)]
pub enum SuiteError {
    /// An operation failed that must succeed.
    #[error("{check}: an operation failed")]
    Failed {
        /// The check.
        check: &'static str,
        /// Why.
        source: StoreError,
    },
    /// An operation answered wrongly.
    #[error("{check}: {what}")]
    Wrong {
        /// The check.
        check: &'static str,
        /// What is wrong.
        what: String,
    },
}

fn ensure(check: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<(), SuiteError> {
    if holds { Ok(()) } else { Err(SuiteError::Wrong { check, what: what() }) }
}

trait Checked<T> {
    fn in_check(self, check: &'static str) -> Result<T, SuiteError>;
}

impl<T> Checked<T> for Result<T, StoreError> {
    fn in_check(self, check: &'static str) -> Result<T, SuiteError> {
        self.map_err(|source| SuiteError::Failed { check, source })
    }
}

/// Runs every check below the folder `suite/`, which it empties at the end.
pub async fn run(store: &Arc<dyn Store>) -> Result<(), SuiteError> {
    creates_once(store).await?;
    races_have_one_winner(store).await?;
    reads_ranges(store).await?;
    absent_objects_are_told(store).await?;
    takes_whole_packs(store).await?;
    lists_and_deletes(store).await
}

async fn creates_once(store: &Arc<dyn Store>) -> Result<(), SuiteError> {
    const CHECK: &str = "creates once";
    let put = |bytes: &'static [u8]| store.put_if_absent("suite/once", Bytes::from_static(bytes).into());
    let first = put(b"first").await.in_check(CHECK)?;
    ensure(CHECK, first == PutOutcome::Created, || format!("the first put answered {first:?}"))?;
    for again in [b"second".as_slice(), b"first"] {
        let outcome = put(again).await.in_check(CHECK)?;
        ensure(CHECK, outcome == PutOutcome::Exists, || format!("a put over an object answered {outcome:?}"))?;
    }
    let kept = store.get("suite/once", 100).await.in_check(CHECK)?;
    ensure(CHECK, kept == b"first".as_slice(), || "the object was overwritten".to_owned())?;
    let empty = store.put_if_absent("suite/empty", Payload::default()).await.in_check(CHECK)?;
    ensure(CHECK, empty == PutOutcome::Created, || "an empty object was not created".to_owned())
}

async fn races_have_one_winner(store: &Arc<dyn Store>) -> Result<(), SuiteError> {
    const CHECK: &str = "races have one winner";
    for round in 0..8 {
        let key = format!("suite/race/{round}");
        let writers = (0..12_u8).map(|writer| {
            let (store, key) = (Arc::clone(store), key.clone());
            async move { (writer, store.put_if_absent(&key, vec![writer; 1000].into()).await) }
        });
        let mut winners = Vec::new();
        for (writer, outcome) in join_all(writers).await {
            if outcome.in_check(CHECK)?.is_ours() {
                winners.push(writer);
            }
        }
        let kept = store.get(&key, 1000).await.in_check(CHECK)?;
        let right = winners.len() == 1 && kept == vec![winners[0]; 1000];
        ensure(CHECK, right, || format!("winners of {key}: {winners:?}, kept {:?}", kept.first()))?;
    }
    Ok(())
}

async fn reads_ranges(store: &Arc<dyn Store>) -> Result<(), SuiteError> {
    const CHECK: &str = "reads ranges";
    let content: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
    let mut payload = Payload::default();
    content.chunks(7001).for_each(|piece| payload.push(Bytes::copy_from_slice(piece)));
    store.put_if_absent("suite/ranges", payload).await.in_check(CHECK)?;
    let size = store.size("suite/ranges").await.in_check(CHECK)?;
    ensure(CHECK, size == 100_000, || format!("size {size}"))?;
    let whole = store.get("suite/ranges", 100_000).await.in_check(CHECK)?;
    ensure(CHECK, whole == content, || "the whole object differs".to_owned())?;
    for (range, expected) in [
        (ByteRange::Bounded(0..1), 0..1),
        (ByteRange::Bounded(6990..7010), 6990..7010),
        (ByteRange::Bounded(0..100_000), 0..100_000),
        (ByteRange::Bounded(5..5), 5..5),
        (ByteRange::Suffix(64), 99_936..100_000),
        (ByteRange::Suffix(1_000_000), 0..100_000),
    ] {
        let part = store.get_range("suite/ranges", range.clone()).await.in_check(CHECK)?;
        ensure(CHECK, part == content[expected], || format!("{range:?} differs"))?;
    }
    for range in [99_999..100_001, 100_000..100_001, 200_000..200_001] {
        let outcome = store.get_range("suite/ranges", ByteRange::Bounded(range.clone())).await;
        ensure(CHECK, outcome.is_err(), || format!("{range:?} beyond the end was answered"))?;
    }
    let over = store.get("suite/ranges", 99_999).await;
    ensure(CHECK, over.is_err(), || "an object over the limit was read".to_owned())
}

async fn absent_objects_are_told(store: &Arc<dyn Store>) -> Result<(), SuiteError> {
    const CHECK: &str = "absent objects are told";
    let key = "suite/absent";
    let told = |outcome: Option<StoreError>| outcome.is_some_and(|error| error.is_not_found());
    ensure(CHECK, told(store.get(key, 10).await.err()), || "get".to_owned())?;
    ensure(CHECK, told(store.size(key).await.err()), || "size".to_owned())?;
    let range = store.get_range(key, ByteRange::Bounded(0..1)).await;
    ensure(CHECK, told(range.err()), || "get_range".to_owned())?;
    let suffix = store.get_range(key, ByteRange::Suffix(1)).await;
    ensure(CHECK, told(suffix.err()), || "get_range of a suffix".to_owned())?;
    store.delete(key).await.in_check(CHECK)
}

async fn takes_whole_packs(store: &Arc<dyn Store>) -> Result<(), SuiteError> {
    const CHECK: &str = "takes whole packs";
    let mut payload = Payload::default();
    (0..33_u8).for_each(|n| payload.push(Bytes::from(vec![n; 1 << 20])));
    let outcome = store.put_if_absent("suite/pack", payload).await.in_check(CHECK)?;
    ensure(CHECK, outcome == PutOutcome::Created, || format!("{outcome:?}"))?;
    let middle = store.get_range("suite/pack", ByteRange::Bounded(20 << 20..(20 << 20) + 10)).await.in_check(CHECK)?;
    ensure(CHECK, middle == [20; 10].as_slice(), || "a range of it differs".to_owned())
}

async fn lists_and_deletes(store: &Arc<dyn Store>) -> Result<(), SuiteError> {
    const CHECK: &str = "lists and deletes";
    store.put_if_absent("suite2/other", vec![1].into()).await.in_check(CHECK)?;
    let listed: Vec<_> = store.list("suite/").try_collect().await.in_check(CHECK)?;
    let mut keys: Vec<_> = listed.iter().map(|object| object.key.as_str()).collect();
    keys.sort_unstable();
    let races: Vec<_> = (0..8).map(|round| format!("suite/race/{round}")).collect();
    let mut expected = vec!["suite/empty", "suite/once", "suite/pack", "suite/ranges"];
    expected.extend(races.iter().map(String::as_str));
    expected.sort_unstable();
    ensure(CHECK, keys == expected, || format!("listed {keys:?}"))?;
    let sized = listed.iter().any(|object| object.key == "suite/pack" && object.size == 33 << 20);
    ensure(CHECK, sized, || "a listed size is wrong".to_owned())?;
    for key in expected.into_iter().chain(["suite2/other"]) {
        store.delete(key).await.in_check(CHECK)?;
        let gone = store.size(key).await.err().is_some_and(|error| error.is_not_found());
        ensure(CHECK, gone, || format!("{key} is there after its deletion"))?;
    }
    let left: Vec<_> = store.list("suite/").try_collect().await.in_check(CHECK)?;
    ensure(CHECK, left.is_empty(), || format!("listed after deletion: {left:?}"))
}
