//! Lifeboat's repository: a shared, deduplicating, encrypted backup store over any object store.
//!
//! Many writers at once, no locks, no trust in clocks or in LIST. `FORMAT.md` says every byte that is stored.
//! This crate knows nothing of Kubernetes and prints nothing.

pub mod backup;
mod beneath;
mod cache;
pub mod check;
pub mod chunk;
pub mod clock;
mod commits;
pub mod config;
mod crypto;
mod directories;
#[cfg(test)]
mod double;
mod engine;
pub mod error;
pub mod expire;
mod glob;
pub mod id;
mod index;
mod keyring;
pub mod keys;
pub mod manifest;
mod meta;
mod pack;
mod parallel;
pub mod progress;
pub mod read;
mod refset;
pub mod repository;
pub mod restore;
pub mod retention;
pub mod session;
pub mod sink;
pub mod snapshot;
pub mod store;
pub mod tree;
mod walk;
mod wire;
