//! What differs between two snapshots is told, all of it and nothing else.

#![allow(clippy::unwrap_used, reason = "only tests use these functions; a failure here is theirs")]

mod trees;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::diff::{Aspect, Difference, diff};
use lifeboat_repository::keys::{Role, Secret};
use lifeboat_repository::repository::{OpenOptions, Repository};
use lifeboat_repository::snapshot::Snapshot;

use trees::{made, noise, write};

async fn back_up(repository: &Repository, root: &Path, parent: Option<&Snapshot>) -> Snapshot {
    let plan = TreeBackup { lineage: "test".into(), parent: parent.cloned(), ..TreeBackup::default() };
    backup::tree(repository, root, plan, Arc::default()).await.unwrap().snapshot
}

async fn told(repository: &Repository, before: &Snapshot, after: &Snapshot) -> Vec<String> {
    let all: Vec<_> = diff(repository, before, after).await.unwrap().try_collect().await.unwrap();
    let text = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    all.iter()
        .map(|difference| match difference {
            Difference::Added(entry) => format!("+{}", text(&entry.path)),
            Difference::Removed(entry) => format!("-{}", text(&entry.path)),
            Difference::Modified { before, after, aspects } => {
                assert_eq!(before.path, after.path);
                // The time of a directory changes with what is in it; what is in it is told by itself.
                let aspects: Vec<_> = aspects.iter().map(|aspect| aspect.name()).collect();
                format!("M{} {}", text(&after.path), aspects.join(","))
            }
        })
        .filter(|line| !line.ends_with(" time"))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_is_told() {
    let (_store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    let root = source.path();
    for name in ["same", "gone", "longer", "swapped", "mode", "owner", "becomes-link", "dir/x", "dir-gone/y"] {
        write(root, name, b"content");
    }
    write(root, "large", &noise(1, 5 << 20));
    symlink("same", root.join("link")).unwrap();
    let first = back_up(&repository, root, None).await;
    assert_eq!(told(&repository, &first, &first).await, [""; 0]);

    fs::remove_file(root.join("gone")).unwrap();
    fs::remove_dir_all(root.join("dir-gone")).unwrap();
    write(root, "longer", b"content and more");
    write(root, "swapped", b"tnetnoc");
    fs::set_permissions(root.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    chown(root.join("owner"), Some(1234), Some(5678)).unwrap();
    fs::remove_file(root.join("becomes-link")).unwrap();
    symlink("same", root.join("becomes-link")).unwrap();
    fs::remove_file(root.join("link")).unwrap();
    symlink("mode", root.join("link")).unwrap();
    write(root, "dir/new", b"new");
    let mut large = noise(1, 5 << 20);
    large[3 << 20] ^= 1;
    write(root, "large", &large);
    let expected = [
        "Mbecomes-link type",
        "+dir/new",
        "-dir-gone",
        "-dir-gone/y",
        "-gone",
        "Mlarge content,time",
        "Mlink content,time",
        "Mlonger content,time",
        "Mmode mode",
        "Mowner owner",
        "Mswapped content,time",
    ];
    // With a parent, and without one: then everything lies in other bundles, and only bytes tell what is the same.
    for parent in [Some(&first), None] {
        let second = back_up(&repository, root, parent).await;
        assert_eq!(told(&repository, &first, &second).await, expected, "{}", parent.is_some());
        let back = told(&repository, &second, &first).await;
        assert_eq!(back.len(), expected.len());
        assert!(back.contains(&"+gone".to_owned()) && back.contains(&"-dir/new".to_owned()), "{back:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_trees_are_compared_page_by_page_and_without_the_private_key() {
    let (store, repository) = made().await;
    let source = tempfile::tempdir().unwrap();
    for number in 0..4000 {
        write(source.path(), &format!("d{}/f{number}", number % 40), &noise(number, 20));
    }
    let first = back_up(&repository, source.path(), None).await;
    write(source.path(), "d17/f17", b"changed");
    write(source.path(), "d20/a", b"new");
    let second = back_up(&repository, source.path(), Some(&first)).await;
    let writer = Secret::key_file([8; 32]);
    repository.add_key(&writer, Role::Writer).await.unwrap();
    let as_writer = Repository::open(Arc::new(store), &writer, OpenOptions::default()).await.unwrap();
    let told = told(&as_writer, &first, &second).await;
    assert_eq!(told, ["Md17/f17 content,time", "+d20/a"]);
    assert_eq!(Aspect::Attributes.name(), "attributes");
}
