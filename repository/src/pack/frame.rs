//! Frames: one chunk, compressed and sealed.

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use super::squeeze;
use crate::crypto::{Cipher, CryptoError, Purpose, TAG_BYTES};
use crate::id::ChunkId;
use crate::sink::{ChunkKind, MAX_CHUNK_BYTES};

/// How the plain bytes were packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Codec {
    Raw = 0,
    Zstd = 1,
}

impl Codec {
    pub(crate) fn parse(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A chunk kind's number in frames and directories.
pub(crate) fn kind_number(kind: ChunkKind) -> u8 {
    match kind {
        ChunkKind::Data => 1,
        ChunkKind::Bundle => 2,
        ChunkKind::Manifest => 3,
        ChunkKind::Record => 4,
    }
}

/// The chunk kind of a number.
pub(crate) fn parse_kind(number: u8) -> Option<ChunkKind> {
    match number {
        1 => Some(ChunkKind::Data),
        2 => Some(ChunkKind::Bundle),
        3 => Some(ChunkKind::Manifest),
        4 => Some(ChunkKind::Record),
        _ => None,
    }
}

/// A sealed chunk, ready for a pack.
#[derive(Debug)]
pub(crate) struct SealedFrame {
    pub(crate) id: ChunkId,
    pub(crate) kind: ChunkKind,
    pub(crate) codec: Codec,
    pub(crate) plain_len: u32,
    pub(crate) counter: u32,
    /// Ciphertext and tag.
    pub(crate) bytes: Bytes,
}

/// A frame that cannot be opened or made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{}", self.what())]
pub(crate) enum FrameError {
    Decrypt,
    Decompress,
    Length,
    Id,
    Seal,
}

impl FrameError {
    /// What does not fit, in words.
    pub(crate) fn what(self) -> &'static str {
        match self {
            Self::Decrypt => "it does not decrypt: changed, or swapped with another",
            Self::Decompress => "it does not decompress",
            Self::Length => "its length is not the one recorded",
            Self::Id => "its content has another id",
            Self::Seal => "it cannot be sealed",
        }
    }
}

fn aad(id: ChunkId, plain_len: u32, kind: ChunkKind) -> [u8; 37] {
    let mut aad = [0; 37];
    aad[..32].copy_from_slice(&id.0);
    aad[32..36].copy_from_slice(&plain_len.to_le_bytes());
    aad[36] = kind_number(kind);
    aad
}

/// A gain below this share is not worth the time that decompression takes: 3%.
pub(super) fn is_worth_it(compressed: usize, plain: usize) -> bool {
    compressed < plain - plain / 32
}

/// Bytes behind a chunk that make a copy of it unnecessary when it is sealed as it is.
pub(crate) const FRAME_ROOM: usize = TAG_BYTES;

/// Compresses if it pays, then seals. `counter` must be new under the cipher's key. Without a level it is not tried.
///
/// A chunk that is not compressed is sealed where it lies if nobody else refers to it.
pub(crate) fn seal_frame(
    cipher: &Cipher,
    counter: u32,
    kind: ChunkKind,
    id: ChunkId,
    plain: Bytes,
    level: Option<i32>,
) -> Result<SealedFrame, FrameError> {
    let plain_len = u32::try_from(plain.len()).map_err(|_| FrameError::Length)?;
    let compressed = match level {
        None => None,
        Some(level) => squeeze::compress(&plain, level, |compressed| {
            is_worth_it(compressed.len(), plain.len()).then(|| copy_of(compressed))
        })
        .map_err(|_| FrameError::Seal)?,
    };
    let (codec, mut bytes) = match compressed {
        Some(compressed) => (Codec::Zstd, compressed),
        None => (Codec::Raw, owned(plain)),
    };
    cipher
        .seal(Purpose::Frame, u64::from(counter), &aad(id, plain_len, kind), &mut bytes)
        .map_err(|_: CryptoError| FrameError::Seal)?;
    Ok(SealedFrame { id, kind, codec, plain_len, counter, bytes: bytes.freeze() })
}

/// As many bytes as will be kept: a frame waits in its pack until that is uploaded.
fn copy_of(bytes: &[u8]) -> BytesMut {
    let mut copy = BytesMut::with_capacity(bytes.len() + FRAME_ROOM);
    copy.extend_from_slice(bytes);
    copy
}

/// The bytes themselves, if nobody else has them, they have room for the tag, and hold no more memory than a copy would.
fn owned(bytes: Bytes) -> BytesMut {
    match bytes.try_into_mut() {
        Ok(bytes) if (FRAME_ROOM..=FRAME_ROOM + bytes.len() / 16).contains(&(bytes.capacity() - bytes.len())) => bytes,
        Ok(bytes) => copy_of(&bytes),
        Err(bytes) => copy_of(&bytes),
    }
}

/// What a frame must be, by the directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    pub(crate) id: ChunkId,
    pub(crate) kind: ChunkKind,
    pub(crate) codec: Codec,
    pub(crate) plain_len: u32,
    pub(crate) counter: u32,
}

