//! That the packs in use have the slots that are in use, and that these open to what they should be.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;

use super::{Check, CheckError, CheckOptions, Problem, with_causes};
use crate::directories::DirectoryError;
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::id::{PackId, Place};
use crate::keyring::KeyRingError;
use crate::pack::{Directory, FrameError, MAX_PACK_BYTES, open_frame, pack_key, parse_header, verify_checksum};
use crate::refset::Refset;
use crate::share::{Cursor, choose};
use crate::store::StoreError;

/// Packs looked at at once; each is held in memory when data is read.
const PARALLEL_PACKS: usize = 3;

impl Check<'_> {
    /// That every pack in use has the slots, and that those of the chosen packs open.
    pub(super) async fn packs(&mut self, used: &Refset, options: &CheckOptions) -> Result<(), CheckError> {
        let engine = Arc::clone(&self.repository.engine);
        let cursor = Cursor::new(options.cache_dir.as_deref(), engine.config.id, "check");
        let mut chosen = match options.read_data {
            Some(share) => choose(used.each_pack().map(|(pack, _)| (pack, 1)).collect(), share, cursor.load()),
            None => Vec::new(),
        };
        let last = chosen.last().map(|(pack, _)| *pack);
        chosen.sort_unstable();
        let mut checks = futures::stream::iter(used.each_pack())
            .map(|(pack, slots)| {
                let engine = Arc::clone(&engine);
                let read_data = chosen.binary_search_by_key(&pack, |(pack, _)| *pack).is_ok();
                async move { check_pack(engine, pack, slots, read_data).await }
            })
            .buffer_unordered(PARALLEL_PACKS);
        while let Some(checked) = checks.next().await {
            if self.progress.is_cancelled() {
                return Err(CheckError::Cancelled);
            }
            let checked = checked?;
            self.progress.add_bytes(checked.bytes_read);
            self.report.packs += 1;
            self.report.chunks += checked.chunks;
            self.report.bytes_read += checked.bytes_read;
            self.report.problems.extend(checked.problems);
            checked.unreadable.into_iter().for_each(|place| self.report.unreadable.insert(place));
        }
        if let Some(last) = last {
            cursor.save(last);
        }
        Ok(())
    }
}

/// What was found in one pack.
#[derive(Default)]
struct CheckedPack {
    chunks: u64,
    bytes_read: u64,
    /// Chunks that cannot be read.
    unreadable: Vec<Place>,
    problems: Vec<Problem>,
}

/// Looks at these slots of a pack.
async fn check_pack(
    engine: Arc<Engine>,
    pack: PackId,
    slots: Vec<u16>,
    read_data: bool,
) -> Result<CheckedPack, CheckError> {
    let mut checked = CheckedPack { chunks: slots.len() as u64, ..CheckedPack::default() };
    let problem = |what: String| Problem::Pack { pack, what };
    let place = |slot: u16| Place { pack, slot };
    let directory = match engine.directories.get(pack).await {
        Ok(directory) => directory,
        Err(DirectoryError::Store(error) | DirectoryError::Keys(KeyRingError::Store(error))) if !is_damage(&error) => {
            return Err(error.into());
        }
        Err(error) => {
            checked.problems.push(problem(with_causes(&error)));
            checked.unreadable = slots.into_iter().map(place).collect();
            return Ok(checked);
        }
    };
    for slot in slots.iter().filter(|slot| usize::from(**slot) >= directory.slots.len()) {
        checked.problems.push(Problem::Chunk {
            place: place(*slot),
            offset: 0,
            what: "the slot does not exist".into(),
        });
        checked.unreadable.push(place(*slot));
    }
    if !read_data {
        return Ok(checked);
    }
    let bytes = match engine.store.get(&pack_key(pack), MAX_PACK_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if is_damage(&error) => {
            checked.problems.push(problem(error.to_string()));
            checked.unreadable = slots.into_iter().map(place).collect();
            return Ok(checked);
        }
        Err(error) => return Err(error.into()),
    };
    checked.bytes_read = bytes.len() as u64;
    match verify_checksum(&bytes).and_then(|()| parse_header(&bytes)) {
        Ok(found) if found == pack => {}
        Ok(found) => checked.problems.push(problem(format!("the object holds the pack {found}"))),
        Err(error) => checked.problems.push(problem(error.to_string())),
    }
    let opened = open_all(engine, pack, slots, directory, bytes).await?;
    checked.unreadable.extend(opened.iter().filter_map(|problem| match problem {
        Problem::Chunk { place, .. } => Some(*place),
        _ => None,
    }));
    checked.problems.extend(opened);
    Ok(checked)
}

fn is_damage(error: &StoreError) -> bool {
    matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged)
}

/// Opens the frames of these slots.
async fn open_all(
    engine: Arc<Engine>,
    pack: PackId,
    slots: Vec<u16>,
    directory: Arc<Directory>,
    bytes: bytes::Bytes,
) -> Result<Vec<Problem>, CheckError> {
    let mut ciphers = BTreeMap::new();
    let mut problems = Vec::new();
    for origin in &directory.origins {
        match engine.keys.get(*origin).await {
            Ok(keys) => {
                ciphers.insert(*origin, keys);
            }
            Err(KeyRingError::Store(error)) if !is_damage(&error) => return Err(error.into()),
            Err(error) => problems.push(Problem::Pack { pack, what: with_causes(&error) }),
        }
    }
    let open = move || {
        for slot in slots {
            let Some(entry) = directory.slots.get(usize::from(slot)) else { continue };
            let origin = directory.origins.get(usize::from(entry.origin)).copied().unwrap_or(pack.session);
            let Some(cipher) = ciphers.get(&origin).and_then(|keys| keys.frame(entry.expected.kind)) else { continue };
            let start = entry.offset as usize;
            let opened = match bytes.get(start..start + entry.len as usize) {
                Some(frame) => {
                    open_frame(cipher, &entry.expected, frame, |plain| engine.chunk_id(plain)).map_err(FrameError::what)
                }
                None => Err("the pack ends before it"),
            };
            if let Err(what) = opened {
                let place = Place { pack, slot };
                problems.push(Problem::Chunk { place, offset: u64::from(entry.offset), what: what.to_owned() });
            }
        }
        problems
    };
    Ok(tokio::task::spawn_blocking(open).await?)
}
