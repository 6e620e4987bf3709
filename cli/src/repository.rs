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
    let location = Location::parse(text)?;
    Ok(store::open(&location)?)
}

/// The password or key that the arguments give.
pub(crate) fn secret(global: &Global) -> Result<Secret> {
    if let Some(file) = &global.key_file {
        let bytes = std::fs::read(file).with_context(|| format!("cannot read the key file {}", file.display()))?;
        let key: [u8; 32] = bytes.try_into().map_err(|bytes: Vec<u8>| {
            anyhow::anyhow!(
                "the key file {} has {} bytes; 32 are needed: head -c 32 /dev/urandom > FILE",
                file.display(),
                bytes.len()
            )
        })?;
        return Ok(Secret::key_file(key));
    }
    if let Some(file) = &global.password_file {
        return password_from(file);
    }
    match &global.password {
        Some(password) if !password.is_empty() => Ok(Secret::passphrase(password.clone())),
        _ => bail!("no password given; set LIFEBOAT_PASSWORD, LIFEBOAT_PASSWORD_FILE or LIFEBOAT_KEY_FILE"),
    }
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
