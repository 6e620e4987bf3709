//! Merges the segments of many sessions and the smaller runs into one run, and makes that the next version of the index.
//!
//! Safe beside everything else, without locks: objects are created once, the version's mark decides which of those who
//! merge at once is right, and its name tells who lost. A segment is removed only when a version in force has its entries;
//! a part only when no later version can ever name it. Whoever dies in between leaves what the next one removes.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use thiserror::Error;
use tracing::info;

use super::part::{BLOCK_ENTRIES, ENTRY_BYTES, Entry, HEADER_BYTES, Head, PartBuilder, PartInfo, Prefix, prefix_of};
use super::version::{self, LISTS_PREFIX, List, PARTS_PREFIX, part_key, version_key};
use super::{INDEX_PREFIX, Index, Part, Segment, head_name, parse_segment_key, segment_key, unreadable};
use crate::expire::packset::PackSet;
use crate::id::{PackId, Place, SessionId};
use crate::pack::pack_key;
use crate::store::StoreError;

/// A run is merged with newer ones together as soon as they have a quarter of its entries; so there are few runs, and an
/// entry is copied few times.
const RATIO: u64 = 4;
/// Segments merged at once: each holds a block of entries in memory.
const MAX_SEGMENTS: usize = 1024;
/// Entries of a run read at once: 1 MiB.
const WINDOW_ENTRIES: usize = 256 * BLOCK_ENTRIES;

/// A merge that was given up. Nothing changed, or the new version is in force.
#[derive(Debug, Error)]
pub(crate) enum MergeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("a part of the index is damaged: {key}")]
    Damaged { key: String },
}

/// What is merged.
struct Inputs {
    version: u64,
    /// Older runs, that stay.
    kept: Vec<Vec<PartInfo>>,
    /// The newest run first.
    merged: Vec<Arc<Vec<Arc<Part>>>>,
    segments: Vec<(String, Arc<Segment>)>,
    absorbed: BTreeSet<(SessionId, u32)>,
}

impl Index {
    /// Merges once, if at least `from` segments of sessions that are settled wait for it; how many were merged.
    ///
    /// `is_listed` says that a pack was there lately; of other packs the store is asked, and what is gone is left out.
    /// `is_settled` must hold only for sessions that [`Self::waiting`] gave before it was asked which sessions are open: the
    /// index may have learned of others since.
    pub(crate) async fn merge(
        &self,
        from: usize,
        is_settled: impl Fn(SessionId) -> bool,
        is_listed: impl Fn(PackId) -> bool,
    ) -> Result<u64, MergeError> {
        let Some(inputs) = self.inputs(from, is_settled) else { return Ok(0) };
        let next = inputs.version + 1;
        let count = inputs.segments.len() as u64;
        let absorbed: BTreeSet<_> = inputs.segments.iter().filter_map(|(key, _)| parse_segment_key(key)).collect();
        let run = self.merge_run(next, &inputs, is_listed).await?;
        let mut list = List { runs: inputs.kept, absorbed };
        if !run.is_empty() {
            list.runs.push(run);
        }
        // Those that an earlier merge could not remove.
        let listed: HashSet<String> = self.store.list(INDEX_PREFIX).map_ok(|object| object.key).try_collect().await?;
        let is_there = |(session, number): &(SessionId, u32)| listed.contains(&segment_key(*session, *number));
        list.absorbed.extend(inputs.absorbed.into_iter().filter(is_there));
        if !self.publish(next, &list).await? {
            info!(version = next, "another merges the index");
            return Ok(0);
        }
        info!(version = next, segments = count, "merged the index");
        self.refresh().await?;
        Ok(count)
    }

    /// Makes the list the next version; `false`: somebody else was first.
    pub(super) async fn publish(&self, version: u64, list: &List) -> Result<bool, StoreError> {
        let sealed = list.seal(&self.key, version);
        self.store.put_if_absent(&sealed.list_key, sealed.list.into()).await?;
        Ok(self.store.put_if_absent(&version_key(version), sealed.mark.into()).await?.is_ours())
    }

