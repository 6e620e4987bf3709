//! Brings an application to rest and lets it go again: step by step, with one barrier before the cut.
//!
//! The guardians of the nodes do it, by leases; where none is, commands go by way of the API server. What may be frozen is
//! written down before anything is sent: whoever reads the status knows what to thaw. A freeze counts only if everything
//! was at rest until it was released.

mod direct;
mod leases;
mod workloads;

pub(super) use self::leases::remove as remove_leases;
pub(super) use self::workloads::adopt_declared;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use futures::future::join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use lifeboat_crds::DurationString;
use lifeboat_crds::backup::{QuiesceStatus, QuiescedWorkload, Through};
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::quiesce_lease::{LeaseEnd, LeasePhase, QuiesceLeaseStatus, Watchdog};
use tracing::{info, warn};

use self::direct::LetGo;
use self::workloads::Target;
use super::Run;
use crate::context::Context;

const DEFAULT_MAX_FREEZE: Duration = Duration::from_mins(1);
/// Leases are looked at when one has changed, and at the latest after this.
const LOOK: Duration = Duration::from_millis(250);
/// Leases that change together are looked at together.
const TOGETHER: Duration = Duration::from_millis(5);
/// For guardians that are being started, before anything is frozen.
const GUARDIAN_PATIENCE: Duration = Duration::from_secs(30);
/// A guardian that does not take a lease within this time does not take it at all. One that was cut off asks again sooner.
const UNTAKEN: Duration = Duration::from_secs(5);
/// A guardian tells within this time that it let go; then its work is done without it.
const THAW_PATIENCE: Duration = Duration::from_secs(15);

type Failure = (Reason, String);

/// Announces the freeze, then freezes in order. A failure is written down; thawing is the next step.
pub(super) async fn freeze(run: &mut Run, context: &Context) -> Result<()> {
    let Some(quiesce) = run.status.plan.as_ref().and_then(|plan| plan.quiesce.clone()) else { return Ok(()) };
    let targets = match workloads::resolve(run, &quiesce, context).await? {
        Ok(targets) => targets,
        Err((reason, message)) => {
            run.status.quiesce = Some(QuiesceStatus::default());
            return note_failure(run, context, reason, message).await;
        }
    };
    let guarded = await_guardians(run, &targets, context).await?;
    let through = |target: &Target| {
        if guarded.get(&target.node) == Some(&true) { Through::Guardian } else { Through::ApiServer }
    };
    if let Some(target) = targets.iter().find(|target| through(target) == Through::ApiServer && direct::cannot(target))
    {
        run.status.quiesce = Some(QuiesceStatus::default());
        let (reason, why) = direct::no_guardian(target);
        let message = format!("the quiesce {} failed: {why}", place(&announce(target, Through::ApiServer)));
        return note_failure(run, context, reason, message).await;
    }
    let announced = targets.iter().map(|target| announce(target, through(target))).collect();
    let now = Timestamp::now();
    let deadline = now.checked_add(longest(quiesce.max_freeze.as_ref())).unwrap_or(Timestamp::MAX);
    run.status.quiesce = Some(QuiesceStatus {
        frozen_at: Some(MicroTime(now)),
        deadline: Some(Time(deadline)),
        workloads: announced,
        ..QuiesceStatus::default()
    });
    run.set(ConditionType::Quiesced, State::Unknown, Reason::InProgress, "the application is being frozen");
    run.save(context).await?;
    match freeze_all(run, &targets, deadline, context).await? {
        Ok(()) => {
            info!("frozen");
            run.set(ConditionType::Quiesced, State::Unknown, Reason::Done, "the application is frozen");
            run.save(context).await
        }
        Err((reason, message)) => note_failure(run, context, reason, message).await,
    }
}

