//! A repository: made by `init`, opened with a secret, then read and written.

use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tracing::info;

use crate::cache::ObjectCache;
use crate::commits::{CommitLog, CommitLogError};
use crate::config::{CONFIG_KEY, ChunkerConfig, Config, ConfigError, MAX_CONFIG_BYTES};
use crate::crypto::CryptoError;
use crate::directories::Directories;
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::expire::marks::MarkKey;
use crate::heal::Lost;
use crate::id::{RepositoryId, SessionId, SnapshotId};
use crate::index::Index;
use crate::keyring::KeyRing;
use crate::keys::{DomainKeys, KEYS_PREFIX, Secret, SecretError, Slot, Slots};
use crate::read::{ReadError, Reader};
use crate::session::decision::{Decision, MAX_DECISION_BYTES, decision_key};
use crate::session::{Session, SessionError, SessionOptions};
use crate::snapshot::Snapshot;
use crate::store::{self, ProbeError, Store, StoreError};

/// How a repository is made.
#[derive(Debug, Clone, Default)]
pub struct InitOptions {
    /// How files are cut.
    pub chunker: ChunkerConfig,
}

/// How a repository is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Keeps copies of small objects between runs; nothing secret in plain form lies there.
    pub cache_dir: Option<PathBuf>,
}

/// Why no repository was made.
#[derive(Debug, Error)]
pub enum InitError {
    /// There is one.
    #[error("{store} holds a repository already")]
    Exists {
        /// The store.
        store: String,
    },
    /// The store cannot hold a repository.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The store failed.
    #[error("cannot make a repository")]
    Store(#[from] StoreError),
    /// The secret protects nothing.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The keys cannot be sealed.
    #[error("the keys cannot be sealed")]
    Crypto(#[from] CryptoError),
    /// A replica by a writer could be read by nobody.
    #[error("this key can write but not read data; a replica with the same keys needs one that reads")]
    NoPrivateKey,
    /// The config cannot be written down.
    #[error("the config cannot be encoded")]
    Config(#[from] serde_json::Error),
    /// What was made does not open.
    #[error("the new repository does not open")]
    Open(#[source] Box<OpenError>),
}

impl Classified for InitError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Exists { .. } => ErrorClass::Conflict,
            Self::Probe(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Secret(_) | Self::NoPrivateKey => ErrorClass::Key,
            Self::Crypto(_) | Self::Config(_) => ErrorClass::Local,
            Self::Open(error) => error.class(),
        }
    }
}

/// Why a repository does not open.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Nothing there.
    #[error("there is no repository in {store}; make one with `lifeboat init`, or correct the location")]
    NoRepository {
        /// The store.
        store: String,
    },
    /// The config cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No key slot opens with the secret.
    #[error("the password or key does not open the repository in {store}")]
    WrongSecret {
        /// The store.
        store: String,
    },
    /// A key slot is there, but none is usable.
    #[error("the repository in {store} has no usable key slot ({damaged} are damaged)")]
    NoSlot {
        /// The store.
        store: String,
        /// Damaged slots.
        damaged: usize,
    },
    /// The store failed.
    #[error("cannot open the repository")]
    Store(#[from] StoreError),
    /// The secret protects nothing.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A worker thread failed.
    #[error("a worker thread failed")]
    Worker(#[from] tokio::task::JoinError),
}

impl Classified for OpenError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::NoRepository { .. } => ErrorClass::NotFound,
            Self::Config(ConfigError::Damaged(_)) | Self::NoSlot { .. } => ErrorClass::Damaged,
            Self::Config(_) => ErrorClass::Unsupported,
            Self::WrongSecret { .. } | Self::Secret(_) => ErrorClass::Key,
            Self::Store(error) => error.class(),
            Self::Worker(_) => ErrorClass::Local,
        }
    }
}

/// Why a snapshot was not found.
#[derive(Debug, Error)]
pub enum FindError {
    /// The list of snapshots cannot be read.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// No snapshot has this name.
    #[error("no snapshot {wanted:?}; see `lifeboat snapshots`")]
    None {
        /// What was asked for.
        wanted: String,
    },
    /// Several have.
    #[error("{count} snapshots begin with {wanted:?}; write more digits")]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// How many.
        count: usize,
    },
    /// Too short or no hexadecimal number.
    #[error("{wanted:?} is no snapshot id: write `latest` or at least 4 hexadecimal digits")]
    Malformed {
        /// What was asked for.
        wanted: String,
    },
}

