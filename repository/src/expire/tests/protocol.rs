//! Rounds, masks, rescue, waiting, pins and tombstones, one at a time.

use super::*;
use crate::backup::recovery_point;
use crate::snapshot::{Counts, NewSnapshot, WriteStats};

/// A snapshot of no files: only its references matter.
fn bare() -> NewSnapshot {
    NewSnapshot {
        id: SnapshotId::random(),
        time: crate::clock::now(),
        lineage: "bare".to_owned(),
        tags: BTreeMap::new(),
        host: String::new(),
        parent: None,
        content: Content::RecoveryPoint { members: Vec::new(), description: serde_json::Value::Null },
        counts: Counts::default(),
        stats: WriteStats::default(),
    }
}

async fn commit(session: Arc<Session>) -> Snapshot {
    session.commit(vec![bare()]).await.unwrap().remove(0)
}

#[tokio::test(start_paused = true)]
async fn what_is_forgotten_disappears_at_once_and_its_space_comes_back() {
    let (store, repository) = made().await;
    let first = back_up(&repository, "a", &files(&[1, 2])).await;
    let second = back_up(&repository, "a", &files(&[2, 3])).await;
    let other = open(store.clone()).await;
    assert_eq!(other.snapshots().await.unwrap().len(), 2);

    assert_eq!(repository.forget(&[first.id]).await.unwrap().forgotten, [first.id]);
    assert_eq!(
        repository.forget(&[first.id]).await.unwrap().forgotten,
        [],
        "as when two follow the same rules at once"
    );
    let expected = Expected::from([(second.id, files(&[2, 3]))]);
    assert_restores(&repository, &expected).await;
    assert_restores(&other, &expected).await;
    assert!(matches!(other.find(&first.id.to_string()).await, Err(crate::repository::FindError::None { .. })));

    let planned = expire(&repository, ExpireOptions { dry_run: true, ..impatient() }).await;
    let before = store.keys();
    assert_eq!((planned.snapshots, planned.snapshots_removed), (1, 1));
    let report = expire(&repository, impatient()).await;
    assert_eq!((report.snapshots, report.snapshots_removed), (1, 1));
    assert!(report.packs_deleted >= 1 && report.bytes_deleted > 0);
    assert!(report.packs_deleted > planned.packs_deleted || report.packs_repacked == 0, "{planned:?} {report:?}");
    assert!(store.keys() != before);
    assert_restores(&open(store.clone()).await, &expected).await;
    assert_restores(&other, &expected).await;
    assert_exact(&store, &repository).await;
    // Of the first nothing is left, and neither is its tombstone.
    assert!(!store.keys().iter().any(|key| key.contains(&first.id.to_string())));
    assert_eq!((count(&store, "t/"), count(&store, "d/")), (0, count(&store, "d/")));
    // Nothing is left to do, so nothing is done.
    let before = store.keys();
    assert_eq!(expire(&repository, impatient()).await.packs_deleted, 0);
    assert_eq!(store.keys(), before);
}

