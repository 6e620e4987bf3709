//! Scrubbing: every object read and compared with the hash that it carries. No key of the repository is needed.
//!
//! Small objects are read each time; packs, which are nearly all bytes, a share at a time. Nothing is changed.

use std::path::PathBuf;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use thiserror::Error;

use crate::check::Problem;
use crate::config::{CONFIG_KEY, Config, ConfigError, MAX_CONFIG_BYTES};
use crate::error::{Classified, ErrorClass};
use crate::id::PackId;
use crate::keys::{KEYS_PREFIX, Slot};
use crate::objects;
use crate::pack::{pack_key, parse_pack_key};
use crate::progress::Progress;
use crate::share::{Cursor, Share, choose};
use crate::store::{Store, StoreError};

/// Packs held in memory at once, 64 MiB each at most.
const PARALLEL_PACKS: usize = 3;
/// Small objects read at once.
const PARALLEL_OBJECTS: usize = 16;

/// How much is scrubbed.
#[derive(Debug, Clone)]
pub struct ScrubOptions {
    /// Which part of the packs: those that come after the ones of the last run.
    pub share: Share,
    /// Remembers where the last run stopped; without it every share is the first one.
    pub cache_dir: Option<PathBuf>,
}

/// What a scrub found.
#[derive(Debug, Clone, Default)]
pub struct ScrubReport {
    /// Packs that there are.
    pub packs: u64,
    /// Packs read.
    pub packs_read: u64,
    /// Other objects read: all.
    pub objects: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// A scrub that could not be done.
#[derive(Debug, Error)]
pub enum ScrubError {
    /// Nothing there.
    #[error("there is no repository in {store}; correct the location")]
    NoRepository {
        /// The store.
        store: String,
    },
    /// Made by a later version.
    #[error(transparent)]
    Config(ConfigError),
    /// The store failed.
    #[error("the store failed during the scrub")]
    Store(#[from] StoreError),
    /// Somebody asked to stop; the next scrub goes on from here.
    #[error("stopped on request; the next scrub goes on from here")]
    Cancelled,
    /// A worker thread ended unexpectedly.
    #[error("a worker failed")]
    Worker(#[from] tokio::task::JoinError),
}

impl Classified for ScrubError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::NoRepository { .. } => ErrorClass::NotFound,
            Self::Config(_) => ErrorClass::Unsupported,
            Self::Store(error) => error.class(),
            Self::Cancelled => ErrorClass::Invalid,
            Self::Worker(_) => ErrorClass::Local,
        }
    }
}

/// Reads and compares. Damage is reported, not an error.
pub async fn scrub(
    store: Arc<dyn Store>,
    options: ScrubOptions,
    progress: Arc<Progress>,
) -> Result<ScrubReport, ScrubError> {
    let mut config = match store.get(CONFIG_KEY, MAX_CONFIG_BYTES).await {
        Ok(bytes) => Config::parse(&bytes),
        Err(error) if error.is_not_found() => return Err(ScrubError::NoRepository { store: store.describe() }),
        Err(error) => return Err(error.into()),
    };
    if let Err(error @ ConfigError::Newer { .. }) = config {
        // Unless a changed digit made it so: then the slots of this version say that it was another one.
        let slots = store.list(KEYS_PREFIX).map_ok(|object| object.key).try_collect().await?;
        if fits_slots(&*store, slots).await? != Some(false) {
            return Err(ScrubError::Config(error));
        }
        config = Err(error);
    }
    // Without a config, which is damage and will be reported, there is no name to remember the place by.
    let cache = options.cache_dir.as_deref().filter(|_| config.is_ok());
    let cursor = Cursor::new(cache, config.map_or(crate::id::RepositoryId([0; 16]), |config| config.id), "scrub");
    let Listing { small, packs } = list(&*store).await?;
    let mut report = ScrubReport { packs: packs.len() as u64, ..ScrubReport::default() };
    let chosen = choose(packs, options.share, cursor.load());
    progress.expect_bytes(
        chosen.iter().map(|(_, size)| size).sum::<u64>() + small.iter().map(|(_, size)| size).sum::<u64>(),
    );
    report.objects = small.len() as u64;
    let keys = small.into_iter().map(|(key, _)| key).collect();
    let (bytes_read, problems) = small_objects(&store, keys, &progress).await?;
    report.bytes_read += bytes_read;
    report.problems = problems;
    let mut reads = futures::stream::iter(chosen)
        .map(|(pack, _)| {
            let store = Arc::clone(&store);
            async move { Ok::<_, ScrubError>((pack, verify(&*store, &pack_key(pack)).await?)) }
        })
        // In order, so that all before the cursor is done.
        .buffered(PARALLEL_PACKS);
    while let Some((pack, read)) = reads.try_next().await? {
        progress.add_entry();
        progress.add_bytes(read.bytes);
        report.packs_read += 1;
        report.bytes_read += read.bytes;
        report.problems.extend(read.problem.map(|what| Problem::Pack { pack, what }));
        cursor.save(pack);
        if progress.is_cancelled() {
            return Err(ScrubError::Cancelled);
        }
    }
    Ok(report)
}

