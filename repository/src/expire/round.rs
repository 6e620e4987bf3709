//! A round after it condemned: seal the epoch, wait for its sessions, decide what goes, delete it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::liveness::union_of;
use super::marks::{self, Condemned, Final, Live, LiveCommit, LivePin, LiveRefs};
use super::packset::PackSet;
use super::suspect::Watch;
use super::{ExpireError, Run};
use crate::commits::{Committed, Decided};
use crate::id::{SessionId, SnapshotId};
use crate::refset::Refset;
use crate::session::decision::{Decision, decision_key};
use crate::session::reader_refs;
use crate::session::references::{ReferencesError, refset};
use crate::session::registration::{Registered, registered, seal_epoch};

/// How often waiting looks again.
const POLL: Duration = Duration::from_secs(2);

/// The sessions of an epoch when all that write are decided.
#[derive(Default)]
struct Fixed {
    commits: Vec<(SessionId, Arc<Committed>)>,
    aborted: BTreeSet<SessionId>,
    pins: Vec<LivePin>,
    released: Vec<LivePin>,
}

/// What a round decides, before it is written down.
struct Settled {
    live: Live,
    refs: Refset,
    dropped: Vec<SessionId>,
    obsolete: Vec<LiveRefs>,
}

impl Run {
    /// Brings a round to its end. `false`: it waits for running sessions.
    pub(super) async fn finish(&mut self, round: u64) -> Result<bool, ExpireError> {
        let condemned = marks::condemned(&self.engine, round).await?.ok_or_else(|| ExpireError::Marks {
            what: format!("the mark {} is missing", marks::condemned_key(round)),
        })?;
        seal_epoch(&*self.engine.store, self.engine.config.lanes, round - 1).await?;
        let decided = match marks::finals(&self.engine, round).await? {
            Some(decided) => decided,
            None => match self.settle(round, &condemned).await {
                Ok(Some(decided)) => decided,
                Ok(None) => return Ok(false),
                // What is missing may have been removed by a deleter that was faster, and then its word is there.
                Err(error) => marks::finals(&self.engine, round).await?.ok_or(error)?,
            },
        };
        self.sweep(round, &decided).await?;
        Ok(true)
    }

    /// Decides what the round deletes; `None`: sessions are still running.
    async fn settle(&mut self, round: u64, condemned: &Condemned) -> Result<Option<Final>, ExpireError> {
        let sessions = registered(&*self.engine.store, self.engine.config.lanes, round - 1).await?;
        let base = self.base(round - 1).await?;
        let Some(fixed) = self.wait(round, &sessions, base.pins.clone()).await? else {
            return Ok(marks::finals(&self.engine, round).await?);
        };
        self.engine.commits.refresh().await?;
        let settled = self.decide(&base, fixed).await?;
        let mut packs = condemned.packs.clone();
        packs.remove_all(&settled.refs.pack_set());
        let key = self.engine.mark_key();
        let (bytes, live) = settled.live.to_bytes(&key, round).map_err(ExpireError::Encode)?;
        self.engine.store.put_if_absent(&marks::live_key(round, &live), bytes.into()).await?;
        let dropped = self.with_snapshots(settled.dropped).await?;
        let obsolete = settled.obsolete.iter().map(|refs| (refs.snapshot, refs.version)).collect();
        let decided = Final { packs, live, dropped, obsolete };
        let bytes = decided.to_bytes(&key, round).map_err(ExpireError::Encode)?;
        if self.engine.store.put_if_absent(&marks::final_key(round), bytes.into()).await?.is_ours() {
            info!(round, packs = decided.packs.len(), "decided what is deleted");
            return Ok(Some(decided));
        }
        // Another deleter decided first, and its word holds.
        Ok(marks::finals(&self.engine, round).await?)
    }

