//! Cut points where the 64 bytes before them have a keyed hash with enough zeros, found by vectors.
//!
//! Two tests: a cheap one of the last 8 bytes, which one place in 256 passes ([`super::prefilter`]), and a hash of 64
//! bits of the whole window, which decides. As in `FastCDC` the test is harder before the average length and easier
//! behind it, and the bytes before the smallest length are not looked at. Whether a place is a cut point depends on
//! nothing but the window and the key, so that cut points are found again behind any change.

use super::Chunker;
use super::prefilter::{self, Prefilter};
use crate::config::ChunkerConfig;

/// What the secret numbers are derived for; a later version gets another text.
const CONTEXT: &[u8] = b"lifeboat window-keyed 1";
/// Bytes before a place that decide whether it is a cut point.
const WINDOW: usize = 64;
/// The smallest average, as the power of two: for shorter chunks the first test passes too few places.
pub(crate) const MIN_AVERAGE_BITS: u32 = 12;

/// The chunker of new repositories.
#[derive(Clone)]
pub struct KeyedWindow {
    prefilter: Prefilter,
    keys: [u64; 9],
    min: usize,
    average: usize,
    max: usize,
    strict: u64,
    relaxed: u64,
}

impl std::fmt::Debug for KeyedWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The numbers follow from a key: they are not shown.
        write!(f, "KeyedWindow({}, {}, {})", self.min, self.average, self.max)
    }
}

/// Both halves of the product, one upon the other.
fn fold(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    // The lower half: what the cast is for.
    #[allow(clippy::cast_possible_truncation, reason = "the other half is taken as well")]
    let low = product as u64;
    #[allow(clippy::cast_possible_truncation, reason = "64 bits are left")]
    let high = (product >> 64) as u64;
    low ^ high
}

impl KeyedWindow {
    /// The chunker of a repository.
    pub fn new(config: &ChunkerConfig, key: &[u8; 32]) -> Self {
        let mut secret = [0; prefilter::SECRET_BYTES + 9 * 8];
        blake3::Hasher::new_keyed(key).update(CONTEXT).finalize_xof().fill(&mut secret);
        let (for_prefilter, for_keys) = secret.split_first_chunk().unwrap_or((&[0; prefilter::SECRET_BYTES], &[]));
        let mut keys = [0; 9];
        for (key, word) in keys.iter_mut().zip(for_keys.as_chunks::<8>().0) {
            *key = u64::from_le_bytes(*word);
        }
        let bits = average_bits(config.average).max(MIN_AVERAGE_BITS) - prefilter::BITS;
        Self {
            prefilter: Prefilter::new(for_prefilter),
            keys,
            min: (config.min as usize).max(WINDOW),
            average: config.average as usize,
            max: config.max as usize,
            strict: (1 << (bits + 1)) - 1,
            relaxed: (1 << (bits - 1)) - 1,
        }
    }

    fn hash(&self, window: &[u8; WINDOW]) -> u64 {
        let words = window.as_chunks::<8>().0;
        let mut hash = self.keys[8];
        for (pair, keys) in words.as_chunks::<2>().0.iter().zip(self.keys.as_chunks::<2>().0) {
            let [one, other] = pair.map(u64::from_le_bytes);
            hash = hash.rotate_left(23) ^ fold(one ^ keys[0], other ^ keys[1]);
        }
        fold(hash, self.keys[8] | 1)
    }

    /// The first cut point from `from` to before `to` at which the bits of the mask are zero.
    fn find(&self, bytes: &[u8], mut from: usize, to: usize, mask: u64) -> Option<usize> {
        while from < to
            && let Some((block, mut found)) = self.prefilter.next(bytes, from, to)
        {
            while found != 0 {
                let place = block + found.trailing_zeros() as usize;
                found &= found - 1;
                let window = bytes[..place].last_chunk()?;
                if self.hash(window) & mask == 0 {
                    return Some(place);
                }
            }
            from = block + prefilter::BLOCK;
        }
        None
    }
}

/// The power of two that is nearest to the average.
pub(crate) fn average_bits(average: u32) -> u32 {
    let below = average.max(1).ilog2();
    // Nearest by ratio: from the square root of two on.
    below + u32::from(u64::from(average) * u64::from(average) >= 2 << (2 * below))
}

impl Chunker for KeyedWindow {
    fn cut(&self, bytes: &[u8]) -> usize {
        let end = bytes.len().min(self.max);
        if end <= self.min {
            return end;
        }
        let middle = self.average.min(end);
        let found = self.find(bytes, self.min, middle, self.strict);
        found.or_else(|| self.find(bytes, middle, end, self.relaxed)).unwrap_or(end)
    }

    fn max(&self) -> usize {
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::tests::{are_frozen, lengths, noise};

    #[test]
    fn cut_points_are_frozen() {
        are_frozen(&ChunkerConfig::default(), GOLDEN_DEFAULT, GOLDEN_SMALL);
    }

    const GOLDEN_DEFAULT: &[usize] =
        &[540_085, 591_666, 462_861, 831_825, 614_092, 780_867, 138_698, 1_071_176, 1_447_594, 750_741, 1_159_003];
    const GOLDEN_SMALL: &[usize] =
        &[5634, 4681, 4748, 17321, 14683, 8633, 3167, 14713, 11588, 10866, 15813, 6111, 12082, 1032];

    #[test]
    fn chunks_of_noise_have_about_the_average_length() {
        let config = ChunkerConfig { min: 2048, average: 8192, max: 32768, ..ChunkerConfig::default() };
        let bytes = noise(4, 16 << 20);
        let count = lengths(&KeyedWindow::new(&config, &[5; 32]), &bytes).len();
        let mean = bytes.len() / count;
        assert!((8192..12_000).contains(&mean), "{mean}");
    }

    #[test]
    fn averages_are_taken_for_the_nearest_power_of_two() {
        for (average, bits) in [(1, 0), (4096, 12), (5792, 12), (5793, 13), (8192, 13), (524_288, 19), (u32::MAX, 32)] {
            assert_eq!(average_bits(average), bits, "{average}");
        }
    }
}
