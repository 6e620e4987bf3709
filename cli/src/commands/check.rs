//! `lifeboat check`

use std::{path::PathBuf, sync::Arc};

use anyhow::{Result, bail};
use lifeboat_repository::{check::CheckOptions, progress::Progress, share::Share};
use serde_json::json;

use crate::output::say;
use crate::{
    options::{Check, DONE, Global, INCOMPLETE},
    output, progress, repository,
};

/// Checks the repository; damage that is found is listed and makes the exit code 3.
pub(crate) async fn run(global: &Global, options: &Check) -> Result<u8> {
    let repository = repository::open(global).await?;
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let plan = CheckOptions { read_data: options.read_data, cache_dir: cache_for(global, options.read_data)? };
    let report = repository.check(plan, Arc::clone(&shown)).await?;
    drop(display);
    let problems: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    if global.json {
        say!(
            "{}",
            json!({"snapshots": report.snapshots, "packs": report.packs, "chunks": report.chunks, "bytesRead": report.bytes_read, "problems": problems})
        );
    } else if !global.quiet || !problems.is_empty() {
        for problem in &problems {
            say!("{}", output::path(problem.as_bytes()));
        }
        say!(
            "{} snapshots, {} packs, {} chunks, {} read: {}",
            report.snapshots,
            report.packs,
            report.chunks,
            output::bytes(report.bytes_read),
            if problems.is_empty() { "no damage found".to_owned() } else { format!("{} problems", problems.len()) }
        );
    }
    Ok(if problems.is_empty() { DONE } else { INCOMPLETE })
}

/// The folder that remembers where a share ended.
pub(crate) fn cache_for(global: &Global, share: Option<Share>) -> Result<Option<PathBuf>> {
    if share.is_some_and(Share::is_part) && global.cache_dir.is_none() {
        bail!(
            "a share is the part after the last one, which a folder must remember; set LIFEBOAT_CACHE_DIR or write --cache-dir FOLDER"
        );
    }
    Ok(global.cache_dir.clone())
}
