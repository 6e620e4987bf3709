//! When a schedule is due: pure functions from texts and times to times.

use std::str::FromStr;
use std::time::Duration;

use croner::Cron;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use lifeboat_crds::DurationString;
use lifeboat_crds::backup_policy::Schedule;
use lifeboat_crds::conditions::Reason;
use thiserror::Error;

/// A run that could not start within this time after it was due is left out, unless the schedule says otherwise.
const DEFAULT_STARTING_DEADLINE: Duration = Duration::from_hours(1);
/// A run is looked for at most this many due times ahead: what lies between is longer than any outage.
const MAX_STEPS: usize = 100_000;

/// A schedule that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum ScheduleError {
    #[error("schedule.cron `{text}` is no cron expression ({why}); write five fields such as `0 3 * * *`")]
    Cron { text: String, why: String },
    #[error(
        "schedule.timeZone `{0}` is not in the IANA time zone database; write a name such as `Europe/Berlin`, or leave it out for UTC"
    )]
    TimeZone(String),
    #[error("schedule.{field}: {why}")]
    Duration { field: &'static str, why: String },
}

impl ScheduleError {
    /// The reason of the condition.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Cron { .. } => Reason::InvalidSchedule,
            Self::TimeZone(_) => Reason::InvalidTimeZone,
            Self::Duration { .. } => Reason::InvalidSpec,
        }
    }
}

/// A schedule that was understood.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    cron: Cron,
    zone: TimeZone,
    /// This policy's part of the jitter.
    delay: Duration,
    starting_deadline: Duration,
}

/// What a schedule asks for at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Due {
    /// The due time, without jitter, of the run that should start now.
    pub(crate) start: Option<Timestamp>,
    /// Due times that are too late to be made up for.
    pub(crate) missed: usize,
    /// When to look again: the next start, jitter included. `None`: the schedule never comes due again.
    pub(crate) next: Option<Timestamp>,
}

fn duration(field: &'static str, text: Option<&DurationString>, default: Duration) -> Result<Duration, ScheduleError> {
    text.map_or(Ok(default), |text| {
        text.get().map_err(|error| ScheduleError::Duration { field, why: error.to_string() })
    })
}

