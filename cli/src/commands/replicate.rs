//! `lifeboat replicate`

use std::sync::Arc;

use anyhow::{Context, Result};
use jiff::{Timestamp, tz::TimeZone};
use lifeboat_repository::{
    keys::Secret,
    progress::Progress,
    replicate::{ReplicateOptions, ReplicateReport, replicate},
    repository::{OpenError, OpenOptions, Repository},
};
use serde_json::json;

use crate::output::say;
use crate::{
    options::{DONE, Global, Replicate},
    output, progress, repository,
};

/// Copies what the other repository lacks of what was chosen.
pub(crate) async fn run(global: &Global, options: &Replicate) -> Result<u8> {
    let given = repository::secret_from(
        options.to_key_file.as_deref(),
        options.to_password_file.as_deref(),
        options.to_password.as_deref(),
    )?;
    let secret = given.map_or_else(|| repository::secret(global), Ok)?;
    let source = repository::open(global).await?;
    let target = target(global, options, &source, &secret).await?;
    let mut snapshots = Vec::new();
    for wanted in &options.snapshots {
        snapshots.push(source.find(wanted).await?.id);
    }
    let plan = ReplicateOptions {
        snapshots,
        lineages: options.lineage.clone(),
        tags: options.tag.clone(),
        newer_than: options.max_age.map(since).transpose()?,
        newest: options.newest,
        dry_run: options.dry_run,
    };
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let report = replicate(&source, &target, plan, shown).await?;
    drop(display);
    print(global, options, &report);
    Ok(DONE)
}

async fn target(global: &Global, options: &Replicate, source: &Repository, secret: &Secret) -> Result<Repository> {
    let store = repository::store_at(&options.to)?;
    let open = OpenOptions { cache_dir: global.cache_dir.clone() };
    match Repository::open(Arc::clone(&store), secret, open).await {
        Err(OpenError::NoRepository { .. }) if options.init && !options.dry_run => {
            source.init_replica(store, secret).await.context("cannot make the other repository")
        }
        Err(OpenError::NoRepository { store }) => {
            anyhow::bail!("there is no repository in {store}; write --init to make one with the keys of this one")
        }
        opened => opened.context("cannot open the other repository"),
    }
}

fn since(age: jiff::Span) -> Result<Timestamp> {
    let now = Timestamp::now().to_zoned(TimeZone::UTC);
    Ok(now.checked_sub(age.abs()).context("the age is out of range")?.timestamp())
}

fn print(global: &Global, options: &Replicate, report: &ReplicateReport) {
    if global.json {
        let copied: Vec<_> = report
            .copied
            .iter()
            .map(|copied| {
                json!({
                    "source": copied.source.to_string(),
                    "replica": copied.replica.map(|id| id.to_string()),
                    "readBytes": copied.read_bytes,
                    "newBytes": copied.new_bytes,
                    "storedBytes": copied.stored_bytes,
                })
            })
            .collect();
        let passed_over: Vec<_> = report.passed_over.iter().map(ToString::to_string).collect();
        let expired: Vec<_> = report.expired.iter().map(ToString::to_string).collect();
        say!("{}", json!({"copied": copied, "present": report.present, "passedOver": passed_over, "expired": expired}));
        return;
    }
    if global.quiet {
        return;
    }
    let short = |id: String| id[..12].to_owned();
    for copied in &report.copied {
        match copied.replica {
            Some(replica) => say!(
                "{} -> {}: {} read, {} new, {} stored",
                short(copied.source.to_string()),
                short(replica.to_string()),
                output::bytes(copied.read_bytes),
                output::bytes(copied.new_bytes),
                output::bytes(copied.stored_bytes)
            ),
            None => say!("{} would be replicated", short(copied.source.to_string())),
        }
    }
    say!(
        "{} {}, {} were there, {} older ones passed over, {} were forgotten meanwhile",
        report.copied.len(),
        if options.dry_run { "to replicate" } else { "replicated" },
        report.present,
        report.passed_over.len(),
        report.expired.len()
    );
}
