//! Columns of variable-length numbers and byte strings.

use super::PageError;
use crate::wire::{Fields, WireError};

/// Appends to a column.
pub(super) fn put_varint(column: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        // The low seven bits.
        column.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    column.push((value & 0x7f) as u8);
}

/// Small numbers of either sign stay short.
pub(super) fn put_signed(column: &mut Vec<u8>, value: i64) {
    put_varint(column, (value.wrapping_shl(1) ^ (value >> 63)).cast_unsigned());
}

/// A byte string with its length before it.
pub(super) fn put_bytes(column: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(column, bytes.len() as u64);
    column.extend_from_slice(bytes);
}

/// Takes values off a column.
#[derive(Debug, Clone)]
pub(super) struct Column<'a>(Fields<'a>);

impl<'a> Column<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(Fields::new(bytes))
    }

    pub(super) fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.0.u8()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(self.0.error("a number is too long"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.0.error("a number is too long"))
    }

    pub(super) fn varint_u32(&mut self) -> Result<u32, WireError> {
        let value = self.varint()?;
        u32::try_from(value).map_err(|_| self.0.error("a number is too large"))
    }

    pub(super) fn signed(&mut self) -> Result<i64, WireError> {
        let value = self.varint()?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    /// A count of items that take at least one byte each in this very column.
    pub(super) fn count(&mut self) -> Result<usize, WireError> {
        let count = self.varint()?;
        match usize::try_from(count) {
            Ok(count) if count <= self.0.left() => Ok(count),
            _ => Err(self.0.error("a count is larger than what follows")),
        }
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let len = self.count()?;
        self.0.take(len)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        self.0.array()
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.0.u8()
    }

    pub(super) fn left(&self) -> usize {
        self.0.left()
    }

    pub(super) fn end(&self) -> Result<(), PageError> {
        Ok(self.0.end()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_round_trip(value: u64, signed: i64) {
            let mut column = Vec::new();
            put_varint(&mut column, value);
            put_signed(&mut column, signed);
            let mut read = Column::new(&column);
            prop_assert_eq!(read.varint(), Ok(value));
            prop_assert_eq!(read.signed(), Ok(signed));
            prop_assert!(read.end().is_ok());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let mut column = Column::new(&bytes);
            while column.varint().is_ok() {}
            let mut column = Column::new(&bytes);
            while column.bytes().is_ok() {}
        }
    }
}