    /// Waits until every writer of the epoch is decided; `None`: patience is over, or another deleter was faster.
    async fn wait(
        &mut self,
        round: u64,
        sessions: &[Registered],
        pins: Vec<LivePin>,
    ) -> Result<Option<Fixed>, ExpireError> {
        let until = Instant::now() + self.options.patience;
        let mut watch = Watch::default();
        let mut readers = pins;
        readers.extend(
            sessions
                .iter()
                .filter_map(|found| Some(LivePin { session: found.session, since: found.since, hash: found.pinned? })),
        );
        loop {
            if marks::finals(&self.engine, round).await?.is_some() {
                return Ok(None);
            }
            let mut fixed = Fixed::default();
            let mut running = Vec::new();
            for found in sessions.iter().filter(|found| found.pinned.is_none()) {
                match self.decided_or_aborted(&mut watch, found.session, found.since).await? {
                    Some(Decided::Committed(committed)) => fixed.commits.push((found.session, committed)),
                    Some(Decided::Aborted) => {
                        fixed.aborted.insert(found.session);
                    }
                    None => running.push(found.session),
                }
            }
            // Readers are not waited for: what they read is kept.
            for pin in &readers {
                let decided = self.decided_or_aborted(&mut watch, pin.session, pin.since).await?;
                if decided.is_none() { fixed.pins.push(*pin) } else { fixed.released.push(*pin) }
            }
            if running.is_empty() {
                return Ok(Some(fixed));
            }
            if Instant::now() >= until {
                info!(round, running = running.len(), "expiry waits for running sessions");
                self.report.waiting_for = running;
                return Ok(None);
            }
            tokio::time::sleep(POLL.min(until - Instant::now())).await;
        }
    }

    /// How the session was decided; one that was silent for too long is aborted. `None`: it is running.
    pub(super) async fn decided_or_aborted(
        &mut self,
        watch: &mut Watch,
        session: SessionId,
        since: i64,
    ) -> Result<Option<Decided>, ExpireError> {
        let decided = self.engine.commits.decided(session).await?;
        if decided.is_some() || !watch.is_silent(&self.engine, session, since, self.options.silence).await? {
            return Ok(decided);
        }
        if self.engine.commits.omissions().contains(&session) {
            // To abort it in place of its commit would delete what it wrote.
            return Err(ExpireError::Marks { what: format!("the commit of the session {session} is missing") });
        }
        let bytes = Decision::abort_bytes(session, "expiry saw no sign of life");
        if self.engine.store.put_if_absent(&decision_key(session), bytes.into()).await?.is_ours() {
            warn!(%session, "a session without a sign of life was aborted");
            self.report.aborted.push(session);
        }
        Ok(self.engine.commits.decided(session).await?)
    }

    /// What lives, from what lived after the round before and the commits that are now fixed.
    async fn decide(&self, base: &Live, fixed: Fixed) -> Result<Settled, ExpireError> {
        let forgotten = self.engine.commits.all_forgotten();
        let (commits, current, superseded) = newest_references(base, &fixed.commits);
        let is_alive = |refs: &&LiveRefs| !forgotten.contains(&refs.snapshot);
        let alive: Vec<_> = current.values().filter(is_alive).copied().collect();
        let mut refs = union_of(&self.engine, &alive).await?;
        for pin in &fixed.pins {
            self.keep_pinned(pin, &mut refs).await?;
        }
        let kept: BTreeSet<_> = alive.iter().map(|refs| (refs.snapshot, refs.version)).collect();
        let writers: BTreeSet<_> = alive.iter().map(|refs| refs.by).collect();
        let mut live = Live { commits: Vec::new(), pins: fixed.pins, worn: base.worn.clone() };
        let mut dropped = Vec::new();
        for (session, snapshots) in commits {
            let alive: Vec<_> =
                snapshots.iter().filter_map(|snapshot| current.get(snapshot)).filter(is_alive).copied().collect();
            // A session that repacked is needed as long as its versions are in force or its packs are in use.
            let is_needed = snapshots.is_empty() && (writers.contains(&session) || refs.has_session(session));
            if alive.is_empty() && !is_needed {
                dropped.push(session);
            } else {
                live.commits.push(LiveCommit { session, snapshots: alive });
            }
        }
        let released = fixed.released.iter().map(|pin| LiveRefs {
            snapshot: reader_refs(pin.session),
            version: 0,
            hash: pin.hash,
            by: pin.session,
        });
        let obsolete: Vec<_> = current
            .into_values()
            .chain(superseded)
            .filter(|refs| !kept.contains(&(refs.snapshot, refs.version)))
            .chain(released)
            .collect();
        let in_use = refs.pack_set();
        live.worn = self.worn(live.worn, &obsolete, &fixed.aborted, &in_use).await?;
        Ok(Settled { live, refs, dropped, obsolete })
    }

