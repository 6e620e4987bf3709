//! Look-ups, merging, and its crashes and losers, without sessions around them.

use super::*;
use crate::expire::packset::PackSet;
use crate::id::PackId;
use crate::store::memory::{Memory, Mutation};

#[test]
fn keys_round_trip() {
    let session = SessionId::random();
    assert_eq!(parse_segment_key(&segment_key(session, 17)), Some((session, 17)));
    assert_eq!(parse_segment_key("x0/abc/0"), None);
    assert_eq!(parse_segment_key("p/abc/0"), None);
}

fn id(number: u32) -> ChunkId {
    ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

/// An index that keeps everything in a file.
fn open(store: &Memory) -> Index {
    let cache = ObjectCache::default();
    let spool = Spool::with_limit(None, 0);
    Index::with_limits(Arc::new(store.clone()), cache, MarkKey::new(&[7; 32]), spool, BLOCK_CACHE_BYTES)
}

async fn refreshed(store: &Memory) -> Index {
    let index = open(store);
    index.refresh().await.unwrap();
    index
}

/// Session `number` has a hundred chunks of its own in two packs, and chunk 0.
fn session(number: u8) -> SessionId {
    SessionId([number; 16])
}

fn chunks(number: u8) -> Vec<(u32, Place)> {
    let own = (0..100u32).map(|at| (u32::from(number) * 1000 + at, at));
    let place = |at: u32| Place {
        pack: PackId { session: session(number), seq: at / 50 },
        slot: u16::try_from(at % 50).unwrap(),
    };
    own.chain([(0, 149)]).map(|(chunk, at)| (chunk, place(at))).collect()
}

async fn publish(store: &Memory, number: u8) {
    let entries = chunks(number).into_iter().map(|(chunk, place)| SegmentEntry {
        id: id(chunk),
        seq: place.pack.seq,
        slot: place.slot,
        plain_len: 9,
    });
    let bytes = encode_segment(entries.collect());
    store.put_if_absent(&segment_key(session(number), 0), bytes.into()).await.unwrap();
}

async fn merge(index: &Index) -> u64 {
    index.merge(2, |_| true, |_| true).await.unwrap()
}

/// Sessions 1 to 3, merged and cleaned.
async fn merged() -> (Memory, Index) {
    let store = Memory::new();
    for number in 1..4 {
        publish(&store, number).await;
    }
    let index = refreshed(&store).await;
    merge(&index).await;
    index.clean().await.unwrap();
    (store, index)
}

/// All places of these sessions are found, and nothing else.
async fn assert_finds(index: &Index, sessions: std::ops::Range<u8>) {
    for number in 1..12 {
        for (chunk, place) in chunks(number).into_iter().step_by(9) {
            let mut found = index.find(&id(chunk)).await.unwrap();
            found.sort();
            let expected: Vec<_> = if chunk == 0 {
                sessions.clone().map(|number| chunks(number).pop().unwrap().1).collect()
            } else {
                sessions.contains(&number).then_some(place).into_iter().collect()
            };
            assert_eq!(found, expected, "session {number} chunk {chunk}");
        }
    }
}

fn keys(store: &Memory, prefix: &str) -> Vec<String> {
    store.keys().into_iter().filter(|key| key.starts_with(prefix)).collect()
}

#[tokio::test]
async fn merged_or_not_every_place_is_found_also_by_who_looked_before() {
    let store = Memory::new();
    for number in 1..4 {
        publish(&store, number).await;
    }
    let (old, index) = (refreshed(&store).await, refreshed(&store).await);
    assert_finds(&index, 1..4).await;
    assert_eq!(index.merge(4, |_| true, |_| true).await.unwrap(), 0, "too few");
    assert_eq!(merge(&index).await, 3);
    assert_finds(&index, 1..4).await;
    assert_finds(&refreshed(&store).await, 1..4).await;
    index.clean().await.unwrap();
    assert_eq!((keys(&store, "x0/").len(), keys(&store, "x1/").len()), (0, 1));
    // Not merged again, but with more of its size; then the old part goes, and who looked before looks again.
    let reader = refreshed(&store).await;
    for number in 4..8 {
        publish(&store, number).await;
    }
    index.refresh().await.unwrap();
    assert_finds(&index, 1..8).await;
    assert_eq!(merge(&index).await, 4);
    index.clean().await.unwrap();
    assert_eq!((keys(&store, "x1/").len(), keys(&store, "xv/").len(), keys(&store, "xl/").len()), (1, 2, 1));
    assert_finds(&index, 1..8).await;
    assert_finds(&reader, 1..8).await;
    assert_finds(&old, 1..4).await;
    old.refresh().await.unwrap();
    assert_finds(&old, 1..8).await;
}

#[tokio::test]
async fn a_large_run_stays_when_little_is_new_and_gone_packs_are_left_out() {
    let store = Memory::new();
    for number in 1..6 {
        publish(&store, number).await;
    }
    let index = refreshed(&store).await;
    merge(&index).await;
    publish(&store, 6).await;
    index.refresh().await.unwrap();
    // Of packs that no listing shows the store is asked.
    let there = PackId { session: session(6), seq: 1 };
    store.put_if_absent(&crate::pack::pack_key(there), vec![1].into()).await.unwrap();
    assert_eq!(index.merge(1, |of| of == session(6), |_| false).await.unwrap(), 1);
    index.clean().await.unwrap();
    assert_eq!(keys(&store, "x1/").len(), 2, "the large run was not copied");
    let (gone, kept) = (chunks(6)[0], chunks(6)[60]);
    assert_eq!(index.find(&id(gone.0)).await.unwrap(), []);
    assert_eq!(index.find(&id(kept.0)).await.unwrap(), [kept.1]);
    // A session that is not settled keeps its segments.
    publish(&store, 7).await;
    index.refresh().await.unwrap();
    assert_eq!(index.merge(1, |of| of != session(7), |_| true).await.unwrap(), 0);
}

#[tokio::test]
async fn of_those_who_merge_at_once_one_wins_and_nothing_is_lost() {
    let store = Memory::new();
    for number in 1..4 {
        publish(&store, number).await;
    }
    let (first, second, sleeper) = (refreshed(&store).await, refreshed(&store).await, refreshed(&store).await);
    let (a, b) = tokio::join!(merge(&first), merge(&second));
    assert_eq!(a + b, 3);
    for index in [&first, &second] {
        index.refresh().await.unwrap();
        index.clean().await.unwrap();
        assert_finds(index, 1..4).await;
    }
    assert_eq!((keys(&store, "x0/").len(), keys(&store, "x1/").len()), (0, 1));
    // One that slept before its merge reads what is not there any more as an earlier state: it loses, and harms nobody.
    publish(&store, 4).await;
    assert_eq!(merge(&sleeper).await, 0);
    sleeper.clean().await.unwrap();
    assert_finds(&refreshed(&store).await, 1..5).await;
}

#[tokio::test]
async fn a_crash_after_any_change_of_a_merge_loses_nothing_and_the_next_one_ends_it() {
    let (store, index) = merged().await;
    for number in 4..6 {
        publish(&store, number).await;
    }
    index.refresh().await.unwrap();
    merge(&index).await;
    index.clean().await.unwrap();
    let journal = store.journal();
    let published = |journal: &[Mutation]| {
        let segments = journal.iter().filter(|m| matches!(m, Mutation::Create(key, _) if key.starts_with("x0/")));
        u8::try_from(segments.count()).unwrap() + 1
    };
    for crash in 0..=journal.len() {
        let journal = &journal[..crash];
        let store = Memory::replay(journal);
        assert_finds(&refreshed(&store).await, 1..published(journal)).await;
        let next = refreshed(&store).await;
        next.merge(1, |_| true, |_| true).await.unwrap();
        next.clean().await.unwrap();
        assert_finds(&next, 1..published(journal)).await;
        assert_finds(&refreshed(&store).await, 1..published(journal)).await;
        assert_eq!(keys(&store, "x0/"), Vec::<String>::new());
        publish(&store, 11).await;
        let next = refreshed(&store).await;
        next.merge(1, |_| true, |_| true).await.unwrap();
        next.clean().await.unwrap();
        // What the dead one left for its version is gone when there is a later one.
        let parts: usize = next.state().runs.iter().map(|run| run.len()).sum();
        assert_eq!((keys(&store, "x1/").len(), keys(&store, "xl/").len()), (parts, 1), "crash {crash}");
    }
}

#[tokio::test]
async fn damage_is_not_copied_and_a_version_without_it_is_made() {
    let (store, _) = merged().await;
    for key in store.keys() {
        let whole = store.object(&key).unwrap();
        assert_eq!(crate::objects::verify(&key, &whole), Ok(()), "{key}");
        for at in (0..whole.len()).step_by(37) {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 4;
            assert!(crate::objects::verify(&key, &bytes.into()).is_err(), "{key} byte {at} needs no key to be found");
        }
    }
    let part = keys(&store, "x1/").remove(0);
    let whole = store.object(&part).unwrap();
    for at in [40, whole.len() - 40] {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 1;
        store.overwrite(&part, bytes.into());
        let index = refreshed(&store).await;
        publish(&store, 4).await;
        index.refresh().await.unwrap();
        assert!(matches!(index.merge(1, |_| true, |_| true).await, Err(MergeError::Damaged { .. })));
        assert_eq!(index.add_merged_packs(&mut PackSet::default()).await.unwrap().len(), 1);
        // A damaged entry leaves the others findable; a damaged head answers nothing.
        assert_eq!(index.find(&id(1000)).await.unwrap().len(), usize::from(at == 40));
    }
    store.overwrite(&part, whole.slice(..100));
    assert_eq!(refreshed(&store).await.find(&id(1000)).await.unwrap(), []);
    let index = refreshed(&store).await;
    let damaged = index.add_merged_packs(&mut PackSet::default()).await.unwrap();
    assert!(index.leave_out_parts(&damaged).await.unwrap());
    index.clean().await.unwrap();
    assert_eq!(keys(&store, "x1/"), Vec::<String>::new());
    assert_eq!(index.merge(1, |_| true, |_| true).await.unwrap(), 1);
    // A version that cannot be read is not built on.
    for prefix in ["xl/", "xv/"] {
        let key = keys(&store, prefix).pop().unwrap();
        let whole = store.object(&key).unwrap();
        store.overwrite(&key, whole.slice(..whole.len() - 1));
        let index = refreshed(&store).await;
        publish(&store, 5).await;
        index.refresh().await.unwrap();
        assert_eq!(index.merge(1, |_| true, |_| true).await.unwrap(), 0);
        index.clean().await.unwrap();
        assert_eq!(index.find(&id(5000)).await.unwrap().len(), 1);
        store.overwrite(&key, whole);
        assert_eq!(refreshed(&store).await.find(&id(4000)).await.unwrap().len(), 1);
    }
    let mark = keys(&store, "xv/").pop().unwrap();
    store.overwrite(&mark, Bytes::from_static(b"nothing"));
    let index = refreshed(&store).await;
    assert!(index.leave_out_parts(&[]).await.unwrap());
    assert_eq!(index.merge(1, |_| true, |_| true).await.unwrap(), 2, "a new version is in force");
}
