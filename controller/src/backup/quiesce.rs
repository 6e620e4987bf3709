//! Freezes and thaws an application by commands in its containers.
//!
//! The freeze is written down before the first command is sent: whoever reads the status knows what may be frozen.

use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use kube::api::ListParams;
use lifeboat_crds::DurationString;
use lifeboat_crds::backup::{QuiesceStatus, QuiescedWorkload};
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::plan::{Quiesce, QuiesceStep, selector_matches};
use tracing::{info, warn};

use super::{Run, resolve};
use crate::context::Context;
use crate::hooks::{self, HookEnd};

const DEFAULT_MAX_FREEZE: Duration = Duration::from_mins(1);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// A thaw command that fails is tried this often before the reconciliation ends; the next one goes on trying.
const THAW_ATTEMPTS: u32 = 3;
const THAW_PAUSE: Duration = Duration::from_millis(500);

fn duration(text: Option<&DurationString>, default: Duration) -> Duration {
    // The schema refuses texts that are no durations.
    text.and_then(|text| text.get().ok()).unwrap_or(default)
}

/// The containers in which a step runs, or why there are none.
fn workloads(number: usize, step: &QuiesceStep, pods: &[Pod]) -> Result<Vec<QuiescedWorkload>, String> {
    let mut found: Vec<_> =
        pods.iter().filter(|pod| resolve::is_readable(pod) && selector_matches(&step.selector, pod.labels())).collect();
    found.sort_by_key(|pod| pod.name_any());
    if found.is_empty() {
        return Err(format!(
            "the quiesce step {number} selects no running pod; correct its selector or start the application"
        ));
    }
    found
        .into_iter()
        .map(|pod| {
            let containers: Vec<_> =
                pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| container.name.clone()).collect();
            let container = match &step.container {
                Some(name) if containers.contains(name) => name.clone(),
                Some(name) => {
                    return Err(format!(
                        "the pod {} has no container `{name}`; it has {}",
                        pod.name_any(),
                        containers.join(", ")
                    ));
                }
                None => containers.first().cloned().unwrap_or_default(),
            };
            Ok(QuiescedWorkload {
                step: u32::try_from(number).unwrap_or(u32::MAX),
                pod: pod.name_any(),
                pod_uid: pod.uid().unwrap_or_default(),
                container,
                frozen: true,
                error: None,
            })
        })
        .collect()
}

/// Announces the freeze, then freezes in order. A failure is written down; thawing is the next step.
pub(super) async fn freeze(run: &mut Run, context: &Context) -> Result<()> {
    let Some(quiesce) = run.status.plan.as_ref().and_then(|plan| plan.quiesce.clone()) else { return Ok(()) };
    let pods =
        context.namespaced::<Pod>(&run.namespace).list(&ListParams::default()).await.context("cannot list pods")?.items;
    let mut announced = Vec::new();
    for (number, step) in quiesce.steps.iter().enumerate() {
        match workloads(number, step, &pods) {
            Ok(found) => announced.extend(found),
            Err(message) => {
                run.status.quiesce = Some(QuiesceStatus::default());
                return note_failure(run, context, Reason::HookFailed, message).await;
            }
        }
    }
    let now = Timestamp::now();
    let longest = duration(quiesce.max_freeze.as_ref(), DEFAULT_MAX_FREEZE);
    let deadline = SignedDuration::try_from(longest)
        .ok()
        .and_then(|longest| now.checked_add(longest).ok())
        .unwrap_or(Timestamp::MAX);
    run.status.quiesce = Some(QuiesceStatus {
        frozen_at: Some(Time(now)),
        deadline: Some(Time(deadline)),
        workloads: announced,
        ..QuiesceStatus::default()
    });
    run.set(ConditionType::Quiesced, State::Unknown, Reason::InProgress, "the application is being frozen");
    run.save(context).await?;
    match freeze_all(run, &quiesce, deadline, context).await {
        Ok(()) => {
            info!("frozen");
            run.set(ConditionType::Quiesced, State::Unknown, Reason::Done, "the application is frozen");
            run.save(context).await
        }
        Err((reason, message)) => note_failure(run, context, reason, message).await,
    }
}

async fn note_failure(run: &mut Run, context: &Context, reason: Reason, message: String) -> Result<()> {
    warn!(reason = reason.as_str(), message, "the freeze failed");
    run.set(ConditionType::Quiesced, State::False, reason, message.clone());
    run.save(context).await?;
    context.events.warning(&run.backup, reason, message).await;
    Ok(())
}

/// Sends the freeze commands; after a failure, what was never sent is marked as not frozen.
async fn freeze_all(
    run: &mut Run,
    quiesce: &Quiesce,
    deadline: Timestamp,
    context: &Context,
) -> Result<(), (Reason, String)> {
    let pods = context.namespaced::<Pod>(&run.namespace);
    let Some(status) = run.status.quiesce.as_mut() else { return Ok(()) };
    let mut failure = None;
    for workload in &mut status.workloads {
        if failure.is_some() {
            workload.frozen = false;
            continue;
        }
        let Some(hook) = quiesce.steps.get(workload.step as usize).map(|step| &step.exec) else { continue };
        let Some(command) = &hook.freeze else { continue };
        let left = Duration::try_from(deadline.duration_since(Timestamp::now())).unwrap_or_default();
        let limit = duration(hook.timeout.as_ref(), DEFAULT_TIMEOUT).min(left);
        let at = format!("the freeze command of step {} in {}/{}", workload.step, workload.pod, workload.container);
        let end = hooks::run(&pods, &workload.pod, &workload.pod_uid, &workload.container, command, limit).await;
        failure = match end {
            HookEnd::Done => None,
            HookEnd::Failed(why) => Some((Reason::HookFailed, format!("{at} failed: {why}"))),
            HookEnd::TimedOut(limit) => Some((
                Reason::HookTimedOut,
                format!("{at} did not end within {limit:.1?}; allow it more or look why it hangs"),
            )),
            HookEnd::Gone(why) => Some((Reason::HookFailed, format!("{at} was not run: {why}"))),
        };
        workload.error = failure.as_ref().map(|(_, message)| message.clone());
    }
    failure.map_or(Ok(()), Err)
}

