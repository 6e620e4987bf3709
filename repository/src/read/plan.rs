//! Which byte ranges of which packs to read for many chunks.

use std::ops::Range;

use crate::id::PackId;

/// A gap up to this many bytes is read along: cheaper than another request.
const MAX_GAP_BYTES: u64 = 512 << 10;
/// A read is not made longer than this, so that several in flight fit into memory.
const MAX_READ_BYTES: u64 = 8 << 20;
/// Reads up to this length come before longer ones: what they bring is little, and others may need it to be whole.
const SMALL_READ_BYTES: u64 = 1 << 20;
/// Frames of a read are opened together up to this many plain bytes: small frames may unfold to much more than they are.
const MAX_GROUP_BYTES: u64 = 2 << 20;

/// A frame that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) pack: PackId,
    pub(super) range: Range<u64>,
    pub(super) plain_len: u32,
    /// What it is for; several may want the same frame.
    pub(super) number: usize,
}

/// One read and the frames in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) pack: PackId,
    pub(super) range: Range<u64>,
    /// By offset; those of a group are opened together.
    pub(super) groups: Vec<Vec<Wanted>>,
}

/// Puts frames into reads: small ones first, otherwise by pack and offset.
pub(super) fn coalesce(mut wanted: Vec<Wanted>) -> Vec<Read> {
    wanted.sort_by_key(|frame| (frame.pack, frame.range.start));
    let mut reads: Vec<Read> = Vec::new();
    let mut plain = 0;
    for frame in wanted {
        plain += u64::from(frame.plain_len);
        match reads.last_mut() {
            Some(read)
                if read.pack == frame.pack
                    && frame.range.start <= read.range.end + MAX_GAP_BYTES
                    && frame.range.end.max(read.range.end) - read.range.start <= MAX_READ_BYTES =>
            {
                read.range.end = read.range.end.max(frame.range.end);
                match read.groups.last_mut() {
                    Some(group) if plain <= MAX_GROUP_BYTES => group.push(frame),
                    _ => {
                        plain = u64::from(frame.plain_len);
                        read.groups.push(vec![frame]);
                    }
                }
            }
            _ => {
                plain = u64::from(frame.plain_len);
                reads.push(Read { pack: frame.pack, range: frame.range.clone(), groups: vec![vec![frame]] });
            }
        }
    }
    reads.sort_by_key(|read| read.range.end - read.range.start > SMALL_READ_BYTES);
    reads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SessionId;
    use proptest::prelude::*;

    fn wanted(seq: u32, start: u64, len: u64, number: usize) -> Wanted {
        let pack = PackId { session: SessionId([0; 16]), seq };
        Wanted { pack, range: start..start + len, plain_len: u32::try_from(len).unwrap(), number }
    }

    #[test]
    fn frames_that_unfold_to_much_share_a_read_but_are_not_opened_together() {
        let frames = (0..5).map(|number| Wanted { plain_len: 1 << 20, ..wanted(1, number * 100, 100, 0) }).collect();
        let reads = coalesce(frames);
        assert_eq!(reads.len(), 1);
        assert_eq!(reads[0].groups.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    }

    #[test]
    fn near_frames_share_a_read() {
        let reads = coalesce(vec![
            wanted(1, 900_000, 10, 2),
            wanted(1, 0, 1000, 0),
            wanted(1, 400_000, 10, 1),
            wanted(2, 0, 1, 3),
        ]);
        assert_eq!(reads.iter().map(|r| r.range.clone()).collect::<Vec<_>>(), [0..900_010, 0..1]);
        assert_eq!(coalesce(vec![wanted(1, 0, 10, 0), wanted(1, 600_000, 10, 1)]).len(), 2);
    }

    #[test]
    fn small_reads_come_first() {
        let frames = vec![wanted(1, 0, 3 << 20, 0), wanted(2, 0, 8 << 10, 1), wanted(3, 0, 2 << 20, 2)];
        assert_eq!(coalesce(frames).iter().map(|read| read.pack.seq).collect::<Vec<_>>(), [2, 1, 3]);
    }

    proptest! {
        #[test]
        fn every_frame_is_read_once(frames in proptest::collection::vec((0u32..3, 0u64..40_000_000, 0u64..3_000_000), 0..60)) {
            let wanted: Vec<_> = frames.iter().enumerate().map(|(n, &(seq, start, len))| wanted(seq, start, len, n)).collect();
            let reads = coalesce(wanted.clone());
            let mut seen = vec![0; wanted.len()];
            for read in &reads {
                prop_assert!(read.range.end - read.range.start <= MAX_READ_BYTES);
                for frame in read.groups.iter().flatten() {
                    prop_assert!(read.pack == frame.pack && read.range.start <= frame.range.start && frame.range.end <= read.range.end);
                    seen[frame.number] += 1;
                }
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
        }
    }
}
