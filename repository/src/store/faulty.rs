//! A store that fails on purpose: before the effect, after it (a lost answer), on chosen operations.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};

use super::{ByteRange, Listed, Payload, PutOutcome, Reason, Store, StoreError};

/// An operation of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `put_if_absent`
    Put,
    /// `get`
    Get,
    /// `get_range`
    GetRange,
    /// `size`
    Size,
    /// `list`
    List,
    /// `delete`
    Delete,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The operation has no effect and fails.
    Before(Reason),
    /// The operation has its effect, and its answer is replaced by a failure.
    After(Reason),
    /// A put ignores its condition and overwrites, as a store without put-if-absent would.
    IgnoreCondition,
}

type Plan = dyn FnMut(Operation, &str) -> Fault + Send;

/// A store that fails as its plan says.
#[derive(Clone)]
pub struct Faulty {
    inner: Arc<dyn Store>,
    plan: Arc<Mutex<Box<Plan>>>,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({:?})", self.inner)
    }
}

impl Faulty {
    /// Asks `plan` before every operation.
    pub fn new(inner: Arc<dyn Store>, plan: impl FnMut(Operation, &str) -> Fault + Send + 'static) -> Self {
        Self { inner, plan: Arc::new(Mutex::new(Box::new(plan))) }
    }

    fn fault(&self, operation: Operation, key: &str) -> Fault {
        (self.plan.lock().unwrap_or_else(PoisonError::into_inner))(operation, key)
    }

    fn failed(&self, operation: &'static str, key: &str, reason: Reason) -> StoreError {
        StoreError { operation, key: key.to_owned(), store: self.inner.describe(), reason, source: None }
    }

    /// Runs the operation with the fault around it.
    async fn run<T: Send>(
        &self,
        operation: (Operation, &'static str),
        key: &str,
        act: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        match self.fault(operation.0, key) {
            Fault::None | Fault::IgnoreCondition => act.await,
            Fault::Before(reason) => Err(self.failed(operation.1, key, reason)),
            Fault::After(reason) => {
                act.await?;
                Err(self.failed(operation.1, key, reason))
            }
        }
    }
}

#[async_trait]
impl Store for Faulty {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put_if_absent(&self, key: &str, payload: Payload) -> Result<PutOutcome, StoreError> {
        match self.fault(Operation::Put, key) {
            Fault::None => self.inner.put_if_absent(key, payload).await,
            Fault::Before(reason) => Err(self.failed("create", key, reason)),
            Fault::After(reason) => {
                self.inner.put_if_absent(key, payload).await?;
                Err(self.failed("create", key, reason))
            }
            Fault::IgnoreCondition => {
                self.inner.delete(key).await?;
                self.inner.put_if_absent(key, payload).await?;
                Ok(PutOutcome::Created)
            }
        }
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StoreError> {
        self.run((Operation::Get, "read"), key, self.inner.get(key, limit)).await
    }

    async fn get_range(&self, key: &str, range: ByteRange) -> Result<Bytes, StoreError> {
        self.run((Operation::GetRange, "read"), key, self.inner.get_range(key, range)).await
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.run((Operation::Size, "look at"), key, self.inner.size(key)).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<Listed, StoreError>> {
        match self.fault(Operation::List, prefix) {
            Fault::None | Fault::IgnoreCondition => self.inner.list(prefix),
            // A listing that misses everything is what a stale one may look like.
            Fault::After(_) => stream::empty().boxed(),
            Fault::Before(reason) => {
                let error = self.failed("list", prefix, reason);
                stream::once(async { Err(error) }).boxed()
            }
        }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.run((Operation::Delete, "delete"), key, self.inner.delete(key)).await
    }
}