    fn inputs(&self, from: usize, is_settled: impl Fn(SessionId) -> bool) -> Option<Inputs> {
        let state = self.state();
        let mut segments: Vec<_> =
            state.segments.iter().filter(|(_, segment)| is_settled(segment.session())).cloned().collect();
        if segments.len() < from.max(1) || state.is_damaged {
            return None;
        }
        segments.truncate(MAX_SEGMENTS);
        let mut entries: u64 = segments.iter().map(|(_, segment)| segment.len() as u64).sum();
        let mut kept = state.runs.clone();
        let mut merged = Vec::new();
        while let Some(run) = kept.last() {
            let len: u64 = run.iter().map(|part| u64::from(part.info.entries)).sum();
            if len >= entries * RATIO {
                break;
            }
            entries += len;
            merged.extend(kept.pop());
        }
        let infos = |run: &Arc<Vec<Arc<Part>>>| run.iter().map(|part| part.info.clone()).collect();
        Some(Inputs {
            version: state.version,
            kept: kept.iter().map(infos).collect(),
            merged,
            segments,
            absorbed: state.absorbed.clone(),
        })
    }

    /// Writes the run that holds all entries of the inputs but those of packs that are gone.
    async fn merge_run(
        &self,
        version: u64,
        inputs: &Inputs,
        is_listed: impl Fn(PackId) -> bool,
    ) -> Result<Vec<PartInfo>, MergeError> {
        let segments =
            inputs.segments.iter().rev().map(|(key, segment)| Cursor::of_segment(key.clone(), Arc::clone(segment)));
        let runs = inputs.merged.iter().map(Cursor::of_run);
        let mut merged = Merged::new(self, segments.chain(runs).collect()).await?;
        let mut packs = Packs { index: self, is_listed, asked: HashMap::new() };
        let mut run = Vec::new();
        let mut builder = PartBuilder::default();
        while let Some(entry) = merged.next().await? {
            if !packs.exists(entry.place.pack).await? {
                continue;
            }
            if builder.is_full(&entry) {
                run.push(self.store_part(version, std::mem::take(&mut builder)).await?);
            }
            builder.push(entry);
        }
        if !builder.is_empty() {
            run.push(self.store_part(version, builder).await?);
        }
        Ok(run)
    }

    pub(super) async fn store_part(&self, version: u64, builder: PartBuilder) -> Result<PartInfo, StoreError> {
        let (bytes, info) = builder.finish(version);
        // The name is random: only this call can have made the object.
        self.store.put_if_absent(&part_key(&info), bytes.into()).await?;
        Ok(info)
    }

    /// Removes what the version in force made useless. May be repeated, also by who slept for years: what is not in a version
    /// and was made for it or an earlier one is in no later version either.
    pub(crate) async fn clean(&self) -> Result<(), StoreError> {
        let (version, is_damaged, used, absorbed) = {
            let state = self.state();
            let parts = state.runs.iter().flat_map(|run| run.iter().map(|part| part_key(&part.info)));
            (state.version, state.is_damaged, parts.collect::<HashSet<_>>(), state.absorbed.clone())
        };
        if version == 0 || is_damaged {
            return Ok(());
        }
        let listed: Vec<String> = self.store.list(INDEX_PREFIX).map_ok(|object| object.key).try_collect().await?;
        let mut obsolete: Vec<_> = listed
            .into_iter()
            .filter(|key| parse_segment_key(key).is_some_and(|key| absorbed.contains(&key)))
            .collect();
        let parts: Vec<String> = self.store.list(PARTS_PREFIX).map_ok(|object| object.key).try_collect().await?;
        obsolete.extend(parts.into_iter().filter(|key| {
            !used.contains(key) && version::version_of(PARTS_PREFIX, key).is_some_and(|made| made <= version)
        }));
        // Lists of those who lost for this very version stay until the next.
        let lists: Vec<String> = self.store.list(LISTS_PREFIX).map_ok(|object| object.key).try_collect().await?;
        obsolete.extend(
            lists.into_iter().filter(|key| version::version_of(LISTS_PREFIX, key).is_some_and(|made| made < version)),
        );
        for key in obsolete {
            self.store.delete(&key).await?;
            self.cache.forget(&key);
            self.cache.forget(&head_name(&key));
        }
        Ok(())
    }

