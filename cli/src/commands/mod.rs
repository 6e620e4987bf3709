//! One file a command.

mod backup;
mod check;
mod expire;
mod forget;
mod init;
mod ls;
mod restore;
mod snapshots;

use std::process::ExitCode;

use anyhow::Result;

use crate::options::{Arguments, Command};

/// Runs the command that was written.
pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let global = arguments.global;
    let code = match arguments.command {
        Command::Init => init::run(&global).await,
        Command::Backup(options) => backup::run(&global, options).await,
        Command::Snapshots(options) => snapshots::run(&global, &options).await,
        Command::Ls(options) => ls::run(&global, &options).await,
        Command::Restore(options) => restore::run(&global, &options).await,
        Command::Check(options) => check::run(&global, &options).await,
        Command::Forget(options) => forget::run(&global, &options).await,
        Command::Expire(options) => expire::run(&global, &options).await,
    }?;
    Ok(ExitCode::from(code))
}
