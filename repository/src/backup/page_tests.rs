//! Large files of which some pages changed: what is stored for it, and that it always is what was in the file.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::tests::{Bench, noise};
use crate::manifest::{Contents, Kind, PAGE_BYTES, Piece, Regular};
use crate::sink::{ChunkId, ChunkKind, ChunkRef};

const PAGE: usize = 8 << 10;

fn change_page(bench: &Bench, page: u64, seed: u64) {
    let file = OpenOptions::new().write(true).open(bench.path("image")).unwrap();
    file.write_all_at(&noise(seed, PAGE), page * PAGE_BYTES).unwrap();
}

/// Plain bytes of data, and of anything else, that were put since the last call.
fn put_bytes(bench: &Bench) -> (usize, usize) {
    let (puts, _) = bench.double.take_log();
    let sum = |is_data: bool| {
        let those = puts.iter().filter(|(kind, _)| (*kind == ChunkKind::Data) == is_data);
        those.map(|(_, id)| bench.double.plain(*id).len()).sum()
    };
    (sum(true), sum(false))
}

async fn regular(bench: &Bench, written: &super::assemble::Written) -> Regular {
    let entries = bench.entries(written).await;
    let image = entries.into_iter().find(|entry| entry.path == b"image").unwrap();
    let Kind::Regular(file) = image.kind else { panic!("not a file") };
    file
}

