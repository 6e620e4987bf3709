//! Hostile snapshots: whatever a manifest says, a restore writes nothing outside of its target and gives nobody rights.

#![allow(clippy::unwrap_used, reason = "only tests use these functions; a failure here is theirs")]

mod trees;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use lifeboat_repository::clock;
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::manifest::{
    Contents, Entry, Kind, ManifestWriter, Meta, PageRef, Piece, Regular, encode_page, encode_root,
};
use lifeboat_repository::repository::Repository;
use lifeboat_repository::restore::{self, Existing, RestoreError, RestoreOptions, RestoreReport, What};
use lifeboat_repository::session::{Session, SessionOptions};
use lifeboat_repository::sink::{ChunkKind, ChunkRef, ChunkSink};
use lifeboat_repository::snapshot::{Content, Counts, NewSnapshot, Snapshot, WriteStats};
use lifeboat_repository::tree;

use trees::{made, write};

async fn put(session: &Session, kind: ChunkKind, bytes: &[u8]) -> ChunkRef {
    session.put(kind, session.chunk_id(bytes), Bytes::copy_from_slice(bytes)).await.unwrap().chunk
}

async fn commit(session: Arc<Session>, root: Vec<ChunkRef>) -> Snapshot {
    let new = NewSnapshot {
        id: SnapshotId::random(),
        time: clock::now(),
        lineage: "hostile".into(),
        tags: [].into(),
        host: String::new(),
        parent: None,
        content: Content::Tree { root, skipped: vec![] },
        counts: Counts::default(),
        stats: WriteStats::default(),
    };
    session.commit(vec![new]).await.unwrap().remove(0)
}

fn entry(path: &[u8], kind: Kind) -> Entry {
    Entry { path: path.to_vec(), meta: Meta { mode: 0o755, ..Meta::default() }, kind }
}

fn file_of(path: &[u8], chunk: ChunkRef, linked: bool) -> Entry {
    let contents = Contents::Inline(vec![Piece::whole(chunk)]);
    entry(
        path,
        Kind::Regular(Regular {
            size: u64::from(chunk.len),
            sparse: false,
            linked,
            contents,
            page_map: Contents::default(),
        }),
    )
}

fn link_to(path: &[u8], target: &Path) -> Entry {
    entry(path, Kind::Symlink { target: target.as_os_str().as_encoded_bytes().to_vec() })
}

/// A snapshot with these entries; `evil` is a chunk that holds `evil`.
async fn snapshot(repository: &Repository, entries: impl FnOnce(ChunkRef) -> Vec<Entry>) -> Snapshot {
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    let evil = put(&session, ChunkKind::Data, b"evil").await;
    let mut writer = ManifestWriter::new(session.clone());
    for entry in entries(evil) {
        writer.push(entry).await.unwrap();
    }
    let root = writer.finish().await.unwrap();
    commit(session, root).await
}

async fn restore(repository: &Repository, snapshot: &Snapshot, target: &Path) -> Result<RestoreReport, RestoreError> {
    let options = RestoreOptions { existing: Existing::Overwrite, ..RestoreOptions::default() };
    restore::tree(repository, snapshot, target, options, Arc::default()).await
}

/// A directory with a target in it, and beside it what nobody may touch.
fn scene() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let base = tempfile::tempdir().unwrap();
    let (target, outside) = (base.path().join("target"), base.path().join("outside"));
    fs::create_dir(&target).unwrap();
    fs::create_dir(&outside).unwrap();
    write(&outside, "precious", b"precious");
    fs::set_permissions(outside.join("precious"), fs::Permissions::from_mode(0o600)).unwrap();
    (base, target, outside)
}