/// Waits for guardians that are being started, so that a moment in which a node has none costs no backup; nothing is frozen
/// yet. Returns the nodes with a guardian, and whether it is ready.
async fn await_guardians(run: &mut Run, targets: &[Target], context: &Context) -> Result<BTreeMap<String, bool>> {
    let end = tokio::time::Instant::now() + GUARDIAN_PATIENCE;
    let mut is_told = false;
    loop {
        let guarded = leases::guarded_nodes(context).await?;
        let Some(node) = targets.iter().find(|target| is_to_come(target, &guarded)).map(|target| &target.node) else {
            return Ok(guarded);
        };
        if tokio::time::Instant::now() > end {
            warn!(node, "no guardian became ready");
            return Ok(guarded);
        }
        if !is_told {
            is_told = true;
            let message = format!("nothing is frozen before the guardian of the node {node} is ready");
            run.set(ConditionType::Quiesced, State::Unknown, Reason::Waiting, message);
            run.save(context).await?;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether the workload's guardian is worth waiting for: one that is being started, or any where nothing else will do.
fn is_to_come(target: &Target, guarded: &BTreeMap<String, bool>) -> bool {
    guarded.get(&target.node).map_or(direct::cannot(target), |is_ready| !is_ready)
}

fn longest(max_freeze: Option<&DurationString>) -> SignedDuration {
    // The schema refuses texts that are no durations.
    let longest = max_freeze.and_then(|text| text.get().ok()).unwrap_or(DEFAULT_MAX_FREEZE);
    SignedDuration::try_from(longest).unwrap_or(SignedDuration::MAX)
}

fn announce(target: &Target, through: Through) -> QuiescedWorkload {
    QuiescedWorkload {
        step: target.step,
        pod: target.pod.clone(),
        pod_uid: target.pod_uid.clone(),
        container: target.container.clone(),
        frozen: true,
        through: Some(through),
        watchdog: (through == Through::ApiServer).then_some(Watchdog::Container),
        freeze_millis: None,
        error: None,
    }
}

/// A workload in the words of a message.
fn place(workload: &QuiescedWorkload) -> String {
    let what = if workload.container.is_empty() { "the volumes" } else { &workload.container };
    format!("step {} in {}/{what}", workload.step, workload.pod)
}

async fn note_failure(run: &mut Run, context: &Context, reason: Reason, message: String) -> Result<()> {
    warn!(reason = reason.as_str(), message, "the freeze failed");
    run.set(ConditionType::Quiesced, State::False, reason, message.clone());
    run.save(context).await?;
    context.events.warning(&run.backup, reason, message).await;
    Ok(())
}

/// Freezes step after step; after a failure, what was never begun is marked as not frozen.
async fn freeze_all(
    run: &mut Run,
    targets: &[Target],
    deadline: Timestamp,
    context: &Context,
) -> Result<Result<(), Failure>> {
    let mut begun = 0;
    let mut failure = None;
    for step in targets.chunk_by(|a, b| a.step == b.step) {
        begun += step.len();
        if let Err(why) = freeze_step(run, step, deadline, context).await? {
            failure = Some(why);
            break;
        }
    }
    let Some(status) = run.status.quiesce.as_mut() else { return Ok(Ok(())) };
    for workload in status.workloads.iter_mut().skip(begun) {
        workload.frozen = false;
    }
    Ok(failure.map_or(Ok(()), Err))
}

/// Freezes all workloads of one step at once and waits until all are at rest.
async fn freeze_step(
    run: &mut Run,
    step: &[Target],
    deadline: Timestamp,
    context: &Context,
) -> Result<Result<(), Failure>> {
    let through = |target: &&Target| {
        let workloads = run.status.quiesce.iter().flat_map(|quiesce| &quiesce.workloads);
        workloads.into_iter().find(|w| is_of(w, target)).and_then(|workload| workload.through)
    };
    let (guarded, direct): (Vec<_>, Vec<_>) =
        step.iter().partition(|target| through(target) == Some(Through::Guardian));
    for created in join_all(guarded.iter().map(|target| leases::create(run, target, deadline, context))).await {
        created?;
    }
    let (held, sent) = tokio::join!(
        wait_for_guardians(&run.uid, &guarded, deadline, context),
        join_all(direct.iter().map(|target| freeze_directly(run, target, deadline, context)))
    );
    let mut failures: Vec<(&Target, Failure)> = held?;
    failures.extend(direct.iter().zip(sent).filter_map(|(target, sent)| Some((*target, sent.err()?))));
    let Some(status) = run.status.quiesce.as_mut() else { return Ok(Ok(())) };
    let mut first = None;
    for (target, (reason, why)) in failures {
        let Some(workload) = status.workloads.iter_mut().find(|workload| is_of(workload, target)) else { continue };
        let message = format!("the quiesce {} failed: {why}", place(workload));
        workload.error = Some(message.clone());
        first.get_or_insert((reason, message));
    }
    Ok(first.map_or(Ok(()), Err))
}

fn is_of(workload: &QuiescedWorkload, target: &Target) -> bool {
    workload.step == target.step && workload.pod_uid == target.pod_uid && workload.container == target.container
}

async fn freeze_directly(run: &Run, target: &Target, deadline: Timestamp, context: &Context) -> Result<(), Failure> {
    let left = Duration::try_from(deadline.duration_since(Timestamp::now())).unwrap_or_default();
    let token = leases::name(&run.uid, target.step, &target.pod_uid, &target.container);
    warn!(pod = target.pod, node = target.node, "no guardian is ready on the node; the API server is the way");
    direct::freeze(&context.namespaced(&run.namespace), target, &token, left).await
}

/// Waits until all leases are at rest; what failed otherwise.
async fn wait_for_guardians<'a>(
    uid: &str,
    targets: &[&'a Target],
    deadline: Timestamp,
    context: &Context,
) -> Result<Vec<(&'a Target, Failure)>> {
    let began = tokio::time::Instant::now();
    let mut changes = context.watches.leases();
    let mut waiting = targets.to_vec();
    let mut failed = Vec::new();
    loop {
        let leases = leases::of_backup(uid, context).await?;
        waiting.retain(|target| {
            let name = leases::name(uid, target.step, &target.pod_uid, &target.container);
            let status = leases.get(&name).and_then(|lease| lease.status.clone()).unwrap_or_default();
            let failure = match status.phase {
                Some(LeasePhase::Frozen) => return false,
                Some(LeasePhase::Thawed) => why_not(&status),
                None if began.elapsed() > UNTAKEN => {
                    let message = format!("the guardian on the node {} does not take the lease", target.node);
                    (Reason::HookTimedOut, message)
                }
                _ if Timestamp::now() > deadline => {
                    (Reason::FreezeDeadline, "maxFreeze was over before it was at rest; allow more".to_owned())
                }
                _ => return true,
            };
            failed.push((*target, failure));
            false
        });
        if waiting.is_empty() || !failed.is_empty() {
            return Ok(failed);
        }
        changes.next(TOGETHER, LOOK).await;
    }
}

fn why_not(status: &QuiesceLeaseStatus) -> Failure {
    let end = status.end.unwrap_or(LeaseEnd::Failed);
    (leases::reason_of(end), status.message.clone().unwrap_or_else(|| format!("{end:?}")))
}

/// Lets everything go, in reverse order. `false`: something may still be frozen, try again.
pub(super) async fn thaw(run: &mut Run, context: &Context) -> Result<bool> {
    let Some(mut status) = run.status.quiesce.clone() else { return Ok(true) };
    let mut broken = None;
    let mut stuck = None;
    for step in status.workloads.chunk_by_mut(|a, b| a.step == b.step).rev() {
        let frozen = || step.iter().filter(|workload| workload.frozen && workload.through != Some(Through::ApiServer));
        let names: Vec<_> = frozen().map(|w| leases::name(&run.uid, w.step, &w.pod_uid, &w.container)).collect();
        for released in join_all(names.iter().map(|name| leases::release(name, context))).await {
            released?;
        }
        for workload in step.iter_mut().filter(|workload| workload.frozen) {
            match let_go(run, workload, context).await? {
                Thawed::Whole => workload.frozen = false,
                Thawed::Broken((reason, why)) => {
                    workload.frozen = false;
                    let message = format!("{} did not stay at rest until it was released: {why}", place(workload));
                    workload.error.get_or_insert_with(|| message.clone());
                    broken.get_or_insert((reason, message));
                }
                Thawed::Unconfirmed(why) => {
                    let message = format!("{} may still be frozen: {why}", place(workload));
                    warn!(message, "it is tried again");
                    workload.error = Some(message.clone());
                    stuck = Some(message);
                }
            }
        }
        if stuck.is_some() {
            break;
        }
    }
    run.status.quiesce = Some(status);
    if let Some(message) = stuck {
        run.save(context).await?;
        context.events.warning(&run.backup, Reason::HookFailed, format!("the application: {message}")).await;
        return Ok(false);
    }
    note_thaw(run, broken, context).await?;
    leases::remove(&run.uid, context).await?;
    Ok(true)
}

/// How one workload came out of its freeze.
enum Thawed {
    /// At rest until it was released.
    Whole,
    /// Thawed, but earlier.
    Broken(Failure),
    Unconfirmed(String),
}

/// Lets one workload go; its lease was released before.
async fn let_go(run: &Run, workload: &mut QuiescedWorkload, context: &Context) -> Result<Thawed> {
    let pods = context.namespaced::<Pod>(&run.namespace);
    let token = leases::name(&run.uid, workload.step, &workload.pod_uid, &workload.container);
    if workload.through == Some(Through::ApiServer) {
        let frozen_at = run.status.quiesce.as_ref().and_then(|quiesce| quiesce.frozen_at.clone());
        let end = direct::thaw(&pods, &workload.pod, &workload.pod_uid, &workload.container, &token).await;
        workload.freeze_millis =
            frozen_at.and_then(|since| u64::try_from(Timestamp::now().duration_since(since.0).as_millis()).ok());
        return Ok(match end {
            LetGo::Held => Thawed::Whole,
            LetGo::NotHeld => Thawed::Broken((Reason::FreezeBroken, "it was not held any more".to_owned())),
            LetGo::Unconfirmed(why) => Thawed::Unconfirmed(why),
        });
    }
    let end = tokio::time::Instant::now() + THAW_PATIENCE;
    let mut changes = context.watches.leases();
    loop {
        let leases = leases::of_backup(&run.uid, context).await?;
        let Some(lease) = leases.get(&token) else {
            return Ok(Thawed::Broken((Reason::FreezeBroken, "its lease is gone".to_owned())));
        };
        let status = lease.status.clone().unwrap_or_default();
        workload.watchdog = status.watchdog;
        workload.freeze_millis = status.freeze_millis;
        match (status.phase, status.end) {
            // A guardian writes down that it begins: this one never did, and does not take what is released.
            (None, _) => return Ok(Thawed::Broken((Reason::FreezeBroken, "no guardian took its lease".to_owned()))),
            (Some(LeasePhase::Thawed), Some(LeaseEnd::Released)) => return Ok(Thawed::Whole),
            (Some(LeasePhase::Thawed), _) => return Ok(Thawed::Broken(why_not(&status))),
            _ if tokio::time::Instant::now() > end => {
                let why = status.message.unwrap_or_else(|| "the guardian of its node does not answer".to_owned());
                if workload.container.is_empty() {
                    return Ok(Thawed::Unconfirmed(why));
                }
                // The watchdog in the container hears also this voice.
                return Ok(
                    match direct::thaw(&pods, &workload.pod, &workload.pod_uid, &workload.container, &token).await {
                        LetGo::Held | LetGo::NotHeld => Thawed::Broken((Reason::FreezeBroken, why)),
                        LetGo::Unconfirmed(other) => Thawed::Unconfirmed(format!("{why}; {other}")),
                    },
                );
            }
            _ => changes.next(TOGETHER, LOOK).await,
        }
    }
}

async fn note_thaw(run: &mut Run, broken: Option<Failure>, context: &Context) -> Result<()> {
    let now = Timestamp::now();
    let Some(status) = run.status.quiesce.as_mut() else { return Ok(()) };
    status.thawed_at = Some(Time(now));
    if let Some(frozen_at) = &status.frozen_at {
        let frozen = now.duration_since(frozen_at.0);
        status.freeze_millis = u64::try_from(frozen.as_millis()).ok();
        context.metrics.freeze_seconds.observe(frozen.as_secs_f64());
        info!(millis = status.freeze_millis, "thawed");
    }
    let is_direct = status.workloads.iter().any(|workload| workload.through == Some(Through::ApiServer));
    let failed = conditions::get(&run.status.conditions, ConditionType::Quiesced)
        .is_some_and(|condition| condition.status == "False");
    match broken {
        _ if failed => run.save(context).await,
        Some((reason, message)) => note_failure(run, context, reason, message).await,
        None => {
            let way = if is_direct { ", by way of the API server where no guardian was ready" } else { "" };
            let message = format!("the application was at rest while it was read, and runs again{way}");
            run.set(ConditionType::Quiesced, State::True, Reason::Done, message);
            run.save(context).await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_is_no_release_says_why() {
        let status = |end, message: Option<&str>| QuiesceLeaseStatus {
            end: Some(end),
            message: message.map(str::to_owned),
            ..QuiesceLeaseStatus::default()
        };
        assert_eq!(why_not(&status(LeaseEnd::SessionLost, None)), (Reason::FreezeBroken, "SessionLost".into()));
        assert_eq!(why_not(&status(LeaseEnd::Deadline, Some("late"))), (Reason::FreezeDeadline, "late".into()));
        assert_eq!(why_not(&QuiesceLeaseStatus::default()).0, Reason::HookFailed);
    }

    #[test]
    fn the_longest_freeze_has_a_default() {
        assert_eq!(longest(None), SignedDuration::from_secs(60));
        assert_eq!(longest(Some(&DurationString("5s".into()))), SignedDuration::from_secs(5));
    }
}
