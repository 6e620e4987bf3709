//! Opens the repository that the arguments name.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail};
use lifeboat_repository::{
    keys::Secret,
    repository::{OpenOptions, Repository},
    store::{self, Location, Store},
};

use crate::options::Global;

/// The store at the location, with credentials from the environment.
pub(crate) fn store(global: &Global) -> Result<Arc<dyn Store>> {
    let Some(text) = &global.repository else {
        bail!("no repository given; set LIFEBOAT_REPOSITORY or write --repository LOCATION");
    };
    store_at(text)
}

/// The store at this location.
pub(crate) fn store_at(text: &str) -> Result<Arc<dyn Store>> {
    Ok(store::open(&Location::parse(text)?)?)
}

/// The password or key that the arguments give.
pub(crate) fn secret(global: &Global) -> Result<Secret> {
    let found = secret_from(global.key_file.as_deref(), global.password_file.as_deref(), global.password.as_deref())?;
    found.context("no password given; set LIFEBOAT_PASSWORD, LIFEBOAT_PASSWORD_FILE or LIFEBOAT_KEY_FILE")
}

/// A secret by the first of these that is given.
pub(crate) fn secret_from(
    key_file: Option<&Path>,
    password_file: Option<&Path>,
    password: Option<&str>,
) -> Result<Option<Secret>> {
    match (key_file, password_file, password) {
        (Some(file), _, _) => key_from(file).map(Some),
        (None, Some(file), _) => password_from(file).map(Some),
        (None, None, Some(password)) if !password.is_empty() => Ok(Some(Secret::passphrase(password.to_owned()))),
        _ => Ok(None),
    }
}

fn key_from(file: &Path) -> Result<Secret> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read the key file {}", file.display()))?;
    let key: [u8; 32] = bytes.try_into().map_err(|bytes: Vec<u8>| {
        anyhow::anyhow!(
            "the key file {} has {} bytes; 32 are needed: head -c 32 /dev/urandom > FILE",
            file.display(),
            bytes.len()
        )
    })?;
    Ok(Secret::key_file(key))
}

fn password_from(file: &Path) -> Result<Secret> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read the password file {}", file.display()))?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Secret::passphrase(line.to_owned())),
        _ => bail!("the first line of the password file {} is empty", file.display()),
    }
}

/// The repository, opened.
pub(crate) async fn open(global: &Global) -> Result<Repository> {
    let store = store(global)?;
    let secret = secret(global)?;
    let options = OpenOptions { cache_dir: global.cache_dir.clone() };
    Ok(Repository::open(store, &secret, options).await?)
}
