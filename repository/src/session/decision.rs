//! `d/<session>`: the one object that decides a session, COMMIT or ABORT. Whoever creates it first is right.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::crypto::{Cipher, CryptoError, Purpose};
use crate::id::{SessionId, SnapshotId};
use crate::snapshot::Snapshot;
use crate::wire::{Fields, WireError, seal_hash, unseal_hash};

/// Where decisions lie.
pub(crate) const DECISION_PREFIX: &str = "d/";
/// No decision is larger.
pub(crate) const MAX_DECISION_BYTES: u64 = 64 << 20;
const COMMIT_MAGIC: &[u8; 8] = b"LBCOMM01";
const ABORT_MAGIC: &[u8; 8] = b"LBABRT01";
/// A reason to abort is cut to this many bytes.
const MAX_REASON_BYTES: usize = 1024;

/// Key of a session's decision.
pub(crate) fn decision_key(session: SessionId) -> String {
    format!("{DECISION_PREFIX}{session}")
}

/// The session of a decision's key.
pub(crate) fn parse_decision_key(key: &str) -> Option<SessionId> {
    key.strip_prefix(DECISION_PREFIX)?.parse().ok()
}

/// What a committed session says; sealed under its structure key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Commit {
    /// The epoch that it registered in.
    pub(crate) epoch: u64,
    /// What it made.
    pub(crate) snapshots: Vec<Snapshot>,
    /// BLAKE3 of each snapshot's refset object; of a session that repacked, the new versions of other snapshots' refsets.
    pub(crate) refsets: Vec<RefsetHash>,
    /// The newest commits that the session saw when it began; each names those before it.
    pub(crate) saw: Vec<SeenCommit>,
    /// What the session was for.
    pub(crate) purpose: String,
}

/// The refset object of a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RefsetHash {
    pub(crate) snapshot: SnapshotId,
    #[serde(default)]
    pub(crate) version: u32,
    pub(crate) hash: String,
}

impl RefsetHash {
    /// The hash as bytes; all zeros, which fit nothing, when it is malformed.
    pub(crate) fn hash_bytes(&self) -> [u8; 32] {
        blake3::Hash::from_hex(&self.hash).map_or([0; 32], |hash| *hash.as_bytes())
    }
}

/// A commit that another session saw; a missing one is an omission by the store, or expired.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct SeenCommit {
    pub(crate) session: SessionId,
    pub(crate) hash: String,
}

/// A decision as it is stored.
#[derive(Debug)]
pub(crate) enum Decision {
    /// The sealed commit.
    Commit(Vec<u8>),
    /// Why the session was given up.
    Abort(String),
}

/// A decision that cannot be read.
#[derive(Debug, Error)]
pub(crate) enum DecisionError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error("the commit is malformed")]
    Malformed(#[source] serde_json::Error),
    #[error("the commit names another session")]
    OtherSession,
}

impl Commit {
    /// Whether the session repacked: it names refsets of snapshots that are not its own.
    pub(crate) fn is_mover(&self) -> bool {
        self.refsets.iter().any(|refset| refset.version > 0)
    }

    pub(crate) fn seal(&self, session: SessionId, structure: &Cipher) -> Result<Vec<u8>, DecisionError> {
        let mut sealed = serde_json::to_vec(self).map_err(DecisionError::Malformed)?;
        structure.seal(Purpose::Commit, 0, &session.0, &mut sealed)?;
        let mut bytes = COMMIT_MAGIC.to_vec();
        bytes.extend_from_slice(&session.0);
        bytes.append(&mut sealed);
        seal_hash(&mut bytes);
        Ok(bytes)
    }

    pub(crate) fn open(session: SessionId, mut sealed: Vec<u8>, structure: &Cipher) -> Result<Self, DecisionError> {
        let plain = structure.open(Purpose::Commit, 0, &session.0, &mut sealed)?;
        let commit: Self = serde_json::from_slice(plain).map_err(DecisionError::Malformed)?;
        if commit.snapshots.iter().any(|snapshot| snapshot.session != session) {
            return Err(DecisionError::OtherSession);
        }
        Ok(commit)
    }
}

impl Decision {
    /// The stored form of ABORT.
    pub(crate) fn abort_bytes(session: SessionId, reason: &str) -> Vec<u8> {
        let mut bytes = ABORT_MAGIC.to_vec();
        bytes.extend_from_slice(&session.0);
        let end = reason.floor_char_boundary(MAX_REASON_BYTES);
        bytes.extend_from_slice(&reason.as_bytes()[..end]);
        seal_hash(&mut bytes);
        bytes
    }

    pub(crate) fn parse(session: SessionId, bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(unseal_hash(bytes)?);
        let magic: [u8; 8] = fields.array()?;
        fields.expect(&session.0, "the decision about another session")?;
        let rest = fields.take(fields.left())?;
        match &magic {
            COMMIT_MAGIC => Ok(Self::Commit(rest.to_vec())),
            ABORT_MAGIC => Ok(Self::Abort(String::from_utf8_lossy(rest).into_owned())),
            _ => Err(WireError { what: "no decision of a known version", at: 0 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::SecretKey;

    #[test]
    fn decisions_round_trip_and_damage_is_found() {
        let session = SessionId::random();
        let cipher = Cipher::new(&SecretKey::random()).unwrap();
        let commit = Commit { epoch: 3, snapshots: vec![], refsets: vec![], saw: vec![], purpose: "backup".into() };
        let bytes = commit.seal(session, &cipher).unwrap();
        let Ok(Decision::Commit(sealed)) = Decision::parse(session, &bytes) else { panic!("no commit") };
        assert_eq!(Commit::open(session, sealed.clone(), &cipher).unwrap().purpose, "backup");
        assert!(Commit::open(SessionId::random(), sealed, &cipher).is_err());
        assert!(Decision::parse(SessionId::random(), &bytes).is_err());
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Decision::parse(session, &changed).is_err());
            assert!(Decision::parse(session, &bytes[..at]).is_err());
        }
        let long = "ä".repeat(2000);
        let Ok(Decision::Abort(reason)) = Decision::parse(session, &Decision::abort_bytes(session, &long)) else {
            panic!("no abort")
        };
        assert_eq!(reason, "ä".repeat(512));
    }
}
