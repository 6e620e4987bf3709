//! Answers what the kernel asks: which entries there are, what they look like, and their bytes.
//!
//! A failure concerns what was asked for and nothing else: it is told once on the standard error, and the answer is an
//! I/O error. What is asked is in `answers`.

mod answers;

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fuser::{Errno, FileAttr};
use lifeboat_repository::browse::{Browser, Found, ListStarts, Tree};
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::manifest::Kind;
use lifeboat_repository::repository::Repository;
use lifeboat_repository::session::Pin;
use lifeboat_repository::snapshot::{Content, Snapshot};
use lifeboat_repository::tree::TreeError;

use super::attributes;
use super::layout::{Child, Layout, Node, ROOT};
use super::number::Number;
use crate::output;
use crate::output::complain;

/// The list of snapshots is read again when it is looked at and this old.
const LIST_AGE: Duration = Duration::from_secs(5);
/// How often pins are looked after.
const PIN_CARE: Duration = Duration::from_mins(5);
/// What a snapshot contains never changes.
const FOREVER: Duration = Duration::from_hours(24);
/// What stands above the trees may change.
const SHORT: Duration = Duration::from_secs(1);
/// A file with more lists of pieces is not searched for holes only to say how much room it takes.
const MAX_LISTS_OF_STAT: usize = 16;
/// Files that are read at the same time; each needs up to 1 MiB for its answer.
const READS_AT_ONCE: usize = 8;
/// Failures that are remembered so that each is told once.
const MAX_TOLD: usize = 10_000;

/// Which snapshots are shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    pub(crate) lineage: Option<String>,
    pub(crate) tags: Vec<(String, String)>,
}

impl Filter {
    fn takes(&self, snapshot: &Snapshot) -> bool {
        self.lineage.as_ref().is_none_or(|lineage| &snapshot.lineage == lineage)
            && self.tags.iter().all(|(name, value)| snapshot.tags.get(name) == Some(value))
    }

    /// These snapshots; with a recovery point its members.
    fn apply(&self, all: Vec<Snapshot>) -> Vec<Snapshot> {
        let members: HashSet<SnapshotId> = all
            .iter()
            .filter(|snapshot| self.takes(snapshot))
            .flat_map(|snapshot| match &snapshot.content {
                Content::RecoveryPoint { members, .. } => members.clone(),
                Content::Tree { .. } => Vec::new(),
            })
            .collect();
        all.into_iter().filter(|snapshot| self.takes(snapshot) || members.contains(&snapshot.id)).collect()
    }
}

/// A snapshot that was shown.
struct Shown {
    number: u16,
    snapshot: Snapshot,
    tree: Tree,
    /// Whether anybody looked into it.
    is_entered: AtomicBool,
    /// Keeps what it refers to from expiring; `None`: it could not be pinned.
    pin: tokio::sync::Mutex<Option<Pin>>,
}

struct Listed {
    layout: Layout,
    at: Option<Instant>,
}

/// An open file.
#[derive(Default)]
pub(super) struct Handle {
    starts: ListStarts,
    /// Where the last read ended.
    end: AtomicU64,
}

/// What a name leads to.
pub(super) struct Item {
    pub(super) number: u64,
    pub(super) attributes: FileAttr,
    /// How long the kernel may take the name for it.
    pub(super) name_for: Duration,
    /// How long the kernel may take the attributes for current.
    pub(super) attributes_for: Duration,
}

/// Takes the entries of a directory until there is no room; `true`: this one did not fit any more.
pub(super) trait Entries {
    fn add(&mut self, item: &Item, offset: u64, name: &[u8]) -> bool;
}

/// Everything that is shown.
pub(crate) struct Served {
    repository: Repository,
    browser: Arc<Browser>,
    filter: Filter,
    /// The root is the root of the first snapshot, and nothing is above it.
    is_single: bool,
    shown: Mutex<Vec<Arc<Shown>>>,
    listed: Mutex<Listed>,
    /// Held by the one who reads the list of snapshots.
    listing: tokio::sync::Mutex<()>,
    handles: Mutex<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
    pub(super) reads: tokio::sync::Semaphore,
    told: Mutex<HashSet<u64>>,
    failures: AtomicU64,
    owner: (u32, u32),
}

impl Served {
    fn new(repository: Repository, filter: Filter, is_single: bool) -> Result<Self> {
        Ok(Self {
            browser: repository.browse()?,
            repository,
            filter,
            is_single,
            shown: Mutex::default(),
            listed: Mutex::new(Listed { layout: Layout::new(), at: None }),
            listing: tokio::sync::Mutex::new(()),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(0),
            reads: tokio::sync::Semaphore::new(READS_AT_ONCE),
            told: Mutex::default(),
            failures: AtomicU64::new(0),
            owner: (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw()),
        })
    }

