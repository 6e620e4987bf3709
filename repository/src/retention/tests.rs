//! Tables of what a policy keeps, and what holds for every policy.

use super::*;
use crate::id::SessionId;
use crate::snapshot::{Counts, WriteStats};
use proptest::prelude::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn candidate(number: u8, time: &str) -> Candidate {
    Candidate { id: SnapshotId([number; 16]), time: at(time), lineage: "a".into(), is_good: true, members: vec![] }
}

/// The numbers of those that stay.
fn kept(candidates: &[Candidate], policy: &Policy, now: &str) -> Vec<u8> {
    let verdicts = decide(candidates.to_vec(), policy, at(now)).unwrap();
    verdicts.iter().filter(|verdict| verdict.is_kept()).map(|verdict| verdict.candidate.id.0[0]).collect()
}

const NOW: &str = "2026-03-31T12:00:00Z";

#[test]
fn rules_keep_the_newest_of_each_period() {
    let all = [
        candidate(1, "2024-12-30T23:00:00Z"),
        candidate(2, "2025-01-01T01:00:00Z"),
        candidate(3, "2026-03-01T08:00:00Z"),
        candidate(4, "2026-03-29T08:00:00Z"),
        candidate(5, "2026-03-30T08:10:00Z"),
        candidate(6, "2026-03-30T08:50:00Z"),
        candidate(7, "2026-03-30T09:00:00Z"),
    ];
    let policy = |set: fn(&mut Policy)| {
        let mut policy = Policy::default();
        set(&mut policy);
        policy
    };
    for (policy, expected) in [
        (policy(|_| ()), vec![1, 2, 3, 4, 5, 6, 7]),
        (policy(|p| p.last = Some(2)), vec![6, 7]),
        (policy(|p| p.hourly = Some(2)), vec![6, 7]),
        (policy(|p| p.hourly = Some(3)), vec![4, 6, 7]),
        (policy(|p| p.daily = Some(2)), vec![4, 7]),
        // 29 March 2026 is a Sunday; the 30th begins a week. 1 was in week 1 of 2025, with 2.
        (policy(|p| p.weekly = Some(9)), vec![2, 3, 4, 7]),
        (policy(|p| p.monthly = Some(2)), vec![2, 7]),
        (policy(|p| p.yearly = Some(9)), vec![1, 2, 7]),
        (policy(|p| p.within = Some(Span::new().days(1))), vec![5, 6, 7]),
        (policy(|p| (p.last, p.yearly) = (Some(1), Some(2))), vec![2, 7]),
    ] {
        assert_eq!(kept(&all, &policy, NOW), expected, "{policy:?}");
    }
}

#[test]
fn days_begin_where_the_time_zone_says() {
    let all = [candidate(1, "2026-03-28T22:30:00Z"), candidate(2, "2026-03-28T23:30:00Z")];
    let mut policy = Policy { daily: Some(2), ..Policy::default() };
    assert_eq!(kept(&all, &policy, NOW), [2]);
    policy.time_zone = TimeZone::get("Europe/Berlin").unwrap();
    assert_eq!(kept(&all, &policy, NOW), [1, 2]);
}

#[test]
fn the_newest_good_one_outlives_the_rules() {
    let mut all = [
        candidate(1, "2026-01-01T00:00:00Z"),
        candidate(2, "2026-02-01T00:00:00Z"),
        candidate(3, "2026-03-01T00:00:00Z"),
        candidate(4, "2026-03-02T00:00:00Z"),
    ];
    all[2].is_good = false;
    all[3].is_good = false;
    let verdicts = decide(all.to_vec(), &Policy { last: Some(1), ..Policy::default() }, at(NOW)).unwrap();
    let reasons: Vec<_> = verdicts.iter().map(|verdict| verdict.reasons.clone()).collect();
    let newest = Reason::Newest { period: Period::Last, number: 1, of: 1 };
    assert_eq!(reasons, [vec![], vec![Reason::LastGood], vec![], vec![newest]]);
}

#[test]
fn what_comes_from_the_future_stays_and_takes_no_place() {
    let all = [
        candidate(1, "2026-03-01T00:00:00Z"),
        candidate(2, "2026-03-02T00:00:00Z"),
        candidate(3, "2041-01-01T00:00:00Z"),
    ];
    let policy = Policy { last: Some(1), within: Some(Span::new().hours(1)), ..Policy::default() };
    assert_eq!(kept(&all, &policy, NOW), [2, 3]);
    // A clock that is years behind deletes nothing, one that is years ahead no more than the policy says.
    assert_eq!(kept(&all, &policy, "2001-01-01T00:00:00Z"), [1, 2, 3]);
    assert_eq!(kept(&all[..2], &policy, "2055-01-01T00:00:00Z"), [2]);
}

