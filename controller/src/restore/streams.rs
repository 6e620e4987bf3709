//! Gives the files of streams to their commands, one after the other in the plan's order, once objects and volumes are back.
//!
//! A command is run once: nobody knows what one did that broke off, so that ends the restore.

use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use lifeboat_crds::VolumeTask;
use lifeboat_crds::backup::Phase;
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};
use lifeboat_crds::plan::StreamRestore;
use lifeboat_crds::restore::{StreamRestoreStatus, StreamsRestore};
use lifeboat_crds::volume_task::{FeedOperation, Operation, RepositoryAccess};
use lifeboat_process::access::AccessError;
use lifeboat_process::telemetry::chain;
use tracing::info;

use super::{Run, apply};
use crate::context::Context;
use crate::dispatch::{self, Kind, Need, Place, Verdict, Work};
use crate::recovery_point::{Description, Stream};
use crate::stream::{self, Spot};
use crate::task::{self, Order, Standing};

/// A restored pod must be ready within this time, from when the stream before it was restored.
const READY_LIMIT: SignedDuration = SignedDuration::from_mins(15);

/// Why the restore cannot go on.
type Refused = (Reason, String);

/// The streams of a recovery point as a restore notes them.
pub(super) fn noted(streams: &[Stream], wanted: StreamsRestore) -> Vec<StreamRestoreStatus> {
    let why_not = |stream: &Stream| match (wanted, &stream.restore) {
        (StreamsRestore::Ignore, _) => Some("spec.streams of the restore is Ignore".to_owned()),
        (StreamsRestore::Restore, None) => Some("the plan of the backup gives it no restore command".to_owned()),
        (StreamsRestore::Restore, Some(_)) => None,
    };
    let note = |stream: &Stream| StreamRestoreStatus {
        name: stream.name.clone(),
        snapshot: stream.snapshot.to_string(),
        not_restored: why_not(stream),
        selector: Some(stream.selector.clone()),
        container: stream.container.clone(),
        ..StreamRestoreStatus::default()
    };
    streams.iter().map(note).collect()
}

/// The first stream that is still to be given to its command.
fn next(streams: &[StreamRestoreStatus]) -> Option<usize> {
    streams.iter().position(|stream| stream.not_restored.is_none() && stream.phase != Phase::Succeeded)
}

/// Whether there are streams that are still to be given to a command.
pub(super) fn are_left(run: &Run) -> bool {
    next(&run.status.streams).is_some()
}

/// Says since when the next stream waits for its pod.
pub(super) fn note_begin(run: &mut Run, message: &str) {
    // The time of the change is what counts.
    run.status.conditions.retain(|one| one.type_ != ConditionType::StreamsRestored.as_str());
    run.set(ConditionType::StreamsRestored, State::Unknown, Reason::InProgress, message);
}

/// How those are found that no command was given; empty when there are none.
pub(super) fn note_end(run: &mut Run) -> String {
    let streams = &run.status.streams;
    if streams.is_empty() {
        return String::new();
    }
    let left: Vec<_> = streams
        .iter()
        .filter_map(|stream| {
            Some(format!("{} of the snapshot {}: {}", stream.name, stream.snapshot, stream.not_restored.as_ref()?))
        })
        .collect();
    if left.is_empty() {
        run.set(ConditionType::StreamsRestored, State::True, Reason::Done, "every stream was given to its command");
        return String::new();
    }
    let message = format!("streams were not restored, and can be read with `lifeboat cat`: {}", left.join("; "));
    run.set(ConditionType::StreamsRestored, State::False, Reason::StreamsNotRestored, message.clone());
    format!("; {message}")
}

