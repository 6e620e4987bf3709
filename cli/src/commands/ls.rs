//! `lifeboat ls`

use anyhow::{Result, bail};
use lifeboat_repository::{snapshot::Content, tree};
use serde_json::json;

use super::restore::find;
use crate::{
    options::{DONE, Global, Ls},
    output, repository,
};

/// Lists the entries of a snapshot in path order.
pub(crate) async fn run(global: &Global, options: &Ls) -> Result<u8> {
    let repository = repository::open(global).await?;
    let snapshot = find(&repository, &options.snapshot, None).await?;
    if matches!(snapshot.content, Content::RecoveryPoint { .. }) {
        bail!("{} is a recovery point of several snapshots; list one of its members", options.snapshot);
    }
    let entries =
        tree::list(&repository, &snapshot, options.path.as_deref(), options.recursive || options.path.is_none())
            .await?;
    for entry in entries {
        let path = output::path(&entry.path);
        if global.json {
            println!(
                "{}",
                json!({"path": path, "type": entry.kind.name(), "mode": format!("{:o}", entry.meta.mode), "uid": entry.meta.uid, "gid": entry.meta.gid, "size": entry.size(), "mtime": entry.meta.mtime_text()})
            );
        } else {
            println!(
                "{:9} {:4o} {:>6}:{:<6} {:>10} {} {path}",
                entry.kind.name(),
                entry.meta.mode & 0o7777,
                entry.meta.uid,
                entry.meta.gid,
                entry.size(),
                entry.meta.mtime_text()
            );
        }
    }
    Ok(DONE)
}
