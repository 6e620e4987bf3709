//! Encryption: AES-256-GCM with counted nonces, HPKE for session keys, Argon2id for passphrases.
//!
//! Only calls of `aws-lc-rs`, `hpke`, `argon2` and `blake3`; nothing is invented here.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::allocator;

type Sealing = hpke::aead::AesGcm256;
type Kdf = hpke::kdf::HkdfSha256;
type Exchange = hpke::kem::X25519HkdfSha256;

/// Bytes that AES-256-GCM adds to what it seals.
pub(crate) const TAG_BYTES: usize = 16;
/// Bytes of an encapsulated HPKE key.
pub(crate) const ENCAPSULATED_BYTES: usize = 32;

/// What encryption failed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CryptoError {
    /// The bytes were changed, or the key is another one.
    #[error("the bytes do not open with this key: they were changed, or the key is another one")]
    Open,
    /// Sealing failed, which only happens for more bytes than the cipher takes.
    #[error("the bytes cannot be sealed")]
    Seal,
    /// A public or private key has no valid form.
    #[error("a stored key is malformed")]
    MalformedKey,
    /// Argon2 refuses the stored cost parameters.
    #[error("the cost parameters of the passphrase are out of range")]
    Cost,
}

/// 32 secret bytes; wiped when dropped, never shown.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct SecretKey([u8; 32]);

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

impl SecretKey {
    /// Takes these bytes as a key.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(crate) fn random() -> Self {
        Self(rand::random())
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// What a nonce is for; two purposes never share nonces under one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Purpose {
    /// A chunk's frame; counted over the session.
    Frame = 0,
    /// A pack's directory; the counter is the pack's number.
    Directory = 1,
    /// A session's commit; the counter is 0.
    Commit = 2,
    /// A key sealed under a key that seals nothing else.
    Key = 3,
}

fn nonce(purpose: Purpose, counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&(purpose as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// An AES-256-GCM key, ready for use.
pub(crate) struct Cipher(LessSafeKey);

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

impl Cipher {
    pub(crate) fn new(key: &SecretKey) -> Result<Self, CryptoError> {
        let key = UnboundKey::new(&AES_256_GCM, key.bytes()).map_err(|_| CryptoError::MalformedKey)?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// Encrypts in place and appends the tag. A pair of purpose and counter must be used once under a key.
    pub(crate) fn seal(
        &self,
        purpose: Purpose,
        counter: u64,
        aad: &[u8],
        bytes: &mut (impl AsMut<[u8]> + for<'a> Extend<&'a u8>),
    ) -> Result<(), CryptoError> {
        self.0.seal_in_place_append_tag(nonce(purpose, counter), Aad::from(aad), bytes).map_err(|_| CryptoError::Seal)
    }

    /// Decrypts in place; the plain bytes are the front of `bytes`.
    pub(crate) fn open<'a>(
        &self,
        purpose: Purpose,
        counter: u64,
        aad: &[u8],
        bytes: &'a mut [u8],
    ) -> Result<&'a mut [u8], CryptoError> {
        self.0.open_in_place(nonce(purpose, counter), Aad::from(aad), bytes).map_err(|_| CryptoError::Open)
    }
}

/// Tells byte strings apart by 128 bits: GMAC, the authentication of AES-256-GCM, always with the same nonce.
///
/// For two different inputs of at most 16 × n bytes, chosen without knowledge of the key and of any output, the chance
/// of equal outputs is at most (n + 1) / 2^128: a polynomial over a field of 2^128 elements has no more roots than its
/// degree. It costs half of BLAKE3. Unlike that it is not a pseudo-random function when it is called twice: outputs are
/// as secret as the key.
pub(crate) struct UniversalHash(LessSafeKey);

impl UniversalHash {
    /// The key must be used for nothing else.
    pub(crate) fn new(key: &SecretKey) -> Result<Self, CryptoError> {
        let Cipher(key) = Cipher::new(key)?;
        Ok(Self(key))
    }

    pub(crate) fn hash(&self, bytes: &[u8]) -> Result<[u8; TAG_BYTES], CryptoError> {
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(bytes), &mut []).map_err(|_| CryptoError::Seal)?;
        tag.as_ref().try_into().map_err(|_| CryptoError::Seal)
    }
}