fn snapshot(number: u8, skipped: u64, content: Content) -> Snapshot {
    Snapshot {
        id: SnapshotId([number; 16]),
        session: SessionId([number; 16]),
        time: at(NOW),
        lineage: format!("lineage {number}"),
        tags: BTreeMap::new(),
        host: String::new(),
        parent: None,
        content,
        counts: Counts { skipped, ..Counts::default() },
        stats: WriteStats::default(),
    }
}

#[test]
fn members_are_no_candidates_of_their_own() {
    let tree = || Content::Tree { root: vec![], skipped: vec![] };
    let members = vec![SnapshotId([1; 16]), SnapshotId([2; 16])];
    let point = Content::RecoveryPoint { members: members.clone(), description: serde_json::Value::Null };
    let all = [snapshot(1, 0, tree()), snapshot(2, 1, tree()), snapshot(3, 0, point), snapshot(4, 0, tree())];
    let found = candidates(&all);
    assert_eq!(found.iter().map(|c| c.id.0[0]).collect::<Vec<_>>(), [3, 4]);
    assert_eq!(found[0].members, members);
    assert_eq!((found[0].is_good, found[1].is_good), (false, true), "a member lacks a file");
}

fn policies() -> impl Strategy<Value = Policy> {
    let count = || proptest::option::of(0u32..5);
    (count(), count(), count(), count(), count(), count(), proptest::option::of(0i64..2000)).prop_map(
        |(last, hourly, daily, weekly, monthly, yearly, within)| Policy {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
            within: within.map(|hours| Span::new().hours(hours)),
            time_zone: TimeZone::get("America/New_York").unwrap(),
        },
    )
}

fn histories() -> impl Strategy<Value = Vec<Candidate>> {
    proptest::collection::vec((0i64..100_000_000, 0u8..3, any::<bool>()), 0..60).prop_map(|found| {
        let candidate = |(number, (seconds, lineage, is_good)): (usize, (i64, u8, bool))| Candidate {
            id: SnapshotId([u8::try_from(number).unwrap(); 16]),
            time: Timestamp::from_second(1_700_000_000 + seconds).unwrap(),
            lineage: lineage.to_string(),
            is_good,
            members: vec![],
        };
        found.into_iter().enumerate().map(candidate).collect()
    })
}

proptest! {
    #[test]
    fn what_holds_for_every_policy(history in histories(), policy in policies(), now in 1_700_000_000i64..1_900_000_000) {
        let now = Timestamp::from_second(now).unwrap();
        let verdicts = decide(history.clone(), &policy, now).unwrap();
        let stays = |verdicts: &[Verdict]| {
            verdicts.iter().filter(|v| v.is_kept()).map(|v| v.candidate.clone()).collect::<Vec<_>>()
        };
        let kept = stays(&verdicts);
        for lineage in ["0", "1", "2"] {
            let newest = |good: bool| history.iter().filter(|c| c.lineage == lineage && (!good || c.is_good)).max_by_key(|c| (c.time, c.id));
            for floor in [newest(false), newest(true)].into_iter().flatten() {
                prop_assert!(kept.contains(floor), "{floor:?}");
            }
            // The newest `last` always stay.
            let mut all: Vec<_> = history.iter().filter(|c| c.lineage == lineage).collect();
            all.sort_by_key(|c| std::cmp::Reverse((c.time, c.id)));
            for c in all.iter().take(policy.last.unwrap_or(0) as usize) {
                prop_assert!(kept.contains(c));
            }
        }
        // What was decided is decided again, and what goes takes nothing with it.
        let again = stays(&decide(kept.clone(), &policy, now).unwrap());
        prop_assert_eq!(&again, &kept);
        // Everything stays under a policy without rules.
        prop_assert_eq!(stays(&decide(history.clone(), &Policy::default(), now).unwrap()), history.clone());
        // A larger policy keeps at least the same.
        let more = Policy { last: policy.last.map(|n| n + 1), daily: policy.daily.map(|n| n + 2), ..policy.clone() };
        if !policy.is_empty() {
            let wider = stays(&decide(history, &more, now).unwrap());
            prop_assert!(kept.iter().all(|c| wider.contains(c)));
        }
    }
}