    /// Adds what a reader reads.
    async fn keep_pinned(&self, pin: &LivePin, refs: &mut Refset) -> Result<(), ExpireError> {
        match refset(&self.engine, reader_refs(pin.session), 0, &pin.hash).await {
            Ok(set) => refs.extend(&set),
            Err(ReferencesError::Store(error)) => return Err(error.into()),
            // It is stored before the reader registers, and removed only when it is done.
            Err(error) => info!(session = %pin.session, %error, "a reader is done"),
        }
        Ok(())
    }

    /// Packs in use that lost references, for those who repack next.
    async fn worn(
        &self,
        mut worn: PackSet,
        obsolete: &[LiveRefs],
        aborted: &BTreeSet<SessionId>,
        in_use: &PackSet,
    ) -> Result<PackSet, ExpireError> {
        for refs in obsolete {
            match refset(&self.engine, refs.snapshot, refs.version, &refs.hash).await {
                Ok(set) => worn.extend(&set.pack_set()),
                Err(ReferencesError::Store(error)) => return Err(error.into()),
                Err(error) => info!(%error, "the references of a forgotten snapshot are not used"),
            }
        }
        worn.extend(&in_use.iter().filter(|pack| aborted.contains(&pack.session)).collect());
        worn.remove_all(&self.dense);
        worn.retain_all(in_use);
        Ok(worn)
    }

    /// The dropped sessions with all their snapshots, whose tombstones go with them.
    async fn with_snapshots(&self, dropped: Vec<SessionId>) -> Result<Vec<(SessionId, Vec<SnapshotId>)>, ExpireError> {
        let mut all = Vec::new();
        for session in dropped {
            let snapshots = match self.engine.commits.decided(session).await? {
                Some(Decided::Committed(committed)) => {
                    committed.commit.snapshots.iter().map(|snapshot| snapshot.id).collect()
                }
                _ => Vec::new(),
            };
            all.push((session, snapshots));
        }
        Ok(all)
    }
}

/// Committed sessions with their snapshots, the references in force of each snapshot, and those that are no longer.
type Newest = (BTreeMap<SessionId, Vec<SnapshotId>>, BTreeMap<SnapshotId, LiveRefs>, Vec<LiveRefs>);

/// Adds the commits of an epoch to what lived before it.
fn newest_references(base: &Live, fixed: &[(SessionId, Arc<Committed>)]) -> Newest {
    let mut commits = BTreeMap::new();
    let mut current = BTreeMap::new();
    for commit in &base.commits {
        commits.insert(commit.session, commit.snapshots.iter().map(|refs| refs.snapshot).collect::<Vec<_>>());
        current.extend(commit.snapshots.iter().map(|refs| (refs.snapshot, *refs)));
    }
    let mut moved = Vec::new();
    for (session, committed) in fixed {
        let commit = &committed.commit;
        commits.insert(*session, commit.snapshots.iter().map(|snapshot| snapshot.id).collect());
        for refset in &commit.refsets {
            let refs = LiveRefs {
                snapshot: refset.snapshot,
                version: refset.version,
                hash: refset.hash_bytes(),
                by: *session,
            };
            if refs.version == 0 { _ = current.insert(refs.snapshot, refs) } else { moved.push(refs) }
        }
    }
    let mut superseded = Vec::new();
    for refs in moved {
        match current.get_mut(&refs.snapshot) {
            Some(kept) if kept.version < refs.version => superseded.push(std::mem::replace(kept, refs)),
            // An older version, or one of a snapshot that was removed.
            _ => superseded.push(refs),
        }
    }
    (commits, current, superseded)
}
