//! Any entry and any byte, beside what reading everything gives.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Browser, Cursor, ListStarts, Position, Tree};
use crate::double::Double;
use crate::id::ChunkRef;
use crate::manifest::{
    Contents, Entry, Kind, Manifest, ManifestWriter, Meta, Piece, PieceListWriter, Regular, Xattr, compare_paths,
};
use crate::sink::{ChunkKind, ChunkSink};
use crate::tree::list_in;

fn entry(path: &[u8], kind: Kind) -> Entry {
    // Noise, so that pages are full after some hundred entries.
    let value = blake3::hash(path).as_bytes().repeat(4);
    let xattrs = vec![Xattr { name: b"user.note".to_vec(), value }];
    Entry { path: path.to_vec(), meta: Meta { mode: 0o700, xattrs, ..Meta::default() }, kind }
}

fn regular(path: &[u8], size: u64, sparse: bool, contents: Contents) -> Entry {
    let page_map = Contents::default();
    entry(path, Kind::Regular(Regular { size, sparse, linked: true, contents, page_map }))
}

async fn put(double: &Double, bytes: &[u8]) -> ChunkRef {
    let plain = bytes::Bytes::copy_from_slice(bytes);
    double.put(ChunkKind::Data, double.chunk_id(bytes), plain).await.unwrap().chunk
}

async fn tree_of(double: &Double, mut entries: Vec<Entry>) -> (Tree, Manifest) {
    entries.sort_by(|one, other| compare_paths(&one.path, &other.path));
    let mut writer = ManifestWriter::new(Arc::new(double.clone()));
    for entry in entries {
        writer.push(entry).await.unwrap();
    }
    let root = writer.finish().await.unwrap();
    let source = Arc::new(double.clone());
    let manifest = Manifest::open(Arc::clone(&source) as _, &root).await.unwrap();
    (Browser::new(source).tree_at(root), manifest)
}

/// All names of a directory, in steps, with each place found again.
async fn names(tree: &Tree, directory: &[u8], from: Cursor) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut next = Some(from);
    while let Some(from) = next {
        let listing = tree.list(directory, from).await.unwrap();
        for child in listing.children {
            let again = tree.at(child.position).await.unwrap().unwrap();
            assert_eq!(again.entry(), child.entry());
            let name = child.entry().parent_and_name().1;
            assert_eq!(tree.child(directory, name).await.unwrap().unwrap().position, child.position);
            found.push(child.entry().path.clone());
        }
        next = listing.next;
    }
    found
}

#[tokio::test]
async fn every_directory_lists_what_is_directly_in_it_from_any_point_on() {
    let double = Double::default();
    let mut entries = vec![entry(b"", Kind::Directory)];
    // Subtrees of many pages between siblings, names that sort around the separator, empty directories.
    let mut folders: BTreeSet<Vec<u8>> = BTreeSet::from([b"".to_vec()]);
    for folder in ["a", "a/deep", "a/deep/er", "a-", "a.b", "b", "c", "c/only", "c/only/chain", "z"] {
        folders.insert(folder.as_bytes().to_vec());
        entries.push(entry(folder.as_bytes(), Kind::Directory));
    }
    for (folder, count) in [("a/deep/er", 4000), ("a", 3), ("a-", 1500), ("c/only/chain", 2500), ("b", 700), ("z", 1)] {
        for number in 0..count {
            let path = format!("{folder}/{:x}-{number}", number * 2_654_435_761u64 % 4096);
            entries.push(regular(path.as_bytes(), 0, false, Contents::default()));
        }
    }
    let (tree, manifest) = tree_of(&double, entries).await;
    assert!(manifest.pages().len() > 10, "{}", manifest.pages().len());
    for folder in &folders {
        let path = std::path::Path::new(std::str::from_utf8(folder).unwrap());
        let expected: Vec<_> =
            list_in(&manifest, Some(path), false).await.unwrap().into_iter().map(|entry| entry.path).collect();
        let own = tree.find(folder).await.unwrap().unwrap();
        assert_eq!(own.position == tree.root().await.unwrap().position, folder.is_empty());
        assert_eq!(names(&tree, folder, own.position.next()).await, expected, "{path:?}");
        if let Some(middle) = expected.get(expected.len() / 2) {
            let place = tree.find(middle).await.unwrap().unwrap().position;
            assert_eq!(names(&tree, folder, place.next()).await, expected[expected.len() / 2 + 1..]);
        }
    }
    assert!(tree.find(b"a/none").await.unwrap().is_none());
    assert!(tree.child(b"zz", b"x").await.unwrap().is_none());
    for beyond in [Position { page: 9999, index: 0 }, Position { page: 0, index: u16::MAX }] {
        assert!(tree.at(beyond).await.unwrap().is_none());
        assert_eq!(tree.list(b"zz", beyond.next()).await.unwrap().children.len(), 0);
    }
}

