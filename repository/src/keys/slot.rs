//! Key slots: `keys/<random>`, each the domain's keys sealed under one secret.

use thiserror::Error;

use super::{DomainKeys, KeyObjectError, Secret};
use crate::crypto::{Cipher, Cost, CryptoError, Purpose, SecretKey, TAG_BYTES};
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

/// Where slots lie.
pub(crate) const KEYS_PREFIX: &str = "keys/";
/// No slot is larger.
pub(crate) const MAX_SLOT_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"LBKEYS01";
const KIND_PASSPHRASE: u8 = 1;
const KIND_KEY_FILE: u8 = 2;
/// Plain bytes of a writer's keys, and of all keys.
const WRITER_BYTES: usize = 5 * 32 + 1;
const FULL_BYTES: usize = WRITER_BYTES + 32;
/// Derives the sealing key from a key file's bytes and the slot's salt.
const KEY_FILE_CONTEXT: &str = "lifeboat 2026 repository key file slot v1";

/// Why a secret does not open a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SlotError {
    /// Another secret is needed.
    #[error("the secret does not open this slot")]
    WrongSecret,
    /// The slot is damaged.
    #[error(transparent)]
    Object(#[from] KeyObjectError),
}

impl From<WireError> for SlotError {
    fn from(error: WireError) -> Self {
        Self::Object(error.into())
    }
}

/// What opens a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// Words that a person knows.
    Passphrase,
    /// A file of 32 random bytes.
    KeyFile,
}

/// What the keys in a slot are good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Full,
    /// Writing, deduplicating, listing and checking, but no data.
    Writer,
}

/// A slot as it is stored.
#[derive(Debug)]
pub(crate) struct Slot {
    kind: u8,
    cost: Cost,
    salt: [u8; 32],
    config_hash: [u8; 32],
    sealed: Vec<u8>,
}

impl Slot {
    /// Seals the keys under the secret, bound to the config with this hash.
    pub(crate) fn seal(keys: &DomainKeys, secret: &Secret, config_hash: [u8; 32]) -> Result<Self, CryptoError> {
        let (kind, cost) = match secret {
            Secret::Passphrase(_) => (KIND_PASSPHRASE, Cost::DEFAULT),
            Secret::KeyFile(_) => (KIND_KEY_FILE, Cost { memory_kib: 0, passes: 0, lanes: 0 }),
        };
        let mut slot = Self { kind, cost, salt: rand::random(), config_hash, sealed: Vec::new() };
        let mut sealed = keys.to_bytes().to_vec();
        // The salt is fresh, so the sealing key is, and the counter may be constant.
        Cipher::new(&slot.sealing_key(secret)?)?.seal(Purpose::Key, 0, &slot.head(), &mut sealed)?;
        slot.sealed = sealed;
        Ok(slot)
    }

    fn sealing_key(&self, secret: &Secret) -> Result<SecretKey, CryptoError> {
        match secret {
            Secret::Passphrase(words) => self.cost.derive(words.as_bytes(), &self.salt),
            Secret::KeyFile(key) => {
                let mut hasher = blake3::Hasher::new_derive_key(KEY_FILE_CONTEXT);
                hasher.update(key.bytes()).update(&self.salt);
                Ok(SecretKey::new(hasher.finalize().into()))
            }
        }
    }

    /// All before the sealed part; authenticated with it.
    fn head(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(self.kind);
        for number in [self.cost.memory_kib, self.cost.passes, self.cost.lanes] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.salt);
        bytes.extend_from_slice(&self.config_hash);
        bytes
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.head();
        bytes.extend_from_slice(&self.sealed);
        seal_hash(&mut bytes);
        bytes
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(unseal_hash(bytes)?);
        fields.expect(MAGIC, "no key slot of a known version")?;
        let kind = fields.u8()?;
        let cost = Cost { memory_kib: fields.u32()?, passes: fields.u32()?, lanes: fields.u32()? };
        let (salt, config_hash) = (fields.array()?, fields.array()?);
        let sealed = fields.take(fields.left())?.to_vec();
        Ok(Self { kind, cost, salt, config_hash, sealed })
    }

    /// Whether the slot belongs to the config with this hash.
    pub(crate) fn belongs_to(&self, config_hash: &[u8; 32]) -> bool {
        self.config_hash == *config_hash
    }

    /// What opens it; `None` for kinds of a later version.
    pub(crate) fn kind(&self) -> Option<SlotKind> {
        match self.kind {
            KIND_PASSPHRASE => Some(SlotKind::Passphrase),
            KIND_KEY_FILE => Some(SlotKind::KeyFile),
            _ => None,
        }
    }

    /// What its keys are good for, by their number; `None`: it holds something else.
    pub(crate) fn role(&self) -> Option<Role> {
        match self.sealed.len().checked_sub(TAG_BYTES)? {
            WRITER_BYTES => Some(Role::Writer),
            FULL_BYTES => Some(Role::Full),
            _ => None,
        }
    }

    /// Opens the slot. Slow for passphrases: Argon2id.
    pub(crate) fn open(&self, secret: &Secret) -> Result<DomainKeys, SlotError> {
        let fits = matches!(
            (secret, self.kind),
            (Secret::Passphrase(_), KIND_PASSPHRASE) | (Secret::KeyFile(_), KIND_KEY_FILE)
        );
        if !fits {
            return Err(SlotError::WrongSecret);
        }
        let key = self.sealing_key(secret).map_err(KeyObjectError::from)?;
        let cipher = Cipher::new(&key).map_err(KeyObjectError::from)?;
        let mut sealed = zeroize::Zeroizing::new(self.sealed.clone());
        let plain = cipher.open(Purpose::Key, 0, &self.head(), &mut sealed).map_err(|_| SlotError::WrongSecret)?;
        Ok(DomainKeys::parse(plain)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_opens_with_its_secret_only() {
        let keys = DomainKeys::random();
        let secret = Secret::key_file([1; 32]);
        let bytes = Slot::seal(&keys, &secret, [9; 32]).unwrap().to_bytes();
        let slot = Slot::parse(&bytes).unwrap();
        assert!(slot.belongs_to(&[9; 32]));
        let opened = slot.open(&secret).unwrap();
        assert!(opened.id == keys.id && opened.private == keys.private && opened.public == keys.public);
        assert_eq!((slot.kind(), slot.role()), (Some(SlotKind::KeyFile), Some(Role::Full)));
        assert_eq!(slot.open(&Secret::key_file([2; 32])).unwrap_err(), SlotError::WrongSecret);
        assert_eq!(slot.open(&Secret::passphrase("x".into())).unwrap_err(), SlotError::WrongSecret);
        for cut in 0..bytes.len() {
            assert!(Slot::parse(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn a_passphrase_works_and_a_writer_has_no_private_key() {
        let keys = DomainKeys::random().writer();
        let secret = Secret::passphrase("correct horse".into());
        let slot = Slot::parse(&Slot::seal(&keys, &secret, [0; 32]).unwrap().to_bytes()).unwrap();
        assert!(slot.open(&secret).unwrap().private.is_none());
        assert_eq!((slot.kind(), slot.role()), (Some(SlotKind::Passphrase), Some(Role::Writer)));
        assert_eq!(slot.open(&Secret::passphrase("battery".into())).unwrap_err(), SlotError::WrongSecret);
    }
}
