//! Runs the commands of streams for the agent of this node, which has the keys of repositories and not the runtime's socket.
//!
//! The command is written down on the node's disk before it starts, so that it ends whoever dies: with the agent's connection,
//! at its limit, or by a sweep.

use std::time::Duration;

use lifeboat_crds::quiesce_lease::LeasedWorkload;
use lifeboat_crds::volume_task::{Operation, VolumeTaskSpec};
use lifeboat_process::hold::BootTime;
use lifeboat_process::telemetry::chain;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::containerd::{Pipes, Process};
use super::cri::{Containers, CriError};
use super::intent::{Intent, Locked, Thaw};
use super::keeper::Guardian;
use crate::wire::{self, End, Frame, How};

/// The command of an attempt before is ended within this time.
const PREDECESSOR: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(200);
/// What a command that has ended started may keep its output open for this long.
const LINGER: Duration = Duration::from_secs(10);
/// After a command that failed it is looked for this long whether its container went with it.
const NOTICED: Duration = Duration::from_secs(2);
/// A sweep ends a command this long after its limit, if its keeper does not.
const OVERDUE: Duration = Duration::from_secs(30);
/// Bytes of standard error that are kept, the last ones.
const WORDS: usize = 2048;

/// What a task lets run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) workload: LeasedWorkload,
    pub(super) words: Vec<String>,
    limit: Duration,
    /// Whether it is given input; else its output is wanted.
    pub(super) takes_input: bool,
}

impl Order {
    /// `None`: the task is not about a stream.
    pub(super) fn of(spec: &VolumeTaskSpec) -> Option<Self> {
        let (command, takes_input) = match &spec.operation {
            Operation::Dump(dump) => (&dump.command, false),
            Operation::Feed(feed) => (&feed.command, true),
            Operation::Backup(_) | Operation::Restore(_) | Operation::Maintain(_) => return None,
        };
        let limit = Duration::from_millis(command.limit_millis);
        Some(Self { workload: spec.workload.clone()?, words: command.words.clone(), limit, takes_input })
    }
}

impl End {
    fn of(error: &CriError) -> Self {
        let how = match error {
            CriError::Gone => How::Gone,
            CriError::Unreachable(_) => How::Trouble,
            CriError::NoProgram(_) | CriError::Refused(_) | CriError::NotContainerd => How::Failed,
        };
        Self::new(how, chain(error))
    }
}

/// Runs a command to its end, and sees to it that nothing of it is left. `Err`: the agent is gone.
pub(super) async fn run<C: Containers>(
    guardian: &Guardian<C>,
    name: &str,
    order: &Order,
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
) -> std::io::Result<End> {
    let name = format!("lifeboat-{name}");
    let began = tokio::time::Instant::now();
    while guardian.intents.has(&name) {
        if began.elapsed() > PREDECESSOR {
            return Ok(End::new(How::Trouble, "the command of the attempt before does not end"));
        }
        sleep(LOOK).await;
    }
    let LeasedWorkload { pod, pod_uid, container: name_in_pod, .. } = &order.workload;
    let container = match guardian.containers.find(pod_uid, name_in_pod).await {
        Ok(container) => container,
        Err(error) => return Ok(End::of(&error)),
    };
    let thaw = Thaw::Stream { container: container.clone(), process: name.clone() };
    let end = BootTime::now().map_or(u64::MAX, |now| now.after(order.limit + OVERDUE).hundredths());
    let intent = match guardian.intents.write(&Intent { lease: name.clone(), end, thaw }) {
        Ok(intent) => intent,
        Err(error) => {
            return Ok(End::new(
                How::Trouble,
                format!("nothing can be written down on the node, so nothing runs: {error}"),
            ));
        }
    };
    let process = Process { container: &container, id: &name };
    let pipes = match guardian.containers.start(&process, &order.words, order.takes_input).await {
        Ok(pipes) => pipes,
        Err(error) => {
            clean(guardian, &process, intent).await;
            return Ok(End::of(&error));
        }
    };
    info!(pod, container = name_in_pod, takes_input = order.takes_input, "a stream's command runs");
    let ended = tokio::select! {
        biased;
        ended = attend(guardian, &process, pipes, from, to) => ended,
        () = sleep(order.limit) => {
            Ok(End::new(How::TimedOut, format!("the command did not end within {:.1?}; allow more by its timeout", order.limit)))
        }
    };
    let ended = match ended {
        Ok(end) if end.how == How::Failed && is_gone(guardian, &order.workload, &container).await => {
            Ok(End::new(How::Gone, format!("the container ended while the command ran ({})", end.message)))
        }
        ended => ended,
    };
    clean(guardian, &process, intent).await;
    info!(pod, container = name_in_pod, how = ?ended.as_ref().map(|end| end.how), "a stream's command is over");
    ended
}

/// Whether the container is not the one any more in which a command failed. The runtime notices it a moment after the command.
async fn is_gone<C: Containers>(guardian: &Guardian<C>, workload: &LeasedWorkload, container: &str) -> bool {
    let began = tokio::time::Instant::now();
    while began.elapsed() < NOTICED {
        match guardian.containers.find(&workload.pod_uid, &workload.container).await {
            Ok(found) if found == container => sleep(LOOK).await,
            Ok(_) | Err(CriError::Gone) => return true,
            Err(_) => return false,
        }
    }
    false
}

/// Ends what is left of a command. What this cannot end is left to the sweeps.
async fn clean<C: Containers>(guardian: &Guardian<C>, process: &Process<'_>, intent: Locked) {
    match guardian.containers.end(process).await {
        Ok(()) => intent.remove(),
        Err(error) => warn!(process = process.id, %error, "a stream's command may still run"),
    }
}

