//! What a backup reads, a restore writes: every kind of entry, every part of its metadata, on a real file system.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt;
use lifeboat_repository::backup::{self, BackupError, BackupReport, TreeBackup, VirtualFile};
use lifeboat_repository::check::CheckOptions;
use lifeboat_repository::keys::Secret;
use lifeboat_repository::repository::{InitOptions, OpenOptions, Repository};
use lifeboat_repository::restore::{self, RestoreOptions, RestoreReport, What};
use lifeboat_repository::store::Store;
use lifeboat_repository::store::memory::Memory;
use lifeboat_repository::tree;

async fn repository() -> (Memory, Repository) {
    let store = Memory::new();
    let made =
        Repository::init(Arc::new(store.clone()), &Secret::key_file([1; 32]), InitOptions::default()).await.unwrap();
    (store, made)
}

async fn back_up(repository: &Repository, root: &Path) -> BackupReport {
    let parent = repository.latest_of("test").await.unwrap();
    let plan = TreeBackup { lineage: "test".into(), parent, ..TreeBackup::default() };
    backup::tree(repository, root, plan, Arc::default()).await.unwrap()
}

async fn restore_all(repository: &Repository, report: &BackupReport, target: &Path) -> RestoreReport {
    restore::tree(repository, &report.snapshot, target, RestoreOptions::default(), Arc::default()).await.unwrap()
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn set_times(path: &Path, seconds: i64, nanos: i64) {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    utimensat(CWD, path, &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW)
        .unwrap();
}

/// Everything about an entry that must survive, as text.
fn describe(path: &Path) -> String {
    let found = fs::symlink_metadata(path).unwrap();
    let kind = found.file_type();
    let content = if kind.is_file() {
        blake3::hash(&fs::read(path).unwrap()).to_hex().to_string()
    } else if kind.is_symlink() {
        fs::read_link(path).unwrap().display().to_string()
    } else {
        format!("{kind:?}")
    };
    let size = if kind.is_dir() { 0 } else { found.size() };
    let links = if kind.is_dir() { 0 } else { found.nlink() };
    let mut xattrs = Vec::new();
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    for name in names[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 4096];
        let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        xattrs.push(format!("{}={:?}", String::from_utf8_lossy(name), &value[..length]));
    }
    xattrs.sort();
    format!(
        "{:o} {}:{} {}.{:09} size {size} links {links} dev {} {xattrs:?} {content}",
        found.mode(),
        found.uid(),
        found.gid(),
        found.mtime(),
        found.mtime_nsec(),
        found.rdev()
    )
}

fn fingerprint(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::from([(PathBuf::new(), describe(root))]);
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            all.insert(path.strip_prefix(root).unwrap().to_owned(), describe(&path));
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                open.push(path);
            }
        }
    }
    all
}

