//! Which packs an aborted session published, fixed for good by a SEAL behind its last index segment.
//!
//! Without the SEAL the session, which may only sleep, could publish a pack after it was taken for unpublished, and
//! others would refer to it while it is deleted.

use crate::expire::packset::PackSet;
use crate::id::SessionId;
use crate::index::{MAX_SEGMENT_BYTES, SEAL_MAGIC, Segment, segment_key};
use crate::store::{Store, StoreError};

/// Seals the session's index and tells the packs that it published; `None`: a segment is damaged, or went away meanwhile,
/// so that every pack must be taken for published.
pub(super) async fn seal(store: &dyn Store, session: SessionId) -> Result<Option<PackSet>, StoreError> {
    let mut packs = Some(PackSet::default());
    for number in 0.. {
        let key = segment_key(session, number);
        if store.put_if_absent(&key, SEAL_MAGIC.to_vec().into()).await?.is_ours() {
            break;
        }
        let bytes = match store.get(&key, MAX_SEGMENT_BYTES).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => {
                packs = None;
                continue;
            }
            Err(error) => return Err(error),
        };
        if &bytes[..] == SEAL_MAGIC {
            break;
        }
        match Segment::parse(session, bytes).and_then(|segment| segment.packs()) {
            Ok(found) => {
                if let Some(packs) = &mut packs {
                    packs.extend(&found);
                }
            }
            Err(error) => {
                tracing::warn!(key, %error, "an index segment is damaged");
                packs = None;
            }
        }
    }
    Ok(packs)
}
