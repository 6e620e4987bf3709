//! What a session must not refer to: packs that the round of expiry before its epoch deletes or may delete.
//!
//! One round is enough. A round is begun only when everything of the one before is deleted, so of earlier rounds nothing
//! can be seen any more by who looks after registering; and what a snapshot refers to that lived through them was kept.

use crate::engine::Engine;
use crate::expire::marks::{self, Live, MarkError};
use crate::expire::packset::PackSet;

/// The mask of an epoch.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mask {
    /// Nothing in these packs may be referred to.
    pub(crate) packs: PackSet,
    /// The newest round that was decided when the mask was loaded, and its list of what lives.
    settled: Option<(u64, [u8; 32])>,
}

impl Mask {
    /// Loads the mask of a session that registered in `epoch`. Must be called after registering.
    pub(crate) async fn load(engine: &Engine, epoch: u64) -> Result<Self, MarkError> {
        if epoch == 0 {
            return Ok(Self::default());
        }
        if let Some(decided) = marks::finals(engine, epoch).await? {
            return Ok(Self { packs: decided.packs, settled: Some((epoch, decided.live)) });
        }
        // The epoch before is sealed, and that comes after this mark.
        let condemned = marks::condemned(engine, epoch).await?.ok_or_else(|| missing(marks::condemned_key(epoch)))?;
        let settled = match epoch - 1 {
            0 => None,
            before => {
                let decided = marks::finals(engine, before).await?.ok_or_else(|| missing(marks::final_key(before)))?;
                Some((before, decided.live))
            }
        };
        Ok(Self { packs: condemned.packs, settled })
    }

    /// What lives, by the newest round that was decided, and the number of that round; `None` before the first.
    pub(crate) async fn live(&self, engine: &Engine) -> Result<Option<(u64, Live)>, MarkError> {
        let Some((mut round, mut hash)) = self.settled else { return Ok(None) };
        loop {
            if let Some(live) = marks::live(engine, round, &hash).await? {
                return Ok(Some((round, live)));
            }
            // The list is removed when a later round is done, which has one of its own.
            round += 1;
            hash = marks::finals(engine, round).await?.ok_or_else(|| missing(marks::live_key(round - 1, &hash)))?.live;
        }
    }
}

fn missing(key: String) -> MarkError {
    MarkError::Damaged { key, source: crate::wire::WireError { what: "it is missing", at: 0 } }
}
