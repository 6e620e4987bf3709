//! Replicas: as good as their originals, made at the cost of what is new, and never in the way of the target's retention.
#![allow(clippy::unwrap_used, clippy::panic)]

mod trees;

use std::path::Path;
use std::sync::Arc;

use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::check::CheckOptions;
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::expire::ExpireOptions;
use lifeboat_repository::keys::{Role, Secret};
use lifeboat_repository::progress::Progress;
use lifeboat_repository::replicate::{REPLICA_OF, ReplicateError, ReplicateOptions, ReplicateReport, replicate};
use lifeboat_repository::repository::{OpenOptions, Repository};
use lifeboat_repository::restore::{self, RestoreOptions};
use lifeboat_repository::snapshot::{Content, Counts, Snapshot};
use lifeboat_repository::store::Reason;
use lifeboat_repository::store::faulty::{Fault, Faulty, Operation};
use lifeboat_repository::store::memory::Memory;

use trees::{describe, full_tree, made, noise, write};

async fn back_up(repository: &Repository, root: &Path, lineage: &str, parent: Option<&Snapshot>) -> Snapshot {
    let plan = TreeBackup { lineage: lineage.into(), parent: parent.cloned(), ..TreeBackup::default() };
    backup::tree(repository, root, plan, Arc::default()).await.unwrap().snapshot
}

/// Lets the clock of the file system pass the time of the last change, so that files are known to be unchanged.
async fn settle() {
    tokio::time::sleep(std::time::Duration::from_millis(40)).await;
}

async fn mirror(source: &Repository, target: &Repository) -> ReplicateReport {
    replicate(source, target, ReplicateOptions::default(), Arc::default()).await.unwrap()
}

/// A target with the keys of the source, and one with others.
async fn targets(source: &Repository) -> [(Memory, Repository); 2] {
    let store = Memory::new();
    let same = source.init_replica(Arc::new(store.clone()), &Secret::key_file([7; 32])).await.unwrap();
    [(store, same), made().await]
}

