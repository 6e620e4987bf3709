//! `FastCDC` (Xia et al., ATC'16 and TPDS'20) in the two-byte form of 2020, with a gear table derived from the domain's
//! chunker key, so that outsiders cannot predict cut points. What repositories used before [`super::window`].

use fastcdc::v2020::{Normalization, cut_gear, select_masks};

use super::Chunker;
use crate::config::ChunkerConfig;

/// What the gear table is derived for; a later version of the table gets another text.
const GEAR_CONTEXT: &[u8] = b"lifeboat fastcdc-v2020-keyed 1 gear";

/// `FastCDC` of 2020 with a keyed gear table and normalisation level 1.
#[derive(Clone)]
pub struct KeyedFastCdc {
    gear: [u64; 256],
    gear_shifted: [u64; 256],
    min: usize,
    average: usize,
    max: usize,
    strict: u64,
    relaxed: u64,
}

impl std::fmt::Debug for KeyedFastCdc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The table follows from a key: it is not shown.
        write!(f, "KeyedFastCdc({}, {}, {})", self.min, self.average, self.max)
    }
}

impl KeyedFastCdc {
    /// The chunker of a repository. Sizes are rounded down to even numbers, as the two-byte scan needs.
    pub fn new(config: &ChunkerConfig, key: &[u8; 32]) -> Self {
        let mut bytes = [0; 2048];
        blake3::Hasher::new_keyed(key).update(GEAR_CONTEXT).finalize_xof().fill(&mut bytes);
        let mut gear = [0; 256];
        for (value, word) in gear.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *value = u64::from_le_bytes(*word);
        }
        let even = |size: u32| (size & !1) as usize;
        let average = even(config.average);
        let (strict, relaxed) = select_masks(average, Normalization::Level1);
        Self {
            gear,
            gear_shifted: gear.map(|value| value << 1),
            min: even(config.min),
            average,
            max: even(config.max),
            strict,
            relaxed,
        }
    }
}

impl Chunker for KeyedFastCdc {
    fn cut(&self, bytes: &[u8]) -> usize {
        let (_, length) = cut_gear(
            bytes,
            self.min,
            self.average,
            self.max,
            self.strict,
            self.relaxed,
            self.strict << 1,
            self.relaxed << 1,
            &self.gear,
            &self.gear_shifted,
        );
        length
    }

    fn max(&self) -> usize {
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::tests::are_frozen;

    #[test]
    fn cut_points_are_frozen() {
        are_frozen(&ChunkerConfig::fastcdc(), GOLDEN_DEFAULT, GOLDEN_SMALL);
    }

    const GOLDEN_DEFAULT: &[usize] = &[
        1_647_965, 542_845, 289_457, 1_000_570, 845_883, 922_894, 373_132, 837_028, 155_648, 420_100, 871_326, 481_760,
    ];
    const GOLDEN_SMALL: &[usize] =
        &[8975, 10110, 8646, 14156, 5230, 14207, 22052, 12753, 9270, 10661, 2960, 8435, 3617];
}
