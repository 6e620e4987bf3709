//! `lifeboat scrub`

use std::sync::Arc;

use anyhow::Result;
use lifeboat_repository::{
    progress::Progress,
    scrub::{self, ScrubOptions},
};
use serde_json::json;

use super::check::cache_for;
use crate::output::say;
use crate::{
    options::{DONE, Global, INCOMPLETE, Scrub},
    output, progress, repository,
};

/// Compares hashes; damage that is found is listed and makes the exit code 3.
pub(crate) async fn run(global: &Global, options: &Scrub) -> Result<u8> {
    let store = repository::store(global)?;
    let plan = ScrubOptions { share: options.share, cache_dir: cache_for(global, Some(options.share))? };
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let report = scrub::scrub(store, plan, shown).await?;
    drop(display);
    let problems: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    if global.json {
        say!(
            "{}",
            json!({"packs": report.packs, "packsRead": report.packs_read, "objects": report.objects, "bytesRead": report.bytes_read, "problems": problems})
        );
    } else if !global.quiet || !problems.is_empty() {
        for problem in &problems {
            say!("{}", output::path(problem.as_bytes()));
        }
        say!(
            "{} of {} packs, {} other objects, {} read: {}",
            report.packs_read,
            report.packs,
            report.objects,
            output::bytes(report.bytes_read),
            if problems.is_empty() { "no damage found".to_owned() } else { format!("{} problems", problems.len()) }
        );
    }
    Ok(if problems.is_empty() { DONE } else { INCOMPLETE })
}