async fn assert_restores(target: &Repository, replica: &Snapshot, root: &Path) {
    let restored = tempfile::tempdir().unwrap();
    let report =
        restore::tree(target, replica, restored.path(), RestoreOptions::default(), Arc::default()).await.unwrap();
    assert_eq!(report.failed, []);
    assert!(describe(restored.path()) == describe(root));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_as_good_as_its_original_and_costs_what_is_new() {
    let (_, source) = made().await;
    let folder = tempfile::tempdir().unwrap();
    full_tree(folder.path());
    settle().await;
    let first = back_up(&source, folder.path(), "a", None).await;
    let targets = targets(&source).await;
    for (_, target) in &targets {
        let report = mirror(&source, target).await;
        assert_eq!((report.copied.len(), report.present), (1, 0));
        let replica = target.snapshots().await.unwrap().remove(0);
        assert_eq!(Some(replica.id), report.copied[0].replica);
        assert_eq!(replica.tags[REPLICA_OF], first.id.to_string());
        assert_eq!((replica.time, replica.counts, &replica.lineage), (first.time, first.counts, &first.lineage));
        assert_restores(target, &replica, folder.path()).await;
        let checked = target.check(CheckOptions::all_data(), Arc::default()).await.unwrap();
        assert_eq!(checked.problems, []);
    }
    write(folder.path(), "docs/changed", &noise(77, 40_000));
    settle().await;
    let second = back_up(&source, folder.path(), "a", Some(&first)).await;
    for (_, target) in &targets {
        let report = mirror(&source, target).await;
        assert_eq!((report.copied.len(), report.present), (1, 1));
        let copied = report.copied[0];
        assert_eq!((copied.source, copied.read_bytes), (second.id, 40_000));
        assert!(copied.new_bytes < 300_000, "{}", copied.new_bytes);
        let replica = target.latest_of("a").await.unwrap().unwrap();
        assert_restores(target, &replica, folder.path()).await;
        assert_eq!(mirror(&source, target).await.copied.len(), 0, "nothing is left to do");
        let checked = target.check(CheckOptions::all_data(), Arc::default()).await.unwrap();
        assert_eq!(checked.problems, []);
    }
    // With the same keys, what the target has is not read, even with nothing to compare with: only the bundles of small
    // files that are new at the source as well.
    let other = back_up(&source, folder.path(), "b", None).await;
    let copied = mirror(&source, &targets[0].1).await.copied[0];
    assert_eq!(copied.source, other.id);
    assert!(copied.read_bytes <= other.stats.new_bytes && copied.read_bytes < 1 << 20, "{}", copied.read_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_chosen_is_replicated_and_what_the_target_let_go_stays_away() {
    let (_, source) = made().await;
    let folder = tempfile::tempdir().unwrap();
    let mut made_here = Vec::new();
    for number in 0..3u64 {
        for lineage in ["a", "b"] {
            write(folder.path(), "file", &noise(number, 1000));
            made_here.push(back_up(&source, folder.path(), lineage, None).await);
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }
    let (_, target) = made().await;
    let sources = |report: &ReplicateReport| report.copied.iter().map(|copied| copied.source).collect::<Vec<_>>();
    let only = |lineage: &str| ReplicateOptions { lineages: vec![lineage.to_owned()], ..ReplicateOptions::default() };
    let newest = ReplicateOptions { newest: Some(1), ..only("a") };
    let look = ReplicateOptions { dry_run: true, ..newest.clone() };
    let looked = replicate(&source, &target, look, Arc::default()).await.unwrap();
    assert_eq!((sources(&looked), looked.copied[0].replica), (vec![made_here[4].id], None));
    assert!(target.snapshots().await.unwrap().is_empty());
    let report = replicate(&source, &target, newest, Arc::default()).await.unwrap();
    assert_eq!(sources(&report), [made_here[4].id]);
    // Older ones of `a` are taken as let go, whatever the reason; `b` is new here.
    let report = mirror(&source, &target).await;
    assert_eq!(sources(&report), [made_here[1].id, made_here[3].id, made_here[5].id]);
    let mut passed_over = report.passed_over.clone();
    passed_over.sort_unstable();
    let mut expected = [made_here[0].id, made_here[2].id];
    expected.sort_unstable();
    assert_eq!(passed_over, expected);
    // Unless they are named.
    let named = ReplicateOptions { snapshots: vec![made_here[2].id], ..ReplicateOptions::default() };
    assert_eq!(sources(&replicate(&source, &target, named, Arc::default()).await.unwrap()), [made_here[2].id]);
    let since = ReplicateOptions { newer_than: Some(made_here[5].time), ..ReplicateOptions::default() };
    let report = replicate(&source, &target, since, Arc::default()).await.unwrap();
    assert_eq!((report.copied.len(), report.present), (0, 0));
    let same = replicate(&source, &source, ReplicateOptions::default(), Arc::default()).await.unwrap_err();
    assert!(matches!(same, ReplicateError::Same));
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_points_come_after_their_members_and_name_the_replicas() {
    let (_, source) = made().await;
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "file", b"volume");
    let member = back_up(&source, folder.path(), "volume", None).await;
    let description = serde_json::json!({"volumes": [{"claim": "data", "snapshot": member.id.to_string()}]});
    let point =
        backup::recovery_point(&source, "point".into(), [].into(), vec![member.id], description, Counts::default());
    let point = point.await.unwrap();
    let (_, target) = made().await;
    let options = ReplicateOptions { lineages: vec!["point".into()], ..ReplicateOptions::default() };
    let report = replicate(&source, &target, options, Arc::default()).await.unwrap();
    assert_eq!(report.copied.iter().map(|copied| copied.source).collect::<Vec<_>>(), [member.id, point.id]);
    let replica = target.latest_of("point").await.unwrap().unwrap();
    let Content::RecoveryPoint { members, description } = replica.content else { panic!() };
    assert_eq!(members, [report.copied[0].replica.unwrap()]);
    assert_eq!(description["volumes"][0]["snapshot"], members[0].to_string());
    assert_eq!(target.check(CheckOptions::all_data(), Arc::default()).await.unwrap().problems, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replication_that_dies_anywhere_is_gone_on_with() {
    let (_, source) = made().await;
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "file", &noise(1, 300_000));
    write(folder.path(), "small", b"small");
    back_up(&source, folder.path(), "a", None).await;
    let store = Memory::new();
    source.init_replica(Arc::new(store.clone()), &Secret::key_file([7; 32])).await.unwrap();
    let empty = store.journal();
    for crash in 0.. {
        let store = Memory::replay(&empty);
        let open =
            async |store| Repository::open(store, &Secret::key_file([7; 32]), OpenOptions::default()).await.unwrap();
        let mut puts = 0;
        let dying = Faulty::new(Arc::new(store.clone()), move |operation, _| {
            puts += usize::from(operation == Operation::Put);
            if puts > crash { Fault::Before(Reason::Unreachable) } else { Fault::None }
        });
        let target = open(Arc::new(dying)).await;
        let ended = replicate(&source, &target, ReplicateOptions::default(), Arc::default()).await;
        let target = open(Arc::new(store.clone())).await;
        let report = mirror(&source, &target).await;
        assert_eq!(report.copied.len(), usize::from(ended.is_err()), "after {crash} changes");
        let replica = target.latest_of("a").await.unwrap().unwrap();
        assert_restores(&target, &replica, folder.path()).await;
        if ended.is_ok() {
            assert!(crash > 5);
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_at_the_target_is_enough_and_a_wish_to_stop_leaves_nothing() {
    let (_, source) = made().await;
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "file", &noise(1, 100_000));
    back_up(&source, folder.path(), "a", None).await;
    let (store, owner) = made().await;
    let writer = Secret::key_file([8; 32]);
    owner.add_key(&writer, Role::Writer).await.unwrap();
    let target = Repository::open(Arc::new(store), &writer, OpenOptions::default()).await.unwrap();
    let stopped = Arc::new(Progress::default());
    stopped.cancel();
    let error = replicate(&source, &target, ReplicateOptions::default(), stopped).await.unwrap_err();
    assert!(matches!(error, ReplicateError::Cancelled));
    assert!(owner.snapshots().await.unwrap().is_empty());
    mirror(&source, &target).await;
    assert_restores(&owner, &owner.snapshots().await.unwrap()[0], folder.path()).await;
    // A writer at the source reads no data, and so replicates none.
    source.add_key(&writer, Role::Writer).await.unwrap();
    let error = target.init_replica(Arc::new(Memory::new()), &writer).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Key);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_or_damaged_index_is_made_anew() {
    let (store, repository) = made().await;
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "file", &noise(1, 300_000));
    settle().await;
    back_up(&repository, folder.path(), "a", None).await;
    let segments = |store: &Memory| store.keys().into_iter().filter(|key| key.starts_with("x0/")).collect::<Vec<_>>();
    let key = segments(&store).remove(0);
    for damage in [true, false] {
        if damage {
            let mut bytes = store.object(&key).unwrap().to_vec();
            bytes[40] ^= 1;
            store.overwrite(&key, bytes.into());
        } else {
            for key in segments(&store) {
                lifeboat_repository::store::Store::delete(&store, &key).await.unwrap();
            }
        }
        let report = trees::open(&store).await.rebuild_index(Arc::default()).await.unwrap();
        assert_eq!((report.packs, report.indexed, report.removed), (2, 2, u64::from(damage)));
        assert_eq!(segments(&store).len(), 1);
        let again = back_up(&trees::open(&store).await, folder.path(), "b", None).await;
        assert_eq!(again.stats.new_bytes, 0, "everything is found again");
        let report = trees::open(&store).await.rebuild_index(Arc::default()).await.unwrap();
        assert_eq!((report.indexed, report.unreadable, report.removed), (0, 0, 0));
        let checked = trees::open(&store).await.check(CheckOptions::default(), Arc::default()).await.unwrap();
        assert_eq!(checked.problems, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_an_aborted_session_may_publish_is_not_indexed_for_it() {
    let store = Memory::new();
    let (memory, _) = made().await;
    for key in memory.keys() {
        store.overwrite(&key, memory.object(&key).unwrap());
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "file", &noise(1, 300_000));
    settle().await;
    let mut decisions = 0;
    let faulty = Faulty::new(Arc::new(store.clone()), move |operation, key: &str| {
        let is_decision = operation == Operation::Put && key.starts_with("d/");
        decisions += usize::from(is_decision);
        if is_decision && decisions == 1 { Fault::Before(Reason::Unreachable) } else { Fault::None }
    });
    let opened = Repository::open(Arc::new(faulty), &Secret::key_file([7; 32]), OpenOptions::default()).await.unwrap();
    let plan = TreeBackup { lineage: "a".into(), ..TreeBackup::default() };
    assert!(backup::tree(&opened, folder.path(), plan, Arc::default()).await.is_err());
    let segment = store.keys().into_iter().find(|key| key.starts_with("x0/")).unwrap();
    let again = back_up(&trees::open(&store).await, folder.path(), "a", None).await;
    assert_eq!(again.stats.new_bytes, 0, "it was found");
    lifeboat_repository::store::Store::delete(&store, &segment).await.unwrap();
    let report = trees::open(&store).await.rebuild_index(Arc::default()).await.unwrap();
    assert!(report.left_out > 0 && report.indexed == 0, "{report:?}");
    assert!(store.keys().iter().all(|key| !key.starts_with(&segment[..36])));
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_goes_on_beside_expiry_on_both_sides() {
    let (store, source) = made().await;
    let (_, target) = made().await;
    let folder = tempfile::tempdir().unwrap();
    let mut parent = None;
    for number in 0..4u64 {
        write(folder.path(), &format!("{number}"), &noise(number, 300_000));
        if number > 1 {
            std::fs::remove_file(folder.path().join(format!("{}", number - 2))).unwrap();
        }
        settle().await;
        let snapshot = back_up(&source, folder.path(), "a", parent.as_ref()).await;
        assert_eq!(mirror(&source, &target).await.copied.len(), 1);
        assert_restores(&target, &target.latest_of("a").await.unwrap().unwrap(), folder.path()).await;
        for repository in [&source, &target] {
            let all = repository.snapshots().await.unwrap();
            let old: Vec<_> = all.iter().rev().skip(1).map(|snapshot| snapshot.id).collect();
            repository.forget(&old).await.unwrap();
            let report = repository.expire(ExpireOptions::default(), Arc::default()).await.unwrap();
            assert_eq!((report.snapshots, report.waiting_for.len()), (1, 0));
            assert_eq!(repository.check(CheckOptions::all_data(), Arc::default()).await.unwrap().problems, []);
            assert_eq!(repository.stats().await.unwrap().unreferenced_packs.count, 0);
            assert_eq!(repository.rebuild_index(Arc::default()).await.unwrap().unreadable, 0);
        }
        parent = Some(snapshot);
    }
    // Each copy was known to the source's expiry, as long as it lasted.
    let is_pin = |key: &String| key.starts_with("e/") && store.object(key).unwrap().starts_with(b"LBPINR01");
    let pins: Vec<_> = store.keys().into_iter().filter(is_pin).map(|key| store.object(&key).unwrap()).collect();
    assert!(pins.len() >= 4, "{}", pins.len());
    for pin in pins {
        let session = lifeboat_repository::id::SessionId(pin[8..24].try_into().unwrap());
        assert!(store.object(&format!("d/{session}")).unwrap().starts_with(b"LBABRT01"));
    }
}
