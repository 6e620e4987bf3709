//! What tests against real parts share: a cluster's corner for a scenario, an API server alone.
#![allow(clippy::print_stdout, clippy::panic)]

pub mod api_server;
pub mod faults;
pub mod scenario;
