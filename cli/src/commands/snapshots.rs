//! `lifeboat snapshots`

use anyhow::Result;
use lifeboat_repository::snapshot::{Content, Snapshot};
use serde_json::{Value, json};

use crate::output::{complain, say};
use crate::{
    options::{DONE, Global, INCOMPLETE, Snapshots},
    output, repository,
};

/// Lists snapshots, oldest first. Damaged commits are named, and make the exit code 3.
pub(crate) async fn run(global: &Global, options: &Snapshots) -> Result<u8> {
    let repository = repository::open(global).await?;
    let (mut found, damaged) = repository.readable_snapshots().await?;
    for error in &damaged {
        complain!("lifeboat: {error}; see `lifeboat heal --help`");
    }
    let code = if damaged.is_empty() { DONE } else { INCOMPLETE };
    found.retain(|s| {
        options.lineage.as_ref().is_none_or(|lineage| &s.lineage == lineage)
            && options.tag.iter().all(|(name, value)| s.tags.get(name) == Some(value))
    });
    if global.json {
        say!("{}", serde_json::to_string_pretty(&found.iter().map(as_json).collect::<Vec<_>>())?);
        return Ok(code);
    }
    let mut rows =
        vec![["ID", "TIME", "LINEAGE", "FILES", "SIZE", "NEW", "SKIPPED", "TAGS"].map(str::to_owned).to_vec()];
    rows.extend(found.iter().map(row));
    output::print(format_args!("{}", output::table(&rows)));
    Ok(code)
}

fn row(snapshot: &Snapshot) -> Vec<String> {
    let tags: Vec<_> = snapshot.tags.iter().map(|(name, value)| format!("{name}={value}")).collect();
    vec![
        snapshot.id.to_string()[..12].to_owned(),
        format!("{:.0}", snapshot.time),
        output::path(snapshot.lineage.as_bytes()),
        snapshot.counts.files.to_string(),
        output::bytes(snapshot.counts.bytes),
        output::bytes(snapshot.stats.stored_bytes),
        snapshot.counts.skipped.to_string(),
        output::path(tags.join(",").as_bytes()),
    ]
}

/// A snapshot as other programs read it.
pub(crate) fn as_json(snapshot: &Snapshot) -> Value {
    let (kind, members) = match &snapshot.content {
        Content::Tree { .. } => ("tree", Vec::new()),
        Content::RecoveryPoint { members, .. } => ("recovery-point", members.iter().map(ToString::to_string).collect()),
    };
    json!({
        "id": snapshot.id.to_string(),
        "time": snapshot.time.to_string(),
        "lineage": snapshot.lineage,
        "tags": snapshot.tags,
        "host": snapshot.host,
        "parent": snapshot.parent.map(|id| id.to_string()),
        "kind": kind,
        "members": members,
        "counts": snapshot.counts,
        "stats": snapshot.stats,
    })
}
