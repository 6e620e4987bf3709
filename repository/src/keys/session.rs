//! The keys of one writing session, and `k/<session>/<generation>`, the object that holds them wrapped.
//!
//! A session has three keys: for data (sealed to the domain's public key, so that writers cannot read), for
//! manifests, and for structure (pack directories and commits). Rotation rewraps this one object.

use super::{DomainKeys, KeyObjectError};
use crate::crypto::{SEALED_KEY_BYTES, SecretKey, WRAPPED_KEY_BYTES, open_with, seal_to, unwrap_key, wrap_key};
use crate::id::SessionId;
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

const MAGIC: &[u8; 8] = b"LBSKEY01";

/// Key of the object that holds a session's keys.
pub(crate) fn session_key_object(session: SessionId) -> String {
    format!("k/{session}/0")
}

/// The keys of a session, as far as the reader may open them.
#[derive(Debug, Clone)]
pub(crate) struct SessionKeys {
    /// Opens data frames; `None` without the domain's private key.
    pub(crate) data: Option<SecretKey>,
    /// Opens manifest frames.
    pub(crate) manifest: SecretKey,
    /// Opens directories and commits.
    pub(crate) structure: SecretKey,
}

fn info(session: SessionId, part: &str) -> Vec<u8> {
    let mut info = b"lifeboat session key v1 ".to_vec();
    info.extend_from_slice(part.as_bytes());
    info.extend_from_slice(&session.0);
    info
}

impl SessionKeys {
    pub(crate) fn random() -> Self {
        Self { data: Some(SecretKey::random()), manifest: SecretKey::random(), structure: SecretKey::random() }
    }

    /// The stored form. Fails only when a key is malformed or the data key is unknown.
    pub(crate) fn seal(&self, session: SessionId, domain: &DomainKeys) -> Result<Vec<u8>, KeyObjectError> {
        let data = self.data.as_ref().ok_or(crate::crypto::CryptoError::MalformedKey)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&session.0);
        bytes.extend(seal_to(&domain.public, &info(session, "data"), data)?);
        bytes.extend(wrap_key(&domain.manifest, &info(session, "manifest"), &self.manifest)?);
        bytes.extend(wrap_key(&domain.structure, &info(session, "structure"), &self.structure)?);
        seal_hash(&mut bytes);
        Ok(bytes)
    }

    /// Checks the stored form as far as anyone can.
    pub(crate) fn verify(bytes: &[u8], session: SessionId) -> Result<(), WireError> {
        Wrapped::parse(bytes, session).map(drop)
    }

    /// Opens the stored form with the domain's keys.
    pub(crate) fn open(bytes: &[u8], session: SessionId, domain: &DomainKeys) -> Result<Self, KeyObjectError> {
        let Wrapped { data, manifest, structure } = Wrapped::parse(bytes, session)?;
        Ok(Self {
            data: domain
                .private
                .as_ref()
                .map(|private| open_with(private, &info(session, "data"), &data))
                .transpose()?,
            manifest: unwrap_key(&domain.manifest, &info(session, "manifest"), &manifest)?,
            structure: unwrap_key(&domain.structure, &info(session, "structure"), &structure)?,
        })
    }
}

/// The stored form, taken apart.
struct Wrapped {
    data: [u8; SEALED_KEY_BYTES],
    manifest: [u8; WRAPPED_KEY_BYTES],
    structure: [u8; WRAPPED_KEY_BYTES],
}

impl Wrapped {
    fn parse(bytes: &[u8], session: SessionId) -> Result<Self, WireError> {
        let mut fields = Fields::new(unseal_hash(bytes)?);
        fields.expect(MAGIC, "no session keys of a known version")?;
        fields.expect(&session.0, "the keys of another session")?;
        let wrapped = Self { data: fields.array()?, manifest: fields.array()?, structure: fields.array()? };
        fields.end()?;
        Ok(wrapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_opens_all_but_the_data_key() {
        let domain = DomainKeys::random();
        let session = SessionId::random();
        let keys = SessionKeys::random();
        let bytes = keys.seal(session, &domain).unwrap();
        let full = SessionKeys::open(&bytes, session, &domain).unwrap();
        assert!(full.data == keys.data && full.manifest == keys.manifest && full.structure == keys.structure);
        assert!(SessionKeys::open(&bytes, session, &domain.writer()).unwrap().data.is_none());
        assert!(SessionKeys::open(&bytes, SessionId::random(), &domain).is_err());
        assert!(SessionKeys::open(&bytes, session, &DomainKeys::random()).is_err());
    }
}