/// One step towards restored streams. `true`: there is nothing to wait for.
pub(super) async fn feed(run: &mut Run, context: &Context) -> Result<bool> {
    let Some(number) = next(&run.status.streams) else {
        return apply::finish(run, context).await.map(|()| true);
    };
    let before = run.status.clone();
    let stream = run.status.streams[number].clone();
    let tasks = task::of_owner(&context.namespaced(&context.namespace), &run.uid).await?;
    let mut waits = None;
    let fed = match tasks.get(&task_name(run, &stream)) {
        Some(task) => observe(stream, task, Timestamp::now()),
        None => begin(run, context, stream, &mut waits).await?,
    };
    let stream = match fed {
        Ok(stream) => stream,
        Err((reason, message)) => {
            run.set(ConditionType::StreamsRestored, State::False, reason, message.clone());
            return run.fail(context, reason, message).await.map(|()| true);
        }
    };
    let is_done = stream.phase == Phase::Succeeded;
    run.status.streams[number] = stream;
    run.note_waiting(waits);
    if is_done {
        note_begin(run, "streams are being restored");
    }
    if run.status != before {
        run.save(context).await?;
    }
    Ok(is_done)
}

fn task_name(run: &Run, stream: &StreamRestoreStatus) -> String {
    task::name('f', &run.uid, &stream::key(&stream.name))
}

/// Chooses the pod, and makes the task when it is ready and the stream has its turn.
async fn begin(
    run: &mut Run,
    context: &Context,
    mut stream: StreamRestoreStatus,
    waits: &mut Option<Refused>,
) -> Result<Result<StreamRestoreStatus, Refused>> {
    let pods = context.namespaced::<Pod>(&run.namespace).list(&ListParams::default()).await;
    let pods = pods.context("cannot list pods")?.items;
    let selector = stream.selector.clone().unwrap_or_default();
    let spot = match stream::choose(&selector, stream.container.as_deref(), &pods) {
        Ok(spot) => spot,
        Err(why) if is_overdue(run, Timestamp::now()) => {
            let message = format!("the stream {} was not restored: {why} within {READY_LIMIT:#}", stream.name);
            return Ok(Err((Reason::NoPodForStream, message)));
        }
        Err(why) => {
            stream.message = Some(format!("waiting for its pod: {why}"));
            return Ok(Ok(stream));
        }
    };
    let made = run.restore.metadata.creation_timestamp.as_ref().map_or_else(Timestamp::now, |made| made.0);
    let work = Work {
        key: dispatch::volume_key(&run.uid, &stream::key(&stream.name)),
        kind: Kind::Restore,
        repository: run.status.repository.as_ref().map(|repository| repository.name.clone()).unwrap_or_default(),
        namespace: run.namespace.clone(),
        due: made,
        need: Need::Volume(Place::On(spot.node.clone())),
    };
    if let Verdict::Wait { reason, message, .. } = context.dispatch.ask(context, work).await? {
        stream.message = Some(format!("waiting for its turn: {message}"));
        *waits = Some((reason, format!("the stream {} waits: {message}", stream.name)));
        return Ok(Ok(stream));
    }
    if let Err(refused) = order(run, context, &stream, &spot).await? {
        return Ok(Err(refused));
    }
    info!(stream = stream.name, pod = spot.workload.pod, "a stream is given to its command");
    (stream.pod, stream.node, stream.message) = (Some(spot.workload.pod), Some(spot.node), None);
    stream.container = Some(spot.workload.container);
    stream.phase = Phase::Running;
    Ok(Ok(stream))
}

fn is_overdue(run: &Run, now: Timestamp) -> bool {
    let since = conditions::get(&run.status.conditions, ConditionType::StreamsRestored);
    since.is_some_and(|since| now.duration_since(since.last_transition_time.0) > READY_LIMIT)
}