impl Classified for FindError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log(error) => error.class(),
            Self::None { .. } => ErrorClass::NotFound,
            Self::Ambiguous { .. } | Self::Malformed { .. } => ErrorClass::Invalid,
        }
    }
}

/// What became of a session that was to be aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortOutcome {
    /// It is aborted now, or was before.
    Aborted,
    /// It had committed: its snapshots exist.
    Committed,
}

/// An open repository. Clones share everything.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) engine: Arc<Engine>,
}

impl Repository {
    /// Makes a repository in an empty store and opens it.
    ///
    /// Of two that try at once, one wins and the other gets [`InitError::Exists`].
    pub async fn init(store: Arc<dyn Store>, secret: &Secret, options: InitOptions) -> Result<Self, InitError> {
        Self::init_with(store, secret, options, &DomainKeys::random()).await
    }

    /// As [`Self::init`], with the keys of this repository: a chunk has the same id in both, so that a replication need
    /// not read what the other has. Whoever opens one can open the other. Needs a key that reads data.
    pub async fn init_replica(&self, store: Arc<dyn Store>, secret: &Secret) -> Result<Self, InitError> {
        let domain = self.engine.keys.domain();
        if domain.private.is_none() {
            return Err(InitError::NoPrivateKey);
        }
        let options = InitOptions { chunker: self.config().chunker.clone() };
        Self::init_with(store, secret, options, domain).await
    }

    async fn init_with(
        store: Arc<dyn Store>,
        secret: &Secret,
        options: InitOptions,
        domain: &DomainKeys,
    ) -> Result<Self, InitError> {
        secret.check()?;
        let exists = || InitError::Exists { store: store.describe() };
        match store.get(CONFIG_KEY, MAX_CONFIG_BYTES).await {
            Ok(_) => return Err(exists()),
            Err(error) if error.is_not_found() && error.reason != store::Reason::NoBucket => {}
            Err(error) => return Err(error.into()),
        }
        store::probe(&*store).await?;
        let config = Config::new(options.chunker);
        let bytes = config.to_bytes()?;
        let slot = Slot::seal(domain, secret, *blake3::hash(&bytes).as_bytes())?;
        let slot_key = format!("{KEYS_PREFIX}{}", SessionId::random());
        // The slot first: a config without a slot would be a repository that nobody can open.
        store.put_if_absent(&slot_key, slot.to_bytes().into()).await?;
        if !store.put_if_absent(CONFIG_KEY, bytes.into()).await?.is_ours() {
            store.delete(&slot_key).await?;
            return Err(exists());
        }
        info!(repository = %config.id, store = store.describe(), "made a repository");
        Self::open(store, secret, OpenOptions::default()).await.map_err(|error| InitError::Open(Box::new(error)))
    }

    /// Opens a repository with a secret of any of its key slots.
    pub async fn open(store: Arc<dyn Store>, secret: &Secret, options: OpenOptions) -> Result<Self, OpenError> {
        secret.check()?;
        let remembered = ObjectCache::of_location(options.cache_dir.as_deref(), &store.describe());
        let (config, slots) =
            tokio::join!(store.get(CONFIG_KEY, MAX_CONFIG_BYTES), Slots::find(Arc::clone(&store), remembered));
        let bytes = match config {
            Ok(bytes) => bytes,
            Err(error) if error.reason == store::Reason::NotFound => {
                return Err(OpenError::NoRepository { store: store.describe() });
            }
            Err(error) => return Err(error.into()),
        };
        let config = Config::parse(&bytes)?;
        let (domain, slot) = slots?.open(secret, blake3::hash(&bytes).as_bytes()).await?;
        let cache = ObjectCache::new(options.cache_dir.as_deref(), config.id);
        let keys = Arc::new(KeyRing::new(Arc::clone(&store), cache.clone(), domain, slot));
        Ok(Self {
            engine: Arc::new(Engine {
                index: Index::new(Arc::clone(&store), cache.clone(), MarkKey::new(keys.domain().structure.bytes())),
                directories: Directories::new(Arc::clone(&store), Arc::clone(&keys)),
                commits: CommitLog::new(Arc::clone(&store), cache.clone(), Arc::clone(&keys)),
                lost: Lost::default(),
                cache,
                keys,
                config,
                store,
            }),
        })
    }

    /// The repository's name.
    pub fn id(&self) -> RepositoryId {
        self.engine.config.id
    }

    /// What it is.
    pub fn config(&self) -> &Config {
        &self.engine.config
    }

