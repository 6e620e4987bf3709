//! Lifeboat's repository: a shared, deduplicating, encrypted backup store over any object store.
//!
//! Many writers at once, no locks, no trust in clocks or in LIST. `FORMAT.md` says every byte that is stored.
//! This crate knows nothing of Kubernetes and prints nothing.

mod cache;
pub mod clock;
mod commits;
pub mod config;
mod crypto;
mod directories;
mod engine;
pub mod error;
pub mod id;
mod index;
mod keyring;
pub mod keys;
mod pack;
pub mod read;
mod refset;
pub mod repository;
pub mod session;
pub mod sink;
pub mod snapshot;
pub mod store;
mod wire;