fn chunks(contents: &Contents) -> Vec<ChunkRef> {
    let Contents::Inline(pieces) = contents else { panic!("lists") };
    pieces.iter().filter_map(|piece| if let Piece::Data { chunk, .. } = piece { Some(*chunk) } else { None }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_changed_pages_are_stored_however_often() {
    let bench = Bench::new();
    bench.write("image", &noise(1, 6 << 20));
    let mut written = bench.back_up(None).await.0;
    put_bytes(&bench);
    for round in 0..4 {
        for page in [3, 90, 91, 500, 767] {
            change_page(&bench, page + round, 10 * round + page);
        }
        written = bench.back_up(Some(&written)).await.0;
        let (data, metadata) = put_bytes(&bench);
        assert_eq!(data, 5 * PAGE);
        // One chunk of the page map, the page of the manifest and its root.
        assert!(metadata < 24 << 10, "{metadata}");
        assert!(bench.read(&written, "image").await == fs::read(bench.path("image")).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_only_touched_stays_as_it_was_stored() {
    let bench = Bench::new();
    bench.write("image", &noise(1, 3 << 20));
    let first = bench.back_up(None).await.0;
    put_bytes(&bench);
    change_page(&bench, 9, 5);
    bench.write("image", &noise(1, 3 << 20));
    let second = bench.back_up(Some(&first)).await.0;
    assert_eq!(put_bytes(&bench).0, 0);
    assert_eq!(regular(&bench, &second).await, regular(&bench, &first).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_of_which_most_changed_are_stored_anew() {
    let bench = Bench::new();
    bench.write("image", &noise(1, 4 << 20));
    let first = bench.back_up(None).await.0;
    put_bytes(&bench);
    for page in 64..100 {
        change_page(&bench, page, page);
    }
    let second = bench.back_up(Some(&first)).await.0;
    assert_eq!(put_bytes(&bench).0, 64 * PAGE);
    assert!(bench.read(&second, "image").await == fs::read(bench.path("image")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_are_patched_again_and_again_become_whole() {
    let bench = Bench::new();
    bench.write("image", &noise(1, 1 << 20));
    let mut written = bench.back_up(None).await.0;
    let mut was_flattened = false;
    for round in 0..20 {
        put_bytes(&bench);
        change_page(&bench, round * 3, round);
        written = bench.back_up(Some(&written)).await.0;
        let Contents::Inline(pieces) = regular(&bench, &written).await.contents else { panic!("lists") };
        assert!(pieces.len() <= 50, "{}", pieces.len());
        was_flattened |= put_bytes(&bench).0 > PAGE;
        assert!(bench.read(&written, "image").await == fs::read(bench.path("image")).unwrap());
    }
    assert!(was_flattened);
}

#[tokio::test(flavor = "multi_thread")]
async fn condemned_chunks_are_stored_again_and_lost_maps_cost_reading_only() {
    let bench = Bench::new();
    bench.write("image", &noise(1, 2 << 20));
    let first = bench.back_up(None).await.0;
    let map: Vec<ChunkId> = chunks(&regular(&bench, &first).await.page_map).iter().map(|chunk| chunk.id).collect();
    assert_eq!(map.len(), 1);
    change_page(&bench, 40, 1);
    bench.double.condemn(ChunkKind::Data);
    put_bytes(&bench);
    let second = bench.back_up(Some(&first)).await.0;
    assert_eq!(put_bytes(&bench).0, 2 << 20);
    assert!(bench.read(&second, "image").await == fs::read(bench.path("image")).unwrap());
    change_page(&bench, 41, 2);
    for chunk in chunks(&regular(&bench, &second).await.page_map) {
        bench.double.damage(chunk.id);
    }
    put_bytes(&bench);
    let third = bench.back_up(Some(&second)).await.0;
    assert_eq!(put_bytes(&bench).0, 2 << 20);
    assert!(bench.read(&third, "image").await == fs::read(bench.path("image")).unwrap());
}

/// What happens to a file between two backups.
#[derive(Debug, Clone)]
enum Edit {
    Page(usize),
    Byte(usize),
    Insert(usize, usize),
    Remove(usize, usize),
    Truncate(usize),
    Append(usize),
    Zero(usize, usize),
}

impl Edit {
    fn perform(&self, bytes: &mut Vec<u8>, seed: u64) {
        let at = |number: usize| number % (bytes.len() + 1);
        match *self {
            Self::Page(page) => {
                let start = page % (bytes.len() / PAGE + 1) * PAGE;
                let end = bytes.len().min(start + PAGE);
                bytes[start..end].copy_from_slice(&noise(seed, end - start));
            }
            Self::Byte(number) => {
                if let Some(byte) = bytes.get_mut(number) {
                    *byte ^= 1;
                }
            }
            Self::Insert(number, len) => {
                let at = at(number);
                bytes.splice(at..at, noise(seed, len));
            }
            Self::Remove(number, len) => {
                let at = at(number);
                bytes.drain(at..bytes.len().min(at + len));
            }
            Self::Truncate(number) => bytes.truncate(at(number)),
            Self::Append(len) => bytes.extend(noise(seed, len)),
            Self::Zero(number, len) => {
                let at = at(number);
                let end = bytes.len().min(at + len);
                bytes[at..end].fill(0);
            }
        }
    }
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = 0usize..3 << 20;
    prop_oneof![
        6 => (0usize..400).prop_map(Edit::Page),
        2 => at.clone().prop_map(Edit::Byte),
        1 => (at.clone(), 1usize..200_000).prop_map(|(at, len)| Edit::Insert(at, len)),
        1 => (at.clone(), 1usize..200_000).prop_map(|(at, len)| Edit::Remove(at, len)),
        1 => at.clone().prop_map(Edit::Truncate),
        1 => (1usize..1_500_000).prop_map(Edit::Append),
        1 => (at, 1usize..300_000).prop_map(|(at, len)| Edit::Zero(at, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn every_backup_of_a_changing_file_is_the_file(
        rounds in proptest::collection::vec((proptest::collection::vec(edit(), 1..12), any::<bool>()), 1..4),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let bench = Bench::new();
        let mut bytes = noise(7, 2_500_000);
        bench.write("image", &bytes);
        let mut written = runtime.block_on(bench.back_up(None)).0;
        let mut seed = 100;
        for (edits, is_sparse) in rounds {
            for edit in edits {
                seed += 1;
                edit.perform(&mut bytes, seed);
            }
            if is_sparse {
                // The same bytes with holes where pages are zero.
                let file = fs::File::create(bench.path("image")).unwrap();
                file.set_len(bytes.len() as u64).unwrap();
                for (page, at) in bytes.chunks(4096).zip((0u64..).step_by(4096)) {
                    if page.iter().any(|byte| *byte != 0) {
                        file.write_all_at(page, at).unwrap();
                    }
                }
            } else {
                bench.write("image", &bytes);
            }
            let before = written;
            written = runtime.block_on(bench.back_up(Some(&before))).0;
            prop_assert!(runtime.block_on(bench.read(&written, "image")) == bytes);
            prop_assert!(written.skipped.is_empty());
        }
    }
}
