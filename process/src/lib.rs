//! What controller and agent have in common as processes: logs, health, metrics, a way into the repository.
//!
//! No decision about backups belongs here.

pub mod access;
pub mod hold;
pub mod reasons;
pub mod reconnect;
pub mod server;
pub mod telemetry;
