//! Changes bytes as damage, bugs and attackers do: bits, lengths, cuts, splices. The same seed makes the same change.

/// Numbers that lengths and counts are replaced with.
const ABSURD: [u64; 12] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_fffe,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];
/// No input is longer.
const MAX_BYTES: usize = 256 << 10;
/// Changes of one input, at most.
const MAX_CHANGES: u64 = 6;

/// Numbers that look random: `SplitMix64`.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, or 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % (end.max(1) as u64)).unwrap_or(0)
    }

    /// A number that is likely to hurt: absurd, or near the length of something.
    fn number(&mut self, len: usize) -> u64 {
        match self.below(4) {
            0 => self.next() % 300,
            1 => (len as u64).wrapping_add(self.next() % 5).wrapping_sub(2),
            _ => ABSURD[self.below(ABSURD.len())],
        }
    }
}

/// One of the samples, changed.
pub(super) fn mutated(random: &mut Random, samples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = samples[random.below(samples.len())].clone();
    for _ in 0..=random.next() % MAX_CHANGES {
        change(random, &mut bytes, samples);
    }
    bytes.truncate(MAX_BYTES);
    bytes
}

fn change(random: &mut Random, bytes: &mut Vec<u8>, samples: &[Vec<u8>]) {
    let at = place(random, bytes.len());
    let len = bytes.len();
    match random.below(12) {
        0 if len > 0 => bytes[at] ^= 1 << random.below(8),
        1 if len > 0 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
        2 if len > 0 => bytes[at] = random.next().to_le_bytes()[0],
        3 | 4 => {
            // A number of fixed width.
            let width = [2, 4, 8][random.below(3)];
            let number = random.number(len).to_le_bytes();
            for (byte, new) in bytes.iter_mut().skip(at).zip(&number[..width]) {
                *byte = *new;
            }
        }
        5 => {
            // A number of variable width in place of a byte.
            let number = random.number(len);
            let end = (at + 1).min(len);
            bytes.splice(at..end, leb128(number));
        }
        6 => bytes.truncate(at),
        7 => {
            let end = (at + 1 + random.below(16)).min(len);
            bytes.drain(at..end);
        }
        8 => {
            // The same again, once or often.
            let end = (at + 1 + random.below(64)).min(len);
            let part = bytes[at..end].to_vec();
            let times = if random.below(8) == 0 { 1000 } else { 1 };
            let more = part.repeat(times.min(MAX_BYTES / part.len().max(1)));
            bytes.splice(at..at, more);
        }
        9 => {
            let more: Vec<u8> = (0..random.below(16)).map(|_| random.next().to_le_bytes()[0]).collect();
            bytes.splice(at..at, more);
        }
        10 => {
            // The rest of another one.
            let other = &samples[random.below(samples.len())];
            let from = place(random, other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        _ => {
            // A number as text.
            let digit = bytes.iter().skip(at).position(u8::is_ascii_digit).map(|more| at + more);
            if let Some(digit) = digit {
                let text = random.number(len).to_string();
                bytes.splice(digit..=digit, text.into_bytes());
            }
        }
    }
}

/// Anywhere, but rather near the begin: that is where numbers are.
fn place(random: &mut Random, len: usize) -> usize {
    if random.below(2) == 0 { random.below(len.min(128) + 1) } else { random.below(len + 1) }.min(len.saturating_sub(1))
}

fn leb128(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    bytes.push(number.to_le_bytes()[0]);
    bytes
}