/// Makes the task. `Err`: why it cannot be made.
async fn order(run: &Run, context: &Context, stream: &StreamRestoreStatus, spot: &Spot) -> Result<Result<(), Refused>> {
    let (repository, object) = match run.open_repository(context).await? {
        Ok(opened) => opened,
        Err(error) => return Ok(Err((error.reason, error.message))),
    };
    let snapshots = match repository.snapshots().await {
        Ok(snapshots) => snapshots,
        Err(error) => {
            let error = AccessError::from_repository(&error);
            return Ok(Err((error.reason, error.message)));
        }
    };
    let point = run.status.recovery_point.as_ref().context("no recovery point is pinned")?;
    let found = snapshots.iter().find(|snapshot| snapshot.id.to_string() == point.id);
    let described = match found.map(Description::of).transpose() {
        Ok(described) => described,
        Err(error) => return Ok(Err((Reason::SourceUnusable, chain(&error)))),
    };
    let of_name = described.and_then(|point| point.streams.into_iter().find(|one| one.name == stream.name));
    let Some(Stream { restore: Some(StreamRestore { command, timeout }), .. }) = of_name else {
        let message = format!(
            "the recovery point {} with the stream {} is not in the repository any more",
            point.id, stream.name
        );
        return Ok(Err((Reason::RecoveryPointNotFound, message)));
    };
    let pinned = run.status.repository.clone().context("no repository is pinned")?;
    let command = stream::command(&command, timeout.as_ref());
    let order = Order {
        name: task_name(run, stream),
        owner: format!("Restore/{}", run.name),
        owner_uid: run.uid.clone(),
        node: spot.node.clone(),
        volume: None,
        workload: Some(spot.workload.clone()),
        repository: RepositoryAccess::new(pinned.name, pinned.id, object.spec),
        deadline: stream::deadline(&command, Timestamp::now()),
        operation: Operation::Feed(FeedOperation {
            snapshot: stream.snapshot.clone(),
            file: stream.name.clone(),
            command,
        }),
    };
    task::create(&context.namespaced(&context.namespace), order).await.map(Ok)
}