/// Opens a frame and verifies its id with `id_of`.
pub(crate) fn open_frame(
    cipher: &Cipher,
    expected: &Expected,
    frame: &[u8],
    id_of: impl Fn(&[u8]) -> ChunkId,
) -> Result<Vec<u8>, FrameError> {
    let plain_len = expected.plain_len as usize;
    if plain_len > MAX_CHUNK_BYTES {
        return Err(FrameError::Length);
    }
    let mut sealed = frame.to_vec();
    let aad = aad(expected.id, expected.plain_len, expected.kind);
    let opened = cipher
        .open(Purpose::Frame, u64::from(expected.counter), &aad, &mut sealed)
        .map_err(|_| FrameError::Decrypt)?
        .len();
    sealed.truncate(opened);
    let plain = match expected.codec {
        Codec::Raw => sealed,
        Codec::Zstd => squeeze::decompress(&sealed, plain_len).map_err(|_| FrameError::Decompress)?,
    };
    if plain.len() != plain_len {
        return Err(FrameError::Length);
    }
    if id_of(&plain) == expected.id { Ok(plain) } else { Err(FrameError::Id) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::SecretKey;

    fn id_of(plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::hash(plain).as_bytes())
    }

    #[test]
    fn frames_round_trip_and_every_change_is_found() {
        let cipher = Cipher::new(&SecretKey::random()).unwrap();
        let noise: Vec<u8> = (0..1000).map(|_| rand::random()).collect();
        for plain in [&b""[..], &[0; 5000], &noise] {
            let frame =
                seal_frame(&cipher, 3, ChunkKind::Data, id_of(plain), Bytes::copy_from_slice(plain), Some(1)).unwrap();
            let expected = Expected {
                id: frame.id,
                kind: frame.kind,
                codec: frame.codec,
                plain_len: frame.plain_len,
                counter: frame.counter,
            };
            assert_eq!(open_frame(&cipher, &expected, &frame.bytes, id_of).unwrap(), plain);
            for at in 0..frame.bytes.len() {
                let mut changed = frame.bytes.to_vec();
                changed[at] ^= 0x10;
                assert!(open_frame(&cipher, &expected, &changed, id_of).is_err());
            }
            let swapped = Expected { kind: ChunkKind::Bundle, ..expected };
            assert_eq!(open_frame(&cipher, &swapped, &frame.bytes, id_of), Err(FrameError::Decrypt));
        }
    }

    #[test]
    fn wrong_content_under_an_id_is_found() {
        let cipher = Cipher::new(&SecretKey::random()).unwrap();
        let frame =
            seal_frame(&cipher, 0, ChunkKind::Data, id_of(b"good"), Bytes::from_static(b"evil"), Some(1)).unwrap();
        let expected = Expected { id: frame.id, kind: frame.kind, codec: frame.codec, plain_len: 4, counter: 0 };
        assert_eq!(open_frame(&cipher, &expected, &frame.bytes, id_of), Err(FrameError::Id));
    }

    #[test]
    fn noise_is_stored_raw() {
        let cipher = Cipher::new(&SecretKey::random()).unwrap();
        let noise: Vec<u8> = (0..4096).map(|_| rand::random()).collect();
        for (plain, codec) in [(noise, Codec::Raw), (vec![0; 4096], Codec::Zstd)] {
            let frame = seal_frame(&cipher, 0, ChunkKind::Data, id_of(&plain), plain.into(), Some(1)).unwrap();
            assert_eq!(frame.codec, codec);
        }
    }

    #[test]
    fn a_chunk_that_is_stored_raw_is_sealed_where_it_lies_unless_others_have_it() {
        let cipher = Cipher::new(&SecretKey::random()).unwrap();
        let noise = |room: usize| {
            let mut noise = Vec::with_capacity(4096 + room);
            noise.extend((0..4096).map(|_| rand::random::<u8>()));
            Bytes::from(noise)
        };
        let seal = |plain: Bytes| seal_frame(&cipher, 0, ChunkKind::Data, id_of(&plain), plain, None).unwrap().bytes;
        let plain = noise(FRAME_ROOM);
        let place = plain.as_ptr();
        assert_eq!(seal(plain).as_ptr(), place);
        let plain = noise(FRAME_ROOM);
        let kept = plain.clone();
        assert_ne!(seal(plain).as_ptr(), kept.as_ptr());
        // More memory than the frame needs is given back.
        let plain = noise(3000);
        assert!(seal(plain).try_into_mut().unwrap().capacity() < 4096 + 1000);
    }
}
