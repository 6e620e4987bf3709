//! Lists of ranges of a volume, as its storage gives them: checked, in order, without overlaps.

use std::ops::Range;

use thiserror::Error;

use crate::manifest::PAGE_BYTES;

/// Ranges that a list may have, so that one that never ends costs no memory: 64 MiB.
const MAX_RANGES: usize = 4 << 20;

/// A list that cannot be one of this volume.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ExtentsError {
    /// A range is empty, or has numbers that no volume has.
    #[error("the list has a range of {len} bytes at {offset}, which is none")]
    NoRange {
        /// Where it begins.
        offset: i64,
        /// Its length.
        len: i64,
    },
    /// A range ends behind the volume.
    #[error("the list has a range that ends at {end}, behind the volume of {size} bytes")]
    Beyond {
        /// Where the range ends.
        end: u64,
        /// The volume's size.
        size: u64,
    },
    /// There are more ranges than are taken.
    #[error("the list has more than {MAX_RANGES} ranges")]
    TooMany,
}

/// Ranges of a volume, widened to whole pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extents {
    ranges: Vec<Range<u64>>,
    size: u64,
}

impl Extents {
    /// No ranges, of a volume of this size.
    pub fn new(size: u64) -> Self {
        Self { ranges: Vec::new(), size }
    }

    /// Adds a range. They may come in any order; in order is quicker.
    pub fn add(&mut self, offset: i64, len: i64) -> Result<(), ExtentsError> {
        let none = || ExtentsError::NoRange { offset, len };
        let (start, bytes) = (u64::try_from(offset).map_err(|_| none())?, u64::try_from(len).map_err(|_| none())?);
        let end = start.checked_add(bytes).filter(|_| bytes > 0).ok_or_else(none)?;
        if end > self.size {
            return Err(ExtentsError::Beyond { end, size: self.size });
        }
        let start = start / PAGE_BYTES * PAGE_BYTES;
        let end = (end.div_ceil(PAGE_BYTES) * PAGE_BYTES).min(self.size);
        match self.ranges.last_mut() {
            Some(last) if start <= last.end && start >= last.start => last.end = last.end.max(end),
            Some(last) if start < last.start => self.insert(start..end),
            _ => self.ranges.push(start..end),
        }
        if self.ranges.len() > MAX_RANGES { Err(ExtentsError::TooMany) } else { Ok(()) }
    }

    /// Joins a range that comes out of order with those that it touches.
    fn insert(&mut self, range: Range<u64>) {
        let from = self.ranges.partition_point(|one| one.end < range.start);
        let until = self.ranges.partition_point(|one| one.start <= range.end);
        let touched = &self.ranges[from..until.max(from)];
        let start = touched.first().map_or(range.start, |one| one.start.min(range.start));
        let end = touched.last().map_or(range.end, |one| one.end.max(range.end));
        self.ranges.splice(from..until.max(from), std::iter::once(start..end));
    }

    /// The size of the volume.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Whether any byte of the range is in the list.
    pub(super) fn touch(&self, range: &Range<u64>) -> bool {
        let first = self.ranges.partition_point(|one| one.end <= range.start);
        self.ranges.get(first).is_some_and(|one| one.start < range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: i64 = PAGE_BYTES.cast_signed();

    #[test]
    fn what_cannot_be_a_range_is_refused() {
        let mut list = Extents::new(1 << 20);
        for (offset, len) in [(0, 0), (-1, 10), (0, -1), (i64::MAX, i64::MAX)] {
            assert!(list.add(offset, len).is_err(), "{offset} {len}");
        }
        assert_eq!(list.add(1 << 20, 1), Err(ExtentsError::Beyond { end: (1 << 20) + 1, size: 1 << 20 }));
        assert_eq!(list.bytes(), 0);
        assert_eq!(list.add((1 << 20) - 1, 1), Ok(()));
        assert_eq!(list.bytes(), PAGE_BYTES);
    }

    #[test]
    fn the_last_page_may_be_short() {
        let mut list = Extents::new(PAGE_BYTES + 512);
        list.add(PAGE, 1).unwrap();
        assert_eq!(list.bytes(), 512);
    }

    proptest! {
        #[test]
        fn the_list_holds_the_pages_that_were_added_and_no_others(ranges in prop::collection::vec((0..64_i64, 1..9_i64), 0..20)) {
            let mut list = Extents::new(80 * PAGE_BYTES);
            let mut pages = [false; 80];
            for (page, count) in ranges {
                list.add(page * PAGE + 7, count * PAGE - 7).unwrap();
                for page in page..page + count {
                    pages[usize::try_from(page).unwrap()] = true;
                }
            }
            for (page, wanted) in (0_u64..).zip(pages) {
                prop_assert_eq!(list.touch(&(page * PAGE_BYTES..(page + 1) * PAGE_BYTES)), wanted);
            }
            prop_assert_eq!(list.bytes(), pages.iter().filter(|page| **page).count() as u64 * PAGE_BYTES);
            prop_assert!(list.ranges.windows(2).all(|two| two[0].end <= two[1].start));
        }
    }
}
