//! One file a command.

mod backup;
mod cat;
mod check;
mod completions;
mod diff;
mod expire;
mod forget;
mod heal;
mod init;
mod keys;
mod ls;
mod mount;
mod rebuild_index;
mod replicate;
mod restore;
mod scrub;
mod snapshots;
mod stats;

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
        Command::Cat(options) => cat::run(&global, &options).await,
        Command::Diff(options) => diff::run(&global, &options).await,
        Command::Mount(options) => mount::run(&global, &options).await,
        Command::Stats => stats::run(&global).await,
        Command::Keys(options) => keys::run(&global, options.command).await,
        Command::Check(options) => check::run(&global, &options).await,
        Command::Forget(options) => forget::run(&global, &options).await,
        Command::Expire(options) => expire::run(&global, &options).await,
        Command::Scrub(options) => scrub::run(&global, &options).await,
        Command::Heal(options) => heal::run(&global, &options).await,
        Command::Replicate(options) => replicate::run(&global, &options).await,
        Command::RebuildIndex => rebuild_index::run(&global).await,
        Command::Completions(options) => completions::script(options.shell),
        Command::Man(options) => completions::manual(&options.folder),
    }?;
    Ok(ExitCode::from(code))
}
