//! Fills a pack with frames and closes it.

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::directory::{Directory, SlotEntry};
use super::frame::{Expected, SealedFrame};
use super::layout::{self, DirectorySpan, HEADER_BYTES, PackKind, TARGET_PACK_BYTES};
use crate::crypto::{Cipher, CryptoError};
use crate::id::{ChunkId, PackId, SessionId};
use crate::store::Payload;

/// A directory slot has a 16-bit number.
const MAX_SLOTS: usize = 1 << 16;

/// A slot names its origin by 16 bits as well; fewer keep directories small.
const MAX_ORIGINS: usize = 4096;

/// A pack that takes frames.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    pub(crate) id: PackId,
    frames: Vec<Bytes>,
    /// Bytes of header and frames.
    len: usize,
    slots: Vec<SlotEntry>,
    /// Whose keys sealed the frames: this session's, and those that copied frames come from.
    origins: Vec<SessionId>,
    kind: PackKind,
}

/// A closed pack.
#[derive(Debug)]
pub(crate) struct SealedPack {
    pub(crate) id: PackId,
    pub(crate) payload: Payload,
    pub(crate) directory: Directory,
}

impl SealedPack {
    /// What the index must know: id, slot and plain length of each chunk.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (ChunkId, u16, u32)> + '_ {
        (0..=u16::MAX)
            .zip(&self.directory.slots)
            .map(|(number, slot)| (slot.expected.id, number, slot.expected.plain_len))
    }
}

impl PackBuilder {
    pub(crate) fn new(id: PackId, kind: PackKind) -> Self {
        Self { id, frames: Vec::new(), len: HEADER_BYTES, slots: Vec::new(), origins: vec![id.session], kind }
    }

    /// Appends a frame and returns its slot.
    pub(crate) fn push(&mut self, frame: SealedFrame) -> u16 {
        let expected = Expected {
            id: frame.id,
            kind: frame.kind,
            codec: frame.codec,
            plain_len: frame.plain_len,
            counter: frame.counter,
        };
        self.append(expected, frame.bytes, 0)
    }

    /// Appends a frame as it lies in another pack, sealed under keys of the session `origin`.
    pub(crate) fn push_copy(&mut self, expected: Expected, frame: Bytes, origin: SessionId) -> u16 {
        let known = self.origins.iter().position(|known| *known == origin);
        let number = known.unwrap_or_else(|| {
            self.origins.push(origin);
            self.origins.len() - 1
        });
        // Each origin has a slot at least, and there are fewer than 2^16 before the last.
        self.append(expected, frame, u16::try_from(number).unwrap_or(u16::MAX))
    }

    fn append(&mut self, expected: Expected, frame: Bytes, origin: u16) -> u16 {
        // A pack is closed before it has too many slots or bytes, so both fit.
        let slot = u16::try_from(self.slots.len()).unwrap_or(u16::MAX);
        let fits = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        self.slots.push(SlotEntry { expected, offset: fits(self.len), len: fits(frame.len()), origin });
        self.len += frame.len();
        self.frames.push(frame);
        slot
    }

    pub(crate) fn kind(&self) -> PackKind {
        self.kind
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether the pack should be closed before it takes more.
    pub(crate) fn is_full(&self) -> bool {
        self.len >= TARGET_PACK_BYTES || self.slots.len() >= MAX_SLOTS || self.origins.len() >= MAX_ORIGINS
    }

    /// Closes the pack: padding, directory, trailer.
    pub(crate) fn seal(self, structure: &Cipher) -> Result<SealedPack, CryptoError> {
        let directory = Directory::new(self.origins, self.slots);
        let sealed = directory.seal(self.id, structure)?;
        let pad = layout::padding(self.len + sealed.len() + layout::TRAILER_BYTES);
        let mut checksum = Xxh3::new();
        let mut payload = Payload::default();
        let mut push = |piece: Bytes| {
            checksum.update(&piece);
            payload.push(piece);
        };
        push(Bytes::copy_from_slice(&layout::header(self.id, self.kind)));
        self.frames.into_iter().for_each(&mut push);
        push(Bytes::from(vec![0; pad]));
        let number = |n: usize| u32::try_from(n).map_err(|_| CryptoError::Seal);
        let span = DirectorySpan {
            offset: number(self.len + pad)?,
            len: number(sealed.len())?,
            slots: number(directory.slots.len())?,
        };
        push(sealed.into());
        push(Bytes::copy_from_slice(&layout::trailer_head(span)));
        payload.push(Bytes::copy_from_slice(&layout::trailer_tail(&checksum)));
        Ok(SealedPack { id: self.id, payload, directory })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::SecretKey;
    use crate::pack::frame::{open_frame, seal_frame};
    use crate::sink::ChunkKind;

    fn id_of(plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::hash(plain).as_bytes())
    }

    fn pack_of(chunks: &[&[u8]], data: &Cipher, structure: &Cipher) -> SealedPack {
        let mut builder = PackBuilder::new(PackId { session: SessionId::random(), seq: 5 }, PackKind::Data);
        for (counter, plain) in (0..).zip(chunks) {
            let frame =
                seal_frame(data, counter, ChunkKind::Data, id_of(plain), Bytes::copy_from_slice(plain), Some(1))
                    .unwrap();
            assert_eq!(u32::from(builder.push(frame)), counter);
        }
        builder.seal(structure).unwrap()
    }

    #[test]
    fn a_pack_gives_back_what_it_took_and_every_changed_byte_is_found() {
        let (data, structure) =
            (Cipher::new(&SecretKey::random()).unwrap(), Cipher::new(&SecretKey::random()).unwrap());
        let pack = pack_of(&[b"one", b"", &[7; 3000]], &data, &structure);
        let bytes = pack.payload.to_bytes();
        assert_eq!(bytes.len() % 512, 0);
        layout::verify_checksum(&bytes).unwrap();
        assert_eq!(layout::parse_header(&bytes), Ok(pack.id));
        let span = DirectorySpan::parse(&bytes).unwrap();
        let sealed = &bytes[span.offset as usize..][..span.len as usize];
        let directory = Directory::open(pack.id, span, sealed, &structure).unwrap();
        let (slot, entry) = directory.find(&id_of(b"one")).unwrap();
        assert_eq!(slot, 0);
        let frame = &bytes[entry.offset as usize..][..entry.len as usize];
        assert_eq!(open_frame(&data, &entry.expected, frame, id_of).unwrap(), b"one");
        assert!(directory.find(&id_of(b"two")).is_none());
        for at in 0..bytes.len() {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1;
            assert!(layout::verify_checksum(&changed).is_err(), "byte {at}");
        }
        let other = PackId { seq: 6, ..pack.id };
        assert!(Directory::open(other, span, sealed, &structure).is_err());
        for cut in 0..bytes.len() {
            assert!(layout::verify_checksum(&bytes[..cut]).is_err());
        }
    }
}
