//! `cargo xtask codegen` writes what is generated; `cargo xtask tidy` checks that it is current, and that the tree is tidy.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod codegen;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

/// The root of the repository.
fn root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(manifest.parent().context("xtask lies in the repository")?.to_owned())
}

fn main() -> ExitCode {
    let verb = std::env::args().nth(1).unwrap_or_default();
    let done = match verb.as_str() {
        "codegen" => root().and_then(|root| codegen::write(&root)),
        "tidy" => root().and_then(|root| tidy::check(&root)),
        _ => {
            eprintln!("usage: cargo xtask codegen|tidy");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
