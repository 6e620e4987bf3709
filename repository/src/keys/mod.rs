//! The keys of a dedup domain, and the slots that hold them wrapped under a passphrase or a key file.

mod opening;
mod session;
mod slot;
mod slots;

use thiserror::Error;
use zeroize::Zeroizing;

pub(crate) use opening::Slots;
pub(crate) use session::{SessionKeys, session_key_object};
pub(crate) use slot::{KEYS_PREFIX, MAX_SLOT_BYTES, Slot};
pub use slot::{Role, SlotError, SlotKind};
pub use slots::{KeySlot, KeySlotsError};

use crate::crypto::{CryptoError, SecretKey};

/// What opens a repository.
#[derive(Clone)]
pub enum Secret {
    /// Words that a person knows; stretched by Argon2id.
    Passphrase(Zeroizing<String>),
    /// 32 random bytes.
    KeyFile(SecretKey),
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Passphrase(_) => "Passphrase(..)",
            Self::KeyFile(_) => "KeyFile(..)",
        })
    }
}

impl Secret {
    /// A passphrase; must not be empty (see [`SecretError`] at use).
    pub fn passphrase(words: String) -> Self {
        Self::Passphrase(Zeroizing::new(words))
    }

    /// The content of a key file.
    pub fn key_file(key: [u8; 32]) -> Self {
        Self::KeyFile(SecretKey::new(key))
    }

    pub(crate) fn check(&self) -> Result<(), SecretError> {
        match self {
            Self::Passphrase(words) if words.is_empty() => Err(SecretError::Empty),
            _ => Ok(()),
        }
    }
}

/// A secret that cannot protect anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SecretError {
    /// No words.
    #[error("the passphrase is empty")]
    Empty,
}

/// The keys of a dedup domain, as far as the opened slot holds them.
#[derive(Debug, Clone)]
pub(crate) struct DomainKeys {
    /// Names chunks.
    pub(crate) id: SecretKey,
    /// Seeds the chunker.
    pub(crate) chunker: SecretKey,
    /// Opens pack directories and commits.
    pub(crate) structure: SecretKey,
    /// Opens manifests: names, sizes, times.
    pub(crate) manifest: SecretKey,
    /// Session data keys are sealed to it.
    pub(crate) public: [u8; 32],
    /// Opens session data keys; a writer's slot lacks it.
    pub(crate) private: Option<SecretKey>,
}

impl DomainKeys {
    pub(crate) fn random() -> Self {
        let (private, public) = crate::crypto::key_pair();
        Self {
            id: SecretKey::random(),
            chunker: SecretKey::random(),
            structure: SecretKey::random(),
            manifest: SecretKey::random(),
            public,
            private: Some(private),
        }
    }

    /// The same keys without the one that reads data: a writer's.
    pub(crate) fn writer(&self) -> Self {
        Self { private: None, ..self.clone() }
    }

    /// The form that is sealed in a slot: 161 bytes, 193 with the private key. Wiped when dropped.
    pub(crate) fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(193));
        for key in [&self.id, &self.chunker, &self.structure, &self.manifest] {
            bytes.extend_from_slice(key.bytes());
        }
        bytes.extend_from_slice(&self.public);
        bytes.push(u8::from(self.private.is_some()));
        if let Some(private) = &self.private {
            bytes.extend_from_slice(private.bytes());
        }
        bytes
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, crate::wire::WireError> {
        let mut fields = crate::wire::Fields::new(bytes);
        let keys = Self {
            id: SecretKey::new(fields.array()?),
            chunker: SecretKey::new(fields.array()?),
            structure: SecretKey::new(fields.array()?),
            manifest: SecretKey::new(fields.array()?),
            public: fields.array()?,
            private: match fields.u8()? {
                0 => None,
                1 => Some(SecretKey::new(fields.array()?)),
                _ => return Err(fields.error("unknown role")),
            },
        };
        fields.end()?;
        Ok(keys)
    }
}

/// A key object that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyObjectError {
    /// The bytes are not of the format.
    #[error("the key object is damaged: {0}")]
    Damaged(#[from] crate::wire::WireError),
    /// Its keys do not open.
    #[error("the key object does not open: {0}")]
    Crypto(#[from] CryptoError),
}