#[tokio::test]
async fn other_names_of_a_file_lead_to_it() {
    let double = Double::default();
    let link = |path: &[u8], to: &[u8]| entry(path, Kind::Link { to: to.to_vec() });
    let entries = vec![
        entry(b"", Kind::Directory),
        entry(b"d", Kind::Directory),
        regular(b"f", 0, false, Contents::default()),
        link(b"g", b"f"),
        link(b"h", b"d"),
        link(b"i", b"e"),
    ];
    let (tree, _) = tree_of(&double, entries).await;
    let find = |path: &'static [u8]| async { tree.find(path).await.unwrap().unwrap() };
    let file = find(b"f").await;
    assert_eq!(tree.resolve(find(b"g").await).await.unwrap().unwrap().position, file.position);
    assert_eq!(tree.resolve(file.clone()).await.unwrap().unwrap().position, file.position);
    assert!(tree.resolve(find(b"h").await).await.unwrap().is_none(), "no file");
    assert!(tree.resolve(find(b"i").await).await.unwrap().is_none(), "missing");
    assert!(tree.reader(&find(b"d").await, &ListStarts::default()).is_err());
}

#[tokio::test]
async fn damage_concerns_what_is_read_and_nothing_else() {
    let double = Double::default();
    let (good, bad) = (put(&double, &[1; 1000]).await, put(&double, &[2; 1000]).await);
    let pieces = Contents::Inline(vec![Piece::whole(good), Piece::whole(bad), Piece::Hole { len: 10 }]);
    let entries = vec![entry(b"", Kind::Directory), regular(b"f", 2010, true, pieces)];
    let (tree, _) = tree_of(&double, entries).await;
    double.damage(bad.id);
    let file = tree.find(b"f").await.unwrap().unwrap();
    let starts = ListStarts::default();
    let reader = tree.reader(&file, &starts).unwrap();
    assert_eq!(reader.read(990, 10, true).await.unwrap(), [1; 10]);
    assert_eq!(reader.read(2000, 100, true).await.unwrap(), [0; 10]);
    assert_eq!(reader.read(5000, 100, false).await.unwrap(), [0; 0]);
    assert!(reader.read(990, 11, false).await.unwrap_err().to_string().contains("content"));
    assert!(reader.read(990, 11, false).await.is_err(), "a failure is not remembered as an answer");
    assert_eq!(reader.allocated(1).await.unwrap(), Some(2000));
}

#[derive(Debug, Clone)]
enum Part {
    Hole(u64),
    Data { seed: u8, len: usize, cut: usize },
}

fn part() -> impl Strategy<Value = Part> {
    prop_oneof![
        (1u64..5000).prop_map(Part::Hole),
        (any::<u8>(), 1usize..3000, 0usize..50).prop_map(|(seed, len, cut)| Part::Data { seed, len, cut }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_range_of_a_file_is_what_it_holds(
        parts in proptest::collection::vec(part(), 1..700),
        reads in proptest::collection::vec((any::<u32>(), 0usize..20_000), 1..20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let double = Double::default();
            let mut writer = PieceListWriter::new(Arc::new(double.clone()));
            let (mut content, mut is_data) = (Vec::new(), Vec::new());
            for part in &parts {
                let piece = match *part {
                    Part::Hole(len) => {
                        content.resize(content.len() + usize::try_from(len).unwrap(), 0);
                        Piece::Hole { len }
                    }
                    Part::Data { seed, len, cut } => {
                        let plain: Vec<u8> = (0..len + cut).map(|at| seed.wrapping_add(u8::try_from(at % 251).unwrap())).collect();
                        content.extend_from_slice(&plain[cut..]);
                        let chunk = put(&double, &plain).await;
                        Piece::Data { chunk, offset: u32::try_from(cut).unwrap(), len: u32::try_from(len).unwrap() }
                    }
                };
                is_data.resize(content.len(), matches!(piece, Piece::Data { .. }));
                writer.push(piece).await.unwrap();
            }
            let size = content.len() as u64;
            let file = regular(b"f", size, true, writer.finish().await.unwrap());
            let (tree, _) = tree_of(&double, vec![entry(b"", Kind::Directory), file]).await;
            let file = tree.find(b"f").await.unwrap().unwrap();
            let starts = ListStarts::default();
            let reader = tree.reader(&file, &starts).unwrap();
            for (offset, len) in reads {
                let offset = u64::from(offset) % (size + 100);
                let from = usize::try_from(offset).unwrap().min(content.len());
                let read = reader.read(offset, len, len % 2 == 0).await.unwrap();
                assert!(read == content[from..(from + len).min(content.len())]);
                for data in [true, false] {
                    let rest = is_data[from..].iter().position(|is_data| *is_data == data);
                    let expected = rest.map(|more| (from + more) as u64).or((!data).then_some(size));
                    assert_eq!(reader.seek(offset.min(size), data).await.unwrap(), expected);
                }
            }
            let sum = is_data.iter().filter(|is_data| **is_data).count() as u64;
            assert_eq!(reader.allocated(10).await.unwrap(), Some(sum));
        });
    }
}