/// Moves the bytes of a command that runs, and waits for its end.
async fn attend<C: Containers>(
    guardian: &Guardian<C>,
    process: &Process<'_>,
    pipes: Pipes,
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
) -> std::io::Result<End> {
    wire::say(to, &Frame::Started).await?;
    let Pipes { input, mut output, mut errors } = pipes;
    // Cancelled when the command itself has ended.
    let ended = CancellationToken::new();
    let waiting = async {
        let code = guardian.containers.wait(process).await;
        ended.cancel();
        code
    };
    let words = last_words(&mut errors, &ended);
    let Some(mut input) = input else {
        let all = async { tokio::join!(pass_on(&mut output, to, &ended), waiting, words) };
        return tokio::select! {
            (passed, code, words) = all => passed.map(|passed| conclude(code, passed, &words)),
            // The agent says nothing more: this is its end.
            _ = from.read_u8() => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
    };
    let giving = async {
        // What is written after the end of the command gets nobody.
        let given = tokio::select! {
            given = give(from, &mut input) => given?,
            () = ended.cancelled() => false,
        };
        drop(input);
        if given && let Err(error) = guardian.containers.close_input(process).await {
            warn!(%error, "the end of a command's input was not told");
        }
        // If the agent goes now, nobody waits for the command.
        tokio::select! {
            biased;
            () = ended.cancelled() => Ok(()),
            _ = from.read_u8() => Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe)),
        }
    };
    // A full pipe would stop the command.
    let dropped = drain(&mut output, &ended);
    let all = async { tokio::join!(waiting, words, dropped) };
    tokio::pin!(all);
    tokio::select! {
        biased;
        Err(gone) = giving => Err(gone),
        (code, words, ()) = &mut all => Ok(conclude(code, Passed::All, &words)),
    }
}

/// How far an output was passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    All,
    /// Something else keeps it open.
    HeldOpen,
    /// It cannot be read.
    Broken,
}

/// How a command ended that ended by itself.
fn conclude(code: Result<i32, CriError>, passed: Passed, words: &str) -> End {
    let words = if words.is_empty() { String::new() } else { format!(": {words}") };
    match (code, passed) {
        (Ok(0), Passed::All) => End::new(How::Done, String::new()),
        (Ok(0), Passed::HeldOpen) => {
            End::new(How::Failed, "the command ended, but something that it started keeps its output open")
        }
        (Ok(0), Passed::Broken) => End::new(How::Trouble, "the command's output cannot be read any more"),
        (Ok(137), _) => End::new(How::Failed, format!("the command was killed (exit code 137){words}")),
        (Ok(code), _) => End::new(How::Failed, format!("exit code {code}{words}")),
        (Err(error), _) => End::of(&error),
    }
}

/// The next bytes of a pipe, 0 at its end. `None`: the command has ended and something else keeps the pipe open.
async fn read(
    pipe: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    ended: &CancellationToken,
) -> Option<std::io::Result<usize>> {
    let lingers = async {
        ended.cancelled().await;
        sleep(LINGER).await;
    };
    tokio::select! {
        biased;
        count = pipe.read(buffer) => Some(count),
        () = lingers => None,
    }
}

/// Sends an output to the agent. `Err`: the agent is gone.
async fn pass_on(
    output: &mut (impl AsyncRead + Unpin),
    to: &mut OwnedWriteHalf,
    ended: &CancellationToken,
) -> std::io::Result<Passed> {
    let mut buffer = vec![0; wire::PART];
    loop {
        match read(output, &mut buffer, ended).await {
            None => return Ok(Passed::HeldOpen),
            Some(Ok(0)) => return Ok(Passed::All),
            Some(Ok(count)) => wire::say_data(to, &buffer[..count]).await?,
            Some(Err(error)) => {
                warn!(%error, "the output of a stream's command cannot be read");
                return Ok(Passed::Broken);
            }
        }
    }
}

/// Reads an output to its end and keeps nothing.
async fn drain(output: &mut (impl AsyncRead + Unpin), ended: &CancellationToken) {
    let mut buffer = vec![0; 16 << 10];
    while let Some(Ok(1..)) = read(output, &mut buffer, ended).await {}
}

/// The last words of a command, fit for a status.
async fn last_words(errors: &mut (impl AsyncRead + Unpin), ended: &CancellationToken) -> String {
    let mut kept = Vec::new();
    let mut buffer = vec![0; 4096];
    while let Some(Ok(count @ 1..)) = read(errors, &mut buffer, ended).await {
        kept.extend_from_slice(&buffer[..count]);
        kept.drain(..kept.len().saturating_sub(WORDS));
    }
    let text = String::from_utf8_lossy(&kept);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let words: String = lines.join("; ").chars().filter(|c| !c.is_control()).collect();
    words[words.ceil_char_boundary(words.len().saturating_sub(WORDS))..].to_owned()
}

/// Gives the agent's bytes to the command, as long as it reads. `true`: all of them, to the end that the agent told. `Err`: the agent
/// is gone.
async fn give(from: &mut OwnedReadHalf, input: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<bool> {
    let mut reads = true;
    loop {
        match wire::hear(from).await? {
            Some(Frame::Data(bytes)) if reads => {
                if let Err(error) = input.write_all(&bytes).await {
                    info!(%error, "a stream's command reads no more");
                    reads = false;
                }
            }
            Some(Frame::Data(_)) => {}
            Some(Frame::InputEnds) => return Ok(reads),
            Some(_) | None => return Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }
}

#[cfg(test)]
mod tests;