/// Thaws in reverse order. `false`: something may still be frozen, try again.
pub(super) async fn thaw(run: &mut Run, context: &Context) -> Result<bool> {
    let steps =
        run.status.plan.as_ref().and_then(|plan| plan.quiesce.clone()).map(|quiesce| quiesce.steps).unwrap_or_default();
    let pods = context.namespaced::<Pod>(&run.namespace);
    let Some(status) = run.status.quiesce.as_mut() else { return Ok(true) };
    let mut stuck = None;
    for workload in status.workloads.iter_mut().rev().filter(|workload| workload.frozen) {
        let hook = steps.get(workload.step as usize).map(|step| &step.exec);
        let Some((hook, command)) = hook.and_then(|hook| Some((hook, hook.thaw.as_ref()?))) else {
            // Nothing to run: the freeze command's effect ends by itself.
            workload.frozen = false;
            continue;
        };
        let limit = duration(hook.timeout.as_ref(), DEFAULT_TIMEOUT);
        for _ in 0..THAW_ATTEMPTS {
            let end = hooks::run(&pods, &workload.pod, &workload.pod_uid, &workload.container, command, limit).await;
            let why = match end {
                HookEnd::Done => {
                    workload.frozen = false;
                    break;
                }
                HookEnd::Gone(why) => {
                    warn!(pod = workload.pod, why, "nothing is left to thaw");
                    workload.frozen = false;
                    break;
                }
                HookEnd::Failed(why) => why,
                HookEnd::TimedOut(limit) => format!("it did not end within {limit:.1?}"),
            };
            let message = format!(
                "the thaw command of step {} in {}/{} failed: {why}",
                workload.step, workload.pod, workload.container
            );
            warn!(message, "it is tried again");
            workload.error = Some(message.clone());
            stuck = Some(message);
            tokio::time::sleep(THAW_PAUSE).await;
        }
        if workload.frozen {
            break;
        }
        stuck = None;
    }
    let still_frozen = status.workloads.iter().any(|workload| workload.frozen);
    if still_frozen {
        let message = stuck.unwrap_or_default();
        run.save(context).await?;
        context
            .events
            .warning(&run.backup, Reason::HookFailed, format!("the application may still be frozen: {message}"))
            .await;
        return Ok(false);
    }
    note_thaw(run, context).await?;
    Ok(true)
}

async fn note_thaw(run: &mut Run, context: &Context) -> Result<()> {
    let now = Timestamp::now();
    let Some(status) = run.status.quiesce.as_mut() else { return Ok(()) };
    status.thawed_at = Some(Time(now));
    if let Some(frozen_at) = &status.frozen_at {
        let frozen = now.duration_since(frozen_at.0);
        status.freeze_millis = u64::try_from(frozen.as_millis()).ok();
        context.metrics.freeze_seconds.observe(frozen.as_secs_f64());
        info!(millis = status.freeze_millis, "thawed");
    }
    let failed = conditions::get(&run.status.conditions, ConditionType::Quiesced)
        .is_some_and(|condition| condition.status == "False");
    if !failed {
        run.set(
            ConditionType::Quiesced,
            State::True,
            Reason::Done,
            "the application was at rest while it was read, and runs again",
        );
    }
    run.save(context).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, phase: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": name, "labels": {"app": "db"}},
            "spec": {"containers": [{"name": "main"}, {"name": "side"}]}, "status": {"phase": phase}
        }))
        .unwrap()
    }

    fn step(container: Option<&str>, app: &str) -> QuiesceStep {
        serde_json::from_value(
            json!({"selector": {"matchLabels": {"app": app}}, "container": container, "exec": {"freeze": ["x"]}}),
        )
        .unwrap()
    }

    #[test]
    fn a_step_runs_in_all_running_pods_in_order_of_their_names() {
        let pods = [pod("b", "Running"), pod("a", "Running"), pod("c", "Pending")];
        let found = workloads(2, &step(None, "db"), &pods).unwrap();
        let names: Vec<_> = found.iter().map(|w| (w.step, w.pod.as_str(), w.container.as_str())).collect();
        assert_eq!(names, [(2, "a", "main"), (2, "b", "main")]);
        assert_eq!(workloads(0, &step(Some("side"), "db"), &pods).unwrap()[0].container, "side");
    }

    #[test]
    fn a_step_that_fits_nothing_says_so() {
        let pods = [pod("a", "Running")];
        assert!(workloads(0, &step(None, "web"), &pods).unwrap_err().contains("selects no running pod"));
        assert!(workloads(0, &step(Some("nothing"), "db"), &pods).unwrap_err().contains("main, side"));
    }
}
