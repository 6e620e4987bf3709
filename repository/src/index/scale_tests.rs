//! The index of a large repository, simulated: look-ups are right and memory does not grow with it.
//!
//! `LIFEBOAT_INDEX_ENTRIES=190000000` measures the index of 100 TB: 5 GB in the directory of temporary files. Figures
//! are printed (`--nocapture`).

use std::time::Instant;

use super::part::{Entry, PartBuilder};
use super::*;
use crate::id::PackId;
use crate::store::local::Local;

/// Chunks of a pack, and packs of a session: 32 MiB of half a MiB each; a session of 64 GiB.
const PACK_CHUNKS: u64 = 64;
const SESSION_PACKS: u64 = 2048;
/// Shares of the entries that are in runs of their own, as merging leaves them: oldest first.
const RUNS: [u64; 4] = [80, 16, 3, 1];

/// Limits below the heads and the entries even of the small index that every run of the tests makes.
const HEADS_BYTES: u64 = 16 << 10;
const BLOCKS_BYTES: u64 = 64 << 10;

fn mixed(number: u64) -> [u8; 32] {
    *blake3::hash(&number.to_le_bytes()).as_bytes()
}

/// Chunk `number` of `count`: ids ascend with the number and look random.
fn id(number: u64, count: u64) -> ChunkId {
    ascending(mixed(number), number, count)
}

fn ascending(mut id: [u8; 32], number: u64, count: u64) -> ChunkId {
    let step = u64::MAX / count;
    let within = id.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)) % step;
    id[..8].copy_from_slice(&(number * step + within).to_be_bytes());
    ChunkId(id)
}

/// Where it lies: chunks of a pack are all over the range of ids.
fn place(number: u64, count: u64) -> Place {
    let at = (number.wrapping_mul(0x9E37_79B9_7F4A_7C15)) % count;
    let pack = at / PACK_CHUNKS;
    let mut session = [0; 16];
    session.copy_from_slice(&mixed(pack / SESSION_PACKS)[..16]);
    let seq = u32::try_from(pack % SESSION_PACKS).unwrap();
    Place { pack: PackId { session: SessionId(session), seq }, slot: u16::try_from(at % PACK_CHUNKS).unwrap() }
}

/// The run that a chunk is in.
fn run_of(mixed: [u8; 32]) -> usize {
    let share = u64::from(mixed[31]) * 100 / 256;
    let ends = RUNS.iter().scan(0, |end, run| {
        *end += run;
        Some(*end)
    });
    ends.take_while(|end| share >= *end).count()
}

async fn fill(index: &Index, count: u64) {
    let mut list = version::List { runs: vec![Vec::new(); RUNS.len()], ..version::List::default() };
    let mut builders: Vec<_> = RUNS.iter().map(|_| PartBuilder::default()).collect();
    for number in 0..count {
        let mixed = mixed(number);
        let run = run_of(mixed);
        let entry = Entry { prefix: prefix_of(&ascending(mixed, number, count).0), place: place(number, count) };
        if builders[run].is_full(&entry) {
            let full = std::mem::take(&mut builders[run]);
            list.runs[run].push(index.store_part(1, full).await.unwrap());
        }
        builders[run].push(entry);
    }
    for (run, builder) in builders.into_iter().enumerate() {
        list.runs[run].push(index.store_part(1, builder).await.unwrap());
    }
    assert!(index.publish(1, &list).await.unwrap());
}

/// A figure of the process, in MiB.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let ticks: u64 =
        stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).map(|f| f.parse::<u64>().unwrap()).sum();
    std::time::Duration::from_millis(ticks * 10).as_secs_f64()
}

async fn measure(what: &str, index: &Index, ids: impl Iterator<Item = (ChunkId, Option<Place>)>) {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let mut asked = 0;
    for (id, expected) in ids {
        assert_eq!(index.find(&id).await.unwrap(), expected.into_iter().collect::<Vec<_>>());
        asked += 1;
    }
    println!(
        "{asked} {what}: {:.1} s, {:.1} s of processor time; anonymous memory {} MiB, at most {} MiB resident",
        start.elapsed().as_secs_f64(),
        cpu_seconds() - cpu,
        memory("RssAnon"),
        memory("VmHWM"),
    );
}

#[tokio::test]
async fn memory_does_not_grow_with_the_index() {
    let wanted = std::env::var("LIFEBOAT_INDEX_ENTRIES").ok();
    let is_measured = wanted.is_some();
    let count = wanted.map_or(60_000, |text| text.parse::<u64>().unwrap());
    let asked = count.min(1_000_000) / 10;
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(Local::new(folder.path().join("store")));
    let open = || {
        let spool = Spool::with_limit(Some(folder.path().join("spool")), HEADS_BYTES);
        Index::with_limits(Arc::clone(&store), ObjectCache::default(), MarkKey::new(&[7; 32]), spool, BLOCKS_BYTES)
    };
    fill(&open(), count).await;
    let before = memory("RssAnon");
    println!("{count} entries are stored; {before} MiB of anonymous memory, at most {} MiB resident", memory("VmHWM"));
    let index = open();
    let start = Instant::now();
    index.refresh().await.unwrap();
    println!("opened in {:.3} s", start.elapsed().as_secs_f64());
    let some = |from: u64| (0..asked).map(move |number| (from + number * 7919) % count);
    // The first ones fetch the heads.
    measure("first look-ups", &index, some(0).take(2000).map(|number| (id(number, count), Some(place(number, count)))))
        .await;
    measure("hits", &index, some(1).map(|number| (id(number, count), Some(place(number, count))))).await;
    measure("misses", &index, some(0).map(|number| (ChunkId(mixed(number + count)), None))).await;
    let (heads, blocks) = (index.spool.in_memory(), index.blocks.weight());
    assert!(heads <= HEADS_BYTES && blocks <= BLOCKS_BYTES, "{heads} bytes of heads, {blocks} of blocks");
    // Other tests of the same process have memory too; the measurement runs alone.
    if is_measured {
        let grown = memory("RssAnon").saturating_sub(before);
        assert!(grown < 64, "{grown} MiB more");
    }
}
