//! Whether it is worth to try to compress the next chunk, by what became of those before.
//!
//! Data that is compressed or encrypted already comes in long runs; trying each chunk of them costs more than sealing it.

use std::sync::atomic::{AtomicU32, Ordering};

use super::frame::{Codec, is_worth_it};
use super::squeeze;

/// After so many chunks in a row that did not compress, only a sample of the next is tried.
const RAW_IN_A_ROW: u32 = 4;
/// Bytes of the sample, from the middle of a chunk.
const SAMPLE_BYTES: usize = 16 << 10;

/// What became of the chunks so far.
#[derive(Debug, Default)]
pub(crate) struct Experience {
    raw_in_a_row: AtomicU32,
}

impl Experience {
    /// The level for this chunk; `None`: it is to be stored as it is.
    pub(crate) fn level(&self, plain: &[u8], level: i32) -> Option<i32> {
        if self.raw_in_a_row.load(Ordering::Relaxed) < RAW_IN_A_ROW || plain.len() <= SAMPLE_BYTES {
            return Some(level);
        }
        let start = (plain.len() - SAMPLE_BYTES) / 2;
        let sample = &plain[start..start + SAMPLE_BYTES];
        match squeeze::compress(sample, level, <[u8]>::len) {
            Ok(compressed) if !is_worth_it(compressed, sample.len()) => None,
            _ => Some(level),
        }
    }

    /// Notes how a chunk was packed.
    pub(crate) fn note(&self, codec: Codec) {
        match codec {
            Codec::Raw => {
                self.raw_in_a_row.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_add(1)).ok();
            }
            Codec::Zstd => self.raw_in_a_row.store(0, Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_noise_a_sample_decides_and_text_is_tried_again() {
        let mut noise = vec![0; 64 << 10];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let text = vec![b'x'; 64 << 10];
        let experience = Experience::default();
        for _ in 0..RAW_IN_A_ROW {
            assert_eq!(experience.level(&noise, 1), Some(1));
            experience.note(Codec::Raw);
        }
        assert_eq!(experience.level(&noise, 1), None);
        // A chunk that a sample says little about is tried as a whole.
        assert_eq!(experience.level(&noise[..SAMPLE_BYTES], 1), Some(1));
        assert_eq!(experience.level(&text, 1), Some(1));
        experience.note(Codec::Zstd);
        assert_eq!(experience.level(&noise, 1), Some(1));
    }
}