    /// Adds the packs that merged parts speak of; gives back the parts that are damaged.
    pub(super) async fn add_merged_packs(&self, packs: &mut PackSet) -> Result<Vec<PartInfo>, StoreError> {
        let runs = self.state().runs.clone();
        let mut damaged = Vec::new();
        for part in runs.iter().flat_map(|run| run.iter()) {
            let mut found = PackSet::default();
            let mut cursor = Cursor::of_run(&Arc::new(vec![Arc::clone(part)]));
            loop {
                match cursor.next(self).await {
                    Ok(Some(entry)) => found.insert(entry.place.pack),
                    Ok(None) => break packs.extend(&found),
                    Err(MergeError::Damaged { .. }) => break damaged.push(part.info.clone()),
                    Err(MergeError::Store(error)) if error.is_not_found() => break damaged.push(part.info.clone()),
                    Err(MergeError::Store(error)) => return Err(error),
                }
            }
        }
        Ok(damaged)
    }

    /// Makes a version without these parts, or without any when the version itself is damaged; whether it is in force.
    pub(super) async fn leave_out_parts(&self, damaged: &[PartInfo]) -> Result<bool, StoreError> {
        let (version, list) = {
            let state = self.state();
            if damaged.is_empty() && !state.is_damaged {
                return Ok(true);
            }
            let infos = |run: &Arc<Vec<Arc<Part>>>| {
                run.iter().map(|part| part.info.clone()).filter(|info| !damaged.contains(info)).collect::<Vec<_>>()
            };
            let runs = state.runs.iter().map(infos).filter(|run| !run.is_empty()).collect();
            (state.version, List { runs, absorbed: state.absorbed.clone() })
        };
        let is_ours = self.publish(version + 1, &list).await?;
        self.refresh().await?;
        Ok(is_ours)
    }
}

/// Which packs exist.
struct Packs<'a, L> {
    index: &'a Index,
    is_listed: L,
    asked: HashMap<PackId, bool>,
}

impl<L: Fn(PackId) -> bool> Packs<'_, L> {
    async fn exists(&mut self, pack: PackId) -> Result<bool, StoreError> {
        if (self.is_listed)(pack) {
            return Ok(true);
        }
        if let Some(exists) = self.asked.get(&pack) {
            return Ok(*exists);
        }
        let exists = crate::expire::marks::exists(&*self.index.store, &pack_key(pack)).await?;
        self.asked.insert(pack, exists);
        Ok(exists)
    }
}

/// The entries of several inputs, sorted by id and then by input.
struct Merged<'a> {
    index: &'a Index,
    cursors: Vec<Cursor>,
    next: BinaryHeap<Reverse<(Prefix, usize, Place)>>,
}

impl<'a> Merged<'a> {
    async fn new(index: &'a Index, cursors: Vec<Cursor>) -> Result<Self, MergeError> {
        let mut merged = Self { index, cursors, next: BinaryHeap::new() };
        for number in 0..merged.cursors.len() {
            merged.advance(number).await?;
        }
        Ok(merged)
    }

