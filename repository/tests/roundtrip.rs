//! What was backed up comes back as it was, in every respect; and only what changed is read again.

#![allow(clippy::unwrap_used, reason = "only tests use these functions; a failure here is theirs")]

mod trees;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::{TryStreamExt, stream};
use lifeboat_repository::backup::{self, Reason, TreeBackup, VirtualFile};
use lifeboat_repository::config::ChunkerConfig;
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::manifest::{Kind, compare_paths};
use lifeboat_repository::progress::Progress;
use lifeboat_repository::repository::{InitOptions, Repository};
use lifeboat_repository::restore::{self, Existing, RestoreOptions, What};
use lifeboat_repository::snapshot::{Content, Counts, Snapshot};
use lifeboat_repository::tree;

use trees::{Described, describe, full_tree, made, made_with, noise, open, path_to, write};

async fn back_up(repository: &Repository, root: &Path, parent: Option<&Snapshot>) -> backup::BackupReport {
    let plan = TreeBackup { lineage: "test".into(), parent: parent.cloned(), ..TreeBackup::default() };
    backup::tree(repository, root, plan, Arc::default()).await.unwrap()
}

async fn restore_all(repository: &Repository, snapshot: &Snapshot, target: &Path) -> restore::RestoreReport {
    restore::tree(repository, snapshot, target, RestoreOptions::default(), Arc::default()).await.unwrap()
}