fn assert_untouched(outside: &Path) {
    assert_eq!(fs::read(outside.join("precious")).unwrap(), b"precious");
    let names: Vec<_> = fs::read_dir(outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["precious"]);
    let found = fs::metadata(outside.join("precious")).unwrap();
    assert_eq!((found.mode() & 0o7777, found.uid(), found.nlink()), (0o600, rustix::process::getuid().as_raw(), 1));
    assert_eq!(fs::metadata(outside).unwrap().uid(), rustix::process::getuid().as_raw());
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_lead_out_are_refused() {
    let (_store, repository) = made().await;
    let (_base, target, outside) = scene();
    for path in [&b"../outside/new"[..], b"..", b"a/../../outside/new", b"/tmp/lifeboat-hostile", b"a//b", b"./a"] {
        let snapshot = snapshot(&repository, |evil| vec![file_of(path, evil, false)]).await;
        let error = restore(&repository, &snapshot, &target).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Damaged, "{path:?}");
        let error = tree::list(&repository, &snapshot, None, true).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Damaged, "{path:?}");
    }
    assert_untouched(&outside);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    assert!(!Path::new("/tmp/lifeboat-hostile").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_through_a_symbolic_link() {
    let (_store, repository) = made().await;
    let (_base, target, outside) = scene();
    let snapshot = snapshot(&repository, |evil| {
        vec![
            entry(b"", Kind::Directory),
            link_to(b"abs", &outside),
            file_of(b"abs/precious", evil, false),
            link_to(b"rel", Path::new("../outside")),
            entry(b"rel/dir", Kind::Directory),
            entry(b"rel/fifo", Kind::Fifo),
            link_to(b"rel/link", Path::new("x")),
            file_of(b"rel/new", evil, false),
            link_to(b"self", Path::new(".")),
            file_of(b"self/through", evil, false),
        ]
    })
    .await;
    let report = restore(&repository, &snapshot, &target).await.unwrap();
    let mut failed: Vec<_> = report.failed.iter().map(|failed| (failed.path.as_slice(), failed.what)).collect();
    failed.sort_by_key(|(path, _)| *path);
    let expected = [&b"abs/precious"[..], b"rel/dir", b"rel/fifo", b"rel/link", b"rel/new", b"self/through"];
    assert_eq!(failed, expected.map(|path| (path, What::Create)));
    assert_untouched(&outside);
    assert!(!target.join("through").exists());
    assert_eq!(fs::read_link(target.join("abs")).unwrap(), outside, "the link itself is what was backed up");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_that_lie_in_the_target_already_are_not_followed() {
    let (_store, repository) = made().await;
    let (_base, target, outside) = scene();
    symlink(&outside, target.join("dir")).unwrap();
    symlink(outside.join("precious"), target.join("file")).unwrap();
    fs::hard_link(outside.join("precious"), target.join("hard")).unwrap();
    let snapshot = snapshot(&repository, |evil| {
        vec![
            entry(b"dir", Kind::Directory),
            file_of(b"dir/precious", evil, false),
            file_of(b"file", evil, false),
            file_of(b"hard", evil, false),
        ]
    })
    .await;
    let report = restore(&repository, &snapshot, &target).await.unwrap();
    assert_eq!(report.failed, [], "each was replaced");
    assert_untouched(&outside);
    assert_eq!(fs::read(target.join("dir/precious")).unwrap(), b"evil");
    assert_eq!(fs::read(target.join("file")).unwrap(), b"evil");
    assert_eq!(fs::read(target.join("hard")).unwrap(), b"evil");
}

#[tokio::test(flavor = "multi_thread")]
async fn hard_links_name_only_what_the_restore_wrote() {
    let (_store, repository) = made().await;
    let (_base, target, outside) = scene();
    write(&target, "mine", b"mine");
    let snapshot = snapshot(&repository, |evil| {
        vec![
            link_to(b"a", &outside),
            entry(b"b", Kind::Link { to: b"a/precious".to_vec() }),
            entry(b"c", Kind::Link { to: b"a".to_vec() }),
            file_of(b"f", evil, true),
            entry(b"g", Kind::Link { to: b"f".to_vec() }),
            file_of(b"h", evil, false),
            entry(b"i", Kind::Link { to: b"h".to_vec() }),
            entry(b"n", Kind::Link { to: b"mine".to_vec() }),
        ]
    })
    .await;
    let report = restore(&repository, &snapshot, &target).await.unwrap();
    let failed: Vec<_> = report.failed.iter().map(|failed| (failed.path.as_slice(), failed.what)).collect();
    // `h` does not say that others are links to it, so nothing was noted for it.
    assert_eq!(failed, [&b"b"[..], b"c", b"i", b"n"].map(|path| (path, What::Link)));
    assert_untouched(&outside);
    assert_eq!(fs::metadata(target.join("mine")).unwrap().nlink(), 1);
    assert_eq!(fs::metadata(target.join("g")).unwrap().nlink(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_lie_in_the_target_and_are_never_opened() {
    let (_store, repository) = made().await;
    let (_base, target, outside) = scene();
    let snapshot = snapshot(&repository, |evil| {
        vec![
            // Opening this one for writing would block for ever.
            entry(b"fifo", Kind::Fifo),
            file_of(b"fifo/below", evil, false),
            entry(b"null", Kind::CharDevice { major: 1, minor: 3 }),
            link_to(b"up", &outside),
            entry(b"up/disk", Kind::BlockDevice { major: 8, minor: 0 }),
        ]
    })
    .await;
    let report = restore(&repository, &snapshot, &target).await.unwrap();
    let mut failed: Vec<_> = report.failed.iter().map(|failed| failed.path.as_slice()).collect();
    failed.sort_unstable();
    assert_eq!(failed, [&b"fifo/below"[..], b"up/disk"]);
    assert_untouched(&outside);
    let null = fs::symlink_metadata(target.join("null")).unwrap();
    assert!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_in_another_order_than_the_root_says_are_refused() {
    let (_store, repository) = made().await;
    let (_base, target, outside) = scene();
    let session = repository.begin(SessionOptions::default()).await.unwrap();
    let one =
        put(&session, ChunkKind::Manifest, &encode_page(&[entry(b"a", Kind::Fifo), entry(b"m", Kind::Fifo)])).await;
    let page = |first: &[u8], entries| PageRef { chunk: one, first: first.to_vec(), entries, bytes: 0 };
    for pages in [
        vec![page(b"b", 2)],
        vec![page(b"a", 3)],
        vec![page(b"a", 2), page(b"k", 2)],
        vec![page(b"a", 2), page(b"z", 2)],
    ] {
        let session = repository.begin(SessionOptions::default()).await.unwrap();
        let root = put(&session, ChunkKind::Record, &encode_root(&pages)).await;
        let snapshot = commit(session, vec![root]).await;
        let error = restore(&repository, &snapshot, &target).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Damaged, "{pages:?}");
    }
    for root in [vec![one], vec![put(&session, ChunkKind::Record, b"LBRL\x01\xff\xff\xff\xff\x0f").await]] {
        let session = repository.begin(SessionOptions::default()).await.unwrap();
        let snapshot = commit(session, root).await;
        assert_eq!(restore(&repository, &snapshot, &target).await.unwrap_err().class(), ErrorClass::Damaged);
    }
    session.abort("only a test").await.unwrap();
    assert_untouched(&outside);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_shorter_than_the_manifest_says_cost_the_file() {
    let (_store, repository) = made().await;
    let (_base, target, _outside) = scene();
    let snapshot = snapshot(&repository, |evil| {
        let longer = ChunkRef { len: 1000, ..evil };
        let mut other = evil;
        other.id.0[0] ^= 1;
        vec![file_of(b"good", evil, false), file_of(b"longer", longer, false), file_of(b"other", other, false)]
    })
    .await;
    let report = restore(&repository, &snapshot, &target).await.unwrap();
    let mut failed: Vec<_> = report.failed.iter().map(|failed| (failed.path.as_slice(), failed.what)).collect();
    failed.sort_by_key(|(path, _)| *path);
    assert_eq!(failed, [(&b"longer"[..], What::Content), (b"other", What::Content)]);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
}
