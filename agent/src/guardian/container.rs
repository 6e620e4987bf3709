//! Keeps the application in a container at rest, by commands that run there.

use std::time::Duration;

use lifeboat_crds::quiesce_lease::{CommandPair, LeaseEnd, Watchdog};
use lifeboat_process::hold::{self, Said, Until};
use lifeboat_process::telemetry::chain;
use tracing::warn;

use super::cri::{Containers, CriError, Ended};
use super::intent::{Locked, Thaw};
use super::keeper::{Guardian, Lease, Outcome, deadline, timed_out, until_let_go};
use super::voice::{self, Voice};

/// A session that was told to let go has this long before it is killed.
const SESSION_GRACE: Duration = Duration::from_secs(3);
/// Beyond the grace that a command has in its container, for the runtime's answer.
const ANSWER: Duration = Duration::from_secs(5);
/// The part of a step's timeout that it may take until there is a voice.
const VOICE_SHARE: u32 = 4;
/// Before a call that failed is made again.
const AGAIN: Duration = Duration::from_millis(300);
/// The words of a command that a status holds.
const WORDS: usize = 400;

/// Holds by a session: a command that lets go when it ends.
pub(super) async fn keep_by_session<C: Containers>(
    guardian: &Guardian<C>,
    lease: &Lease<'_>,
    command: &[String],
) -> Outcome {
    match held(guardian, lease, command, SESSION_GRACE).await {
        // The session has ended, however it ended, and its lock with it.
        Held::Ended(outcome, _, intent) => {
            intent.remove();
            outcome
        }
        Held::Never(outcome, intent) => {
            intent.into_iter().for_each(Locked::remove);
            outcome
        }
        Held::NoShell(intent) => {
            intent.remove();
            let message = "the container has no `sh`, which holding a session needs; use exec or fsfreeze instead";
            Outcome::new(LeaseEnd::Failed, message)
        }
    }
}

/// Holds by a pair of commands.
pub(super) async fn keep_by_commands<C: Containers>(
    guardian: &Guardian<C>,
    lease: &Lease<'_>,
    pair: &CommandPair,
) -> Outcome {
    let command = hold::commands(pair.freeze.as_deref(), pair.thaw.as_deref());
    // Three attempts to thaw, and the pauses between them.
    let grace = lease.timeout * 3 + ANSWER;
    match held(guardian, lease, &command, grace).await {
        Held::Ended(outcome, is_thawed, intent) => {
            if !is_thawed && let Some(thaw) = &pair.thaw {
                let container = guardian.containers.find(&lease.workload.pod_uid, &lease.workload.container).await;
                if let Ok(container) = container {
                    thaw_until_done(guardian, lease, &container, thaw).await;
                }
            }
            intent.remove();
            outcome
        }
        Held::Never(outcome, intent) => {
            intent.into_iter().for_each(Locked::remove);
            outcome
        }
        Held::NoShell(intent) => {
            intent.remove();
            keep_from_outside(guardian, lease, pair).await
        }
    }
}

/// How a command that was to hold came out.
enum Held {
    /// It ran and is over; whether it let go in good order.
    Ended(Outcome, bool, Locked),
    /// It never ran.
    Never(Outcome, Option<Locked>),
    /// There is no shell to run it in.
    NoShell(Locked),
}

async fn held<C: Containers>(guardian: &Guardian<C>, lease: &Lease<'_>, command: &[String], grace: Duration) -> Held {
    let container = match guardian.containers.find(&lease.workload.pod_uid, &lease.workload.container).await {
        Ok(container) => container,
        Err(error) => return Held::Never(never(&error), None),
    };
    let held = held_in(guardian, lease, &container, command, grace).await;
    if let Err(error) = voice::end(&guardian.containers, &container, lease.name).await {
        // It ends with what it spoke to.
        warn!(pod = lease.workload.pod, %error, "a process of ours may be left in a container for a moment");
    }
    held
}

