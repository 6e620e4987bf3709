//! Cutting bytes into chunks at places that the bytes themselves decide.
//!
//! Which implementation a repository uses is in its config and never changes; cut points of each are frozen by golden
//! vectors. Pure; reads nothing.

mod fastcdc;
mod prefilter;
mod window;

use std::sync::Arc;

use crate::config::{Algorithm, ChunkerConfig, ConfigError};

pub use fastcdc::KeyedFastCdc;
pub use window::KeyedWindow;
pub(crate) use window::{MIN_AVERAGE_BITS, average_bits};

/// Decides where chunks end.
pub trait Chunker: Send + Sync {
    /// Length of the first chunk of `bytes`.
    ///
    /// `bytes` holds at least [`Chunker::max`] bytes, or all that is left. At least 1 unless `bytes` is empty.
    fn cut(&self, bytes: &[u8]) -> usize;

    /// No chunk is longer, in bytes.
    fn max(&self) -> usize;
}

/// The chunker that a repository uses.
pub fn chunker(config: &ChunkerConfig, key: &[u8; 32]) -> Result<Arc<dyn Chunker>, ConfigError> {
    Ok(match config.algorithm()? {
        Algorithm::FastCdc => Arc::new(KeyedFastCdc::new(config, key)),
        Algorithm::Window => Arc::new(KeyedWindow::new(config, key)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    pub(super) fn lengths(chunker: &dyn Chunker, mut bytes: &[u8]) -> Vec<usize> {
        let mut lengths = Vec::new();
        while !bytes.is_empty() {
            let length = chunker.cut(bytes);
            lengths.push(length);
            bytes = &bytes[length..];
        }
        lengths
    }

    /// Cut points are a part of the format: if these numbers change, every repository stores everything anew.
    pub(super) fn are_frozen(config: &ChunkerConfig, by_default: &[usize], of_small: &[usize]) {
        let default = chunker(config, &[7; 32]).unwrap();
        assert_eq!(lengths(&*default, &noise(1, 8 << 20)), by_default);
        let small = ChunkerConfig { min: 2048, average: 8192, max: 32768, ..config.clone() };
        let small = chunker(&small, &[8; 32]).unwrap();
        assert_eq!(lengths(&*small, &noise(2, 128 << 10)), of_small);
        // Nothing to cut at: the largest chunk.
        assert_eq!(lengths(&*small, &vec![0; 70_001]), [32768, 32768, 4465]);
    }

    fn configs() -> [ChunkerConfig; 2] {
        [ChunkerConfig::default(), ChunkerConfig::fastcdc()]
    }

    #[test]
    fn another_key_cuts_elsewhere() {
        let bytes = noise(1, 8 << 20);
        for config in configs() {
            let one = lengths(&*chunker(&config, &[1; 32]).unwrap(), &bytes);
            assert_ne!(one, lengths(&*chunker(&config, &[2; 32]).unwrap(), &bytes));
            assert_eq!(one, lengths(&*chunker(&config, &[1; 32]).unwrap(), &bytes));
        }
    }

    #[test]
    fn an_insertion_moves_few_cut_points() {
        let bytes = noise(3, 32 << 20);
        let mut longer = bytes.clone();
        longer.splice(1000..1000, *b"seventeen bytes!!");
        let ends = |lengths: &[usize], shift: usize| -> BTreeSet<usize> {
            let ends = lengths.iter().scan(0, |at, length| {
                *at += length;
                Some(*at)
            });
            ends.map(|end| end.saturating_sub(shift)).collect()
        };
        for config in configs() {
            let chunker = chunker(&config, &[3; 32]).unwrap();
            let before = lengths(&*chunker, &bytes);
            let after = lengths(&*chunker, &longer);
            let kept = ends(&before, 0).intersection(&ends(&after, 17)).count();
            assert!(kept + 5 >= before.len(), "{kept} of {} cut points are kept", before.len());
        }
    }

    proptest! {
        #[test]
        fn chunks_cover_everything_within_bounds(seed: u64, len in 0usize..300_000) {
            for config in configs() {
                let config = ChunkerConfig { min: 2048, average: 8192, max: 32768, ..config };
                let lengths = lengths(&*chunker(&config, &[9; 32]).unwrap(), &noise(seed, len));
                prop_assert_eq!(lengths.iter().sum::<usize>(), len);
                prop_assert!(lengths.iter().all(|length| (1..=32768).contains(length)));
                prop_assert!(lengths.iter().rev().skip(1).all(|length| *length >= 2048));
            }
        }
    }
}
