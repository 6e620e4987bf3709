//! The `config` object: what a repository is. Written once by `init`; its hash is in every key slot.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::chunk::{MIN_AVERAGE_BITS, average_bits};
use crate::id::RepositoryId;

/// Key of the config object.
pub(crate) const CONFIG_KEY: &str = "config";
/// No config is larger.
pub(crate) const MAX_CONFIG_BYTES: u64 = 64 << 10;
/// The format that this version writes.
pub const FORMAT_VERSION: u32 = 1;

/// What a repository is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// Version of all formats together; a larger one than [`FORMAT_VERSION`] is refused.
    pub format: u32,
    /// The repository's name.
    pub id: RepositoryId,
    /// When it was made.
    pub created: Timestamp,
    /// How files are cut.
    pub chunker: ChunkerConfig,
    /// Which algorithms protect the bytes.
    pub suite: Suite,
    /// Number of lanes in which sessions register side by side.
    pub lanes: u32,
}

/// How files are cut into chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkerConfig {
    /// The algorithm.
    pub name: String,
    /// Version of its cut points, frozen by golden vectors.
    pub version: u32,
    /// Smallest chunk, in bytes.
    pub min: u32,
    /// Average chunk, in bytes.
    pub average: u32,
    /// Largest chunk, in bytes.
    pub max: u32,
}

/// The ways of cutting that this version has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Algorithm {
    /// `fastcdc-v2020-keyed`, version 1.
    FastCdc,
    /// `window-keyed`, version 1.
    Window,
}

impl ChunkerConfig {
    /// The chunker of repositories that were made by the first versions of this program.
    pub fn fastcdc() -> Self {
        Self { name: "fastcdc-v2020-keyed".to_owned(), ..Self::default() }
    }

    /// Which way of cutting it is. Sizes that it cannot have are refused as well.
    pub(crate) fn algorithm(&self) -> Result<Algorithm, ConfigError> {
        let Self { name, version, min, average, max } = self;
        let algorithm = match (name.as_str(), version) {
            ("fastcdc-v2020-keyed", 1) => Algorithm::FastCdc,
            ("window-keyed", 1) => Algorithm::Window,
            _ => return Err(ConfigError::Unknown { what: "chunker" }),
        };
        let is_ordered = 64 <= *min && min < average && average < max;
        let is_small = algorithm == Algorithm::Window && average_bits(*average) < MIN_AVERAGE_BITS;
        if !is_ordered || is_small || *max as usize > crate::sink::MAX_CHUNK_BYTES {
            return Err(ConfigError::Unknown { what: "chunk size" });
        }
        Ok(algorithm)
    }
}

impl Default for ChunkerConfig {
    fn default() -> Self {
        Self { name: "window-keyed".to_owned(), version: 1, min: 128 << 10, average: 512 << 10, max: 2 << 20 }
    }
}

/// Names of the algorithms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suite {
    /// Number of the suite in the binary formats.
    pub number: u16,
    /// The hash that names chunks.
    pub hash: String,
    /// The cipher of frames, directories and commits.
    pub cipher: String,
    /// The compression of frames.
    pub compression: String,
    /// How session keys are sealed to the domain's public key.
    pub exchange: String,
}

/// Number of the only suite so far.
pub(crate) const SUITE: u16 = 1;

impl Default for Suite {
    fn default() -> Self {
        Self {
            number: SUITE,
            hash: "blake3-keyed".to_owned(),
            cipher: "aes-256-gcm".to_owned(),
            compression: "zstd".to_owned(),
            exchange: "hpke-x25519-hkdf-sha256-aes-256-gcm".to_owned(),
        }
    }
}

/// A config that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The bytes are no config.
    #[error("the config object is damaged")]
    Damaged(#[source] serde_json::Error),
    /// Made by a later version.
    #[error("the repository has format {found}; this program knows formats up to {FORMAT_VERSION}: use a newer one")]
    Newer {
        /// The repository's format.
        found: u64,
    },
    /// An algorithm that this version does not have, or absurd numbers.
    #[error("the repository's {what} is not known to this program: use a newer one")]
    Unknown {
        /// Which part.
        what: &'static str,
    },
}

impl Config {
    /// The config of a new repository.
    pub(crate) fn new(chunker: ChunkerConfig) -> Self {
        Self {
            format: FORMAT_VERSION,
            id: RepositoryId::random(),
            created: crate::clock::now(),
            chunker,
            suite: Suite::default(),
            lanes: 4,
        }
    }

    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        // The format is looked at first: a later one may have other fields.
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(ConfigError::Damaged)?;
        if let Some(found) = value.get("format").and_then(serde_json::Value::as_u64)
            && found > u64::from(FORMAT_VERSION)
        {
            return Err(ConfigError::Newer { found });
        }
        let config: Self = serde_json::from_value(value).map_err(ConfigError::Damaged)?;
        if config.suite != Suite::default() {
            return Err(ConfigError::Unknown { what: "suite of algorithms" });
        }
        config.chunker.algorithm()?;
        if !(1..=1024).contains(&config.lanes) {
            return Err(ConfigError::Unknown { what: "number of lanes" });
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_round_trips_and_wrong_ones_are_refused() {
        let config = Config::new(ChunkerConfig::default());
        let bytes = config.to_bytes().unwrap();
        assert_eq!(Config::parse(&bytes).unwrap(), config);
        let older = Config::new(ChunkerConfig::fastcdc());
        assert_eq!(Config::parse(&older.to_bytes().unwrap()).unwrap(), older);
        assert!(matches!(Config::parse(br#"{"format": 2, "new": "field"}"#), Err(ConfigError::Newer { found: 2 })));
        assert!(matches!(Config::parse(b"{}"), Err(ConfigError::Damaged(_))));
        assert!(matches!(Config::parse(b"\xff"), Err(ConfigError::Damaged(_))));
        for (from, to) in [
            ("131072", "524288"),
            ("2097152", "4000000000"),
            ("aes-256-gcm", "rot13"),
            ("window-keyed", "slow-keyed"),
            ("\"lanes\": 4", "\"lanes\": 0"),
        ] {
            let changed = String::from_utf8(bytes.clone()).unwrap().replacen(from, to, 1);
            assert!(matches!(Config::parse(changed.as_bytes()), Err(ConfigError::Unknown { .. })), "{to}");
        }
    }
}