    async fn advance(&mut self, number: usize) -> Result<(), MergeError> {
        if let Some(Entry { prefix, place }) = self.cursors[number].next(self.index).await? {
            self.next.push(Reverse((prefix, number, place)));
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Entry>, MergeError> {
        let Some(Reverse((prefix, number, place))) = self.next.pop() else { return Ok(None) };
        self.advance(number).await?;
        Ok(Some(Entry { prefix, place }))
    }
}

/// The entries of one input in their order.
struct Cursor {
    ready: std::vec::IntoIter<Entry>,
    rest: Rest,
}

enum Rest {
    Segment { key: String, segment: Arc<Segment>, at: usize },
    Run { parts: VecDeque<Arc<Part>>, open: Option<Box<OpenPart>> },
}

/// A part of which the hash is computed while it is read.
struct OpenPart {
    part: Arc<Part>,
    hasher: blake3::Hasher,
    at: usize,
}

impl Cursor {
    fn of_segment(key: String, segment: Arc<Segment>) -> Self {
        Self { ready: Vec::new().into_iter(), rest: Rest::Segment { key, segment, at: 0 } }
    }

    fn of_run(run: &Arc<Vec<Arc<Part>>>) -> Self {
        Self { ready: Vec::new().into_iter(), rest: Rest::Run { parts: run.iter().cloned().collect(), open: None } }
    }

    async fn next(&mut self, index: &Index) -> Result<Option<Entry>, MergeError> {
        loop {
            if let Some(entry) = self.ready.next() {
                return Ok(Some(entry));
            }
            match self.rest.fill(index).await? {
                Some(entries) => self.ready = entries.into_iter(),
                None => return Ok(None),
            }
        }
    }
}

impl Rest {
    /// Some more entries; `None`: there are no more.
    async fn fill(&mut self, index: &Index) -> Result<Option<Vec<Entry>>, MergeError> {
        match self {
            Self::Segment { key, segment, at } => {
                let entries = segment.entries(*at, BLOCK_ENTRIES).map_err(|error| unreadable(key, error))?;
                *at += entries.len();
                let session = segment.session();
                let entry = |(id, seq, slot): ([u8; 16], u32, u16)| Entry {
                    prefix: prefix_of(&id),
                    place: Place { pack: PackId { session, seq }, slot },
                };
                Ok((!entries.is_empty()).then(|| entries.into_iter().map(entry).collect()))
            }
            Self::Run { parts, open } => {
                let opened = match open.take() {
                    Some(opened) => opened,
                    None => match parts.pop_front() {
                        Some(part) => Box::new(OpenPart::new(index, part).await?),
                        None => return Ok(None),
                    },
                };
                let (entries, rest) = opened.read(index).await?;
                *open = rest;
                Ok(Some(entries))
            }
        }
    }
}

impl OpenPart {
    async fn new(index: &Index, part: Arc<Part>) -> Result<Self, MergeError> {
        let mut opened = Self { part, hasher: blake3::Hasher::new(), at: 0 };
        let header = opened.bytes(index, 0..HEADER_BYTES as u64).await?;
        opened.hasher.update(&header);
        Ok(opened)
    }

    fn damaged(&self) -> MergeError {
        MergeError::Damaged { key: part_key(&self.part.info) }
    }

    async fn bytes(&self, index: &Index, range: std::ops::Range<u64>) -> Result<Bytes, MergeError> {
        index.read(&part_key(&self.part.info), range).await?.ok_or_else(|| self.damaged())
    }

    /// Reads a window of entries. After the last one, `None` follows, when the whole part's hash fits.
    async fn read(mut self: Box<Self>, index: &Index) -> Result<(Vec<Entry>, Option<Box<Self>>), MergeError> {
        let part = Arc::clone(&self.part);
        let head = index.head(&part).await?.ok_or_else(|| self.damaged())?;
        let all = part.info.entries as usize;
        let end = (self.at + WINDOW_ENTRIES).min(all);
        let at = |entry: usize| (HEADER_BYTES + entry * ENTRY_BYTES) as u64;
        let bytes = self.bytes(index, at(self.at)..at(end)).await?;
        self.hasher.update(&bytes);
        self.at = end;
        let entries = parse(head, &bytes).map_err(|error| unreadable(&part_key(&part.info), error))?;
        if entries.len() != bytes.len() / ENTRY_BYTES {
            return Err(self.damaged());
        }
        if end < all {
            return Ok((entries, Some(self)));
        }
        let head_end = part.info.head_at() + u64::from(part.info.head_len);
        let rest = self.bytes(index, part.info.head_at()..head_end + 32).await?;
        let Some((rest, hash)) = rest.split_last_chunk::<32>() else { return Err(self.damaged()) };
        if self.hasher.update(rest).finalize().as_bytes() != hash {
            return Err(self.damaged());
        }
        Ok((entries, None))
    }
}

fn parse(head: &Head, bytes: &[u8]) -> io::Result<Vec<Entry>> {
    let entries = bytes.chunks_exact(ENTRY_BYTES).map(|entry| head.entry(entry));
    entries.filter_map(io::Result::transpose).collect()
}
