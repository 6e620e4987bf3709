//! Variable-length numbers and columns of the manifest formats.
//!
//! Numbers are LEB128: seven bits a byte, least significant first. Reading never panics and allocates only what the
//! bytes at hand can hold.

use super::FormatError;

/// Appends an unsigned number.
pub(super) fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// Appends a signed number, zigzag: 0, -1, 1, -2, ...
pub(super) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_number(out, (value << 1 ^ value >> 63).cast_unsigned());
}

/// Appends a length and the bytes.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Takes fields off the front of bytes.
#[derive(Debug, Clone)]
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Fields after a magic number and a version, in a record of at most `max` bytes.
    pub(super) fn of_record(bytes: &'a [u8], magic: [u8; 4], max: usize) -> Result<Self, FormatError> {
        let mut fields = Self::new(bytes);
        if bytes.len() > max {
            return Err(fields.error("the record is too large"));
        }
        if fields.take(4)? != magic {
            return Err(FormatError { what: "another kind of record", at: 0 });
        }
        if fields.take(1)? != [VERSION] {
            return Err(FormatError { what: "a newer version of the record", at: 4 });
        }
        Ok(fields)
    }

    pub(super) fn error(&self, what: &'static str) -> FormatError {
        FormatError { what, at: self.at }
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest.get(..count).ok_or_else(|| self.error("the bytes end too early"))?;
        self.at += count;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn number(&mut self) -> Result<u64, FormatError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(self.error("a number is too large"));
            }
            value |= bits << shift;
            if byte < 0x80 {
                // One form for each number, so that equal entries have equal pages.
                return if byte == 0 && shift > 0 { Err(self.error("a number has an empty end")) } else { Ok(value) };
            }
        }
        Err(self.error("a number does not end"))
    }

    pub(super) fn number_u32(&mut self) -> Result<u32, FormatError> {
        let value = self.number()?;
        u32::try_from(value).map_err(|_| self.error("a number is too large"))
    }

    pub(super) fn signed(&mut self) -> Result<i64, FormatError> {
        let value = self.number()?;
        Ok((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
    }

    /// A count of items that take at least `size` bytes each of what is left.
    pub(super) fn count(&mut self, size: usize) -> Result<usize, FormatError> {
        let count = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        match count.checked_mul(size) {
            Some(bytes) if bytes <= self.left() => Ok(count),
            _ => Err(self.error("a count is larger than the bytes that follow")),
        }
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], FormatError> {
        let count = self.count(1)?;
        self.take(count)
    }

    /// The next column as fields of its own.
    pub(super) fn column(&mut self) -> Result<Self, FormatError> {
        self.bytes().map(Self::new)
    }

    pub(super) fn end(&self) -> Result<(), FormatError> {
        if self.left() == 0 { Ok(()) } else { Err(self.error("bytes follow after the end")) }
    }
}

/// Version of all records of a manifest.
pub(super) const VERSION: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_round_trip(unsigned: u64, signed: i64) {
            let mut bytes = Vec::new();
            put_number(&mut bytes, unsigned);
            put_signed(&mut bytes, signed);
            let mut fields = Fields::new(&bytes);
            prop_assert_eq!(fields.number(), Ok(unsigned));
            prop_assert_eq!(fields.signed(), Ok(signed));
            prop_assert_eq!(fields.end(), Ok(()));
        }
    }

    #[test]
    fn other_forms_of_numbers_are_refused() {
        for bytes in
            [&[0x80][..], &[0x80, 0x00], &[0xff; 10], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]]
        {
            assert!(Fields::new(bytes).number().is_err(), "{bytes:?}");
        }
        assert!(Fields::new(&[5, 1, 2]).bytes().is_err());
    }
}
