//! Speaks with a command that holds an application, by one process that is in the container before it is needed: starting one for
//! each word takes longer than all else of a freeze.
//!
//! Only containerd offers this. Where it cannot be had or has died, commands are sent; the one that releases is sent as well when what
//! holds does not let go at the voice's word.

use std::time::Duration;

use lifeboat_process::hold::{self, Until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::debug;

use super::containerd::{Pipes, Process};
use super::cri::{Containers, CriError, Ended};

/// What the voice says when the application is at rest.
const FROZEN: &[u8] = b"frozen\n";
const LET_GO: &[u8] = b"release\n";
/// What was told to let go has begun to within this time, or the voice was not heard.
const HEARD: Duration = Duration::from_millis(500);

/// The way to what holds with a token.
pub(super) struct Voice<'a, C> {
    containers: &'a C,
    container: &'a str,
    token: &'a str,
    pipes: Option<Pipes>,
}

impl<'a, C: Containers> Voice<'a, C> {
    pub(super) fn new(containers: &'a C, container: &'a str, token: &'a str) -> Self {
        Self { containers, container, token, pipes: None }
    }

    /// Puts the voice into the container, if that can be.
    pub(super) async fn begin(&mut self, end: Until) {
        let id = id(self.token);
        let process = Process { container: self.container, id: &id };
        match self.containers.start(&process, &hold::voice(self.token, end), true).await {
            Ok(pipes) => self.pipes = Some(pipes),
            Err(error) => debug!(%error, "there is no voice in the container; commands are sent"),
        }
    }

    /// Returns as soon as the application is at rest. `false`: it is not, or nobody can tell.
    pub(super) async fn until_frozen(&mut self, end: Until) -> bool {
        if let Some(pipes) = &mut self.pipes
            && says_frozen(pipes).await
        {
            return true;
        }
        let wait = hold::await_frozen(self.token, end);
        matches!(self.containers.exec(self.container, &wait).await, Ok(Ended { code: 0, .. }))
    }

    /// Tells what holds to let go, once it could be told.
    pub(super) async fn release(&mut self, grace: Duration, again: Duration) {
        if let Some(input) = self.pipes.as_mut().and_then(|pipes| pipes.input.as_mut())
            && input.write_all(LET_GO).await.is_ok()
        {
            tokio::time::sleep(HEARD).await;
        }
        let release = hold::release(self.token, grace);
        while let Err(CriError::Unreachable(_)) = self.containers.exec(self.container, &release).await {
            tokio::time::sleep(again).await;
        }
    }
}

async fn says_frozen(pipes: &mut Pipes) -> bool {
    let mut said = [0; FROZEN.len()];
    pipes.output.read_exact(&mut said).await.is_ok() && said == FROZEN
}

fn id(token: &str) -> String {
    format!("lifeboat-{token}")
}

/// Ends the voice of a token. Well also where there is none.
pub(super) async fn end<C: Containers>(containers: &C, container: &str, token: &str) -> Result<(), CriError> {
    match containers.end(&Process { container, id: &id(token) }).await {
        Err(CriError::NotContainerd | CriError::Gone) => Ok(()),
        ended => ended,
    }
}
