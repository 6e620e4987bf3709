//! `lifeboat init`

use anyhow::Result;
use lifeboat_repository::repository::{InitOptions, Repository};
use serde_json::json;

use crate::output::say;
use crate::{
    options::{DONE, Global},
    repository,
};

/// Makes a repository. Fails when the location holds one already.
pub(crate) async fn run(global: &Global) -> Result<u8> {
    let store = repository::store(global)?;
    let secret = repository::secret(global)?;
    let made = Repository::init(store, &secret, InitOptions::default()).await?;
    if global.json {
        say!("{}", json!({"id": made.id().to_string()}));
    } else if !global.quiet {
        say!("made the repository {}", made.id());
        say!("Keep its password or key in a safe place elsewhere: without it no backup can be read.");
    }
    Ok(DONE)
}
