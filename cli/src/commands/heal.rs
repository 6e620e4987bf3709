//! `lifeboat heal`

use std::sync::Arc;

use anyhow::Result;
use lifeboat_repository::{
    check::CheckOptions,
    heal::{HealOptions, heal_locks},
    progress::Progress,
};
use serde_json::json;

use crate::output::say;
use crate::{
    options::{DONE, Global, Heal, INCOMPLETE},
    output, progress, repository,
};

/// Heals what can be healed; damage that is left is listed and makes the exit code 3.
pub(crate) async fn run(global: &Global, options: &Heal) -> Result<u8> {
    let from = options.from.as_deref().map(repository::store_at).transpose()?;
    let mut replaced = Vec::new();
    if let Some(from) = from.as_deref().filter(|_| !options.dry_run) {
        // Without these a repository does not open.
        replaced = heal_locks(&repository::store(global)?, from).await?;
    }
    let repository = repository::open(global).await?;
    let shown = Arc::new(Progress::default());
    progress::cancel_on_signal(&shown);
    let display = progress::Display::new(global, &shown);
    let check = if options.quick { CheckOptions::default() } else { CheckOptions::all_data() };
    let plan = HealOptions { from, check, dry_run: options.dry_run };
    let report = repository.heal(plan, shown).await?;
    drop(display);
    replaced.extend(report.replaced);
    let texts = |problems: &[lifeboat_repository::check::Problem]| -> Vec<String> {
        problems.iter().map(ToString::to_string).collect()
    };
    let (found, left) = (texts(&report.found), texts(&report.left));
    if global.json {
        say!("{}", json!({"found": found, "replaced": replaced, "maskedChunks": report.masked, "left": left}));
    } else if !global.quiet || !left.is_empty() {
        for key in &replaced {
            say!(
                "{}: {}",
                if options.dry_run { "could be replaced" } else { "replaced" },
                output::path(key.as_bytes())
            );
        }
        for problem in &left {
            say!("left: {}", output::path(problem.as_bytes()));
        }
        if report.masked > 0 {
            say!("{} lost chunks are stored again by the next backup that has them", report.masked);
        }
        say!("{} problems found, {} objects replaced, {} problems left", found.len(), replaced.len(), left.len());
    }
    Ok(if left.is_empty() { DONE } else { INCOMPLETE })
}