/// Seals a key under another by a random nonce, which comes first: 12 + 32 + 16 bytes.
pub(crate) fn wrap_key(under: &SecretKey, aad: &[u8], key: &SecretKey) -> Result<Vec<u8>, CryptoError> {
    let counter: u64 = rand::random();
    let mut sealed = key.bytes().to_vec();
    Cipher::new(under)?.seal(Purpose::Key, counter, aad, &mut sealed)?;
    let mut wrapped = counter.to_le_bytes().to_vec();
    wrapped.append(&mut sealed);
    Ok(wrapped)
}

/// Number of bytes of a wrapped key.
pub(crate) const WRAPPED_KEY_BYTES: usize = 8 + 32 + TAG_BYTES;

/// Opens what [`wrap_key`] made.
pub(crate) fn unwrap_key(
    under: &SecretKey,
    aad: &[u8],
    wrapped: &[u8; WRAPPED_KEY_BYTES],
) -> Result<SecretKey, CryptoError> {
    let (counter, sealed) = wrapped.split_first_chunk::<8>().ok_or(CryptoError::Open)?;
    let mut sealed = sealed.to_vec();
    let plain = Cipher::new(under)?.open(Purpose::Key, u64::from_le_bytes(*counter), aad, &mut sealed)?;
    let key = <[u8; 32]>::try_from(&*plain).map_err(|_| CryptoError::Open)?;
    sealed.zeroize();
    Ok(SecretKey::new(key))
}

/// A fresh HPKE key pair: private and public.
pub(crate) fn key_pair() -> (SecretKey, [u8; 32]) {
    let (private, public) = Exchange::gen_keypair();
    (SecretKey(private.to_bytes().into()), public.to_bytes().into())
}

/// Seals a key to a public key: the encapsulated key, then the sealed one.
pub(crate) fn seal_to(public: &[u8; 32], info: &[u8], key: &SecretKey) -> Result<Vec<u8>, CryptoError> {
    let public = <Exchange as Kem>::PublicKey::from_bytes(public).map_err(|_| CryptoError::MalformedKey)?;
    let (encapsulated, sealed) =
        hpke::single_shot_seal::<Sealing, Kdf, Exchange>(&OpModeS::Base, &public, info, key.bytes(), b"")
            .map_err(|_| CryptoError::Seal)?;
    let mut bytes = encapsulated.to_bytes().to_vec();
    bytes.extend_from_slice(&sealed);
    Ok(bytes)
}

/// Number of bytes of a key sealed by [`seal_to`].
pub(crate) const SEALED_KEY_BYTES: usize = ENCAPSULATED_BYTES + 32 + TAG_BYTES;

/// Opens what [`seal_to`] made.
pub(crate) fn open_with(
    private: &SecretKey,
    info: &[u8],
    sealed: &[u8; SEALED_KEY_BYTES],
) -> Result<SecretKey, CryptoError> {
    let private = <Exchange as Kem>::PrivateKey::from_bytes(private.bytes()).map_err(|_| CryptoError::MalformedKey)?;
    let (encapsulated, sealed) = sealed.split_at(ENCAPSULATED_BYTES);
    let encapsulated = <Exchange as Kem>::EncappedKey::from_bytes(encapsulated).map_err(|_| CryptoError::Open)?;
    let mut plain =
        hpke::single_shot_open::<Sealing, Kdf, Exchange>(&OpModeR::Base, &private, &encapsulated, info, sealed, b"")
            .map_err(|_| CryptoError::Open)?;
    let key = <[u8; 32]>::try_from(plain.as_slice()).map_err(|_| CryptoError::Open)?;
    plain.zeroize();
    Ok(SecretKey::new(key))
}

/// Passphrases are stretched one after the other: who opens many repositories needs the memory for one of them at a time.
static STRETCHING: Mutex<()> = Mutex::new(());

/// What a passphrase costs to try: Argon2id's memory in KiB, passes and lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) memory_kib: u32,
    pub(crate) passes: u32,
    pub(crate) lanes: u32,
}

impl Cost {
    /// The second choice that RFC 9106 recommends: 64 MiB, three passes, four lanes.
    pub(crate) const DEFAULT: Self = Self { memory_kib: 64 << 10, passes: 3, lanes: 4 };
    /// A stored cost above this is refused: a hostile repository must not exhaust the machine.
    const MAX: Self = Self { memory_kib: 1 << 20, passes: 64, lanes: 64 };

