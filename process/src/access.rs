//! From a `ClusterRepository`'s words to an open repository: Secrets are read, checked and never shown.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret as SecretObject;
use kube::{Api, Client};
use lifeboat_crds::cluster_repository::{Backend, SecretRef};
use lifeboat_crds::conditions::Reason;
use lifeboat_repository::error::Classified;
use lifeboat_repository::keys::Secret;
use lifeboat_repository::repository::{InitError, InitOptions, OpenError, OpenOptions, Repository};
use lifeboat_repository::store::{self, Location, S3Settings, Store};
use tokio::sync::Mutex;

use crate::reasons;
use crate::telemetry::chain;

/// Keys of the credentials Secret.
const ACCESS_KEY: &str = "AWS_ACCESS_KEY_ID";
const SECRET_KEY: &str = "AWS_SECRET_ACCESS_KEY";
/// Key of the encryption Secret.
const PASSWORD: &str = "password";
/// Open repositories that are kept: opening costs an Argon2 run.
const KEPT: usize = 32;

/// Why a repository cannot be opened, in the words of a condition.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct AccessError {
    /// The condition's reason.
    pub reason: Reason,
    /// What is wrong and what to do.
    pub message: String,
}

impl AccessError {
    fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// From an error of the repository crate.
    pub fn from_repository<E: Classified + std::error::Error>(error: &E) -> Self {
        let reason = reasons::of_class(error.class());
        Self::new(reason, format!("{}{}", chain(error), reasons::advice(reason)))
    }
}

/// Names the Secrets that an error is about.
fn name_secrets(mut error: AccessError, namespace: &str, backend: &Backend, encryption: &SecretRef) -> AccessError {
    let secret = match (error.reason, backend) {
        (Reason::WrongKey, _) => &encryption.name,
        (Reason::AccessDenied, Backend::S3(s3)) => &s3.credentials.secret_ref.name,
        _ => return error,
    };
    error.message = format!("{} (Secret {namespace}/{secret})", error.message);
    error
}

impl From<InitError> for AccessError {
    fn from(error: InitError) -> Self {
        match &error {
            InitError::Probe(_) if error.class() == lifeboat_repository::error::ErrorClass::Unsupported => {
                Self::new(Reason::StoreUnsuitable, chain(&error))
            }
            _ => Self::from_repository(&error),
        }
    }
}

type Data = BTreeMap<String, ByteString>;

/// Opens repositories with the Secrets of Lifeboat's namespace, and keeps them open.
#[derive(Debug)]
pub struct RepositoryAccess {
    client: DebugClient,
    namespace: String,
    cache_dir: Option<PathBuf>,
    open: Mutex<HashMap<[u8; 32], Repository>>,
}

/// A client says nothing useful about itself.
struct DebugClient(Client);

impl std::fmt::Debug for DebugClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl RepositoryAccess {
    /// `namespace` is the one that Lifeboat is installed in.
    pub fn new(client: Client, namespace: String, cache_dir: Option<PathBuf>) -> Self {
        Self { client: DebugClient(client), namespace, cache_dir, open: Mutex::default() }
    }

    async fn secret(&self, reference: &SecretRef) -> Result<Data, AccessError> {
        let api: Api<SecretObject> = Api::namespaced(self.client.0.clone(), &self.namespace);
        let (name, namespace) = (&reference.name, &self.namespace);
        match api.get_opt(name).await {
            Ok(Some(secret)) => Ok(secret.data.unwrap_or_default()),
            Ok(None) => Err(AccessError::new(
                Reason::SecretNotFound,
                format!("the Secret {namespace}/{name} does not exist; create it"),
            )),
            Err(error) => Err(AccessError::new(
                Reason::InternalError,
                format!("cannot read the Secret {namespace}/{name}: {error}"),
            )),
        }
    }

    fn text(&self, reference: &SecretRef, data: &Data, key: &str) -> Result<String, AccessError> {
        let refuse = |what: &str| {
            let (namespace, name) = (&self.namespace, &reference.name);
            AccessError::new(
                Reason::SecretInvalid,
                format!("the Secret {namespace}/{name} {what} the key {key}; set it"),
            )
        };
        let value = data.get(key).ok_or_else(|| refuse("lacks"))?;
        let text = std::str::from_utf8(&value.0).map_err(|_| refuse("has bytes that are not UTF-8 under"))?;
        // A line end at the end comes from `kubectl create secret --from-file`, not from the service.
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() { Err(refuse("has nothing under")) } else { Ok(text.to_owned()) }
    }