#[tokio::test(start_paused = true)]
async fn a_repository_of_which_all_is_forgotten_is_empty_but_for_its_names() {
    let (store, repository) = made().await;
    for round in 0..3 {
        let snapshot = back_up(&repository, "a", &files(&[round])).await;
        repository.forget(&[snapshot.id]).await.unwrap();
        expire(&repository, impatient()).await;
        for prefix in ["p/", "x0/", "r/", "t/", "d/", "hb/"] {
            assert_eq!(count(&store, prefix), 0, "{prefix} {:?}", store.keys());
        }
        assert_eq!(count(&store, "g/"), 3 * (usize::try_from(round).unwrap() + 1) + 1, "{:?}", store.keys());
    }
    assert!(repository.omissions().await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_began_before_the_round_is_waited_for_and_what_it_took_is_rescued() {
    let (store, repository) = made().await;
    let plain = noise(1, 50_000);
    let session = begin(&repository).await;
    let (chunk, _) = put(&session, &plain).await;
    let first = commit(session).await;
    let writer_of = open(store.clone()).await;
    let writer = begin(&writer_of).await;
    repository.forget(&[first.id]).await.unwrap();

    let calm = ExpireOptions::default();
    let report = expire(&repository, calm).await;
    assert_eq!(report.waiting_for, [writer.id()]);
    assert_eq!(report.packs_deleted, 0);
    // The pack is condemned already, but this writer may have taken it before.
    assert_eq!(put(&writer, &plain).await, (chunk, false));
    let second = commit(writer).await;
    let report = expire(&repository, calm).await;
    assert_eq!((report.waiting_for.len(), report.packs_deleted), (0, 0));
    assert_eq!(repository.snapshots().await.unwrap()[0].id, second.id);
    assert_eq!(repository.reader().unwrap().locate_for_test(&chunk).await, Some(chunk.place));
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_began_after_the_seal_takes_nothing_that_is_condemned() {
    let (store, repository) = made().await;
    let plain = noise(1, 50_000);
    let session = begin(&repository).await;
    let (chunk, _) = put(&session, &plain).await;
    let first = commit(session).await;
    // A process that knows the pack's directory and the commit from before.
    let long_lived = open(store.clone()).await;
    let early = begin(&long_lived).await;
    assert_eq!(put(&early, &plain).await, (chunk, false));
    early.abort("a test").await.unwrap();

    let blocker_of = open(store.clone()).await;
    let blocker = begin(&blocker_of).await;
    repository.forget(&[first.id]).await.unwrap();
    assert_eq!(expire(&repository, ExpireOptions::default()).await.waiting_for, [blocker.id()]);
    let late = begin(&long_lived).await;
    late.inherit_from(&first).await.unwrap();
    assert!(!late.inherit(&chunk));
    let (again, new) = put(&late, &plain).await;
    assert!(new && again.place != chunk.place);
    blocker.abort("done").await.unwrap();
    let report = expire(&repository, ExpireOptions::default()).await;
    assert_eq!((report.packs_deleted, report.waiting_for.len()), (1, 0));
    commit(late).await;
    expire(&repository, ExpireOptions::default()).await;
    assert_eq!(repository.reader().unwrap().locate_for_test(&again).await, Some(again.place));

    // A parent that is gone is not inherited from, whatever a process remembers.
    let later = begin(&long_lived).await;
    later.inherit_from(&first).await.unwrap();
    assert!(!later.inherit(&chunk));
    assert!(!put(&later, &plain).await.1);
}

#[tokio::test(start_paused = true)]
async fn a_silent_session_is_aborted_and_what_it_publishes_later_misleads_nobody() {
    let (store, repository) = made().await;
    let kept = back_up(&repository, "a", &files(&[1])).await;
    let gone = back_up(&repository, "b", &files(&[2])).await;
    let sleeper_of = open(store.clone()).await;
    let sleeper = begin(&sleeper_of).await;
    for seed in 0..34 {
        put(&sleeper, &noise(100 + seed, 1 << 20)).await;
    }
    while sleeper.stats().uploaded_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    repository.forget(&[gone.id]).await.unwrap();
    let report = expire(&repository, impatient()).await;
    assert_eq!(report.aborted, [sleeper.id()]);
    // Its pack was never published: nobody can know it.
    expire(&repository, impatient()).await;
    assert!(!packs_in(&store).sessions().any(|session| session == sleeper.id()));
    // It wakes up: it may upload, and publish packs that are gone, but not commit.
    put(&sleeper, &noise(200, 1000)).await;
    let error = Arc::clone(&sleeper).commit(vec![bare()]).await.unwrap_err();
    assert!(matches!(error, SessionError::AbortedByAnother { .. }), "{error}");
    let misled = begin(&open(store.clone()).await).await;
    assert!(put(&misled, &noise(100, 1 << 20)).await.1, "the chunk of a pack that is gone is stored anew");
    misled.abort("only asked").await.unwrap();
    expire(&repository, impatient()).await;
    assert_restores(&repository, &Expected::from([(kept.id, files(&[1]))])).await;
    assert_exact(&store, &repository).await;
}

/// A writer whose clock is wrong by years: its first heartbeat, and whether it still lives.
async fn expire_beside(time: &str, lives: bool) {
    let (store, repository) = made().await;
    let kept = back_up(&repository, "a", &files(&[1])).await;
    let gone = back_up(&repository, "a", &files(&[2])).await;
    let writer = begin(&repository).await;
    put(&writer, &noise(3, 50_000)).await;
    let id = writer.id();
    let writer = lives.then_some(writer);
    let beat = format!("hb/{id}/00000000");
    store.put_if_absent(&beat, time.as_bytes().to_vec().into()).await.unwrap();
    repository.forget(&[gone.id]).await.unwrap();
    let (silence, patience) = (Duration::from_mins(15), Duration::from_mins(20));
    let report = expire(&repository, ExpireOptions { silence, patience, ..ExpireOptions::default() }).await;
    assert_eq!(report.aborted, [id], "{time}");
    if let Some(writer) = writer {
        let error = writer.commit(vec![bare()]).await.unwrap_err();
        assert!(matches!(error, SessionError::AbortedByAnother { .. }), "it loses its work, and is told so: {error}");
    }
    expire(&repository, impatient()).await;
    assert_restores(&repository, &Expected::from([(kept.id, files(&[1]))])).await;
    assert_exact(&store, &repository).await;
}

#[tokio::test(start_paused = true)]
async fn a_writer_whose_clock_is_years_behind_loses_its_work_at_most() {
    expire_beside("2001-01-01T00:00:00Z", true).await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_writer_whose_clock_was_years_ahead_is_told_by_its_silence() {
    expire_beside("2099-01-01T00:00:00Z", false).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_reader_pinned_stays_until_it_is_done() {
    let (store, repository) = made().await;
    let read = back_up(&repository, "a", &files(&[1, 2])).await;
    let kept = back_up(&repository, "a", &files(&[2])).await;
    let reader_of = open(store.clone()).await;
    let read = reader_of.find(&read.id.to_string()).await.unwrap();
    let pin = reader_of.pin(&read).await.unwrap().unwrap();
    repository.forget(&[read.id]).await.unwrap();
    let calm = ExpireOptions { patience: Duration::from_secs(1), ..ExpireOptions::default() };
    for round in 0..3 {
        let report = expire(&repository, calm).await;
        assert_eq!((report.packs_deleted, report.waiting_for.len()), (0, 0), "nobody waits for a reader");
        assert_eq!(report.snapshots_removed, u64::from(round == 0), "the snapshot goes, what is read stays");
        assert!(read_all(&reader_of, &read).await == files(&[1, 2]));
    }
    pin.release().await;
    let report = expire(&repository, calm).await;
    assert!(report.packs_deleted > 0, "{report:?}");
    assert_restores(&repository, &Expected::from([(kept.id, files(&[2]))])).await;
    assert_exact(&store, &repository).await;
    assert_eq!(count(&store, "r/"), 1, "what the reader read is not remembered");

    // A reader that died is forgotten like a writer that did.
    let pin = reader_of.pin(&kept).await.unwrap().unwrap();
    let session = pin.session();
    drop(pin);
    repository.forget(&[kept.id]).await.unwrap();
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(expire(&repository, merciless()).await.aborted, [session]);
    assert_eq!(packs_in(&store).len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_was_repacked_since_it_was_found_is_pinned_as_it_is_now() {
    let (store, repository) = made().await;
    let old = back_up(&repository, "a", &files(&[1, 2, 3, 4, 5, 6, 7, 8])).await;
    let kept = back_up(&repository, "a", &files(&[2])).await;
    let reader_of = open(store.clone()).await;
    let found = reader_of.find(&kept.id.to_string()).await.unwrap();
    repository.forget(&[old.id]).await.unwrap();
    expire(&repository, impatient()).await;
    repository.engine.commits.refresh().await.unwrap();
    assert!(repository.engine.commits.references()[&kept.id].version > 0, "it was not repacked");
    let pin = reader_of.pin(&found).await.unwrap().unwrap();
    repository.forget(&[kept.id]).await.unwrap();
    expire(&repository, impatient()).await;
    assert!(read_all(&reader_of, &found).await == files(&[2]));
    pin.release().await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_sees_that_its_pin_was_ended_and_leaves_few_heartbeats() {
    let (store, repository) = made().await;
    let snapshot = back_up(&repository, "a", &files(&[1])).await;
    let pin = repository.pin(&snapshot).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_hours(24)).await;
    assert!((1..12).contains(&count(&store, &format!("hb/{}/", pin.session()))));
    assert!(pin.holds().await.unwrap());
    repository.abort_session(pin.session(), "taken for dead").await.unwrap();
    assert!(!pin.holds().await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_point_goes_with_its_members_and_a_member_not_without_it() {
    let (store, repository) = made().await;
    let mut members = Vec::new();
    for seed in 1..4 {
        members.push(back_up(&repository, &format!("volume {seed}"), &files(&[seed])).await.id);
    }
    let point = |members: &[SnapshotId]| {
        let members = members.to_vec();
        let repository = repository.clone();
        async move {
            let null = serde_json::Value::Null;
            recovery_point(&repository, "app".into(), BTreeMap::new(), members, null, Counts::default()).await.unwrap()
        }
    };
    let first = point(&members[..2]).await;
    let second = point(&members[1..]).await;
    assert!(matches!(repository.forget(&members[1..2]).await, Err(ForgetError::IsMember { .. })));
    let report = repository.forget(&[first.id]).await.unwrap();
    assert_eq!(report.forgotten, [first.id, members[0]]);
    expire(&repository, impatient()).await;
    let left: BTreeSet<_> = repository.snapshots().await.unwrap().into_iter().map(|snapshot| snapshot.id).collect();
    assert_eq!(left, BTreeSet::from([second.id, members[1], members[2]]));
    assert_exact(&store, &repository).await;
}

#[tokio::test(start_paused = true)]
async fn lost_references_stop_expiry_and_forgetting_the_snapshot_lets_it_go_on() {
    let (store, repository) = made().await;
    let broken = back_up(&repository, "a", &files(&[1])).await;
    let gone = back_up(&repository, "b", &files(&[2])).await;
    let kept = back_up(&repository, "c", &files(&[3])).await;
    store.delete(&format!("r/{}/0", broken.id)).await.unwrap();
    repository.forget(&[gone.id]).await.unwrap();
    let before = packs_in(&store);
    let error = repository.expire(impatient(), Arc::default()).await.unwrap_err();
    assert!(matches!(error, ExpireError::References { snapshot, .. } if snapshot == broken.id), "{error}");
    assert_eq!(packs_in(&store), before);
    repository.forget(&[broken.id]).await.unwrap();
    expire(&repository, impatient()).await;
    assert_restores(&repository, &Expected::from([(kept.id, files(&[3]))])).await;
    assert_exact(&store, &repository).await;
}

#[tokio::test(start_paused = true)]
async fn a_forged_tombstone_or_mark_deletes_nothing() {
    let (store, repository) = made().await;
    let kept = back_up(&repository, "a", &files(&[1])).await;
    let forged = marks::tombstone_bytes(&marks::MarkKey::new(&[1; 32]), kept.id, crate::clock::now());
    store.put_if_absent(&marks::tombstone_key(kept.id), forged.into()).await.unwrap();
    assert_restores(&repository, &Expected::from([(kept.id, files(&[1]))])).await;
    let forged = marks::Condemned { packs: packs_in(&store) }.to_bytes(&marks::MarkKey::new(&[1; 32]), 1).unwrap();
    store.put_if_absent(&marks::condemned_key(1), forged.into()).await.unwrap();
    assert!(matches!(repository.expire(impatient(), Arc::default()).await, Err(ExpireError::Marks { .. })));
    assert_restores(&repository, &Expected::from([(kept.id, files(&[1]))])).await;
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_someone_took_away_is_told_from_one_that_expired() {
    let (store, repository) = made().await;
    let first = back_up(&repository, "a", &files(&[1])).await;
    let taken = back_up(&repository, "a", &files(&[2])).await;
    back_up(&repository, "a", &files(&[3])).await;
    repository.forget(&[first.id]).await.unwrap();
    expire(&repository, impatient()).await;
    let other = open(store.clone()).await;
    other.snapshots().await.unwrap();
    assert!(other.omissions().await.unwrap().is_empty());
    store.delete(&format!("d/{}", taken.session)).await.unwrap();
    let other = open(store.clone()).await;
    other.snapshots().await.unwrap();
    assert_eq!(other.omissions().await.unwrap(), [taken.session]);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_expiry_says_so() {
    let (_, repository) = made().await;
    let progress = Arc::new(Progress::default());
    progress.cancel();
    assert!(matches!(repository.expire(impatient(), progress).await, Err(ExpireError::Cancelled)));
}

#[tokio::test]
async fn what_a_session_remembers_does_not_grow_with_the_backup() {
    let (_, repository) = made().await;
    let session = begin(&repository).await;
    let (full, more) = (65_536u32, 100u32);
    for number in 0..full + more {
        put(&session, &number.to_le_bytes()).await;
    }
    // The full pack is uploaded and published beside.
    for _ in 0..1000 {
        if session.remembered() <= more as usize {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(session.remembered(), more as usize);
    for number in [0, 1, 40_000, full, full + more - 1] {
        assert!(!put(&session, &number.to_le_bytes()).await.1, "{number} is found again");
    }
    commit(session).await;
}

#[tokio::test(start_paused = true)]
async fn an_abort_that_comes_when_the_commit_expired_and_the_index_is_merged_deletes_nothing_at_once() {
    let (store, repository) = made().await;
    let first = back_up(&repository, "a", &files(&[1, 2])).await;
    let second = back_up(&repository, "b", &files(&[1])).await;
    assert!(expire(&repository, impatient()).await.segments_merged > 0);
    assert_eq!(count(&store, "x0/"), 0);
    repository.forget(&[first.id]).await.unwrap();
    let no_repacking = ExpireOptions { repack_budget: 0, ..impatient() };
    expire(&repository, no_repacking).await;
    // Somebody who slept since before the commit takes the session for dead.
    let decision = crate::session::decision::decision_key(first.session);
    let abort = crate::session::decision::Decision::abort_bytes(first.session, "late");
    assert!(store.put_if_absent(&decision, abort.into()).await.unwrap().is_ours());
    let expected = Expected::from([(second.id, files(&[1]))]);
    let other = open(store.clone()).await;
    expire(&other, merciless()).await;
    assert_restores(&other, &expected).await;
    assert!(!store.keys().contains(&format!("x0/{}/00000000", first.session)), "nobody asked what it published");
    let again = back_up(&other, "c", &files(&[1])).await;
    assert!(again.stats.new_bytes < 10_000, "the merged index finds the file: {}", again.stats.new_bytes);
    // One whose look at the rounds is as old as the ABORT looks again.
    let mut stale = Run::new(&other, merciless(), Arc::default());
    let seen = stale.look(0).await;
    assert!(matches!(seen, Err(ExpireError::Marks { .. })), "the round after its epoch is decided");
}

#[tokio::test(start_paused = true)]
async fn a_part_of_the_index_that_is_lost_costs_deduplication_and_stops_nobody() {
    let (store, repository) = made().await;
    let first = back_up(&repository, "a", &files(&[1, 2])).await;
    assert!(expire(&repository, impatient()).await.segments_merged > 0);
    for key in store.keys().iter().filter(|key| key.starts_with(crate::index::PARTS_PREFIX)) {
        store.delete(key).await.unwrap();
    }
    let other = open(store.clone()).await;
    let second = back_up(&other, "b", &files(&[2, 3])).await;
    assert!(expire(&other, impatient()).await.waiting_for.is_empty());
    let expected = Expected::from([(first.id, files(&[1, 2])), (second.id, files(&[2, 3]))]);
    assert_restores(&open(store.clone()).await, &expected).await;
}
