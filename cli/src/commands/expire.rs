//! `lifeboat expire`

use std::sync::Arc;

use anyhow::Result;
use lifeboat_repository::{
    expire::{ExpireOptions, ExpireReport},
    progress::Progress,
};
use serde_json::json;

use crate::output::say;
use crate::{
    options::{DONE, Expire, Global},
    output, progress, repository,
};

/// Deletes what no snapshot refers to any more. Backups that run are waited for, and otherwise left for the next time.
pub(crate) async fn run(global: &Global, options: &Expire) -> Result<u8> {
    let repository = repository::open(global).await?;
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let plan = ExpireOptions {
        silence: options.silence,
        patience: options.wait,
        repack_budget: options.repack_budget,
        dry_run: options.dry_run,
        ..ExpireOptions::default()
    };
    let report = repository.expire(plan, Arc::clone(&shown)).await?;
    drop(display);
    if global.json {
        say!("{}", as_json(&report, options.dry_run));
    } else if !global.quiet {
        print(&report, options.dry_run);
    }
    Ok(DONE)
}

fn print(report: &ExpireReport, dry_run: bool) {
    let would = if dry_run { "would be " } else { "" };
    say!(
        "{} packs, {}, {would}deleted; {} forgotten snapshots {would}removed",
        report.packs_deleted,
        output::bytes(report.bytes_deleted),
        report.snapshots_removed
    );
    if report.packs_repacked > 0 {
        say!("{} packs {would}repacked by copying {}", report.packs_repacked, output::bytes(report.bytes_copied));
    }
    if report.packs_left > 0 {
        say!("{} packs are mostly dead and left for the next time, or for a larger --repack-budget", report.packs_left);
    }
    if report.segments_merged > 0 {
        say!("{} segments of the index merged", report.segments_merged);
    }
    for session in &report.aborted {
        say!("the session {session} gave no sign of life and was aborted");
    }
    if !report.waiting_for.is_empty() {
        say!(
            "{} backups are running that began before; run `lifeboat expire` again when they are done",
            report.waiting_for.len()
        );
    }
    say!("{} snapshots live", report.snapshots);
}

fn as_json(report: &ExpireReport, dry_run: bool) -> serde_json::Value {
    let names =
        |sessions: &[lifeboat_repository::id::SessionId]| sessions.iter().map(ToString::to_string).collect::<Vec<_>>();
    json!({
        "dryRun": dry_run,
        "snapshots": report.snapshots,
        "snapshotsRemoved": report.snapshots_removed,
        "packsDeleted": report.packs_deleted,
        "bytesDeleted": report.bytes_deleted,
        "packsRepacked": report.packs_repacked,
        "bytesCopied": report.bytes_copied,
        "packsLeft": report.packs_left,
        "segmentsMerged": report.segments_merged,
        "aborted": names(&report.aborted),
        "waitingFor": names(&report.waiting_for),
        "done": report.waiting_for.is_empty(),
    })
}
