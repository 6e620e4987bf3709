//! `lifeboat ls`

use anyhow::{Result, bail};
use lifeboat_repository::{
    manifest::{Entry, Kind},
    snapshot::Content,
    tree,
};
use serde_json::{Value, json};

use super::restore::find;
use crate::output::say;
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
    for entry in entries.iter().take_while(|_| !output::is_closed()) {
        print(global, entry);
    }
    Ok(DONE)
}

/// One line about an entry.
pub(crate) fn print(global: &Global, entry: &Entry) {
    let path = output::path(&entry.path);
    if global.json {
        say!("{}", as_json(entry));
        return;
    }
    let target = match &entry.kind {
        Kind::Symlink { target } | Kind::Link { to: target } => format!(" -> {}", output::path(target)),
        _ => String::new(),
    };
    say!(
        "{:9} {:4o} {:>6}:{:<6} {:>10} {} {path}{target}",
        entry.kind.name(),
        entry.meta.mode & 0o7777,
        entry.meta.uid,
        entry.meta.gid,
        entry.size(),
        entry.meta.mtime_text()
    );
}

/// An entry as other programs read it.
pub(crate) fn as_json(entry: &Entry) -> Value {
    let mut value = json!({
        "path": output::path(&entry.path),
        "type": entry.kind.name(),
        "mode": format!("{:o}", entry.meta.mode),
        "uid": entry.meta.uid,
        "gid": entry.meta.gid,
        "size": entry.size(),
        "mtime": entry.meta.mtime_text(),
    });
    if let Kind::Symlink { target } | Kind::Link { to: target } = &entry.kind {
        value["target"] = output::path(target).into();
    }
    value
}
