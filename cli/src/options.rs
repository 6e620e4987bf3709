//! What can be written on the command line, and the exit codes.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Everything was done.
pub(crate) const DONE: u8 = 0;
/// Nothing was done, or not to the end.
pub(crate) const FAILED: u8 = 1;
/// Done, but some files could not be read or restored, or damage was found; all are listed.
pub(crate) const INCOMPLETE: u8 = 3;

/// Back up, list, restore and check without a cluster.
///
/// A recovery needs this program, the repository's location and its password or key file, and nothing else.
/// Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 done, but some files could not be read or restored (all are listed).
#[derive(Parser, Debug)]
#[command(name = "lifeboat", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the repository is and how it is opened.
#[derive(Args, Debug)]
pub(crate) struct Global {
    /// The repository: a folder, or `s3://BUCKET/FOLDER?endpoint=URL&region=REGION`
    #[arg(short, long, env = "LIFEBOAT_REPOSITORY", global = true, value_name = "LOCATION")]
    pub(crate) repository: Option<String>,
    /// The password, from the environment only, so that it shows in no list of processes
    #[arg(long, env = "LIFEBOAT_PASSWORD", global = true, hide = true, hide_env_values = true)]
    pub(crate) password: Option<String>,
    /// A file whose first line is the password
    #[arg(long, env = "LIFEBOAT_PASSWORD_FILE", global = true, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
    /// A file with a key of 32 random bytes, instead of a password
    #[arg(long, env = "LIFEBOAT_KEY_FILE", global = true, value_name = "FILE", conflicts_with_all = ["password", "password_file"])]
    pub(crate) key_file: Option<PathBuf>,
    /// Where index files are kept between runs; may be deleted at any time
    #[arg(long, env = "LIFEBOAT_CACHE_DIR", global = true, value_name = "FOLDER")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress and no summary; errors only
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Make a repository at the location
    Init,
    /// Back up a folder
    Backup(Backup),
    /// List the snapshots
    Snapshots(Snapshots),
    /// List the files of a snapshot
    Ls(Ls),
    /// Restore a snapshot into a folder
    Restore(Restore),
    /// Check the repository
    Check(Check),
}

#[derive(Args, Debug)]
pub(crate) struct Backup {
    /// The folder
    pub(crate) path: PathBuf,
    /// A label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    pub(crate) tag: Vec<(String, String)>,
    /// What this is a backup of; snapshots of one lineage build on each other. Default: HOST:PATH
    #[arg(long)]
    pub(crate) lineage: Option<String>,
    /// Leave out what matches; may be given several times
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Do not cross into other file systems
    #[arg(short = 'x', long)]
    pub(crate) one_file_system: bool,
    /// Read every file, also those that did not change since the last snapshot
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Snapshots {
    /// Only this lineage
    #[arg(long)]
    pub(crate) lineage: Option<String>,
    /// Only with this label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    pub(crate) tag: Vec<(String, String)>,
}

#[derive(Args, Debug)]
pub(crate) struct Ls {
    /// A snapshot's id, its first characters, or `latest`
    pub(crate) snapshot: String,
    /// Only this folder or file of the snapshot
    pub(crate) path: Option<PathBuf>,
    /// Also what lies in subfolders
    #[arg(short = 'R', long)]
    pub(crate) recursive: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Restore {
    /// A snapshot's id, its first characters, or `latest`
    pub(crate) snapshot: String,
    /// The folder to restore into; made if missing
    pub(crate) target: PathBuf,
    /// Only this path of the snapshot, or what matches; may be given several times
    #[arg(long, value_name = "PATH|GLOB")]
    pub(crate) include: Vec<String>,
    /// Replace files that exist; without it an existing file is an error
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Do not restore owners (for restores without root)
    #[arg(long)]
    pub(crate) no_owner: bool,
    /// With `latest`: the latest of this lineage
    #[arg(long)]
    pub(crate) lineage: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Check {
    /// Read, decrypt and compare all data, not only the structure
    #[arg(long)]
    pub(crate) read_data: bool,
}

fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_tag_needs_a_name() {
        assert_eq!(tag("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(tag("a").is_err());
        assert!(tag("=b").is_err());
    }
}
