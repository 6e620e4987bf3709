//! Deletes what a round decided. Every step may be repeated, also by a deleter that wakes up years later: it deletes the
//! same things, whose names are never used again.

use std::collections::BTreeSet;

use futures::{FutureExt, TryStreamExt};
use tracing::{debug, info};

use super::marks::{self, Final};
use super::view::View;
use super::{ExpireError, PARALLEL, Run};
use crate::id::SessionId;
use crate::index::{SEAL_MAGIC, segments_prefix};
use crate::pack::{PACKS_PREFIX, pack_key};
use crate::parallel::at_once;
use crate::refset::refset_key;
use crate::session::decision::decision_key;
use crate::session::heartbeat::{HEARTBEAT_PREFIX, session_of};
use crate::session::registration::registered;

impl Run {
    /// Deletes everything that the round's final names, and says so.
    pub(super) async fn sweep(&mut self, round: u64, decided: &Final) -> Result<(), ExpireError> {
        if self.sizes.is_empty() {
            self.list_packs().await?;
        }
        let packs: Vec<_> = decided.packs.iter().collect();
        let sizes = packs.iter().filter_map(|pack| self.sizes.get(pack));
        let (count, bytes) = sizes.fold((0, 0), |(count, bytes), size| (count + 1, bytes + size));
        self.report.packs_deleted += count;
        self.report.bytes_deleted += bytes;
        for pack in &packs {
            self.sizes.remove(pack);
        }
        // Also those that no listing shows: a listing may be stale.
        self.delete_all(packs.into_iter().map(pack_key).collect()).await?;
        let obsolete = decided.obsolete.iter().map(|(snapshot, version)| refset_key(*snapshot, *version));
        self.delete_all(obsolete.collect()).await?;
        self.remove_dropped(decided).await?;
        let Some(live) = marks::live(&self.engine, round, &decided.live).await? else {
            // A later round is done, so this one is.
            return Ok(());
        };
        self.report.snapshots = live.commits.iter().map(|commit| commit.snapshots.len() as u64).sum();
        self.remove_leftovers(round, &live).await?;
        self.remove_segments(decided).await?;
        self.remove_heartbeats(round).await?;
        let done = marks::done_bytes(&self.engine.mark_key(), round);
        self.engine.store.put_if_absent(&marks::done_key(round), done.into()).await?;
        self.remove_lists(round, decided).await?;
        info!(round, packs = count, bytes, "a round of expiry is done");
        Ok(())
    }

    async fn delete_all(&self, keys: Vec<String>) -> Result<(), ExpireError> {
        let work = keys.into_iter().map(|key| {
            async move {
                self.engine.store.delete(&key).await?;
                self.engine.cache.forget(&key);
                self.progress.add_entry();
                Ok::<_, ExpireError>(())
            }
            .boxed()
        });
        at_once(PARALLEL, work.collect()).await.map(|_| ())
    }

    async fn keys_in(&self, prefix: &str) -> Result<Vec<String>, ExpireError> {
        Ok(self.engine.store.list(prefix).map_ok(|object| object.key).try_collect().await?)
    }

    /// Packs of aborted sessions that nobody else can know of.
    pub(super) async fn delete_unpublished(&mut self, view: &View) -> Result<(), ExpireError> {
        let packs: Vec<_> = view.unpublished.iter().collect();
        self.report.packs_deleted += packs.len() as u64;
        self.report.bytes_deleted += packs.iter().filter_map(|pack| self.sizes.get(pack)).sum::<u64>();
        self.delete_all(packs.into_iter().map(pack_key).collect()).await
    }

    /// Commits of which nothing lives, then the tombstones of their snapshots: the other order would show them again.
    async fn remove_dropped(&mut self, decided: &Final) -> Result<(), ExpireError> {
        self.report.snapshots_removed +=
            decided.dropped.iter().map(|(_, snapshots)| snapshots.len() as u64).sum::<u64>();
        self.delete_all(decided.dropped.iter().map(|(session, _)| decision_key(*session)).collect()).await?;
        for (session, _) in &decided.dropped {
            self.engine.commits.leave_out(*session);
        }
        let snapshots = || decided.dropped.iter().flat_map(|(_, snapshots)| snapshots);
        for snapshot in snapshots() {
            // Versions of repacking sessions that were aborted are in no list.
            let keys = self.keys_in(&format!("r/{snapshot}/")).await?;
            self.delete_all(keys).await?;
        }
        self.delete_all(snapshots().map(|snapshot| marks::tombstone_key(*snapshot)).collect()).await
    }

    /// Commits of earlier epochs that do not live: a writer repeated its commit long after everything of it expired.
    async fn remove_leftovers(&self, round: u64, live: &marks::Live) -> Result<(), ExpireError> {
        let living: BTreeSet<_> = live.commits.iter().map(|commit| commit.session).collect();
        self.engine.commits.refresh().await?;
        for (session, committed) in self.engine.commits.all() {
            if committed.commit.epoch < round && !living.contains(&session) {
                debug!(%session, "removes the commit of a session that expired");
                self.delete_all(vec![decision_key(session)]).await?;
                self.engine.commits.leave_out(session);
            }
        }
        Ok(())
    }

    /// Index segments of sessions whose last pack was deleted. They are hints: too few cost deduplication only.
    async fn remove_segments(&self, decided: &Final) -> Result<(), ExpireError> {
        for session in decided.packs.sessions() {
            if !self.keys_in(&format!("{PACKS_PREFIX}{session}/")).await?.is_empty() {
                continue;
            }
            let seal = SEAL_MAGIC.len() as u64;
            // The SEAL of an aborted session stays for good.
            let segments: Vec<_> = self.engine.store.list(&segments_prefix(session)).try_collect().await?;
            self.delete_all(
                segments.into_iter().filter(|object| object.size != seal).map(|object| object.key).collect(),
            )
            .await?;
        }
        Ok(())
    }

    /// Heartbeats of the sessions of the epoch, which are all decided, but for readers.
    async fn remove_heartbeats(&self, round: u64) -> Result<(), ExpireError> {
        let sessions = registered(&*self.engine.store, self.engine.config.lanes, round - 1).await?;
        let decided: BTreeSet<SessionId> =
            sessions.into_iter().filter(|found| found.pinned.is_none()).map(|found| found.session).collect();
        let mut keys = self.keys_in(HEARTBEAT_PREFIX).await?;
        keys.retain(|key| session_of(key).is_some_and(|session| decided.contains(&session)));
        self.delete_all(keys).await
    }

    /// Lists of what lives that a later round replaced, and those of deleters that were not the first.
    async fn remove_lists(&self, round: u64, decided: &Final) -> Result<(), ExpireError> {
        let kept = marks::live_key(round, &decided.live);
        let mut keys = self.keys_in(marks::MARKS_PREFIX).await?;
        keys.retain(|key| {
            key.contains("/live/") && *key != kept && marks::round_of(key).is_some_and(|found| found <= round)
        });
        self.delete_all(keys).await
    }
}
