//! Reading and writing the fixed-width little-endian fields of the binary formats.
//!
//! Reading never panics and never allocates by a number that the bytes claim.

use thiserror::Error;

/// Bytes that are not what the format says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{what} at byte {at}")]
pub struct WireError {
    /// What does not fit.
    pub what: &'static str,
    /// Offset in the bytes.
    pub at: usize,
}

/// Takes fields off the front of a byte slice.
#[derive(Debug, Clone)]
pub(crate) struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn error(&self, what: &'static str) -> WireError {
        WireError { what, at: self.at }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest.get(..count).ok_or_else(|| self.error("the bytes end too early"))?;
        self.at += count;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// The bytes must be exactly these: a magic number or a version.
    pub(crate) fn expect(&mut self, bytes: &[u8], what: &'static str) -> Result<(), WireError> {
        let at = self.at;
        if self.take(bytes.len()) == Ok(bytes) { Ok(()) } else { Err(WireError { what, at }) }
    }

    /// A count of items of `size` bytes each, all of which must still be there.
    pub(crate) fn count(&mut self, size: usize) -> Result<usize, WireError> {
        let count = self.u32()? as usize;
        match count.checked_mul(size) {
            Some(bytes) if bytes <= self.left() => Ok(count),
            _ => Err(self.error("a count is larger than the bytes that follow")),
        }
    }

    pub(crate) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(crate) fn end(&self) -> Result<(), WireError> {
        if self.left() == 0 { Ok(()) } else { Err(self.error("bytes follow after the end")) }
    }
}

/// Splits off the BLAKE3 hash at the end and compares it with the bytes before.
pub(crate) fn unseal_hash(bytes: &[u8]) -> Result<&[u8], WireError> {
    let Some((body, hash)) = bytes.split_last_chunk::<32>() else {
        return Err(WireError { what: "the object is too short for a hash", at: bytes.len() });
    };
    if blake3::hash(body).as_bytes() == hash {
        Ok(body)
    } else {
        Err(WireError { what: "the hash does not fit the bytes", at: body.len() })
    }
}

/// Appends the BLAKE3 hash of all bytes so far.
pub(crate) fn seal_hash(bytes: &mut Vec<u8>) {
    let hash = blake3::hash(bytes);
    bytes.extend_from_slice(hash.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_end_where_the_bytes_do() {
        let mut fields = Fields::new(&[1, 2, 0, 9]);
        assert_eq!(fields.u8(), Ok(1));
        assert_eq!(fields.u16(), Ok(2));
        assert!(fields.end().is_err());
        assert_eq!(fields.u32(), Err(WireError { what: "the bytes end too early", at: 3 }));
    }

    #[test]
    fn absurd_counts_are_refused_before_allocation() {
        assert!(Fields::new(&[255, 255, 255, 255, 0, 0]).count(52).is_err());
        assert_eq!(Fields::new(&[1, 0, 0, 0, 7]).count(1), Ok(1));
    }

    #[test]
    fn a_changed_byte_breaks_the_hash() {
        let mut bytes = b"abc".to_vec();
        seal_hash(&mut bytes);
        assert_eq!(unseal_hash(&bytes), Ok(&b"abc"[..]));
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(unseal_hash(&changed).is_err(), "byte {at}");
        }
        assert!(unseal_hash(&bytes[..20]).is_err());
    }
}
