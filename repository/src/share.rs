//! A share of all packs at a time: which come next after those of the last run, and where a run stopped.
//!
//! The place where a run stopped is kept in the local cache. If it is lost, a round begins anew, nothing else.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;
use tracing::debug;

use crate::id::{PackId, RepositoryId};

/// One in so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u32);

impl Share {
    /// All.
    pub const ALL: Self = Self(1);

    /// Whether it is not all.
    pub fn is_part(self) -> bool {
        self.0 > 1
    }
}

/// A text that is no share.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("a share is written as 1/7: one seventh at a time")]
pub struct ParseShareError;

impl FromStr for Share {
    type Err = ParseShareError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let of = text.strip_prefix("1/").and_then(|of| of.parse().ok()).filter(|of| (1..=10_000).contains(of));
        of.map(Self).ok_or(ParseShareError)
    }
}

/// Where the last run stopped; forgotten without a folder.
#[derive(Debug, Clone)]
pub(crate) struct Cursor {
    path: Option<PathBuf>,
}

impl Cursor {
    /// The cursor of a verb in a repository.
    pub(crate) fn new(cache: Option<&Path>, repository: RepositoryId, verb: &str) -> Self {
        Self { path: cache.map(|cache| cache.join(repository.to_string()).join(format!("{verb}.cursor"))) }
    }

    /// The last pack that was done.
    pub(crate) fn load(&self) -> Option<PackId> {
        let text = std::fs::read_to_string(self.path.as_ref()?).ok()?;
        let (session, seq) = text.trim().split_once('/')?;
        Some(PackId { session: session.parse().ok()?, seq: seq.parse().ok()? })
    }

    /// Notes the last pack that was done.
    pub(crate) fn save(&self, pack: PackId) {
        let Some(path) = &self.path else { return };
        let write = || {
            std::fs::create_dir_all(path.parent().unwrap_or(path))?;
            let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
            std::fs::write(&temporary, pack.to_string())?;
            std::fs::rename(&temporary, path)
        };
        if let Err(error) = write() {
            debug!(path = %path.display(), %error, "the place where the run stopped was not kept");
        }
    }
}

/// The share of `packs` (each with its weight) that comes after `last`, going round at the end; at least one.
pub(crate) fn choose(mut packs: Vec<(PackId, u64)>, share: Share, last: Option<PackId>) -> Vec<(PackId, u64)> {
    packs.sort_unstable();
    if !share.is_part() {
        return packs;
    }
    let total: u64 = packs.iter().map(|(_, weight)| weight).sum();
    let wanted = total.div_ceil(u64::from(share.0));
    let done = last.map_or(0, |last| packs.partition_point(|(pack, _)| *pack <= last));
    if done < packs.len() {
        packs.rotate_left(done);
    }
    let mut sum = 0;
    let is_wanted = |(_, weight): &(PackId, u64)| {
        sum += weight;
        sum - weight < wanted
    };
    packs.into_iter().take_while(is_wanted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SessionId;
    use std::collections::BTreeSet;

    fn pack(seq: u32) -> PackId {
        PackId { session: SessionId([1; 16]), seq }
    }

    #[test]
    fn shares_are_written_as_fractions() {
        assert_eq!("1/7".parse(), Ok(Share(7)));
        for text in ["7", "2/7", "1/0", "1/x", "1/99999", ""] {
            assert_eq!(text.parse::<Share>(), Err(ParseShareError), "{text:?}");
        }
    }

    #[test]
    fn seven_sevenths_are_everything_whatever_comes_and_goes() {
        let packs: Vec<_> = (0..100).rev().map(|seq| (pack(seq), u64::from(seq % 9) + 1)).collect();
        let (mut last, mut seen) = (None, BTreeSet::new());
        for run in 0..7 {
            let mut now = packs.clone();
            now.push((pack(1000 + run), 1));
            let chosen = choose(now, Share(7), last);
            assert!(!chosen.is_empty());
            last = chosen.last().map(|(pack, _)| *pack);
            seen.extend(chosen.into_iter().map(|(pack, _)| pack));
        }
        assert!(packs.iter().all(|(pack, _)| seen.contains(pack)));
        assert_eq!(choose(packs.clone(), Share::ALL, Some(pack(50))).len(), 100);
        assert_eq!(choose(vec![(pack(0), 1)], Share(7), Some(pack(0))).len(), 1);
        assert_eq!(choose(vec![], Share(7), Some(pack(0))), []);
    }

    #[test]
    fn a_cursor_comes_back_and_rubbish_begins_anew() {
        let cache = tempfile::tempdir().unwrap();
        let repository = RepositoryId::random();
        let cursor = Cursor::new(Some(cache.path()), repository, "scrub");
        assert_eq!(cursor.load(), None);
        cursor.save(pack(7));
        assert_eq!(cursor.load(), Some(pack(7)));
        std::fs::write(cache.path().join(repository.to_string()).join("scrub.cursor"), "x/y").unwrap();
        assert_eq!(cursor.load(), None);
    }
}
