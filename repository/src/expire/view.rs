//! What seems to live and what seems to be garbage, by listings: candidates for a round. Nothing is deleted by it alone.

use std::collections::{BTreeMap, BTreeSet};

use futures::TryStreamExt;

use super::liveness::union_of;
use super::marks::{self, Live, LiveRefs};
use super::packset::PackSet;
use super::published;
use super::suspect::Watch;
use super::{ExpireError, Run};
use crate::id::{PackId, SessionId, SnapshotId};
use crate::pack::{PACKS_PREFIX, parse_pack_key};
use crate::refset::Refset;
use crate::session::references::{ReferencesError, refset};
use crate::session::registration::{Registered, registered};

/// A look at the repository.
pub(super) struct View {
    /// The references of snapshots that live.
    pub(super) live: Vec<LiveRefs>,
    /// Those of snapshots that are forgotten and not removed yet.
    pub(super) dead: Vec<LiveRefs>,
    /// All that the living ones refer to.
    pub(super) refs: Refset,
    /// Published packs that none of them refers to.
    pub(super) candidates: PackSet,
    /// Packs of aborted sessions that nobody else can know of.
    pub(super) unpublished: PackSet,
    /// Packs that are referred to, and lost references.
    pub(super) worn: PackSet,
}

impl Run {
    /// Looks at the repository. `settled` is the newest round that is done, so that its number is the open epoch's.
    pub(super) async fn look(&mut self, settled: u64) -> Result<View, ExpireError> {
        let engine = std::sync::Arc::clone(&self.engine);
        // Packs first, registrations second: a session whose packs were listed is among the registered.
        self.list_packs().await?;
        let mut recent = registered(&*engine.store, engine.config.lanes, settled).await?;
        if self.options.dry_run {
            // It may look while a round is open, whose epoch has sessions as well.
            recent.extend(registered(&*engine.store, engine.config.lanes, settled + 1).await?);
        }
        engine.commits.refresh().await?;
        if !self.options.dry_run {
            self.abort_silent(&recent).await?;
        }
        let recent: BTreeSet<_> = recent.into_iter().map(|found| found.session).collect();
        let base = self.base(settled).await?;
        let (live, dead) = self.living(settled, &base);
        let refs = union_of(&engine, &live).await?;
        let in_use = refs.pack_set();
        let mut view =
            View { live, dead, refs, candidates: PackSet::default(), unpublished: PackSet::default(), worn: base.worn };
        self.sort_packs(&mut view, &recent, &in_use).await?;
        if !self.options.dry_run && marks::exists(&*engine.store, &marks::final_key(settled + 1)).await? {
            // The commits of that epoch may have expired, so what looks aborted may have committed.
            return Err(ExpireError::Marks { what: "another expiry decided a round meanwhile".to_owned() });
        }
        for refs in &view.dead {
            match refset(&engine, refs.snapshot, refs.version, &refs.hash).await {
                Ok(set) => view.worn.extend(&set.pack_set()),
                Err(ReferencesError::Store(error)) => return Err(error.into()),
                // What a dead snapshot referred to only tells where to look first.
                Err(error) => tracing::warn!(%error, "the references of a forgotten snapshot are not used"),
            }
        }
        view.worn.retain_all(&in_use);
        Ok(view)
    }

    /// Aborts sessions that left packs and gave no sign of life since: their space comes back without waiting for a round.
    async fn abort_silent(&mut self, recent: &[Registered]) -> Result<(), ExpireError> {
        let mut watch = Watch::default();
        let with_packs: BTreeSet<_> = self.sizes.keys().map(|pack| pack.session).collect();
        for found in recent.iter().filter(|found| with_packs.contains(&found.session)) {
            self.decided_or_aborted(&mut watch, found.session, found.since).await?;
        }
        Ok(())
    }

    pub(super) async fn list_packs(&mut self) -> Result<(), ExpireError> {
        self.sizes.clear();
        let mut listed = self.engine.store.list(PACKS_PREFIX);
        while let Some(object) = listed.try_next().await? {
            if let Some(pack) = parse_pack_key(&object.key) {
                self.sizes.insert(pack, object.size);
            }
        }
        Ok(())
    }

    /// What lived after a round.
    pub(super) async fn base(&self, round: u64) -> Result<Live, ExpireError> {
        if round == 0 {
            return Ok(Live::default());
        }
        let missing = |key: String| ExpireError::Marks { what: format!("the mark {key} is missing") };
        let decided = marks::finals(&self.engine, round).await?.ok_or_else(|| missing(marks::final_key(round)))?;
        let live = marks::live(&self.engine, round, &decided.live).await?;
        live.ok_or_else(|| missing(marks::live_key(round, &decided.live)))
    }

    /// Snapshots that live, and those that are forgotten, with their newest references.
    fn living(&self, settled: u64, base: &Live) -> (Vec<LiveRefs>, Vec<LiveRefs>) {
        let newest = self.engine.commits.references();
        let forgotten = self.engine.commits.all_forgotten();
        let mut all: BTreeMap<SnapshotId, LiveRefs> =
            base.commits.iter().flat_map(|commit| &commit.snapshots).map(|refs| (refs.snapshot, *refs)).collect();
        for (_, committed) in self.engine.commits.all() {
            // A commit of an earlier epoch that did not live is a leftover of one that expired.
            if committed.commit.epoch >= settled {
                let own = committed.commit.snapshots.iter().filter_map(|snapshot| newest.get(&snapshot.id));
                all.extend(own.map(|refs| (refs.snapshot, *refs)));
            }
        }
        for refs in all.values_mut() {
            if let Some(newer) = newest.get(&refs.snapshot).filter(|newer| newer.version > refs.version) {
                *refs = *newer;
            }
        }
        all.into_values().partition(|refs| !forgotten.contains(&refs.snapshot))
    }

    /// Sorts listed packs without references into candidates and unpublished ones.
    async fn sort_packs(
        &self,
        view: &mut View,
        recent: &BTreeSet<SessionId>,
        in_use: &PackSet,
    ) -> Result<(), ExpireError> {
        let commits = &self.engine.commits;
        let committed: BTreeSet<_> = commits.all().into_iter().map(|(session, _)| session).collect();
        let aborted = commits.aborted();
        let mut by_session: BTreeMap<SessionId, Vec<PackId>> = BTreeMap::new();
        for pack in self.sizes.keys() {
            by_session.entry(pack.session).or_default().push(*pack);
        }
        for (session, packs) in by_session {
            let is_recent = recent.contains(&session);
            let is_aborted = aborted.contains(&session);
            if is_recent && !is_aborted && !committed.contains(&session) {
                // A session that is not decided may still refer to its packs.
                continue;
            }
            if is_recent && is_aborted {
                view.worn.extend(&packs.iter().copied().collect());
            }
            let unused: Vec<_> = packs.into_iter().filter(|pack| !in_use.contains(*pack)).collect();
            // What an earlier epoch's session published may be merged, so that it is not told by its segments any more.
            let published = if is_recent && is_aborted && !unused.is_empty() && !self.options.dry_run {
                published::seal(&*self.engine.store, session).await?
            } else {
                None
            };
            for pack in unused {
                let is_published = published.as_ref().is_none_or(|published| published.contains(pack));
                if is_published { view.candidates.insert(pack) } else { view.unpublished.insert(pack) }
            }
        }
        Ok(())
    }
}
