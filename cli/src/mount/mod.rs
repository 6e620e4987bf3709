//! Snapshots as a read-only file system in user space.
//!
//! `layout` says what stands above the trees, `number` gives every entry an inode number that follows from its place, `served`
//! answers questions, `filesystem` is how the kernel asks them. Nothing here decides what is shown or when it ends: the
//! command does.

mod attributes;
mod filesystem;
mod layout;
mod number;
mod served;

pub(crate) use filesystem::{Mounted, mount};
pub(crate) use served::{Filter, Served};
