//! Classes of errors: what a caller can do about a failure, whatever module it comes from.

use std::fmt;

/// What can be done about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Trying again later may help: throttling, a lost connection, a server's 5xx.
    Transient,
    /// The store refuses the credentials, or they lack a right.
    Permission,
    /// What was asked for does not exist: a repository, a bucket, a snapshot, an object.
    NotFound,
    /// No room: a full disk, a quota, HTTP 507.
    Full,
    /// The endpoint cannot be reached or its name or certificate is wrong.
    Unreachable,
    /// The passphrase or key file does not open the repository, or lacks the part that is needed.
    Key,
    /// Stored bytes are not what was written.
    Damaged,
    /// The store or the repository cannot be used by this version: no put-if-absent, a newer format.
    Unsupported,
    /// Someone else decided first: the session was aborted, the repository exists already.
    Conflict,
    /// The request itself is wrong; the caller must change it.
    Invalid,
    /// The local machine failed: temporary files, memory, threads.
    Local,
}

impl ErrorClass {
    /// Whether the same request may succeed later without anyone changing anything.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Transient | Self::Unreachable)
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transient => "transient",
            Self::Permission => "permission",
            Self::NotFound => "not found",
            Self::Full => "full",
            Self::Unreachable => "unreachable",
            Self::Key => "key",
            Self::Damaged => "damaged",
            Self::Unsupported => "unsupported",
            Self::Conflict => "conflict",
            Self::Invalid => "invalid",
            Self::Local => "local",
        })
    }
}

/// An error that knows its class.
pub trait Classified {
    /// What a caller can do about this error.
    fn class(&self) -> ErrorClass;
}
