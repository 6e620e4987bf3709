//! Lifeboat's repository: a shared, deduplicating, encrypted backup store over any object store.
//!
//! Many writers at once, no locks, no trust in clocks or in LIST. `FORMAT.md` says every byte that is stored.
//! This crate knows nothing of Kubernetes and prints nothing.

pub mod clock;
pub mod error;
pub mod id;
pub mod read;
pub mod session;
pub mod sink;
pub mod snapshot;
pub mod store;
