//! Object stores: one trait, created-once objects, and errors that say what can be done about them.
//!
//! The engine relies on: `put_if_absent` has exactly one winner and is durable when it returns; a `get` after
//! it sees the object. It never relies on `list` being complete, on `delete` being conditional, nor on clocks.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use thiserror::Error;

use crate::error::{Classified, ErrorClass};

pub mod cloud;
mod direct;
pub mod faulty;
pub mod local;
mod location;
pub mod memory;
mod object;
mod probe;
pub mod retry;
pub mod suite;

pub use location::{Location, LocationError, S3Settings, open};
pub use probe::{ProbeError, probe, probe_with};

/// What an object store failed to do.
#[derive(Debug, Error)]
#[error("cannot {operation} {key:?} in {store}: {reason}")]
pub struct StoreError {
    /// What was attempted, as a verb.
    pub operation: &'static str,
    /// The object's key.
    pub key: String,
    /// The store, as people call it.
    pub store: String,
    /// Why.
    pub reason: Reason,
    /// The error below.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Why a store operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Reason {
    /// The object does not exist.
    #[error("the object does not exist")]
    NotFound,
    /// The bucket does not exist.
    #[error("the bucket does not exist")]
    NoBucket,
    /// Refused for now: throttled, or a server error.
    #[error("the store failed or is busy")]
    Busy,
    /// Wrong credentials or a missing right.
    #[error("the store refuses the credentials or they lack the right")]
    Denied,
    /// No room.
    #[error("the store is full or over its quota")]
    Full,
    /// No connection.
    #[error("the store cannot be reached")]
    Unreachable,
    /// The store cannot do what is needed.
    #[error("the store does not support the operation")]
    Unsupported,
    /// More bytes than the reader is willing to take.
    #[error("the object has {size} bytes, over the limit of {limit}")]
    TooLarge {
        /// The object's size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The store answered with fewer bytes than it should, or others.
    #[error("the range lies outside of the object")]
    OutOfRange,
    /// Anything else, which a retry will not change.
    #[error("the store refuses the request")]
    Refused,
}

impl Classified for StoreError {
    fn class(&self) -> ErrorClass {
        match self.reason {
            Reason::NotFound | Reason::NoBucket => ErrorClass::NotFound,
            Reason::Busy => ErrorClass::Transient,
            Reason::Denied => ErrorClass::Permission,
            Reason::Full => ErrorClass::Full,
            Reason::Unreachable => ErrorClass::Unreachable,
            Reason::Unsupported => ErrorClass::Unsupported,
            Reason::TooLarge { .. } | Reason::OutOfRange => ErrorClass::Damaged,
            Reason::Refused => ErrorClass::Invalid,
        }
    }
}

impl StoreError {
    /// Whether the object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.reason == Reason::NotFound
    }
}

/// What a `put_if_absent` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object was created by this call.
    Created,
    /// An answer was lost on the way, and the object that exists is exactly ours.
    CreatedEarlier,
    /// The object existed; nothing was changed.
    Exists,
}

impl PutOutcome {
    /// Whether the object that now exists is the one given.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Created | Self::CreatedEarlier)
    }
}

/// The bytes of an object, in pieces that are not copied together.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    pieces: Vec<Bytes>,
    len: u64,
}

impl Payload {
    /// Appends a piece.
    pub fn push(&mut self, piece: Bytes) {
        self.len += piece.len() as u64;
        self.pieces.push(piece);
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces in order.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// All bytes in one buffer; copies unless there is one piece.
    pub fn to_bytes(&self) -> Bytes {
        match self.pieces.as_slice() {
            [only] => only.clone(),
            pieces => {
                let mut all = BytesMut::with_capacity(usize::try_from(self.len).unwrap_or(0));
                for piece in pieces {
                    all.extend_from_slice(piece);
                }
                all.freeze()
            }
        }
    }

    /// The last `count` bytes, or all when there are fewer.
    pub fn tail(&self, count: usize) -> Bytes {
        let mut tail = Vec::new();
        for piece in self.pieces.iter().rev() {
            let need = count - tail.len();
            let from = piece.len().saturating_sub(need);
            let mut front = piece[from..].to_vec();
            front.append(&mut tail);
            tail = front;
            if tail.len() == count {
                break;
            }
        }
        Bytes::from(tail)
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        let mut payload = Self::default();
        payload.push(bytes);
        payload
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

/// Which bytes of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ByteRange {
    /// From `start` to before `end`; the object must have them all.
    Bounded(Range<u64>),
    /// The last bytes; all when the object is smaller.
    Suffix(u64),
}

/// An object that a listing found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The object's key.
    pub key: String,
    /// Its size in bytes.
    pub size: u64,
}

/// An object store.
///
/// Keys are made of segments of `[A-Za-z0-9._-]`, joined by `/`, each at most 128 bytes, and no key is a
/// prefix of another up to a `/`. Objects are created once and never change.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// What people call this store: a path or a URL without secrets.
    fn describe(&self) -> String;

    /// Creates the object unless it exists. Durable when it returns `Created`.
    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError>;

    /// The whole object; refused when it has more than `limit` bytes.
    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError>;

    /// A part of the object. A bounded range that the object does not have wholly is an error.
    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError>;

    /// The object's size in bytes.
    async fn size(&self, key: &str) -> Result<u64, StoreError>;

    /// The objects under a prefix that ends at a `/` (or all, for an empty one), in any order.
    ///
    /// Possibly stale: a hint, never a proof of absence.
    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>>;

    /// Deletes the object. One that does not exist is no error.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;
}
