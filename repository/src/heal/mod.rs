//! Healing: what a check finds damaged is replaced from a second repository, or masked so that the next backup stores it
//! again. The result is checked.
//!
//! `original` proves that bytes are what was once written, `replace` puts them into place, `needs` keeps it from
//! expiring meanwhile, `lost` masks what is lost.
//! Nothing that is whole is ever touched.

mod lost;
mod needs;
mod original;
mod replace;

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::TryStreamExt;
use thiserror::Error;

pub(crate) use lost::{LOST_PREFIX, Lost, verify as verify_lost};
pub(crate) use replace::{MAX_STAGED_BYTES, STAGING_PREFIX, Staged};

use crate::check::{CheckError, CheckOptions, CheckReport, Problem};
use crate::commits::CommitLogError;
use crate::config::{CONFIG_KEY, Config};
use crate::error::{Classified, ErrorClass};
use crate::id::Place;
use crate::keys::KEYS_PREFIX;
use crate::objects;
use crate::pack::{pack_key, parse_pack_key};
use crate::progress::Progress;
use crate::refset::{Refset, refset_key};
use crate::repository::Repository;
use crate::session::SessionError;
use crate::session::decision::decision_key;
use crate::store::{Store, StoreError};

/// After a commit came back, what it refers to is checked as well; damage in three layers is not seen in practice.
const ROUNDS: usize = 3;

/// How to heal.
#[derive(Debug, Clone, Default)]
pub struct HealOptions {
    /// A copy of this repository's store, on which nobody worked by itself: not a replica, which has objects of its own.
    pub from: Option<Arc<dyn Store>>,
    /// How damage is looked for.
    pub check: CheckOptions,
    /// Nothing is changed: only what could be done is told.
    pub dry_run: bool,
}

/// What was healed.
#[derive(Debug, Clone, Default)]
pub struct HealReport {
    /// What was wrong at the beginning.
    pub found: Vec<Problem>,
    /// Objects that were replaced by their originals (with `dry_run`: that could be).
    pub replaced: Vec<String>,
    /// Chunks that are lost here and newly masked: the next backup that has them stores them again.
    pub masked: u64,
    /// What is still wrong.
    pub left: Vec<Problem>,
}