    /// The files of one snapshot, which is pinned from now on.
    pub(crate) async fn single(repository: Repository, snapshot: Snapshot) -> Result<Self> {
        let served = Self::new(repository, Filter::default(), true)?;
        let number = served.number_of(&snapshot)?.context("the snapshot is a recovery point, not a tree")?;
        let shown = served.shown(number).context("the snapshot is not shown")?;
        served.pin(&shown).await?;
        shown.tree.root().await.context("cannot read the snapshot")?;
        Ok(served)
    }

    /// All snapshots that the filter takes, those too that are made later.
    pub(crate) async fn all(repository: Repository, filter: Filter) -> Result<Self> {
        let served = Self::new(repository, filter, false)?;
        served.list_again().await?;
        Ok(served)
    }

    /// Snapshots that were shown so far.
    pub(crate) fn count(&self) -> usize {
        lock(&self.shown).len()
    }

    /// Failures that were told.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn shown(&self, number: u16) -> Option<Arc<Shown>> {
        lock(&self.shown).get(usize::from(number)).cloned()
    }

    /// The number of a snapshot in this mount; `None`: it has no tree.
    fn number_of(&self, snapshot: &Snapshot) -> Result<Option<u16>> {
        let Content::Tree { .. } = snapshot.content else { return Ok(None) };
        let mut shown = lock(&self.shown);
        let known = shown.iter().position(|shown| shown.snapshot.id == snapshot.id);
        let number = u16::try_from(known.unwrap_or(shown.len()));
        let number = number.context("a mount shows 65,536 snapshots at most; choose some by --lineage or --tag")?;
        if known.is_none() {
            shown.push(Arc::new(Shown {
                number,
                tree: self.browser.tree(snapshot)?,
                snapshot: snapshot.clone(),
                is_entered: AtomicBool::new(false),
                pin: tokio::sync::Mutex::new(None),
            }));
        }
        Ok(Some(number))
    }

    async fn list_again(&self) -> Result<()> {
        let (all, damaged) = self.repository.readable_snapshots().await?;
        for error in &damaged {
            self.tell(&error.to_string(), error);
        }
        let mut numbered = Vec::new();
        for snapshot in self.filter.apply(all) {
            let number = self.number_of(&snapshot)?;
            numbered.push((snapshot, number));
        }
        let mut listed = lock(&self.listed);
        listed.layout.show(&numbered);
        listed.at = Some(Instant::now());
        Ok(())
    }

    /// Reads the list of snapshots again if it is old. If that fails, the old one is shown.
    async fn refresh(&self) {
        let is_old = || lock(&self.listed).at.is_none_or(|at| at.elapsed() >= LIST_AGE);
        if self.is_single || !is_old() {
            return;
        }
        let _listing = self.listing.lock().await;
        if is_old()
            && let Err(error) = self.list_again().await
        {
            self.tell("the list of snapshots", error.as_ref());
            lock(&self.listed).at = Some(Instant::now());
        }
    }

    /// Begins to keep the snapshot from expiring.
    async fn pin(&self, shown: &Shown) -> Result<()> {
        if shown.is_entered.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut pin = shown.pin.lock().await;
        if !shown.is_entered.load(Ordering::Acquire) {
            *pin = self.repository.pin(&shown.snapshot).await.context("cannot register as a reader")?;
            shown.is_entered.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Looks after the pins of all that was entered, for ever: one that expiry took for dead is renewed, and one that
    /// could not be had is asked for again.
    pub(crate) async fn care_for_pins(&self) {
        loop {
            tokio::time::sleep(PIN_CARE).await;
            let entered = |shown: &&Arc<Shown>| shown.is_entered.load(Ordering::Acquire);
            let all: Vec<_> = lock(&self.shown).iter().filter(entered).cloned().collect();
            for shown in all {
                if let Err(error) = self.renew(&shown).await {
                    self.tell(&format!("the pin of {}", shown.snapshot.id), error.as_ref());
                }
            }
        }
    }

    async fn renew(&self, shown: &Shown) -> Result<()> {
        let mut pin = shown.pin.lock().await;
        if let Some(held) = pin.as_ref() {
            if held.holds().await? {
                return Ok(());
            }
            tracing::warn!(snapshot = %shown.snapshot.id, "expiry took this mount for dead; it registers again");
        }
        *pin = self.repository.pin(&shown.snapshot).await?;
        Ok(())
    }

    /// Ends all pins.
    pub(crate) async fn release(&self) {
        let all: Vec<_> = lock(&self.shown).clone();
        for shown in all {
            if let Some(pin) = shown.pin.lock().await.take() {
                pin.release().await;
            }
        }
    }

    /// Tells a failure, unless it was told before.
    fn tell(&self, what: &str, error: &(dyn Error + 'static)) {
        let mut text = format!("lifeboat: {}: {error}", output::path(what.as_bytes()));
        let mut cause = error.source();
        while let Some(error) = cause {
            let said = error.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            cause = error.source();
        }
        let hash =
            std::hash::BuildHasher::hash_one(&std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::new(), &text);
        let is_new = {
            let mut told = lock(&self.told);
            if told.len() >= MAX_TOLD {
                told.clear();
            }
            told.insert(hash)
        };
        if is_new {
            self.failures.fetch_add(1, Ordering::Relaxed);
            complain!("{text}");
        }
    }

    /// Tells that something of a snapshot cannot be read; what the kernel is answered.
    fn fail(&self, shown: &Shown, path: &[u8], error: &TreeError) -> Errno {
        let id = shown.snapshot.id.to_string();
        self.tell(&format!("{}:/{}", &id[..12], output::path(path)), error);
        Errno::EIO
    }

    /// The snapshot and the entry that a number means. Hard links are resolved.
    async fn entry(&self, number: u64) -> Result<(Arc<Shown>, Found), Errno> {
        let number = match Number::from_u64(number) {
            Number::Above(ROOT) if self.is_single => None,
            Number::Above(_) => return Err(Errno::EINVAL),
            Number::Entry { snapshot, position } => Some((snapshot, position)),
        };
        let shown = self.enter(number.map_or(0, |(snapshot, _)| snapshot)).await?;
        let found = match number {
            Some((_, position)) => shown.tree.at(position).await,
            None => shown.tree.root().await.map(Some),
        };
        let found = found.map_err(|error| self.fail(&shown, b"", &error))?.ok_or(Errno::ESTALE)?;
        let found = self.resolve(&shown, found).await?;
        Ok((shown, found))
    }

    async fn enter(&self, number: u16) -> Result<Arc<Shown>, Errno> {
        let shown = self.shown(number).ok_or(Errno::ESTALE)?;
        if let Err(error) = self.pin(&shown).await {
            self.tell(&shown.snapshot.id.to_string(), error.as_ref());
            return Err(Errno::EIO);
        }
        Ok(shown)
    }

    async fn resolve(&self, shown: &Shown, found: Found) -> Result<Found, Errno> {
        let path = found.entry().path.clone();
        let missing = || TreeError::NotFound { path: "file that this is another name of".to_owned() };
        let resolved = shown.tree.resolve(found).await.and_then(|file| file.ok_or_else(missing));
        resolved.map_err(|error| self.fail(shown, &path, &error))
    }

    /// What an entry is to the kernel; hard links are resolved before.
    async fn item(&self, shown: &Shown, found: &Found) -> Result<Item, Errno> {
        let is_root = self.is_single && found.entry().path.is_empty();
        let number = if is_root {
            Number::Above(ROOT)
        } else {
            Number::Entry { snapshot: shown.number, position: found.position }
        };
        let number = number.to_u64().ok_or(Errno::EOVERFLOW)?;
        let entry = found.entry();
        let allocated = match &entry.kind {
            Kind::Regular(file) if file.sparse => {
                let starts = ListStarts::default();
                match shown.tree.reader(found, &starts) {
                    Ok(reader) => reader.allocated(MAX_LISTS_OF_STAT).await,
                    Err(error) => Err(error),
                }
            }
            _ => Ok(Some(entry.size())),
        };
        // What cannot be read of a file's content is told when the content is read.
        let attributes = attributes::of_entry(number, entry, allocated.unwrap_or(None));
        Ok(Item { number, attributes, name_for: FOREVER, attributes_for: FOREVER })
    }

    fn above(&self, number: u64) -> Result<Item, Errno> {
        let listed = lock(&self.listed);
        let link = match listed.layout.get(number).ok_or(Errno::ENOENT)? {
            Node::Link(target) => Some(target.as_str()),
            Node::Folder { .. } => None,
        };
        let attributes = attributes::above(number, link, listed.layout.changed, self.owner);
        Ok(Item { number, attributes, name_for: SHORT, attributes_for: SHORT })
    }

    async fn child(&self, child: Child) -> Result<Item, Errno> {
        match child {
            Child::Above(number) => self.above(number),
            // A look from outside: nothing is pinned for it, so that a listing of all pins none.
            Child::Snapshot(number) => {
                let shown = self.shown(number).ok_or(Errno::ESTALE)?;
                let root = shown.tree.root().await.map_err(|error| self.fail(&shown, b"", &error))?;
                Ok(Item { name_for: SHORT, ..self.item(&shown, &root).await? })
            }
        }
    }

    /// As [`Self::child`], for a listing: nothing is read for it, so the kernel must ask again before it relies on it.
    fn listed_child(&self, child: Child) -> Result<Item, Errno> {
        let number = match child {
            Child::Above(number) => return self.above(number),
            Child::Snapshot(number) => number,
        };
        let shown = self.shown(number).ok_or(Errno::ESTALE)?;
        let number = Number::root(number).to_u64().ok_or(Errno::EOVERFLOW)?;
        let attributes = attributes::above(number, None, shown.snapshot.time, self.owner);
        Ok(Item { number, attributes, name_for: Duration::ZERO, attributes_for: Duration::ZERO })
    }

    fn is_above(&self, number: u64) -> bool {
        matches!(Number::from_u64(number), Number::Above(_)) && !self.is_single
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