/// Lets the clock of the file system pass the time of the last change, so that later changes show.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(40)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_about_a_tree_comes_back() {
    let (store, repository) = made().await;
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    full_tree(source.path());
    let report = back_up(&repository, source.path(), None).await;
    assert_eq!(report.skipped, []);

    let other = open(&store).await;
    let restored = restore_all(&other, &report.snapshot, target.path()).await;
    assert_eq!(restored.failed, []);
    assert_eq!(restored.counts, report.snapshot.counts);
    let (before, after) = (describe(source.path()), describe(target.path()));
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (path, entry) in &before {
        assert_eq!(entry, &after[path], "{}", String::from_utf8_lossy(path));
    }
    assert!(before.values().any(|entry| entry.xattrs.iter().any(|(name, _)| name == b"security.capability")));
    assert!(before.values().any(|entry| entry.xattrs.iter().any(|(name, _)| name == b"system.posix_acl_access")));
    assert!(before.values().any(|entry| entry.same_as.is_some()));
    let sparse = fs::metadata(target.path().join("sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 4 << 20, "{} blocks", sparse.blocks());
    assert_eq!(sparse.len(), 64 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn unchanged_files_are_not_read_and_not_stored_again() {
    let (store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    full_tree(source.path());
    settle().await;
    let first = back_up(&repository, source.path(), None).await.snapshot;
    assert!(first.stats.read_bytes > 5 << 20);

    let repository = open(&store).await;
    let second = back_up(&repository, source.path(), Some(&first)).await.snapshot;
    assert_eq!(second.stats.read_bytes, 0);
    assert_eq!(second.stats.new_bytes, 0, "the manifest is the same as well");
    assert_eq!(second.counts, first.counts);
    assert_eq!(second.parent, Some(first.id));

    write(source.path(), "docs/changed", &noise(99, 5000));
    fs::remove_file(source.path().join("small/7")).unwrap();
    settle().await;
    let third = back_up(&repository, source.path(), Some(&second)).await.snapshot;
    assert_eq!(third.stats.read_bytes, 5000);
    assert!(third.stats.new_bytes < 200 << 10, "{}", third.stats.new_bytes);
    assert_eq!(third.counts.files, second.counts.files - 1, "one was removed");
    let target = tempfile::tempdir().unwrap();
    assert_eq!(restore_all(&repository, &third, target.path()).await.failed, []);
    assert_eq!(describe(target.path()), describe(source.path()));

    // Without a parent everything is read, and nothing new is found in whole files.
    let again = back_up(&repository, source.path(), None).await.snapshot;
    assert_eq!(again.stats.read_bytes, first.stats.read_bytes - 700 - 13 + 5000);
    assert!(again.stats.new_bytes < 600 << 10, "{}", again.stats.new_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_keeps_size_and_mtime_is_noticed() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    write(source.path(), "file", b"before");
    let path = source.path().join("file");
    settle().await;
    let first = back_up(&repository, source.path(), None).await.snapshot;
    let mtime = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, b"behind").unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), mtime);
    let second = back_up(&repository, source.path(), Some(&first)).await.snapshot;
    assert_eq!(second.stats.read_bytes, 6);
    assert_eq!(read(&repository, &second, "file").await, b"behind");
}

async fn read(repository: &Repository, snapshot: &Snapshot, path: &str) -> Vec<u8> {
    let pieces: Vec<_> =
        tree::read_file(repository, snapshot, Path::new(path)).await.unwrap().try_collect().await.unwrap();
    pieces.concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_are_listed_and_files_read_alone() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    full_tree(source.path());
    let snapshot = back_up(&repository, source.path(), None).await.snapshot;
    let names = |entries: Vec<lifeboat_repository::manifest::Entry>| -> Vec<String> {
        entries.into_iter().map(|entry| String::from_utf8_lossy(&entry.path).into_owned()).collect()
    };
    let list = async |path: Option<&str>, recursive| {
        names(tree::list(&repository, &snapshot, path.map(Path::new), recursive).await.unwrap())
    };
    assert_eq!(list(Some("docs"), false).await, ["docs/changed", "docs/deep", "docs/empty"]);
    assert_eq!(list(Some("/docs/deep/"), true).await, ["docs/deep/er", "docs/deep/er/file"]);
    assert_eq!(list(Some("docs/empty"), false).await, ["docs/empty"]);
    let all = list(None, true).await;
    assert_eq!(all.len() as u64 + 1, snapshot.counts.files + snapshot.counts.directories + snapshot.counts.others);
    assert!(
        all.windows(2)
            .all(|pair| compare_paths(pair[0].as_bytes(), pair[1].as_bytes()).is_lt() || pair[0].contains('\u{fffd}'))
    );
    let top = list(None, false).await;
    assert!(top.iter().all(|path| !path.contains('/')) && top.contains(&"docs".to_owned()), "{top:?}");

    for path in ["large", "sparse", "docs/empty", "small/3", "hard/second"] {
        assert!(read(&repository, &snapshot, path).await == fs::read(source.path().join(path)).unwrap(), "{path}");
    }
    let Err(error) = tree::read_file(&repository, &snapshot, Path::new("docs")).await else { panic!() };
    assert_eq!(error.class(), ErrorClass::Invalid);
    let error = tree::list(&repository, &snapshot, Some(Path::new("none")), false).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_files_over_many_pages() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    for directory in 0..30 {
        for file in 0..150 {
            let len = (directory * 131 + file * 17) % 900;
            write(source.path(), &format!("d{directory}/f{file}"), &noise(directory * 1000 + file, len as usize));
        }
    }
    settle().await;
    let first = back_up(&repository, source.path(), None).await.snapshot;
    let manifest = tree::manifest(&repository, &first).await.unwrap();
    assert!(manifest.pages().len() > 2, "{} pages", manifest.pages().len());
    let listed = tree::list(&repository, &first, Some(Path::new("d7")), false).await.unwrap();
    assert_eq!(listed.len(), 150);
    assert_eq!(tree::list(&repository, &first, None, false).await.unwrap().len(), 30);
    write(source.path(), "d7/f7", b"new content");
    write(source.path(), "d12/inserted", b"inserted");
    settle().await;
    let second = back_up(&repository, source.path(), Some(&first)).await.snapshot;
    assert_eq!(second.stats.read_bytes, 19);
    let after = tree::manifest(&repository, &second).await.unwrap();
    let kept =
        after.pages().iter().filter(|page| manifest.pages().iter().any(|old| old.chunk.id == page.chunk.id)).count();
    assert!(kept + 4 >= after.pages().len() && kept > 0, "{kept} of {} pages are kept", after.pages().len());
    let target = tempfile::tempdir().unwrap();
    assert_eq!(restore_all(&repository, &second, target.path()).await.failed, []);
    assert_eq!(describe(target.path()), describe(source.path()));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_many_chunks_keep_their_lists() {
    let chunker = ChunkerConfig { min: 2048, average: 8192, max: 32768, ..ChunkerConfig::default() };
    let (_store, repository) = made_with(InitOptions { chunker }).await;
    let source = tempfile::tempdir().unwrap();
    let mut bytes = noise(5, 24 << 20);
    write(source.path(), "big", &bytes);
    settle().await;
    let first = back_up(&repository, source.path(), None).await.snapshot;
    let listed = tree::list(&repository, &first, None, true).await.unwrap();
    let Kind::Regular(file) = &listed[0].kind else { panic!() };
    let lifeboat_repository::manifest::Contents::Listed(lists) = &file.contents else { panic!("inline") };
    assert!(lists.len() > 1);
    let second = back_up(&repository, source.path(), Some(&first)).await.snapshot;
    assert_eq!((second.stats.read_bytes, second.stats.new_bytes), (0, 0));
    bytes.splice(1_000_000..1_000_100, *b"something else");
    write(source.path(), "big", &bytes);
    settle().await;
    let third = back_up(&repository, source.path(), Some(&second)).await.snapshot;
    assert_eq!(third.stats.read_bytes, bytes.len() as u64);
    assert!(third.stats.new_bytes < 512 << 10, "{}", third.stats.new_bytes);
    assert!(read(&repository, &third, "big").await == bytes);
    let target = tempfile::tempdir().unwrap();
    assert_eq!(restore_all(&repository, &third, target.path()).await.failed, []);
    assert!(fs::read(target.path().join("big")).unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_is_restored_with_the_directories_above() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    full_tree(source.path());
    let snapshot = back_up(&repository, source.path(), None).await.snapshot;
    let target = tempfile::tempdir().unwrap();
    let select = vec!["docs/deep/er".to_owned(), "hard/sec*".to_owned(), "/hard/third".to_owned()];
    let options = RestoreOptions { select, ..RestoreOptions::default() };
    let report = restore::tree(&repository, &snapshot, target.path(), options, Arc::default()).await.unwrap();
    assert_eq!(report.failed, []);
    let (before, after) = (describe(source.path()), describe(target.path()));
    let paths: Vec<_> = after.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    assert_eq!(
        paths,
        ["", "docs", "docs/deep", "docs/deep/er", "docs/deep/er/file", "hard", "hard/second", "hard/third"]
    );
    for (path, entry) in &after {
        let of_links = path.starts_with(b"hard/");
        let expected =
            Described { same_as: if of_links { entry.same_as.clone() } else { None }, ..before[path].clone() };
        assert_eq!(entry, &expected, "{}", String::from_utf8_lossy(path));
    }
    assert_eq!(after[&b"hard/third"[..]].same_as.as_deref(), Some(&b"hard/second"[..]));
    let options = RestoreOptions { select: vec!["nothing/here".into()], ..RestoreOptions::default() };
    let error = restore::tree(&repository, &snapshot, target.path(), options, Arc::default()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_exists_is_kept_or_replaced_as_told() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    for path in ["same", "dir/file", "link-there", "dir-there"] {
        write(source.path(), path, b"from the snapshot");
    }
    symlink("same", source.path().join("symlink")).unwrap();
    let snapshot = back_up(&repository, source.path(), None).await.snapshot;
    let outside = tempfile::tempdir().unwrap();
    let target = tempfile::tempdir().unwrap();
    write(outside.path(), "precious", b"precious");
    write(target.path(), "same", b"mine");
    write(target.path(), "dir/other", b"other");
    write(target.path(), "symlink", b"mine");
    write(target.path(), "dir-there/inside", b"inside");
    symlink(outside.path().join("precious"), target.path().join("link-there")).unwrap();

    let report = restore_all(&repository, &snapshot, target.path()).await;
    let mut failed: Vec<_> = report.failed.iter().map(|failed| (failed.path.as_slice(), failed.what)).collect();
    failed.sort_by_key(|(path, _)| *path);
    let create = What::Create;
    assert_eq!(failed, [(&b"dir-there"[..], create), (b"link-there", create), (b"same", create), (b"symlink", create)]);
    assert_eq!(report.counts.skipped, 4);
    assert_eq!(fs::read(target.path().join("same")).unwrap(), b"mine");
    assert_eq!(fs::read(target.path().join("dir/file")).unwrap(), b"from the snapshot");

    let options = RestoreOptions { existing: Existing::Overwrite, ..RestoreOptions::default() };
    let report = restore::tree(&repository, &snapshot, target.path(), options, Arc::default()).await.unwrap();
    let failed: Vec<_> = report.failed.iter().map(|failed| failed.path.as_slice()).collect();
    assert_eq!(failed, [&b"dir-there"[..]], "a directory is not removed");
    for path in ["same", "dir/file", "link-there", "symlink"] {
        assert_eq!(fs::read(target.path().join(path)).unwrap(), b"from the snapshot", "{path}");
    }
    assert_eq!(fs::read(target.path().join("dir/other")).unwrap(), b"other");
    assert_eq!(fs::read(target.path().join("dir-there/inside")).unwrap(), b"inside");
    assert_eq!(fs::read(outside.path().join("precious")).unwrap(), b"precious");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_owners_nobody_gets_the_rights_of_another() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    write(source.path(), "tool", b"#!");
    std::os::unix::fs::chown(source.path().join("tool"), Some(1234), Some(1234)).unwrap();
    fs::set_permissions(source.path().join("tool"), fs::Permissions::from_mode(0o6755)).unwrap();
    let snapshot = back_up(&repository, source.path(), None).await.snapshot;
    let target = tempfile::tempdir().unwrap();
    let options = RestoreOptions { owner: false, ..RestoreOptions::default() };
    let report = restore::tree(&repository, &snapshot, target.path(), options, Arc::default()).await.unwrap();
    assert_eq!(report.failed, []);
    let found = fs::metadata(target.path().join("tool")).unwrap();
    assert_eq!((found.uid(), found.mode() & 0o7777), (rustix::process::getuid().as_raw(), 0o755));
}

#[tokio::test(flavor = "multi_thread")]
async fn excluded_paths_are_left_out() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    for path in ["keep", "cache/a", "x/cache/b", "x/y.tmp", "x/y.txt", "top/only", "x/top/only"] {
        write(source.path(), path, b"x");
    }
    let excludes = ["cache", "*.tmp", "/top"].map(str::to_owned).to_vec();
    let plan = TreeBackup { lineage: "test".into(), excludes, ..TreeBackup::default() };
    let report = backup::tree(&repository, source.path(), plan, Arc::default()).await.unwrap();
    let listed = tree::list(&repository, &report.snapshot, None, true).await.unwrap();
    let paths: Vec<_> = listed.iter().map(|entry| std::str::from_utf8(&entry.path).unwrap()).collect();
    assert_eq!(paths, ["keep", "x", "x/top", "x/top/only", "x/y.txt"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_leaves_nothing_visible() {
    let (store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    write(source.path(), "file", &noise(1, 3 << 20));
    let progress = Arc::new(Progress::default());
    progress.cancel();
    let plan = TreeBackup { lineage: "test".into(), ..TreeBackup::default() };
    let error = backup::tree(&repository, source.path(), plan, progress).await.unwrap_err();
    assert!(matches!(error, backup::BackupError::Cancelled));
    assert_eq!(repository.snapshots().await.unwrap(), []);
    assert_eq!(store.keys().iter().filter(|key| key.starts_with("d/")).count(), 1, "the session is decided");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_from_memory_and_recovery_points() {
    let (_store, repository) = made().await;
    let mtime = jiff::Timestamp::new(1_700_000_000, 5).unwrap();
    let file = |path: &str, bytes: Vec<u8>| {
        Ok::<_, std::io::Error>(VirtualFile { path: path.into(), bytes: bytes.into(), mtime })
    };
    let large = noise(3, 3 << 20);
    let files = vec![
        file("apps/deployments/a.json", b"{}".to_vec()),
        file("apps/deployments/b.json", large.clone()),
        file("apps.json", Vec::new()),
        file("core/pods/c.json", b"pod".to_vec()),
    ];
    let plan = TreeBackup { lineage: "objects".into(), host: "controller".into(), ..TreeBackup::default() };
    let report = backup::entries(&repository, stream::iter(files), plan.clone(), Arc::default()).await.unwrap();
    assert_eq!(
        report.snapshot.counts,
        Counts { files: 4, directories: 5, others: 0, bytes: 5 + (3 << 20), skipped: 0 }
    );
    assert_eq!(report.snapshot.host, "controller");
    assert!(read(&repository, &report.snapshot, "apps/deployments/b.json").await == large);
    assert_eq!(read(&repository, &report.snapshot, "core/pods/c.json").await, b"pod");
    assert_eq!(read(&repository, &report.snapshot, "apps.json").await, b"");
    let target = tempfile::tempdir().unwrap();
    assert_eq!(restore_all(&repository, &report.snapshot, target.path()).await.failed, []);
    assert_eq!(fs::read(target.path().join("core/pods/c.json")).unwrap(), b"pod");

    for wrong in [vec!["b", "a"], vec!["a", "a"], vec!["../a"], vec!["/a"], vec!["a", "a/b"], vec![""]] {
        let files: Vec<_> = wrong.iter().map(|path| file(path, b"x".to_vec())).collect();
        let error = backup::entries(&repository, stream::iter(files), plan.clone(), Arc::default()).await.unwrap_err();
        assert!(matches!(error, backup::BackupError::Path { .. }), "{wrong:?}: {error}");
    }
    let broken = vec![file("a", b"x".to_vec()), Err(std::io::Error::other("the API is gone"))];
    let error = backup::entries(&repository, stream::iter(broken), plan, Arc::default()).await.unwrap_err();
    assert!(matches!(error, backup::BackupError::Source(_)));

    let description = serde_json::json!({"application": "shop"});
    let members = vec![report.snapshot.id];
    let point = backup::recovery_point(
        &repository,
        "app".into(),
        [("a".into(), "b".into())].into(),
        members.clone(),
        description.clone(),
        report.snapshot.counts,
    )
    .await
    .unwrap();
    let found = repository.find(&point.id.to_string()).await.unwrap();
    assert_eq!(found.content, Content::RecoveryPoint { members, description });
    assert_eq!(repository.snapshots().await.unwrap().len(), 2, "nothing of the failed ones");
    let missing = vec![lifeboat_repository::id::SnapshotId([9; 16])];
    let error = backup::recovery_point(
        &repository,
        "app".into(),
        [].into(),
        missing,
        serde_json::Value::Null,
        Counts::default(),
    )
    .await
    .unwrap_err();
    assert_eq!(error.class(), ErrorClass::NotFound);
    let error =
        restore::tree(&repository, &point, target.path(), RestoreOptions::default(), Arc::default()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_that_cannot_be_read_are_listed() {
    // The super-user reads everything; what is gone nobody reads. A name that is too long stands for both.
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    write(source.path(), "a", b"x");
    let deepest = path_to(source.path(), &"n".repeat(250), 140);
    assert!(deepest.len() > 32 << 10);
    let report = back_up(&repository, source.path(), None).await;
    assert!(!report.skipped.is_empty());
    assert!(
        report.skipped.iter().all(|skipped| skipped.reason == Reason::TooLarge),
        "{} skipped",
        report.skipped.len()
    );
    assert_eq!(report.snapshot.counts.skipped, report.skipped.len() as u64);
    assert!(tree::skipped(&repository, &report.snapshot).await.unwrap() == report.skipped);
    let target = tempfile::tempdir().unwrap();
    assert_eq!(restore_all(&repository, &report.snapshot, target.path()).await.failed, []);
}
