//! The names of things: chunks, sessions, snapshots, packs, and where a chunk lies.
//!
//! Plain values with a text form (lower-case hexadecimal); nothing here reads or writes a store.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// A text that is not the hexadecimal form of the identifier that was expected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("expected {expected} hexadecimal digits, found {found:?}")]
pub struct ParseIdError {
    /// Number of digits of the identifier.
    pub expected: usize,
    /// The text, cut to a length that can be shown.
    pub found: String,
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseIdError> {
    let refuse = || ParseIdError { expected: N * 2, found: text.chars().take(80).collect() };
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return Err(refuse());
    }
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = nibble(pair[0]).ok_or_else(refuse)?;
        let low = nibble(pair[1]).ok_or_else(refuse)?;
        *byte = high << 4 | low;
    }
    Ok(bytes)
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $size:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $size]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse_hex(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

identifier! {
    /// Keyed BLAKE3 of a chunk's plain bytes, under the id key of the dedup domain.
    ChunkId, 32
}
identifier! {
    /// A writer's session: random, never used twice.
    SessionId, 16
}
identifier! {
    /// A snapshot: random; people may write any unique prefix of four digits or more.
    SnapshotId, 16
}
identifier! {
    /// A repository: random, made by `init`.
    RepositoryId, 16
}

impl SessionId {
    /// A fresh random session id.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl SnapshotId {
    /// A fresh random snapshot id.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl RepositoryId {
    /// A fresh random repository id.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// A pack: the session that wrote it, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PackId {
    /// The session that wrote the pack.
    pub session: SessionId,
    /// Number of the pack in its session, from 0.
    pub seq: u32,
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.session, self.seq)
    }
}

/// Where a chunk lies.
///
/// A hint, verified at use: the directory slot must hold the chunk's id; otherwise the index is asked
/// (the pack was repacked since).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The pack that holds the chunk.
    pub pack: PackId,
    /// The slot in the pack's directory.
    pub slot: u16,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pack, self.slot)
    }
}

/// A reference to a stored chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChunkRef {
    /// Name and checksum of the plain bytes.
    pub id: ChunkId,
    /// Number of plain bytes.
    pub len: u32,
    /// Where it lay when the reference was made.
    pub place: Place,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_form_round_trips(bytes: [u8; 32]) {
            let id = ChunkId(bytes);
            prop_assert_eq!(id.to_string().parse::<ChunkId>(), Ok(id));
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(serde_json::from_str::<ChunkId>(&json).unwrap(), id);
        }
    }

    #[test]
    fn wrong_texts_are_refused() {
        for text in ["", "00", "0", &"g".repeat(32), &"A".repeat(32), &"é".repeat(16), &"0".repeat(33)] {
            assert!(text.parse::<SessionId>().is_err(), "{text:?}");
        }
    }
}
