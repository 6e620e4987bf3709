//! Adapts a store of the `object_store` crate: its operations to ours, its errors to reasons.
//!
//! Retries are switched off below this module; `retry` does them, because only it can tell an own success.

use std::error::Error as StdError;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use super::{ByteRange, Listed, Payload, PutOutcome, Reason, Store, StoreError};

/// A store of the `object_store` crate.
#[derive(Debug, Clone)]
pub(super) struct ObjectBacked {
    inner: Arc<dyn ObjectStore>,
    name: String,
    /// Folder inside the store, without slashes at its ends; may be empty.
    prefix: String,
}

impl ObjectBacked {
    pub(super) fn new(inner: Arc<dyn ObjectStore>, name: String, prefix: &str) -> Self {
        Self { inner, name, prefix: prefix.trim_matches('/').to_owned() }
    }

    fn path(&self, key: &str) -> Path {
        if self.prefix.is_empty() { Path::from(key) } else { Path::from(format!("{}/{key}", self.prefix)) }
    }

    fn failed(&self, operation: &'static str, key: &str, error: Error) -> StoreError {
        StoreError {
            operation,
            key: key.to_owned(),
            store: self.name.clone(),
            reason: reason_of(&error),
            source: Some(Box::new(error)),
        }
    }

    fn refused(&self, operation: &'static str, key: &str, reason: Reason) -> StoreError {
        StoreError { operation, key: key.to_owned(), store: self.name.clone(), reason, source: None }
    }
}

/// Finds the first error of type `T` in a chain of sources.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        current = error.source();
    }
    None
}

pub(super) fn reason_of_io(kind: std::io::ErrorKind) -> Reason {
    use std::io::ErrorKind;
    match kind {
        ErrorKind::NotFound => Reason::NotFound,
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Reason::Denied,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Reason::Full,
        ErrorKind::TimedOut | ErrorKind::Interrupted | ErrorKind::ResourceBusy => Reason::Busy,
        _ => Reason::Refused,
    }
}

fn reason_of_status(status: u16, body: &str) -> Reason {
    // Some servers report a full disk as a plain 500 or 503; their error code tells.
    let full = ["InsufficientCapacity", "StorageFull", "QuotaExceeded", "XMinioStorageFull", "no space left"];
    if full.iter().any(|code| body.contains(code)) {
        return Reason::Full;
    }
    match status {
        404 if body.contains("NoSuchBucket") => Reason::NoBucket,
        404 => Reason::NotFound,
        507 => Reason::Full,
        401 | 403 => Reason::Denied,
        // AWS answers so when two conditional requests meet; asking again is what its documentation says.
        409 if body.contains("ConditionalRequestConflict") || body.contains("OperationAborted") => Reason::Busy,
        408 | 425 | 429 | 500 | 502 | 503 | 504 => Reason::Busy,
        400 if body.contains("RequestTimeout") || body.contains("SlowDown") => Reason::Busy,
        416 => Reason::OutOfRange,
        501 => Reason::Unsupported,
        _ => Reason::Refused,
    }
}

/// The HTTP status and body of a failed request.
///
/// The crate keeps the type of this error to itself, so its text is read; the tests on real servers hold it fast.
fn http_answer(error: &Error) -> Option<(u16, String)> {
    let mut current = error.source();
    while let Some(error) = current {
        let text = error.to_string();
        if let Some((_, rest)) = text.split_once("Server returned non-2xx status code: ") {
            let status = rest.get(..3).and_then(|digits| digits.parse().ok())?;
            return Some((status, rest.to_owned()));
        }
        current = error.source();
    }
    None
}

/// Says why an operation of the `object_store` crate failed.
fn reason_of(error: &Error) -> Reason {
    if let Some((status, body)) = http_answer(error) {
        return reason_of_status(status, &body);
    }
    if let Some(http) = find::<HttpError>(error) {
        return match http.kind() {
            HttpErrorKind::Connect => Reason::Unreachable,
            _ => Reason::Busy,
        };
    }
    if let Some(io) = find::<std::io::Error>(error) {
        return reason_of_io(io.kind());
    }
    match error {
        Error::NotFound { .. } => Reason::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Reason::Denied,
        Error::NotSupported { .. } | Error::NotImplemented { .. } => Reason::Unsupported,
        _ => Reason::Refused,
    }
}

/// Whether the error says that a create-only put found the object.
fn says_exists(error: &Error) -> bool {
    match error {
        Error::AlreadyExists { .. } => {
            // 409 has several meanings on S3; only 412 (and 304, from some servers) is the condition's answer.
            http_answer(error).is_none_or(|(status, _)| status != 409)
        }
        Error::Precondition { .. } | Error::NotModified { .. } => true,
        _ => false,
    }
}

