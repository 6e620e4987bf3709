//! Retention: which recovery points stay, and why. A pure function of what there is, a policy and the time.
//!
//! A recovery point goes and stays together with its members. Nothing is deleted here: see [`crate::repository::Repository::forget`].

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, Timestamp, Zoned};
use thiserror::Error;

use crate::id::SnapshotId;
use crate::snapshot::{Content, Snapshot};

/// A time that lies further ahead than this is not believed.
const AHEAD: SignedDuration = SignedDuration::from_hours(1);

/// What is kept of each lineage. A rule that is `None` or 0 keeps nothing; without any rule everything is kept.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The newest so many.
    pub last: Option<u32>,
    /// The newest of each of the last so many hours that have any.
    pub hourly: Option<u32>,
    /// The same of days,
    pub daily: Option<u32>,
    /// of weeks that begin on Monday,
    pub weekly: Option<u32>,
    /// of months,
    pub monthly: Option<u32>,
    /// and of years.
    pub yearly: Option<u32>,
    /// Everything that is not older than this, counted from the newest.
    pub within: Option<Span>,
    /// Where days, weeks, months and years begin.
    pub time_zone: TimeZone,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            last: None,
            hourly: None,
            daily: None,
            weekly: None,
            monthly: None,
            yearly: None,
            within: None,
            time_zone: TimeZone::UTC,
        }
    }
}

impl Policy {
    /// Whether it has no rule, so that it keeps everything.
    pub fn is_empty(&self) -> bool {
        self.counts().iter().all(|(_, count)| *count == 0) && self.within.is_none()
    }

    fn counts(&self) -> [(Period, u32); 6] {
        [
            (Period::Last, self.last.unwrap_or(0)),
            (Period::Hour, self.hourly.unwrap_or(0)),
            (Period::Day, self.daily.unwrap_or(0)),
            (Period::Week, self.weekly.unwrap_or(0)),
            (Period::Month, self.monthly.unwrap_or(0)),
            (Period::Year, self.yearly.unwrap_or(0)),
        ]
    }
}

/// A span of time of which the newest recovery point is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Period {
    /// Each recovery point is one of its own.
    Last,
    /// An hour of the clock.
    Hour,
    /// A day.
    Day,
    /// A week that begins on Monday.
    Week,
    /// A month.
    Month,
    /// A year.
    Year,
}

/// Why a recovery point stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The policy has no rule.
    NoRule,
    /// It is the newest of its period.
    Newest {
        /// What kind of period.
        period: Period,
        /// The how manieth it is, from 1, the newest first.
        number: u32,
        /// How many are kept.
        of: u32,
    },
    /// It is not older than the policy says.
    Within,
    /// It is the newest of its lineage.
    LastOfLineage,
    /// It is the newest of its lineage in which nothing is missing.
    LastGood,
    /// Its time lies in the future, so that one of the clocks is wrong.
    Future,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::NoRule => return f.write_str("no rule is given"),
            Self::Within => return f.write_str("not old enough"),
            Self::LastOfLineage => return f.write_str("the newest of its lineage"),
            Self::LastGood => return f.write_str("the newest in which nothing is missing"),
            Self::Future => return f.write_str("its time lies in the future"),
            Self::Newest { period: Period::Last, number, of } => return write!(f, "newest {number} of {of}"),
            Self::Newest { period, .. } => match period {
                Period::Last | Period::Hour => "hourly",
                Period::Day => "daily",
                Period::Week => "weekly",
                Period::Month => "monthly",
                Period::Year => "yearly",
            },
        };
        let Self::Newest { number, of, .. } = self else { return f.write_str(name) };
        write!(f, "{name} {number} of {of}")
    }
}

/// A recovery point, or a snapshot that belongs to none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its snapshot.
    pub id: SnapshotId,
    /// When the state was saved.
    pub time: Timestamp,
    /// What it is a state of.
    pub lineage: String,
    /// Whether nothing is missing in it. Callers that verify may set this to what they found.
    pub is_good: bool,
    /// Snapshots that go and stay together with it.
    pub members: Vec<SnapshotId>,
}

/// What becomes of a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Which.
    pub candidate: Candidate,
    /// Why it stays; empty: it goes.
    pub reasons: Vec<Reason>,
}

impl Verdict {
    /// Whether it stays.
    pub fn is_kept(&self) -> bool {
        !self.reasons.is_empty()
    }
}

