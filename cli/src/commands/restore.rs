//! `lifeboat restore`

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use lifeboat_repository::{
    progress::Progress,
    repository::Repository,
    restore::{self, Existing, RestoreOptions},
    snapshot::{Content, Snapshot},
    tree,
};
use serde_json::json;

use super::ls;
use crate::output::{complain, say};
use crate::{
    options::{DONE, Global, INCOMPLETE, Restore},
    output, progress, repository,
};

/// Restores a snapshot into a folder. What could not be restored is listed and makes the exit code 3.
pub(crate) async fn run(global: &Global, options: &Restore) -> Result<u8> {
    let repository = repository::open(global).await?;
    let snapshot = find(&repository, &options.snapshot, options.lineage.as_deref()).await?;
    if let Content::RecoveryPoint { members, .. } = &snapshot.content {
        let members: Vec<_> = members.iter().map(|id| id.to_string()[..12].to_owned()).collect();
        bail!(
            "{} is a recovery point of several snapshots; restore them one by one: {}",
            options.snapshot,
            members.join(", ")
        );
    }
    if options.dry_run {
        return preview(global, &repository, &snapshot, &options.include).await;
    }
    if options.image {
        return onto(global, &repository, &snapshot, &options.target).await;
    }
    std::fs::create_dir_all(&options.target)
        .with_context(|| format!("cannot make the folder {}", options.target.display()))?;
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let plan = RestoreOptions {
        select: options.include.clone(),
        existing: if options.overwrite { Existing::Overwrite } else { Existing::Fail },
        owner: !options.no_owner,
        ..RestoreOptions::default()
    };
    let report = restore::tree(&repository, &snapshot, &options.target, plan, shown).await?;
    drop(display);
    let failed: Vec<_> = report.failed.iter().map(|f| (output::path(&f.path), f.to_string())).collect();
    if global.json {
        let failed: Vec<_> = failed.iter().map(|(path, reason)| json!({"path": path, "reason": reason})).collect();
        say!("{}", json!({"snapshot": snapshot.id.to_string(), "counts": report.counts, "failed": failed}));
    } else {
        for (path, reason) in &failed {
            complain!("not restored in full: {path}: {reason}");
        }
        if !global.quiet {
            say!(
                "restored {} files, {} directories, {} others, {} into {}",
                report.counts.files,
                report.counts.directories,
                report.counts.others,
                output::bytes(report.counts.bytes),
                options.target.display()
            );
        }
    }
    Ok(if failed.is_empty() { DONE } else { INCOMPLETE })
}

/// Restores an image onto a block device or a file.
async fn onto(global: &Global, repository: &Repository, snapshot: &Snapshot, target: &Path) -> Result<u8> {
    let mut open = OpenOptions::new();
    let device = open.read(true).write(true).create(true).truncate(false).open(target);
    let device = device.with_context(|| format!("cannot open {}", target.display()))?;
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let done = restore::image(repository, snapshot, device.into(), shown).await?;
    drop(display);
    if global.json {
        say!("{}", json!({"snapshot": snapshot.id.to_string(), "size": done.size, "written": done.written}));
    } else if !global.quiet {
        let (size, written) = (output::bytes(done.size), output::bytes(done.written));
        say!("restored an image of {size}, of which {written} are no holes, onto {}", target.display());
    }
    Ok(DONE)
}

/// Lists what would be restored.
async fn preview(global: &Global, repository: &Repository, snapshot: &Snapshot, include: &[String]) -> Result<u8> {
    let mut pages = tree::select(repository, snapshot, include).await?;
    let (mut entries, mut bytes) = (0u64, 0);
    while let Some(page) = pages.try_next().await? {
        for entry in page.iter().filter(|entry| !entry.path.is_empty()) {
            entries += 1;
            bytes += entry.size();
            ls::print(global, entry);
        }
    }
    if entries == 0 && !include.is_empty() {
        bail!("the snapshot has nothing that fits {}", include.join(", "));
    }
    if !global.json && !global.quiet {
        say!("{entries} entries, {} would be restored", output::bytes(bytes));
    }
    Ok(DONE)
}

/// The snapshot meant: an id, its first characters, or `latest` of all trees or of one lineage.
pub(crate) async fn find(repository: &Repository, wanted: &str, lineage: Option<&str>) -> Result<Snapshot> {
    if wanted != "latest" {
        return Ok(repository.find(wanted).await?);
    }
    let found = repository.snapshots().await?;
    let newest = found
        .into_iter()
        .rfind(|s| matches!(s.content, Content::Tree { .. }) && lineage.is_none_or(|l| s.lineage == l));
    newest.context("there is no such snapshot; `lifeboat snapshots` lists what there is")
}
