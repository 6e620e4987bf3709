//! Read pins: a reader registers like a writer and names the snapshot that it reads, so that expiry keeps what the
//! snapshot refers to until the pin is released, or the reader was silent for too long.

use std::sync::Arc;

use tracing::{debug, info, warn};

use super::decision::{Decision, decision_key};
use super::heartbeat::Heart;
use super::inherit::newest_refs;
use super::mask::Mask;
use super::references::{ReferencesError, refset};
use super::registration::register;
use super::{SessionError, marks_failed, not_registered};
use crate::commits::CommitLogError;
use crate::engine::Engine;
use crate::error::{Classified, ErrorClass};
use crate::id::{SessionId, SnapshotId};
use crate::refset::refset_key;
use crate::repository::Repository;
use crate::snapshot::Snapshot;
use crate::store::StoreError;

/// Keeps what a snapshot refers to in the repository. Release it; a forgotten pin is released by expiry, later.
#[derive(Debug)]
pub struct Pin {
    engine: Arc<Engine>,
    session: SessionId,
    heart: Heart,
}

/// What came of pinning a snapshot.
enum Attempt {
    Done(Option<Pin>),
    /// What the list of snapshots says of it, as it was read last, does not hold: mostly it was repacked since. Why.
    Outdated(String),
}

/// The name under which a reader's references lie: `r/<session>/0`.
pub(crate) fn reader_refs(session: SessionId) -> SnapshotId {
    SnapshotId(session.0)
}

impl Repository {
    /// Keeps what the snapshot refers to from being deleted while it is read, also when it is forgotten meanwhile.
    ///
    /// `None`: the credentials may only read, or the snapshot is just about to expire. It can be read nevertheless, as
    /// long as it is there.
    pub async fn pin(&self, snapshot: &Snapshot) -> Result<Option<Pin>, SessionError> {
        // Whoever found the snapshot has just read the list of them, mostly.
        let is_known = self.engine.commits.references().contains_key(&snapshot.id);
        if is_known && let Attempt::Done(pin) = self.pin_as_known(snapshot).await? {
            return Ok(pin);
        }
        match self.engine.commits.refresh().await {
            Ok(()) => {}
            Err(error @ CommitLogError::Damaged { .. }) => {
                warn!(%error, "a read without a pin: nothing expires before this is healed");
                return Ok(None);
            }
            Err(source) => {
                return Err(SessionError::Commits { session: SessionId::random(), source: Arc::new(source) });
            }
        }
        match self.pin_as_known(snapshot).await? {
            Attempt::Done(pin) => Ok(pin),
            Attempt::Outdated(why) => {
                warn!(snapshot = %snapshot.id, why, "a read without a pin");
                Ok(None)
            }
        }
    }

    /// Pins what the list of snapshots, as it was read last, says of this one.
    async fn pin_as_known(&self, snapshot: &Snapshot) -> Result<Attempt, SessionError> {
        let engine = Arc::clone(&self.engine);
        let session = SessionId::random();
        let fail = |act| move |source: StoreError| SessionError::Store { session, act, source: Arc::new(source) };
        let Some(refs) = engine.commits.references().get(&snapshot.id).copied() else { return Ok(Attempt::Done(None)) };
        let set = match refset(&engine, snapshot.id, refs.version, &refs.hash).await {
            Ok(set) => set,
            Err(ReferencesError::Store(error)) => return Err(fail("read the references of the snapshot")(error)),
            Err(error) => return Ok(Attempt::Outdated(error.to_string())),
        };
        let name = reader_refs(session);
        let bytes = set.to_bytes(name, 0, session).map_err(|_| SessionError::Seal { session, what: "a refset" })?;
        let hash = *blake3::hash(&bytes).as_bytes();
        // The references first: from the moment of registering, whoever decides what to delete must find them.
        match engine.store.put_if_absent(&refset_key(name, 0), bytes.into()).await {
            Ok(_) => {}
            Err(error) if matches!(error.class(), ErrorClass::Permission | ErrorClass::Unsupported) => {
                info!(%error, "a read without a pin: the credentials may only read");
                return Ok(Attempt::Done(None));
            }
            Err(error) => return Err(fail("store what it reads")(error)),
        }
        let registration =
            register(&*engine.store, &engine.cache, engine.config.lanes, session, crate::clock::now(), Some(hash))
                .await
                .map_err(|error| not_registered(session, error))?;
        engine.directories.renew();
        let heart = Heart::begin(Arc::clone(&engine), session);
        let pin = Pin { engine: Arc::clone(&engine), session, heart };
        let mask = Mask::load(&engine, registration.epoch).await.map_err(|error| marks_failed(session, error))?;
        // As a writer may not refer to what a round deletes that does not know of it, a reader cannot keep it.
        let newest = newest_refs(&engine, &mask, session, &[snapshot.id]).await?.first().copied();
        if newest.is_some_and(|newest| newest != refs) {
            pin.release().await;
            return Ok(Attempt::Outdated("it was repacked while it was to be pinned".to_owned()));
        }
        if newest.is_none() || set.pack_set().iter().any(|pack| mask.packs.contains(pack)) {
            info!(snapshot = %snapshot.id, "a read without a pin: the snapshot is about to expire");
            pin.release().await;
            return Ok(Attempt::Done(None));
        }
        debug!(%session, epoch = registration.epoch, snapshot = %snapshot.id, "pinned");
        Ok(Attempt::Done(Some(pin)))
    }
}

impl Pin {
    /// The reader's name.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Whether it still keeps anything: expiry ends a pin whose reader gave no sign of life for long, as on a machine that
    /// slept.
    pub async fn holds(&self) -> Result<bool, SessionError> {
        match self.engine.store.size(&decision_key(self.session)).await {
            Ok(_) => Ok(false),
            Err(error) if error.is_not_found() => Ok(true),
            Err(source) => {
                let act = "see whether it was aborted";
                Err(SessionError::Store { session: self.session, act, source: Arc::new(source) })
            }
        }
    }

    /// Ends the pin. A failure is harmless: expiry ends it when the reader has been silent for long enough.
    pub async fn release(self) {
        self.heart.stop();
        let bytes = Decision::abort_bytes(self.session, "the reader is done");
        if let Err(error) = self.engine.store.put_if_absent(&decision_key(self.session), bytes.into()).await {
            debug!(session = %self.session, %error, "a pin was not released");
            return;
        }
        self.heart.end().await;
        if let Err(error) = self.engine.store.delete(&refset_key(reader_refs(self.session), 0)).await {
            debug!(session = %self.session, %error, "what a reader read was not removed");
        }
    }
}