#[async_trait]
impl Store for ObjectBacked {
    fn describe(&self) -> String {
        self.name.clone()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let pieces = payload.pieces().iter().cloned().collect();
        match self.inner.put_opts(&self.path(key), pieces, options).await {
            Ok(_) => Ok(PutOutcome::Created),
            Err(error) if says_exists(&error) => Ok(PutOutcome::Exists),
            Err(error) => Err(self.failed("create", key, error)),
        }
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        let result = self.inner.get_opts(&self.path(key), GetOptions::default()).await;
        let result = result.map_err(|error| self.failed("read", key, error))?;
        let size = result.meta.size;
        if size > limit {
            return Err(self.refused("read", key, Reason::TooLarge { size, limit }));
        }
        let mut stream = result.into_stream();
        let mut whole = BytesMut::new();
        while let Some(piece) = stream.try_next().await.map_err(|error| self.failed("read", key, error))? {
            // A server may send more than it announced.
            let grown = (whole.len() + piece.len()) as u64;
            if grown > limit {
                return Err(self.refused("read", key, Reason::TooLarge { size: grown, limit }));
            }
            if whole.is_empty() && piece.len() as u64 == size {
                return Ok(piece);
            }
            if whole.is_empty() {
                whole.reserve(usize::try_from(size).unwrap_or(0));
            }
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError> {
        let (wanted, exact) = match range {
            ByteRange::Bounded(range) if range.is_empty() => return Ok(Bytes::new()),
            ByteRange::Bounded(range) => (GetRange::Bounded(range.clone()), Some(range.end - range.start)),
            ByteRange::Suffix(count) => (GetRange::Suffix(count), None),
        };
        let options = GetOptions { range: Some(wanted), ..GetOptions::default() };
        let result = self.inner.get_opts(&self.path(key), options).await;
        let result = result.map_err(|error| self.failed("read", key, error))?;
        let bytes = result.bytes().await.map_err(|error| self.failed("read", key, error))?;
        match exact {
            Some(length) if bytes.len() as u64 != length => Err(self.refused("read", key, Reason::OutOfRange)),
            _ => Ok(bytes),
        }
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        let meta = self.inner.head(&self.path(key)).await;
        meta.map(|meta| meta.size).map_err(|error| self.failed("look at", key, error))
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>> {
        let this = self.clone();
        let prefix = prefix.to_owned();
        let path = this.path(prefix.trim_end_matches('/'));
        let start = if this.prefix.is_empty() { 0 } else { this.prefix.len() + 1 };
        let objects = self.inner.list(Some(&path));
        objects
            .map(move |object| match object {
                Ok(meta) => {
                    let key = meta.location.as_ref().get(start..).unwrap_or_default().to_owned();
                    Ok(Listed { key, size: meta.size })
                }
                Err(error) => Err(this.failed("list", &prefix, error)),
            })
            .boxed()
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        match self.inner.delete(&self.path(key)).await {
            Ok(()) => Ok(()),
            Err(error) => match self.failed("delete", key, error) {
                error if error.is_not_found() => Ok(()),
                error => Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_have_the_reasons_that_controllers_act_upon() {
        for (status, body, reason) in [
            (404, "<Code>NoSuchBucket</Code>", Reason::NoBucket),
            (404, "<Code>NoSuchKey</Code>", Reason::NotFound),
            (403, "<Code>SignatureDoesNotMatch</Code>", Reason::Denied),
            (403, "<Code>InvalidAccessKeyId</Code>", Reason::Denied),
            (401, "", Reason::Denied),
            (507, "", Reason::Full),
            (500, "write: no space left on device", Reason::Full),
            (507, "<Code>XMinioStorageFull</Code>", Reason::Full),
            (503, "<Code>SlowDown</Code>", Reason::Busy),
            (500, "", Reason::Busy),
            (409, "<Code>ConditionalRequestConflict</Code>", Reason::Busy),
            (409, "", Reason::Refused),
            (416, "", Reason::OutOfRange),
            (400, "<Code>InvalidRequest</Code>", Reason::Refused),
        ] {
            assert_eq!(reason_of_status(status, body), reason, "{status} {body}");
        }
    }

    #[test]
    fn a_full_disk_is_found_below_other_errors() {
        let io = std::io::Error::from_raw_os_error(28);
        let error = Error::Generic { store: "test", source: Box::new(io) };
        assert_eq!(reason_of(&error), Reason::Full);
    }
}
