//! Thaws what a guardian that died has left frozen.
//!
//! Two processes of a node do this, so that the death of one is covered by the other at once, and that of both by the
//! first that is started again.

use std::time::Duration;

use lifeboat_process::hold::BootTime;
use tracing::{info, warn};

use super::cri::Containers;
use super::intent::{Found, Intent, Thaw};
use super::keeper::Guardian;
use super::{container, fsfreeze};

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
        let mut failed = 0;
        for one in found {
            match one {
                Found::Orphan(intent, locked) => match self.thaw(&intent.thaw).await {
                    Ok(()) => {
                        info!(lease = intent.lease, "thawed what a guardian that died had left");
                        locked.remove();
                    }
                    Err(why) => {
                        warn!(lease = intent.lease, why, "what a guardian that died had left may still be frozen");
                        failed += 1;
                    }
                },
                Found::Kept(intent) if is_stuck(&intent) => {
                    if let Err(why) = self.thaw(&intent.thaw).await {
                        warn!(lease = intent.lease, why, "an overdue freeze may still last");
                        failed += 1;
                    }
                }
                Found::Kept(_) => {}
            }
        }
        failed
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
            Thaw::Held { container, token } => container::release(&self.containers, container, token, PATIENCE).await,
            Thaw::Command { container, command: Some(command) } => {
                container::thaw(&self.containers, container, command).await
            }
            Thaw::Command { command: None, .. } => Ok(()),
            Thaw::Volumes { paths } => {
                let thaw = |path: &std::path::PathBuf| fsfreeze::thaw_at(path).map_err(|error| error.to_string());
                paths.iter().rev().map(thaw).fold(Ok(()), Result::and)
            }
        }
    }
}

fn is_stuck(intent: &Intent) -> bool {
    let end = BootTime::from_hundredths(intent.end).after(STUCK);
    BootTime::now().is_some_and(|now| now > end)
}