async fn held_in<C: Containers>(
    guardian: &Guardian<C>,
    lease: &Lease<'_>,
    container: &str,
    command: &[String],
    grace: Duration,
) -> Held {
    let token = lease.name;
    let thaw = Thaw::Held { container: container.to_owned(), token: token.to_owned() };
    let intent = match guardian.announce(lease, thaw) {
        Ok(intent) => intent,
        Err(outcome) => return Held::Never(outcome, None),
    };
    let hold = hold::hold(token, Until::At(lease.boot_end), grace, command);
    let mut voice = Voice::new(&guardian.containers, container, token);
    // The application works on meanwhile. Without a voice it goes as well, so most of the time is left for the freeze.
    let _ = tokio::time::timeout(lease.timeout / VOICE_SHARE, voice.begin(Until::At(lease.boot_end))).await;
    if tokio::time::Instant::now() >= lease.give_up {
        return Held::Never(timed_out(lease), Some(intent));
    }
    lease.begins();
    let session = guardian.containers.exec(container, &hold);
    tokio::pin!(session);
    let frozen = tokio::select! {
        biased;
        ended = &mut session => return never_at_rest(guardian, lease, container, intent, ended).await,
        frozen = voice.until_frozen(Until::At(lease.boot_end)) => frozen,
        () = tokio::time::sleep_until(lease.give_up) => false,
        () = lease.released.cancelled() => false,
    };
    let reached = if frozen {
        lease.is_frozen(Watchdog::Container);
        tokio::select! {
            ended = &mut session => Some(ended),
            _ = until_let_go(lease) => None,
        }
    } else {
        None
    };
    let let_go_by_us = reached.is_none();
    let was_released = lease.released.is_cancelled();
    let ended = match reached {
        Some(ended) => Some(ended),
        None => let_go(voice, &mut session, grace).await,
    };
    let Some(Ok(ended)) = ended else {
        // The runtime lost the command, or it does not end: its own watchdog lets go, and this waits for that.
        release_until_done(guardian, lease, container, grace).await;
        let message = "the container runtime lost the command that held the application";
        return Held::Ended(Outcome::new(LeaseEnd::SessionLost, message), true, intent);
    };
    let is_thawed = ended.code == 0 || !frozen && ended.code != hold::THAW_FAILED;
    if is_thawed {
        lease.is_over();
    }
    let said = Said::read(&ended.stdout);
    let failed = |what: &str| format!("{what}: exit code {}{}", ended.code, with(&said.words));
    let outcome = match (frozen, ended.code, said.is_late) {
        (false, ..) if was_released => Outcome::new(LeaseEnd::Failed, "it was released before it was at rest"),
        (false, ..) => timed_out(lease),
        (true, _, true) => deadline(),
        (true, 0, false) if let_go_by_us && was_released => Outcome::released(),
        (true, 0, false) if let_go_by_us => deadline(),
        (true, ..) => Outcome::new(LeaseEnd::SessionLost, failed("the command that held the application ended badly")),
    };
    Held::Ended(outcome, is_thawed, intent)
}

/// Why a command ended before the application was at rest.
async fn never_at_rest<C: Containers>(
    guardian: &Guardian<C>,
    lease: &Lease<'_>,
    container: &str,
    intent: Locked,
    ended: Result<Ended, CriError>,
) -> Held {
    match ended {
        Err(CriError::NoProgram(_)) => Held::NoShell(intent),
        Err(error @ CriError::Unreachable(_)) => {
            release_until_done(guardian, lease, container, ANSWER).await;
            Held::Ended(never(&error), true, intent)
        }
        Err(error) => Held::Never(never(&error), Some(intent)),
        Ok(ended) => {
            let said = Said::read(&ended.stdout);
            let why = match ended.code {
                127 => "the container does not have the command".to_owned(),
                0 => "it ended without the line `frozen`".to_owned(),
                code => format!("exit code {code}"),
            };
            let outcome = Outcome::new(LeaseEnd::Failed, format!("{why}{}", with(&said.words)));
            Held::Ended(outcome, ended.code != hold::THAW_FAILED, intent)
        }
    }
}

fn never(error: &CriError) -> Outcome {
    Outcome::new(if matches!(error, CriError::Gone) { LeaseEnd::Gone } else { LeaseEnd::Failed }, chain(error))
}

fn with(words: &str) -> String {
    if words.is_empty() { String::new() } else { format!(": {words}") }
}

