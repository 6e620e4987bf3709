//! `lifeboat stats`

use anyhow::Result;
use lifeboat_repository::stats::LineageStats;

use crate::output::say;
use crate::{
    options::{DONE, Global},
    output, repository,
};

/// Prints sizes: of all, of packs, of each lineage.
pub(crate) async fn run(global: &Global) -> Result<u8> {
    let repository = repository::open(global).await?;
    let stats = repository.stats().await?;
    if global.json {
        say!("{}", serde_json::to_string_pretty(&stats)?);
        return Ok(DONE);
    }
    say!(
        "{} snapshots, {} recovery points: {} backed up, {} stored",
        stats.snapshots,
        stats.recovery_points,
        output::bytes(stats.logical_bytes),
        output::bytes(stats.stored_bytes)
    );
    say!(
        "{} packs, {}; {} of them, {}, are referred to by no snapshot",
        stats.packs.count,
        output::bytes(stats.packs.bytes),
        stats.unreferenced_packs.count,
        output::bytes(stats.unreferenced_packs.bytes)
    );
    if stats.unreadable_references > 0 {
        say!("the references of {} snapshots cannot be read: run `lifeboat check`", stats.unreadable_references);
    }
    let mut rows = vec![["LINEAGE", "SNAPSHOTS", "NEWEST", "SIZE", "ALL", "ADDED"].map(str::to_owned).to_vec()];
    rows.extend(stats.lineages.iter().map(row));
    output::print(format_args!("{}", output::table(&rows)));
    Ok(DONE)
}

fn row(lineage: &LineageStats) -> Vec<String> {
    vec![
        output::path(lineage.lineage.as_bytes()),
        lineage.snapshots.to_string(),
        format!("{:.0}", lineage.newest),
        output::bytes(lineage.newest_bytes),
        output::bytes(lineage.logical_bytes),
        output::bytes(lineage.added_bytes),
    ]
}
