//! Backups of trees that change while they are read, and of parents whose chunks are condemned or damaged.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::assemble::Written;
use super::read::Hooks;
use super::tree::{Input, write_tree};
use super::{BackupError, Reason, TreeBackup};
use crate::chunk::KeyedWindow;
use crate::config::ChunkerConfig;
use crate::double::Double;
use crate::manifest::{Entry, Kind, Manifest, decode_root};
use crate::progress::Progress;
use crate::sink::{ChunkKind, ChunkRef};
use crate::tree::{list_in, read_pieces};
use futures::TryStreamExt;

pub(super) struct Bench {
    pub(super) double: Double,
    root: tempfile::TempDir,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self { double: Double::default(), root: tempfile::tempdir().unwrap() }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    pub(super) fn write(&self, path: &str, bytes: &[u8]) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), bytes).unwrap();
    }

    async fn back_up_with(&self, parent: Option<&[ChunkRef]>, hooks: Hooks) -> Result<(Written, u64), BackupError> {
        let small = ChunkerConfig { min: 16 << 10, average: 64 << 10, max: 256 << 10, ..ChunkerConfig::default() };
        let input = Input {
            sink: Arc::new(self.double.clone()),
            source: Arc::new(self.double.clone()),
            chunker: Arc::new(KeyedWindow::new(&small, &[2; 32])),
            parent: parent.map(<[_]>::to_vec),
            options: &TreeBackup::default(),
            progress: Arc::new(Progress::default()),
            hooks,
        };
        write_tree(self.root.path(), input).await
    }

    pub(super) async fn back_up(&self, parent: Option<&Written>) -> (Written, u64) {
        self.back_up_with(parent.map(|parent| parent.root.as_slice()), Hooks::default()).await.unwrap()
    }

    pub(super) async fn entries(&self, written: &Written) -> Vec<Entry> {
        let manifest = Manifest::open(Arc::new(self.double.clone()), &written.root).await.unwrap();
        list_in(&manifest, None, true).await.unwrap()
    }

    async fn paths(&self, written: &Written) -> Vec<String> {
        let entries = self.entries(written).await;
        entries.into_iter().map(|entry| String::from_utf8(entry.path).unwrap()).collect()
    }

    pub(super) async fn read(&self, written: &Written, path: &str) -> Vec<u8> {
        let source = Arc::new(self.double.clone());
        let manifest = Manifest::open(source.clone(), &written.root).await.unwrap();
        let entry = manifest.find_file(path.as_bytes()).await.unwrap().unwrap();
        let Kind::Regular(file) = entry.kind else { panic!("{path} is no file") };
        let parts: Vec<_> = read_pieces(source, &manifest, &file).try_collect().await.unwrap();
        parts.concat()
    }
}

pub(in crate::backup) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

async fn settle() {
    tokio::time::sleep(Duration::from_millis(40)).await;
}

fn before_open(act: impl Fn(&[u8]) + Send + Sync + 'static) -> Hooks {
    Hooks { before_open: Some(Box::new(act)), before_read: None }
}

fn before_read(act: impl Fn(&[u8], u64) + Send + Sync + 'static) -> Hooks {
    Hooks { before_open: None, before_read: Some(Box::new(act)) }
}

fn reasons(written: &Written) -> Vec<(&str, &Reason)> {
    written.skipped.iter().map(|skipped| (std::str::from_utf8(&skipped.path).unwrap(), &skipped.reason)).collect()
}