/// Tells the command to let go and waits until it has ended. `None`: it does not end.
async fn let_go<C: Containers>(
    mut voice: Voice<'_, C>,
    session: &mut (impl Future<Output = Result<Ended, CriError>> + Unpin),
    grace: Duration,
) -> Option<Result<Ended, CriError>> {
    let telling = async {
        voice.release(grace, AGAIN).await;
        // It has let go; the runtime's answer follows.
        tokio::time::sleep(ANSWER).await;
    };
    tokio::select! {
        ended = session => Some(ended),
        () = telling => None,
        () = tokio::time::sleep(grace + ANSWER) => None,
    }
}

/// Makes sure that nothing holds in the container any more.
async fn release_until_done<C: Containers>(
    guardian: &Guardian<C>,
    lease: &Lease<'_>,
    container: &str,
    grace: Duration,
) {
    loop {
        match release(&guardian.containers, container, lease.name, grace).await {
            Ok(()) => return,
            Err(why) => lease.says(format!("the application may still be frozen: {why}")),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Tells what holds in a container to let go. `Ok` also when there is nothing, or no container any more.
pub(super) async fn release<C: Containers>(
    containers: &C,
    container: &str,
    token: &str,
    patience: Duration,
) -> Result<(), String> {
    match containers.exec(container, &hold::release(token, patience)).await {
        Ok(Ended { code: 0, .. }) | Err(CriError::Gone | CriError::NoProgram(_)) => Ok(()),
        Ok(ended) => Err(format!("it does not let go (exit code {})", ended.code)),
        Err(error) => Err(chain(&error)),
    }
}

/// Runs a thaw command once. `Ok` also when there is no container any more.
pub(super) async fn thaw<C: Containers>(containers: &C, container: &str, command: &[String]) -> Result<(), String> {
    match containers.exec(container, command).await {
        Ok(Ended { code: 0, .. }) | Err(CriError::Gone) => Ok(()),
        Ok(ended) => Err(format!("exit code {}{}", ended.code, with(&words(&ended)))),
        Err(error) => Err(chain(&error)),
    }
}

fn words(ended: &Ended) -> String {
    let text = String::from_utf8_lossy(&ended.stderr);
    text.trim().chars().filter(|c| !c.is_control()).take(WORDS).collect()
}

async fn thaw_until_done<C: Containers>(
    guardian: &Guardian<C>,
    lease: &Lease<'_>,
    container: &str,
    command: &[String],
) {
    loop {
        let once = tokio::time::timeout(lease.timeout, thaw(&guardian.containers, container, command)).await;
        let why = match once {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => format!("it did not end within {:.1?}", lease.timeout),
        };
        lease.says(format!("the thaw command failed and is tried again, the application may still be frozen: {why}"));
        tokio::time::sleep(AGAIN).await;
    }
}

/// A pair of commands in a container without a shell: the guardians of the node alone see to the thaw.
async fn keep_from_outside<C: Containers>(guardian: &Guardian<C>, lease: &Lease<'_>, pair: &CommandPair) -> Outcome {
    let container = match guardian.containers.find(&lease.workload.pod_uid, &lease.workload.container).await {
        Ok(container) => container,
        Err(error) => return never(&error),
    };
    let thaw = Thaw::Command { container: container.clone(), command: pair.thaw.clone() };
    let intent = match guardian.announce(lease, thaw) {
        Ok(intent) => intent,
        Err(outcome) => return outcome,
    };
    lease.begins();
    let freezing = async {
        match &pair.freeze {
            Some(freeze) => guardian.containers.exec(&container, freeze).await,
            None => Ok(Ended::default()),
        }
    };
    let outcome = match tokio::time::timeout_at(lease.give_up, freezing).await {
        Err(_) => timed_out(lease),
        Ok(Ok(Ended { code: 0, .. })) => {
            lease.is_frozen(Watchdog::Node);
            until_let_go(lease).await
        }
        Ok(Ok(ended)) => Outcome::new(LeaseEnd::Failed, format!("exit code {}{}", ended.code, with(&words(&ended)))),
        Ok(Err(error)) => never(&error),
    };
    if let Some(thaw) = &pair.thaw {
        thaw_until_done(guardian, lease, &container, thaw).await;
    }
    intent.remove();
    outcome
}