/// A policy that cannot be applied.
#[derive(Debug, Error)]
pub enum PolicyError {
    /// Something cannot be counted back so far.
    #[error("the age to keep is out of range")]
    Within(#[source] jiff::Error),
}

/// What retention decides about: recovery points with their members, and snapshots that belong to none.
pub fn candidates(snapshots: &[Snapshot]) -> Vec<Candidate> {
    let by_id: BTreeMap<_, _> = snapshots.iter().map(|snapshot| (snapshot.id, snapshot)).collect();
    let members = |snapshot: &Snapshot| match &snapshot.content {
        Content::RecoveryPoint { members, .. } => members.clone(),
        Content::Tree { .. } => Vec::new(),
    };
    let owned: BTreeSet<_> = snapshots.iter().flat_map(members).collect();
    snapshots
        .iter()
        .filter(|snapshot| !owned.contains(&snapshot.id))
        .map(|snapshot| {
            let members = members(snapshot);
            let is_whole = |id: &SnapshotId| by_id.get(id).is_some_and(|member| member.counts.skipped == 0);
            Candidate {
                id: snapshot.id,
                time: snapshot.time,
                lineage: snapshot.lineage.clone(),
                is_good: snapshot.counts.skipped == 0 && members.iter().all(is_whole),
                members,
            }
        })
        .collect()
}

/// Decides about each candidate; in the order given.
///
/// Of each lineage the newest and the newest good one stay, whatever the policy says. A candidate from the future stays
/// and takes no other's place.
pub fn decide(candidates: Vec<Candidate>, policy: &Policy, now: Timestamp) -> Result<Vec<Verdict>, PolicyError> {
    let mut verdicts: Vec<_> =
        candidates.into_iter().map(|candidate| Verdict { candidate, reasons: Vec::new() }).collect();
    let mut lineages: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (number, verdict) in verdicts.iter().enumerate() {
        lineages.entry(verdict.candidate.lineage.clone()).or_default().push(number);
    }
    for mut lineage in lineages.into_values() {
        // Newest first; equal times in the order of ids, so that every run decides the same.
        lineage.sort_by_key(|at| std::cmp::Reverse((verdicts[*at].candidate.time, verdicts[*at].candidate.id)));
        if policy.is_empty() {
            for at in lineage {
                verdicts[at].reasons.push(Reason::NoRule);
            }
        } else {
            decide_lineage(&mut verdicts, &lineage, policy, now)?;
        }
    }
    Ok(verdicts)
}

fn decide_lineage(
    verdicts: &mut [Verdict],
    newest_first: &[usize],
    policy: &Policy,
    now: Timestamp,
) -> Result<(), PolicyError> {
    let is_future = |verdict: &Verdict| verdict.candidate.time.duration_since(now) > AHEAD;
    let (future, past): (Vec<usize>, Vec<usize>) = newest_first.iter().partition(|at| is_future(&verdicts[**at]));
    for at in future {
        verdicts[at].reasons.push(Reason::Future);
    }
    for (period, count) in policy.counts() {
        let mut last = None;
        let mut number = 0;
        for at in &past {
            if number == count {
                break;
            }
            let name = period_of(period, *at, &verdicts[*at].candidate.time.to_zoned(policy.time_zone.clone()));
            if last.replace(name) != Some(name) {
                number += 1;
                verdicts[*at].reasons.push(Reason::Newest { period, number, of: count });
            }
        }
    }
    if let (Some(within), Some(newest)) = (policy.within, past.first()) {
        // Counted from the newest, not from now: a wrong clock here, or a long pause, deletes nothing.
        let newest = verdicts[*newest].candidate.time.to_zoned(policy.time_zone.clone());
        let from = newest.checked_sub(within).map_err(PolicyError::Within)?.timestamp();
        for at in past.iter().filter(|at| verdicts[**at].candidate.time >= from).copied().collect::<Vec<_>>() {
            verdicts[at].reasons.push(Reason::Within);
        }
    }
    let good = past.iter().find(|at| verdicts[**at].candidate.is_good).copied();
    for (at, reason) in [(past.first().copied(), Reason::LastOfLineage), (good, Reason::LastGood)] {
        // A floor, named only where no rule holds the candidate.
        if let Some(at) = at.filter(|at| verdicts[*at].reasons.is_empty()) {
            verdicts[at].reasons.push(reason);
        }
    }
    Ok(())
}

/// A name of the period that is the same for all in it.
fn period_of(period: Period, number: usize, time: &Zoned) -> (i16, i64) {
    let date = time.date();
    match period {
        Period::Last => (0, i64::try_from(number).unwrap_or(i64::MAX)),
        // An hour that a clock change repeats is two hours.
        Period::Hour => (0, time.timestamp().as_second().div_euclid(3600)),
        Period::Day => (date.year(), i64::from(date.day_of_year())),
        Period::Week => {
            let week = date.iso_week_date();
            (week.year(), i64::from(week.week()))
        }
        Period::Month => (date.year(), i64::from(date.month())),
        Period::Year => (date.year(), 0),
    }
}
