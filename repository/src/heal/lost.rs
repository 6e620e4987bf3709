//! `b/<random>`: places whose chunks cannot be read any more. Writers do not refer to them, so that the next backup that
//! has such a chunk stores it again; readers then find the new copy by the index.
//! A mark has the form of a snapshot's references. Expiry does not look at marks: what is referred to stays.
//!
//! A mark that somebody does not see costs nothing but another round: it is a hint, as the index is.

use std::sync::{Arc, PoisonError, RwLock};

use futures::TryStreamExt;
use tracing::warn;

use crate::error::{Classified, ErrorClass};
use crate::id::{Place, SessionId, SnapshotId};
use crate::refset::{MAX_REFSET_BYTES, Refset};
use crate::store::{Store, StoreError};
use crate::wire::WireError;

/// Where marks lie.
pub(crate) const LOST_PREFIX: &str = "b/";

fn name_of(key: &str) -> Option<SnapshotId> {
    key.strip_prefix(LOST_PREFIX)?.parse().ok()
}

/// Checks a mark as far as anyone can.
pub(crate) fn verify(key: &str, bytes: &[u8]) -> Result<(), WireError> {
    let name = name_of(key).ok_or(WireError { what: "no name of a mark", at: 0 })?;
    Refset::parse(name, 0, bytes).map(drop)
}

/// The marks that are known.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    known: RwLock<(std::collections::BTreeSet<String>, Refset)>,
}

impl Lost {
    /// Reads the marks that appeared since. Damaged ones are left out: `check` names them.
    pub(crate) async fn refresh(&self, store: &dyn Store) -> Result<(), StoreError> {
        let mut listed = store.list(LOST_PREFIX);
        while let Some(object) = listed.try_next().await? {
            let key = object.key;
            let is_known = self.known.read().unwrap_or_else(PoisonError::into_inner).0.contains(&key);
            let Some(name) = name_of(&key).filter(|_| !is_known) else { continue };
            let bytes = match store.get(&key, MAX_REFSET_BYTES).await {
                Ok(bytes) => bytes,
                Err(error) if matches!(error.class(), ErrorClass::NotFound | ErrorClass::Damaged) => continue,
                Err(error) => return Err(error),
            };
            match Refset::parse(name, 0, &bytes) {
                Ok((_, places)) => {
                    let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
                    known.1.extend(&places);
                    known.0.insert(key);
                }
                Err(error) => warn!(key, %error, "a mark of damage is damaged itself"),
            }
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.known.read().unwrap_or_else(PoisonError::into_inner).1.is_empty()
    }

    /// Whether the chunk at this place cannot be read.
    pub(crate) fn covers(&self, place: Place) -> bool {
        self.known.read().unwrap_or_else(PoisonError::into_inner).1.contains(place)
    }

    /// Marks these places. Returns the key of the mark.
    pub(crate) async fn add(&self, store: &Arc<dyn Store>, places: &Refset) -> Result<String, StoreError> {
        let name = SnapshotId::random();
        let key = format!("{LOST_PREFIX}{name}");
        // Writing into memory cannot fail.
        let bytes = places.to_bytes(name, 0, SessionId(name.0)).unwrap_or_default();
        store.put_if_absent(&key, bytes.into()).await?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.1.extend(places);
        known.0.insert(key.clone());
        Ok(key)
    }
}
