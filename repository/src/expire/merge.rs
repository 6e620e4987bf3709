//! Merges the index: the segments of sessions whose packs are not deleted at once any more.
//!
//! While an epoch's round is not done, which packs of an aborted session are published is told by its segments; so only those
//! of sessions that committed, or of epochs that are over, may go.

use std::collections::BTreeSet;

use tracing::warn;

use super::{ExpireError, Run, marks};
use crate::id::SessionId;
use crate::index::MergeError;
use crate::session::registration::registered;

impl Run {
    /// Merges as long as enough segments wait. Damage in the index stops it, and not the expiry.
    pub(super) async fn merge_index(&mut self) -> Result<(), ExpireError> {
        if self.options.dry_run {
            return Ok(());
        }
        if self.sizes.is_empty() {
            self.list_packs().await?;
        }
        self.engine.index.refresh().await?;
        // Before the registrations are read: who registers later has no segment among these, whatever is loaded meanwhile.
        let waiting = self.engine.index.waiting();
        let Some(open) = self.open_sessions().await? else { return Ok(()) };
        let committed: BTreeSet<_> = self.engine.commits.all().into_iter().map(|(session, _)| session).collect();
        let is_settled = |session: SessionId| {
            waiting.contains(&session) && (committed.contains(&session) || !open.contains(&session))
        };
        loop {
            let is_listed = |pack| self.sizes.contains_key(&pack);
            match self.engine.index.merge(self.options.merge_from, is_settled, is_listed).await {
                Ok(0) => break,
                Ok(merged) => self.report.segments_merged += merged,
                // Another merged meanwhile and took away what this one was reading; or it is lost, which the next expiry sees
                // again and `lifeboat rebuild-index` mends.
                Err(MergeError::Store(error)) if error.is_not_found() => {
                    warn!(%error, "the index is not merged this time");
                    break;
                }
                Err(MergeError::Store(error)) => return Err(error.into()),
                Err(error @ MergeError::Damaged { .. }) => {
                    warn!(%error, "the index is not merged");
                    break;
                }
            }
        }
        self.engine.index.clean().await?;
        Ok(())
    }

    /// The sessions of epochs that are not over; `None`: a round ended meanwhile, so that there may be others.
    async fn open_sessions(&self) -> Result<Option<BTreeSet<SessionId>>, ExpireError> {
        let (newest, is_done) = self.standing().await?;
        let settled = if is_done { newest } else { newest - 1 };
        let mut open = BTreeSet::new();
        // The next epoch is open from the moment that a round seals this one.
        for epoch in [settled, settled + 1] {
            let found = registered(&*self.engine.store, self.engine.config.lanes, epoch).await?;
            open.extend(found.into_iter().map(|found| found.session));
        }
        Ok((!marks::is_done(&self.engine, settled + 1).await?).then_some(open))
    }
}
