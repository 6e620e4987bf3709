//! Inode numbers: of an entry from its snapshot and its place in the manifest, so that nothing has to be remembered, other
//! names of a file have the number of its first name, and a number never means anything else.

use lifeboat_repository::browse::{Cursor, Position};

/// What a number means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    /// A folder or link above the trees; the root is 1.
    Above(u64),
    /// An entry of a snapshot.
    Entry {
        /// Which of the snapshots that were shown.
        snapshot: u16,
        position: Position,
    },
}

const ENTRY: u64 = 1 << 62;
const INDEX_BITS: u32 = 16;
const PAGE_BITS: u32 = 30;
/// An index behind the last entry of a page needs one more.
const CURSOR_INDEX_BITS: u32 = INDEX_BITS + 1;
/// Offsets of a directory before its first entry: its begin, behind `.`, behind `..`.
pub(super) const FIRST_OFFSET: u64 = 2;

impl Number {
    /// The root of a snapshot, which is the first entry of its manifest.
    pub(super) fn root(snapshot: u16) -> Self {
        Self::Entry { snapshot, position: Position { page: 0, index: 0 } }
    }

    /// `None`: the manifest has more pages than a number has room for.
    pub(super) fn to_u64(self) -> Option<u64> {
        match self {
            Self::Above(number) => Some(number),
            Self::Entry { position: Position { page, .. }, .. } if page >> PAGE_BITS != 0 => None,
            Self::Entry { snapshot, position: Position { page, index } } => Some(
                ENTRY
                    | u64::from(snapshot) << (PAGE_BITS + INDEX_BITS)
                    | u64::from(page) << INDEX_BITS
                    | u64::from(index),
            ),
        }
    }

    pub(super) fn from_u64(number: u64) -> Self {
        if number & ENTRY == 0 {
            return Self::Above(number);
        }
        let bits = |from: u32, count: u32| (number >> from) & ((1 << count) - 1);
        // As many bits as the types have room for.
        Self::Entry {
            snapshot: u16::try_from(bits(PAGE_BITS + INDEX_BITS, 16)).unwrap_or(u16::MAX),
            position: Position {
                page: u32::try_from(bits(INDEX_BITS, PAGE_BITS)).unwrap_or(u32::MAX),
                index: u16::try_from(bits(0, INDEX_BITS)).unwrap_or(u16::MAX),
            },
        }
    }
}

/// The snapshot of which this is the root.
pub(super) fn root_of(number: u64) -> Option<u16> {
    match Number::from_u64(number) {
        Number::Entry { snapshot, .. } if Number::from_u64(number) == Number::root(snapshot) => Some(snapshot),
        _ => None,
    }
}

/// The offset in a directory at which a listing goes on.
pub(super) fn offset_of(cursor: Cursor) -> u64 {
    FIRST_OFFSET + 1 + (u64::from(cursor.page) << CURSOR_INDEX_BITS | u64::from(cursor.index))
}

/// Where the listing goes on at this offset; `None`: at the first entry.
pub(super) fn cursor_of(offset: u64) -> Option<Cursor> {
    let bits = offset.checked_sub(FIRST_OFFSET + 1)?;
    Some(Cursor {
        page: u32::try_from(bits >> CURSOR_INDEX_BITS).unwrap_or(u32::MAX),
        index: u32::try_from(bits & ((1 << CURSOR_INDEX_BITS) - 1)).unwrap_or(u32::MAX),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_offsets_go_there_and_back() {
        for number in [1, 2, 99_999] {
            assert_eq!(Number::from_u64(number), Number::Above(number));
        }
        let mut seen = std::collections::HashSet::new();
        for snapshot in [0, 1, u16::MAX] {
            for page in [0, 1, 70_000, (1 << PAGE_BITS) - 1] {
                for index in [0, 1, u16::MAX] {
                    let entry = Number::Entry { snapshot, position: Position { page, index } };
                    let number = entry.to_u64().unwrap();
                    assert_eq!(Number::from_u64(number), entry);
                    assert!(seen.insert(number));
                    let cursor = Position { page, index }.next();
                    assert_eq!(cursor_of(offset_of(cursor)), Some(cursor));
                }
            }
        }
        assert_eq!(Number::Entry { snapshot: 0, position: Position { page: 1 << PAGE_BITS, index: 0 } }.to_u64(), None);
        assert_eq!(Number::root(7).to_u64().and_then(root_of), Some(7));
        assert_eq!((root_of(1), root_of(ENTRY | 1)), (None, None));
        assert_eq!((cursor_of(0), cursor_of(2)), (None, None));
        assert_eq!(cursor_of(3), Some(Cursor { page: 0, index: 0 }));
    }
}
