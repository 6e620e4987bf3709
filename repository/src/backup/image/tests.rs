//! Images that are stored, read by lists that are right and wrong, and always come back as they were.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use futures::TryStreamExt;
use proptest::prelude::*;

use super::*;
use crate::backup::tests::noise;
use crate::chunk::KeyedWindow;
use crate::config::ChunkerConfig;
use crate::double::Double;
use crate::manifest::PAGE_BYTES;
use crate::tree::read_pieces;

const MIB: u64 = 1 << 20;

struct Bench {
    double: Double,
    directory: tempfile::TempDir,
}

/// A backup that was written, and what reading showed.
struct Made {
    written: Written,
    read: u64,
    found: Found,
}

impl Bench {
    fn new(size: u64) -> Self {
        let bench = Self { double: Double::default(), directory: tempfile::tempdir().unwrap() };
        File::create(bench.path()).unwrap().set_len(size).unwrap();
        bench
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("device")
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        OpenOptions::new().write(true).open(self.path()).unwrap().write_all_at(bytes, at).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    async fn back_up(&self, parent: Option<&Made>, known: Known, audit: Audit) -> Made {
        let chunker = Arc::new(KeyedWindow::new(&ChunkerConfig::default(), &[2; 32]));
        let source: Arc<dyn ChunkSource> = Arc::new(self.double.clone());
        let sink = Arc::new(self.double.clone());
        let context = Context::new(None, sink, Some(source), chunker, Arc::default(), Hooks::default());
        let device = open(&self.path()).unwrap();
        let size = size_of(&device).unwrap();
        let parent = parent.map(|parent| parent.written.root.clone());
        let mut found = Found::default();
        let input = Input { device, size, known, audit, parent };
        let (written, read) = write_image(Arc::new(context), input, &mut found).await.unwrap();
        Made { written, read, found }
    }

    async fn first(&self) -> Made {
        self.back_up(None, Known::Nothing, Audit::Off).await
    }

    async fn file(&self, made: &Made) -> Regular {
        let manifest = Manifest::open(Arc::new(self.double.clone()), &made.written.root).await.unwrap();
        let Kind::Regular(file) = manifest.find(FILE.as_bytes()).await.unwrap().unwrap().kind else { unreachable!() };
        file
    }

    /// The image as a restore would read it.
    async fn restored(&self, made: &Made) -> Vec<u8> {
        let source: Arc<dyn ChunkSource> = Arc::new(self.double.clone());
        let manifest = Manifest::open(Arc::clone(&source), &made.written.root).await.unwrap();
        let parts: Vec<_> = read_pieces(source, &manifest, &self.file(made).await).try_collect().await.unwrap();
        parts.concat()
    }

    /// Plain bytes of data that were put since the last call.
    fn new_data(&self) -> usize {
        let (puts, _) = self.double.take_log();
        let data = puts.iter().filter(|(kind, _)| *kind == ChunkKind::Data);
        data.map(|(_, id)| self.double.plain(*id).len()).sum()
    }

    fn list(&self, ranges: &[(u64, u64)]) -> Extents {
        let mut list = Extents::new(std::fs::metadata(self.path()).unwrap().len());
        for (offset, len) in ranges {
            list.add(i64::try_from(*offset).unwrap(), i64::try_from(*len).unwrap()).unwrap();
        }
        list
    }

    fn changed(&self, ranges: &[(u64, u64)]) -> Known {
        Known::Changed(self.list(ranges))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn zeros_take_no_room_and_the_image_comes_back() {
    let bench = Bench::new(40 * MIB + 512);
    bench.write(3 * MIB + 5000, &noise(1, 100_000));
    bench.write(40 * MIB, &noise(2, 512));
    let made = bench.first().await;
    assert_eq!(bench.restored(&made).await, bench.bytes());
    assert_eq!(bench.new_data(), (256 << 10) + 512);
    assert_eq!((made.read, made.found.by), (40 * MIB + 512, Some(ReadBy::Everything)));
    assert_eq!(made.written.counts.files, 1);
    let empty = Bench::new(0);
    let made = empty.first().await;
    assert_eq!(empty.restored(&made).await, Vec::<u8>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_changed_is_read_and_stored() {
    let bench = Bench::new(64 * MIB);
    bench.write(0, &noise(1, 20 << 20));
    let first = bench.first().await;
    bench.new_data();
    let same = bench.back_up(Some(&first), bench.changed(&[]), Audit::Off).await;
    assert_eq!((same.read, bench.new_data()), (0, 0));
    assert_eq!(bench.file(&same).await, bench.file(&first).await, "an unchanged image is the same manifest");
    bench.write(5 * MIB + 100, &noise(2, 50));
    bench.write(50 * MIB, &noise(3, 8192));
    let list = bench.changed(&[(5 * MIB + 100, 50), (50 * MIB, 8192)]);
    let second = bench.back_up(Some(&same), list, Audit::Off).await;
    assert_eq!((second.read, bench.new_data()), (2 * PAGE_BYTES, 2 * 8192), "two pages");
    assert_eq!(bench.restored(&second).await, bench.bytes());
    assert_eq!((second.found.by, second.found.lie), (Some(ReadBy::Changed), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_list_all_is_read_and_only_changed_pages_are_stored() {
    let bench = Bench::new(24 * MIB);
    bench.write(0, &noise(1, 24 << 20));
    let mut made = bench.first().await;
    for round in 0..3 {
        bench.new_data();
        bench.write((7 + round) * MIB, &noise(9 + round, 8192));
        made = bench.back_up(Some(&made), Known::Nothing, Audit::Off).await;
        assert_eq!((made.read, bench.new_data()), (24 * MIB, 8192));
        assert_eq!(bench.restored(&made).await, bench.bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_allocated_is_not_read() {
    let bench = Bench::new(512 * MIB);
    bench.write(100 * MIB, &noise(1, 1 << 20));
    let list = bench.list(&[(100 * MIB, MIB)]);
    let made = bench.back_up(None, Known::Allocated(list), Audit::Off).await;
    assert_eq!((made.read, made.found.by), (MIB, Some(ReadBy::Allocated)));
    assert_eq!(bench.restored(&made).await, bench.bytes());
    // What the file's own file system says is the same.
    let Known::Allocated(known) = known_of(&open(&bench.path()).unwrap()).unwrap() else { panic!("nothing is known") };
    assert!(known.bytes() >= MIB && known.bytes() < 2 * MIB, "{known:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_leaves_out_a_change_is_found_and_everything_is_read() {
    let bench = Bench::new(32 * MIB);
    bench.write(0, &noise(1, 16 << 20));
    let first = bench.first().await;
    bench.write(MIB, &noise(2, 8192));
    bench.write(9 * MIB, &noise(3, 8192));
    let incomplete = || bench.changed(&[(MIB, 8192)]);
    // Without an audit it is believed.
    let believed = bench.back_up(Some(&first), incomplete(), Audit::Off).await;
    assert_ne!(bench.restored(&believed).await, bench.bytes());
    for audit in [Audit::All, Audit::Sample { one_in: 1, seed: 0 }] {
        let made = bench.back_up(Some(&first), incomplete(), audit).await;
        assert_eq!(made.found.lie, Some(Lie { offset: 9 * MIB }), "{audit:?}");
        assert_eq!(made.found.by, Some(ReadBy::Everything));
        assert!(made.found.audited > 0 && made.read >= 32 * MIB);
        assert_eq!(bench.restored(&made).await, bench.bytes());
    }
    // An earlier lie is found by a later audit, although today's list is right.
    let made = bench.back_up(Some(&believed), bench.changed(&[]), Audit::All).await;
    assert_eq!(made.found.lie, Some(Lie { offset: 9 * MIB }));
    assert_eq!(bench.restored(&made).await, bench.bytes());
    // A list of what is allocated may lie as well.
    let made = bench.back_up(None, Known::Allocated(bench.list(&[(0, MIB)])), Audit::All).await;
    assert_eq!(made.found.lie, Some(Lie { offset: MIB }));
    assert_eq!(bench.restored(&made).await, bench.bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_of_a_list_that_is_right_finds_nothing() {
    let bench = Bench::new(32 * MIB + 4096);
    bench.write(0, &noise(1, 10 << 20));
    bench.write(32 * MIB, &noise(1, 4096));
    let first = bench.first().await;
    bench.write(4 * MIB, &vec![0; 1 << 20]);
    bench.write(30 * MIB, &noise(5, 8192));
    let list = bench.changed(&[(4 * MIB, MIB), (30 * MIB, 8192)]);
    let made = bench.back_up(Some(&first), list, Audit::All).await;
    assert_eq!(made.found.lie, None);
    assert_eq!(bench.restored(&made).await, bench.bytes());
    let sampled = bench.back_up(Some(&made), bench.changed(&[]), Audit::Sample { one_in: 8, seed: 3 }).await;
    assert_eq!((sampled.found.lie, sampled.found.by), (None, Some(ReadBy::Changed)));
    assert!(sampled.read > 0 && sampled.read < 16 * MIB, "{}", sampled.read);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_size_or_a_lost_parent_makes_a_list_worthless() {
    let bench = Bench::new(16 * MIB);
    bench.write(0, &noise(1, 16 << 20));
    let first = bench.first().await;
    File::options().write(true).open(bench.path()).unwrap().set_len(20 * MIB).unwrap();
    bench.write(19 * MIB, &noise(2, 8192));
    bench.new_data();
    let grown = bench.back_up(Some(&first), bench.changed(&[]), Audit::Off).await;
    assert!(grown.found.parent_is_unusable);
    assert_eq!(bench.restored(&grown).await, bench.bytes());
    assert!(bench.new_data() < 1 << 20, "what the parent has is not stored again");
    bench.double.condemn(ChunkKind::Data);
    let condemned = bench.back_up(Some(&grown), bench.changed(&[]), Audit::Off).await;
    assert_eq!(condemned.read, 16 * MIB + (256 << 10), "what must not be referred to is read, and holes are not");
    assert_eq!(bench.restored(&condemned).await, bench.bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn whatever_changed_comes_back(
        rounds in prop::collection::vec(prop::collection::vec((0..4_600_u64, 1..900_usize, any::<bool>()), 0..6), 1..4),
        by_list in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let bench = Bench::new(5 * MIB);
            bench.write(MIB, &noise(7, 2 << 20));
            let mut made = bench.first().await;
            for (round, writes) in rounds.into_iter().enumerate() {
                let mut ranges = Vec::new();
                for (kib, len_kib, is_zero) in writes {
                    let (at, len) = (kib << 10, (len_kib << 10).min(usize::try_from((5 * MIB) - (kib << 10)).unwrap()));
                    bench.write(at, &if is_zero { vec![0; len] } else { noise(round as u64 * 31 + kib, len) });
                    ranges.push((at, len as u64));
                }
                let known = if by_list { bench.changed(&ranges) } else { Known::Nothing };
                made = bench.back_up(Some(&made), known, Audit::Off).await;
                assert!(bench.restored(&made).await == bench.bytes());
            }
        });
    }
}
