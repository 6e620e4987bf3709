//! Forgetting: a tombstone for a snapshot, which disappears from every listing at once. Its space comes back by expiry.

use std::collections::BTreeSet;

use thiserror::Error;
use tracing::info;

use super::marks::{tombstone_bytes, tombstone_key};
use crate::commits::CommitLogError;
use crate::error::{Classified, ErrorClass};
use crate::id::SnapshotId;
use crate::repository::Repository;
use crate::snapshot::{Content, Snapshot};
use crate::store::StoreError;

/// What was forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForgetReport {
    /// Snapshots that have a tombstone now: those named, and the members of recovery points among them.
    pub forgotten: Vec<SnapshotId>,
}

/// Why nothing, or not everything, was forgotten. Forgetting again goes on.
#[derive(Debug, Error)]
pub enum ForgetError {
    /// The list of snapshots cannot be read.
    #[error(transparent)]
    Log(#[from] CommitLogError),
    /// A recovery point needs the snapshot.
    #[error("snapshot {snapshot} belongs to the recovery point {point}; forget that")]
    IsMember {
        /// What was named.
        snapshot: SnapshotId,
        /// Who needs it.
        point: SnapshotId,
    },
    /// The store failed.
    #[error("cannot forget a snapshot")]
    Store(#[from] StoreError),
}

impl Classified for ForgetError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Log(error) => error.class(),
            Self::IsMember { .. } => ErrorClass::Invalid,
            Self::Store(error) => error.class(),
        }
    }
}

impl Repository {
    /// Forgets these snapshots, and with a recovery point its members, unless another recovery point needs them.
    ///
    /// Those that do not exist are left out: another may have forgotten them since they were chosen. Nothing is forgotten if
    /// one of them belongs to a recovery point that stays.
    pub async fn forget(&self, snapshots: &[SnapshotId]) -> Result<ForgetReport, ForgetError> {
        let all = self.snapshots().await?;
        let order = with_members(&all, snapshots)?;
        let key = self.engine.mark_key();
        let mut report = ForgetReport::default();
        for snapshot in order {
            let bytes = tombstone_bytes(&key, snapshot, crate::clock::now());
            // One that exists says the same, whoever set it.
            self.engine.store.put_if_absent(&tombstone_key(snapshot), bytes.into()).await?;
            self.engine.commits.add_forgotten(snapshot);
            info!(%snapshot, "forgotten");
            report.forgotten.push(snapshot);
        }
        Ok(report)
    }
}

fn members(snapshot: &Snapshot) -> &[SnapshotId] {
    match &snapshot.content {
        Content::RecoveryPoint { members, .. } => members,
        Content::Tree { .. } => &[],
    }
}

/// The snapshots in the order in which they are forgotten: recovery points first, so that none ever lacks a member.
fn with_members(all: &[Snapshot], named: &[SnapshotId]) -> Result<Vec<SnapshotId>, ForgetError> {
    let named: BTreeSet<_> = named.iter().copied().filter(|named| all.iter().any(|found| found.id == *named)).collect();
    let (going, staying): (Vec<&Snapshot>, Vec<&Snapshot>) =
        all.iter().filter(|found| !members(found).is_empty()).partition(|found| named.contains(&found.id));
    for point in &staying {
        if let Some(snapshot) = members(point).iter().find(|member| named.contains(member)) {
            return Err(ForgetError::IsMember { snapshot: *snapshot, point: point.id });
        }
    }
    let needed: BTreeSet<_> = staying.iter().flat_map(|point| members(point)).copied().collect();
    let exists = |member: &SnapshotId| all.iter().any(|found| found.id == *member);
    let mut order: Vec<_> = going.iter().map(|point| point.id).collect();
    order.extend(going.iter().flat_map(|point| members(point)).filter(|m| !needed.contains(m) && exists(m)));
    order.extend(named.iter());
    let mut seen = BTreeSet::new();
    order.retain(|snapshot| seen.insert(*snapshot));
    Ok(order)
}
