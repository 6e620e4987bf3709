//! Packs that are mostly dead give their space back, and every snapshot still reads.

use super::*;

/// Two lineages that share packs of which, after forgetting, little lives.
async fn worn() -> (Memory, Repository, Expected) {
    let (store, repository) = made().await;
    let large = back_up(&repository, "a", &files(&[1, 2, 3, 4, 5, 6])).await;
    let mut expected = Expected::new();
    for (lineage, seeds) in [("a", vec![1, 10]), ("b", vec![2, 20]), ("a", vec![1, 11])] {
        let snapshot = back_up(&repository, lineage, &files(&seeds)).await;
        expected.insert(snapshot.id, files(&seeds));
    }
    repository.forget(&[large.id]).await.unwrap();
    (store, repository, expected)
}

#[tokio::test(start_paused = true)]
async fn what_lives_is_copied_and_the_old_packs_go() {
    let (store, repository, expected) = worn().await;
    let before = packs_in(&store);
    let stored = |store: &Memory| -> usize {
        let packs = store.keys().into_iter().filter(|key| key.starts_with("p/"));
        packs.map(|key| store.object(&key).unwrap().len()).sum()
    };
    let bytes = stored(&store);
    let report = expire(&repository, impatient()).await;
    assert!(report.packs_repacked == 1 && report.bytes_copied > 130_000, "{report:?}");
    assert_eq!(report.packs_left, 0);
    assert!(bytes - stored(&store) > 250_000, "{bytes} {}", stored(&store));
    let after = assert_exact(&store, &repository).await;
    assert_ne!(after, before);
    assert_restores(&repository, &expected).await;
    let other = open(store.clone()).await;
    assert_restores(&other, &expected).await;
    assert_exact(&store, &other).await;

    // The chunks are found by new writers, and no reference to the old places is made any more.
    let again = back_up(&other, "c", &files(&[1, 2])).await;
    assert!(again.stats.new_bytes < 5_000, "only a manifest: {}", again.stats.new_bytes);
    let mut expected = expected;
    let old: Vec<_> = expected.keys().copied().collect();
    other.forget(&old).await.unwrap();
    expected = Expected::from([(again.id, files(&[1, 2]))]);
    expire(&other, impatient()).await;
    assert_restores(&other, &expected).await;
    assert_exact(&store, &other).await;
}

#[tokio::test(start_paused = true)]
async fn a_budget_is_kept_and_what_is_left_comes_next_time() {
    let (store, repository, expected) = worn().await;
    let report = expire(&repository, ExpireOptions { repack_budget: 1000, ..impatient() }).await;
    assert_eq!((report.packs_repacked, report.packs_left), (0, 1));
    assert_exact(&store, &repository).await;
    let report = expire(&open(store.clone()).await, impatient()).await;
    assert_eq!((report.packs_repacked, report.packs_left), (1, 0), "remembered from the round before");
    assert_exact(&store, &repository).await;
    assert_restores(&repository, &expected).await;
}

#[tokio::test(start_paused = true)]
async fn a_child_of_a_repacked_parent_inherits_what_was_moved() {
    let (store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    let write = |name: &str, seed| std::fs::write(source.path().join(name), noise(seed, 200_000)).unwrap();
    for (name, seed) in [("kept", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)] {
        write(name, seed);
    }
    std::thread::sleep(Duration::from_millis(60));
    let tree = |repository: Repository, parent: Option<Snapshot>| {
        let root = source.path().to_owned();
        async move {
            let options = TreeBackup { lineage: "t".into(), parent, ..TreeBackup::default() };
            crate::backup::tree(&repository, &root, options, Arc::default()).await.unwrap().snapshot
        }
    };
    let first = tree(repository.clone(), None).await;
    for name in ["b", "c", "d", "e"] {
        std::fs::remove_file(source.path().join(name)).unwrap();
    }
    let second = tree(repository.clone(), Some(first.clone())).await;
    assert_eq!(second.stats.read_bytes, 0);
    repository.forget(&[first.id]).await.unwrap();
    let report = expire(&repository, impatient()).await;
    assert_eq!(report.packs_repacked, 1, "{report:?}");
    assert_exact(&store, &repository).await;

    let other = open(store.clone()).await;
    let third = tree(other.clone(), Some(second.clone())).await;
    assert_eq!((third.stats.read_bytes, third.stats.new_bytes), (0, 0), "nothing is read again");
    // The child stands on its own: the places that its manifest names are long gone.
    other.forget(&[second.id]).await.unwrap();
    expire(&other, impatient()).await;
    assert_exact(&store, &other).await;
    let target = tempfile::tempdir().unwrap();
    crate::restore::tree(&other, &third, target.path(), crate::restore::RestoreOptions::default(), Arc::default())
        .await
        .unwrap();
    assert_eq!(std::fs::read(target.path().join("kept")).unwrap(), noise(1, 200_000));
    // And a grandchild inherits through it.
    let fourth = tree(other.clone(), Some(third)).await;
    assert_eq!(fourth.stats.read_bytes, 0);
    assert_exact(&store, &other).await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_goes_on_while_its_packs_are_repacked() {
    let (store, repository, expected) = worn().await;
    let reader_of = open(store.clone()).await;
    let snapshots = reader_of.snapshots().await.unwrap();
    let pin = reader_of.pin(&snapshots[0]).await.unwrap().unwrap();
    assert!(read_all(&reader_of, &snapshots[0]).await == expected[&snapshots[0].id]);
    let report = expire(&repository, impatient_but_not_with_readers()).await;
    assert_eq!(report.packs_repacked, 1);
    assert!(read_all(&reader_of, &snapshots[0]).await == expected[&snapshots[0].id]);
    pin.release().await;
    // Without a pin as well: a place that is gone is looked up again.
    expire(&repository, impatient()).await;
    for snapshot in &snapshots {
        assert!(read_all(&reader_of, snapshot).await == expected[&snapshot.id]);
    }
    assert_exact(&store, &repository).await;
}

fn impatient_but_not_with_readers() -> ExpireOptions {
    ExpireOptions { silence: Duration::from_hours(1), patience: Duration::ZERO, ..ExpireOptions::default() }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_pack_is_not_copied() {
    let (store, repository, _) = worn().await;
    let planned = expire(&repository, ExpireOptions { dry_run: true, ..impatient() }).await;
    assert_eq!(planned.packs_repacked, 1);
    for pack in packs_in(&store).iter() {
        let key = crate::pack::pack_key(pack);
        let mut bytes = store.object(&key).unwrap().to_vec();
        bytes[70] ^= 1;
        store.overwrite(&key, bytes.into());
    }
    let report = expire(&repository, impatient()).await;
    assert_eq!((report.packs_repacked, report.packs_left), (0, 1), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_loaded_the_index_before_finds_what_was_moved_since() {
    let (store, repository, expected) = worn().await;
    let other = open(store.clone()).await;
    let reader = other.reader().unwrap();
    let mut chunks = Vec::new();
    for snapshot in other.snapshots().await.unwrap() {
        chunks.extend(walk(&other, &snapshot).await);
    }
    // What is nowhere makes the reader load the index.
    let nowhere = ChunkRef { id: crate::id::ChunkId([7; 32]), ..chunks[0] };
    assert_eq!(reader.locate_for_test(&nowhere).await, None);
    assert_eq!(expire(&repository, impatient()).await.packs_repacked, 1);
    for chunk in &chunks {
        assert!(reader.locate_for_test(chunk).await.is_some(), "{chunk:?}");
    }
    assert_eq!(reader.locate_for_test(&nowhere).await, None);
    assert_restores(&other, &expected).await;
}
