//! `lifeboat cat`

use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use lifeboat_repository::tree;

use super::restore::find;
use crate::{
    options::{Cat, DONE, Global},
    repository,
};

/// Prints one file; only what holds it is read.
pub(crate) async fn run(global: &Global, options: &Cat) -> Result<u8> {
    let repository = repository::open(global).await?;
    let snapshot = find(&repository, &options.snapshot, options.lineage.as_deref()).await?;
    let mut pieces = tree::read_file(&repository, &snapshot, &options.path).await?;
    let mut out = std::io::stdout().lock();
    while let Some(piece) = pieces.try_next().await? {
        match out.write_all(&piece) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(DONE),
            written => written.context("cannot write to the standard output")?,
        }
    }
    out.flush().context("cannot write to the standard output")?;
    Ok(DONE)
}
