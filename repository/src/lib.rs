//! Lifeboat's repository: a shared, deduplicating, encrypted backup store over any object store.
//!
//! Many writers at once, no locks, no trust in clocks or in LIST. `FORMAT.md` says every byte that is stored.
//! This crate knows nothing of Kubernetes and prints nothing.

mod aligned;
pub mod allocator;
pub mod backup;
mod beneath;
pub mod browse;
mod cache;
pub mod check;
pub mod chunk;
pub mod clock;
mod commits;
pub mod config;
mod crypto;
pub mod diff;
mod directories;
#[cfg(test)]
mod double;
mod engine;
pub mod error;
pub mod expire;
#[cfg(test)]
mod fuzz;
mod glob;
pub mod heal;
pub mod id;
pub mod index;
mod keyring;
pub mod keys;
pub mod manifest;
mod meta;
mod objects;
mod pack;
mod parallel;
pub mod progress;
pub mod read;
mod refset;
pub mod replicate;
pub mod repository;
pub mod restore;
pub mod retention;
pub mod scrub;
pub mod session;
pub mod share;
pub mod sink;
pub mod snapshot;
pub mod stats;
pub mod store;
pub mod tree;
mod walk;
mod wire;
