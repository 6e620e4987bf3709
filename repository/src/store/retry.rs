//! Retries with exponential back-off and full jitter, bounded in number.
//!
//! A `put_if_absent` whose answer was lost may meet its own object. Every object of a repository ends with a
//! hash over a content that includes a random id, so equal size and equal tail prove that it is ours.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

use super::{ByteRange, Listed, Payload, PutOutcome, Store, StoreError};
use crate::error::{Classified, ErrorClass};

/// Objects up to this size are compared wholly when an answer was lost, larger ones by their tail.
const COMPARED_WHOLE: u64 = 64 << 10;
/// Length of the tail that is compared; covers the trailer of every large object.
const COMPARED_TAIL: usize = 64;

/// How often and how fast to retry.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// Attempts in all for transient failures.
    pub attempts: u32,
    /// Attempts in all when the store cannot be reached: fewer, so that a wrong endpoint is told soon.
    pub attempts_unreachable: u32,
    /// Upper bound of the first pause; doubles with each.
    pub first_pause: Duration,
    /// Upper bound of any pause.
    pub longest_pause: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 8,
            attempts_unreachable: 4,
            first_pause: Duration::from_millis(200),
            longest_pause: Duration::from_secs(10),
        }
    }
}

impl RetryPolicy {
    /// Retries without pauses, for tests.
    pub fn immediate(attempts: u32) -> Self {
        let pause = Duration::ZERO;
        Self { attempts, attempts_unreachable: attempts, first_pause: pause, longest_pause: pause }
    }

    /// The pause before the next attempt, or `None` when it is time to give up.
    fn pause(&self, failed_attempts: u32, class: ErrorClass) -> Option<Duration> {
        let attempts = match class {
            ErrorClass::Transient => self.attempts,
            ErrorClass::Unreachable => self.attempts_unreachable,
            _ => return None,
        };
        if failed_attempts >= attempts {
            return None;
        }
        let bound = self.first_pause.saturating_mul(1 << failed_attempts.min(16)).min(self.longest_pause);
        Some(bound.mul_f64(rand::random::<f64>()))
    }
}

/// A store that retries.
#[derive(Debug)]
pub struct Retry {
    inner: Arc<dyn Store>,
    policy: RetryPolicy,
}

/// Runs an operation until it succeeds, fails for good, or the policy gives up.
macro_rules! retried {
    ($self:ident, $call:expr) => {{
        let mut failed = 0;
        loop {
            match $call.await {
                Ok(value) => break Ok(value),
                Err(error) => {
                    failed += 1;
                    let Some(pause) = $self.policy.pause(failed, error.class()) else { break Err(error) };
                    tracing::debug!(%error, failed, "retrying");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }};
}

impl Retry {
    /// Adds retries to a store.
    pub fn new(inner: Arc<dyn Store>, policy: RetryPolicy) -> Self {
        Self { inner, policy }
    }

    /// Whether the object that exists is exactly the one given.
    async fn is_ours(&self, key: &str, payload: &Payload) -> Result<bool, StoreError> {
        if retried!(self, self.inner.size(key))? != payload.len() {
            return Ok(false);
        }
        if payload.len() <= COMPARED_WHOLE {
            return Ok(retried!(self, self.inner.get(key, COMPARED_WHOLE))? == payload.to_bytes());
        }
        let range = ByteRange::Bounded(payload.len() - COMPARED_TAIL as u64..payload.len());
        let tail = retried!(self, self.inner.get_range(key, range.clone()))?;
        Ok(tail == payload.tail(COMPARED_TAIL))
    }
}

#[async_trait]
impl Store for Retry {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        let mut failed = 0;
        loop {
            match self.inner.put_if_absent(key, payload.clone()).await {
                Ok(PutOutcome::Exists) if failed > 0 && self.is_ours(key, &payload).await? => {
                    return Ok(PutOutcome::CreatedEarlier);
                }
                Ok(outcome) => return Ok(outcome),
                Err(error) => {
                    failed += 1;
                    let Some(pause) = self.policy.pause(failed, error.class()) else { return Err(error) };
                    tracing::debug!(%error, failed, "retrying");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        retried!(self, self.inner.get(key, limit))
    }

    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError> {
        retried!(self, self.inner.get_range(key, range.clone()))
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        retried!(self, self.inner.size(key))
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>> {
        // A listing is a hint: whoever uses it copes with a failed one.
        self.inner.list(prefix)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        retried!(self, self.inner.delete(key))
    }
}