    /// Every committed snapshot that is not forgotten, oldest first.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, CommitLogError> {
        self.engine.commits.refresh().await?;
        Ok(self.known_snapshots())
    }

    /// As [`Self::snapshots`], without those whose commits are damaged; these come second.
    pub async fn readable_snapshots(&self) -> Result<(Vec<Snapshot>, Vec<CommitLogError>), CommitLogError> {
        let damaged = self.engine.commits.refresh_readable().await?;
        Ok((self.known_snapshots(), damaged))
    }

    /// Those that the last look found.
    pub(crate) fn known_snapshots(&self) -> Vec<Snapshot> {
        let forgotten = self.engine.commits.all_forgotten();
        let all = self.engine.commits.all();
        let snapshots = all.iter().flat_map(|(_, committed)| &committed.commit.snapshots);
        let mut snapshots: Vec<_> = snapshots.filter(|snapshot| !forgotten.contains(&snapshot.id)).cloned().collect();
        snapshots.sort_by_key(|snapshot| (snapshot.time, snapshot.id));
        snapshots
    }

    /// The newest snapshot of a lineage.
    pub async fn latest_of(&self, lineage: &str) -> Result<Option<Snapshot>, CommitLogError> {
        Ok(self.snapshots().await?.into_iter().rfind(|snapshot| snapshot.lineage == lineage))
    }

    /// The snapshot with this id or unique prefix of at least four digits; `latest` is the newest of all.
    ///
    /// Damaged commits are in nobody's way who names a snapshot; without them nobody can say which is the latest.
    pub async fn find(&self, wanted: &str) -> Result<Snapshot, FindError> {
        let none = || FindError::None { wanted: wanted.chars().take(80).collect() };
        if wanted == "latest" {
            return self.snapshots().await?.pop().ok_or_else(none);
        }
        let is_id = (4..=32).contains(&wanted.len())
            && wanted.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !is_id {
            return Err(FindError::Malformed { wanted: wanted.chars().take(80).collect() });
        }
        let (mut snapshots, mut damaged) = self.readable_snapshots().await?;
        snapshots.retain(|snapshot| snapshot.id.to_string().starts_with(wanted));
        if let (true, Some(error)) = (snapshots.is_empty(), damaged.pop()) {
            return Err(error.into());
        }
        match snapshots.len() {
            0 | 1 => snapshots.pop().ok_or_else(none),
            count => Err(FindError::Ambiguous { wanted: wanted.to_owned(), count }),
        }
    }

    /// The snapshots with these ids, in their order.
    pub async fn find_all(&self, ids: &[SnapshotId]) -> Result<Vec<Snapshot>, FindError> {
        let snapshots = self.snapshots().await?;
        ids.iter()
            .map(|id| {
                snapshots
                    .iter()
                    .find(|snapshot| snapshot.id == *id)
                    .cloned()
                    .ok_or_else(|| FindError::None { wanted: id.to_string() })
            })
            .collect()
    }

    /// Registers a writing session.
    pub async fn begin(&self, options: SessionOptions) -> Result<Arc<Session>, SessionError> {
        Session::begin(Arc::clone(&self.engine), options).await
    }

    /// Decides that a session of a dead writer is aborted, unless it committed before it died.
    pub async fn abort_session(&self, session: SessionId, reason: &str) -> Result<AbortOutcome, SessionError> {
        let key = decision_key(session);
        let fail = |source| SessionError::Store { session, act: "abort it", source: Arc::new(source) };
        let bytes = Decision::abort_bytes(session, reason);
        let store = &self.engine.store;
        let outcome = store.put_if_absent(&key, bytes.into()).await.map_err(fail)?;
        self.engine.remove_heartbeats(session).await;
        if outcome.is_ours() {
            return Ok(AbortOutcome::Aborted);
        }
        let decided = store.get(&key, MAX_DECISION_BYTES).await.map_err(fail)?;
        Ok(match Decision::parse(session, &decided) {
            Ok(Decision::Abort(_)) => AbortOutcome::Aborted,
            _ => AbortOutcome::Committed,
        })
    }

    /// Gives chunks back. Data needs the private key; manifests do not.
    pub fn reader(&self) -> Result<Arc<Reader>, ReadError> {
        Ok(Arc::new(Reader::new(Arc::clone(&self.engine))))
    }

    /// As [`Self::reader`], for the manifest of a parent: what this machine wrote itself need not be fetched again.
    pub(crate) fn parent_reader(&self) -> Arc<Reader> {
        Arc::new(Reader::by_cache(Arc::clone(&self.engine)))
    }
}
