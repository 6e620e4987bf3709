//! `lifeboat rebuild-index`

use std::sync::Arc;

use anyhow::Result;
use lifeboat_repository::progress::Progress;
use serde_json::json;

use crate::output::say;
use crate::{
    options::{DONE, Global, INCOMPLETE},
    progress, repository,
};

/// Indexes what snapshots refer to. Packs that cannot be read make the exit code 3.
pub(crate) async fn run(global: &Global) -> Result<u8> {
    let repository = repository::open(global).await?;
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let report = repository.rebuild_index(shown).await?;
    drop(display);
    if global.json {
        say!(
            "{}",
            json!({"packs": report.packs, "indexed": report.indexed, "unreadable": report.unreadable, "leftOut": report.left_out, "removedSegments": report.removed})
        );
    } else if !global.quiet {
        say!(
            "{} packs in use: {} were not indexed and are now, {} of aborted sessions stay without, {} cannot be read; {} damaged segments removed",
            report.packs,
            report.indexed,
            report.left_out,
            report.unreadable,
            report.removed
        );
    }
    Ok(if report.unreadable == 0 { DONE } else { INCOMPLETE })
}