    /// The key that a passphrase gives.
    pub(crate) fn derive(self, passphrase: &[u8], salt: &[u8; 32]) -> Result<SecretKey, CryptoError> {
        if self.memory_kib > Self::MAX.memory_kib || self.passes > Self::MAX.passes || self.lanes > Self::MAX.lanes {
            return Err(CryptoError::Cost);
        }
        let params =
            argon2::Params::new(self.memory_kib, self.passes, self.lanes, Some(32)).map_err(|_| CryptoError::Cost)?;
        let mut key = [0; 32];
        let _alone = STRETCHING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(params.block_count()).map_err(|_| CryptoError::Cost)?;
        allocator::huge_pages(blocks.spare_capacity_mut());
        blocks.resize(params.block_count(), argon2::Block::new());
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into_with_memory(passphrase, salt, &mut key, &mut blocks)
            .map_err(|_| CryptoError::Cost)?;
        Ok(SecretKey::new(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_only_unchanged() {
        let cipher = Cipher::new(&SecretKey::random()).unwrap();
        let mut sealed = b"plain".to_vec();
        cipher.seal(Purpose::Frame, 7, b"aad", &mut sealed).unwrap();
        assert_eq!(cipher.open(Purpose::Frame, 7, b"aad", &mut sealed.clone()).unwrap(), b"plain");
        assert_eq!(cipher.open(Purpose::Frame, 8, b"aad", &mut sealed.clone()).unwrap_err(), CryptoError::Open);
        assert_eq!(cipher.open(Purpose::Commit, 7, b"aad", &mut sealed.clone()).unwrap_err(), CryptoError::Open);
        assert_eq!(cipher.open(Purpose::Frame, 7, b"", &mut sealed.clone()).unwrap_err(), CryptoError::Open);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(cipher.open(Purpose::Frame, 7, b"aad", &mut changed).is_err(), "byte {at}");
        }
        assert!(cipher.open(Purpose::Frame, 7, b"aad", &mut []).is_err());
    }

    #[test]
    fn a_universal_hash_tells_inputs_and_keys_apart() {
        let hash = |key: u8, bytes: &[u8]| UniversalHash::new(&SecretKey::new([key; 32])).unwrap().hash(bytes).unwrap();
        // It is in repositories and must never change: GMAC as OpenSSL computes it.
        assert_eq!(hash(7, b"page"), [220, 118, 72, 205, 126, 200, 255, 239, 125, 166, 244, 29, 45, 90, 16, 123]);
        let page = [3; 8192];
        let mut hashes = vec![hash(7, &page), hash(8, &page), hash(7, &page[1..]), hash(7, b""), hash(7, &[0])];
        for bit in 0..page.len() * 8 {
            let mut changed = page;
            changed[bit / 8] ^= 1 << (bit % 8);
            hashes.push(hash(7, &changed));
        }
        let count = hashes.len();
        assert_eq!(hashes.into_iter().collect::<std::collections::HashSet<_>>().len(), count);
    }

    #[test]
    fn keys_travel_sealed() {
        let (private, public) = key_pair();
        let key = SecretKey::random();
        let sealed: [u8; SEALED_KEY_BYTES] = seal_to(&public, b"info", &key).unwrap().try_into().unwrap();
        assert!(open_with(&private, b"info", &sealed).unwrap() == key);
        assert_eq!(open_with(&private, b"other", &sealed).unwrap_err(), CryptoError::Open);
        assert_eq!(open_with(&key_pair().0, b"info", &sealed).unwrap_err(), CryptoError::Open);

        let under = SecretKey::random();
        let wrapped: [u8; WRAPPED_KEY_BYTES] = wrap_key(&under, b"a", &key).unwrap().try_into().unwrap();
        assert!(unwrap_key(&under, b"a", &wrapped).unwrap() == key);
        assert_eq!(unwrap_key(&under, b"b", &wrapped).unwrap_err(), CryptoError::Open);
    }

    #[test]
    fn absurd_costs_are_refused() {
        let cost = Cost { memory_kib: u32::MAX, passes: 1, lanes: 1 };
        assert_eq!(cost.derive(b"x", &[0; 32]).unwrap_err(), CryptoError::Cost);
        assert_eq!(Cost { memory_kib: 64, passes: 0, lanes: 1 }.derive(b"x", &[0; 32]).unwrap_err(), CryptoError::Cost);
    }

    #[test]
    fn secrets_are_not_shown() {
        assert_eq!(format!("{:?}", SecretKey::new([7; 32])), "SecretKey(..)");
    }
}
