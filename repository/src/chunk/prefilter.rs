//! The first of the two tests of [`super::window`]: which places may be cut points at all, 32 of them at a time.
//!
//! It is the one that looks at every byte, so there are two forms of it: one for AVX2, and one that compilers turn into
//! whatever vectors a machine has. Both give the same answers, which a test compares. Unsafe code is allowed here alone
//! of the chunkers, because a function for AVX2 must only be called where the processor has it.
#![allow(unsafe_code)]

/// Bytes before a place that decide.
pub(super) const WINDOW: usize = 8;
/// Places that are looked at together.
pub(super) const BLOCK: usize = 32;
/// One place in 2 to the power of this passes.
pub(super) const BITS: u32 = 8;
/// The other bits of a hash.
const SHIFT: u32 = 16 - BITS;

/// Numbers of what is secret: two bytes for each weight, two each for the factors and the offset.
pub(super) const SECRET_BYTES: usize = 2 * WINDOW + 8;

/// A hash of eight bytes modulo 2^16, of which the upper [`BITS`] must be zero.
///
/// `x` = (weighted sum of the first four bytes) × `factors[0]` + (of the last four) × `factors[1]` + `offset`; the hash is
/// (`x` XOR `x` / 256) × `factors[2]`. Two sums with a factor each, because one of eight bytes has too few values; the
/// last step, because text has sums in a narrow range, of which multiplication alone takes a regular part.
#[derive(Debug, Clone)]
pub(super) struct Prefilter {
    /// From -63 to 63, so that the sum of two products fits 16 bits with its sign.
    weights: [i8; WINDOW],
    factors: [u16; 3],
    /// Such that runs of zeros, the most frequent bytes of all, do not pass.
    offset: u16,
    has_avx2: bool,
}

impl Prefilter {
    /// From secret bytes.
    pub(super) fn new(secret: &[u8; SECRET_BYTES]) -> Self {
        let mut weights = [0; WINDOW];
        for (weight, [size, sign]) in weights.iter_mut().zip(secret.as_chunks::<2>().0) {
            let size = (size % 63 + 1).cast_signed();
            *weight = if sign & 1 == 1 { size } else { -size };
        }
        let number = |at: usize| u16::from_le_bytes([secret[at], secret[at + 1]]);
        let factors = [number(16) | 1, number(18) | 1, number(20) | 1];
        let mut offset = number(22);
        while hash(0, factors, offset) >> SHIFT == 0 {
            offset = offset.wrapping_add(1);
        }
        Self { weights, factors, offset, has_avx2: has_avx2() }
    }

    /// The first block of places from `from` on in which some pass, as its first place and a bit for each place in it.
    ///
    /// A place is the number of bytes before it; `from` is at least [`WINDOW`], all places are below `to`, and `bytes`
    /// has at least `to` bytes.
    pub(super) fn next(&self, bytes: &[u8], from: usize, to: usize) -> Option<(usize, u32)> {
        if self.has_avx2 { self.next_avx2(bytes, from, to) } else { self.next_portable(bytes, from, to) }
    }

    #[cfg(target_arch = "x86_64")]
    fn next_avx2(&self, bytes: &[u8], from: usize, to: usize) -> Option<(usize, u32)> {
        // SAFETY: the processor has AVX2, which was asked when `self` was made.
        let (at, found) = unsafe { avx2::next(self, bytes, from, to) };
        // What is less than a block is left to the other form.
        if found == 0 { self.next_portable(bytes, at, to) } else { Some((at, found)) }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn next_avx2(&self, bytes: &[u8], from: usize, to: usize) -> Option<(usize, u32)> {
        self.next_portable(bytes, from, to)
    }

    fn next_portable(&self, bytes: &[u8], mut from: usize, to: usize) -> Option<(usize, u32)> {
        while from < to {
            let count = BLOCK.min(to - from);
            let found = self.block(&bytes[from - WINDOW..from + count - 1]);
            if found != 0 {
                return Some((from, found));
            }
            from += count;
        }
        None
    }

    /// A bit for each place; the first one has [`WINDOW`] bytes before it.
    fn block(&self, bytes: &[u8]) -> u32 {
        let mut sums = [[0_i16; BLOCK]; 2];
        for (shift, weight) in self.weights.iter().enumerate() {
            for (sum, byte) in sums[shift / 4].iter_mut().zip(&bytes[shift..]) {
                *sum = sum.wrapping_add(i16::from(*weight) * i16::from(*byte));
            }
        }
        let mut found = 0;
        let [firsts, lasts] = &sums;
        for (place, (first, last)) in firsts.iter().zip(lasts).enumerate().take(bytes.len() + 1 - WINDOW) {
            let first = first.cast_unsigned().wrapping_mul(self.factors[0]);
            let sum = first.wrapping_add(last.cast_unsigned().wrapping_mul(self.factors[1]));
            found |= u32::from(hash(sum, self.factors, self.offset) >> SHIFT == 0) << place;
        }
        found
    }
}

/// The last steps, from the sum of both products on.
fn hash(sum: u16, factors: [u16; 3], offset: u16) -> u16 {
    let sum = sum.wrapping_add(offset);
    (sum ^ sum >> 8).wrapping_mul(factors[2])
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi16, _mm256_cmpeq_epi16, _mm256_loadu_si256, _mm256_maddubs_epi16, _mm256_movemask_epi8,
        _mm256_mullo_epi16, _mm256_or_si256, _mm256_set1_epi16, _mm256_setzero_si256, _mm256_srli_epi16,
        _mm256_testz_si256, _mm256_xor_si256,
    };

