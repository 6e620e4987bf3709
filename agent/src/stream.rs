//! Dumps and feeds: what a command in a container prints goes into the repository, or a file of the repository to a command.
//!
//! The guardian of the node runs the command; this has the repository's keys. Nothing of a dump is kept unless the guardian said
//! that the command ended well and that all of its output had come.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use futures::{Stream, StreamExt, TryStreamExt, stream};
use lifeboat_crds::VolumeTask;
use lifeboat_crds::backup::Transfer;
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::volume_task::{DumpOperation, FeedOperation, TaskResult};
use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::progress::Progress;
use lifeboat_repository::repository::Repository;
use lifeboat_repository::session::Session;
use lifeboat_repository::snapshot::Snapshot;
use lifeboat_repository::tree;
use tokio::net::UnixStream;

use crate::outcome::Failure;
use crate::report::Reporter;
use crate::task::{enter, stopped};
use crate::wire::{self, End, Frame, How};

impl From<End> for Failure {
    fn from(end: End) -> Self {
        let reason = match end.how {
            How::Done => Reason::InternalError,
            How::Failed | How::Trouble => Reason::StreamFailed,
            How::TimedOut => Reason::TimedOut,
            How::Gone => Reason::PodVanished,
        };
        Self { may_pass: end.how == How::Trouble, ..Self::new(reason, end.message) }
    }
}

fn lost(error: Option<&io::Error>) -> Failure {
    let why = error.map(|error| format!(": {error}")).unwrap_or_default();
    let message = format!("the guardian of the node ended before it said how the command ended{why}");
    Failure { may_pass: true, ..Failure::new(Reason::StreamFailed, message) }
}

/// Asks the guardian to run the task's command, and waits until it runs.
async fn start(socket: &Path, task: &VolumeTask) -> Result<UnixStream, Failure> {
    let mut guardian = wire::ask(socket, task).await.map_err(|error| {
        let message = format!("the guardian of the node, which runs commands, does not listen: {error}");
        Failure { may_pass: true, ..Failure::new(Reason::StreamFailed, message) }
    })?;
    match wire::hear(&mut guardian).await {
        Ok(Some(Frame::Started)) => Ok(guardian),
        Ok(Some(Frame::End(end))) => Err(end.into()),
        Ok(_) => Err(lost(None)),
        Err(error) => Err(lost(Some(&error))),
    }
}

/// What a command prints, to its end; an error, which is noted, unless the end was a good one.
fn output(guardian: UnixStream, failed: Arc<OnceLock<Failure>>) -> impl Stream<Item = io::Result<bytes::Bytes>> + Send {
    stream::unfold(Some(guardian), move |guardian| {
        let failed = Arc::clone(&failed);
        async move {
            let mut guardian = guardian?;
            let failure = match wire::hear(&mut guardian).await {
                Ok(Some(Frame::Data(bytes))) => return Some((Ok(bytes.into()), Some(guardian))),
                Ok(Some(Frame::End(End { how: How::Done, .. }))) => return None,
                Ok(Some(Frame::End(end))) => end.into(),
                Ok(_) => lost(None),
                Err(error) => lost(Some(&error)),
            };
            let error = io::Error::other(failure.message.clone());
            failed.get_or_init(|| failure);
            Some((Err(error), None))
        }
    })
}

/// Stores what the command prints, in this session, which is decided in any case.
pub(crate) async fn dump(
    socket: &Path,
    repository: &Repository,
    session: Arc<Session>,
    task: &VolumeTask,
    operation: &DumpOperation,
    plan: TreeBackup,
    progress: Arc<Progress>,
) -> Result<Snapshot, Failure> {
    let started = tokio::select! {
        started = start(socket, task) => started,
        () = progress.cancelled() => Err(Failure::new(Reason::Cancelled, "the task was deleted")),
    };
    let guardian = match started {
        Ok(guardian) => guardian,
        Err(failure) => {
            session.abort(&failure.message).await.map_err(|error| Failure::of(&error, Reason::ReadFailed))?;
            return Err(failure);
        }
    };
    let failed = Arc::new(OnceLock::new());
    let output = output(guardian, Arc::clone(&failed));
    let report = backup::stream_in(session, repository, &operation.file, output, plan, progress).await;
    match (report, failed.get()) {
        (Ok(report), _) => Ok(report.snapshot),
        (Err(_), Some(failure)) => Err(failure.clone()),
        (Err(error), None) => Err(Failure::of(&error, Reason::ReadFailed)),
    }
}

/// Gives the file to the command. A command that has begun is never begun again: nobody knows what it did.
pub(crate) async fn feed(
    socket: &Path,
    repository: &Repository,
    task: &VolumeTask,
    operation: &FeedOperation,
    reporter: &Reporter,
    progress: &Arc<Progress>,
) -> Result<TaskResult, Failure> {
    enter("Write");
    let began = Instant::now();
    let of_repository = |failure: Failure| stopped(progress).unwrap_or(failure);
    let snapshot = repository.find(&operation.snapshot).await;
    let snapshot = snapshot.map_err(|error| of_repository(Failure::of(&error, Reason::WriteFailed)))?;
    let file = tree::read_file(repository, &snapshot, Path::new(&operation.file)).await;
    let file = file.map_err(|error| of_repository(Failure::of(&error, Reason::WriteFailed)))?;
    let file = file.map_err(|error| Failure::of(&error, Reason::WriteFailed));
    let guardian = start(socket, task).await?;
    let reporting = tokio::spawn(reporter.clone().keep_reporting(Arc::clone(progress)));
    let given = tokio::select! {
        given = give(guardian, file, progress) => given,
        () = progress.cancelled() => Err(Failure::new(Reason::Cancelled, "the task was deleted")),
    };
    reporting.abort();
    let given = given.map_err(|failure| Failure { may_pass: false, ..of_repository(failure) })?;
    let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let transfer =
        Transfer { files: 1, bytes: snapshot.counts.bytes, read_bytes: given, millis, ..Transfer::default() };
    Ok(TaskResult { snapshot: snapshot.id.to_string(), transfer, ..TaskResult::default() })
}

