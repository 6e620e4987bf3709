//! `lifeboat backup`

use std::sync::Arc;

use anyhow::{Context, Result};
use lifeboat_repository::{
    backup::{
        self, TreeBackup,
        image::{self, Audit, Known},
    },
    progress::Progress,
    repository::Repository,
    snapshot::{Content, Snapshot},
};
use serde_json::json;

use super::snapshots;
use crate::output::{complain, say};
use crate::{
    options::{Backup, DONE, Global, INCOMPLETE},
    output, progress, repository,
};

/// Backs up a folder or an image. Files that could not be read are listed and make the exit code 3.
pub(crate) async fn run(global: &Global, options: Backup) -> Result<u8> {
    let root = options.path.canonicalize().with_context(|| format!("cannot find {}", options.path.display()))?;
    let repository = repository::open(global).await?;
    let lineage = options.lineage.unwrap_or_else(|| format!("{}:{}", host(), root.display()));
    let parent = if options.force { None } else { latest(&repository, &lineage).await? };
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let plan = TreeBackup {
        lineage,
        tags: options.tag.into_iter().collect(),
        parent,
        excludes: options.exclude,
        one_file_system: options.one_file_system,
        host: host(),
        compression: options.compression,
    };
    let (snapshot, skipped) = if options.image {
        let device = image::open(&root).with_context(|| format!("cannot open {}", root.display()))?;
        let known = if options.force { Known::Nothing } else { image::known_of(&device)? };
        let report = image::image(&repository, device, known, Audit::Off, plan, shown).await?;
        (report.snapshot, Vec::new())
    } else {
        let report = backup::tree(&repository, &root, plan, shown).await?;
        (report.snapshot, report.skipped)
    };
    drop(display);
    let snapshot = &snapshot;
    let skipped: Vec<_> = skipped.iter().map(|s| (output::path(&s.path), s.reason.to_string())).collect();
    if global.json {
        let mut value = snapshots::as_json(snapshot);
        value["skipped"] = skipped.iter().map(|(path, reason)| json!({"path": path, "reason": reason})).collect();
        say!("{value}");
    } else {
        for (path, reason) in &skipped {
            complain!("not read: {path}: {reason}");
        }
        if !global.quiet {
            say!(
                "snapshot {}: {} files, {}; {} read, {} new, {} stored, {:.1} s",
                &snapshot.id.to_string()[..12],
                snapshot.counts.files,
                output::bytes(snapshot.counts.bytes),
                output::bytes(snapshot.stats.read_bytes),
                output::bytes(snapshot.stats.new_bytes),
                output::bytes(snapshot.stats.stored_bytes),
                std::time::Duration::from_millis(snapshot.stats.duration_ms).as_secs_f32(),
            );
        }
    }
    Ok(if skipped.is_empty() { DONE } else { INCOMPLETE })
}

async fn latest(repository: &Repository, lineage: &str) -> Result<Option<Snapshot>> {
    let found = repository.snapshots().await?;
    Ok(found.into_iter().rfind(|s| s.lineage == lineage && matches!(s.content, Content::Tree { .. })))
}

fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}
