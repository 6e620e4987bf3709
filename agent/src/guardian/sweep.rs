//! Thaws what a guardian that died has left frozen, and ends what it has left running.
//!
//! Two processes of a node do this, so that the death of one is covered by the other at once, and that of both by the
//! first that is started again.

use std::time::Duration;

use futures::future::join_all;
use lifeboat_process::hold::BootTime;
use tracing::{info, warn};

use super::containerd::Process;
use super::cri::Containers;
use super::intent::{Found, Intent, Thaw};
use super::keeper::Guardian;
use super::{container, fsfreeze, voice};

/// How often it is looked for orphans.
const PAUSE: Duration = Duration::from_millis(200);
/// A thaw that failed is tried again after this.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// What holds in a container has this long to let go.
const PATIENCE: Duration = Duration::from_secs(10);
/// A keeper that lives but did not thaw in time is given this much more.
const STUCK: Duration = Duration::from_millis(500);

impl<C: Containers> Guardian<C> {
    /// Thaws orphans and what is overdue, once. The number of those that could not be thawed.
    pub(crate) async fn sweep(&self) -> usize {
        let found = match self.intents.find() {
            Ok(found) => found,
            Err(error) => {
                warn!(%error, "the intents cannot be listed");
                return 1;
            }
        };
        // Beside each other: what is frozen does not wait for what is slow to end.
        let settled = join_all(found.into_iter().map(|one| self.settle(one))).await;
        settled.into_iter().filter(|is_settled| !is_settled).count()
    }

    /// `false`: it could not be thawed or ended.
    async fn settle(&self, found: Found) -> bool {
        match found {
            Found::Orphan(intent, locked) => match self.thaw(&intent.thaw).await {
                Ok(()) => {
                    info!(lease = intent.lease, "thawed or ended what a guardian that died had left");
                    locked.remove();
                    true
                }
                Err(why) => {
                    warn!(lease = intent.lease, why, "what a guardian that died had left may still be frozen or run");
                    false
                }
            },
            Found::Kept(intent) if is_stuck(&intent) => match self.thaw(&intent.thaw).await {
                Ok(()) => true,
                Err(why) => {
                    warn!(lease = intent.lease, why, "an overdue freeze or command may still last");
                    false
                }
            },
            Found::Kept(_) => true,
        }
    }

    /// Sweeps for ever.
    pub(crate) async fn keep_sweeping(&self) {
        loop {
            let failed = self.sweep().await;
            tokio::time::sleep(if failed == 0 { PAUSE } else { AFTER_FAILURE }).await;
        }
    }

    async fn thaw(&self, thaw: &Thaw) -> Result<(), String> {
        match thaw {
            Thaw::Held { container, token } => {
                container::release(&self.containers, container, token, PATIENCE).await?;
                voice::end(&self.containers, container, token).await.map_err(|error| error.to_string())
            }
            Thaw::Command { container, command: Some(command) } => {
                container::thaw(&self.containers, container, command).await
            }
            Thaw::Command { command: None, .. } => Ok(()),
            Thaw::Volumes { paths } => {
                let thaw = |path: &std::path::PathBuf| fsfreeze::thaw_at(path).map_err(|error| error.to_string());
                paths.iter().rev().map(thaw).fold(Ok(()), Result::and)
            }
            Thaw::Stream { container, process } => {
                let ended = self.containers.end(&Process { container, id: process }).await;
                ended.map_err(|error| error.to_string())
            }
        }
    }
}

fn is_stuck(intent: &Intent) -> bool {
    let end = BootTime::from_hundredths(intent.end).after(STUCK);
    BootTime::now().is_some_and(|now| now > end)
}