impl Plan {
    /// Understands a schedule. `key` picks this policy's part of the jitter: always the same one.
    pub(crate) fn new(schedule: &Schedule, key: &str) -> Result<Self, ScheduleError> {
        let cron = Cron::from_str(&schedule.cron)
            .map_err(|error| ScheduleError::Cron { text: schedule.cron.clone(), why: error.to_string() })?;
        let zone = match &schedule.time_zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|_| ScheduleError::TimeZone(name.clone()))?,
        };
        let jitter = duration("jitter", schedule.jitter.as_ref(), Duration::ZERO)?;
        let starting_deadline =
            duration("startingDeadline", schedule.starting_deadline.as_ref(), DEFAULT_STARTING_DEADLINE)?;
        let part = u32::from_le_bytes(blake3::hash(key.as_bytes()).as_bytes()[..4].try_into().unwrap_or_default());
        let delay = jitter.mul_f64(f64::from(part) / f64::from(u32::MAX));
        Ok(Self { cron, zone, delay, starting_deadline })
    }

    /// The first due time after this one, without jitter.
    fn after(&self, time: Timestamp) -> Option<Timestamp> {
        let from = time.to_zoned(self.zone.clone());
        self.cron.find_next_occurrence(&from, false).ok().map(|next| next.timestamp())
    }

    fn delayed(due: Timestamp, by: Duration) -> Timestamp {
        SignedDuration::try_from(by).ok().and_then(|by| due.checked_add(by).ok()).unwrap_or(Timestamp::MAX)
    }

    /// What is due at `now`, when everything up to `since` is dealt with.
    pub(crate) fn due(&self, since: Timestamp, now: Timestamp) -> Due {
        let mut passed: Option<Timestamp> = None;
        let mut missed = 0;
        let mut cursor = since;
        for _ in 0..MAX_STEPS {
            let Some(next) = self.after(cursor) else {
                return Due { start: self.in_time(passed, now, &mut missed), missed, next: None };
            };
            let start = Self::delayed(next, self.delay);
            if start > now {
                let start_now = self.in_time(passed, now, &mut missed);
                return Due { start: start_now, missed, next: Some(start) };
            }
            // Only the newest of several that are due runs; the state that the others would show is gone.
            missed += usize::from(passed.is_some());
            passed = Some(next);
            cursor = next;
        }
        Due { start: None, missed, next: Some(now) }
    }

    fn in_time(&self, due: Option<Timestamp>, now: Timestamp, missed: &mut usize) -> Option<Timestamp> {
        let due = due?;
        if Self::delayed(due, self.delay + self.starting_deadline) >= now {
            Some(due)
        } else {
            *missed += 1;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(cron: &str, zone: Option<&str>) -> Schedule {
        Schedule {
            cron: cron.into(),
            time_zone: zone.map(str::to_owned),
            jitter: None,
            starting_deadline: None,
            concurrency: lifeboat_crds::backup_policy::Concurrency::Forbid,
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_run_starts_at_its_time_and_not_before() {
        let plan = Plan::new(&schedule("0 3 * * *", None), "x").unwrap();
        let due = plan.due(at("2026-05-01T03:00:00Z"), at("2026-05-02T02:59:59Z"));
        assert_eq!(due, Due { start: None, missed: 0, next: Some(at("2026-05-02T03:00:00Z")) });
        let due = plan.due(at("2026-05-01T03:00:00Z"), at("2026-05-02T03:00:00Z"));
        assert_eq!(
            due,
            Due { start: Some(at("2026-05-02T03:00:00Z")), missed: 0, next: Some(at("2026-05-03T03:00:00Z")) }
        );
    }

    #[test]
    fn after_an_outage_the_newest_run_is_made_up_for_if_it_is_not_too_late() {
        let plan = Plan::new(&schedule("0 * * * *", None), "x").unwrap();
        let due = plan.due(at("2026-05-01T00:00:00Z"), at("2026-05-01T05:30:00Z"));
        assert_eq!((due.start, due.missed), (Some(at("2026-05-01T05:00:00Z")), 4));
        let daily = Plan::new(&schedule("@daily", None), "x").unwrap();
        let due = daily.due(at("2026-05-01T00:00:00Z"), at("2026-05-02T05:00:00Z"));
        assert_eq!((due.start, due.missed), (None, 1));
    }

    #[test]
    fn time_zones_and_their_changes_are_respected() {
        let plan = Plan::new(&schedule("0 3 * * *", Some("Europe/Berlin")), "x").unwrap();
        assert_eq!(
            plan.due(at("2026-01-10T12:00:00Z"), at("2026-01-10T12:00:00Z")).next,
            Some(at("2026-01-11T02:00:00Z"))
        );
        assert_eq!(
            plan.due(at("2026-07-10T12:00:00Z"), at("2026-07-10T12:00:00Z")).next,
            Some(at("2026-07-11T01:00:00Z"))
        );
        // On 2026-03-29 the clock jumps from 2:00 to 3:00; a run at 2:30 happens once that day at most.
        let gap = Plan::new(&schedule("30 2 * * *", Some("Europe/Berlin")), "x").unwrap();
        let next = gap.due(at("2026-03-28T12:00:00Z"), at("2026-03-28T12:00:00Z")).next.unwrap();
        assert!(next >= at("2026-03-29T01:00:00Z") && next <= at("2026-03-30T00:30:00Z"), "{next}");
    }

    #[test]
    fn jitter_is_stable_bounded_and_differs_between_policies() {
        let mut wide = schedule("0 3 * * *", None);
        wide.jitter = Some(DurationString("1h".into()));
        let next = |key: &str| {
            Plan::new(&wide, key).unwrap().due(at("2026-05-01T12:00:00Z"), at("2026-05-01T12:00:00Z")).next.unwrap()
        };
        assert_eq!(next("a"), next("a"));
        assert_ne!(next("a"), next("b"));
        for key in ["a", "b", "c", "d"] {
            assert!((at("2026-05-02T03:00:00Z")..=at("2026-05-02T04:00:00Z")).contains(&next(key)));
        }
    }

    #[test]
    fn nonsense_is_refused_with_what_to_write() {
        for (cron, zone, reason) in [
            ("61 * * * *", None, Reason::InvalidSchedule),
            ("* * * *", None, Reason::InvalidSchedule),
            ("0 3 * * nonday", None, Reason::InvalidSchedule),
            ("0 3 * * *", Some("Europe/Atlantis"), Reason::InvalidTimeZone),
        ] {
            let error = Plan::new(&schedule(cron, zone), "x").unwrap_err();
            assert_eq!(error.reason(), reason, "{error}");
        }
    }
}