/// What a store holds.
struct Listing {
    /// Keys and sizes of all objects but packs.
    small: Vec<(String, u64)>,
    packs: Vec<(PackId, u64)>,
}

async fn list(store: &dyn Store) -> Result<Listing, StoreError> {
    let mut listing = Listing { small: Vec::new(), packs: Vec::new() };
    let mut listed = store.list("");
    while let Some(object) = listed.try_next().await? {
        match parse_pack_key(&object.key) {
            Some(pack) => listing.packs.push((pack, object.size)),
            None => listing.small.push((object.key, object.size)),
        }
    }
    Ok(listing)
}

/// Keys of all objects but packs.
pub(crate) async fn small_keys(store: &dyn Store) -> Result<Vec<String>, StoreError> {
    let listed = store.list("").try_filter(|object| std::future::ready(parse_pack_key(&object.key).is_none()));
    listed.map_ok(|object| object.key).try_collect().await
}

/// Reads and compares these objects; bytes read, and what is wrong.
pub(crate) async fn small_objects(
    store: &Arc<dyn Store>,
    keys: Vec<String>,
    progress: &Progress,
) -> Result<(u64, Vec<Problem>), ScrubError> {
    let slots: Vec<_> = keys.iter().filter(|key| key.starts_with(KEYS_PREFIX)).cloned().collect();
    let mut reads = futures::stream::iter(keys)
        .map(|key| async move { verify(&**store, &key).await.map(|read| (key, read)) })
        .buffer_unordered(PARALLEL_OBJECTS);
    let (mut bytes, mut problems) = (0, Vec::new());
    while let Some((key, read)) = reads.try_next().await? {
        if progress.is_cancelled() {
            return Err(ScrubError::Cancelled);
        }
        progress.add_bytes(read.bytes);
        bytes += read.bytes;
        problems.extend(read.problem.map(|what| Problem::Object { key, what }));
    }
    problems.extend(config_hash(&**store, slots).await?);
    problems.sort_by_key(ToString::to_string);
    Ok((bytes, problems))
}

struct Verified {
    bytes: u64,
    problem: Option<String>,
}

async fn verify(store: &dyn Store, key: &str) -> Result<Verified, ScrubError> {
    let bytes = match store.get(key, objects::limit(key)).await {
        Ok(bytes) => bytes,
        // Listed, but removed since: expired, or a heartbeat.
        Err(error) if error.is_not_found() => return Ok(Verified { bytes: 0, problem: None }),
        Err(error) if error.class() == ErrorClass::Damaged => {
            return Ok(Verified { bytes: 0, problem: Some(error.to_string()) });
        }
        Err(error) => return Err(error.into()),
    };
    let (len, key) = (bytes.len() as u64, key.to_owned());
    let verified = tokio::task::spawn_blocking(move || objects::verify(&key, &bytes)).await?;
    Ok(Verified { bytes: len, problem: verified.err() })
}

/// The config has no hash of its own: the key slots have it.
async fn config_hash(store: &dyn Store, slots: Vec<String>) -> Result<Option<Problem>, ScrubError> {
    let problem = |what: &str| Some(Problem::Object { key: CONFIG_KEY.to_owned(), what: what.to_owned() });
    match store.get(CONFIG_KEY, MAX_CONFIG_BYTES).await {
        // Then it is reported already.
        Ok(bytes) if Config::parse(&bytes).is_err() => return Ok(None),
        Ok(_) => {}
        Err(error) if error.is_not_found() => return Ok(problem("it is missing")),
        Err(error) if error.class() == ErrorClass::Damaged => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let is_another = fits_slots(store, slots).await? == Some(false);
    Ok(if is_another { problem("its bytes are not the ones that the key slots were made for") } else { None })
}

/// Whether the config is the one that a slot was made for; `None` if no slot is whole.
async fn fits_slots(store: &dyn Store, slots: Vec<String>) -> Result<Option<bool>, ScrubError> {
    let hash = blake3::hash(&store.get(CONFIG_KEY, MAX_CONFIG_BYTES).await?);
    let mut fits = None;
    for key in slots {
        let Ok(bytes) = store.get(&key, objects::limit(&key)).await else { continue };
        if let Ok(slot) = Slot::parse(&bytes) {
            fits = Some(fits == Some(true) || slot.belongs_to(hash.as_bytes()));
        }
    }
    Ok(fits)
}
