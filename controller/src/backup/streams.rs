//! Streams of a backup: the plan's are checked before anything else is done, and run once nothing is frozen any more.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::ListParams;
use lifeboat_crds::VolumeTask;
use lifeboat_crds::backup::{Phase, StreamBackupStatus};
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::plan::{BackupPlan, StreamRule};
use lifeboat_crds::quiesce_lease::LeasedWorkload;
use lifeboat_crds::volume_task::{DumpOperation, Operation};
use tracing::info;

use super::resolve::Refusal;
use super::{Run, access, decide};
use crate::context::Context;
use crate::dispatch::{self, Need, Place, Verdict};
use crate::recovery_point::{stream_lineage, tags};
use crate::stream::{self, Spot};
use crate::task::{self, Order};

/// A pod that was frozen, or is restarted, is ready again within this time.
const READY_LIMIT: SignedDuration = SignedDuration::from_mins(3);
/// How often it is looked meanwhile.
const READY_PAUSE: Duration = Duration::from_secs(2);

async fn pods(run: &Run, context: &Context) -> Result<Vec<Pod>> {
    let pods = context.namespaced::<Pod>(&run.namespace).list(&ListParams::default()).await;
    Ok(pods.context("cannot list pods")?.items)
}

fn spot(rule: &StreamRule, pods: &[Pod]) -> Result<Spot, String> {
    stream::choose(&rule.selector, rule.container.as_deref(), pods)
        .map_err(|why| format!("the stream {} cannot be read: {why}", rule.name))
}

/// The streams of the plan, if each has a pod.
pub(super) async fn resolve(
    run: &Run,
    plan: &BackupPlan,
    context: &Context,
) -> Result<Result<Vec<StreamBackupStatus>, Refusal>> {
    if plan.streams.is_empty() {
        return Ok(Ok(Vec::new()));
    }
    let pods = pods(run, context).await?;
    let noted = |rule: &StreamRule| {
        spot(rule, &pods).map_err(|why| Refusal::new(Reason::NoPodForStream, why))?;
        Ok(StreamBackupStatus { name: rule.name.clone(), ..StreamBackupStatus::default() })
    };
    Ok(plan.streams.iter().map(noted).collect())
}

/// What came of asking for the turns of streams.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// One may begin.
    pub(super) begins: bool,
    /// What the first that has to wait waits for.
    pub(super) waits: Option<(Reason, String)>,
    /// When to ask again, for each that waits.
    pub(super) pauses: Vec<Duration>,
    /// The backup cannot go on.
    pub(super) refused: Option<(Reason, String)>,
}

/// Chooses the pods of the streams that did not have their turn yet, and asks for it.
pub(super) async fn ask(run: &mut Run, context: &Context) -> Result<Turns> {
    let mut turns = Turns::default();
    if !run.status.streams.iter().any(decide::is_undispatched) {
        return Ok(turns);
    }
    let pods = pods(run, context).await?;
    let rules = run.status.plan.as_ref().map(|plan| plan.streams.clone()).unwrap_or_default();
    for number in 0..run.status.streams.len() {
        let stream = &run.status.streams[number];
        if !decide::is_undispatched(stream) {
            continue;
        }
        let rule = rules.iter().find(|rule| rule.name == stream.name).context("a stream is not in the plan")?;
        let spot = match spot(rule, &pods) {
            Ok(spot) => spot,
            Err(why) if is_overdue(run, Timestamp::now()) => {
                turns.refused = Some((Reason::NoPodForStream, why));
                return Ok(turns);
            }
            Err(why) => {
                run.status.streams[number].message = Some(why);
                turns.pauses.push(READY_PAUSE);
                continue;
            }
        };
        let key = dispatch::volume_key(&run.uid, &stream::key(&stream.name));
        let verdict = context.dispatch.ask(context, run.work(key, Need::Volume(Place::On(spot.node.clone())))).await?;
        let stream = &mut run.status.streams[number];
        match verdict {
            Verdict::Start(_) => {
                stream.pod = Some(spot.workload.pod);
                stream.pod_uid = Some(spot.workload.pod_uid);
                stream.container = Some(spot.workload.container);
                stream.node = Some(spot.node);
                stream.dispatched_at = Some(Time(Timestamp::now()));
                stream.message = None;
                turns.begins = true;
            }
            Verdict::Wait { reason, message, ahead } => {
                stream.message = Some(format!("waiting for its turn: {message}"));
                let name = stream.name.clone();
                turns.waits.get_or_insert_with(|| (reason, format!("the stream {name} waits: {message}")));
                turns.pauses.push(dispatch::pause(ahead));
            }
        }
    }
    Ok(turns)
}

/// Whether a pod that is not ready is not waited for any more.
fn is_overdue(run: &Run, now: Timestamp) -> bool {
    let thawed = run.status.quiesce.as_ref().and_then(|quiesce| quiesce.thawed_at.as_ref());
    let since = [thawed, run.status.start_time.as_ref()].into_iter().flatten().map(|time| time.0).max();
    since.is_none_or(|since| now.duration_since(since) > READY_LIMIT)
}

/// Makes the tasks of streams that had their turn.
pub(super) async fn start(run: &mut Run, context: &Context) -> Result<()> {
    let api: Api<VolumeTask> = context.namespaced(&context.namespace);
    let tasks = task::of_owner(&api, &run.uid).await?;
    for number in 0..run.status.streams.len() {
        let stream = &run.status.streams[number];
        if !decide::lacks_task(&run.uid, stream, &tasks) {
            continue;
        }
        match order(run, context, stream).await? {
            Ok(order) => task::create(&api, order).await?,
            Err((reason, message)) => return run.fail(context, reason, message).await,
        }
        info!(stream = stream.name, node = stream.node, "a stream is being read");
        run.status.streams[number].phase = Phase::Running;
    }
    run.save(context).await
}

async fn order(run: &Run, context: &Context, stream: &StreamBackupStatus) -> Result<Result<Order, (Reason, String)>> {
    let rules = run.status.plan.iter().flat_map(|plan| &plan.streams);
    let rule = rules.clone().find(|rule| rule.name == stream.name).context("a stream is not in the plan")?;
    let repository = match access(run, context).await? {
        Ok(repository) => repository,
        Err(refused) => return Ok(Err(refused)),
    };
    let cluster = context.cluster().await?;
    let mut all: BTreeMap<_, _> = run.tags(cluster);
    all.insert(tags::STREAM.to_owned(), stream.name.clone());
    let noted = |text: &Option<String>| text.clone().unwrap_or_default();
    let command = stream::command(&rule.command, rule.timeout.as_ref());
    Ok(Ok(Order {
        name: decide::stream_task(&run.uid, stream),
        owner: format!("Backup/{}", run.name),
        owner_uid: run.uid.clone(),
        node: noted(&stream.node),
        volume: None,
        workload: Some(LeasedWorkload {
            namespace: run.namespace.clone(),
            pod: noted(&stream.pod),
            pod_uid: noted(&stream.pod_uid),
            container: noted(&stream.container),
        }),
        repository,
        deadline: stream::deadline(&command, Timestamp::now()),
        operation: Operation::Dump(DumpOperation {
            lineage: stream_lineage(cluster, &run.namespace, &stream.name),
            tags: all,
            file: stream.name.clone(),
            command,
        }),
    }))
}
