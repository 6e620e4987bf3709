//! Which packs are needed by what lives, and how they are kept from expiring while they are put back.
//!
//! A pack that expiry deletes must not come back: a writer could find it, and a deleter that slept would delete it again.
//! So a pack is put back only while a reader is registered that keeps it, as a restore keeps what it reads.

use std::collections::{BTreeMap, BTreeSet};

use super::HealError;
use crate::id::{PackId, SnapshotId};
use crate::pack::parse_pack_key;
use crate::repository::Repository;
use crate::session::Pin;
use crate::session::references::{ReferencesError, in_force};
use crate::snapshot::Snapshot;

/// Who needs these packs.
pub(super) struct Needs {
    by_pack: BTreeMap<PackId, Snapshot>,
    /// Everything that lives could be asked, so that a pack that nobody needs is of no use.
    is_complete: bool,
    /// A commit is damaged: nothing expires before it is healed.
    nothing_expires: bool,
    pinned: Option<(SnapshotId, Option<Pin>)>,
}

impl Needs {
    /// Asks all snapshots.
    pub(super) async fn of(repository: &Repository, packs: BTreeSet<PackId>) -> Result<Self, HealError> {
        let mut needs = Self { by_pack: BTreeMap::new(), is_complete: true, nothing_expires: false, pinned: None };
        if packs.is_empty() {
            return Ok(needs);
        }
        let (snapshots, damaged) = repository.readable_snapshots().await?;
        needs.nothing_expires = !damaged.is_empty();
        needs.is_complete = damaged.is_empty() && repository.engine.commits.omissions().is_empty();
        let newest = repository.engine.commits.references();
        for snapshot in snapshots {
            match in_force(&repository.engine, &newest, snapshot.id).await {
                Ok(refs) => {
                    for pack in packs.iter().filter(|pack| refs.has_pack(**pack)) {
                        needs.by_pack.entry(*pack).or_insert_with(|| snapshot.clone());
                    }
                }
                Err(ReferencesError::Store(source)) => {
                    return Err(HealError::Replace { act: "tell who needs", source });
                }
                Err(_) => needs.is_complete = false,
            }
        }
        Ok(needs)
    }

    /// Keeps the object from expiring; `false`: it may be expiring, and must not be put back.
    pub(super) async fn keep(&mut self, repository: &Repository, key: &str) -> Result<bool, HealError> {
        // Names of all other objects that expire stand for nothing once they are gone.
        let Some(pack) = parse_pack_key(key) else { return Ok(true) };
        let Some(snapshot) = self.by_pack.get(&pack) else { return Ok(false) };
        if self.nothing_expires {
            return Ok(true);
        }
        if self.pinned.as_ref().is_none_or(|(pinned, _)| *pinned != snapshot.id) {
            let snapshot = snapshot.clone();
            self.unpin().await;
            let pin = repository.pin(&snapshot).await.map_err(HealError::Pin)?;
            self.pinned = Some((snapshot.id, pin));
        }
        Ok(self.pinned.as_ref().is_some_and(|(_, pin)| pin.is_some()))
    }

    /// Whether nothing that lives needs the object, so that a staged copy of it can go.
    pub(super) fn is_useless(&self, key: &str) -> bool {
        self.is_complete && parse_pack_key(key).is_some_and(|pack| !self.by_pack.contains_key(&pack))
    }

    async fn unpin(&mut self) {
        if let Some((_, Some(pin))) = self.pinned.take() {
            pin.release().await;
        }
    }

    /// Lets everything expire again.
    pub(super) async fn release(mut self) {
        self.unpin().await;
    }
}