    use super::{BLOCK, Prefilter, SHIFT, WINDOW};

    /// As [`Prefilter::next`] for whole blocks; when nothing passes, how far it came.
    ///
    /// Even and odd places are summed apart: `maddubs` multiplies bytes by weights and adds them pair by pair.
    #[target_feature(enable = "avx2")]
    pub(super) fn next(prefilter: &Prefilter, bytes: &[u8], from: usize, to: usize) -> (usize, u32) {
        let weights = |pair: usize| {
            let [one, other] = [prefilter.weights[2 * pair], prefilter.weights[2 * pair + 1]];
            _mm256_set1_epi16(i16::from_le_bytes([one.cast_unsigned(), other.cast_unsigned()]))
        };
        let weights = [weights(0), weights(1), weights(2), weights(3)];
        let factors = prefilter.factors.map(|factor| _mm256_set1_epi16(factor.cast_signed()));
        let offset = _mm256_set1_epi16(prefilter.offset.cast_signed());
        let products = |bytes: &[u8; 32], weights: __m256i| {
            // SAFETY: 32 bytes are there, and the load needs no alignment.
            let bytes = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
            _mm256_maddubs_epi16(bytes, weights)
        };
        let pass = |bytes: &[u8; 38]| {
            let at = |shift: usize| bytes[shift..].first_chunk::<32>();
            let (Some(a), Some(b), Some(c), Some(d)) = (at(0), at(2), at(4), at(6)) else {
                return _mm256_setzero_si256();
            };
            let first = _mm256_add_epi16(products(a, weights[0]), products(b, weights[1]));
            let last = _mm256_add_epi16(products(c, weights[2]), products(d, weights[3]));
            let sum = _mm256_add_epi16(_mm256_mullo_epi16(first, factors[0]), _mm256_mullo_epi16(last, factors[1]));
            let sum = _mm256_add_epi16(sum, offset);
            let hash = _mm256_mullo_epi16(_mm256_xor_si256(sum, _mm256_srli_epi16::<8>(sum)), factors[2]);
            _mm256_cmpeq_epi16(_mm256_srli_epi16::<{ SHIFT.cast_signed() }>(hash), _mm256_setzero_si256())
        };
        let mut at = from;
        while at + BLOCK <= to {
            let Some(block) = bytes.get(at - WINDOW..).and_then(<[u8]>::first_chunk::<39>) else { break };
            let (Some(even), Some(odd)) = (block.first_chunk(), block.last_chunk()) else { break };
            let (even, odd) = (pass(even), pass(odd));
            let any = _mm256_or_si256(even, odd);
            if _mm256_testz_si256(any, any) == 0 {
                let even = _mm256_movemask_epi8(even).cast_unsigned() & 0x5555_5555;
                let odd = _mm256_movemask_epi8(odd).cast_unsigned() & 0xAAAA_AAAA;
                return (at, even | odd);
            }
            at += BLOCK;
        }
        (at, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, place by place.
    fn passes(prefilter: &Prefilter, bytes: &[u8], place: usize) -> bool {
        let window = &bytes[place - WINDOW..place];
        let sum = |from: usize| -> i64 {
            (from..from + 4).map(|at| i64::from(prefilter.weights[at]) * i64::from(window[at])).sum()
        };
        let [first, last, mix] = prefilter.factors.map(i64::from);
        let x = (sum(0) * first + sum(4) * last + i64::from(prefilter.offset)).rem_euclid(1 << 16);
        (x ^ (x / 256)) * mix % (1 << 16) < 1 << SHIFT
    }

    fn all(bytes: &[u8], from: usize, to: usize, next: impl Fn(usize) -> Option<(usize, u32)>) -> Vec<usize> {
        assert!(to <= bytes.len());
        let (mut places, mut at) = (Vec::new(), from);
        while at < to
            && let Some((block, found)) = next(at)
        {
            places.extend((0..BLOCK).filter(|bit| found >> bit & 1 == 1).map(|bit| block + bit));
            at = block + BLOCK;
        }
        places
    }

    proptest! {
        #[test]
        fn all_forms_find_the_same_places(
            secret: [u8; SECRET_BYTES], seed: u64, len in 0usize..20_000, from in 8usize..100, values in 1u8..=255,
        ) {
            let mut bytes = vec![0; len];
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
            // Few values make places that pass frequent or rare.
            for byte in &mut bytes {
                *byte %= values;
            }
            let prefilter = Prefilter::new(&secret);
            let expected: Vec<_> = (from..len).filter(|place| passes(&prefilter, &bytes, *place)).collect();
            let portable = all(&bytes, from, len, |at| prefilter.next_portable(&bytes, at, len));
            prop_assert_eq!(&portable, &expected);
            let fastest = all(&bytes, from, len, |at| prefilter.next(&bytes, at, len));
            prop_assert_eq!(&fastest, &expected);
        }
    }

    #[test]
    fn zeros_never_pass() {
        for seed in 0..100_u8 {
            assert_eq!(Prefilter::new(&[seed; SECRET_BYTES]).next(&[0; 1000], WINDOW, 1000), None);
        }
    }
}