fn make_everything(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::create_dir_all(at("dir/deep/er/and/deeper")).unwrap();
    fs::create_dir(at("empty")).unwrap();
    fs::write(at("small"), "hello").unwrap();
    fs::write(at("none"), "").unwrap();
    fs::write(at("dir/large"), noise(1, 5_000_000)).unwrap();
    for number in 0..300 {
        fs::write(at(&format!("dir/deep/file{number}")), noise(number, 1000)).unwrap();
    }
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"latin\xe9\n name")), "x").unwrap();
    fs::write(at(&"n".repeat(255)), "long").unwrap();
    symlink("../small", at("dir/link")).unwrap();
    symlink("/nowhere/at/all", at("dangling")).unwrap();
    fs::hard_link(at("dir/large"), at("dir/twin")).unwrap();
    fs::hard_link(at("small"), at("empty/far twin")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("null"),
        rustix::fs::FileType::CharacterDevice,
        0o666.into(),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("disk"),
        rustix::fs::FileType::BlockDevice,
        0o660.into(),
        rustix::fs::makedev(7, 200),
    )
    .unwrap();
    std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let mut sparse = fs::File::create(at("sparse")).unwrap();
    sparse.set_len(40 << 20).unwrap();
    sparse.seek(SeekFrom::Start(20 << 20)).unwrap();
    sparse.write_all(&noise(7, 100_000)).unwrap();
    std::os::unix::fs::chown(at("dir/deep/file1"), Some(1234), Some(5678)).unwrap();
    std::os::unix::fs::lchown(at("dangling"), Some(42), Some(43)).unwrap();
    fs::set_permissions(at("dir/deep/file2"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(at("empty"), fs::Permissions::from_mode(0o1700)).unwrap();
    let set = |name: &str, attribute: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), attribute, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set("small", "user.note", b"with\0zero");
    set("dir", "user.on-a-directory", b"");
    set("dir/deep/file3", "security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // An ACL that lets user 1000 read: version 2, then owner, user 1000, group, mask, others.
    let acl: Vec<u8> = [(1u16, 6u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)]
        .iter()
        .fold(2u32.to_le_bytes().to_vec(), |mut acl, (tag, permissions, id)| {
            acl.extend(tag.to_le_bytes());
            acl.extend(permissions.to_le_bytes());
            acl.extend(id.to_le_bytes());
            acl
        });
    set("dir/deep/file4", "system.posix_acl_access", &acl);
    set_times(&at("dangling"), 1, 1);
    set_times(&at("small"), 981_173_106, 123_456_789);
    set_times(&at("none"), -5, 999_999_999);
    set_times(&at("dir/deep"), 1_000_000_000, 5);
    set_times(&at("empty"), 0, 0);
    set_times(root, 1_234_567_890, 987_654_321);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_survives() {
    let (_, repository) = repository().await;
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_everything(source.path());
    let before = fingerprint(source.path());
    assert!(before.len() > 315, "{}", before.len());
    let report = back_up(&repository, source.path()).await;
    assert_eq!(report.skipped, []);
    let target = target.path();
    let restored = restore_all(&repository, &report, target).await;
    assert_eq!(restored.failed, []);
    let after = fingerprint(target);
    for (path, description) in &before {
        assert_eq!(after.get(path), Some(description), "{}", path.display());
    }
    assert_eq!(after.len(), before.len());
    let sparse = fs::metadata(target.join("sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "the holes are gone: {} blocks", sparse.blocks());
    assert!(fs::metadata(target.join("socket")).unwrap().file_type().is_socket());
    assert_eq!(restored.counts.files, report.snapshot.counts.files);
    let check = repository.check(CheckOptions::all_data(), Arc::default()).await.unwrap();
    assert!(check.problems.is_empty(), "{:?}", check.problems);
    assert!(check.chunks > 10 && check.bytes_read > 5_000_000);
}

/// Waits until changes made before are told from those made after.
fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(80));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_did_not_change_is_not_read_again() {
    let (_, repository) = repository().await;
    let source = tempfile::tempdir().unwrap();
    make_everything(source.path());
    settle();
    let first = back_up(&repository, source.path()).await;
    assert!(first.snapshot.stats.read_bytes > 5_000_000);
    let second = back_up(&repository, source.path()).await;
    assert_eq!(second.snapshot.stats.read_bytes, 0);
    assert_eq!(second.snapshot.stats.new_bytes, 0, "not even a page of the file list is new");
    assert_eq!(second.snapshot.parent, Some(first.snapshot.id));
    fs::write(source.path().join("dir/deep/file7"), noise(9999, 1000)).unwrap();
    fs::write(source.path().join("new"), noise(8888, 200_000)).unwrap();
    fs::remove_file(source.path().join("dir/deep/file8")).unwrap();
    let third = back_up(&repository, source.path()).await;
    assert_eq!(third.snapshot.stats.read_bytes, 201_000);
    assert!(third.snapshot.stats.stored_bytes < 400_000, "{}", third.snapshot.stats.stored_bytes);
    let target = tempfile::tempdir().unwrap();
    restore_all(&repository, &third, target.path()).await;
    assert_eq!(fingerprint(target.path()), fingerprint(source.path()));
    // The older snapshot still shows the older state.
    let old = tempfile::tempdir().unwrap();
    restore_all(&repository, &first, old.path()).await;
    assert_eq!(fs::read(old.path().join("dir/deep/file7")).unwrap(), noise(7, 1000));
    assert!(old.path().join("dir/deep/file8").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_leaves_size_and_mtime_alone_is_found() {
    let (_, repository) = repository().await;
    let source = tempfile::tempdir().unwrap();
    let file = source.path().join("file");
    fs::write(&file, "one").unwrap();
    set_times(&file, 1000, 0);
    // No pause: the second write may fall into the same tick of the file system's clock.
    back_up(&repository, source.path()).await;
    fs::write(&file, "two").unwrap();
    set_times(&file, 1000, 0);
    let second = back_up(&repository, source.path()).await;
    let target = tempfile::tempdir().unwrap();
    restore_all(&repository, &second, target.path()).await;
    assert_eq!(fs::read(target.path().join("file")).unwrap(), b"two");
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_data_costs_the_files_that_need_it_and_is_located() {
    let (store, repository) = repository().await;
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("a"), noise(1, 1 << 20)).unwrap();
    fs::write(source.path().join("b"), noise(2, 1 << 20)).unwrap();
    let report = back_up(&repository, source.path()).await;
    let pack = store
        .keys()
        .into_iter()
        .filter(|key| key.starts_with("p/"))
        .max_by_key(|key| store.object(key).unwrap().len())
        .unwrap();
    let mut bytes = store.object(&pack).unwrap().to_vec();
    bytes[100] ^= 1;
    store.overwrite(&pack, bytes.into());
    let target = tempfile::tempdir().unwrap();
    let reopened =
        Repository::open(Arc::new(store.clone()), &Secret::key_file([1; 32]), OpenOptions::default()).await.unwrap();
    let restored = restore_all(&reopened, &report, target.path()).await;
    // Files are read side by side, so the damaged chunk may belong to either.
    assert_eq!(restored.failed.len(), 1);
    assert_eq!(restored.failed[0].what, What::Content);
    let damaged = restored.failed[0].path.as_slice();
    for (name, seed) in [("a", 1), ("b", 2)] {
        let is_whole = fs::read(target.path().join(name)).is_ok_and(|bytes| bytes == noise(seed, 1 << 20));
        assert_eq!(is_whole, damaged != name.as_bytes(), "{name}");
    }
    let quick = reopened.check(CheckOptions::default(), Arc::default()).await.unwrap();
    assert!(quick.problems.is_empty());
    let full = reopened.check(CheckOptions::all_data(), Arc::default()).await.unwrap();
    let problems: Vec<_> = full.problems.iter().map(ToString::to_string).collect();
    assert!(
        problems.iter().any(|p| p.contains("offset 64")) && problems.iter().any(|p| p.contains("checksum")),
        "{problems:?}"
    );
    store.delete(&pack).await.unwrap();
    let reopened = Repository::open(Arc::new(store), &Secret::key_file([1; 32]), OpenOptions::default()).await.unwrap();
    let gone = reopened.check(CheckOptions::default(), Arc::default()).await.unwrap();
    assert!(!gone.problems.is_empty(), "a missing pack is found without reading data");
}

#[tokio::test]
async fn files_from_memory_come_back_and_disorder_is_refused() {
    let (_, repository) = repository().await;
    let file = |path: &str, bytes: Vec<u8>| {
        Ok::<_, String>(VirtualFile { path: path.into(), bytes: bytes.into(), mtime: jiff::Timestamp::UNIX_EPOCH })
    };
    let plan = || TreeBackup { lineage: "objects".into(), ..TreeBackup::default() };
    let files = vec![
        file("a.core/v1/x.json", b"{}".to_vec()),
        file("a.core/v1/y.json", noise(1, 200_000)),
        file("b.apps/v1/z.json", vec![]),
    ];
    let report =
        backup::entries(&repository, futures::stream::iter(files.clone()), plan(), Arc::default()).await.unwrap();
    let read: Vec<_> = tree::read_files(&repository, &report.snapshot).await.unwrap().try_collect().await.unwrap();
    let expected: Vec<_> =
        files.into_iter().map(|file| file.map(|file| (file.path.into_bytes(), file.bytes)).unwrap()).collect();
    assert_eq!(read, expected);
    for bad in [vec![file("b", vec![]), file("a", vec![])], vec![file("../a", vec![])], vec![file("", vec![])]] {
        let refused = backup::entries(&repository, futures::stream::iter(bad), plan(), Arc::default()).await;
        assert!(matches!(refused, Err(BackupError::Path { .. })));
    }
    let failing = vec![file("a", vec![]), Err("the source is gone".to_owned())];
    let refused = backup::entries(&repository, futures::stream::iter(failing), plan(), Arc::default()).await;
    assert!(matches!(refused, Err(BackupError::Source(_))));
    assert_eq!(repository.snapshots().await.unwrap().len(), 1);
}