/// Sends a file and waits for the end of the command, which may come before all is sent. The number of bytes that were sent.
async fn give(
    guardian: UnixStream,
    mut file: impl Stream<Item = Result<bytes::Bytes, Failure>> + Unpin,
    progress: &Progress,
) -> Result<u64, Failure> {
    let (mut from, mut to) = guardian.into_split();
    let mut sent = 0;
    let sending = async {
        while let Some(bytes) = file.next().await {
            let bytes = bytes?;
            if wire::say_data(&mut to, &bytes).await.is_err() {
                break;
            }
            sent += bytes.len() as u64;
            progress.add_bytes(bytes.len() as u64);
        }
        // A guardian that does not hear any more has said why, or is gone.
        let _ = wire::say(&mut to, &Frame::InputEnds).await;
        std::future::pending::<Result<std::convert::Infallible, Failure>>().await
    };
    let end = tokio::select! {
        Err(failure) = sending => return Err(failure),
        end = wire::hear(&mut from) => end,
    };
    match end {
        Ok(Some(Frame::End(End { how: How::Done, .. }))) => Ok(sent),
        Ok(Some(Frame::End(end))) => Err(end.into()),
        Ok(_) => Err(lost(None)),
        Err(error) => Err(lost(Some(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Ask;
    use lifeboat_repository::keys::Secret;
    use lifeboat_repository::repository::InitOptions;
    use lifeboat_repository::session::SessionOptions;
    use lifeboat_repository::store::memory::Memory;
    use serde_json::json;
    use tokio::net::UnixListener;

    fn task(operation: &serde_json::Value) -> VolumeTask {
        serde_json::from_value(json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "VolumeTask", "metadata": {"name": "s-1", "uid": "u"},
            "spec": {
                "nodeName": "n", "deadline": "2026-01-01T04:00:00Z",
                "workload": {"namespace": "ns", "pod": "db-0", "podUid": "p", "container": "db"},
                "repository": {"name": "r", "id": "ab", "backend": {"filesystem": {"path": "/x"}}, "encryptionSecret": {"name": "s"}},
                "operation": operation
            }
        }))
        .unwrap()
    }

    /// A guardian that says this to whoever asks, and then hangs up.
    fn guardian(folder: &Path, says: Vec<Frame>) -> std::path::PathBuf {
        let socket = folder.join("guardian.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (mut agent, _) = listener.accept().await.unwrap();
            let asked = wire::hear(&mut agent).await.unwrap();
            assert_eq!(asked, Some(Frame::Ask(Ask { task: "s-1".into(), uid: "u".into() })));
            for frame in says {
                wire::say(&mut agent, &frame).await.unwrap();
            }
        });
        socket
    }

    async fn repository() -> Repository {
        let options = InitOptions::default();
        Repository::init(Arc::new(Memory::new()), &Secret::key_file([7; 32]), options).await.unwrap()
    }

    async fn dumps(says: Vec<Frame>) -> (Repository, tempfile::TempDir, Result<Snapshot, Failure>) {
        let folder = tempfile::tempdir().unwrap();
        let repository = repository().await;
        let socket = guardian(folder.path(), says);
        let session = repository.begin(SessionOptions::default()).await.unwrap();
        let command = json!({"words": ["pg_dump"], "limitMillis": 1000});
        let operation = json!({"lineage": "l", "file": "shop.sql", "command": command});
        let task = task(&json!({"dump": operation}));
        let operation: DumpOperation = serde_json::from_value(operation).unwrap();
        let plan = TreeBackup { lineage: "l".into(), ..TreeBackup::default() };
        let dumped = dump(&socket, &repository, session, &task, &operation, plan, Arc::default()).await;
        (repository, folder, dumped)
    }

    fn data() -> Frame {
        Frame::Data(b"create table t".to_vec())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_dump_is_kept_only_if_the_command_ended_well() {
        let done = Frame::End(End::new(How::Done, ""));
        let (repository, _folder, dumped) = dumps(vec![Frame::Started, data(), data(), done]).await;
        let snapshot = dumped.unwrap();
        let file = tree::read_file(&repository, &snapshot, Path::new("shop.sql")).await.unwrap();
        let parts: Vec<_> = file.try_collect().await.unwrap();
        assert_eq!(parts.concat(), b"create table tcreate table t");

        let end = |how| Frame::End(End::new(how, "why"));
        for (says, reason, may_pass) in [
            (vec![Frame::Started, data()], Reason::StreamFailed, true),
            (vec![Frame::Started, data(), Frame::InputEnds], Reason::StreamFailed, true),
            (vec![Frame::Started, data(), end(How::Failed)], Reason::StreamFailed, false),
            (vec![Frame::Started, data(), end(How::TimedOut)], Reason::TimedOut, false),
            (vec![Frame::Started, data(), end(How::Gone)], Reason::PodVanished, false),
            (vec![Frame::Started, data(), end(How::Trouble)], Reason::StreamFailed, true),
            (vec![end(How::Failed)], Reason::StreamFailed, false),
            (vec![], Reason::StreamFailed, true),
        ] {
            let (repository, _folder, dumped) = dumps(says.clone()).await;
            let failure = dumped.unwrap_err();
            assert_eq!((failure.reason, failure.may_pass), (reason, may_pass), "{says:?}");
            assert!(repository.snapshots().await.unwrap().is_empty(), "{says:?}");
        }
    }
}
