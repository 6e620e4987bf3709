//! `lifeboat`: back up, list, restore and check a repository without a cluster.
//!
//! Parses arguments and calls one command. This crate is the only one that prints.

mod commands;
mod mount;
mod options;
mod output;
mod progress;
mod repository;

use std::process::ExitCode;

use clap::Parser;
use rustix::process::nice;

/// What is added to the niceness of commands that keep a repository in order.
const BEHIND_OTHERS: i32 = 10;

fn main() -> ExitCode {
    lifeboat_repository::allocator::few_arenas();
    let arguments = options::Arguments::parse();
    // The library for mounts tells of what is no failure: of questions that it has no answer for, of a mount that another took away, of
    // answers for which nobody waits any more.
    let filter = tracing_subscriber::EnvFilter::try_from_env("LIFEBOAT_LOG");
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "warn,fuser=error,fuser::reply=off".into()))
        .with_writer(std::io::stderr)
        .init();
    // Before there are threads, which inherit it.
    if arguments.command.is_upkeep()
        && let Err(error) = nice(BEHIND_OTHERS)
    {
        tracing::warn!(%error, "this command does not let others go first");
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return output::failure(&anyhow::Error::from(error).context("cannot start")),
    };
    let done = runtime.block_on(commands::run(arguments));
    match done.and_then(|code| output::finish().map(|()| code)) {
        Ok(code) => code,
        Err(error) => output::failure(&error),
    }
}