    async fn location(&self, backend: &Backend) -> Result<Location, AccessError> {
        match backend {
            Backend::Filesystem(folder) => Ok(Location::Local(folder.path.clone().into())),
            Backend::S3(s3) => {
                let reference = &s3.credentials.secret_ref;
                let data = self.secret(reference).await?;
                Ok(Location::S3(S3Settings {
                    bucket: s3.bucket.clone(),
                    prefix: s3.prefix.clone().unwrap_or_default(),
                    endpoint: s3.endpoint.clone(),
                    region: s3.region.clone(),
                    access_key: Some(self.text(reference, &data, ACCESS_KEY)?),
                    secret_key: Some(self.text(reference, &data, SECRET_KEY)?),
                    ..S3Settings::default()
                }))
            }
        }
    }

    /// The repository with this id, opened. `None` for the id accepts any.
    pub async fn open(
        &self,
        backend: &Backend,
        encryption: &SecretRef,
        id: Option<&str>,
    ) -> Result<Repository, AccessError> {
        let opened = self.open_kept(backend, encryption, id).await;
        opened.map_err(|error| name_secrets(error, &self.namespace, backend, encryption))
    }

    async fn open_kept(
        &self,
        backend: &Backend,
        encryption: &SecretRef,
        id: Option<&str>,
    ) -> Result<Repository, AccessError> {
        let (store, secret, key) = self.parts(backend, encryption).await?;
        let kept = self.open.lock().await.get(&key).cloned();
        let repository = if let Some(repository) = kept {
            repository
        } else {
            let options = OpenOptions { cache_dir: self.cache_dir.clone() };
            let opened = Repository::open(store, &secret, options)
                .await
                .map_err(|error| AccessError::from_repository(&error))?;
            self.keep(key, &opened).await;
            opened
        };
        let found = repository.id().to_string();
        match id {
            Some(id) if id != found => Err(AccessError::new(
                Reason::RepositoryDamaged,
                format!(
                    "the location holds the repository {found}, not {id}; somebody replaced it: correct the location or create another ClusterRepository"
                ),
            )),
            _ => Ok(repository),
        }
    }

    /// The repository, opened; made when the location is empty. Always asks the store.
    pub async fn open_or_init(&self, backend: &Backend, encryption: &SecretRef) -> Result<Repository, AccessError> {
        let opened = self.open_or_make(backend, encryption).await;
        opened.map_err(|error| name_secrets(error, &self.namespace, backend, encryption))
    }

    async fn open_or_make(&self, backend: &Backend, encryption: &SecretRef) -> Result<Repository, AccessError> {
        let (store, secret, key) = self.parts(backend, encryption).await?;
        let options = OpenOptions { cache_dir: self.cache_dir.clone() };
        let opened = match Repository::open(Arc::clone(&store), &secret, options.clone()).await {
            Err(OpenError::NoRepository { .. }) => {
                match Repository::init(Arc::clone(&store), &secret, InitOptions::default()).await {
                    // Another replica or cluster made it at the same time.
                    Err(InitError::Exists { .. }) => Repository::open(store, &secret, options).await,
                    made => return self.keep_made(key, made?).await,
                }
            }
            opened => opened,
        };
        let opened = opened.map_err(|error| AccessError::from_repository(&error))?;
        self.keep(key, &opened).await;
        Ok(opened)
    }

    async fn keep_made(&self, key: [u8; 32], made: Repository) -> Result<Repository, AccessError> {
        self.keep(key, &made).await;
        Ok(made)
    }

    async fn keep(&self, key: [u8; 32], repository: &Repository) {
        let mut open = self.open.lock().await;
        if open.len() >= KEPT {
            open.clear();
        }
        open.insert(key, repository.clone());
    }

    /// Store, secret, and a fingerprint of everything that they depend on.
    async fn parts(
        &self,
        backend: &Backend,
        encryption: &SecretRef,
    ) -> Result<(Arc<dyn Store>, Secret, [u8; 32]), AccessError> {
        let location = self.location(backend).await?;
        let data = self.secret(encryption).await?;
        let password = self.text(encryption, &data, PASSWORD)?;
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        add(&password);
        match &location {
            Location::Local(path) => add(&path.to_string_lossy()),
            Location::S3(s3) => {
                add(&s3.describe());
                for text in [&s3.region, &s3.access_key, &s3.secret_key] {
                    add(text.as_deref().unwrap_or_default());
                }
            }
        }
        let store = store::open(&location).map_err(|error| AccessError::new(Reason::InvalidSpec, chain(&error)))?;
        Ok((store, Secret::passphrase(password), *hasher.finalize().as_bytes()))
    }
}