/// Why nothing more was healed.
#[derive(Debug, Error)]
pub enum HealError {
    /// Damage cannot be looked for.
    #[error("cannot look for damage")]
    Check(#[from] CheckError),
    /// The store failed.
    #[error("cannot {act} a damaged object")]
    Replace {
        /// What was attempted.
        act: &'static str,
        /// Why it failed.
        source: StoreError,
    },
    /// The second repository has another id, or none that can be read.
    #[error("what to heal from is not a copy of this repository's store")]
    NotACopy,
    /// Which snapshots need the objects cannot be told.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// What is put back cannot be kept from expiring meanwhile.
    #[error("cannot keep what is put back from expiring meanwhile")]
    Pin(#[source] SessionError),
    /// The second repository failed.
    #[error("the second repository failed")]
    From(#[source] StoreError),
    /// The store gives back something else than what was written.
    #[error("{key} does not read back as it was written: the store itself is failing")]
    ReadBack {
        /// The object.
        key: String,
    },
    /// The mask cannot be stored.
    #[error("cannot store which chunks are lost")]
    Mark(#[source] StoreError),
    /// A worker thread ended unexpectedly.
    #[error("a worker failed")]
    Worker(#[from] tokio::task::JoinError),
}

impl Classified for HealError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Check(error) => error.class(),
            Self::Replace { source, .. } | Self::From(source) | Self::Mark(source) => source.class(),
            Self::NotACopy => ErrorClass::Invalid,
            Self::Log(error) => error.class(),
            Self::Pin(error) => error.class(),
            Self::ReadBack { .. } => ErrorClass::Damaged,
            Self::Worker(_) => ErrorClass::Local,
        }
    }
}

/// Replaces a damaged config and damaged key slots, without which a repository does not open, from a copy of the store.
/// Needs no key. Returns the keys of the objects that were replaced.
pub async fn heal_locks(store: &Arc<dyn Store>, from: &dyn Store) -> Result<Vec<String>, HealError> {
    let mut keys = BTreeSet::from([CONFIG_KEY.to_owned()]);
    let listed: Vec<_> = from.list(KEYS_PREFIX).try_collect().await.map_err(HealError::From)?;
    keys.extend(listed.into_iter().map(|object| object.key));
    let mut replaced = Vec::new();
    for key in keys {
        // A slot that is missing was removed on purpose; one that is damaged was not.
        let is_there = match store.size(&key).await {
            Ok(_) => true,
            Err(error) if error.is_not_found() => key == CONFIG_KEY,
            Err(source) => return Err(HealError::Replace { act: "look at", source }),
        };
        if !is_there || !replace::needs_healing(&**store, &key).await? {
            continue;
        }
        let Some(bytes) = copy_of(from, &key).await.map_err(HealError::From)? else { continue };
        if objects::verify(&key, &bytes).is_ok() && original::fits_slots(&**store, &key, &bytes).await? {
            replace::replace(store, &key, &bytes).await?;
            replaced.push(key);
        }
    }
    Ok(replaced)
}

async fn copy_of(store: &dyn Store, key: &str) -> Result<Option<bytes::Bytes>, StoreError> {
    match store.get(key, objects::limit(key)).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Repository {
    /// Heals what can be healed. What is left is reported, not an error.
    pub async fn heal(&self, options: HealOptions, progress: Arc<Progress>) -> Result<HealReport, HealError> {
        let mut report = HealReport::default();
        if let Some(from) = &options.from {
            // Slots of registration and marks of expiry have the same names everywhere: those of another repository,
            // which a replica is, would be taken for this one's.
            let config = copy_of(&**from, CONFIG_KEY).await.map_err(HealError::From)?;
            let id = config.and_then(|bytes| Config::parse(&bytes).ok()).map(|config| config.id);
            if id != Some(self.id()) {
                return Err(HealError::NotACopy);
            }
        }
        if !options.dry_run {
            report.replaced = replace::finish_staged(self).await?;
        }
        let mut checked = self.check(options.check.clone(), Arc::clone(&progress)).await?;
        report.found.clone_from(&checked.problems);
        if let Some(from) = &options.from {
            for _ in 0..ROUNDS {
                let replaced = self.replace_from(&**from, &checked.problems, options.dry_run).await?;
                let is_done = replaced.is_empty() || options.dry_run;
                report.replaced.extend(replaced);
                if is_done {
                    break;
                }
                checked = self.check(options.check.clone(), Arc::clone(&progress)).await?;
            }
        }
        report.masked = self.mask(&checked, options.dry_run).await?;
        report.left = checked.problems;
        Ok(report)
    }

    /// Replaces what the second repository has. Returns the keys of what was replaced.
    async fn replace_from(
        &self,
        from: &dyn Store,
        problems: &[Problem],
        dry_run: bool,
    ) -> Result<Vec<String>, HealError> {
        // Keys of sessions come first in this order of kinds: packs and commits are proven with them.
        let mut keys: Vec<_> = problems.iter().filter_map(object_of).collect::<BTreeSet<_>>().into_iter().collect();
        keys.sort_by_key(|key| !key.starts_with("k/"));
        let mut needs = needs::Needs::of(self, keys.iter().filter_map(|key| parse_pack_key(key)).collect()).await?;
        let mut replaced = Vec::new();
        for key in keys {
            if self.is_whole(&key, dry_run).await? {
                continue;
            }
            let Some(bytes) = copy_of(from, &key).await.map_err(HealError::From)? else { continue };
            if original::is_original(&self.engine, &key, &bytes).await? {
                if !dry_run {
                    if !needs.keep(self, &key).await? {
                        continue;
                    }
                    replace::replace(&self.engine.store, &key, &bytes).await?;
                }
                replaced.push(key);
            }
        }
        needs.release().await;
        Ok(replaced)
    }

    /// Whether nothing is wrong with the object itself: what needs other keys or commits is whole when these come back.
    async fn is_whole(&self, key: &str, dry_run: bool) -> Result<bool, HealError> {
        let fail = |source| HealError::Replace { act: "look at", source };
        let Some(bytes) = copy_of(&*self.engine.store, key).await.map_err(fail)? else { return Ok(false) };
        if dry_run {
            // The keys that came back for this are not there.
            return Ok(objects::verify(key, &bytes).is_ok());
        }
        original::is_original(&self.engine, key, &bytes).await
    }

    /// Masks the chunks that cannot be read and are not masked yet.
    async fn mask(&self, checked: &CheckReport, dry_run: bool) -> Result<u64, HealError> {
        let engine = &self.engine;
        engine.lost.refresh(&*engine.store).await.map_err(HealError::Mark)?;
        let mut new = Refset::default();
        for (pack, slots) in checked.unreadable.each_pack() {
            let places = slots.into_iter().map(|slot| Place { pack, slot });
            places.filter(|place| !engine.lost.covers(*place)).for_each(|place| new.insert(place));
        }
        if !new.is_empty() && !dry_run {
            engine.lost.add(&engine.store, &new).await.map_err(HealError::Mark)?;
        }
        Ok(new.len())
    }
}

/// The object that a problem lies in, if it lies in one.
fn object_of(problem: &Problem) -> Option<String> {
    match problem {
        Problem::Object { key, .. } => Some(key.clone()),
        Problem::Commit { session, .. } | Problem::MissingCommit(session) => Some(decision_key(*session)),
        Problem::Refset { snapshot, version, .. } => Some(refset_key(*snapshot, *version)),
        Problem::Pack { pack, .. } => Some(pack_key(*pack)),
        Problem::Chunk { place, .. } => Some(pack_key(place.pack)),
        Problem::Unreferenced { .. } | Problem::Files { .. } | Problem::MissingMember { .. } => None,
    }
}
