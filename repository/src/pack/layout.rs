//! Where things lie in a pack: header, frames, padding, sealed directory, trailer.

use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::id::{PackId, SessionId};
use crate::wire::{Fields, WireError};

/// A pack is closed when it reaches this size.
pub(crate) const TARGET_PACK_BYTES: usize = 32 << 20;
/// No pack is larger.
pub(crate) const MAX_PACK_BYTES: u64 = 64 << 20;
/// Size of the header.
pub(crate) const HEADER_BYTES: usize = 64;
/// Size of the trailer.
pub(crate) const TRAILER_BYTES: usize = 64;
/// Bytes of the trailer that the checksum covers: everything before the checksum.
const COVERED_TRAILER_BYTES: usize = 16;
/// Size of the checksum: XXH3 with 128 bits.
///
/// It finds what disks and networks do to bytes, without a key. Who changes bytes on purpose can change it as well, as
/// any checksum without a key: against them stand the frames and the directory, which are sealed.
const CHECKSUM_BYTES: usize = 16;

const HEADER_MAGIC: &[u8; 8] = b"LBPACK01";
const TRAILER_MAGIC: &[u8; 8] = b"LBPEND01";

/// Data and metadata lie in separate packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum PackKind {
    Data = 0,
    Metadata = 1,
}

/// Where packs lie.
pub(crate) const PACKS_PREFIX: &str = "p/";

/// Key of a pack's object.
pub(crate) fn pack_key(pack: PackId) -> String {
    format!("{PACKS_PREFIX}{}/{:08x}", pack.session, pack.seq)
}

/// The pack of a key.
pub(crate) fn parse_pack_key(key: &str) -> Option<PackId> {
    let (session, seq) = key.strip_prefix(PACKS_PREFIX)?.split_once('/')?;
    let pack = PackId { session: session.parse().ok()?, seq: u32::from_str_radix(seq, 16).ok()? };
    (pack_key(pack) == key).then_some(pack)
}

/// The first bytes of a pack.
pub(crate) fn header(pack: PackId, kind: PackKind) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(HEADER_MAGIC);
    bytes[8..10].copy_from_slice(&crate::config::SUITE.to_le_bytes());
    bytes[10] = kind as u8;
    // Bytes 12..16: the dedup domain; only domain 0 exists.
    bytes[16..32].copy_from_slice(&pack.session.0);
    bytes[32..36].copy_from_slice(&pack.seq.to_le_bytes());
    bytes
}

/// Reads the header of a whole pack.
pub(crate) fn parse_header(bytes: &[u8]) -> Result<PackId, WireError> {
    let mut fields = Fields::new(bytes);
    fields.expect(HEADER_MAGIC, "no pack of a known version")?;
    fields.expect(&crate::config::SUITE.to_le_bytes(), "unknown suite")?;
    if fields.u8()? > PackKind::Metadata as u8 {
        return Err(fields.error("unknown kind of pack"));
    }
    fields.expect(&[0; 5], "unknown dedup domain")?;
    let session = SessionId(fields.array()?);
    Ok(PackId { session, seq: fields.u32()? })
}

/// Where the directory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectorySpan {
    /// Offset in the pack.
    pub(crate) offset: u32,
    /// Sealed bytes.
    pub(crate) len: u32,
    /// Number of slots.
    pub(crate) slots: u32,
}

/// The trailer's first part, which the checksum covers.
pub(crate) fn trailer_head(span: DirectorySpan) -> [u8; COVERED_TRAILER_BYTES] {
    let mut bytes = [0; COVERED_TRAILER_BYTES];
    for (field, number) in
        bytes.chunks_exact_mut(4).zip([span.offset, span.len, span.slots, crate::config::FORMAT_VERSION])
    {
        field.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// The trailer's second part.
pub(crate) fn trailer_tail(covered: &Xxh3) -> [u8; TRAILER_BYTES - COVERED_TRAILER_BYTES] {
    let mut bytes = [0; TRAILER_BYTES - COVERED_TRAILER_BYTES];
    bytes[..CHECKSUM_BYTES].copy_from_slice(&covered.digest128().to_le_bytes());
    bytes[40..].copy_from_slice(TRAILER_MAGIC);
    bytes
}

impl DirectorySpan {
    /// Reads it from the last bytes of a pack, at least [`TRAILER_BYTES`] of them.
    pub(crate) fn parse(tail: &[u8]) -> Result<Self, WireError> {
        let Some(trailer) = tail.last_chunk::<TRAILER_BYTES>() else {
            return Err(WireError { what: "the pack is too short for a trailer", at: tail.len() });
        };
        let mut fields = Fields::new(trailer);
        let span = Self { offset: fields.u32()?, len: fields.u32()?, slots: fields.u32()? };
        fields.expect(&crate::config::FORMAT_VERSION.to_le_bytes(), "unknown version of the trailer")?;
        fields.take(CHECKSUM_BYTES)?;
        fields.expect(&[0; 24], "reserved bytes of the trailer are not zero")?;
        fields.expect(TRAILER_MAGIC, "the pack does not end like one: truncated")?;
        if u64::from(span.offset) + u64::from(span.len) > MAX_PACK_BYTES || span.slots > u32::from(u16::MAX) + 1 {
            return Err(fields.error("the trailer names a directory outside of the pack"));
        }
        Ok(span)
    }
}

/// Compares the trailer's checksum with all bytes before it. No key is needed.
pub(crate) fn verify_checksum(pack: &[u8]) -> Result<(), WireError> {
    DirectorySpan::parse(pack)?;
    let at = pack.len() - (TRAILER_BYTES - COVERED_TRAILER_BYTES);
    if xxh3_128(&pack[..at]).to_le_bytes() == pack[at..at + CHECKSUM_BYTES] {
        Ok(())
    } else {
        Err(WireError { what: "the pack's checksum does not fit its bytes", at })
    }
}

/// Bytes of padding so that the size tells little: to 1/32 of the size's power of two, from 512 B to 64 KiB.
pub(crate) fn padding(size: usize) -> usize {
    let unit = (size.next_power_of_two() / 32).clamp(512, 64 << 10);
    size.next_multiple_of(unit) - size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_headers_name_the_pack() {
        let id = PackId { session: SessionId::random(), seq: 0xab };
        assert_eq!(pack_key(id), format!("p/{}/000000ab", id.session));
        assert_eq!(parse_pack_key(&pack_key(id)), Some(id));
        assert_eq!(parse_pack_key("p/ab/0"), None);
        assert_eq!(parse_pack_key(&format!("p/{}/ab", id.session)), None);
        assert_eq!(parse_header(&header(id, PackKind::Metadata)), Ok(id));
    }

    #[test]
    fn padding_hides_at_most_a_sixteenth() {
        for size in [1, 511, 512, 5000, 1 << 20, (32 << 20) + 1] {
            let padded = size + padding(size);
            assert_eq!(padded % 512, 0);
            assert!(padding(size) <= (size / 16).max(512), "{size}");
            assert!(padding(size) < 64 << 10);
        }
    }
}
