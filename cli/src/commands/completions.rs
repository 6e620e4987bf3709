//! `lifeboat completions` and the manual pages: both made from the arguments themselves.

use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::options::{Arguments, DONE};
use crate::output;

/// Prints the script for a shell.
pub(crate) fn script(shell: clap_complete::Shell) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "lifeboat", &mut script);
    output::print(format_args!("{}", String::from_utf8(script).context("the script is no text")?));
    Ok(DONE)
}

/// Writes a page for the program and for each command.
pub(crate) fn manual(folder: &Path) -> Result<u8> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    clap_mangen::generate_to(Arguments::command(), folder)
        .with_context(|| format!("cannot write the manual pages into {}", folder.display()))?;
    Ok(DONE)
}