/// Takes over what a task says.
fn observe(mut stream: StreamRestoreStatus, task: &VolumeTask, now: Timestamp) -> Result<StreamRestoreStatus, Refused> {
    // Written down now if an earlier life of this controller made the task and could not.
    let workload = task.spec.workload.as_ref();
    stream.pod = workload.map(|workload| workload.pod.clone());
    stream.container = workload.map(|workload| workload.container.clone());
    stream.node = Some(task.spec.node_name.clone());
    stream.message = None;
    match task::standing(task, now) {
        Standing::Waiting(message) | Standing::Running(message) => {
            stream.phase = Phase::Running;
            stream.message = message;
            if let Some(progress) = task.status.as_ref().and_then(|status| status.progress) {
                stream.transfer.get_or_insert_default().read_bytes = progress.bytes_done;
            }
        }
        Standing::Failed(reason, message) => {
            let message = format!("the stream {} was not restored: {message}", stream.name);
            return Err((Reason::from_text(&reason), message));
        }
        Standing::Succeeded => {
            let transfer = task.status.as_ref().and_then(|status| status.result.as_ref()).map(|result| result.transfer);
            stream.phase = Phase::Succeeded;
            stream.transfer = transfer;
            // It says that all is there; that is its word.
            stream.message = transfer.filter(|transfer| transfer.read_bytes < transfer.bytes).map(|transfer| {
                format!("the command ended well after it was given {} of {} bytes", transfer.read_bytes, transfer.bytes)
            });
        }
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
    use lifeboat_repository::id::SnapshotId;
    use serde_json::{Value, json};

    fn stream(name: &str, restore: bool) -> Stream {
        let restore = restore.then(|| StreamRestore { command: vec!["psql".into()], timeout: None });
        Stream {
            name: name.into(),
            snapshot: SnapshotId::random(),
            selector: LabelSelector::default(),
            container: None,
            restore,
        }
    }

    fn run(streams: Vec<StreamRestoreStatus>) -> Run {
        let mut run = Run::new(
            serde_json::from_value(json!({
                "apiVersion": "lifeboat.dev/v1alpha1", "kind": "Restore", "metadata": {"name": "r", "namespace": "n", "uid": "u"},
                "spec": {"source": {"backupRef": {"name": "b"}}}
            }))
            .unwrap(),
        );
        run.status.streams = streams;
        run
    }

    fn task(status: &Value) -> VolumeTask {
        serde_json::from_value(json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "VolumeTask", "metadata": {"name": "f"},
            "spec": {
                "nodeName": "n1", "deadline": "2026-01-01T04:00:00Z",
                "workload": {"namespace": "ns", "pod": "db-0", "podUid": "u", "container": "db"},
                "repository": {"name": "r", "id": "ab", "backend": {"filesystem": {"path": "/x"}}, "encryptionSecret": {"name": "s"}},
                "operation": {"feed": {"snapshot": "ab", "file": "a.sql", "command": {"words": ["psql"], "limitMillis": 1}}}
            },
            "status": status
        }))
        .unwrap()
    }

    fn ended(status: &str) -> Value {
        json!([{"type": "Succeeded", "status": status, "reason": "StreamFailed", "message": "exit code 3: no such role", "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    }

    #[test]
    fn streams_that_no_command_is_given_are_named_and_never_passed_over() {
        let streams = [stream("a.sql", true), stream("b.sql", false)];
        let mut run = run(noted(&streams, StreamsRestore::Restore));
        assert!(are_left(&run));
        run.status.streams[0].phase = Phase::Succeeded;
        assert!(!are_left(&run));
        let told = note_end(&mut run);
        assert!(
            told.contains(&format!("b.sql of the snapshot {}", streams[1].snapshot)) && !told.contains("a.sql"),
            "{told}"
        );
        let condition = conditions::get(&run.status.conditions, ConditionType::StreamsRestored).unwrap();
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "StreamsNotRestored"));

        let mut ignored = self::run(noted(&streams, StreamsRestore::Ignore));
        assert!(!are_left(&ignored));
        assert!(note_end(&mut ignored).contains("Ignore"));
        let mut all = self::run(noted(&streams[..1], StreamsRestore::Restore));
        assert_eq!(note_end(&mut all), "");
        assert!(conditions::is_true(&all.status.conditions, ConditionType::StreamsRestored));
        let mut none = self::run(Vec::new());
        assert_eq!(note_end(&mut none), "");
        assert!(none.status.conditions.is_empty());
    }

    #[test]
    fn what_the_task_says_is_taken_over_and_a_failed_command_fails_the_restore() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let noted = noted(&[stream("a.sql", true)], StreamsRestore::Restore).remove(0);
        let running = observe(
            noted.clone(),
            &task(&json!({"progress": {"entriesDone": 0, "bytesDone": 5, "bytesTotal": 0, "bytesPerSecond": 0}})),
            now,
        )
        .unwrap();
        assert_eq!(
            (running.phase, running.pod.as_deref(), running.node.as_deref()),
            (Phase::Running, Some("db-0"), Some("n1"))
        );
        let (reason, message) = observe(noted.clone(), &task(&json!({"conditions": ended("False")})), now).unwrap_err();
        assert_eq!(reason, Reason::StreamFailed);
        assert!(message.contains("a.sql was not restored: exit code 3: no such role"), "{message}");
        let result = |given: u64| {
            let transfer =
                json!({"files": 1, "bytes": 100, "readBytes": given, "newBytes": 0, "storedBytes": 0, "millis": 1});
            task(
                &json!({"conditions": ended("True"), "result": {"snapshot": "ab", "transfer": transfer, "skipped": 0}}),
            )
        };
        let done = observe(noted.clone(), &result(100), now).unwrap();
        assert_eq!((done.phase, done.message), (Phase::Succeeded, None));
        let early = observe(noted, &result(40), now).unwrap();
        assert!(early.phase == Phase::Succeeded && early.message.unwrap().contains("40 of 100"));
    }

    #[test]
    fn a_pod_that_never_gets_ready_is_waited_for_within_limits() {
        let mut run = run(noted(&[stream("a.sql", true)], StreamsRestore::Restore));
        let now = Timestamp::now();
        assert!(!is_overdue(&run, now));
        note_begin(&mut run, "waiting");
        assert!(
            !is_overdue(&run, now + SignedDuration::from_mins(14))
                && is_overdue(&run, now + SignedDuration::from_mins(16))
        );
    }
}
