//! Restores from damaged repositories: what is lost is listed, the rest comes back.

use std::fs;
use std::sync::Arc;

use super::verb::restore_tree;
use super::{RestoreOptions, RestoreReport, What};
use crate::double::Double;
use crate::manifest::{Contents, Entry, Kind, ManifestWriter, Meta, Piece, Regular, encode_pieces};
use crate::sink::{ChunkKind, ChunkRef, ChunkSink};

fn entry(path: &str, kind: Kind) -> Entry {
    let meta = Meta { mode: 0o700, ..Meta::default() };
    Entry { path: path.as_bytes().to_vec(), meta, kind }
}

fn file(path: &str, size: u64, contents: Contents) -> Entry {
    entry(path, Kind::Regular(Regular { size, sparse: false, linked: false, contents, page_map: Contents::default() }))
}

async fn put(double: &Double, bytes: &[u8]) -> ChunkRef {
    let plain = bytes::Bytes::copy_from_slice(bytes);
    double.put(ChunkKind::Data, double.chunk_id(bytes), plain).await.unwrap().chunk
}

async fn restore(double: &Double, entries: Vec<Entry>) -> (tempfile::TempDir, RestoreReport) {
    let mut writer = ManifestWriter::new(Arc::new(double.clone()));
    for entry in entries {
        writer.push(entry).await.unwrap();
    }
    let root = writer.finish().await.unwrap();
    let target = tempfile::tempdir().unwrap();
    let options = RestoreOptions { owner: false, ..RestoreOptions::default() };
    let source = Arc::new(double.clone());
    let report = restore_tree(source, &root, target.path(), options, Arc::default()).await.unwrap();
    (target, report)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_costs_only_the_files_that_need_it() {
    let double = Double::default();
    let (good, bad) = (put(&double, b"good").await, put(&double, b"bad").await);
    double.damage(bad.id);
    let pieces = |chunks: &[ChunkRef]| Contents::Inline(chunks.iter().map(|chunk| Piece::whole(*chunk)).collect());
    let entries = vec![
        entry("", Kind::Directory),
        file("a-good", 8, pieces(&[good, good])),
        file("b-half", 7, pieces(&[good, bad])),
        file("c-bad", 3, pieces(&[bad])),
        file("d-good", 4, pieces(&[good])),
    ];
    let (target, report) = restore(&double, entries).await;
    let mut failed: Vec<_> = report.failed.iter().map(|failed| (failed.path.as_slice(), failed.what)).collect();
    failed.sort_by_key(|(path, _)| *path);
    assert_eq!(failed, [(&b"b-half"[..], What::Content), (b"c-bad", What::Content)]);
    assert!(report.failed[0].reason.contains(&bad.id.to_string()), "{}", report.failed[0]);
    assert_eq!((report.counts.files, report.counts.bytes, report.counts.skipped), (2, 12, 2));
    assert_eq!(fs::read(target.path().join("a-good")).unwrap(), b"goodgood");
    let mut left: Vec<_> = fs::read_dir(target.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a-good", "d-good"], "nothing half is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_do_not_make_up_the_file_cost_the_file() {
    let double = Double::default();
    let good = put(&double, b"good").await;
    let list = put(&double, &encode_pieces(&[Piece::whole(good), Piece::Hole { len: 5 }])).await;
    let garbage = put(&double, b"no list at all").await;
    let mut damaged = list;
    damaged.id.0[0] ^= 1;
    let entries = vec![
        entry("", Kind::Directory),
        file("fits", 9, Contents::Listed(vec![list])),
        file("garbage", 9, Contents::Listed(vec![garbage])),
        file("gone", 9, Contents::Listed(vec![damaged])),
        file("long", 10, Contents::Listed(vec![list])),
        file("short", 8, Contents::Listed(vec![list])),
        file("twice", 18, Contents::Listed(vec![list, list])),
    ];
    let (target, report) = restore(&double, entries).await;
    let mut failed: Vec<_> = report.failed.iter().map(|failed| std::str::from_utf8(&failed.path).unwrap()).collect();
    failed.sort_unstable();
    assert_eq!(failed, ["garbage", "gone", "long", "short"]);
    assert_eq!(fs::read(target.path().join("fits")).unwrap(), b"good\0\0\0\0\0");
    assert_eq!(fs::read(target.path().join("twice")).unwrap(), b"good\0\0\0\0\0good\0\0\0\0\0");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_in_more_batches_than_one_come_together() {
    let double = Double::default();
    let mut chunks = Vec::new();
    for number in 0..3000u32 {
        chunks.push(put(&double, &number.to_le_bytes()).await);
    }
    let big = Contents::Inline(chunks.iter().map(|chunk| Piece::whole(*chunk)).collect());
    let mut entries = vec![entry("", Kind::Directory), file("big", 12_000, big)];
    for (number, chunk) in chunks.iter().enumerate() {
        let piece = Piece::Data { chunk: *chunk, offset: 1, len: 2 };
        entries.push(file(&format!("f{number:04}"), 2, Contents::Inline(vec![piece])));
    }
    let (target, report) = restore(&double, entries).await;
    assert_eq!(report.failed, []);
    assert_eq!(report.counts.files, 3001);
    let expected: Vec<u8> = (0..3000u32).flat_map(u32::to_le_bytes).collect();
    assert!(fs::read(target.path().join("big")).unwrap() == expected);
    assert_eq!(fs::read(target.path().join("f2999")).unwrap(), 2999u32.to_le_bytes()[1..3]);
}
