//! `lifeboat forget`

use anyhow::{Context, Result};
use jiff::tz::TimeZone;
use lifeboat_repository::{
    clock,
    repository::Repository,
    retention::{self, Policy, Verdict},
    snapshot::Snapshot,
};
use serde_json::json;

use crate::output::say;
use crate::{
    options::{DONE, Forget, Global, Rules},
    output, repository,
};

/// Sets tombstones: by rules, with a reason for each snapshot that stays, or for the snapshots that are named.
pub(crate) async fn run(global: &Global, options: &Forget) -> Result<u8> {
    let repository = repository::open(global).await?;
    if options.snapshots.is_empty() {
        by_rules(global, options, &repository).await
    } else {
        named(global, options, &repository).await
    }
}

async fn named(global: &Global, options: &Forget, repository: &Repository) -> Result<u8> {
    let mut ids = Vec::new();
    for wanted in &options.snapshots {
        ids.push(repository.find(wanted).await?.id);
    }
    let forgotten = if options.dry_run { ids } else { repository.forget(&ids).await?.forgotten };
    let forgotten: Vec<_> = forgotten.iter().map(ToString::to_string).collect();
    if global.json {
        say!("{}", json!({"dryRun": options.dry_run, "forgotten": forgotten}));
    } else if !global.quiet {
        for id in &forgotten {
            say!("{} {}", verb(options), &id[..12]);
        }
        hint(options, forgotten.len());
    }
    Ok(DONE)
}

async fn by_rules(global: &Global, options: &Forget, repository: &Repository) -> Result<u8> {
    let policy = policy(&options.rules, options.time_zone.as_deref())?;
    let snapshots = repository.snapshots().await?;
    let candidates = retention::candidates(&snapshots);
    let is_chosen = |snapshot: &Snapshot| {
        options.lineage.as_ref().is_none_or(|lineage| &snapshot.lineage == lineage)
            && options.tag.iter().all(|(name, value)| snapshot.tags.get(name) == Some(value))
    };
    let chosen = candidates.into_iter().filter(|c| snapshots.iter().any(|s| s.id == c.id && is_chosen(s))).collect();
    let verdicts = retention::decide(chosen, &policy, clock::now())?;
    let going: Vec<_> =
        verdicts.iter().filter(|verdict| !verdict.is_kept()).map(|verdict| verdict.candidate.id).collect();
    if !options.dry_run {
        repository.forget(&going).await?;
    }
    if global.json {
        say!("{}", json!({"dryRun": options.dry_run, "snapshots": verdicts.iter().map(as_json).collect::<Vec<_>>()}));
    } else if !global.quiet {
        let mut rows = vec![["ID", "TIME", "LINEAGE", "", "WHY"].map(str::to_owned).to_vec()];
        rows.extend(verdicts.iter().map(|verdict| row(verdict, options)));
        output::print(format_args!("{}", output::table(&rows)));
        hint(options, going.len());
    }
    Ok(DONE)
}

fn policy(rules: &Rules, time_zone: Option<&str>) -> Result<Policy> {
    let time_zone = match time_zone {
        Some(name) => TimeZone::get(name).with_context(|| format!("there is no time zone {name}"))?,
        None => TimeZone::system(),
    };
    Ok(Policy {
        last: rules.last,
        hourly: rules.hourly,
        daily: rules.daily,
        weekly: rules.weekly,
        monthly: rules.monthly,
        yearly: rules.yearly,
        within: rules.within,
        time_zone,
    })
}

fn verb(options: &Forget) -> &'static str {
    if options.dry_run { "would forget" } else { "forgot" }
}

fn hint(options: &Forget, count: usize) {
    if options.dry_run {
        say!("{count} snapshots would be forgotten; nothing was changed");
    } else if count > 0 {
        say!("forgot {count} snapshots; `lifeboat expire` gives their space back");
    } else {
        say!("nothing to forget");
    }
}

fn reasons(verdict: &Verdict) -> Vec<String> {
    verdict.reasons.iter().map(ToString::to_string).collect()
}

fn row(verdict: &Verdict, options: &Forget) -> Vec<String> {
    let candidate = &verdict.candidate;
    let what = if verdict.is_kept() { "keep" } else { verb(options) };
    vec![
        candidate.id.to_string()[..12].to_owned(),
        format!("{:.0}", candidate.time),
        output::path(candidate.lineage.as_bytes()),
        what.to_owned(),
        reasons(verdict).join(", "),
    ]
}

fn as_json(verdict: &Verdict) -> serde_json::Value {
    let candidate = &verdict.candidate;
    json!({
        "id": candidate.id.to_string(),
        "time": candidate.time.to_string(),
        "lineage": candidate.lineage,
        "members": candidate.members.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "keep": verdict.is_kept(),
        "reasons": reasons(verdict),
    })
}
