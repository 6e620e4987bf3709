//! `lifeboat diff`

use anyhow::Result;
use futures::TryStreamExt;
use lifeboat_repository::diff::{Aspect, Difference, diff};
use serde_json::json;

use super::{ls, restore::find};
use crate::output::say;
use crate::{
    options::{DONE, Diff, Global},
    output, repository,
};

/// Prints what differs, in path order.
pub(crate) async fn run(global: &Global, options: &Diff) -> Result<u8> {
    let repository = repository::open(global).await?;
    let before = find(&repository, &options.before, None).await?;
    let after = find(&repository, &options.after, None).await?;
    let mut differences = diff(&repository, &before, &after).await?;
    let (mut added, mut removed, mut modified) = (0u64, 0u64, 0u64);
    while let Some(difference) = differences.try_next().await? {
        match &difference {
            Difference::Added(_) => added += 1,
            Difference::Removed(_) => removed += 1,
            Difference::Modified { .. } => modified += 1,
        }
        print(global, &difference);
        if output::is_closed() {
            break;
        }
    }
    if !global.json && !global.quiet {
        say!("{added} added, {removed} removed, {modified} modified");
    }
    Ok(DONE)
}

fn print(global: &Global, difference: &Difference) {
    let names = |aspects: &[Aspect]| aspects.iter().map(|aspect| aspect.name()).collect::<Vec<_>>();
    if global.json {
        let line = match difference {
            Difference::Added(entry) => json!({"change": "added", "after": ls::as_json(entry)}),
            Difference::Removed(entry) => json!({"change": "removed", "before": ls::as_json(entry)}),
            Difference::Modified { before, after, aspects } => json!({
                "change": "modified",
                "aspects": names(aspects),
                "before": ls::as_json(before),
                "after": ls::as_json(after),
            }),
        };
        say!("{line}");
        return;
    }
    match difference {
        Difference::Added(entry) => say!("+ {}", output::path(&entry.path)),
        Difference::Removed(entry) => say!("- {}", output::path(&entry.path)),
        Difference::Modified { after, aspects, .. } => {
            say!("M {}  ({})", output::path(&after.path), names(aspects).join(", "));
        }
    }
}