fn truncate(path: &Path, len: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_vanish_are_listed() {
    let bench = Bench::new();
    for path in ["a", "gone-small", "gone-large", "z"] {
        bench.write(path, &noise(1, if path.ends_with("large") { 300_000 } else { 100 }));
    }
    let root = bench.root.path().to_owned();
    let hooks = before_open(move |path| {
        if path.starts_with(b"gone") {
            fs::remove_file(root.join(std::str::from_utf8(path).unwrap())).unwrap();
        }
    });
    let (written, _) = bench.back_up_with(None, hooks).await.unwrap();
    assert_eq!(reasons(&written), [("gone-large", &Reason::Vanished), ("gone-small", &Reason::Vanished)]);
    assert_eq!(written.counts.skipped, 2);
    assert_eq!(bench.paths(&written).await, ["a", "z"]);
    let listed = crate::manifest::read_skipped(&bench.double, &written.skipped_list).await.unwrap();
    assert_eq!(listed, written.skipped);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_become_links_or_pipes_are_not_followed() {
    let bench = Bench::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    for path in ["becomes-link", "becomes-pipe", "dir/below"] {
        bench.write(path, b"plain");
    }
    let (root, secret) = (bench.root.path().to_owned(), outside.path().join("secret"));
    let hooks = before_open(move |path| {
        let full = root.join(std::str::from_utf8(path).unwrap());
        match path {
            b"becomes-link" => {
                fs::remove_file(&full).unwrap();
                std::os::unix::fs::symlink(&secret, &full).unwrap();
            }
            b"becomes-pipe" => {
                fs::remove_file(&full).unwrap();
                rustix::fs::mknodat(rustix::fs::CWD, &full, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
            }
            _ => {
                fs::rename(root.join("dir"), root.join("was-dir")).unwrap();
                std::os::unix::fs::symlink(secret.parent().unwrap(), root.join("dir")).unwrap();
                fs::write(secret.with_file_name("below"), "secret").unwrap();
            }
        }
    });
    let (written, read) = bench.back_up_with(None, hooks).await.unwrap();
    let vanished = &Reason::Vanished;
    assert_eq!(reasons(&written), [("becomes-link", vanished), ("becomes-pipe", vanished), ("dir/below", vanished)]);
    assert_eq!(read, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_shrink_are_not_stored_as_if_complete() {
    let bench = Bench::new();
    bench.write("large", &noise(1, 4 << 20));
    bench.write("small", &noise(2, 5000));
    bench.write("kept", &noise(3, 3 << 20));
    let root = bench.root.path().to_owned();
    let hooks = before_read(move |path, at| match path {
        b"large" if at == 2 << 20 => truncate(&root.join("large"), 3 << 20),
        b"small" => truncate(&root.join("small"), 10),
        _ => {}
    });
    let (written, _) = bench.back_up_with(None, hooks).await.unwrap();
    assert_eq!(reasons(&written), [("large", &Reason::Shrunk), ("small", &Reason::Shrunk)]);
    assert_eq!(bench.paths(&written).await, ["kept"]);
    assert_eq!((written.counts.files, written.counts.bytes, written.counts.skipped), (1, 3 << 20, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_grow_are_stored_as_they_were_when_opened() {
    let bench = Bench::new();
    let bytes = noise(1, 2 << 20);
    bench.write("large", &bytes);
    bench.write("small", b"as it was");
    bench.write("outgrown", b"small when it was found");
    let root = bench.root.path().to_owned();
    let opened = root.clone();
    let hooks = Hooks {
        before_open: Some(Box::new(move |path| {
            if path == b"outgrown" {
                fs::write(opened.join("outgrown"), noise(7, 200_000)).unwrap();
            }
        })),
        before_read: Some(Box::new(move |path, at| {
            if at == 0 && path != b"outgrown" {
                let path = root.join(std::str::from_utf8(path).unwrap());
                let mut file = fs::File::options().append(true).open(path).unwrap();
                std::io::Write::write_all(&mut file, b"more").unwrap();
            }
        })),
    };
    let (written, _) = bench.back_up_with(None, hooks).await.unwrap();
    assert_eq!(written.skipped, []);
    assert!(bench.read(&written, "large").await == bytes);
    assert_eq!(bench.read(&written, "small").await, b"as it was");
    assert!(bench.read(&written, "outgrown").await == noise(7, 200_000));
    settle().await;
    let (second, read) = bench.back_up(Some(&written)).await;
    assert!(read >= (2 << 20) + 4 + 13, "both are read again: {read}");
    assert_eq!(bench.read(&second, "small").await, b"as it wasmore");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_first_name_does_not_lose_the_file() {
    let bench = Bench::new();
    bench.write("a", &noise(1, 1000));
    for other in ["b", "c"] {
        fs::hard_link(bench.path("a"), bench.path(other)).unwrap();
    }
    let root = bench.root.path().to_owned();
    let hooks = before_open(move |path| {
        if path == b"a" {
            fs::remove_file(root.join("a")).unwrap();
        }
    });
    let (written, _) = bench.back_up_with(None, hooks).await.unwrap();
    assert_eq!(reasons(&written), [("a", &Reason::Vanished)]);
    let entries = bench.entries(&written).await;
    assert_eq!(entries[1].kind, Kind::Link { to: b"b".to_vec() });
    assert_eq!(bench.read(&written, "b").await, noise(1, 1000));
    assert_eq!(bench.read(&written, "c").await, noise(1, 1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn condemned_chunks_are_read_and_put_again() {
    for kind in [ChunkKind::Data, ChunkKind::Bundle, ChunkKind::Manifest] {
        let bench = Bench::new();
        bench.write("large", &noise(1, 1 << 20));
        bench.write("listed", &noise(2, 60 << 20));
        bench.write("small", &noise(3, 100));
        settle().await;
        let (first, _) = bench.back_up(None).await;
        bench.double.take_log();
        bench.double.condemn(kind);
        let (second, read) = bench.back_up(Some(&first)).await;
        let expected = match kind {
            ChunkKind::Bundle => 100,
            // Data, or the lists of the one and the page maps of both.
            _ => 61 << 20,
        };
        assert_eq!(read, expected, "{kind:?}");
        assert_eq!(second.counts, first.counts);
        for path in ["large", "listed", "small"] {
            assert!(bench.read(&second, path).await == fs::read(bench.path(path)).unwrap(), "{path}");
        }
        // Every chunk of the new manifest was put or inherited in this session.
        let (puts, inherited) = bench.double.take_log();
        let taken: std::collections::HashSet<_> = puts.iter().map(|(_, id)| *id).chain(inherited).collect();
        for root in &second.root {
            assert!(taken.contains(&root.id));
            let pages = decode_root(&bench.double.plain(root.id)).unwrap();
            assert!(pages.iter().all(|page| taken.contains(&page.chunk.id)));
        }
        for entry in bench.entries(&second).await {
            let Kind::Regular(file) = entry.kind else { continue };
            if let crate::manifest::Contents::Listed(lists) = &file.contents {
                assert!(lists.iter().all(|list| taken.contains(&list.id)));
            }
            let source = Arc::new(bench.double.clone());
            let pieces: Vec<_> = crate::manifest::pieces(source, &file).try_concat().await.unwrap();
            for piece in pieces {
                let crate::manifest::Piece::Data { chunk, .. } = piece else { continue };
                assert!(taken.contains(&chunk.id));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_parent_only_costs_reading() {
    let bench = Bench::new();
    bench.write("file", &noise(1, 1000));
    settle().await;
    let (first, _) = bench.back_up(None).await;
    let pages = decode_root(&bench.double.plain(first.root[0].id)).unwrap();
    for id in [pages[0].chunk.id, first.root[0].id] {
        bench.double.damage(id);
        let (second, read) = bench.back_up(Some(&first)).await;
        assert_eq!((read, second.counts), (1000, first.counts));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_small_files_have_a_bundle_of_their_own() {
    let bench = Bench::new();
    for number in 0..10 {
        bench.write(&format!("f{number}"), &noise(number, 1000));
    }
    settle().await;
    let (first, _) = bench.back_up(None).await;
    bench.write("f3", b"changed");
    bench.write("f7", b"changed too");
    bench.write("g", b"new");
    settle().await;
    bench.double.take_log();
    let (second, read) = bench.back_up(Some(&first)).await;
    assert_eq!(read, 7 + 11 + 3);
    let (puts, _) = bench.double.take_log();
    let bundles: Vec<_> = puts.iter().filter(|(kind, _)| *kind == ChunkKind::Bundle).collect();
    let contents: Vec<_> = bundles.iter().map(|(_, id)| bench.double.plain(*id)).collect();
    assert_eq!(contents.len(), 2);
    assert!(contents.iter().any(|plain| &plain[..] == b"changedchanged too"));
    assert!(contents.iter().any(|plain| &plain[..] == b"new"));
    assert_eq!(bench.read(&second, "f7").await, b"changed too");
    assert_eq!(bench.read(&second, "f8").await, noise(8, 1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn bundles_end_only_behind_files_and_stay_small() {
    let bench = Bench::new();
    for number in 0..400 {
        bench.write(&format!("d/f{number:03}"), &noise(number, 3000));
    }
    let (written, read) = bench.back_up(None).await;
    assert_eq!(read, 400 * 3000);
    let (puts, _) = bench.double.take_log();
    let sizes: Vec<_> = puts
        .iter()
        .filter(|(kind, _)| *kind == ChunkKind::Bundle)
        .map(|(_, id)| bench.double.plain(*id).len())
        .collect();
    assert!(sizes.len() > 4 && sizes.iter().all(|size| size % 3000 == 0 && *size <= 256 << 10), "{sizes:?}");
    // Without a parent, after an insertion at the front, most bundles are known.
    bench.write("d/a", &noise(1000, 2000));
    let (_, _) = bench.back_up(None).await;
    let (again, _) = bench.double.take_log();
    let known = again.iter().filter(|put| put.0 == ChunkKind::Bundle && puts.contains(put)).count();
    assert!(known + 3 >= sizes.len(), "{known} of {}", sizes.len());
    assert_eq!(bench.paths(&written).await.len(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_changed_just_before_is_read_again_next_time() {
    let bench = Bench::new();
    bench.write("file", b"first");
    let path = bench.path("file");
    let opened = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&opened);
    let hooks = before_open(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        fs::write(&path, b"at the last moment").unwrap();
    });
    let (first, _) = bench.back_up_with(None, hooks).await.unwrap();
    assert_eq!(opened.load(Ordering::SeqCst), 1);
    assert_eq!(bench.entries(&first).await[0].meta.inode, 0, "its times show nothing");
    settle().await;
    let (second, read) = bench.back_up(Some(&first)).await;
    assert_eq!(read, 18);
    assert_eq!(bench.back_up(Some(&second)).await.1, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_session_ends_the_backup() {
    let bench = Bench::new();
    bench.write("large", &noise(1, 8 << 20));
    bench.double.fail();
    let error = bench.back_up_with(None, Hooks::default()).await.unwrap_err();
    assert!(matches!(error, BackupError::Session(_)), "{error}");
    let gone = tempfile::tempdir().unwrap().path().to_owned();
    let input = Input {
        sink: Arc::new(Double::default()),
        source: Arc::new(Double::default()),
        chunker: Arc::new(KeyedWindow::new(&ChunkerConfig::default(), &[2; 32])),
        parent: None,
        options: &TreeBackup::default(),
        progress: Arc::default(),
        hooks: Hooks::default(),
    };
    assert!(matches!(write_tree(&gone, input).await, Err(BackupError::OpenRoot { .. })));
}
